"""Attacks that estimate the normal of the decision boundary from verdicts alone.

Around a point x at the boundary, the model is asked about x + delta * u_b for random unit directions u_b. With phi_b = 1 where
the answer is adversarial and -1 elsewhere, the boundary's normal is estimated by

    v = sum_b (phi_b - mean phi) u_b

The attacks differ in where the directions come from, and in where they go with v.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn import functional

from saddlepoint.attacks.decision import Decision, Walk
from saddlepoint.attacks.frequencies import from_frequencies, low_pass
from saddlepoint.attacks.registry import register
from saddlepoint.attacks.stepping import advance
from saddlepoint.engine import Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.rng import Keys
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.trees import rows

_SHORTEST = 2.0**-20  # of the distance: below it a step leads nowhere
_NO_ORACLE = "an estimate of the normal from labels needs as many queries as there are features"


@dataclass(frozen=True)
class Estimate:
    """What has been said around the boundary points.

    n: iterations made (B,) int64. asked: directions asked about in this one. plain, signed: the sums of u and of phi * u (B,
    ...). balance: the sum of phi (B,) float64.
    """

    n: Tensor
    asked: Tensor
    plain: Tensor
    signed: Tensor
    balance: Tensor

    @staticmethod
    def none(problem: Problem) -> Estimate:
        """Nothing yet."""
        zero, nothing = torch.zeros_like(problem.labels), torch.zeros_like(problem.origin)
        return Estimate(zero, zero, nothing, nothing, torch.zeros_like(problem.eps))

    @property
    def normal(self) -> Tensor:
        """v (B, ...), of no particular length; where all answers agree, the sum of phi * u."""
        mean = rows((self.balance / self.asked.clamp(min=1)).to(self.plain.dtype), self.plain)
        return torch.where(mean.abs() >= 1, self.signed, self.signed - mean * self.plain)

    def after(self, over: Tensor) -> Estimate:
        """The next iteration's, where this one is over (B,)."""
        keep = rows(~over, self.plain)
        asked, balance = self.asked * ~over, self.balance * ~over
        return Estimate(self.n + over.long(), asked, self.plain * keep, self.signed * keep, balance)


@dataclass(frozen=True)
class Step:
    """The estimate, and the length of the step that is being tried (B,) float64; 0 while the normal is being estimated."""

    estimate: Estimate
    length: Tensor


def _unit(v: Tensor) -> Tensor:
    return v / rows(v.flatten(1).norm(dim=1).clamp(min=torch.finfo(v.dtype).tiny), v)


class _Normal(Decision):
    """Base: rounds of questions around the boundary point, until there are `count(n)` answers; then `move`.

    reach: delta as a share of the distance; None for 1 / d, d being the number of features.
    """

    queries: int
    reach: float | None
    round_size: int
    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "queries", "round_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number >= 1; got {value!r}")
        if self.reach is not None and not 0 < self.reach < math.inf:
            raise InputError(f"reach must be a positive number or None; got {self.reach!r}")

    @property
    @final
    def iterations(self) -> int:
        rounds = sum(math.ceil(self.count(n) / self.round_size) for n in range(min(self.steps, 64)))
        return self.starts + 1 + (rounds + 60 * 64) * math.ceil(self.steps / 64)

    @property
    @final
    def width(self) -> int:
        return self.round_size

    @abstractmethod
    def count(self, n: int) -> int:
        """How many directions iteration n asks about."""

    @abstractmethod
    def directions(self, problem: Problem, keys: Keys, n: Tensor) -> Tensor:
        """Random directions (B, round_size, ...) in iteration n (B,), of any length."""

    def placed(self, problem: Problem, x: Tensor, points: Tensor) -> Tensor:
        """Where to ask in place of the points (B, round_size, ...) around the boundary points x."""
        return points

    @abstractmethod
    def moving(self, own: Any) -> Tensor:  # Any: each attack's own state
        """Which samples know their normal and are on their way (B,)."""

    @abstractmethod
    def estimated(self, problem: Problem, state: Walk, which: Tensor) -> Walk:
        """Set out along the normal where it is known now (B,)."""

    @abstractmethod
    def move(self, problem: Problem, state: Walk) -> Walk:
        """A round of those on their way."""

    @final
    def done(self, state: Walk) -> Tensor:
        own: Step | Circle | Line = state.own
        return super().done(state) | (own.estimate.n >= self.steps)

    @final
    def walk(self, problem: Problem, state: Walk) -> Walk:
        moving = self.moving(state.own)
        state = advance(moving, self.move, problem, state)
        return advance(~moving, self._listen, problem, state)

    def _listen(self, problem: Problem, state: Walk) -> Walk:
        x, region, known = state.x, problem.region, state.own.estimate
        table = torch.tensor([self.count(n) for n in range(int(known.n.max()) + 1)], device=x.device)
        wanted = table[known.n]
        asked = torch.arange(self.round_size, device=x.device) < (wanted - known.asked)[:, None]
        u = self.directions(problem, problem.random(1), known.n)
        over_all = (...,) + (None,) * (x.dim() - 1)
        reach = 1 / x[0].numel() if self.reach is None else self.reach
        delta = (reach * region.distance(x)).to(x.dtype).clamp(min=torch.finfo(x.dtype).tiny)[:, None][over_all]
        u = u / u.flatten(2).norm(dim=2).clamp(min=torch.finfo(x.dtype).tiny)[over_all]
        points = torch.clamp(self.placed(problem, x, x[:, None] + delta * u), region.lower[:, None], region.upper[:, None])
        said = problem.ask(points, asked)
        u = ((points - x[:, None]) / delta).flatten(2)  # what the input range has left of it
        phi = torch.where(said.reached, 1.0, -1.0).to(x.dtype) * said.answered
        weights = torch.stack([said.answered.to(x.dtype), phi], 1)
        plain, signed = (weights @ u).view(len(x), 2, *x.shape[1:]).unbind(1)
        told = Estimate(
            known.n,
            known.asked + said.answered.sum(1),
            known.plain + plain,
            known.signed + signed,
            known.balance + phi.sum(1).double(),
        )
        state = replace(state, own=replace(state.own, estimate=told))
        return self.estimated(problem, state, told.asked >= wanted)


def _isotropic(problem: Problem, keys: Keys, count: int) -> Tensor:
    return keys.normal((count, *problem.origin.shape[1:]), problem.origin.dtype)


class _Jumping(_Normal):
    """HopSkipJump's way along the normal."""

    @final
    def count(self, n: int) -> int:
        return math.ceil(self.queries * math.sqrt(n + 1))

    @final
    def prepare(self, problem: Problem) -> Step:
        return Step(Estimate.none(problem), torch.zeros_like(problem.eps))

    @final
    def moving(self, own: Step) -> Tensor:
        return own.length > 0

    @final
    def estimated(self, problem: Problem, state: Walk, which: Tensor) -> Walk:
        own = state.own
        length = problem.region.distance(state.x) / (own.estimate.n + 1).double().sqrt()
        return replace(state, own=replace(own, length=torch.where(which, length, own.length)))

    @final
    def move(self, problem: Problem, state: Walk) -> Walk:
        own, x, region = state.own, state.x, problem.region
        v = own.estimate.normal
        v = v.sign() if region.threat.norm is Norm.LINF else _unit(v)
        points = torch.clamp(x + rows(own.length.to(x.dtype), x) * v, region.lower, region.upper)
        found, distance = problem.reached(points), region.distance(x)
        over = found | (own.length < _SHORTEST * distance)
        state = state.sent_back(found, points, torch.full_like(distance, 0.02))
        return replace(state, own=Step(own.estimate.after(over), torch.where(over, 0.0, own.length / 2)))


@register(
    Declaration(
        summary="estimates the boundary's normal from labels, jumps along it, and returns to the boundary",
        reference="Chen, Jordan & Wainwright 2020, arXiv:1904.02144",
        norms=frozenset({Norm.LINF, Norm.L2}),
        access=Access.LABELS,
        minimizes=True,
        no_oracle=_NO_ORACLE,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class HopSkipJump(_Jumping):
    """HopSkipJump: from the boundary point x_t, an estimate v_t of the normal, a jump, and a bisection back.

        B_t = queries * sqrt(t) directions,    x_(t+1) = bisect(x, x_t + xi_t * v_t / ||v_t||_2)  in l2,
                                               x_(t+1) = bisect(x, x_t + xi_t * sign(v_t))  in l-infinity,

    where xi_t = ||x_t - x|| / sqrt(t) is halved until the jump ends at an adversarial point. Directions are Gaussian in l2,
    uniform in a cube in l-infinity.

    steps: iterations t. queries: B_0; the paper has 100. reach: delta over the distance; the paper has 1 / d (None) for d
    features. precision: share of the distance to which bisections go; the paper has d^(-3/2) in l2, d^-2 in l-infinity.
    Questions farther away need less precision, so that a bisection costs half as much. round_size: directions asked at once.

    Source: Chen, Jordan & Wainwright (2020), HopSkipJumpAttack: a query-efficient decision-based attack, arXiv:1904.02144,
    algorithms 1 and 2.

    >>> import torch, saddlepoint as sp
    >>> oracle = sp.Model(torch.nn.Linear(4, 3), access=sp.Access.LABELS)
    >>> x = torch.rand(2, 4)
    >>> attack = sp.attacks.HopSkipJump(steps=3, queries=20)
    >>> found = sp.attack(oracle, x, oracle.predict(x), attack, sp.Minimize("l2"), budget=sp.Budget(queries=200))
    >>> int(found.queries.forward.max()) <= 200
    True
    """

    steps: int = 64
    queries: int = 30
    reach: float | None = 0.1
    precision: float = 2e-3
    starts: int = 100
    round_size: int = 25

    def directions(self, problem: Problem, keys: Keys, n: Tensor) -> Tensor:
        if problem.region.threat.norm is Norm.LINF:
            return 2 * keys.uniform((self.round_size, *problem.origin.shape[1:]), problem.origin.dtype) - 1
        return _isotropic(problem, keys, self.round_size)


@register(
    Declaration(
        summary="HopSkipJump with directions from a subspace of smooth changes",
        reference="Li et al. 2020, arXiv:2005.14137",
        norms=frozenset({Norm.L2}),
        access=Access.LABELS,
        minimizes=True,
        spatial=True,
        no_oracle=_NO_ORACLE,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class QEBA(_Jumping):
    """QEBA: HopSkipJump in l2 with directions from a subspace, in which the normal of a classifier of images mostly lies.

    subspace: "frequency" takes cosines of the lowest 1 / reduction of the frequencies along each of the last two dimensions
    (QEBA-F), "space" enlarges noise by that factor with bilinear interpolation (QEBA-S). Inputs of one dimension have none:
    there it is HopSkipJump. reduction: 4, as in the paper for photographs of 224 x 224. The rest as in `HopSkipJump`. QEBA-I,
    the principal components of another model's gradients, is not here.

    Source: Li, Xu, Zhang, Yang & Li (2020), QEBA: query-efficient boundary-based blackbox attack, arXiv:2005.14137, section 3.
    """

    subspace: Literal["frequency", "space"] = "frequency"
    reduction: int = 4
    steps: int = 64
    queries: int = 30
    reach: float | None = 0.1
    precision: float = 2e-3
    starts: int = 100
    round_size: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subspace not in ("frequency", "space"):
            raise InputError(f'subspace must be "frequency" or "space"; got {self.subspace!r}')
        if not isinstance(self.reduction, int) or self.reduction < 1:
            raise InputError(f"reduction must be a whole number >= 1; got {self.reduction!r}")

    def directions(self, problem: Problem, keys: Keys, n: Tensor) -> Tensor:
        if problem.origin.dim() < 3:
            return _isotropic(problem, keys, self.round_size)
        *first, height, width = problem.origin.shape[1:]
        small = [math.ceil(size / self.reduction) for size in (height, width)]
        noise = keys.normal((self.round_size, *first, *small), problem.origin.dtype)
        if self.subspace == "frequency":
            return from_frequencies(functional.pad(noise, (0, width - small[1], 0, height - small[0])))
        large = functional.interpolate(noise.flatten(0, -3)[:, None], (height, width), mode="bilinear", align_corners=False)
        return large.view(len(noise), self.round_size, *first, height, width)


@register(
    Declaration(
        summary="estimates the boundary's normal from labels, and goes from the input along it",
        reference="Rahmati et al. 2020, arXiv:2003.06468",
        norms=frozenset({Norm.LINF, Norm.L2}),
        access=Access.LABELS,
        minimizes=True,
        spatial=True,
        no_oracle=_NO_ORACLE,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class GeoDA(_Normal):
    """GeoDA: the boundary is nearly flat around x_t, so the smallest perturbation lies along its normal.

        x_(t+1) = x + r_t * v_t / ||v_t||_2  in l2,    x + r_t * sign(v_t)  in l-infinity

    with the smallest r_t that is adversarial, found by doubling and bisection.

    steps: iterations. queries: directions in the first one; each has lambda^(-2/3) times those of the one before, the paper's
    optimal schedule, with its lambda = 0.6; so more than some 25 steps only end by a budget. share: of the frequencies along
    each of the last two dimensions from which directions come; the paper has 75 of 224. reach, precision: as in `HopSkipJump`.

    Source: Rahmati, Moosavi-Dezfooli, Frossard & Dai (2020), GeoDA: a geometric framework for black-box adversarial attacks,
    arXiv:2003.06468, algorithm 1 and section 4.2.
    """

    steps: int = 12
    queries: int = 30
    growth: float = 0.6 ** (-2 / 3)
    share: float = 75 / 224
    reach: float | None = 0.1
    precision: float = 2e-3
    starts: int = 100
    round_size: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.growth >= 1 or not 0 < self.share <= 1:
            raise InputError(f"growth must be >= 1 and share in (0, 1]; got {self.growth} and {self.share}")

    def count(self, n: int) -> int:
        return math.ceil(self.queries * self.growth**n)

    def directions(self, problem: Problem, keys: Keys, n: Tensor) -> Tensor:
        noise = _isotropic(problem, keys, self.round_size)
        return noise if noise.dim() < 4 else low_pass(noise, torch.full_like(problem.eps, self.share))

    def prepare(self, problem: Problem) -> Step:
        return Step(Estimate.none(problem), torch.zeros_like(problem.eps))

    def moving(self, own: Step) -> Tensor:
        return own.length > 0

    def estimated(self, problem: Problem, state: Walk, which: Tensor) -> Walk:
        length = torch.where(which, problem.region.distance(state.x), state.own.length)
        return replace(state, own=replace(state.own, length=length))

    def move(self, problem: Problem, state: Walk) -> Walk:
        own, origin, region = state.own, problem.origin, problem.region
        v = own.estimate.normal
        v = v.sign() if region.threat.norm is Norm.LINF else _unit(v)
        points = torch.clamp(origin + rows(own.length.to(v.dtype), v) * v, region.lower, region.upper)
        found = problem.reached(points)
        over = found | (own.length >= 16 * region.distance(state.x))  # the estimate leads nowhere
        state = state.sent_back(found, points, torch.full_like(own.length, 0.5))
        return replace(state, own=Step(own.estimate.after(over), torch.where(over, 0.0, 2 * own.length)))


@dataclass(frozen=True)
class Circle:
    """The estimate, the averaged normal and the direction of the circle that it spans with the way from the input (B, ...).

    base: where the circle begins, x_t. low, high: the angles on it that succeed and fail, (B,) float64; low is -1 while the
    normal is being estimated, high infinite while no failure is known. first: the angle to try first.
    """

    estimate: Estimate
    average: Tensor
    tangent: Tensor
    base: Tensor
    low: Tensor
    high: Tensor
    first: Tensor


@register(
    Declaration(
        summary="estimates the boundary's normal from labels, and follows a circle to the boundary on the other side",
        reference="Reza et al. 2023, arXiv:2308.03163",
        norms=frozenset({Norm.L2}),
        access=Access.LABELS,
        minimizes=True,
        spatial=True,
        no_oracle=_NO_ORACLE,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class CGBA(_Normal):
    """CGBA: from the boundary point x_t along the circle with diameter x to x_t, as far as it stays adversarial.

        x(a) = x + r cos(a) (cos(a) w + sin(a) s),    r = ||x_t - x||_2,  w = (x_t - x) / r,

    s being the part of the averaged normal orthogonal to w. Every point of the circle is nearer than x_t, and where the
    boundary is flat, it meets the circle again in the point of the boundary that is nearest to x.

    steps: iterations. queries: directions in the first one; iteration t has sqrt(t) times as many. share, growth: directions
    hold the lowest share * t^growth of the frequencies along each of the last two dimensions. memory: what stays of the
    earlier normals in the average. precision, reach: as in `HopSkipJump`. The paper has a fixed share and no memory. Smooth
    directions find nearer points in the beginning, white noise in the end.

    Source: Reza, Rahmati, Wu & Dai (2023), CGBA: curvature-aware geometric black-box attack, arXiv:2308.03163, section 3.

    >>> import torch, saddlepoint as sp
    >>> oracle = sp.Model(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)), access=sp.Access.LABELS)
    >>> x = torch.rand(2, 3, 4, 4)
    >>> found = sp.attack(oracle, x, oracle.predict(x), "cgba", sp.Minimize("l2"), budget=sp.Budget(queries=300))
    >>> found.success.tolist()
    [True, True]
    """

    steps: int = 256
    queries: int = 30
    share: float = 0.25
    growth: float = 0.4
    memory: float = 0.5
    reach: float | None = 0.1
    precision: float = 2e-3
    starts: int = 100
    round_size: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1 or not self.growth >= 0 or not 0 <= self.memory < 1:
            raise InputError(
                "share must lie in (0, 1], growth be >= 0 and memory in [0, 1); "
                f"got {self.share}, {self.growth} and {self.memory}"
            )

    def count(self, n: int) -> int:
        return math.ceil(self.queries * math.sqrt(n + 1))

    def directions(self, problem: Problem, keys: Keys, n: Tensor) -> Tensor:
        noise = _isotropic(problem, keys, self.round_size)
        return noise if noise.dim() < 4 else low_pass(noise, self.share * (n + 1).double() ** self.growth)

    def prepare(self, problem: Problem) -> Circle:
        nothing, zero = torch.zeros_like(problem.origin), torch.zeros_like(problem.eps)
        return Circle(Estimate.none(problem), nothing, nothing, nothing, zero - 1, zero + math.inf, zero + 0.3)

    def moving(self, own: Circle) -> Tensor:
        return own.low >= 0

    def estimated(self, problem: Problem, state: Walk, which: Tensor) -> Walk:
        own = state.own
        average = self.memory * own.average + own.estimate.normal
        way = _unit(state.x - problem.origin)
        tangent = _unit(average - rows((average * way).flatten(1).sum(1), way) * way)
        now = rows(which, way)
        return replace(
            state,
            own=replace(
                own,
                average=torch.where(now, average, own.average),
                tangent=torch.where(now, tangent, own.tangent),
                base=torch.where(now, state.x, own.base),
                low=torch.where(which, 0.0, own.low),
                high=own.high.masked_fill(which, math.inf),
            ),
        )

    def move(self, problem: Problem, state: Walk) -> Walk:
        own, origin, region = state.own, problem.origin, problem.region
        bracketed = torch.isfinite(own.high)
        doubled = torch.where(own.low > 0, 2 * own.low, own.first)
        angle = torch.where(bracketed, (own.low + own.high) / 2, doubled).clamp(max=1.5)
        length = region.distance(own.base)
        along, across = length * angle.cos() ** 2, length * angle.cos() * angle.sin()
        move = (
            rows(along.to(origin.dtype), origin) * _unit(own.base - origin)
            + rows(across.to(origin.dtype), origin) * own.tangent
        )
        points = torch.clamp(origin + move, region.lower, region.upper)
        found = problem.reached(points)
        low, high = torch.where(found, angle, own.low), torch.where(found, own.high, angle)
        over = (high - low <= self.precision * low.clamp(min=0.5)) | (low >= 1.49)
        return replace(
            state,
            x=torch.where(rows(found, points), points, state.x),
            own=replace(
                own,
                estimate=own.estimate.after(over),
                low=low.masked_fill(over, -1.0),
                high=high,
                first=torch.where(over, low.clamp(min=0.02), own.first),
            ),
        )


@dataclass(frozen=True)
class Line:
    """The estimate, and the search for a step along it.

    base: the boundary point where the step begins (B, ...). length: of the next try (B,) float64, 0 while the normal is being
    estimated. won: whether a try was better (B,) bool. first: what the next search begins with (B,).
    """

    estimate: Estimate
    base: Tensor
    length: Tensor
    won: Tensor
    first: Tensor


@register(
    Declaration(
        summary="descends the distance of the boundary over directions, by the signs of its changes",
        reference="Cheng et al. 2020, arXiv:1909.10773",
        norms=frozenset({Norm.L2}),
        access=Access.LABELS,
        minimizes=True,
        no_oracle=_NO_ORACLE,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class SignOPT(_Normal):
    """Sign-OPT: minimise g(theta), the distance of the boundary along the unit direction theta, by signs of its changes.

        s_q = 1 where x + g(theta) * unit(theta + reach * u_q) is adversarial, so that g is less there, and -1 elsewhere,
        theta' = unit(theta + alpha * v / ||v||_2),    v = sum_q (s_q - mean s) u_q

    alpha doubles while theta' gets better; where the first try is no better, it is quartered until one is.

    steps: iterations. queries: directions u_q in each, 200 in the paper. reach: 1e-3 in the paper, which asks for more
    precision than bisections are worth. alpha: of the first try, 0.2 as in the authors' code; later iterations begin with the
    last that won. The paper does not subtract the mean, and begins with the best of 100 directions. precision: as in
    `HopSkipJump`.

    Source: Cheng, Singh, Chen, Chen, Liu & Hsieh (2020), Sign-OPT: a query-efficient hard-label adversarial attack,
    arXiv:1909.10773, algorithm 1.
    """

    steps: int = 1000
    queries: int = 200
    alpha: float = 0.2
    reach: float | None = 0.1
    precision: float = 2e-3
    starts: int = 100
    round_size: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < math.inf:
            raise InputError(f"alpha must be a positive number; got {self.alpha!r}")

    def count(self, n: int) -> int:
        return self.queries

    def directions(self, problem: Problem, keys: Keys, n: Tensor) -> Tensor:
        return _isotropic(problem, keys, self.round_size)

    def placed(self, problem: Problem, x: Tensor, points: Tensor) -> Tensor:
        """On the sphere around the input that the boundary point lies on."""
        origin = problem.origin[:, None]
        away = (points - origin).flatten(2).norm(dim=2).clamp(min=torch.finfo(x.dtype).tiny)
        scale = problem.region.distance(x).to(x.dtype)[:, None] / away
        moved: Tensor = (points - origin) * scale.view(*scale.shape, *([1] * (x.dim() - 1)))
        return origin + moved

    def prepare(self, problem: Problem) -> Line:
        zero, no = torch.zeros_like(problem.eps), torch.zeros_like(problem.labels, dtype=torch.bool)
        return Line(Estimate.none(problem), problem.origin, zero, no, zero + self.alpha)

    def moving(self, own: Line) -> Tensor:
        return own.length > 0

    def estimated(self, problem: Problem, state: Walk, which: Tensor) -> Walk:
        own: Line = state.own
        base = torch.where(rows(which, state.x), state.x, own.base)
        length = torch.where(which, own.first, own.length)
        return replace(state, own=replace(own, base=base, length=length, won=own.won & ~which))

    def move(self, problem: Problem, state: Walk) -> Walk:
        own, origin, region = state.own, problem.origin, problem.region
        theta = _unit(own.base - origin) + rows(own.length.to(origin.dtype), origin) * _unit(own.estimate.normal)
        distance = region.distance(state.x)
        radius = (1 - self.precision) * distance  # better by more than a bisection leaves open
        points = torch.clamp(origin + rows(radius.to(origin.dtype), origin) * _unit(theta), region.lower, region.upper)
        found = problem.reached(points)
        over = ~found & (own.won | (own.length < _SHORTEST))
        state = state.sent_back(found, points, torch.full_like(distance, 0.02))
        length = torch.where(found, 2 * own.length, own.length / 4).masked_fill(over, 0.0)
        first = torch.where(found, own.length, torch.where(over & ~own.won, self.alpha, own.first))
        return replace(state, own=Line(own.estimate.after(over), own.base, length, own.won | found, first))
