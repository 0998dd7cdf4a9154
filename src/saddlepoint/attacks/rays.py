"""RayS: a search over the corners of the l-infinity ball by verdicts alone.

    min over d in {-1, 1}^D of r(d),    r(d) = the smallest r for which clip(x + r * d) is adversarial

Signs are flipped block by block. A flip is looked at only if it is adversarial at the best radius so far, for one query; then
its own radius is bisected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from saddlepoint.attacks.registry import register
from saddlepoint.engine import Attack, Declaration, Problem
from saddlepoint.errors import CapabilityError, InputError
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.trees import rows


@dataclass(frozen=True)
class Ray:
    """The search over signs.

    x: the point asked about (B, ...). signs: the best direction (B, D). radius: its radius (B,) float64. level: into 2^level
    blocks the features are cut, of which number `block` is flipped (B,) int64; level -1 for the first direction, which flips
    none. low, high: radii of the flipped direction that fail and succeed, (B,) float64; low is -1 before the first answer
    about it. gap: by how much the radius is lowered while no failure is known.
    """

    x: Tensor
    signs: Tensor
    radius: Tensor
    level: Tensor
    block: Tensor
    low: Tensor
    high: Tensor
    gap: Tensor


@register(
    Declaration(
        summary="flips signs in ever smaller blocks, and keeps what is adversarial at a smaller radius; labels alone",
        reference="Chen & Gu 2020, arXiv:2006.12792",
        norms=frozenset({Norm.LINF}),
        access=Access.LABELS,
        minimizes=True,
        no_oracle="the corner of a linear model takes a query for each feature",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class RayS(Attack):
    """Ray searching: no estimate of a gradient, no step size, no point to begin from. One query a step.

    The first direction is (1, ..., 1). Blocks are halved when all of them have been tried; blocks of one feature are tried
    again and again. Needs bounds.

    steps: queries after the first one. precision: share of the radius by which a flip must win, and to which radii are
    bisected; the paper has 1e-3 of the input range, and bisects from 0, where here the bisection begins at the best radius.

    Source: Chen & Gu (2020), RayS: a ray searching method for hard-label adversarial attack, arXiv:2006.12792, algorithms 1 to
    3.

    >>> import torch, saddlepoint as sp
    >>> oracle = sp.Model(torch.nn.Linear(6, 3), access=sp.Access.LABELS)
    >>> x = torch.rand(2, 6)
    >>> found = sp.attack(oracle, x, oracle.predict(x), "rays", sp.Minimize("linf"), budget=sp.Budget(queries=100))
    >>> found.queries.forward.tolist()
    [100, 100]
    """

    steps: int = 10000
    precision: float = 1e-3

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"steps must be a whole number >= 1; got {self.steps!r}")
        if not 0 < self.precision < 1:
            raise InputError(f"precision must lie in (0, 1); got {self.precision!r}")

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def looks_last(self) -> bool:
        return False

    @property
    def randomized(self) -> bool:
        return False

    def cost(self, classes: int) -> tuple[int, int]:
        return (1, 0)

    def init(self, problem: Problem) -> Ray:
        region, x = problem.without_ball().region, problem.origin
        widest = (region.upper - region.lower).flatten(1).amax(1).double()
        if not bool(torch.isfinite(widest).all()):
            raise CapabilityError("RayS begins at the corners of the input range: give the model bounds")
        none = torch.zeros_like(problem.labels)
        return Ray(x, torch.ones_like(x).flatten(1), widest, none - 1, none, -torch.ones_like(widest), widest, widest)

    def step(self, problem: Problem, state: Ray) -> Ray:
        problem = problem.without_ball()
        flipped = self._flipped(state)
        fresh = state.low < 0
        first = state.level < 0
        at_once = torch.where(first, state.radius, (1 - self.precision) * state.radius)
        lowered = torch.maximum(state.high - state.gap, state.high / 2)
        radius = torch.where(fresh, at_once, torch.where(state.low > 0, (state.low + state.high) / 2, lowered))
        points = self._at(problem, flipped, radius)
        found = problem.reached(points)
        high = torch.where(found, radius, state.high)
        low = torch.where(found, state.low.clamp(min=0), radius)
        won = (low > 0) & (high - low <= self.precision * high) & ~(fresh & ~found)
        lost = fresh & ~found
        best = torch.where(won, high, state.radius)
        signs = torch.where(won[:, None], flipped, state.signs)
        over = won | lost
        level, block = self._next(state)
        return Ray(
            x=points,
            signs=signs,
            radius=best,
            level=torch.where(over, level, state.level),
            block=torch.where(over, block, state.block),
            low=low.masked_fill(over, -1.0),
            high=torch.where(over, best, high),
            gap=torch.where(over | fresh, 4 * self.precision * best, 2 * state.gap),
        )

    @staticmethod
    def _size(level: Tensor, features: int) -> Tensor:
        """Features of a block (B,)."""
        size = torch.ceil(features / 2.0 ** level.clamp(min=0, max=62).double()).long()
        return size.clamp(min=1)

    def _flipped(self, state: Ray) -> Tensor:
        features = state.signs.shape[1]
        size = self._size(state.level, features)
        place = torch.arange(features, device=size.device) // size[:, None]
        inside = (place == state.block[:, None]) & (state.level >= 0)[:, None]
        return torch.where(inside, -state.signs, state.signs)

    def _next(self, state: Ray) -> tuple[Tensor, Tensor]:
        features = state.signs.shape[1]
        size = self._size(state.level, features)
        last = (state.block + 1) * size >= features
        last |= state.level < 0
        return torch.where(last, state.level + 1, state.level), torch.where(last, 0, state.block + 1)

    @staticmethod
    def _at(problem: Problem, signs: Tensor, radius: Tensor) -> Tensor:
        x, region = problem.origin, problem.region
        return torch.clamp(x + rows(radius.to(x.dtype), x) * signs.view_as(x), region.lower, region.upper)
