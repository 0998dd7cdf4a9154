"""`Trim`: the best point that other attacks have found is drawn nearer to the input, by a question at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from saddlepoint.attacks.stepping import on_the_way
from saddlepoint.engine import ALL_NORMS, Attack, Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.threats import L0
from saddlepoint.trees import select

_CLOSE = 1e-6  # what is left between a failure and the best point, as a share of the way: not worth a pass
_MOST = 0.75  # the largest cut: the input itself is no success


@dataclass(frozen=True)
class Shrinking:
    """The nearest success and the point to ask about (B, ...); the rest is (B,), float64, on the way from the input to `best`.

    at: the share of it where `x` lies. low: a share that failed. worth, below: the surplus at `best`, -inf before there is a
    success, and at `low`, -inf before there is a failure. cut: what to cut before a failure. over: who is through, bool.
    """

    best: Tensor
    x: Tensor
    at: Tensor
    low: Tensor
    worth: Tensor
    below: Tensor
    cut: Tensor
    over: Tensor


@dataclass(frozen=True)
class Dropping:
    """The nearest success and the point to ask about (B, ...), the unit that the latter leaves out (B,), -1 for none, which
    units are known to be needed (B, U), and who is through (B,).
    """

    best: Tensor
    x: Tensor
    unit: Tensor
    needed: Tensor
    over: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Trim(Attack):
    """Draws the best point known, or the caller's start, nearer to the input. Each step is one forward pass.

    In l1, l2 and l-infinity the point moves towards the input as the norm asks for: the largest change is cut by `cut` of
    itself, and by four times as much after each success. That is a cut of all changes alike in l2, of each by the same amount
    in l1, and of the largest ones in l-infinity. As soon as a cut fails, secants lead to the boundary; where nothing but
    labels is to be seen, as by this attack alone, it is a bisection. In l0 one feature (or pixel) after another is given
    back the input's value, the least changed first. If the point stays adversarial, that is kept, else undone.

    It is for the end of a search: other attacks make a forward and a backward pass to see whether a nearer point will do, and
    here it is one. In `Finally` its passes are kept back; in a `Sequence` with a budget there may be none left for it.

    Ours. Bisection to the boundary is as old as decision-based attacks (Brendel et al. 2018, arXiv:1712.04248); dropping
    features one by one is the backward elimination of feature selection.

    >>> import saddlepoint as sp
    >>> sp.attacks.Finally("fmn", sp.attacks.Trim(steps=8)).attacks[1]
    Trim(steps=8, cut=0.01)
    """

    declaration = Declaration(
        summary="draws the best point known nearer to the input, a forward pass at a time",
        reference="ours",
        norms=ALL_NORMS,
        access=Access.LABELS,
        minimizes=True,
        no_oracle="it goes on from another attack's point",
    )

    steps: int = 8
    cut: float = 0.01

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"steps must be a whole number >= 1; got {self.steps!r}")
        if not 0 < self.cut < 1:
            raise InputError(f"cut must lie in (0, 1); got {self.cut}")

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def takes_start(self) -> bool:
        return True

    @property
    def needs_start(self) -> bool:
        return True

    @property
    def recalls(self) -> bool:
        return True

    @property
    def randomized(self) -> bool:
        return False

    @property
    def looks_last(self) -> bool:
        return False

    def cost(self, classes: int) -> tuple[int, int]:
        return 1, 0

    def current(self, state: Shrinking | Dropping) -> Tensor:
        return state.best

    def done(self, state: Shrinking | Dropping) -> Tensor:
        return state.over

    def init(self, problem: Problem) -> Shrinking | Dropping:
        known = problem.best
        best = select(known.success, known.points, problem.begin(problem.origin))
        over = ~known.success if problem.start is None else torch.zeros_like(known.success)
        if problem.region.threat.norm is Norm.L0:
            unit, needed = torch.full_like(problem.labels, -1), torch.zeros_like(_sizes(problem, best), dtype=torch.bool)
            drop = Dropping(best, best, unit, needed, over)
            return select(known.success, _drop(problem, drop), drop)
        zero = torch.zeros_like(known.distance)
        worth = torch.where(known.success, known.surplus.double(), -torch.inf)
        shrink = Shrinking(best, best, zero + 1, zero, worth, zero - torch.inf, zero + self.cut, over)
        return select(known.success, _shrink(problem, shrink), shrink)

    def step(self, problem: Problem, state: Shrinking | Dropping) -> Shrinking | Dropping:
        said = problem.ask(state.x[:, None])
        surplus, success = said.surplus[:, 0].double(), said.reached[:, 0]
        state = replace(state, over=state.over | ~said.answered[:, 0])
        if isinstance(state, Dropping):
            is_unit = torch.arange(state.needed.shape[1], device=surplus.device) == state.unit[:, None]
            failed = replace(state, needed=state.needed | is_unit, over=state.over | (state.unit < 0))
            return _drop(problem, select(success, replace(state, best=state.x), failed))
        more = torch.isfinite(state.worth) & torch.isinf(state.below)
        cut = torch.where(more, (4 * state.cut).clamp(max=_MOST), state.cut)
        nearer = replace(state, best=state.x, worth=surplus, low=state.low / state.at, cut=cut)
        stays = replace(state, low=state.at, below=surplus, over=state.over | torch.isinf(state.worth))
        return _shrink(problem, select(success, nearer, stays))


def _shrink(problem: Problem, state: Shrinking) -> Shrinking:
    """The next point on the way: where the secant meets the boundary, or shorter by `cut`."""
    aimed = 0.01 * state.worth  # at the boundary itself every second point would fail by its rounding
    secant = state.low + (1 - state.low) * (aimed - state.below) / (state.worth - state.below)
    at = torch.where(torch.isinf(state.below), 1 - state.cut, secant).clamp(max=1.0)
    over = state.over | (1 - state.low < _CLOSE) | (at <= 0)
    return replace(state, x=on_the_way(problem, state.best, at), at=at, over=over)


def _drop(problem: Problem, state: Dropping) -> Dropping:
    """The point without the smallest change that is not known to be needed."""
    sizes = _sizes(problem, state.best)
    size, unit = sizes.masked_fill((sizes == 0) | state.needed, torch.inf).min(1)
    left_out = torch.arange(sizes.shape[1], device=unit.device) == unit[:, None]
    one_of_each = state.best.shape if sizes.shape[1] == state.best[0].numel() else (len(unit), 1, *state.best.shape[2:])
    x = torch.where(left_out.view(one_of_each), problem.origin, state.best)
    return replace(state, x=x, unit=unit, over=state.over | torch.isinf(size))


def _sizes(problem: Problem, points: Tensor) -> Tensor:
    """By how much each unit, which is a feature or a pixel, changes, (B, U)."""
    change, threat = (points - problem.origin).abs(), problem.region.threat
    whole_pixels = isinstance(threat, L0) and threat.per == "pixel"
    return (change.sum(1) if whole_pixels else change).flatten(1)
