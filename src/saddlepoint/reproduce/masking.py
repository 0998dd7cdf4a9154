"""How an undefended network falls, and how training on one-step examples hides the gradient instead of helping."""

from __future__ import annotations

from typing import Literal

from saddlepoint.attacks import FGSM, PGD, RFGSM
from saddlepoint.attacks.facade import attack
from saddlepoint.defenses import Adversarial
from saddlepoint.models import Model
from saddlepoint.reproduce.frame import Context, Figure, Recipe, entry
from saddlepoint.threats import Linf

EPS = 0.3
UNIT: tuple[float, float] = (0.0, 1.0)  # of these papers, examples stay images
CNN = "convolutions of 16 and 32 channels, 5x5, each with pooling, then 128 hidden units; Adam 1e-3, batches of 128"


def undefended_network(context: Context) -> Model:
    """The convolutional network that several papers' attacks are tried on."""
    return context.model(Recipe(context.convolutional, epochs=5, bounds=UNIT))


@entry(
    "R12",
    "An undefended convolutional network",
    "Madry et al. 2018, arXiv:1706.06083",
    f"{CNN}, 5 epochs; eps 0.3, clipped to [0, 1]; PGD with 40 steps of 0.01",
)
def undefended(context: Context) -> list[Figure]:
    """One step leaves little of its accuracy, forty leave none."""
    model, x, y = undefended_network(context), context.test.x, context.test.y
    one_step = attack(model, x, y, FGSM(), Linf(EPS), seed=context.seed)
    iterated = attack(model, x, y, PGD(steps=40, step_size=0.01), Linf(EPS), seed=context.seed)
    one_left, none_left = context.accept((0.0, 0.5), loose=(0.0, 0.5)), context.accept((0.0, 0.02), loose=(0.0, 0.2))
    larger = "of a wider network"
    return [
        Figure("clean accuracy", one_step.clean_accuracy, paper=0.992, paper_note=larger, goal=0.9915),
        Figure("FGSM accuracy", one_step.robust_accuracy, one_left, paper=0.064, paper_note=larger, goal=0.02),
        Figure("PGD-40 accuracy", iterated.robust_accuracy, none_left, goal=0.0),
    ]


@entry(
    "R15",
    "A random step first: R+FGSM",
    "Tramèr et al. 2018, arXiv:1705.07204",
    f"{CNN}, 4 epochs of 20,000 images, each replaced by its FGSM example for the true label (and once more with clean images"
    " in equal parts); eps 0.3, alpha 0.15, clipped to [0, 1]",
)
def random_step_first(context: Context) -> list[Figure]:
    """After training on FGSM examples, a random step before the gradient's finds errors that FGSM itself no longer does.

    In so short a training its form decides: with clean images in equal parts there is hardly a difference, so that form is
    shown and not judged (docs/reproductions.md).
    """
    clean, plain, random_first = _errors(context, "replace")
    _, plain_mixed, random_first_mixed = _errors(context, "add")
    imagenet = "of ImageNet, Inception v3, steps to the least likely class"
    return [
        Figure("clean error", clean, context.accept(None, loose=(0.0, 0.3)), goal=0.028),
        Figure("FGSM error", plain, paper=0.266, paper_note=imagenet, goal=0.118),
        Figure("R+FGSM error", random_first, paper=0.648, paper_note=imagenet, goal=0.792),
        Figure(
            "their difference", random_first - plain, context.accept((0.05, 1.0)),
            paper=0.382, paper_note=imagenet, goal=0.674,
        ),
        Figure("the difference, clean images in equal parts", random_first_mixed - plain_mixed),
    ]  # fmt: skip


def _errors(context: Context, form: Literal["replace", "add"]) -> tuple[float, float, float]:
    """Errors of a network trained on FGSM examples: clean, under FGSM, under R+FGSM."""
    adversary = Adversarial(attack=FGSM(), threat=Linf(EPS), form=form)
    model = context.model(Recipe(context.convolutional, epochs=4, adversary=adversary, bounds=UNIT, samples=20_000))
    x, y = context.test.x, context.test.y
    plain, random_first = (
        attack(model, x, y, one_step, Linf(EPS), seed=context.seed) for one_step in (FGSM(), RFGSM(random_share=0.5))
    )
    return 1 - plain.clean_accuracy, 1 - plain.robust_accuracy, 1 - random_first.robust_accuracy
