"""How little it takes: the smallest perturbations that the papers' own searches find.

All on test images that the network gets right, since the others need none; distances are means over successes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saddlepoint.attacks import FGM, FGSM, JSMA, Bisect, CarliniWagnerL2, DeepFool
from saddlepoint.attacks.facade import attack
from saddlepoint.engine import AttackResult
from saddlepoint.goals import Targeted
from saddlepoint.models import Model
from saddlepoint.reproduce.frame import Context, Figure, Range, Recipe, entry
from saddlepoint.reproduce.masking import CNN, UNIT, undefended_network
from saddlepoint.reproduce.measures import error, fgsm, right
from saddlepoint.threats import Minimize

LARGER = "of a larger network"
QUICKLY = CarliniWagnerL2(steps=50, searches=6, initial_c=0.1, learning_rate=0.03)
WIDE = Recipe("mlp-500-150", epochs=5, bounds=UNIT)
_FOOLED, _FGS_STEP, _FGS_STEPS = 0.9, 0.005, 200


@entry(
    "R8",
    "A few pixels: JSMA",
    "Papernot et al. 2016, arXiv:1511.07528",
    f"{CNN}, 5 epochs; 100 images, each towards all other classes; pairs of pixels to 1 (theta +1) or to 0 (theta -1), at most"
    " 14.5% of them, Jacobian of the probabilities",
)
def saliency(context: Context) -> list[Figure]:
    """Four pixels in a hundred are enough, and making them white takes fewer than making them black."""
    model = undefended_network(context)
    x, y = right(model, context.few(context.test, 100))
    up, down = (
        attack(model, x, y, JSMA(theta=theta, jacobian="softmax"), Minimize("l0"), Targeted("all"), seed=context.seed)
        for theta in (1.0, -1.0)
    )
    pixels = x[0].numel()
    share_up, share_down = (_mean_distance(result, "l0") / pixels for result in (up, down))
    return [
        Figure("theta +1: success", _success(up), context.accept((0.9, 1.0), loose=(0.3, 1.0)), paper=0.971, goal=1.0),
        Figure("theta +1: share of pixels", share_up, context.accept((0.02, 0.06)), paper=0.0402, goal=0.0347),
        Figure("theta -1: success", _success(down), paper=0.647, goal=1.0),
        Figure("theta -1: share of pixels", share_down, goal=0.0439),
        Figure("how many times as many at theta -1", share_down / share_up, context.accept((1.0, 10.0)), goal=1.27, unit=""),
    ]


@dataclass(frozen=True)
class Published:
    """A network of the paper, and what it says of it; goals as in `Figure`."""

    name: str
    rho: float
    fgs: float
    must: Range
    goal: float
    goal_steps: float


LENET = Published("LeNet-like", rho=0.2, fgs=1.0, must=(0.1, 0.25), goal=0.159, goal_steps=1.96)
FC500 = Published("FC500-150-10", rho=0.11, fgs=0.39, must=(0.06, 0.15), goal=0.0786, goal_steps=1.3)


@entry(
    "R9",
    "DeepFool's robustness rho",
    "Moosavi-Dezfooli et al. 2016, arXiv:1511.04599",
    f"{CNN}, 5 epochs; 784-500-150-10 ReLU network, Adam 1e-3, 5 epochs of batches of 128; 200 images, overshoot 0.02; rho is"
    " the mean of |r|_2 / |x|_2; FGS with the smallest eps, in steps of 0.005, that fools 90%; no clipping unless it is said",
)
def robustness(context: Context) -> list[Figure]:
    """A step or two to the nearest boundary go a third of the way that the gradient's sign needs."""
    return [
        *_rho(context, undefended_network(context), LENET),
        *_rho(context, context.model(WIDE), FC500),
    ]


def _rho(context: Context, model: Model, published: Published) -> list[Figure]:
    x, y = right(model, context.few(context.test, 200))
    unbounded = Model(model.net, bounds=None)
    free, clipped = (attack(m, x, y, DeepFool(), Minimize("l2"), seed=context.seed) for m in (unbounded, model))
    least = attack(model, x, y, Bisect(FGSM()), Minimize("linf"), seed=context.seed)
    name, rho, in_range = published.name, _relative(free, x), _relative(clipped, x)
    steps = float(free.iterations.double().mean()) - 1  # the last one only looks
    shorter = context.accept((2.0, 20.0), loose=(1.0, 20.0))
    return [
        Figure(f"{name}: success", _success(free), context.accept((1.0, 1.0), loose=(0.9, 1.0))),
        Figure(f"{name}: rho", rho, context.accept(published.must), paper=published.rho, goal=published.goal, unit=""),
        Figure(f"{name}: steps", steps, context.accept((1.0, 4.0), loose=(1.0, 10.0)), goal=published.goal_steps, unit=""),
        Figure(f"{name}: FGS over it", _fgs(model, x, y) / rho, shorter, paper=published.fgs / published.rho, unit=""),
        Figure(f"{name}: rho, clipped", in_range, paper=published.rho, paper_note="without clipping", unit=""),
        Figure(f"{name}: each image's least FGSM over that", _relative(least, x) / in_range, unit=""),
    ]


def _fgs(model: Model, x: Tensor, y: Tensor) -> float:
    """rho of the fast gradient sign method at the smallest eps that fools 90% of the images; nan where no eps up to 1 does."""
    for step in range(1, _FGS_STEPS + 1):
        points = fgsm(model, x, y, step * _FGS_STEP)
        if error(model, points, y) >= _FOOLED:
            return float(((points - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)).double().mean())
    return math.nan


@entry(
    "R10",
    "Carlini & Wagner's l2 attack",
    "Carlini & Wagner 2017, arXiv:1608.04644",
    f"{CNN}, 5 epochs; 100 images in [0, 1]; tanh, Adam 0.01, 9 searches of 200 steps from c = 0.001 on (quickly: 0.03,"
    " 6 of 50 from 0.1), random targets; FGM with each image's smallest eps",
)
def carlini_wagner(context: Context) -> list[Figure]:
    """It always succeeds, and is nearer than DeepFool, which is nearer than one step along the gradient."""
    model = undefended_network(context)
    x, y = right(model, context.few(context.test, 100))
    search = QUICKLY if context.quick else CarliniWagnerL2(steps=200)
    targeted = attack(model, x, y, search, Minimize("l2"), Targeted("random"), seed=context.seed)
    nearest, newton, one_step = (
        attack(model, x, y, method, Minimize("l2"), seed=context.seed) for method in (search, DeepFool(), Bisect(FGM()))
    )
    all_succeed = nearest.success & newton.success & one_step.success
    cw, deepfool, fgm = (float(result.distances["l2"][all_succeed].mean()) for result in (nearest, newton, one_step))
    always, nearer = context.accept((1.0, 1.0), loose=(0.9, 1.0)), context.accept((0.0, 1.0), loose=(0.0, 1.1))
    return [
        Figure("targeted: success", _success(targeted), always, paper=1.0, goal=1.0),
        Figure(
            "targeted: distance", _mean_distance(targeted, "l2"), context.accept((1.3, 2.6)),
            paper=1.76, paper_note=LARGER, goal=2.43, unit="",
        ),
        Figure("untargeted: success", _success(nearest), always, paper=1.0),
        Figure(
            "untargeted: distance", _mean_distance(nearest, "l2"),
            paper=1.36, paper_note=f"to the nearest of the nine targets, {LARGER}", unit="",
        ),
        Figure("DeepFool: success", _success(newton)),
        Figure("DeepFool: distance", _mean_distance(newton, "l2"), paper=2.11, paper_note=LARGER, unit=""),
        Figure("FGM: success", _success(one_step)),
        Figure("FGM: distance", _mean_distance(one_step, "l2"), unit=""),
        Figure("C&W's distance over DeepFool's", cw / deepfool, nearer, unit=""),
        Figure("DeepFool's over FGM's", deepfool / fgm, nearer, unit=""),
    ]  # fmt: skip


def _success(result: AttackResult) -> float:
    return float(result.success.double().mean())


def _mean_distance(result: AttackResult, norm: str) -> float:
    return float(result.distances[norm][result.success].mean())


def _relative(result: AttackResult, x: Tensor) -> float:
    """Mean of |r|_2 / |x|_2 over the successes."""
    size = result.distances["l2"] / torch.linalg.vector_norm(x.flatten(1).double(), dim=1)
    return float(size[result.success].mean())
