"""Randomised smoothing: a network trained under noise has certificates, and adversarial training under noise larger ones."""

from __future__ import annotations

import torch

from saddlepoint.attacks import PGD
from saddlepoint.defenses import GaussianAugmentation, SmoothAdv, Smoothed, Standard
from saddlepoint.defenses.objectives import Objective
from saddlepoint.reproduce.frame import Context, Figure, Recipe, entry
from saddlepoint.reproduce.masking import CNN, UNIT
from saddlepoint.threats import L2
from saddlepoint.verify.smoothing import Certificates, certify

COHEN = "Cohen, Rosenfeld & Kolter 2019, arXiv:1902.02918"
SALMAN = "Salman et al. 2019, arXiv:1906.04584"
CIFAR = "of CIFAR-10, ResNet-110, n = 100,000"
SIGMA, SAMPLES, ALPHA = 0.5, 2000, 0.001
NOISE = GaussianAugmentation(Standard(), SIGMA, clip=False)
ADVERSARIAL = SmoothAdv(threat=L2(1.0), sigma=SIGMA, draws=2, attack=PGD(steps=2, random_start=False))
CERTIFY = f"CERTIFY with n0 = 100, n = {SAMPLES:,}, alpha = {ALPHA}"


def _certificates(context: Context, net: str, adversary: Objective | None) -> Certificates:
    """Of a network that is trained in 3 epochs, for 500 test images."""
    model = context.model(Recipe(net, epochs=3, adversary=adversary, bounds=UNIT))
    some = context.few(context.test, 500)
    return certify(Smoothed(model, SIGMA), some.x, some.y, n=SAMPLES, alpha=ALPHA, seed=context.seed)


@entry(
    "R31",
    "Certificates by randomised smoothing",
    f"{COHEN}, theorem 1, CERTIFY and table of figure 6",
    f"{CNN}, 3 epochs under noise of sigma {SIGMA}, not clipped; 500 test images, {CERTIFY}; the same network trained without"
    " noise beside it",
)
def smoothing(context: Context) -> list[Figure]:
    """A network that is right under noise has a smoothed classifier that is proved right in l2 balls."""
    found = _certificates(context, context.convolutional, NOISE)
    bare = _certificates(context, context.convolutional, None)
    at_0, at_half, at_1 = found.certified_accuracy([0.0, 0.5, 1.0])
    away = (torch.special.ndtr(found.radius / SIGMA) - found.p)[~found.abstained].abs()
    return [
        Figure(
            "certified accuracy, radius 0", at_0, context.accept((0.95, 1.0), loose=(0.3, 1.0)), paper=0.65, paper_note=CIFAR
        ),
        Figure("certified accuracy, radius 0.5", at_half, context.accept((0.85, 1.0)), paper=0.41, paper_note=CIFAR),
        Figure("certified accuracy, radius 1", at_1, context.accept((0.5, 1.0)), paper=0.23, paper_note=CIFAR),
        Figure("abstentions", float(found.abstained.double().mean())),
        Figure("mean certified radius", found.mean_radius, unit=""),
        Figure(
            "most by which Phi(radius / sigma) is off the bound of p", max(away.tolist(), default=0.0), (0.0, 1e-12), unit=""
        ),
        Figure("trained without noise: certified accuracy, radius 0.5", bare.certified_accuracy([0.5])[0]),
    ]


@entry(
    "F5",
    "Adversarial training of the smoothed classifier",
    f"{SALMAN}, table 2",
    f"the zoo's cnn-a, 3 epochs under noise of sigma {SIGMA}, and again by SmoothAdv: 2 draws, 2 steps of PGD within l2 1.0;"
    f" 500 test images, {CERTIFY}",
)
def smooth_adversarial(context: Context) -> list[Figure]:
    """Adversarial examples of the smoothed classifier make large radii more frequent."""
    net = "cnn-a" if context.convolutional == "cnn-s" else context.convolutional
    plain, adversarial = (_certificates(context, net, each) for each in (NOISE, ADVERSARIAL))
    radii = (0.0, 0.5, 1.0, 1.25)
    before, after = plain.certified_accuracy(radii), adversarial.certified_accuracy(radii)
    figures = [
        Figure(f"{name}: certified accuracy, radius {radius:g}", share)
        for name, shares in (("noise", before), ("SmoothAdv", after))
        for radius, share in zip(radii, shares, strict=True)
    ]
    return [
        *figures,
        Figure("noise: mean certified radius", plain.mean_radius, unit=""),
        Figure("SmoothAdv: mean certified radius", adversarial.mean_radius, unit=""),
        Figure("SmoothAdv's gain at radius 1", after[2] - before[2], context.accept((0.0, 1.0), loose=(-0.3, 1.0))),
    ]
