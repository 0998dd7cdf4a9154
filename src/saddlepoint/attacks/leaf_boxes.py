"""The attack on decision trees and ensembles of them: no gradients, but boxes, and these are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from saddlepoint.engine import Attack, Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.models.torch_model import Model
from saddlepoint.models.trees_exact import TreeEnsemble, tree_ensemble
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.threats import Region
from saddlepoint.trees import join, rows, take

_ELEMENTS = 2**24  # numbers that are worked on at once
_ROUNDING = 2.0**-20  # of the largest logit: libraries add up in float32, or in another order
_LESS = 1 - 1e-9  # nearer by more than rounding
_GAIN = 1e-9  # a surplus that is no rounding


@dataclass(frozen=True)
class Walk:
    """Where each sample's walk is, and the nearest success that it has met."""

    x: Tensor  # (B, ...) that success, the input before there is one
    best: Tensor  # (B, F) its cells
    size: Tensor  # (B,) float64, its cost, infinite before there is one
    cells: Tensor  # (B, F) where the walk is
    barred: Tensor  # (B, F) bool, features that stay as they are in this round
    over: Tensor  # (B,) bool
    home: Tensor  # (B, F) the input's cells
    value: Tensor  # (B, U) the nearest value that a feature can take in each cell
    cost: Tensor  # (B, U) float64, what that adds to the size; infinite where there is no such value


@final
@dataclass(frozen=True, kw_only=True)
class LeafBoxes(Attack):
    """The nearest point where an ensemble of trees says something else: exact for one tree, a search for several.

    A leaf is a box, so the nearest point of it is found feature by feature, in all four norms. With a single tree the answer is
    the nearest leaf that reaches the goal. For ensembles the question is NP-hard, and the search is a local one:

        move      one feature goes to another cell between two neighbouring thresholds of all trees: what each such move does to
                  the outputs is computed exactly, for all of them at once. Or into one of `leaves` boxes drawn at random.
        climb     the move that gains most surplus for its size; once there is a success, the smallest move that ends in a
                  nearer one, if any does
        descend   from a success to the nearest that one move leads to
        restart   where nothing helps: in the nearest success a random part of the moved features goes back, and in half of the
                  restarts those stay where they are until the next one

    trees: a fitted estimator, `sp.Model` of one, or its `sp.models.tree_ensemble`. With the trees of another model than the one
    under attack it is a transfer attack. steps: moves. leaves: boxes drawn in each step.
    The search asks the model nothing. Each nearer success is a query, for the model has the last word.

    Values are as near to the threshold as the library's arithmetic and the dtype of the inputs allow, and on the threat's grid.
    l0 counts features here; where a threat counts pixels of several channels, the search is for few features.

    Sources: Kantchelian, Tygar & Joseph (2016), Evasion and hardening of tree ensemble classifiers, arXiv:1509.07892 (NP-hard;
    all moves of one feature at once are their symbolic prediction); Zhang, Zhang & Hsieh (2020), An efficient adversarial
    attack for tree ensembles, arXiv:2010.11598 (from tuple to tuple of leaves). The restarts are ours.

    >>> import numpy as np, torch, saddlepoint as sp
    >>> from sklearn.tree import DecisionTreeClassifier
    >>> tree = DecisionTreeClassifier().fit(np.array([[0.0, 0.3], [0.5, 0.3], [1.0, 0.3]]), [0, 1, 1])
    >>> x, y = torch.tensor([[0.1, 0.2]]), torch.tensor([0])
    >>> found = sp.attack(sp.Model(tree), x, y, sp.attacks.LeafBoxes(tree), sp.Minimize("linf"))
    >>> round(found.distance.item(), 4), found.queries.forward.item()
    (0.15, 2)
    """

    trees: TreeEnsemble
    steps: int = 300
    leaves: int = 16

    declaration: ClassVar[Declaration] = Declaration(
        summary="from box to box of a tree ensemble; exact for a single tree",
        reference="Kantchelian, Tygar & Joseph 2016, arXiv:1509.07892; Zhang, Zhang & Hsieh 2020, arXiv:2010.11598",
        access=Access.LABELS,
        minimizes=True,
        no_oracle="trees are made of boxes, linear models are not",
    )

    def __init__(self, trees: object, *, steps: int = 300, leaves: int = 16) -> None:
        for name, value in (("steps", steps), ("leaves", leaves)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number >= 1; got {value}")
        object.__setattr__(self, "trees", trees if isinstance(trees, TreeEnsemble) else tree_ensemble(_estimator(trees)))
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "leaves", leaves)

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def looks_last(self) -> bool:
        return False

    def cost(self, classes: int) -> tuple[int, int]:
        return (1, 0)

    def done(self, state: Walk) -> Tensor:
        return state.over

    def settings(self) -> dict[str, object]:
        return super().settings() | {"trees": str(self.trees)}

    def init(self, problem: Problem) -> Walk:
        origin, trees = problem.origin, self.trees.to(problem.origin.device)
        if origin[0].numel() != trees.size:
            raise InputError(f"{trees.name} takes {trees.size} features; inputs of shape {tuple(origin.shape[1:])} have others")
        home = trees.cells(origin)
        value, cost = _choices(trees, problem.region, home)
        unknown, none = torch.full_like(problem.eps, torch.inf), torch.zeros_like(home, dtype=torch.bool)
        return Walk(origin, home, unknown, home, none, unknown < 0, home, value, cost)

    def step(self, problem: Problem, state: Walk) -> Walk:
        trees = self.trees.to(problem.origin.device)
        each = max(len(trees.tree), len(trees.column) * trees.value.shape[1], self._drawn * (len(trees.features) + trees.trees))
        parts = list(torch.split(torch.arange(len(problem.k), device=problem.origin.device), max(1, _ELEMENTS // each)))
        moved = self._move(trees, problem.only(parts[0]), state if len(parts) == 1 else take(state, parts[0]))
        for part in parts[1:]:
            moved = join(moved, self._move(trees, problem.only(part), take(state, part)))
        nearer = (moved.size < state.size).nonzero()[:, 0]
        if len(nearer):
            problem.only(nearer).reached(moved.x[nearer])
        return moved

    @property
    def _drawn(self) -> int:
        """How many boxes a step looks at: all of a single tree."""
        boxes = len(self.trees.tree)
        return boxes if self.trees.trees == 1 else min(self.leaves, boxes)

    def _move(self, trees: TreeEnsemble, problem: Problem, state: Walk) -> Walk:
        norm, cells, boxes = problem.region.threat.norm, state.cells, trees.leaves(state.cells)
        entered = _nearest_in(trees, cells, self._draw(trees, problem))  # (B, m, F)
        now = trees.outputs(boxes)[:, None]
        outputs = [now, now + _changes(trees, cells, boxes), trees.outputs(trees.leaves(entered))]
        surplus = _surplus(trees, problem, torch.cat(outputs, 1))
        here, there = surplus[:, :1], surplus[:, 1:]  # (B, 1), (B, U + m)

        spent = state.cost.gather(1, cells)
        total = _total(spent, norm)[:, None]
        size = torch.cat([_totals_after(trees, spent, state.cost, norm), _total(_spent(state.cost, entered), norm)], 1)
        touches_barred = ((entered != cells[:, None]) & state.barred[:, None]).any(2)
        free = ~torch.cat([state.barred[:, trees.column], touches_barred], 1)

        success = here >= 0
        possible = free & (size < _LESS * torch.where(success, total, state.size[:, None]))
        ends = possible & (there >= 0)
        gain = torch.minimum(there, torch.zeros_like(there)) - here
        climbs = possible & ~success & (gain > _GAIN)
        rate = (gain / (size - total).clamp(min=1e-12)).masked_fill(~climbs, -torch.inf)
        nearest = success[:, 0] | torch.isfinite(state.size) | (trees.trees == 1)
        nearest = nearest & ends.any(1)
        chosen = torch.where(nearest, size.masked_fill(~ends, torch.inf).argmin(1), rate.argmax(1))
        moves = (ends | climbs).any(1)[:, None]
        restarted, barred = _restart(trees, problem, state)
        cells = torch.where(moves, _after(trees, cells, entered, chosen), restarted)

        reached = _surplus(trees, problem, trees.outputs(trees.leaves(cells))[:, None])[:, 0] >= 0
        size = _total(state.cost.gather(1, cells), norm)
        better = reached & (size < _LESS * state.size)
        best, least = torch.where(better[:, None], cells, state.best), torch.where(better, size, state.size)
        x = problem.origin.flatten(1).index_copy(1, trees.features, state.value.gather(1, best)).view_as(problem.origin)
        return replace(
            state,
            x=torch.where(rows(torch.isfinite(least), x), x, problem.origin),
            best=best,
            size=least,
            cells=cells,
            barred=torch.where(moves, state.barred, barred),
            over=(least <= state.cost.scatter(1, state.home, torch.inf).amin(1)) | (trees.trees == 1),
        )

    def _draw(self, trees: TreeEnsemble, problem: Problem) -> Tensor:
        """Boxes (B, m)."""
        boxes = len(trees.tree)
        if self._drawn == boxes:
            return torch.arange(boxes, device=problem.origin.device).expand(len(problem.k), -1)
        return (problem.random(0).uniform((self._drawn,), torch.float64) * boxes).long().clamp(max=boxes - 1)


def _estimator(given: object) -> object:
    if not isinstance(given, Model):
        return given
    if given.describe()["mean"] is not None or given.describe()["std"] is not None:
        raise InputError("the model normalises its inputs, so the trees' thresholds are not in its units: train them without")
    return getattr(given.net, "estimator", given.net)


# What a cell costs


def _choices(trees: TreeEnsemble, region: Region, home: Tensor) -> tuple[Tensor, Tensor]:
    """The value nearest to the input in each cell, and what it costs, (B, U) each."""
    left, right = trees.ends(region.origin.dtype)
    which = trees.features[trees.column]
    origin, lower, upper = (end.flatten(1)[:, which] for end in (region.origin, region.lower, region.upper))
    lowest, highest = torch.maximum(left, lower), torch.minimum(right, upper)
    value = torch.maximum(torch.minimum(origin, highest), lowest)
    if region.threat.grid is not None:  # away from the input: the other level may be in the next cell
        level = value.double() / region.threat.grid
        level = torch.where(value > origin, level.ceil(), level.floor()) * region.threat.grid
        value = replace(region, origin=origin, lower=lower, upper=upper).snap(level.to(value.dtype))
    stays = torch.zeros_like(value, dtype=torch.bool).scatter(1, home, True)
    value = torch.where(stays, origin, value)
    away = (value.double() - origin.double()).abs()
    match region.threat.norm:
        case Norm.L0:
            cost = (away > 0).double()
        case Norm.L2:
            cost = away**2
        case _:
            cost = away
    return value, cost.masked_fill(~(stays | ((value >= lowest) & (value <= highest))), torch.inf)


def _spent(cost: Tensor, cells: Tensor) -> Tensor:
    """What each feature costs (B, m, F) in cells (B, m, F)."""
    return cost.gather(1, cells.flatten(1)).view_as(cells)


def _total(spent: Tensor, norm: Norm) -> Tensor:
    return spent.amax(-1) if norm is Norm.LINF else spent.sum(-1)


def _totals_after(trees: TreeEnsemble, spent: Tensor, cost: Tensor, norm: Norm) -> Tensor:
    """Total costs (B, U) once a feature has gone to one of its cells, from what the features cost now (B, F)."""
    if norm is not Norm.LINF:
        return spent.sum(1, keepdim=True) - spent[:, trees.column] + cost
    most = spent.max(1, keepdim=True)
    others = spent.scatter(1, most.indices, 0).amax(1, keepdim=True)
    return torch.maximum(torch.where(trees.column == most.indices, others, most.values), cost)


# What a move does


def _surplus(trees: TreeEnsemble, problem: Problem, outputs: Tensor) -> Tensor:
    """By how much outputs (B, m, C) exceed what success needs, (B, m)."""
    logits = trees.logits(outputs)
    count, points, _ = outputs.shape
    owner = torch.arange(count, device=outputs.device).repeat_interleave(points)
    return problem.surplus(logits.flatten(0, 1), owner).view(count, points) - _ROUNDING * logits.abs().amax(2)


def _changes(trees: TreeEnsemble, cells: Tensor, boxes: Tensor) -> Tensor:
    """How the outputs change (B, U, C) when one feature goes to another cell; boxes (B, T) are those where the input is now.

    A tree comes into another box exactly if that feature alone was outside of it: each such box changes a range of cells.
    """
    count, total, classes = len(cells), len(trees.column), trees.value.shape[1]
    outside = torch.zeros(count, len(trees.tree), dtype=torch.int16, device=cells.device)
    place = torch.zeros_like(outside)
    for p, (asked, lower, upper) in enumerate(zip(trees.asked, trees.lower, trees.upper, strict=True)):
        cell = cells.index_select(1, asked)
        out = (cell < lower) | (cell > upper)
        outside += out
        place += p * out
    row, box = (outside == 1).nonzero(as_tuple=True)
    where = place[row, box].long()
    change = trees.value[box] - trees.value[boxes[row, trees.tree[box]]]
    begins, ends = (row * (total + 1) + cell for cell in (trees.lower[where, box], trees.upper[where, box] + 1))
    slope = change.new_zeros(count * (total + 1), classes).index_add_(0, begins, change).index_add_(0, ends, -change)
    return slope.view(count, total + 1, classes)[:, :-1].cumsum(1)


def _nearest_in(trees: TreeEnsemble, cells: Tensor, boxes: Tensor) -> Tensor:
    """The nearest cells (B, m, F) to cells (B, F) in boxes (B, m)."""
    found = cells[:, None].repeat(1, boxes.shape[1], 1)
    for asked, lower, upper in zip(trees.asked, trees.lower, trees.upper, strict=True):
        which = asked[boxes][..., None]
        found.scatter_(2, which, found.gather(2, which).clamp(lower[boxes][..., None], upper[boxes][..., None]))
    return found


def _after(trees: TreeEnsemble, cells: Tensor, entered: Tensor, chosen: Tensor) -> Tensor:
    """Cells (B, F) after the move `chosen` (B,): to a cell, or to one of the entered ones."""
    total = len(trees.column)
    cell = chosen.clamp(max=total - 1)[:, None]
    box = (chosen - total).clamp(min=0)
    moved = cells.scatter(1, trees.column[cell], cell)
    return torch.where((chosen < total)[:, None], moved, entered[torch.arange(len(cells), device=cells.device), box])


def _restart(trees: TreeEnsemble, problem: Problem, state: Walk) -> tuple[Tensor, Tensor]:
    """Cells (B, F) from which to set out again, and which features may not move, (B, F) bool."""
    cells = torch.where(torch.isfinite(state.size)[:, None], state.best, state.cells)
    nearer = state.cost < _LESS * state.size[:, None]  # in l-infinity not even one feature may go as far as before
    reach = torch.where(nearer, torch.arange(len(trees.column), device=cells.device), state.home[:, trees.column])
    column = trees.column.expand_as(reach)
    cells = cells.clamp(*(state.home.scatter_reduce(1, column, reach, end) for end in ("amin", "amax")))
    moved = cells != state.home
    drawn = problem.random(1).uniform((len(trees.features) + 2,), torch.float64)
    share, coin, chance = drawn[:, :1], drawn[:, 1:2], drawn[:, 2:]
    back = (chance < share).scatter(1, (moved * (1 - chance)).argmax(1, keepdim=True), True) & moved  # one at least
    return torch.where(back, state.home, cells), back & (coin < 0.5)
