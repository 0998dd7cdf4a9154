"""A walk along the decision boundary, towards the input.

Each step solves, for the present point x_k and the input x,

    min ||x_k + d - x||_p    with    ||d||_2 <= r,    <b, d> = c,    lower <= x_k + d <= upper

where b is the margin's gradient and c the margin that is missing. All samples are solved together by fixed numbers of guarded
Newton steps on two numbers: t, the multiplier of the boundary, and s, that of the trust region.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from saddlepoint.attacks.fab import aimed
from saddlepoint.attacks.registry import register
from saddlepoint.attacks.stepping import advance, on_the_way
from saddlepoint.engine import ALL_NORMS, Attack, Declaration, Problem
from saddlepoint.errors import CapabilityError, InputError
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import L0, L2, Linf, Region
from saddlepoint.trees import select, take

_OUTER, _INNER = 16, 12  # Newton steps for the trust region, and at most for the boundary in each of them
_ROUNDS = 6  # choices of features in l0
_ALIKE = 10  # looks for a start of the first kind, before both kinds take turns
_CLOSE = 1e-3  # share of the trust region that may stay unused


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(1, keepdim=True)


@dataclass(frozen=True)
class Step:
    """The problem of a step, one row a sample, in float64: (B, D) and (B, 1).

    normal: b. gain: c. home: from x_k to the input. low, high: the ends of the range, from x_k. radius: r. noise: what c may be
    missed by.
    """

    normal: Tensor
    gain: Tensor
    home: Tensor
    low: Tensor
    high: Tensor
    radius: Tensor
    noise: Tensor

    def missing(self, move: Tensor) -> Tensor:
        """What the moves (B, D) leave to be gained, (B, 1); 0 for what is noise."""
        missing = self.gain - _dot(self.normal, move)
        return torch.where(missing.abs() <= self.noise, 0.0, missing)


Move = tuple[Tensor, Tensor, Tensor]
"""Moves d (B, D) with dd/dt and dd/ds."""
Family = Callable[[Step, Tensor], Callable[[Tensor], Move]]
"""For s (B, 1), moves as a function of t (B, 1). Their norm grows with s."""


def _l2(this: Step, s: Tensor) -> Callable[[Tensor], Move]:
    """d = clip(s * home + t * b): the shortest move at s = 0, without a trust region at s = 1."""

    def moves(t: Tensor) -> Move:
        wanted = s * this.home + t * this.normal
        free = ((wanted > this.low) & (wanted < this.high)).double()
        return torch.clamp(wanted, this.low, this.high), this.normal * free, this.home * free

    return moves


def _l1(this: Step, s: Tensor) -> Callable[[Tensor], Move]:
    """d = clip(t * b, drawn towards home by s)."""

    def moves(t: Tensor) -> Move:
        towards = t * this.normal
        wanted = torch.clamp(this.home, towards - s, towards + s)
        free = ((wanted != this.home) & (wanted > this.low) & (wanted < this.high)).double()
        return torch.clamp(wanted, this.low, this.high), this.normal * free, (this.home - towards).sign() * free

    return moves


def _linf(this: Step, s: Tensor) -> Callable[[Tensor], Move]:
    """d = clip(t * b) to a cube around home as well, of half the width -s."""
    low, high = torch.maximum(this.low, this.home + s), torch.minimum(this.high, this.home - s)
    below, above = (low > this.low).double(), (high < this.high).double()

    def moves(t: Tensor) -> Move:
        towards = t * this.normal
        at_low, at_high = towards <= low, towards >= high
        free = this.normal * ~(at_low | at_high)
        return torch.clamp(towards, low, high), free, below * at_low - above * at_high

    return moves


_FAMILIES: dict[Norm, Family] = {Norm.L2: _l2, Norm.L1: _l1, Norm.LINF: _linf}


def _to_boundary(this: Step, moves: Callable[[Tensor], Move], t: Tensor, scale: Tensor) -> tuple[Tensor, Move]:
    """The t (B, 1) for which the move gains what it has to, and the move."""
    low, high = torch.full_like(t, -torch.inf), torch.full_like(t, torch.inf)
    found = moves(t)
    for _ in range(_INNER):
        missing, slope = this.missing(found[0]), _dot(this.normal, found[1])
        if not bool(missing.any()):
            break
        low, high = torch.where(missing > 0, t, low), torch.where(missing < 0, t, high)
        newton, closed = t + missing / slope, torch.isfinite(low) & torch.isfinite(high)
        other = torch.where(closed, (low + high) / 2, t + missing.sign() * (t.abs() + scale))
        further = torch.where((slope > 0) & (newton > low) & (newton < high), newton, other)
        t = torch.where(missing != 0, further, t)
        found = moves(t)
    return t, found


def _in_trust_region(this: Step, shortest: Tensor, farthest: Tensor, norm: Norm) -> Tensor:
    """The best move (B, D) where the one without a trust region, `farthest`, leaves it, and `shortest` does not."""
    low, begin, high = torch.zeros_like(this.gain), torch.zeros_like(this.gain), torch.full_like(this.gain, torch.inf)
    spread = torch.full_like(this.gain, math.sqrt(this.home.shape[1]))  # a move changes with s by this at most
    match norm:
        case Norm.L2:
            high, spread = torch.ones_like(high), this.home.norm(dim=1, keepdim=True)
        case Norm.LINF:
            begin = -(shortest - this.home).abs().amax(1, keepdim=True)
            high = -(farthest - this.home).abs().amax(1, keepdim=True) - begin
    t, scale = _multiplier(this, shortest)
    best, done = shortest, torch.zeros_like(high, dtype=torch.bool)
    s = torch.minimum((this.radius - shortest.norm(dim=1, keepdim=True)) / spread, high / 2)
    for _ in range(_OUTER):
        t, (move, along_t, along_s) = _to_boundary(this, _FAMILIES[norm](this, begin + s), t, scale)
        length, reached = move.norm(dim=1, keepdim=True), this.missing(move) == 0
        fits = reached & (length <= this.radius)
        best, low, high = torch.where(fits, move, best), torch.where(fits, s, low), torch.where(fits, high, s)
        done |= (fits & (length >= (1 - 2 * _CLOSE) * this.radius)) | (high <= (1 + _CLOSE) * low)
        if bool(done.all()):
            break
        slope_t = _dot(this.normal, along_t)
        follow = torch.where(slope_t > 0, -_dot(this.normal, along_s) / slope_t, 0.0)  # dt/ds on the boundary
        slope = _dot(move, along_s + follow * along_t) / length
        newton = s + ((1 - _CLOSE) * this.radius - length) / slope
        other = torch.where(torch.isfinite(high), torch.where(low > 0, (low * high).sqrt(), high / 16), 4 * s)
        further = torch.where(reached & (slope > 0) & (newton > low) & (newton < high), newton, other)
        t, s = t + follow * (further - s), further
    return best


def _multiplier(this: Step, shortest: Tensor) -> tuple[Tensor, Tensor]:
    """The t (B, 1) of the shortest move, clip(t * b), and its size."""
    scale = torch.where(this.normal != 0, (shortest / this.normal).abs(), 0.0).amax(1, keepdim=True)
    return scale * this.gain.sign(), scale


def _fewest(this: Step, shortest: Tensor, images: tuple[int, ...] | None) -> Tensor:
    """The move (B, D) that leaves the fewest features (pixels of `images` (C, H, W)) away from home: a relaxation's.

    The features that cost least at home, where t is, go home, as many as the radius allows; the others move by clip(t * b).
    This gives another t, and so on. All counts are tried at once: with the features in order, what a count costs are sums.
    """

    def units(values: Tensor) -> Tensor:
        return values if images is None else values.view(len(values), images[0], -1).sum(1)

    (t, scale), b, home = _multiplier(this, shortest), this.normal, this.home
    best, fewest, limit = shortest, units((shortest != home).double()).ne(0).sum(1, keepdim=True), this.radius**2
    for _ in range(_ROUNDS):
        d = torch.clamp(t * b, this.low, this.high)
        free = d == t * b
        cost = units((home - t * b) ** 2 - (d - t * b) ** 2)
        order = cost.argsort(1)

        def before(values: Tensor, order: Tensor = order) -> Tensor:
            """Sums over the first 0, 1, ... of the features."""
            return torch.nn.functional.pad(units(values).gather(1, order).cumsum(1), (1, 0))

        def behind(values: Tensor, order: Tensor = order) -> Tensor:
            return torch.nn.functional.pad(units(values).gather(1, order).flip(1).cumsum(1).flip(1), (0, 1))

        squares = before(home**2) + behind(torch.where(free, 0.0, d**2))
        rest = this.gain - before(b * home) - behind(torch.where(free, 0.0, b * d))
        slope = behind(torch.where(free, b**2, 0.0))
        level = torch.where(slope > 0, rest / slope, 0.0)
        possible = (squares + level**2 * slope <= limit) & ((slope > 0) | (rest.abs() <= this.noise))
        place = torch.arange(possible.shape[1], device=b.device)
        count = torch.where(possible, place, 0).amax(1, keepdim=True)
        moved = torch.zeros_like(cost).scatter(1, order, (place[:-1] >= count).double()) > 0
        if images is not None:
            moved = moved[:, None].expand(-1, images[0], -1).flatten(1)

        def moves(t: Tensor, moved: Tensor = moved) -> Move:
            inside = moved & (t * b > this.low) & (t * b < this.high)
            return torch.where(moved, torch.clamp(t * b, this.low, this.high), home), b * inside, home

        t, (move, _, _) = _to_boundary(this, moves, level.gather(1, count), scale)
        fits = (this.missing(move) == 0) & (move.norm(dim=1, keepdim=True) <= this.radius)
        left = units((move != home).double()).ne(0).sum(1, keepdim=True)
        best, fewest = torch.where(fits & (left < fewest), move, best), torch.where(fits, torch.minimum(fewest, left), fewest)
        limit = torch.where(fits, limit, 0.7 * limit)  # the ends of the range take more than was thought
    return best


def best_move(region: Region, points: Tensor, normal: Tensor, gain: Tensor, radius: Tensor) -> Tensor:
    """The move d (B, D) from `points` of the module's equation, float64: b = normal (B, ...), c = gain and r = radius (B,).

    If the boundary is out of reach: as far towards it as the trust region and the input range allow.
    """
    x, origin, b = points.double(), region.origin.double(), normal.double()
    ends = (end.double() - x for end in (region.lower, region.upper))
    low, high = (end.flatten(1) for end in ends)
    c, r = gain.double()[:, None], radius.double()[:, None]
    home = (origin - x).flatten(1)
    noise = 1e-6 * c.abs() + 1e-8 * b.flatten(1).norm(dim=1, keepdim=True) * home.norm(dim=1, keepdim=True)
    this = Step(b.flatten(1), c, home, low, high, r, noise)
    # without a trust region, the projection of the input is the best; the projection of the point is the shortest
    from_origin = this.missing(this.home)[:, 0]
    farthest = this.home + region.reach(b, from_origin, origin).flatten(1)
    shortest = replace(region, threat=L2(math.inf)).reach(b, gain.double(), x).flatten(1)
    free, possible = ((move.norm(dim=1, keepdim=True) <= r) & (this.missing(move) == 0) for move in (farthest, shortest))
    bound = (possible & ~free)[:, 0].nonzero()[:, 0]
    result = torch.where(free, farthest, shortest)
    if len(bound):
        part, near, far, threat = take(this, bound), shortest[bound], farthest[bound], region.threat
        if isinstance(threat, L0):
            moves = _fewest(part, near, tuple(x.shape[1:]) if threat.per == "pixel" else None)
        else:
            moves = _in_trust_region(part, near, far, threat.norm)
        result = result.index_copy(0, bound, moves)
    if not bool((free | possible).all()):
        result = torch.where(free | possible, result, _towards(this))
    return result


def _towards(this: Step) -> Tensor:
    """clip(t * b) with the norm r, or as much as the range holds."""
    room = torch.where(this.normal * this.gain >= 0, this.high, -this.low).clamp(min=0)
    slope = this.normal**2
    cap = torch.where(slope > 0, room**2 / slope.clamp(min=1e-300), 0.0)
    # sum_i b_i^2 * min(t^2, (room_i / b_i)^2) = r^2
    square = Linf(0).reach_in(slope, cap, this.radius[:, 0] ** 2, slope.shape[1:])
    return this.gain.sign() * this.normal * square.sqrt()


@dataclass(frozen=True)
class Follower:
    """The present point and the adversarial one where the search began (B, ...), and the averaged gradient.

    tries counts the looks for a start, -1 once there is one. The start's share of the way from the input fails at `low` and
    succeeds at `high`, (B,) float64. halved and n count bisections and steps, (B,) int64.
    """

    x: Tensor
    start: Tensor
    normal: Tensor
    tries: Tensor
    low: Tensor
    high: Tensor
    halved: Tensor
    n: Tensor


@register(
    Declaration(
        summary="follows the decision boundary from an adversarial start towards the input",
        reference="Brendel et al. 2019, arXiv:1907.01003",
        norms=ALL_NORMS,
        minimizes=True,
        linear_oracle=1.05,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class BrendelBethge(Attack):
    """Brendel & Bethge attack: from an adversarial point to the boundary, then along it towards the input.

        b_k = (1 - momentum) * grad margin(x_k) + momentum * b_(k-1),    c_k = -margin(x_k), times `overshoot` if x_k fails and
        2 - overshoot if it succeeds,    r_k = lr * lr_decay^(decays so far) * features * width of the input range

    and x_(k+1) = x_k + d as in this module's equation. The walk starts at the best point that an earlier attack in a `Sequence`
    has found; without one, from a success among `starts` tries. start: "gradient" takes projections on the linearised
    boundary from the input, "noise" uniform noise, as the paper; after ten tries both take turns. From there `bisections`
    lead to the boundary: of the blend with the input (l2), of the cube around it (linf), of the amount by which all changes
    are reduced (l1), of the size below which they are dropped (l0).
    fresh: look for an own start in any case.
    lr: the authors' code has 1e-3, and counts the features of all samples in the batch; ours are those of one sample.

    Source: Brendel, Rauber, Kümmerer, Ustyuzhaninov & Bethge (2019), Accurate, reliable and fast robustness evaluation,
    arXiv:1907.01003. The trust region shrinks on a schedule, as in the authors' Foolbox version, whose values the others are;
    the paper adapts it to successes.
    """

    steps: int = 1000
    lr: float = 1e-2
    lr_decay: float = 0.5
    decays: int = 20
    momentum: float = 0.8
    overshoot: float = 1.1
    bisections: int = 10
    start: Literal["gradient", "noise"] = "gradient"
    starts: int = 100
    fresh: bool = False

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("decays", 1), ("bisections", 0), ("starts", 1)):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least):
                raise InputError(f"{name} must be a whole number >= {least}; got {value}")
        if self.start not in ("gradient", "noise"):
            raise InputError(f'start must be "gradient" or "noise"; got {self.start!r}')
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr must be a positive number; got {self.lr}")
        if not 0 < self.lr_decay <= 1 or not 0 <= self.momentum < 1 or not 1 <= self.overshoot < 2:
            raise InputError(
                "lr_decay must lie in (0, 1], momentum in [0, 1) and overshoot in [1, 2); "
                f"got {self.lr_decay}, {self.momentum} and {self.overshoot}"
            )

    @property
    def iterations(self) -> int:
        return self.starts + self.bisections + self.steps

    @property
    def randomized(self) -> bool:
        return self.start == "noise"

    @property
    def recalls(self) -> bool:
        return True

    def init(self, problem: Problem) -> Follower:
        if problem.region.threat.norm is Norm.L0 and not bool(
            torch.isfinite(problem.region.upper - problem.region.lower).all()
        ):
            raise CapabilityError("BrendelBethge in l0 needs bounds: without them one feature can move without limit")
        x, best = problem.origin, problem.best
        none, zero = torch.zeros_like(problem.labels), torch.zeros_like(problem.eps)
        found = best.success & (not self.fresh)
        start = select(found, best.points, x)
        return Follower(start, start, torch.zeros_like(x), none - found.long(), zero, zero + 1, none, none)

    def done(self, state: Follower) -> Tensor:
        return (state.n >= self.steps) | (state.tries >= self.starts)

    def step(self, problem: Problem, state: Follower) -> Follower:
        looking, halving = state.tries >= 0, (state.tries < 0) & (state.halved < self.bisections)
        state = advance(halving, self._halve, problem, state)
        state = advance(looking, self._look, problem, state)
        return advance(~looking & ~halving, self._follow, problem, state)

    def _look(self, problem: Problem, state: Follower) -> Follower:
        bounded = torch.isfinite(problem.region.upper - problem.region.lower).flatten(1).all(1)
        noise = bounded & torch.where(state.tries < _ALIKE, self.start == "noise", state.tries % 2 == 0)
        state = advance(noise, self._look_at_noise, problem, state)
        state = advance(~noise, self._look_uphill, problem, state)
        return state if self.bisections else replace(state, x=select(state.tries < 0, state.start, state.x))

    def _look_at_noise(self, problem: Problem, state: Follower) -> Follower:
        lower, upper = problem.region.lower, problem.region.upper
        share = problem.random().uniform(tuple(lower.shape[1:]), lower.dtype)
        points = torch.clamp(lower + (upper - lower) * share, lower, upper)
        return self._started(problem, state, points, problem.logits(points))

    def _look_uphill(self, problem: Problem, state: Follower) -> Follower:
        region, points = problem.region, state.x
        found = problem.loss_and_grad(points, "margin")
        move = region.reach(found.gradient, self.overshoot * (aimed(problem) - found.loss.double()), points)
        x = torch.clamp(points + move, region.lower, region.upper)
        return self._started(problem, replace(state, x=x), points, found.logits)

    def _started(self, problem: Problem, state: Follower, points: Tensor, logits: Tensor) -> Follower:
        success = problem.surplus(logits) >= 0
        begun = replace(state, start=points, tries=torch.full_like(state.tries, -1))
        return select(success, begun, replace(state, tries=state.tries + 1))

    def _halve(self, problem: Problem, state: Follower) -> Follower:
        middle = (state.low + state.high) / 2
        success = problem.surplus(problem.logits(on_the_way(problem, state.start, middle))) >= 0
        low, high = torch.where(success, state.low, middle), torch.where(success, middle, state.high)
        return replace(state, x=on_the_way(problem, state.start, high), low=low, high=high, halved=state.halved + 1)

    def _follow(self, problem: Problem, state: Follower) -> Follower:
        region, x = problem.region, state.x
        found = problem.loss_and_grad(x, "margin")
        averaged = (1 - self.momentum) * found.gradient + self.momentum * state.normal
        normal = select(state.n == 0, found.gradient, averaged)
        missing = aimed(problem) - found.loss.double()
        gain = missing * torch.where(missing > 0, self.overshoot, 2 - self.overshoot)
        decayed = (state.n + 2) * self.decays // self.steps
        width = (region.upper - region.lower).flatten(1).amax(1).double()
        width = torch.where(torch.isfinite(width), width, torch.ones_like(width))
        radius = self.lr * self.lr_decay ** decayed.double() * x[0].numel() * width
        move = best_move(region, x, normal, gain, radius).view_as(x)
        home = move == region.origin.double() - x.double()  # the origin's very bits: only a changed value may count
        new = torch.clamp((x.double() + move).to(x.dtype), region.lower, region.upper)
        return replace(state, x=torch.where(home, region.origin, new), normal=normal, n=state.n + 1)
