"""Szegedy et al. (2014), Intriguing properties of neural networks, arXiv:1312.6199, section 4.1.

FC10(lambda) is softmax regression, FC100-100-10 has sigmoid units. The loss of a layer of k units and weights w is
lambda * sum(w^2) / k. Distortion is the root of the mean squared change of a pixel, that is |r|_2 / sqrt(784).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from saddlepoint.attacks import LBFGS
from saddlepoint.attacks.facade import attack
from saddlepoint.defenses.objectives import Batch, Objective
from saddlepoint.goals import Targeted
from saddlepoint.reproduce.frame import Context, Figure, Recipe, entry
from saddlepoint.reproduce.measures import error, right
from saddlepoint.threats import Minimize

UNIT: tuple[float, float] = (0.0, 1.0)


@final
@dataclass(frozen=True)
class WeightDecay(Objective):
    """Mean cross-entropy and, for each linear layer of k units, its `strength` times the sum of its squared weights over k."""

    strengths: tuple[float, ...]

    def loss(self, batch: Batch) -> Tensor:
        linear = [layer for net in batch.model.networks() for layer in net.modules() if isinstance(layer, nn.Linear)]
        decay = [
            strength * layer.weight.square().sum() / layer.out_features
            for strength, layer in zip(self.strengths, linear, strict=True)
        ]
        return cross_entropy(batch.model.forward(batch.x), batch.y) + sum(decay)

    def settings(self) -> dict[str, object]:
        return {"name": "WeightDecay", "strengths": list(self.strengths)}


def sigmoid_network(in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two hidden layers of 100 sigmoid units."""
    hidden = [nn.Flatten(), nn.Linear(math.prod(in_shape), 100), nn.Sigmoid(), nn.Linear(100, 100), nn.Sigmoid()]
    return nn.Sequential(*hidden, nn.Linear(100, num_classes))


WEAK, MEDIUM, STRONG = (Recipe("softmax", 10, WeightDecay((decay,)), bounds=UNIT) for decay in (1e-4, 1e-2, 1.0))
DEEP = Recipe(sigmoid_network, 20, WeightDecay((1e-5, 1e-5, 1e-6)), bounds=UNIT)


@entry(
    "R7",
    "Distortions by L-BFGS",
    "Szegedy et al. 2014, arXiv:1312.6199, section 4.1",
    "softmax regression with three weight decays, 10 epochs, and 784-100-100-10 sigmoid network, 20 epochs; Adam 1e-3, batches"
    " of 128; 100 training images in [0, 1], each towards all other classes; L-BFGS, 60 evaluations for each of 10 c",
)
def distortions(context: Context) -> list[Figure]:
    """Every image can be turned into every class; the more the weights decay, the more it takes."""
    names = ("FC10(1e-4)", "FC10(1e-2)", "FC10(1)", "FC100-100-10")
    errors, successes, found = zip(*(_attacked(context, recipe) for recipe in (WEAK, MEDIUM, STRONG, DEEP)), strict=True)
    weak, medium, strong, _ = found
    always, loose = context.accept((1.0, 1.0), loose=(0.9, 1.0)), (1.0, 10.0)
    papers, goals = (0.062, 0.1, 0.14, 0.058), (0.0608, 0.0922, 0.107, 0.0457)
    musts = ((0.65 * 0.062, 1.35 * 0.062), (0.65 * 0.1, 1.35 * 0.1), None, (0.035, 0.08))
    return [
        *(
            Figure(f"{name}: test error", wrong, paper=paper, goal=goal)
            for name, wrong, paper, goal in zip(
                names, errors, (0.074, 0.094, 0.2, 0.0164), (0.079, 0.083, 0.141, 0.025), strict=True
            )
        ),
        *(Figure(f"{name}: success", share, always, paper=1.0, goal=1.0) for name, share in zip(names, successes, strict=True)),
        *(
            Figure(f"{name}: distortion", size, context.accept(must), paper=paper, goal=goal, unit="")
            for name, size, must, paper, goal in zip(names, found, musts, papers, goals, strict=True)
        ),
        Figure("FC10(1e-2)'s over FC10(1e-4)'s", medium / weak, loose, goal=1.52, unit=""),
        Figure("FC10(1)'s over FC10(1e-2)'s", strong / medium, loose, goal=1.16, unit=""),
    ]


def _attacked(context: Context, recipe: Recipe) -> tuple[float, float, float]:
    """The network's test error, and the share and the mean distortion of the attack's successes."""
    model = context.model(recipe)
    assert context.data.train is not None  # Context saw to it
    x, y = right(model, context.few(context.data.train, 100))
    result = attack(model, x, y, LBFGS(), Minimize("l2"), Targeted("all"), seed=context.seed)
    size = float(result.distances["l2"][result.success].mean()) / math.sqrt(x[0].numel())
    return error(model, context.test.x, context.test.y), float(result.success.double().mean()), size
