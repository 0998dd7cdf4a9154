"""What makes examples carry over: several models at once, and gradients that don't fit one model alone.

Liu et al. (2017) leave out one of five ImageNet networks, and attack it with examples of the other four. Here they are small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from saddlepoint.attacks import BIM, MIFGSM
from saddlepoint.attacks.transfer import DIFGSM, SINIFGSM, TIFGSM, VMIFGSM, VNIFGSM
from saddlepoint.data import Split
from saddlepoint.engine import Attack
from saddlepoint.evaluate.transfer import transfer_matrix
from saddlepoint.goals import Goal, Targeted, Untargeted
from saddlepoint.models import Classifier, Ensemble
from saddlepoint.reproduce.frame import Context, Figure, Recipe, entry
from saddlepoint.reproduce.masking import UNIT
from saddlepoint.threats import Linf

THREAT = Linf(0.2)
NETWORKS = "convolutional, cnn-a, 2x2 convolutions, 240-240 and 500-150 ReLU units, each 3 epochs of 20,000 images"
ATTACKS: dict[str, Attack] = {
    "BIM": BIM(), "MI-FGSM": MIFGSM(), "DI": DIFGSM(), "TI, kernel 7": TIFGSM(kernel=7), "SI-NI": SINIFGSM(),
    "VMI": VMIFGSM(), "VNI": VNIFGSM(), "VNI and DI": VNIFGSM(diversity=0.5),
}  # fmt: skip


def small_network(in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two 2x2 convolutions of 32 and 64 channels, each with pooling, then 200 hidden units."""
    features = nn.Sequential(
        nn.Conv2d(in_shape[0], 32, 2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    )  # fmt: skip
    size = features(torch.zeros(1, *in_shape)).numel()
    return nn.Sequential(*features, nn.Linear(size, 200), nn.ReLU(), nn.Linear(200, num_classes))


def networks(context: Context) -> dict[str, Classifier]:
    """Five networks of different architectures."""
    built = {name: name for name in (context.convolutional, "cnn-a", "mlp", "mlp-500-150")} | {"small": small_network}
    return {name: context.model(Recipe(net, epochs=3, bounds=UNIT, samples=20_000)) for name, net in built.items()}


@entry(
    "H13",
    "Ensembles carry over better",
    "Liu et al. 2017, arXiv:1611.02770; Dong et al. 2018, arXiv:1710.06081",
    f"{NETWORKS}; 500 images, MI-FGSM with 10 steps, eps 0.2, clipped to [0, 1]; on each network, and on the four others fused"
    " in their logits, their probabilities, and their losses; targets at random; then other attacks on single networks, 100"
    " images (quickly: all with 5 steps)",
)
def ensembles(context: Context) -> list[Figure]:
    """Examples of four networks fool the fifth more often than those of a single one."""
    models, few, mifgsm = networks(context), context.few(context.test, 500), _quick(context, MIFGSM())
    figures, goals = [], {"untargeted": Untargeted(), "targeted": Targeted("random")}
    published = {"targeted": (0.04, "of ImageNet, at most, one of five networks to another")}
    for word, goal in goals.items():
        mean, best = _single(context, models, few, mifgsm, goal)
        paper, note = published.get(word, (None, ""))
        figures += [
            Figure(f"{word}: one network's examples, mean", mean, paper=paper, paper_note=note),
            Figure(f"{word}: of the best one for each, by hindsight", best),
        ]
        for fuse in ("logits", "probabilities", "loss"):
            rate = sum(_left_out(context, models, name, few, fuse, goal) for name in models) / len(models)
            more = context.accept((0.02, 1.0), loose=(0.0, 1.0)) if fuse == "logits" or word == "untargeted" else None
            figures += [
                Figure(f"{word}: four networks', fused in {fuse}", rate),
                Figure(f"{word}: {fuse} less one network's", rate - mean, more),
                Figure(f"{word}: {fuse} less the best one's, by hindsight", rate - best),
            ]
    fewer = context.few(context.test, 100)
    rates = {
        name: _single(context, models, fewer, _quick(context, method), Untargeted())[0] for name, method in ATTACKS.items()
    }
    figures += [Figure(f"{name}, mean", rate) for name, rate in rates.items()]
    more = context.accept((0.0, 1.0), loose=(-0.1, 1.0))
    return [*figures, Figure("the best of them less BIM", max(rates.values()) - rates["BIM"], more)]


def _quick(context: Context, attack: Attack) -> Attack:
    """The attack, with half of its steps where the context is quick."""
    return replace(attack, steps=5) if context.quick else attack  # type: ignore[call-arg]  # all of these have steps


def _single(context: Context, models: Mapping[str, Classifier], few: Split, attack: Attack, goal: Goal) -> tuple[float, float]:
    """Mean rate from one network to another, and the mean over the targets of the best source's."""
    matrix = transfer_matrix(models, few.x, few.y, attack, THREAT, goal=goal, noise=False, seed=context.seed)
    to = [[matrix.rate(source, target) for source in models if source != target] for target in models]
    return sum(map(sum, to)) / sum(map(len, to)), sum(map(max, to)) / len(to)


def _left_out(context: Context, models: Mapping[str, Classifier], name: str, few: Split, fuse: str, goal: Goal) -> float:
    """Rate at which the examples of all the others together fool this one."""
    others = Ensemble([model for other, model in models.items() if other != name], fuse)  # type: ignore[arg-type]  # of the three
    attack = _quick(context, MIFGSM(loss="logit") if fuse == "loss" else MIFGSM())
    pair: dict[str, Classifier] = {"others": others, name: models[name]}
    matrix = transfer_matrix(pair, few.x, few.y, attack, THREAT, sources=["others"], goal=goal, noise=False, seed=context.seed)
    return matrix.rate("others", name)
