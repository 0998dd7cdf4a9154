"""The attacks of Carlini & Wagner: Adam on a change of variable that keeps to the input range.

    x(w) = middle + half * tanh(w),    minimise over w:  D(x(w) - x) + c * max(-margin(x(w)), 0)

D is the squared l2 distance. The l-infinity attack penalises what exceeds a shrinking limit instead, and the l0 attack repeats
the l2 attack on fewer and fewer features.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from saddlepoint.attacks.penalty import Penalised, Search, summed, unit, wide
from saddlepoint.attacks.registry import register
from saddlepoint.engine import Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import L0, Region
from saddlepoint.trees import rows, select

DECAY, DECAY_SQUARES, TINY = 0.9, 0.999, 1e-8  # of Adam
# tanh is flat at the ends of its range, and a black or white pixel would hardly move in a thousand steps. So x(w) has a wider
# range than the inputs, by this share, and w stops at END, where x(w) would leave theirs.
BEYOND = 0.1
END = math.atanh(1 / (1 + BEYOND))


@dataclass(frozen=True)
class Range:
    """The change of variable, all (B, ...): x = middle + half * tanh(w), and x = input + w where the range is not bounded."""

    middle: Tensor
    half: Tensor
    bounded: Tensor

    @staticmethod
    def of(region: Region) -> Range:
        """For these sets. Where the range is not bounded, middle is the input."""
        lower, upper = wide(region.lower), wide(region.upper)
        half = (upper - lower) * ((1 + BEYOND) / 2)
        bounded = torch.isfinite(half)
        return Range(torch.where(bounded, (lower + upper) / 2, wide(region.origin)), half, bounded)

    def point(self, w: Tensor) -> Tensor:
        """x(w)."""
        return self.middle + torch.where(self.bounded, self.half * torch.tanh(w), w)

    def derivative(self, w: Tensor) -> Tensor:
        """dx / dw."""
        return torch.where(self.bounded, self.half * (1 - torch.tanh(w) ** 2), torch.ones_like(w))

    def inside(self, w: Tensor) -> Tensor:
        """Stopped at the ends of the range."""
        return torch.where(self.bounded, w.clamp(-END, END), w)

    def back(self, x: Tensor) -> Tensor:
        """The w of points."""
        share = (x - self.middle) / self.half
        return torch.atanh(torch.where(self.bounded & (self.half > 0), share, torch.zeros_like(share)))


@dataclass(frozen=True)
class Path:
    """State: the point x, its w, the input's w and Adam's two means, all (B, ...); age (B,): Adam's steps; width (B, 1, ...).

    limit: tau (B,) of the l-infinity attack; which features may change (B, ...) in the l0 attack.
    """

    x: Tensor
    w: Tensor
    start: Tensor
    mean: Tensor
    square: Tensor
    age: Tensor
    limit: Tensor
    width: Tensor
    range: Range
    search: Search


@dataclass(frozen=True)
class Seen:
    """What a step learns of x: its displacement and the margin's gradient (B, ...), in units; surplus and objective (B,)."""

    delta: Tensor
    gradient: Tensor
    surplus: Tensor
    loss: Tensor


class _CarliniWagner(Penalised):
    """What the three share: the change of variable, and Adam. They differ in the distance and in what follows a run."""

    learning_rate: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("learning_rate")

    @abstractmethod
    def limit(self, problem: Problem) -> Tensor:
        """The first limit."""

    def penalty(self, delta: Tensor, limit: Tensor) -> Tensor:
        """D (B,), float64."""
        return summed(delta**2)

    def slope(self, delta: Tensor, pull: Tensor, limit: Tensor) -> Tensor:
        """The objective's gradient (B, ...), with `pull` that of c * max(-margin, 0)."""
        return 2 * delta + pull

    @abstractmethod
    def turn(self, problem: Problem, state: Path, seen: Seen) -> tuple[Path, Tensor]:
        """What the point seen means for the search: the state, and which samples (B,) stay where that puts them."""

    @final
    def init(self, problem: Problem) -> Path:
        x, curve = problem.origin, Range.of(problem.region)
        start, search = curve.back(x), Search.start(problem.eps, self.initial_c)
        zero, count = torch.zeros_like(start), torch.zeros_like(problem.eps, dtype=torch.int64)
        return Path(x, start, start, zero, zero, count, self.limit(problem), unit(problem.region), curve, search)

    @final
    def step(self, problem: Problem, state: Path) -> Path:
        region, origin, width = problem.region, problem.origin, state.width
        found = problem.loss_and_grad(state.x, "margin")
        surplus, delta = problem.surplus(found.logits).double(), (state.x - origin) / width
        loss = self.penalty(delta, state.limit) + state.search.c * (-surplus).clamp(min=0)
        seen = Seen(delta, found.gradient * width, surplus, loss)
        state, stay = self.turn(problem, state, seen)
        c = torch.where(surplus < 0, state.search.c, torch.zeros_like(surplus))
        slope = self.slope(delta, -seen.gradient * rows(c.to(width.dtype), width), state.limit)
        new = self._adam(region, state, slope / width)
        return select(stay, state, new) if bool(stay.any()) else new

    def _adam(self, region: Region, state: Path, slope: Tensor) -> Path:
        """One step along the gradient with respect to x."""
        slope = slope * state.range.derivative(state.w)
        age = state.age + 1
        mean = DECAY * state.mean + (1 - DECAY) * slope
        square = DECAY_SQUARES * state.square + (1 - DECAY_SQUARES) * slope**2
        rate, scale = (rows((1 - decay ** age.double()).to(slope.dtype), slope) for decay in (DECAY, DECAY_SQUARES))
        w = state.range.inside(state.w - self.learning_rate * (mean / rate) / ((square / scale).sqrt() + TINY))
        moved = torch.clamp(state.range.point(w).to(state.x.dtype), region.lower, region.upper)
        x = torch.where(w == state.start, region.origin, moved)  # what has not moved keeps the very bits of the input
        return replace(state, x=x, w=w, mean=mean, square=square, age=age)


def adam_anew(state: Path, which: Tensor) -> Path:
    """Adam without its past, where `which` (B,)."""
    mean, square = (past.masked_fill(rows(which, past), 0.0) for past in (state.mean, state.square))
    return replace(state, mean=mean, square=square, age=state.age.masked_fill(which, 0))


@register(
    Declaration(
        summary="squared l2 distance and margin minimised by Adam in tanh space, with a search for their weight",
        reference="Carlini & Wagner 2017, arXiv:1608.04644",
        norms=frozenset({Norm.L2}),
        minimizes=True,
        linear_oracle=1.05,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class CarliniWagnerL2(_CarliniWagner):
    """Carlini & Wagner's l2 attack: min ||x(w) - x||_2^2 + c * max(-margin, 0), with the smallest c that succeeds.

    Every run of Adam starts at the input. c grows tenfold until a run succeeds, and is then bisected. The margin is f_6, and
    the goal's confidence is kappa. abort_early: end a run when a tenth of its steps, 50 at least, have not lowered the smallest
    objective.

    Learning rate 0.01 and 9 runs from c = 1e-3 on are the paper's. It has 10,000 steps a run; 1,000 are usual since.

    Source: Carlini & Wagner (2017), Towards evaluating the robustness of neural networks, arXiv:1608.04644, sections V, VI.A.
    """

    steps: int = 1000
    searches: int = 9
    initial_c: float = 1e-3
    learning_rate: float = 0.01
    abort_early: bool = True

    def limit(self, problem: Problem) -> Tensor:
        return torch.zeros_like(problem.eps)

    def turn(self, problem: Problem, state: Path, seen: Seen) -> tuple[Path, Tensor]:
        search, stalled = state.search.watched(seen.loss, self.steps)
        search, over = search.stepped(seen.surplus >= 0, self.steps)
        if self.abort_early:
            over = over | stalled
        if not bool(over.any()):
            return replace(state, search=search), over
        again = over & (search.number + 1 < self.searches)
        search = select(over & ~again, search.anew(over, search.c), search.narrowed(again))  # the last run keeps its c
        return select(again, replace(self.init(problem), search=search), replace(state, search=search)), again


class _Following(_CarliniWagner):
    """The l-infinity and the l0 attack: a problem that is solved makes way for a harder one, from the solution on.

    Where a run fails, c doubles, and the sample is done when it exceeds `largest`.
    """

    largest: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("largest")

    @final
    def followed(self, state: Path, seen: Seen, solved: Tensor) -> Path:
        """The state after a step, Adam without its past where a run is over."""
        search, stalled = state.search.watched(seen.loss, self.steps)
        search, spent = search.stepped(solved, self.steps)
        over = solved | spent | stalled
        c = torch.where(solved, search.c, 2 * search.c)
        return adam_anew(replace(state, search=search.anew(over, c)), over)

    def done(self, state: Path) -> Tensor:
        return super().done(state) | (state.search.c > self.largest)


@register(
    Declaration(
        summary="what exceeds a shrinking limit is penalised, and minimised with the margin by Adam in tanh space",
        reference="Carlini & Wagner 2017, arXiv:1608.04644",
        norms=frozenset({Norm.LINF}),
        minimizes=True,
        linear_oracle=1.1,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class CarliniWagnerLinf(_Following):
    """Carlini & Wagner's l-infinity attack: min sum_i max(|delta_i| - tau, 0) + c * max(-margin, 0).

    When a run has solved that, tau becomes `decrease` times the largest |delta_i|, and the next run starts from the solution.
    When a run has not, c doubles; the attack ends where c exceeds `largest`. tau starts at the width of the input range.

    decrease 0.9 is the paper's. 1000 steps, the learning rate and both ends of c are those of the authors' code, which also
    ends at tau = 1/256. `searches` only bounds the number of runs.

    Source: Carlini & Wagner (2017), Towards evaluating the robustness of neural networks, arXiv:1608.04644, section VI.C.
    """

    steps: int = 1000
    searches: int = 100
    initial_c: float = 1e-5
    learning_rate: float = 5e-3
    largest: float = 20.0
    decrease: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decrease < 1:
            raise InputError(f"decrease must lie in (0, 1); got {self.decrease}")

    def limit(self, problem: Problem) -> Tensor:
        return torch.ones_like(problem.eps)

    def penalty(self, delta: Tensor, limit: Tensor) -> Tensor:
        return summed((delta.abs() - rows(limit.to(delta.dtype), delta)).clamp(min=0))

    def slope(self, delta: Tensor, pull: Tensor, limit: Tensor) -> Tensor:
        return delta.sign() * (delta.abs() > rows(limit.to(delta.dtype), delta)) + pull

    def turn(self, problem: Problem, state: Path, seen: Seen) -> tuple[Path, Tensor]:
        solved = (seen.surplus >= 0) & (seen.loss < 1e-4 * state.search.c)
        smaller = self.decrease * torch.minimum(state.limit, seen.delta.flatten(1).abs().amax(1).double())
        state = replace(self.followed(state, seen, solved), limit=torch.where(solved, smaller, state.limit))
        return state, torch.zeros_like(solved)


@register(
    Declaration(
        summary="the l2 attack repeated on fewer features: those that matter least are put back",
        reference="Carlini & Wagner 2017, arXiv:1608.04644",
        norms=frozenset({Norm.L0}),
        minimizes=True,
        no_oracle="it gives features up one after another, and none comes back; how many are left depends on the path",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class CarliniWagnerL0(_Following):
    """Carlini & Wagner's l0 attack: their l2 attack on a set of features that shrinks with every success.

    After a success the features of smallest g_i * delta_i are put back for good; g is the margin's gradient, so this is what
    their change has brought. Those go that brought 0.01 at most, and one more, but not more than 0.3 * sqrt(changed features)
    at once. Features that have not moved stay so. The next run starts from the rest. When a run fails, c doubles; the attack
    ends where c exceeds `largest`. With `L0(per="pixel")` the channels of a pixel go together.

    The numbers are those of the authors' code; the paper puts back one feature at a time. `searches` only bounds the number
    of runs.

    Source: Carlini & Wagner (2017), Towards evaluating the robustness of neural networks, arXiv:1608.04644, section VI.B.
    """

    steps: int = 1000
    searches: int = 500
    initial_c: float = 1e-3
    learning_rate: float = 0.01
    largest: float = 2e6

    def limit(self, problem: Problem) -> Tensor:
        return problem.region.upper > problem.region.lower

    def slope(self, delta: Tensor, pull: Tensor, limit: Tensor) -> Tensor:
        return (2 * delta + pull) * limit

    def turn(self, problem: Problem, state: Path, seen: Seen) -> tuple[Path, Tensor]:
        solved = seen.surplus >= 0
        state = self.followed(state, seen, solved)
        if not bool(solved.any()):
            return state, solved
        threat = problem.region.threat
        free = worth_keeping(seen, whole_pixels=isinstance(threat, L0) and threat.per == "pixel")
        x, w = torch.where(free, state.x, problem.origin), torch.where(free, state.w, state.start)
        return select(solved, replace(state, limit=free, x=x, w=w), state), solved

    def done(self, state: Path) -> Tensor:
        return super().done(state) | ~state.limit.flatten(1).any(1)


def worth_keeping(seen: Seen, *, whole_pixels: bool) -> Tensor:
    """Which features (B, ...) the next run of the l0 attack may change."""
    gain, moved = seen.delta * seen.gradient, seen.delta != 0
    if whole_pixels:
        gain, moved = gain.sum(1, keepdim=True), moved.any(1, keepdim=True)
    flat = moved.flatten(1)
    gains = gain.flatten(1).masked_fill(~flat, torch.inf)
    most = (0.3 * flat.sum(1).sqrt()).ceil()
    cheap = (gains <= 0.01).sum(1) + 1
    rank = gains.argsort(dim=1, stable=True).argsort(1)
    keep = flat & (rank >= torch.minimum(most, cheap)[:, None])
    return keep.view(moved.shape).expand_as(seen.delta)
