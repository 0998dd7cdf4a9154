"""The samples under attack at this moment, and the best point found for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saddlepoint.engine.attack import State
from saddlepoint.goals import UNRESOLVED, Aim, Loss
from saddlepoint.rng import Keys
from saddlepoint.threats import Region
from saddlepoint.trees import join, select, take, tree_map

Keep = Literal["first", "smallest", "margin", "loss", "last"]
NO_CLASS = -2  # what a model predicts that gives NaN
KEEPS: tuple[Keep, ...] = ("first", "smallest", "margin", "loss", "last")


@dataclass(frozen=True)
class Candidate:
    """An evaluated point for each sample."""

    points: Tensor  # (B, ...)
    margin: Tensor  # (B,) float64, by how much the goal is reached beyond its confidence
    value: Tensor  # (B,) float64, what `keep` ranks by
    prediction: Tensor  # (B,)
    success: Tensor  # (B,) bool


@dataclass
class Slots:
    """One row per sample under attack; `trees.take` and `trees.join` move samples out and in."""

    index: Tensor  # (B,) position in the output
    sample: Tensor  # (B,) position in the input
    ids: Tensor  # (B,)
    labels: Tensor  # (B,)
    targets: Tensor  # (B,)
    region: Region
    aim: Aim
    keys: Keys
    state: State
    best: Candidate  # the point to return
    clean_prediction: Tensor  # (B,), UNRESOLVED until it is known
    wrong: Tensor  # (B,) bool: untargeted, and the model errs on the clean input
    settled: Tensor  # (B,) bool: the clean input decides the sample
    broken: Tensor  # (B,) bool: NaN or infinite outputs came up
    blind: Tensor  # (B,) bool: a gradient was NaN or infinite
    k: Tensor  # (B,) int64, on the CPU like the counters below
    forward: Tensor
    backward: Tensor
    verify: Tensor
    zero_gradients: Tensor

    def __len__(self) -> int:
        return len(self.index)

    @staticmethod
    def enter(
        index: Tensor,
        sample: Tensor,
        ids: Tensor,
        labels: Tensor,
        targets: Tensor,
        region: Region,
        aim: Aim,
        keys: Keys,
        state: State,
    ) -> Slots:
        """Rows for samples about which nothing is known yet."""
        zero = torch.zeros(len(index), dtype=torch.int64)
        false = torch.zeros(len(index), dtype=torch.bool, device=region.origin.device)
        unknown = torch.full_like(labels, UNRESOLVED)
        lowest = torch.full_like(region.eps, -torch.inf)
        start = Candidate(region.origin, lowest, lowest, unknown, false)
        return Slots(
            index=index, sample=sample, ids=ids, labels=labels, targets=targets, region=region, aim=aim, keys=keys,
            state=state, best=start, clean_prediction=unknown, wrong=false, settled=false, broken=false, blind=false,
            k=zero, forward=zero.clone(), backward=zero.clone(), verify=zero.clone(), zero_gradients=zero.clone(),
        )  # fmt: skip


def split(slots: Slots, mask: Tensor) -> tuple[Slots | None, Slots | None]:
    """The samples where mask (B,) is True, and the others; None for none."""
    if bool(mask.all()):
        return slots, None
    if not bool(mask.any()):
        return None, slots
    return take(slots, mask.nonzero()[:, 0]), take(slots, (~mask).nonzero()[:, 0])


class Pool:
    """Samples that wait for the same thing, first come first served."""

    def __init__(self) -> None:
        self.slots: Slots | None = None

    def __len__(self) -> int:
        return 0 if self.slots is None else len(self.slots)

    def add(self, more: Slots | None) -> None:
        """Put samples at the end."""
        if more is not None:
            self.slots = more if self.slots is None else join(self.slots, more)

    def pop(self, count: int) -> Slots | None:
        """Take out the first `count`, None if there are none."""
        if self.slots is None:
            return None
        first, self.slots = split(self.slots, torch.arange(len(self.slots), device=self.slots.index.device) < count)
        return first


@dataclass(frozen=True)
class Recorder:
    """Which evaluated point counts as found, and which is kept.

    keep: "first" success, and the sample is done; the "smallest" success; the largest "margin"; the largest "loss" of the
    attack; the "last" iterate. Where "first" and "smallest" find no success, the largest margin is kept.
    tau: the margin that a success needs, beyond the goal's own confidence.
    objective: the attack's loss.
    upheld: says of points (Q, ...) with their samples (Q,) which successes are no luck, (Q,) bool; None to believe all.
    """

    keep: Keep
    tau: float
    objective: Loss
    upheld: Callable[[Slots, Tensor, Tensor], Tensor] | None = None

    def decided(self, slots: Slots) -> Tensor:
        """Which samples need no further step, (B,) bool."""
        done = slots.settled | slots.broken | slots.blind
        return done | slots.best.success if self.keep == "first" else done

    def record(self, slots: Slots, points: Tensor, logits: Tensor, owner: Tensor | None, *, trusted: bool) -> None:
        """Offer evaluated points (Q, ...) with logits (Q, C) to the samples that own them.

        The first point of a sample is its clean input (the engine sees to that). `trusted` points are known to be feasible.
        """
        fresh = slots.clean_prediction == UNRESOLVED
        first_look = bool(fresh.any())
        if first_look:
            self._take_clean_prediction(slots, logits, fresh, owner)
        aim, region = (slots.aim, slots.region) if owner is None else (take(slots.aim, owner), take(slots.region, owner))
        margin = beyond_confidence(aim, logits).double()
        sound = torch.isfinite(margin)
        feasible = sound if trusted else sound & region.contains(points)
        success = feasible & (margin >= self.tau)
        value = margin
        if self.keep == "smallest":
            value = torch.where(success, -region.distance(points), value)
        elif self.keep == "loss":
            value = self.objective(logits, aim).double()
        value = value.masked_fill(~feasible, -torch.inf)
        candidate = Candidate(points, margin, value, logits.argmax(1), success)
        if owner is not None:
            sound = torch.ones_like(slots.broken).index_put((owner[~sound],), torch.zeros_like(owner[~sound], dtype=torch.bool))
            candidate = _best_of_each_owner(candidate, owner, slots.best, earliest=self.keep == "first")
        better = self._better(candidate, slots.best)
        claims = (better & candidate.success & ~slots.wrong).nonzero()[:, 0]
        if self.upheld is not None and len(claims):
            better = better.index_copy(0, claims, self.upheld(slots, candidate.points[claims], claims))
        if bool(better.all()):
            slots.best = candidate
        elif bool(better.any()):
            slots.best = select(better, candidate, slots.best)
        slots.broken = slots.broken | (~sound & ~slots.best.success)
        if first_look:
            looked_at = fresh & (slots.clean_prediction != UNRESOLVED)
            slots.settled = slots.settled | (looked_at & (slots.wrong | slots.best.success))

    def _better(self, new: Candidate, old: Candidate) -> Tensor:
        if self.keep == "last":
            return new.value > -torch.inf
        higher = new.value > old.value
        if self.keep in ("loss", "margin"):  # a larger margin is never less of a success
            return higher
        better = (new.success & ~old.success) | ((new.success == old.success) & higher)
        return better & ~old.success if self.keep == "first" else better

    @staticmethod
    def _take_clean_prediction(slots: Slots, logits: Tensor, fresh: Tensor, owner: Tensor | None) -> None:
        goal = slots.aim.goal
        rows = torch.arange(len(slots), device=fresh.device) if owner is None else owner
        rows, logits = rows[fresh[rows]], logits[fresh[rows]]
        prediction = logits.argmax(1)
        known = torch.where(torch.isfinite(logits).all(1), prediction, torch.full_like(prediction, NO_CLASS))
        slots.clean_prediction = slots.clean_prediction.index_copy(0, rows, known)
        open_targets = slots.targets[rows]
        targets = goal.resolve(open_targets, logits[:, :-1] if slots.aim.rejects else logits, slots.labels[rows])
        if targets is not open_targets:
            slots.targets = slots.targets.index_copy(0, rows, targets)
            slots.aim = slots.aim.bound_again(slots.labels, slots.targets)
        if not goal.targeted:
            aim = take(slots.aim, rows)
            margin = aim.margin(logits)
            wrong = margin > 0
            if goal.top_k == 1:  # where logits tie, the predicted class counts
                wrong = wrong | ~aim.unwanted.gather(1, prediction[:, None])[:, 0]
            slots.wrong = slots.wrong.index_copy(0, rows, wrong & torch.isfinite(margin))


def beyond_confidence(aim: Aim, logits: Tensor) -> Tensor:
    """The margin less the confidence that the goal asks for, (Q,)."""
    margin = aim.margin(logits)
    return margin - aim.goal.confidence if aim.goal.confidence else margin


def _best_of_each_owner(offered: Candidate, owner: Tensor, kept: Candidate, *, earliest: bool = False) -> Candidate:
    """The best of several points (Q, ...) for each sample (B,); samples without one get a point of value -inf.

    earliest: the first success is the best one.
    """
    if bool((owner[1:] > owner[:-1]).all()):  # one point each, as mostly
        has, chosen = owner, offered
    else:
        turn = -torch.arange(len(owner), dtype=offered.value.dtype, device=owner.device)
        order = (torch.where(offered.success, turn, offered.value) if earliest else offered.value).argsort(stable=True)
        order = order[offered.success[order].to(torch.uint8).argsort(stable=True)]
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        top = torch.full_like(kept.prediction, -1).scatter_reduce(0, owner, rank, "amax")
        has = (top >= 0).nonzero()[:, 0]
        chosen = take(offered, order[top[has]])
    nothing = Candidate(
        kept.points,
        kept.margin,
        torch.full_like(kept.value, -torch.inf),
        kept.prediction,
        torch.zeros_like(kept.success),
    )
    return tree_map(lambda full, part: full.index_copy(0, has, part), nothing, chosen)
