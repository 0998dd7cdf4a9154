"""What verification proves, and how near attacks come to it."""

from __future__ import annotations

import math

import torch
from torch import nn

from saddlepoint.attacks import FAB, FGSM, PGD, Bisect, CarliniWagnerLinf
from saddlepoint.attacks.facade import attack
from saddlepoint.engine import Attack
from saddlepoint.propagation.graph import read
from saddlepoint.reproduce.frame import Context, Figure, Recipe, entry
from saddlepoint.reproduce.masking import UNIT
from saddlepoint.reproduce.measures import right
from saddlepoint.threats import Minimize
from saddlepoint.verify.exact import nearest, proved_radius

_IMAGES, _IMAGES_QUICK, _SECONDS, _ROUNDING = 10, 2, 60.0, 1e-3
_ATTACKS: dict[str, Attack | str] = {
    "FGSM": Bisect(FGSM()),
    "PGD-40": Bisect(PGD(steps=40)),
    "C&W": CarliniWagnerLinf(),
    "FAB": FAB(),
    "minimal": "minimal",
}


def linear(shape: tuple[int, ...], classes: int) -> nn.Module:
    """A linear classifier."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))


def tiny(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two layers of 16 ReLUs."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(shape), 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, classes)
    )


@entry(
    "R33",
    "Exact distances to another class",
    "Carlini et al. 2017, arXiv:1709.10207; Tjeng et al. 2019, arXiv:1711.07356",
    "784-16-16-10 ReLU network and 784-10 linear one, Adam 1e-3, 5 epochs of batches of 128, l-infinity in [0, 1]; the first 10"
    " test images that each gets right (quickly: 2), at most a minute each; radii that CROWN proves by bisection; attacks that"
    " look for the smallest perturbation, FGSM and PGD by bisection of eps",
)
def exact_distances(context: Context) -> list[Figure]:
    """The exact distance lies between what bounds prove and what attacks find; on linear networks attacks find it."""
    figures = []
    for name, net in (("linear", linear), ("ReLU", tiny)):
        model = context.model(Recipe(net, epochs=5, bounds=UNIT))
        few = right(model, context.test)
        x, y = (part[: _IMAGES_QUICK if context.quick else _IMAGES] for part in few)
        exact = nearest(model, x, y, seconds=_SECONDS, seed=context.seed)
        attacks = dict(list(_ATTACKS.items())[-1:]) if context.quick else _ATTACKS
        found = {kind: attack(model, x, y, one, Minimize("linf"), seed=context.seed) for kind, one in attacks.items()}
        nearer = max(float((exact.lower / result.distance).max()) for result in found.values())
        figures += [
            Figure(f"{name}: proved to be the nearest", float(exact.proved.double().mean()), context.accept((1.0, 1.0))),
            Figure(f"{name}: mean exact distance", float(exact.distance.mean()), unit=""),
            Figure(
                f"{name}: largest quotient of the lower bound and an attack's distance", nearer, (0.0, 1.0 + _ROUNDING), unit=""
            ),
        ]
        if net is tiny:
            graph = read(model, x[:1])
            radii = [proved_radius(graph, one, int(c), UNIT, 1.0) for one, c in zip(x, y, strict=True)]
            proved = torch.tensor(radii, dtype=torch.float64) / exact.distance
            figures += [
                Figure(f"{name}: mean quotient of CROWN's radius and the distance", float(proved.mean()), unit=""),
                Figure(f"{name}: the largest", float(proved.max()), (0.0, 1.0 + _ROUNDING), unit=""),
            ]
        for kind, result in found.items():
            quotient = result.distance / exact.distance
            figures.append(Figure(f"{name}: {kind}'s success", float(result.success.double().mean())))
            figures.append(Figure(f"{name}: {kind}'s mean distance over it", float(quotient[result.success].mean()), unit=""))
        best = torch.stack([result.distance for result in found.values()]).amin(0) / exact.distance
        must = (1 - _ROUNDING, 1 + _ROUNDING) if net is linear else (1 - _ROUNDING, 2.0)
        figures.append(Figure(f"{name}: the best attack's over it, at most", float(best.max()), must, unit=""))
    return figures
