"""Attacks that walk along the decision boundary by trial and error, with labels alone, in l2.

From an adversarial point x_t at distance r_t from the input x, with u = (x_t - x) / r_t, they try directions orthogonal to u and
keep what is adversarial and nearer. Of images (C, H, W) the directions are smooth at first: sums of the lowest `cosines`
frequencies along H and along W, and of more and more of them as the search goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from saddlepoint.attacks.decision import Decision, Walk
from saddlepoint.attacks.frequencies import from_frequencies
from saddlepoint.attacks.registry import register
from saddlepoint.attacks.stepping import advance
from saddlepoint.engine import Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.trees import rows

_HALVINGS = 60  # rounds that the way from the start to the boundary may take
_CONVERGED = 1e-7  # of the distance: steps below it lead nowhere


def _lowest(problem: Problem, count: Tensor) -> Tensor:
    """Which coefficients (B, ...) belong to the lowest `count` (B,) frequencies; of inputs without a plane, all features."""
    origin = problem.origin
    if origin.dim() < 4:
        return torch.ones_like(origin, dtype=torch.bool)
    low = [torch.arange(size, device=origin.device) < count[:, None] for size in origin.shape[-2:]]
    plane = low[0][:, :, None] & low[1][:, None]
    return plane.view(len(origin), *([1] * (origin.dim() - 3)), *plane.shape[1:]).expand_as(origin)


def _drawn(problem: Problem, coefficients: Tensor) -> Tensor:
    """The direction (B, ...) that has these coefficients, in the features that may move."""
    direction = coefficients if problem.origin.dim() < 4 else from_frequencies(coefficients)
    return direction * (problem.region.upper > problem.region.lower)


def _unit(v: Tensor) -> Tensor:
    return v / rows(v.flatten(1).norm(dim=1).clamp(min=torch.finfo(v.dtype).tiny), v)


def _across(v: Tensor, u: Tensor) -> Tensor:
    """The part of v (B, ...) that is orthogonal to the unit vectors u (B, ...), of length one."""
    return _unit(v - rows((v * u).flatten(1).sum(1), u) * u)


@dataclass(frozen=True)
class Stride:
    """How far each sample goes, (B,) each.

    turn: candidates so far. sphere, source: step sizes as shares of the distance, float64. around, kept: how many points on the
    sphere were asked about since `sphere` was last judged, and how many of them were adversarial. offered, taken: the same of
    candidates and `source`.
    """

    turn: Tensor
    sphere: Tensor
    source: Tensor
    around: Tensor
    kept: Tensor
    offered: Tensor
    taken: Tensor


@register(
    Declaration(
        summary="random walk along the boundary: a step around the input, and one towards it",
        reference="Brendel, Rauber & Bethge 2018, arXiv:1712.04248",
        norms=frozenset({Norm.L2}),
        access=Access.LABELS,
        minimizes=True,
        spatial=True,
        no_oracle="a random walk comes close to the optimum only after many queries for each feature",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class BoundaryAttack(Decision):
    """Boundary attack: a random step on the sphere around x, then a step towards x; what is adversarial is kept.

        s = x + r_t * (u + a * eta) / sqrt(1 + a^2),    x_(t+1) = x + (1 - b) * (s - x)

    eta is a random unit vector orthogonal to u. The sphere step a and the source step b are multiplied by `adaptation` or divided
    by it: both, where of the last memory[0] points s more than 50 % or less than 20 % were adversarial; b, where of the last
    memory[1] candidates x_(t+1) more than 25 % or less than 10 % were. It ends where b is below 1e-7.

    steps: candidates. sphere_step, source_step: the first a and b, both 0.01 in the paper. check: s is asked about at every so many
    candidates, 10 in the authors' code. memory: (100, 30) there, which takes thousands of queries to find good steps.
    cosines: frequencies of eta at first; after t candidates sqrt(1 + t / 150) times as many. None, as in the paper, for all.

    Source: Brendel, Rauber & Bethge (2018), Decision-based adversarial attacks: reliable attacks against black-box machine learning
    models, arXiv:1712.04248, algorithm 1.

    >>> import torch, saddlepoint as sp
    >>> oracle = sp.Model(torch.nn.Linear(4, 3), access=sp.Access.LABELS)
    >>> x = torch.rand(2, 4)
    >>> found = sp.attack(oracle, x, oracle.predict(x), "boundary_attack", sp.Minimize("l2"), budget=sp.Budget(queries=200))
    >>> int(found.queries.forward.max()) <= 200
    True
    """

    steps: int = 25_000
    sphere_step: float = 0.3
    source_step: float = 0.02
    adaptation: float = 1.5
    check: int = 4
    memory: tuple[int, int] = (5, 10)
    cosines: float | None = 4
    spread: float = 150.
    precision: float = 1e-2
    starts: int = 100

    @property
    def iterations(self) -> int:
        return self.starts + _HALVINGS + self.steps

    @property
    def width(self) -> int:
        return 2

    def prepare(self, problem: Problem) -> Stride:
        none, one = torch.zeros_like(problem.labels), torch.ones_like(problem.eps)
        return Stride(none, one * self.sphere_step, one * self.source_step, none, none, none, none)

    def done(self, state: Walk) -> Tensor:
        return super().done(state) | (state.own.turn >= self.steps) | (state.own.source < _CONVERGED)

    def walk(self, problem: Problem, state: Walk) -> Walk:
        own, x, origin, region = state.own, state.x, problem.origin, problem.region
        r = region.distance(x)
        angle = own.sphere.atan()
        eta = problem.random(1).normal(tuple(x.shape[1:]), x.dtype)
        if self.cosines is not None:
            eta = eta * _lowest(problem, self.cosines * (1 + own.turn / self.spread).sqrt())
            eta = _drawn(problem, eta)
        u = _unit(x - origin)
        along, aside = (rows((r * part).to(x.dtype), x) for part in (angle.cos(), angle.sin()))
        around = torch.clamp(origin + along * u + aside * _across(eta, u), region.lower, region.upper)
        share = ((1 - own.source) * r / region.distance(around).clamp(min=1e-300)).clamp(max=1)
        candidate = torch.clamp(origin + rows(share.to(x.dtype), x) * (around - origin), region.lower, region.upper)
        check = (own.turn + 1) % self.check == 0
        said = problem.ask(torch.stack([candidate, around], 1), torch.stack([torch.ones_like(check), check], 1))
        better = said.reached[:, 0] & (region.distance(candidate) < r)
        return replace(state, x=torch.where(rows(better, x), candidate, x), own=self._judged(own, check, said.reached))

    def _judged(self, own: Stride, check: Tensor, reached: Tensor) -> Stride:
        around, kept = own.around + check, own.kept + reached[:, 1]
        offered, taken = own.offered + 1, own.taken + reached[:, 0]
        both, over = self._factor(kept, around, self.memory[0], 0.2, 0.5)
        towards, done = self._factor(taken, offered, self.memory[1], 0.1, 0.25)
        return Stride(
            own.turn + 1, own.sphere * both, own.source * both * towards,
            around * ~over, kept * ~over, offered * ~done, taken * ~done,
        )  # fmt: skip

    def _factor(self, hits: Tensor, asked: Tensor, enough: int, low: float, high: float) -> tuple[Tensor, Tensor]:
        """By how much a step changes (B,) float64, and where that was decided (B,)."""
        judged, rate = asked >= enough, hits / asked.clamp(min=1)
        power = (judged & (rate > high)).double() - (judged & (rate < low)).double()
        return self.adaptation**power, judged


@dataclass(frozen=True)
class Turn:
    """The circle on which each sample turns.

    base: x_t, where the circle begins (B, ...). v: its direction (B, ...). order: coefficients in the order of their turns
    (B, D) int64. cycle: which order it is (B,) int64, place: how many of it had their turn. drawn: directions so far. widest: the
    first angle to ask about (B,) float64. trial: which question comes next (B,) int64, -1 before a direction is drawn. low: the
    largest angle known to be adversarial, 0 while there is none; high: one beyond it that is not, infinite while there is none.
    """

    base: Tensor
    v: Tensor
    order: Tensor
    count: Tensor
    cycle: Tensor
    place: Tensor
    drawn: Tensor
    widest: Tensor
    trial: Tensor
    low: Tensor
    high: Tensor


@register(
    Declaration(
        summary="turns the adversarial point around the input in one plane after another, and bisects the angle",
        reference="Maho, Furon & Le Merrer 2021, arXiv:2011.12807",
        norms=frozenset({Norm.L2}),
        access=Access.LABELS,
        minimizes=True,
        spatial=True,
        no_oracle="each plane holds but a small part of the way to the nearest point",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class SurFree(Decision):
    """SurFree."""

    steps: int = 10000
    theta_max: float = 20.0
    rho: float = 0.9
    trials: int = 1
    cosines: float | None = 4
    growth: float = 1.4
    gamma: float = 0.01
    precision: float = 1e-2
    starts: int = 100

    @property
    def iterations(self) -> int:
        return self.starts + _HALVINGS + self.steps * (2 * self.trials + 20)

    def prepare(self, problem: Problem) -> Turn:
        origin, zero, none = problem.origin, torch.zeros_like(problem.eps), torch.zeros_like(problem.labels)
        order = torch.zeros_like(origin.flatten(1), dtype=torch.int64)
        return Turn(origin, origin, order, none, none - 1, none, none, zero + math.radians(self.theta_max), none - 1, zero, zero + math.inf)

    def done(self, state: Walk) -> Tensor:
        return super().done(state) | ((state.own.drawn >= self.steps) & (state.own.trial < 0))

    def walk(self, problem: Problem, state: Walk) -> Walk:
        state = advance(state.own.trial < 0, self._draw, problem, state)
        own, origin, region = state.own, problem.origin, problem.region
        single = own.widest / self.trials
        side = 1.0 - 2.0 * (own.trial % 2)
        first = side * (self.trials - own.trial // 2) * single
        beyond = own.low + own.low.sign() * single
        middle = (own.low + own.high) / 2
        angle = torch.where(own.low == 0, first, torch.where(torch.isinf(own.high), beyond, middle))
        way = own.base - origin
        r = region.distance(own.base)
        cos, sin = angle.cos(), angle.sin()
        points = torch.clamp(origin + rows((cos * cos).to(way), way) * way + rows((r * cos * sin).to(way), way) * own.v, region.lower, region.upper)
        found = problem.reached(points)
        better = found & (region.distance(points) < region.distance(state.x))
        missed = (own.low == 0) & ~found
        hit = (own.low == 0) & found
        low = torch.where(found, angle, own.low)
        high = torch.where(hit & (own.trial >= 2), angle + side * single, own.high)
        high = torch.where(~found & (own.low != 0), angle, high)
        trial = own.trial + missed.long()
        lost = trial >= 2 * self.trials
        over = lost | ((low != 0) & (low.cos() - high.cos() <= self.gamma) & torch.isfinite(high)) | (low.abs() > 1.5)
        widest = own.widest * torch.where(lost, self.rho, torch.where(hit, 1 / self.rho, 1.0))
        return replace(state, x=torch.where(rows(better, points), points, state.x),
            own=replace(own, widest=widest.clamp(max=1.5), trial=torch.where(over, -1, trial), low=low, high=high))

    def _draw(self, problem: Problem, state: Walk) -> Walk:
        state = advance(state.own.place >= state.own.count, self._shuffle, problem, state)
        own, x = state.own, state.x
        one = torch.zeros_like(own.order, dtype=x.dtype).scatter(1, own.order.gather(1, own.place[:, None]), 1.0)
        v = _across(_drawn(problem, one.view_as(x)), _unit(x - problem.origin))
        zero = torch.zeros_like(own.low)
        return replace(state, own=replace(own, base=x, v=v, place=own.place + 1, drawn=own.drawn + 1, trial=torch.zeros_like(own.trial), low=zero, high=zero + math.inf))

    def _shuffle(self, problem: Problem, state: Walk) -> Walk:
        own = state.own
        cycle = own.cycle + 1
        low = _lowest(problem, (self.cosines or math.inf) * self.growth ** cycle.double()).flatten(1)
        chance = problem.random(1).uniform((low.shape[1],)).masked_fill(~low, 2.0)
        return replace(state, own=replace(own, order=chance.argsort(1), count=low.sum(1), cycle=cycle, place=torch.zeros_like(cycle)))
