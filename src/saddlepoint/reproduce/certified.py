"""What training against bounds proves, and that no attack contradicts it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saddlepoint import zoo
from saddlepoint.attacks import PGD
from saddlepoint.attacks.facade import attack
from saddlepoint.data import Split
from saddlepoint.defenses import IBP, ConvexDual, dual_bounds, interval_initialize, lowest_margins
from saddlepoint.defenses.certified import differences
from saddlepoint.models import Model
from saddlepoint.propagation.graph import export
from saddlepoint.propagation.methods import Method
from saddlepoint.reproduce.frame import Context, Figure, Recipe, entry
from saddlepoint.reproduce.masking import UNIT
from saddlepoint.reproduce.measures import error
from saddlepoint.threats import Linf

SMALL = Linf(0.1)
FORTY_STEPS = PGD(steps=40)
INTERVALS = IBP(threat=Linf(0.12), warmup=1, ramp=4)
DUAL = ConvexDual(threat=SMALL, warmup=1, ramp=2)


def convolutional(in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Wong and Kolter's network, the zoo's cnn-a, with weights for intervals; digits-cnn where its kernels don't fit."""
    name = "cnn-a" if min(in_shape[1:]) >= 28 else "digits-cnn"
    net = zoo.build(name, num_classes=num_classes, in_shape=in_shape)
    interval_initialize(net, int(torch.randint(2**31, ())))
    return net


def shallow(in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """100 hidden units."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(torch.Size(in_shape).numel(), 100), nn.ReLU(), nn.Linear(100, num_classes)
    )  # fmt: skip


@entry(
    "R32",
    "Training against bounds",
    "Wong & Kolter 2018, arXiv:1711.00851, table 1; Gowal et al. 2018, arXiv:1810.12715",
    "convolutions of 16 and 32 channels, 4x4, stride 2, then 100 hidden units, trained by intervals (IBP) at eps 0.12, 8"
    " epochs, eps growing over 4 after a clean one; 100 hidden units alone, trained by the dual at eps 0.1, 5 epochs, eps"
    " growing over 2; both Adam 1e-3, batches of 128; judged at eps 0.1 within [0, 1]; PGD with 40 steps",
)
def bounds_and_attacks(context: Context) -> list[Figure]:
    """The error that is proven to be possible at most lies above what PGD finds, and not far above."""
    by_intervals = context.model(Recipe(convolutional, epochs=8, adversary=INTERVALS, bounds=UNIT))
    by_dual = context.model(Recipe(shallow, epochs=5, adversary=DUAL, bounds=UNIT))
    test = context.few(context.test, len(context.test))
    methods: tuple[Method, ...] = ("ibp", "crown-ibp")
    not_proven = {
        method: float((lowest_margins(by_intervals, test.x, test.y, SMALL, method) <= 0).double().mean()) for method in methods
    }
    dual = float((_dual_margins(by_dual, test) <= 0).double().mean())
    attacked = [_attacked(context, model, test) for model in (by_intervals, by_dual)]
    sound = (0.0, 1.0)
    return [
        Figure("IBP: clean error", error(by_intervals, test.x, test.y), context.accept((0.0, 0.05))),
        Figure("IBP: PGD error", attacked[0]),
        Figure("IBP: error at most, by intervals", not_proven["ibp"], context.accept((0.0, 0.15)), paper=0.0582),
        Figure("IBP: error at most, by CROWN-IBP", not_proven["crown-ibp"], context.accept((0.0, 0.15)), paper=0.0582),
        Figure("IBP: error at most less PGD error", min(not_proven.values()) - attacked[0], sound),
        Figure("dual: clean error", error(by_dual, test.x, test.y)),
        Figure("dual: PGD error", attacked[1]),
        Figure("dual: error at most, by the dual", dual),
        Figure("dual: error at most less PGD error", dual - attacked[1], sound),
    ]


def _attacked(context: Context, model: Model, test: Split) -> float:
    return 1 - attack(model, test.x, test.y, FORTY_STEPS, SMALL, seed=context.seed).robust_accuracy


def _dual_margins(model: Model, test: Split) -> Tensor:
    """The least margins (N,) that the dual proves."""
    graph, found = export(model, test.x).graph(), []
    for x, y in zip(torch.split(test.x, 100), torch.split(test.y, 100), strict=True):
        region = SMALL.around(x, model.bounds)
        low = dual_bounds(graph, region.lower, region.upper, differences(y, graph, x.dtype))
        found.append(low.scatter(1, y[:, None], torch.inf).amin(1))
    return torch.cat(found)
