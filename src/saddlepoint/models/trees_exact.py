"""Decision trees and ensembles of them, as the boxes that their leaves are.

A tree asks whether x_i <= t. The thresholds of all trees cut each feature into cells, within which nothing changes, so a box is
a range of cells for each feature that its path asks about. What floating-point numbers a cell holds is decided here, once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saddlepoint.errors import CapabilityError
from saddlepoint.models.adapt import Adapted, log_probabilities
from saddlepoint.models.estimators import adapted, features_of, library_of
from saddlepoint.trees import tree_map

Array = Any  # numpy's
Estimator = Any  # an object of a library that ships no types
_CHECKS = 64  # points on which boxes and estimator are compared
_TOLERANCE = 1e-4  # of the outputs' size, for boosted trees are summed in float32


@dataclass(frozen=True, eq=False, repr=False)
class TreeEnsemble:
    """T trees with M leaves in all. They ask about F of the D input features, which have U cells in all.

    Cells are numbered through, feature by feature, from low values to high ones. Outputs are the sum of `base` and the values
    of the leaves in which an input lies.
    """

    name: str
    size: int  # D
    dtype: torch.dtype  # in which inputs are compared with thresholds
    averaged: bool  # whether the outputs are probabilities; otherwise they are logits
    features: Tensor  # (F,) the inputs that are asked about
    column: Tensor  # (U,) to which of these a cell belongs, 0 to F - 1
    end: Tensor  # (U,) float64, the largest value in the cell, infinite for a feature's last one
    asks: Tensor  # (n,) which of the F features a node asks about
    cut: Tensor  # (n,) the last cell that goes left
    follow: Tensor  # (2 n,) the nodes to the left and the right of each; a leaf's own
    roots: Tensor  # (T,)
    leaf: Tensor  # (n,) which of the M leaves a node is
    tree: Tensor  # (M,) the tree of a leaf, 0 to T - 1
    asked: Tensor  # (P, M) the features on a leaf's path, 0 to F - 1; where there are fewer, the first with its whole range
    lower: Tensor  # (P, M) the first cell of the leaf's box in that feature
    upper: Tensor  # (P, M) the last one
    value: Tensor  # (M, C) float64
    base: Tensor  # (C,) float64
    depth: int  # questions on the longest path

    @property
    def trees(self) -> int:
        """T."""
        return len(self.roots)

    @cached_property
    def digest(self) -> str:
        """A fingerprint of boxes and values."""
        parts = (self.features, self.end, self.asked, self.lower, self.upper, self.value, self.base)
        return hashlib.sha256(b"".join(part.cpu().contiguous().numpy().tobytes() for part in parts)).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"{self.name}, {self.trees} trees with {len(self.tree)} leaves, sha256 {self.digest}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TreeEnsemble) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def to(self, device: torch.device) -> TreeEnsemble:
        """The same, with its tensors there."""
        return self if self.value.device == device else tree_map(lambda t: t.to(device), self)

    def ends(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The smallest and the largest number in each cell, (U,) each, of those that inputs of this dtype can be.

        Trees see these as they are. Where a cell holds none, the first is larger than the second.
        """
        narrow = max(dtype, self.dtype, key=lambda kind: torch.finfo(kind).eps)
        right = self.end.to(narrow)
        right = torch.where(right.double() > self.end, torch.nextafter(right, torch.full_like(right, -torch.inf)), right)
        following = torch.nextafter(right, torch.full_like(right, torch.inf)).roll(1)
        is_first = torch.nn.functional.pad(self.column[1:] != self.column[:-1], (1, 0), value=True)
        return following.masked_fill(is_first, -torch.inf).to(dtype), right.to(dtype)

    def cells(self, x: Tensor) -> Tensor:
        """The cells (N, F) of inputs (N, ...)."""
        narrow = max(x.dtype, self.dtype, key=lambda kind: torch.finfo(kind).eps)
        seen = x.flatten(1)[:, self.features[self.column]].to(narrow).double()
        first = torch.searchsorted(self.column, torch.arange(len(self.features), device=x.device))
        return first.repeat(len(x), 1).index_add_(1, self.column, (seen > self.end).long())

    def leaves(self, cells: Tensor) -> Tensor:
        """The leaves (..., T) in which cells (..., F) are."""
        flat = cells.flatten(0, -2)
        node = self.roots.repeat(len(flat))
        start = flat.shape[1] * torch.arange(len(flat), device=cells.device).repeat_interleave(self.trees)
        for _ in range(self.depth):
            cell = flat.flatten().index_select(0, start + self.asks.index_select(0, node))
            goes_right = cell > self.cut.index_select(0, node)
            node = self.follow.index_select(0, 2 * node + goes_right)
        return self.leaf.index_select(0, node).view(*cells.shape[:-1], self.trees)

    def outputs(self, leaves: Tensor) -> Tensor:
        """The sums (..., C) over one leaf of each tree (..., T)."""
        sums = torch.nn.functional.embedding_bag(leaves.flatten(0, -2), self.value, mode="sum")
        return sums.view(*leaves.shape[:-1], -1) + self.base

    def logits(self, outputs: Tensor) -> Tensor:
        """Logits that belong to outputs, as `sp.Model` of the estimator gives them."""
        return log_probabilities(outputs) if self.averaged else outputs


def tree_ensemble(estimator: object) -> TreeEnsemble:
    """The boxes of a fitted tree, forest or boosted ensemble, for the attack `LeafBoxes`.

    Of scikit-learn decision trees and extra trees, forests of them, and gradient boosting with and without histograms; boosted
    trees of XGBoost and LightGBM. What was read is compared with the estimator's own answers on random points.
    Errors: `CapabilityError` for other estimators, and for trees that ask something else than x_i <= t.
    """
    net: Estimator = getattr(estimator, "best_estimator_", estimator)
    read = _reader(net)(net)
    made, size = adapted(net), features_of(net)
    trees = list(read.trees)
    if size is None or all(len(tree.left) == 1 for tree in trees):
        raise CapabilityError(f"this {made.name} asks nothing about its inputs, so nothing changes its answer")
    return _calibrated(_boxes(made, size, read.dtype, trees), made)


# From trees to boxes


class _Tree(NamedTuple):
    """Nodes 0 to n - 1, the root first. An input goes to `left` where x[feature] <= threshold, otherwise to `right`.

    left, right: -1 for leaves. value: (n, C), or (n,) for `output` alone.
    """

    left: Array
    right: Array
    feature: Array
    threshold: Array
    value: Array
    output: int | None = None


class _Read(NamedTuple):
    trees: Iterator[_Tree]
    dtype: torch.dtype


class _Grid(NamedTuple):
    """The cells: see `TreeEnsemble`. first, last: (F,) of each feature. asks, cut: (inner nodes,)."""

    features: Array
    column: Array
    end: Array
    first: Array
    last: Array
    asks: Array
    cut: Array


def _boxes(made: Adapted, size: int, dtype: torch.dtype, trees: list[_Tree]) -> TreeEnsemble:
    count = np.array([len(tree.left) for tree in trees])
    roots = count.cumsum() - count
    inner = np.concatenate([tree.left for tree in trees]) >= 0
    sides = [np.concatenate([getattr(tree, side) for tree in trees]) + np.repeat(roots, count) for side in ("left", "right")]
    feature, threshold = (np.concatenate([getattr(tree, name) for tree in trees]) for name in ("feature", "threshold"))
    grid = _grid(feature[inner], threshold[inner])
    asked, lower, upper, depth = _ranges(grid, inner, *(side[inner] for side in sides))

    leaves = (~inner).nonzero()[0]
    possible = (lower <= upper).all(1)
    every, leaf, asks, cut = np.arange(len(inner)), *np.zeros((3, len(inner)), dtype=np.int64)
    leaf[leaves[possible]] = np.arange(possible.sum())
    asks[inner], cut[inner] = grid.asks, grid.cut
    whole_numbers = {
        "features": grid.features, "column": grid.column, "asks": asks, "cut": cut,
        "follow": np.stack([np.where(inner, side, every) for side in sides], 1).reshape(-1), "roots": roots, "leaf": leaf,
        "tree": np.repeat(np.arange(len(trees)), count)[leaves[possible]],
        "asked": asked[possible].T, "lower": lower[possible].T, "upper": upper[possible].T,
    }  # fmt: skip
    value = np.concatenate([_all_outputs(tree, made.num_classes or 2) for tree in trees])[leaves[possible]]
    return TreeEnsemble(
        name=made.name,
        size=size,
        dtype=dtype,
        averaged=made.gives == "probabilities",
        depth=depth,
        end=torch.from_numpy(grid.end),
        value=torch.from_numpy(value),
        base=torch.zeros(value.shape[1], dtype=torch.float64),
        **{name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)) for name, array in whole_numbers.items()},
    )


def _grid(feature: Array, threshold: Array) -> _Grid:
    """The cells that inner nodes make."""
    features, asks = np.unique(feature, return_inverse=True)
    cuts, which = np.unique(np.stack([asks, threshold], 1), axis=0, return_inverse=True)
    column = np.concatenate([cuts[:, 0].astype(np.int64), np.arange(len(features))])
    end = np.concatenate([cuts[:, 1], np.full(len(features), np.inf)])
    order = np.lexsort((end, column))
    first = np.searchsorted(column[order], np.arange(len(features)))
    last = np.append(first[1:], len(column)) - 1
    return _Grid(features, column[order], end[order], first, last, asks, np.argsort(order)[which.reshape(-1)])


def _ranges(grid: _Grid, inner: Array, left: Array, right: Array) -> tuple[Array, Array, Array, int]:
    """Features, first and last cells (M, P) of all leaves' boxes, and the longest path; left and right: of inner nodes."""
    question, goes_left = np.full(len(inner), -1), np.zeros(len(inner), dtype=bool)  # how one came to a node
    question[left] = question[right] = np.arange(inner.sum())
    goes_left[left] = True
    nodes, leaves = inner.nonzero()[0], (~inner).nonzero()[0]

    leaf, here, steps = np.arange(len(leaves)), leaves, []
    while len(here):  # from all leaves up to the roots
        climbing = question[here] >= 0
        leaf, here = leaf[climbing], here[climbing]
        asks, cut, down = grid.asks[question[here]], grid.cut[question[here]], goes_left[here]
        steps.append((leaf, asks, np.where(down, grid.first[asks], cut + 1), np.where(down, cut, grid.last[asks])))
        here = nodes[question[here]]
    leaf, asks, lowest, highest = (np.concatenate(each) for each in zip(*steps, strict=True))

    pairs, which = np.unique(np.stack([leaf, asks], 1), axis=0, return_inverse=True)
    leaf, asks = pairs.T
    width = np.bincount(leaf, minlength=len(leaves))
    place = np.arange(len(leaf)) - (width.cumsum() - width)[leaf]
    asked = np.zeros((len(leaves), width.max()), dtype=np.int64)
    asked[leaf, place] = asks
    lower, upper = grid.first[asked], grid.last[asked]
    np.maximum.at(lower, (leaf[which.reshape(-1)], place[which.reshape(-1)]), lowest)
    np.minimum.at(upper, (leaf[which.reshape(-1)], place[which.reshape(-1)]), highest)
    return asked, lower, upper, len(steps) - 1


def _all_outputs(tree: _Tree, classes: int) -> Array:
    """Values (n, C) of one logit among them, or of all."""
    if tree.output is None:
        return np.asarray(tree.value, dtype=np.float64)
    value = np.zeros((len(tree.value), classes))
    value[:, tree.output] = tree.value
    return value


def _calibrated(found: TreeEnsemble, made: Adapted) -> TreeEnsemble:
    """With the base that the estimator has, which no tree tells, once its answers are what the boxes give."""
    left, right = found.ends(torch.float32)
    inside = torch.where(torch.isfinite(right), right, torch.where(torch.isfinite(left), left, 0.0))
    chance = np.random.default_rng(0).random((_CHECKS, len(found.features)))
    first = torch.searchsorted(found.column, torch.arange(len(found.features)))
    cells = first + torch.from_numpy(chance * torch.bincount(found.column).numpy()).long()
    x = torch.zeros(_CHECKS, found.size, dtype=torch.float64)
    x[:, found.features] = inside[cells].double()
    answers: Tensor = made.call(x).detach()
    if answers.dim() == 1:
        answers = torch.stack([torch.zeros_like(answers), answers], 1)
    difference = answers - found.outputs(found.leaves(found.cells(x)))
    base = torch.zeros_like(found.base) if found.averaged else difference.mean(0)
    if bool(((difference - base).abs() > _TOLERANCE * (1 + answers.abs().max())).any()):
        raise CapabilityError(f"the trees of this {made.name} do not add up to its answers; attack it by its scores")
    return replace(found, base=base)


# From estimators to trees


def _reader(net: Estimator) -> Callable[[Estimator], _Read]:
    name, library = type(net).__name__, library_of(type(net))
    if library == "xgboost":
        return _xgboost
    if library == "lightgbm":
        return _lightgbm
    readers = {
        "DecisionTreeClassifier": _single, "ExtraTreeClassifier": _single, "RandomForestClassifier": _forest,
        "ExtraTreesClassifier": _forest, "GradientBoostingClassifier": _boosted, "HistGradientBoostingClassifier": _histograms,
    }  # fmt: skip
    if library != "sklearn" or name not in readers:
        raise CapabilityError(f"leaf boxes are there for {', '.join(readers)}, XGBoost and LightGBM; this is a {name}")
    return readers[name]


def _single(net: Estimator) -> _Read:
    return _Read((_probabilities(tree, 1) for tree in (net,)), torch.float32)


def _forest(net: Estimator) -> _Read:
    return _Read((_probabilities(tree, len(net.estimators_)) for tree in net.estimators_), torch.float32)


def _probabilities(net: Estimator, trees: int) -> _Tree:
    value = net.tree_.value[:, 0]
    return _nodes(net.tree_, value / value.sum(1, keepdims=True) / trees)


def _boosted(net: Estimator) -> _Read:
    columns = net.estimators_.shape[1]
    trees = (
        _nodes(one.tree_, net.learning_rate * one.tree_.value[:, 0, 0], column if columns > 1 else 1)
        for stage in net.estimators_
        for column, one in enumerate(stage)
    )
    return _Read(trees, torch.float32)


def _nodes(tree: Estimator, value: Array, output: int | None = None) -> _Tree:
    """Nodes of scikit-learn's trees, which compare inputs in float32 with thresholds in float64."""
    return _Tree(tree.children_left, tree.children_right, tree.feature, _down(tree.threshold), value, output)


def _down(threshold: Array) -> Array:
    """The largest float32 that is no larger."""
    near = threshold.astype(np.float32)
    return np.where(near > threshold, np.nextafter(near, np.float32(-np.inf)), near).astype(np.float64)


def _histograms(net: Estimator) -> _Read:
    def tree(nodes: Array, output: int) -> _Tree:
        leaf = nodes["is_leaf"].astype(bool)
        if "is_categorical" in nodes.dtype.names and bool(nodes["is_categorical"][~leaf].any()):
            raise CapabilityError("a tree asks for categories, which are no ranges of numbers")
        left, right = (np.where(leaf, -1, nodes[side].astype(np.int64)) for side in ("left", "right"))
        return _Tree(left, right, nodes["feature_idx"], nodes["num_threshold"], nodes["value"], output)

    stages = net._predictors
    trees = (tree(one.nodes, k if len(stage) > 1 else 1) for stage in stages for k, one in enumerate(stage))
    return _Read(trees, torch.float64)


def _xgboost(net: Estimator) -> _Read:
    """x < t in float32."""
    booster = net
    if type(net).__name__ != "Booster":
        booster = net.get_booster()
        if (best := getattr(net, "best_iteration", None) if net.early_stopping_rounds is not None else None) is not None:
            booster = booster[: best + 1]
        if not np.isnan(net.missing):
            raise CapabilityError(
                f"this {type(net).__name__} takes {net.missing} for a missing value, so it asks more than x < t"
            )
    model = json.loads(booster.save_raw(raw_format="json"))["learner"]
    if "model" not in model["gradient_booster"]:
        raise CapabilityError(
            f"this {type(net).__name__} has no trees of its own: its booster is {model['gradient_booster']['name']}"
        )
    grown = model["gradient_booster"]["model"]
    columns = int(model["learner_model_param"]["num_class"])

    def tree(one: dict[str, Any], output: int) -> _Tree:
        if one["categories"]:
            raise CapabilityError("a tree asks for categories, which are no ranges of numbers")
        conditions = np.array(one["split_conditions"], dtype=np.float32)
        left, right = (np.array(one[side], dtype=np.int64) for side in ("left_children", "right_children"))
        threshold = np.nextafter(conditions, np.float32(-np.inf)).astype(np.float64)
        return _Tree(left, right, np.array(one["split_indices"]), threshold, conditions.astype(np.float64), output)

    trees = (tree(one, k if columns > 1 else 1) for one, k in zip(grown["trees"], grown["tree_info"], strict=True))
    return _Read(trees, torch.float32)


def _lightgbm(net: Estimator) -> _Read:
    """x <= t in float64."""
    booster = net if type(net).__name__ == "Booster" else net.booster_
    columns = booster.num_model_per_iteration()

    def tree(structure: dict[str, Any], output: int) -> _Tree:
        nodes: list[list[float]] = []  # left, right, feature, threshold, value
        waiting = [(structure, [0.0], 0)]
        while waiting:
            node, above, side = waiting.pop()
            above[side] = len(nodes)
            if "split_feature" not in node:
                nodes.append([-1, -1, 0, 0, node["leaf_value"]])
                continue
            if node["decision_type"] != "<=":
                raise CapabilityError("a tree asks for categories, which are no ranges of numbers")
            nodes.append([-1, -1, node["split_feature"], node["threshold"], 0])
            waiting += [(node["left_child"], nodes[-1], 0), (node["right_child"], nodes[-1], 1)]
        left, right, feature, threshold, value = np.array(nodes, dtype=np.float64).T
        return _Tree(left.astype(np.int64), right.astype(np.int64), feature.astype(np.int64), threshold, value, output)

    grown = booster.dump_model()["tree_info"]
    trees = (tree(one["tree_structure"], one["tree_index"] % columns if columns > 1 else 1) for one in grown)
    return _Read(trees, torch.float64)
