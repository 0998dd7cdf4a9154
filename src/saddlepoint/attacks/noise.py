"""Random directions, the baseline that every attack must beat: noise of the same size rarely fools a classifier.

One draw each; `Restarts(UniformNoise(), 100)` tries a hundred.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from saddlepoint.attacks.registry import register
from saddlepoint.engine import ALL_NORMS, Attack, Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.trees import rows


@dataclass(frozen=True)
class Drawn:
    """A random point (B, ...)."""

    x: Tensor


def _noise(summary: str, reference: str, norms: frozenset[Norm] = ALL_NORMS) -> Declaration:
    return Declaration(
        summary=summary,
        reference=reference,
        norms=norms,
        access=Access.LABELS,
        iterative=False,
        no_oracle="a random direction is almost orthogonal to the one that matters",
    )


class Noise(Attack):
    """Base: the random point is drawn by `init`, and the engine judges it."""

    @abstractmethod
    def draw(self, problem: Problem) -> Tensor:
        """A feasible random point for each sample (B, ...)."""

    @property
    @final
    def iterations(self) -> int:
        return 0

    @final
    def cost(self, classes: int) -> tuple[int, int]:
        return (0, 0)

    @final
    def init(self, problem: Problem) -> Drawn:
        return Drawn(self.draw(problem))

    @final
    def step(self, problem: Problem, state: Drawn) -> Drawn:
        return state


@register(_noise("a uniformly random point of the ball", "baseline of Goodfellow et al. 2015, arXiv:1412.6572, section 7"))
@final
@dataclass(frozen=True, kw_only=True)
class UniformNoise(Noise):
    """A point drawn uniformly from the ball, then clipped to the input range."""

    def draw(self, problem: Problem) -> Tensor:
        return problem.random_point()


@register(_noise("Gaussian noise, projected into the ball", "baseline of Szegedy et al. 2014, arXiv:1312.6199, table 2"))
@final
@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Noise):
    """x + N(0, std^2), projected into the ball and the input range.

    std: in input units. None fills the ball: eps for l-infinity and l0, eps / sqrt(d) for l2, eps / d for l1 with d features.
    """

    std: float | None = None

    def __post_init__(self) -> None:
        if self.std is not None and not (self.std > 0 and math.isfinite(self.std)):
            raise InputError(f"std must be a positive number or None; got {self.std}")

    def draw(self, problem: Problem) -> Tensor:
        x = problem.origin
        features = x[0].numel() if len(x) else 1
        share = {Norm.L2: features**-0.5, Norm.L1: 1 / features}.get(problem.region.threat.norm, 1.0)
        std = problem.eps * share if self.std is None else problem.eps * 0 + self.std
        noise = problem.random().normal(tuple(x.shape[1:]), x.dtype)
        return problem.project(x + noise * rows(std.to(x.dtype), x))


@register(
    _noise(
        "a random corner of the l-infinity ball",
        "control of Goodfellow et al. 2015, arXiv:1412.6572, section 5",
        frozenset({Norm.LINF}),
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class SignNoise(Noise):
    """x + eps * s with each entry of s being -1 or +1 at random: as large as FGSM's step, and mostly harmless."""

    def draw(self, problem: Problem) -> Tensor:
        x = problem.origin
        return problem.project(x + problem.random().sign(tuple(x.shape[1:]), x.dtype) * rows(problem.eps.to(x.dtype), x))


@register(
    _noise(
        "random features at an end of their range",
        "baseline of Rauber, Brendel & Bethge 2017, arXiv:1707.04131 (salt-and-pepper noise)",
        frozenset({Norm.L0}),
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class SaltAndPepperNoise(Noise):
    """eps random features (or pixels), each at one end of the input range or the other. Needs bounds."""

    def draw(self, problem: Problem) -> Tensor:
        region, x = problem.region, problem.origin
        upwards = problem.random(1).uniform(tuple(x.shape[1:])) > 0.5
        ends = torch.where(upwards & (region.upper > x) | (region.lower >= x), region.upper, region.lower)
        return torch.where(problem.random_point() != x, ends, x)
