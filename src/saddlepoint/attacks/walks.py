"""Attacks that walk along the decision boundary by trial and error, with labels alone, in l2.

From an adversarial point x_t at distance r_t from the input x, with u = (x_t - x) / r_t, they try random directions orthogonal
to u, and keep what is adversarial and nearer.
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
from saddlepoint.errors import InputError
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.trees import rows

_HALVINGS = 60  # rounds that the way from the start to the boundary may take
_SMALLEST = 1e-7  # step towards the input, as a share of the distance: below it the walk has ended
_STEEPEST = 1.5  # angle, nearly a right one, at which the circle has come back to the input


def _small(shape: tuple[int, ...], share: float) -> tuple[int, ...]:
    """The shape of the lowest `share` of the frequencies of images (C, H, W); other inputs keep their shape."""
    return (*shape[:-2], *(math.ceil(share * size) for size in shape[-2:])) if share < 1 and len(shape) > 2 else shape


def _image(coefficients: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Directions (B, *shape) of coefficients of `_small` shape."""
    if coefficients.shape[1:] == shape:
        return coefficients
    missing = [whole - part for whole, part in zip(shape[-2:], coefficients.shape[-2:], strict=True)]
    return from_frequencies(functional.pad(coefficients, (0, missing[1], 0, missing[0])))


def _length(v: Tensor) -> Tensor:
    """l2 norms (B,), and no zero."""
    length: Tensor = v.flatten(1).norm(dim=1)
    return length.clamp(min=torch.finfo(v.dtype).tiny)


def _unit(v: Tensor) -> Tensor:
    return v / rows(_length(v), v)


def _across(v: Tensor, u: Tensor) -> Tensor:
    """The part of v (B, ...) that is orthogonal to the unit vectors u (B, ...), with length one."""
    return _unit(v - rows((v * u).flatten(1).sum(1), u) * u)


def _check_whole(attack: BoundaryAttack | SurFree, *names: str) -> None:
    for name in names:
        value = getattr(attack, name)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number >= 1; got {value!r}")


@dataclass(frozen=True)
class Stride:
    """How far each sample goes, (B,) each.

    turn: candidates so far. sphere, source: the two step sizes as shares of the distance, float64. tried, hit: how many points
    on the sphere were asked about since `sphere` was last judged, and how many of them were adversarial. offered, taken: the
    same of candidates and `source`.
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
        summary="random walk along the boundary: a step around the input, and one towards it",
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
    """Boundary attack: a random step on the sphere around the input, then a step towards the input, taken if still adversarial.

        s = x + r_t * (u + sphere * eta) / ||u + sphere * eta||_2,    x_(t+1) = x + (1 - source) * r_t * (s - x) / ||s - x||_2

    with a random unit eta orthogonal to u. Every `check` candidates s is asked about too: where more than half of them are
    adversarial, both steps grow by the factor `adaptation`, where less than a fifth are, both shrink. `source` grows where more
    than a quarter of the candidates are adversarial, and shrinks where less than a tenth are.

    steps: candidates. sphere_step, source_step: the first sizes. memory: answers after which `sphere` and `source` are judged.
    All values are those of the authors' code. The way from the start to the boundary is bisected first, to `precision` of its
    length.

    Source: Brendel, Rauber & Bethge (2018), Decision-based adversarial attacks, arXiv:1712.04248, algorithm 1 and section 2.
    """

    steps: int = 25_000
    sphere_step: float = 0.01
    source_step: float = 0.01
    adaptation: float = 1.5
    check: int = 10
    memory: tuple[int, int] = (10, 30)
    precision: float = 1e-2
    starts: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_whole(self, "steps", "check")
        if not 0 < self.sphere_step < math.inf or not 0 < self.source_step < 1 or not 1 < self.adaptation < math.inf:
            raise InputError(
                "sphere_step must be positive, source_step in (0, 1) and adaptation above 1; "
                f"got {self.sphere_step}, {self.source_step} and {self.adaptation}"
            )

    @property
    def iterations(self) -> int:
        return self.starts + 1 + _HALVINGS + self.steps

    def prepare(self, problem: Problem) -> Stride:
        none, one = torch.zeros_like(problem.labels), torch.ones_like(problem.eps)
        return Stride(none, one * self.sphere_step, one * self.source_step, none, none, none, none)

    def done(self, state: Walk) -> Tensor:
        own: Stride = state.own
        return super().done(state) | (own.turn >= self.steps) | (own.source < _SMALLEST)

    def walk(self, problem: Problem, state: Walk) -> Walk:
        own, x, origin, region = state.own, state.x, problem.origin, problem.region
        r, u = region.distance(x), _unit(x - origin)
        free = region.upper > region.lower
        eta = _across(problem.random(1).normal(tuple(x.shape[1:]), x.dtype) * free, u)
        cos = 1 / (1 + own.sphere**2).sqrt()
        along, aside = (rows((r * part).to(x.dtype), x) for part in (cos, cos * own.sphere))
        around = torch.clamp(origin + along * u + aside * eta, region.lower, region.upper)
        nearer = ((1 - own.source) * r / region.distance(around).clamp(min=1e-300)).clamp(max=1)
        candidate = torch.clamp(origin + rows(nearer.to(x.dtype), x) * (around - origin), region.lower, region.upper)
        check = (own.turn + 1) % self.check == 0
        said = problem.ask(torch.stack([candidate, around], 1), torch.stack([torch.ones_like(check), check], 1))
        taken, on_sphere = said.reached[:, 0], said.reached[:, 1]
        better = taken & (region.distance(candidate) < r)
        both, tried, hit = self._judged(own.tried + check, own.hit + on_sphere, self.memory[0], 0.2, 0.5)
        one, offered, took = self._judged(own.offered + 1, own.taken + taken, self.memory[1], 0.1, 0.25)
        own = Stride(own.turn + 1, own.sphere * both, own.source * both * one, tried, hit, offered, took)
        return replace(state, x=torch.where(rows(better, x), candidate, x), own=own)

    def _judged(self, tried: Tensor, hit: Tensor, enough: int, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
        """By which factor (B,) float64 a step changes, and the counts, which begin anew where there were enough."""
        rate, now = hit / tried.clamp(min=1), tried >= enough
        factor = torch.where(rate > high, self.adaptation, torch.where(rate < low, 1 / self.adaptation, 1.0)).double()
        return torch.where(now, factor, 1.0), tried * ~now, hit * ~now


@dataclass(frozen=True)
class Turn:
    """The circle on which each sample turns.

    base: x_t, where the circle begins; v: its direction, orthogonal to u (B, ...). past: the coefficients of the directions
    drawn last (B, n, ...). drawn: how many were drawn (B,) int64. widest: the largest angle of the first questions (B,)
    float64. trial: how many of them were asked (B,) int64, -1 before a direction is drawn. low: the largest angle that is
    adversarial, 0 while there is none; high: one beyond it that is not, infinite while there is none; (B,) float64, both of
    one sign.
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
    """SurFree: from x_t along a circle to x, in a random plane, to the largest angle that is adversarial.

        x(a) = x + r_t cos(a) (cos(a) u + sin(a) v),    v random, orthogonal to u and to the last directions

    First angles of both signs are asked about, the widest first; the first success is widened until it fails, then bisected
    until the distance is known to `gamma`. The widest angle grows and shrinks by 1 / rho and rho with success and failure.

    steps: directions. theta_max: the first widest angle in degrees. trials: angles of each sign. num_directions: directions to
    which a new one is orthogonal. share: directions are cosines of the lowest share of the frequencies along each of the last
    two dimensions. gamma: precision of the distance, as a share. precision: share of the distance to which the way from the
    start is bisected. theta_max, rho and num_directions are the paper's, which transforms blocks of 8 x 8 where this
    transforms the whole.

    Source: Maho, Furon & Le Merrer (2021), SurFree: a fast surrogate-free black-box attack, arXiv:2011.12807, algorithm 1.
    """

    steps: int = 1000
    theta_max: float = 30.0
    rho: float = 0.98
    trials: int = 3
    num_directions: int = 100
    share: float = 0.5
    gamma: float = 0.01
    precision: float = 1e-2
    starts: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_whole(self, "steps", "trials", "num_directions")
        if not 0 < self.theta_max < 90:
            raise InputError(f"theta_max must lie in (0, 90) degrees; got {self.theta_max}")
        for name in ("rho", "share"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in (0, 1]; got {getattr(self, name)}")
        if not 0 < self.gamma < 1:
            raise InputError(f"gamma must lie in (0, 1); got {self.gamma}")

    @property
    def iterations(self) -> int:
        return self.starts + 1 + _HALVINGS + self.steps * (2 * self.trials + 20)

    @property
    def width(self) -> int:
        return self.num_directions

    def prepare(self, problem: Problem) -> Turn:
        origin, zero, none = problem.origin, torch.zeros_like(problem.eps), torch.zeros_like(problem.labels)
        past = origin.new_zeros(len(origin), self.num_directions, *_small(tuple(origin.shape[1:]), self.share))
        return Turn(origin, origin, past, none, zero + math.radians(self.theta_max), none - 1, zero, zero + math.inf)

    def done(self, state: Walk) -> Tensor:
        own: Turn = state.own
        return super().done(state) | ((own.drawn >= self.steps) & (own.trial < 0))

    def walk(self, problem: Problem, state: Walk) -> Walk:
        state = advance(state.own.trial < 0, self._draw, problem, state)
        own, origin, region = state.own, problem.origin, problem.region
        found_one, single = own.low != 0, own.widest / self.trials
        side = 1.0 - 2.0 * (own.trial % 2)
        first = side * (self.trials - own.trial // 2) * single
        beyond, middle = own.low + own.low.sign() * single, (own.low + own.high) / 2
        angle = torch.where(found_one, torch.where(torch.isinf(own.high), beyond, middle), first)
        way = own.base - origin
        cos, sin = (rows(part.to(way.dtype), way) for part in (angle.cos(), angle.sin()))
        points = origin + cos * (cos * way + rows(_length(way), way) * sin * own.v)
        points = torch.clamp(points, region.lower, region.upper)
        found = problem.reached(points)
        better = found & (region.distance(points) < region.distance(state.x))
        low = torch.where(found, angle, own.low)
        narrower = ~found_one & found & (own.trial >= 2)  # the angle asked before it, on this side, has failed
        high = torch.where(narrower, angle + side * single, torch.where(found_one & ~found, angle, own.high))
        trial = own.trial + (~found_one & ~found).long()
        lost = trial >= 2 * self.trials
        known = (low != 0) & torch.isfinite(high) & ((low.cos() - high.cos()).abs() <= self.gamma)
        over = lost | known | (low.abs() > _STEEPEST)
        won = ~found_one & found
        widest = own.widest * torch.where(lost, self.rho, torch.where(won, 1 / self.rho, 1.0))
        own = replace(own, widest=widest.clamp(max=_STEEPEST), trial=torch.where(over, -1, trial), low=low, high=high)
        return replace(state, x=torch.where(rows(better, points), points, state.x), own=own)

    def _draw(self, problem: Problem, state: Walk) -> Walk:
        """The next plane."""
        own, x, shape = state.own, state.x, tuple(state.x.shape[1:])
        z = problem.random(1).normal(_small(shape, self.share), x.dtype)
        past, flat = own.past.flatten(2), z.flatten(1)[..., None]
        flat = (flat - past.mT @ (past @ flat))[..., 0]
        flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        oldest = torch.arange(self.num_directions, device=x.device) == (own.drawn % self.num_directions)[:, None]
        past = torch.where(oldest[..., None], flat[:, None], past).view_as(own.past)
        free = problem.region.upper > problem.region.lower
        v = _across(_image(flat.view_as(z), shape) * free, _unit(x - problem.origin))
        zero = torch.zeros_like(own.low)
        return replace(
            state, own=Turn(x, v, past, own.drawn + 1, own.widest, torch.zeros_like(own.trial), zero, zero + math.inf)
        )
