"""Attacks on a classifier and its detector at once that keep the two gradients apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from saddlepoint.attacks.registry import register
from saddlepoint.attacks.stepping import Stepping
from saddlepoint.engine import Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.goals import Aim
from saddlepoint.taxonomy import Norm
from saddlepoint.trees import rows


@dataclass(frozen=True)
class Point:
    """State: the iterate (B, ...)."""

    x: Tensor


@register(
    Declaration(
        summary="steps along the gradient of classifier or detector, whichever holds out, at right angles to the other's",
        reference="Bryniarski et al. 2022, arXiv:2106.15023",
        norms=frozenset({Norm.LINF, Norm.L2}),
        linear_oracle=1.05,  # as PGD
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class OrthogonalPGD(Stepping):
    """Projected gradient descent against a model that rejects inputs, with selective and orthogonal gradients.

    While the class is still right, a step follows the classifier's gradient g, less its part along the detector's gradient h;
    then the detector's, less its part along the classifier's:

        g' = g - (<g, h> / <h, h>) h        or        h' = h - (<h, g> / <g, g>) g

    So neither step undoes the other at first order, and no weight between two losses must be found. With both reached, the
    smaller margin leads (that matters for keep="margin"). On a model that rejects nothing it is PGD on the margin from the
    input itself.

    orthogonal: False for the selective gradients g and h alone, the paper's other attack. steps: the paper takes up to 1000.
    step_size: in input units; None means 4 * eps / steps, twice there and back. schedule of it: linear decay.

    Source: Bryniarski, Hingun, Pachuca, Wang & Carlini (2022), Evading adversarial example detection defenses with orthogonal
    projected gradient descent, arXiv:2106.15023, section 4.

    >>> import saddlepoint as sp
    >>> digits, model = sp.data.load("digits"), sp.Model(sp.zoo.build("digits-cnn"))
    >>> detector = sp.detectors.MaxProbability().fit(model, digits.train).calibrate(digits.test.x[:100])
    >>> x, y = digits.test.x[100:104], digits.test.y[100:104]
    >>> len(sp.attack(model, x, y, sp.attacks.OrthogonalPGD(steps=5), sp.Linf(0.1), sp.Evade(detector)))
    4
    """

    steps: int = 100
    step_size: float | None = None
    orthogonal: bool = True

    def __post_init__(self) -> None:
        self._check_whole(steps=1)
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise InputError(f"step_size must be a positive number or None; got {self.step_size}")

    def cost(self, classes: int) -> tuple[int, int]:
        return 1, 2

    @property
    def takes_start(self) -> bool:
        return True

    def init(self, problem: Problem) -> Point:
        return Point(problem.begin(problem.origin))

    def step(self, problem: Problem, state: Point) -> Point:
        x = state.x
        logits, gradients = problem.jacobian(x, _differences)
        direction = gradients[:, 0]
        if problem.aim.rejects:
            fooled, accepted = problem.aim.margins(logits)
            fooled, accepted = fooled - problem.needed, accepted - problem.needed
            detectors = (fooled >= 0) & (accepted < fooled)
            direction, other = gradients.unbind(1)
            if self.orthogonal:
                direction, other = _without(direction, other), _without(other, direction)
            direction = torch.where(rows(detectors, x), other, direction)
        first = 4 / self.steps * problem.eps if self.step_size is None else torch.full_like(problem.eps, self.step_size)
        size = first * (1 - problem.k.to(first.device) / self.steps)
        return Point(problem.project(x + problem.steepest(direction, size, x)))


def _differences(logits: Tensor, aim: Aim) -> Tensor:
    """Weights (Q, m, C) of logits whose sums are the margins: the classifier's, and where the model rejects the detector's."""
    wanted, unwanted = aim.wanted, aim.unwanted
    if aim.rejects:  # the last column is the detector's
        unwanted = unwanted.clone()
        unwanted[:, -1] = False
    classifier = _one_hot(logits, wanted) - _one_hot(logits, unwanted)
    if not aim.rejects:
        return classifier[:, None]
    rejected = torch.zeros_like(wanted)
    rejected[:, -1] = True
    return torch.stack([classifier, _one_hot(logits, ~rejected) - rejected.to(logits.dtype)], 1)


def _one_hot(logits: Tensor, allowed: Tensor) -> Tensor:
    """A 1 for the largest of the allowed logits, (Q, C)."""
    top = logits.masked_fill(~allowed, -math.inf).argmax(1, keepdim=True)
    return torch.zeros_like(logits).scatter(1, top, 1)


def _without(gradient: Tensor, other: Tensor) -> Tensor:
    """The part of each gradient (B, ...) at right angles to the other."""
    along, length = (gradient * other).flatten(1).sum(1), other.flatten(1).square().sum(1)
    share = torch.where(length > 0, along / length.clamp(min=torch.finfo(length.dtype).tiny), torch.zeros_like(along))
    return gradient - rows(share, gradient) * other
