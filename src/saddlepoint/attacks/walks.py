"""Attacks that walk along the decision boundary by trial and error, with labels alone, in l2.

From an adversarial point x_t at distance r_t from the input x, with u = (x_t - x) / r_t, they try random directions orthogonal to u
and keep what is adversarial and nearer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from saddlepoint.attacks.decision import Decision, Walk
from saddlepoint.attacks.frequencies import from_frequencies
from saddlepoint.attacks.registry import register
from saddlepoint.attacks.stepping import advance
from saddlepoint.engine import Declaration, Problem
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.trees import rows

_HALVINGS = 60  # rounds that the way from the start to the boundary may take


def _noise(problem: Problem, share: float) -> Tensor:
    """Gaussian directions (B, ...) in the features that may move.

    Of images (C, H, W) only the lowest `share` of the frequencies along H and along W.
    """
    shape, dtype = problem.origin.shape[1:], problem.origin.dtype
    if share < 1 and len(shape) > 2:
        small = [math.ceil(share * size) for size in shape[-2:]]
        coefficients = problem.random(1).normal((*shape[:-2], *small), torch.promote_types(dtype, torch.float32))
        padding = (0, shape[-1] - small[1], 0, shape[-2] - small[0])
        noise = from_frequencies(functional.pad(coefficients, padding)).to(dtype)
    else:
        noise = problem.random(1).normal(tuple(shape), dtype)
    return noise * (problem.region.upper > problem.region.lower)


def _length(v: Tensor) -> Tensor:
    """l2 norms (B,), and no zero."""
    return v.flatten(1).norm(dim=1).clamp(min=torch.finfo(v.dtype).tiny)


def _across(v: Tensor, u: Tensor) -> Tensor:
    """The part of v (B, ...) that is orthogonal to the unit vectors u (B, ...), of length one."""
    v = v - rows((v * u).flatten(1).sum(1), u) * u
    return v / rows(_length(v), v)


@dataclass(frozen=True)
class Stride:
    """How far each sample goes, (B,) each.

    turn: candidates so far. sphere, source: step sizes as shares of the distance, float64. tried, hit: how many points on the
    sphere were asked about since `sphere` was last judged, and how many of them were adversarial; offered, taken: the same of
    candidates and `source`.
    """

    turn: Tensor
    sphere: Tensor
    source: Tensor
    tried: Tensor
    hit: Tensor
    offered: Tensor
    taken: Tensor


@register(
    Declaration(
        summary="random walk along the boundary, a step around the input and one towards it",
        reference="Brendel, Rauber & Bethge 2018, arXiv:1712.04248",
        norms=frozenset({Norm.L2}),
        access=Access.LABELS,
        minimizes=True,
        no_oracle="a random walk needs as many queries as there are features for each halving of what is too much",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class BoundaryAttack(Decision):
    """Boundary attack."""

    steps: int = 25_000
    sphere_step: float = 0.01
    source_step: float = 0.01
    adaptation: float = 1.5
    check: int = 10
    memory: tuple[int, int] = (10, 30)
    starts: int = 100
    precision: float = 1e-2
    share: float = 1.0

    @property
    def iterations(self) -> int:
        return self.starts + _HALVINGS + self.steps

    def prepare(self, problem: Problem) -> Stride:
        none, one = torch.zeros_like(problem.labels), torch.ones_like(problem.eps)
        return Stride(none, one * self.sphere_step, one * self.source_step, none, none, none, none)

    def done(self, state: Walk) -> Tensor:
        return super().done(state) | (state.own.turn >= self.steps) | (state.own.source < 1e-7)

    def walk(self, problem: Problem, state: Walk) -> Walk:
        own, x, origin, region = state.own, state.x, problem.origin, problem.region
        r = region.distance(x)
        u = (x - origin) / rows(_length(x - origin), x)
        eta = _across(_noise(problem, self.share), u)
        cos, sin = r / (1 + own.sphere**2).sqrt(), r * own.sphere / (1 + own.sphere**2).sqrt()
        around = torch.clamp(origin + rows(cos.to(x.dtype), x) * u + rows(sin.to(x.dtype), x) * eta, region.lower, region.upper)
        nearer = ((1 - own.source) * r / region.distance(around).clamp(min=1e-300)).clamp(max=1)
        candidate = torch.clamp(origin + rows(nearer.to(x.dtype), x) * (around - origin), region.lower, region.upper)
        check = (own.turn + 1) % self.check == 0
        said = problem.ask(torch.stack([candidate, around], 1), torch.stack([torch.ones_like(check), check], 1))
        hit, on = said.reached[:, 0] , said.reached[:, 1]
        better = hit & (region.distance(candidate) < r)
        tried, hits = own.tried + check, own.hit + on
        offered, taken = own.offered + 1, own.taken + hit
        judge1, judge2 = tried >= self.memory[0], offered >= self.memory[1]
        rate1, rate2 = hits / tried.clamp(min=1), taken / offered
        f1 = torch.where(judge1 & (rate1 > 0.5), self.adaptation, torch.where(judge1 & (rate1 < 0.2), 1 / self.adaptation, 1.0)).double()
        f2 = torch.where(judge2 & (rate2 > 0.25), self.adaptation, torch.where(judge2 & (rate2 < 0.1), 1 / self.adaptation, 1.0)).double()
        own = Stride(own.turn + 1, own.sphere * f1, own.source * f1 * f2, tried * ~judge1, hits * ~judge1, offered * ~judge2, taken * ~judge2)
        return replace(state, x=torch.where(rows(better, x), candidate, x), own=own)


@dataclass(frozen=True)
class Turn:
    """The circle on which each sample turns.

    base: x_t, where the circle begins (B, ...). v: its direction, orthogonal to u. past: the coefficients of the directions drawn
    last (B, n, K). drawn: how many were drawn (B,) int64. widest: the largest angle of the first questions (B,) float64. trial: how
    many of them were asked (B,) int64, -1 before a direction is drawn. low: the largest angle that is adversarial, 0 while there is
    none; high: one beyond it that is not, infinite while there is none; (B,) float64, both of one sign.
    """

    base: Tensor
    v: Tensor
    past: Tensor
    drawn: Tensor
    widest: Tensor
    trial: Tensor
    low: Tensor
    high: Tensor


@register(
    Declaration(
        summary="turns the adversarial point around the input in random planes, and bisects the angle",
        reference="Maho, Furon & Le Merrer 2021, arXiv:2011.12807",
        norms=frozenset({Norm.L2}),
        access=Access.LABELS,
        minimizes=True,
        spatial=True,
        no_oracle="each random plane holds but a small part of the way to the nearest point",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class SurFree(Decision):
    """SurFree."""

    steps: int = 1000
    theta_max: float = 30.0
    rho: float = 0.98
    trials: int = 3
    num_directions: int = 100
    share: float = 0.5
    gamma: float = 0.01
    precision: float = 1e-2
    starts: int = 100

    @property
    def iterations(self) -> int:
        return self.starts + _HALVINGS + self.steps * (2 * self.trials + 20)

    @property
    def width(self) -> int:
        return self.num_directions

    def prepare(self, problem: Problem) -> Turn:
        origin, zero, none = problem.origin, torch.zeros_like(problem.eps), torch.zeros_like(problem.labels)
        past = origin.new_zeros(len(origin), self.num_directions, *_few(origin, self.share))
        return Turn(origin, origin, past, none, zero + math.radians(self.theta_max), none - 1, zero, zero + math.inf)

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
        r = _length(way)
        cos, sin = angle.cos().to(r), angle.sin().to(r)
        points = torch.clamp(origin + rows(cos, way) * (rows(cos, way) * way + rows(r * sin, way) * own.v), region.lower, region.upper)
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
        own, x = state.own, state.x
        z = _coefficients(problem, self.share)
        past = own.past.flatten(2)
        flat = z.flatten(1)
        if self.num_directions:
            flat = flat - torch.einsum("bk,bkd->bd", torch.einsum("bkd,bd->bk", past, flat), past)
        flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-30)
        z = flat.view_as(z)
        slot = own.drawn % max(1, self.num_directions)
        here = torch.arange(past.shape[1], device=x.device) == slot[:, None]
        past = torch.where(here[..., None], flat[:, None], past).view_as(own.past)
        u = x - problem.origin
        v = _across(_image(z, problem), u / rows(_length(u), u))
        zero = torch.zeros_like(own.low)
        return replace(state, own=Turn(x, v, past, own.drawn + 1, own.widest, torch.zeros_like(own.trial), zero, zero + math.inf))


def _few(origin, share):
    shape = origin.shape[1:]
    if share < 1 and len(shape) > 2:
        return (*shape[:-2], *[math.ceil(share * size) for size in shape[-2:]])
    return tuple(shape)


def _coefficients(problem, share):
    return problem.random(1).normal(_few(problem.origin, share), problem.origin.dtype)


def _image(z, problem):
    shape = problem.origin.shape[1:]
    if z.shape[1:] != shape:
        z = from_frequencies(functional.pad(z, (0, shape[-1] - z.shape[-1], 0, shape[-2] - z.shape[-2])))
    return z
