"""Goodfellow, Shlens & Szegedy (2015), Explaining and harnessing adversarial examples, arXiv:1412.6572.

Inputs in [0, 1], eps = 0.25, no clipping of the adversarial examples, error over the whole test set; "confidence" is the
probability of the predicted class, averaged over the errors. ReLU stands for the paper's maxout.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid

from saddlepoint.attacks import FGSM, PGD
from saddlepoint.attacks.facade import attack
from saddlepoint.defenses import Adversarial
from saddlepoint.goals import FalsePositive
from saddlepoint.models import Model
from saddlepoint.reproduce.frame import Context, Figure, Recipe, entry, only
from saddlepoint.reproduce.measures import confidence_on_errors, error, fgsm
from saddlepoint.threats import Linf

EPS = 0.25
PAPER = "Goodfellow et al. 2015, arXiv:1412.6572"
MAXOUT = "of a maxout network"
UNCLIPPED = "without clipping"
DEEP = "784-240-240-10 ReLU network, Adam 1e-3, 5 epochs of batches of 128"


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5, weight_decay=1e-3)


SOFTMAX = Recipe("softmax", epochs=10, optimizer=_sgd)
MLP = Recipe("mlp", epochs=5)
HARDENED = Recipe("mlp", epochs=5, adversary=Adversarial(attack=FGSM(), threat=Linf(EPS), form="regularize", alpha=0.5))
PAIR = (3, 7)


def logistic(in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Logistic regression: one logit, w.x + b."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(in_shape), 1))


LOGISTIC = Recipe(logistic, epochs=20, classes=PAIR)
# for a linear model, and for no other, FGSM is the exact inner maximum
WORST_CASE = replace(LOGISTIC, adversary=Adversarial(attack=FGSM(), threat=Linf(EPS)))


@entry(
    "R1",
    "Softmax regression under FGSM",
    f"{PAPER}, section 4",
    "softmax regression, SGD 0.1 with momentum 0.5 and weight decay 1e-3, 10 epochs of batches of 128; FGSM eps 0.25",
)
def softmax_regression(context: Context) -> list[Figure]:
    """Linear models are fooled by a step that is small in every pixel."""
    model, x, y = context.model(SOFTMAX), context.test.x, context.test.y
    free, clipped = fgsm(model, x, y, EPS), fgsm(model, x, y, EPS, bounds=context.data.bounds)
    wrong, sure = context.accept((0.995, 1.0), loose=(0.8, 1.0)), context.accept((0.75, 0.95))
    return [
        Figure("clean error", error(model, x, y), goal=0.081),
        Figure("FGSM error", error(model, free, y), wrong, paper=0.999, goal=1.0),
        Figure("confidence on errors", confidence_on_errors(model, free, y), sure, paper=0.793, goal=0.893),
        Figure("FGSM error, clipped", error(model, clipped, y), wrong, paper=0.999, paper_note=UNCLIPPED, goal=0.999),
        Figure(
            "confidence on errors, clipped", confidence_on_errors(model, clipped, y), sure,
            paper=0.793, paper_note=UNCLIPPED, goal=0.816,
        ),
    ]  # fmt: skip


def worst_case_loss(w: Tensor, b: Tensor, x: Tensor, sign: Tensor, eps: float) -> Tensor:
    """The largest logistic loss in the l-infinity ball, zeta(eps * ||w||_1 - y * (w.x + b)), for labels y = `sign` +-1. (N,)

    zeta(z) = log(1 + exp(z)). The paper prints y * (eps * ||w||_1 - w.x - b) inside, which is right for y = +1 only.
    """
    # not softplus, which torch rounds to its argument above 20
    return -logsigmoid(sign * (x.flatten(1) @ w + b) - eps * w.abs().sum())


@entry(
    "R2",
    "Logistic regression, 3 against 7: FGSM is exact",
    f"{PAPER}, section 5",
    "logistic regression on classes 3 and 7, Adam 1e-3, 20 epochs of batches of 128; FGSM eps 0.25",
)
def logistic_regression(context: Context) -> list[Figure]:
    """For a linear model the worst case has a closed form, and FGSM reaches it."""
    model, test = context.model(LOGISTIC), only(context.test, PAIR)
    hardened, x, y = context.model(WORST_CASE), test.x, test.y
    wrong = context.accept((0.98, 1.0), loose=(0.8, 1.0))
    gap, size = _closed_form(model, x, y)
    return [
        Figure("clean error", error(model, x, y), context.accept((0.0, 0.025), loose=(0.0, 0.1)), paper=0.016, goal=0.0177),
        Figure("FGSM error", error(model, fgsm(model, x, y, EPS), y), wrong, paper=0.99, goal=1.0),
        Figure("largest gap of FGSM's loss to the closed form", gap, (0.0, 1e-6), unit=""),
        Figure("l1 norm of w", size, goal=92.6, unit=""),
        Figure("clean error, trained on the worst case", error(hardened, x, y), goal=0.055),
        Figure("FGSM error, trained on the worst case", error(hardened, fgsm(hardened, x, y, EPS), y), goal=0.242),
    ]


def _closed_form(model: Model, x: Tensor, y: Tensor) -> tuple[float, float]:
    """How far FGSM's loss is from the worst case at most, and ||w||_1; in float64, as losses near eps * ||w||_1 need."""
    net = copy.deepcopy(model.net)
    assert isinstance(net, nn.Module)
    exact, x = Model(net.double(), bounds=None), x.double()
    w, b = (parameter.detach().squeeze() for parameter in net.parameters())
    reached = cross_entropy(exact.logits(fgsm(exact, x, y, EPS)), y, reduction="none")
    return float((reached - worst_case_loss(w, b, x, 2 * y - 1, EPS)).abs().max()), float(w.abs().sum())


@entry("R3", "A deep network under FGSM", f"{PAPER}, section 4", f"{DEEP}; FGSM eps 0.25")
def deep_network(context: Context) -> list[Figure]:
    """Depth doesn't help: deep networks are linear enough."""
    model, x, y = context.model(MLP), context.test.x, context.test.y
    adversarial = fgsm(model, x, y, EPS)
    wrong, sure = context.accept((0.85, 1.0), loose=(0.5, 1.0)), context.accept((0.8, 1.0))
    return [
        Figure("clean error", error(model, x, y), goal=0.0215),
        Figure("FGSM error", error(model, adversarial, y), wrong, paper=0.894, paper_note=MAXOUT, goal=0.9965),
        Figure(
            "confidence on errors", confidence_on_errors(model, adversarial, y), sure,
            paper=0.976, paper_note=MAXOUT, goal=0.942,
        ),
    ]  # fmt: skip


@entry(
    "R4",
    "Training on FGSM examples",
    f"{PAPER}, section 6",
    f"{DEEP}; with and without the loss 0.5 L(x) + 0.5 L(x + eps sign grad), eps 0.25, whose example is a constant",
)
def adversarial_training(context: Context) -> list[Figure]:
    """The network resists the examples that are made by FGSM for itself, and classifies clean inputs as well as before."""
    plain, hardened, x, y = context.model(MLP), context.model(HARDENED), context.test.x, context.test.y
    own, clean = error(hardened, fgsm(hardened, x, y, EPS), y), error(hardened, x, y)
    own_before, clean_before = error(plain, fgsm(plain, x, y, EPS), y), error(plain, x, y)
    resists = context.accept((0.0, 0.3), loose=(0.0, own_before))
    no_worse = context.accept((0.0, clean_before + 0.005), loose=(0.0, clean_before + 0.05))
    return [
        Figure("clean error, undefended", clean_before, goal=0.0215),
        Figure("clean error", clean, no_worse, goal=0.0208),
        Figure("FGSM error, undefended", own_before, paper=0.894, paper_note=MAXOUT, goal=0.9965),
        Figure("own FGSM error", own, resists, paper=0.179, paper_note=MAXOUT, goal=0.105),
    ]


@entry(
    "R5",
    "What FGSM training leaves open",
    f"{PAPER}, section 6 (transfer); PGD: Madry et al. 2018, arXiv:1706.06083",
    "the networks of R4, all examples within eps 0.25, PGD with 20 steps",
)
def what_is_left_open(context: Context) -> list[Figure]:
    """Examples of another network, and of more than one step, still fool it: its own gradient was hidden, not its error."""
    plain, hardened, x, y = context.model(MLP), context.model(HARDENED), context.test.x, context.test.y
    for_plain, for_hardened = fgsm(plain, x, y, EPS), fgsm(hardened, x, y, EPS)
    own, transferred = error(hardened, for_hardened, y), error(hardened, for_plain, y)
    iterated = attack(hardened, x, y, PGD(steps=20), Linf(EPS), seed=context.seed)
    at_least_one_sample = 1 / len(y)
    return [
        Figure("own FGSM error", own, paper=0.179, paper_note=MAXOUT, goal=0.105),
        Figure("error on the undefended network's examples", transferred, paper=0.196, paper_note=MAXOUT, goal=0.497),
        Figure(
            "their difference", transferred - own, context.accept((at_least_one_sample, 1.0)),
            paper=0.017, paper_note=MAXOUT, goal=0.392,
        ),
        Figure("undefended network on its examples", error(plain, for_hardened, y), paper=0.409, paper_note=MAXOUT, goal=0.888),
        Figure("PGD-20 error", 1 - iterated.robust_accuracy, context.accept((0.9, 1.0), loose=(own, 1.0)), goal=0.995),
    ]  # fmt: skip


@entry(
    "R6",
    "Confident about rubbish",
    PAPER,
    "the networks of R1 and R3 on 10,000 inputs of standard normal noise; an error is any class of probability above 0.5",
)
def rubbish(context: Context) -> list[Figure]:
    """Inputs that belong to no class are assigned one."""
    noise = context.rubbish
    linear, linear_confidence = _taken_for_a_class(context.model(SOFTMAX), noise)
    deep, deep_confidence = _taken_for_a_class(context.model(MLP), noise)
    return [
        Figure("softmax regression: error", linear, context.accept((0.4, 0.95)), paper=0.598, goal=0.805),
        Figure("softmax regression: confidence", linear_confidence, paper=0.708, goal=0.784),
        Figure(
            "deep network: error", deep, context.accept((0.9, 1.0), loose=(0.5, 1.0)),
            paper=0.9835, paper_note=MAXOUT, goal=0.977,
        ),
        Figure("deep network: confidence", deep_confidence, paper=0.928, paper_note=MAXOUT, goal=0.914),
    ]  # fmt: skip


def _taken_for_a_class(model: Model, x: Tensor) -> tuple[float, float]:
    """The share of inputs that reach the goal `FalsePositive(probability=0.5)` as they are, and their mean confidence."""
    logits = model.logits(x)
    goal, nobody = FalsePositive(probability=0.5), torch.zeros(len(x), dtype=torch.int64)
    reached = goal.aim(nobody, logits.argmax(1), logits.shape[1]).margin(logits) > 0
    return float(reached.double().mean()), float(logits.double().softmax(1).amax(1)[reached].mean())
