"""What attacks share that see labels only: they begin at an adversarial point, come to the boundary, and go on from there.

Each sample looks for a start, then halves the way between the input and that start until the boundary is known to a share
of its distance, then takes rounds of its attack's own, which may send it back to halving from a new adversarial point. What is
asked for is the smallest perturbation; where the threat is a ball, what is found inside it counts.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from saddlepoint.attacks.stepping import advance, on_the_way
from saddlepoint.engine import Attack, Problem, State
from saddlepoint.errors import InputError
from saddlepoint.trees import rows

_KINDS = 4  # of starts, which take turns


@dataclass(frozen=True)
class Walk:
    """Where each sample is.

    x: the best adversarial point, at the boundary once the way is halved (B, ...). start: the adversarial end of the way from
    the input; its share fails at `low` and succeeds at `high`, (B,) float64. gap: by how much the share is lowered while no
    failure is known. tries: looks for a start (B,), -1 once there is one. own: the attack's own state.
    """

    x: Tensor
    start: Tensor
    low: Tensor
    high: Tensor
    gap: Tensor
    tries: Tensor
    own: State

    def sent_back(self, which: Tensor, start: Tensor, gap: Tensor) -> Walk:
        """With the way from new adversarial points halved again where `which` (B,): near the boundary, so in growing gaps."""
        return replace(
            self,
            start=torch.where(rows(which, start), start, self.start),
            x=torch.where(rows(which, start), start, self.x),
            low=self.low.masked_fill(which, 0.0),
            high=self.high.masked_fill(which, 1.0),
            gap=torch.where(which, gap, self.gap),
        )


class Decision(Attack):
    """Base of attacks with labels alone.

    starts: looks for a start; a sample for which none is found survives. The caller's `start=` is tried first; then, in turn,
    noise in every feature, coarse noise, the input with some features at an end of the range, and the blend of its negative
    with noise. precision: share of the distance to which the boundary is looked for.
    """

    starts: int
    precision: float

    def __post_init__(self) -> None:
        if not isinstance(self.starts, int) or self.starts < 1:
            raise InputError(f"starts must be a whole number >= 1; got {self.starts!r}")
        if not 0 < self.precision < 1:
            raise InputError(f"precision must lie in (0, 1); got {self.precision!r}")

    @abstractmethod
    def prepare(self, problem: Problem) -> State:
        """The own state of samples that have not begun."""

    @abstractmethod
    def walk(self, problem: Problem, state: Walk) -> Walk:
        """One round from the boundary. `problem` is the one without a ball."""

    @property
    def takes_start(self) -> bool:
        return True

    @property
    def looks_last(self) -> bool:
        return False

    def cost(self, classes: int) -> tuple[int, int]:
        return (1, 0)

    def init(self, problem: Problem) -> Walk:
        whole = problem.without_ball()
        start, zero = whole.begin(problem.origin), torch.zeros_like(problem.eps)
        tries = torch.zeros_like(problem.labels) if problem.start is not None else torch.ones_like(problem.labels)
        return Walk(problem.origin, start, zero, zero + 1, zero + math.inf, tries, self.prepare(whole))

    def step(self, problem: Problem, state: Walk) -> Walk:
        problem = problem.without_ball()
        looking = state.tries >= 0
        halving = ~looking & (state.high - state.low > self.precision * state.high)
        state = advance(looking, self._look, problem, state)
        state = advance(halving, self._halve, problem, state)
        return advance(~looking & ~halving, self.walk, problem, state)

    def done(self, state: Walk) -> Tensor:
        return state.tries > self.starts

    def _look(self, problem: Problem, state: Walk) -> Walk:
        given = rows(state.tries == 0, state.x)
        points = torch.where(given, state.start, _drawn(problem, state.tries))
        found = problem.reached(points)
        kept = rows(found, points)
        return replace(
            state,
            x=torch.where(kept, points, state.x),
            start=torch.where(kept, points, state.start),
            tries=torch.where(found, -1, state.tries + 1),
        )

    def _halve(self, problem: Problem, state: Walk) -> Walk:
        middle = torch.where(state.low > 0, (state.low + state.high) / 2, torch.maximum(state.high - state.gap, state.high / 2))
        points = on_the_way(problem, state.start, middle)
        found = problem.reached(points)
        return replace(
            state,
            x=torch.where(rows(found, points), points, state.x),
            low=torch.where(found, state.low, middle),
            high=torch.where(found, middle, state.high),
            gap=2 * state.gap,
        )


def _drawn(problem: Problem, tries: Tensor) -> Tensor:
    """Points far from the inputs (B, ...), of a kind that changes with the number of the try (B,)."""
    region, origin = problem.region, problem.origin
    lower, upper = region.lower, region.upper
    if not bool(torch.isfinite(upper - lower).all()):  # no range to fill: ever wider noise
        size = 2.0 ** (tries.double() / 4) * (1 + origin.flatten(1).double().square().mean(1).sqrt())
        wide = problem.random(41).normal(tuple(origin.shape[1:]), origin.dtype)
        return torch.clamp(origin + wide * rows(size.to(origin.dtype), origin), lower, upper)
    keys = problem.random(41)
    fine = keys.uniform(tuple(origin.shape[1:]), origin.dtype)
    coarse = fine
    if origin.dim() > 2:
        height, width = origin.shape[-2:]
        small = keys.absorb(1).uniform((*origin.shape[1:-2], min(height, 4), min(width, 4)), torch.float32)
        flat = small.flatten(1, -3) if origin.dim() > 3 else small[:, None]
        coarse = functional.interpolate(flat, (height, width), mode="nearest").reshape(origin.shape).to(origin.dtype)
    share = keys.absorb(2).uniform((), origin.dtype)
    ends = torch.where(fine > 0.5, upper, lower)
    some = keys.absorb(3).uniform(tuple(origin.shape[1:]), origin.dtype) < rows(share, origin)
    negative = lower + upper - origin
    noise = lower + (upper - lower) * fine
    kinds = torch.stack([
        noise,
        lower + (upper - lower) * coarse,
        torch.where(some, ends, origin),
        negative + rows(share, origin) * (noise - negative),
    ])  # fmt: skip
    chosen = kinds[(tries - 1).clamp(min=0) % _KINDS, torch.arange(len(origin), device=origin.device)]
    return torch.clamp(chosen, lower, upper)
