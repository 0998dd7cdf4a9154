"""Piecewise linear networks as mixed-integer programmes, which HiGHS solves: an oracle for tiny networks, and exact leaves.

The variables v are the input and the outputs of the nonlinearities, each the largest of affine pieces of what comes before it:

    y = max_j z_j,   z_j = P_j v + c_j      (a ReLU's pieces are 0 and its input, max pooling's those of a window).

Between bounds L_j <= z_j <= U_j, and with a binary a_j for each piece that may be the largest, that is

    y >= z_j,   y <= z_j + (max_{i != j} U_i - L_j) (1 - a_j),   sum_j a_j = 1;

of two pieces whose a_j may lie between 0 and 1, the triangle. Where one piece is the largest for certain, y = z_j without a
binary. Everything is in float64, whatever the network's own dtype, and true up to what HiGHS allows: constraints may be missed
by 1e-6 (1e-7 in linear programmes), and binaries may be as far from 0 or 1.

Source: Tjeng, Xiao & Tedrake 2019, "Evaluating robustness of neural networks with mixed integer programming",
arXiv:1711.07356, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from torch import Tensor
from torch.nn.functional import unfold

from saddlepoint.errors import InputError, ModelError
from saddlepoint.propagation.bounds import Box
from saddlepoint.propagation.graph import Graph, Node

Array = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Status = Literal["optimal", "time", "infeasible"]

_CHUNK = 512  # rows of an operator's matrix at once
_ROUNDING = 1e3  # units in the last place by which bounds that were computed in the network's dtype are widened


@dataclass(frozen=True)
class Affine:
    """matrix (M, V) times the variables, plus constant (M,)."""

    matrix: Any  # scipy.sparse.csr_array
    constant: Array

    def __call__(self, v: Array) -> Array:
        found: Array = self.matrix @ v + self.constant
        return found

    def over(self, lower: Array, upper: Array) -> tuple[Array, Array]:
        """Interval bounds for variables between lower and upper."""
        middle, radius = self((lower + upper) / 2), abs(self.matrix) @ ((upper - lower) / 2)
        return middle - radius, middle + radius


@dataclass(frozen=True)
class Maxima:
    """A nonlinearity: variables from `first` on, each the largest of k pieces, which are rows of `pieces` (units * k).

    source (units, k): which element of the node's input a piece is, -1 where it is none. node: what it is in the graph.
    """

    node: Node
    first: int
    pieces: Affine
    source: Places

    @property
    def columns(self) -> slice:
        """Where its variables are."""
        return slice(self.first, self.first + len(self.source))

    def values(self, v: Array) -> Array:
        """All pieces, (units, k)."""
        return self.pieces(v).reshape(self.source.shape)


@dataclass(frozen=True)
class System:
    """low <= matrix @ v <= high for variables between lower and upper, of which some are whole numbers."""

    matrix: Any  # scipy.sparse.csr_array
    low: Array
    high: Array
    lower: Array
    upper: Array
    whole: Flags

    def extended(self, matrix: Any, low: Array, high: Array, lower: Array, upper: Array) -> System:
        """With more constraints, whose matrix may have more columns: those of further variables between lower and upper."""
        rows, width = self.matrix.shape
        old = sparse.hstack([self.matrix, sparse.csr_array((rows, matrix.shape[1] - width))], format="csr")
        return System(
            sparse.vstack([old, matrix], format="csr"),
            np.concatenate([self.low, low]), np.concatenate([self.high, high]),
            np.concatenate([self.lower, lower]), np.concatenate([self.upper, upper]),
            np.concatenate([self.whole, np.zeros(len(lower), dtype=bool)]),
        )  # fmt: skip

    def minimise(self, objective: Array, seconds: float, gap: float) -> tuple[Status, float, Array | None]:
        """Status, a lower bound of the objective (the first of the variables), and the best variables that were found."""
        cost = np.concatenate([objective, np.zeros(len(self.lower) - len(objective))])
        found = milp(
            cost,
            integrality=self.whole,
            bounds=Bounds(self.lower, self.upper),
            constraints=LinearConstraint(self.matrix, self.low, self.high) if len(self.low) else (),
            options={"time_limit": max(seconds, 1e-3), "mip_rel_gap": gap},
        )
        if found.status == 2:
            return "infeasible", math.inf, None
        bound = found.mip_dual_bound if self.whole.any() else found.fun  # linear programmes have no gap
        known = bound is not None and (found.status == 0 or bool(self.whole.any()))
        return "optimal" if found.status == 0 else "time", float(bound) if known else -math.inf, found.x

    def lowest(self, objective: Array) -> tuple[float, Array | None]:
        """A lower bound of the objective, whole numbers or not, and a minimiser; inf and None where nothing is feasible.

        By weak duality: for multipliers m <= 0 of A v <= b and any n of E v = d,

            c v  >=  m b + n d + min_v (c - m A - n E) v,

        the last over the variables' own bounds, less what rounding can add; so it is a bound whatever the solver's tolerance,
        and nearly the least value for the solver's multipliers. That nothing is feasible is said up to that tolerance.
        """
        cost = np.concatenate([objective, np.zeros(len(self.lower) - len(objective))])
        same = self.low == self.high
        above, below = np.isfinite(self.high) & ~same, np.isfinite(self.low) & ~same
        matrix = sparse.vstack([self.matrix[above], -self.matrix[below]], format="csr")
        limit = np.concatenate([self.high[above], -self.low[below]])
        equal, value = self.matrix[same], self.low[same]
        found = linprog(
            cost,
            A_ub=matrix if len(limit) else None, b_ub=limit if len(limit) else None,
            A_eq=equal if len(value) else None, b_eq=value if len(value) else None,
            bounds=np.stack([self.lower, self.upper], axis=1),
            method="highs",
        )  # fmt: skip
        if found.status == 2:
            return math.inf, None
        solved = found.status == 0
        m = np.minimum(found.ineqlin.marginals, 0) if solved and len(limit) else np.zeros(len(limit))
        n = found.eqlin.marginals if solved and len(value) else np.zeros(len(value))
        left = cost - matrix.T @ m - equal.T @ n
        bound = m @ limit + n @ value + np.where(left > 0, left * self.lower, left * self.upper).sum()
        widest = np.maximum(np.abs(self.lower), np.abs(self.upper))
        carried = np.abs(cost) + abs(matrix.T) @ np.abs(m) + abs(equal.T) @ np.abs(n)
        size = np.abs(m) @ np.abs(limit) + np.abs(n) @ np.abs(value) + carried @ widest
        terms = max(_ROUNDING, 4.0 * (len(cost) + len(m) + len(n)))
        return float(bound - terms * np.finfo(np.float64).eps * size), found.x


@dataclass(frozen=True)
class Least:
    """The least value of a function of a network's outputs over a box.

    value: at x, in float64 (inf where there is none); no point has less than bound, up to the solver's tolerance.
    status: "optimal"; "time", which was up; "infeasible", where the box is empty or what was told of the values contradicts it.
    """

    value: float
    bound: float
    x: Tensor | None
    status: Status


class Programme:
    """The programme of one network, built once and solved for many boxes.

    graph: of affine operators, ReLUs, leaky ReLUs and max pooling. like: an input (1, ...), for dtype and device.

    Errors: `ModelError` for other nonlinearities.

    >>> import torch, saddlepoint as sp
    >>> from saddlepoint.propagation.graph import read
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    >>> for layer, (weight, bias) in zip(net[::2], [([[1.0], [-1.0]], 0.0), ([[1.0, 1.0], [0.0, 0.0]], 1.0)]):
    ...     _ = layer.weight.data.copy_(torch.tensor(weight)), layer.bias.data.fill_(bias)
    >>> x = torch.zeros(1, 1)
    >>> programme = Programme(read(sp.Model(net, bounds=None), x), x)  # its first output is |x| + 1
    >>> programme.minimise(Box(x - 1, x + 2), torch.tensor([-1.0, 0.0])).value
    -3.0
    """

    def __init__(self, graph: Graph, like: Tensor) -> None:
        self.graph, self.like = graph, like[:1]
        self.inputs = math.prod(graph.shape)
        places = {graph.input: 0}
        self.width = self.inputs
        for node in graph.nodes:
            if not node.affine:
                places[node.name] = self.width
                self.width += math.prod(node.shape)
        self.maxima: list[Maxima] = []
        known = {graph.input: self._variables(0, self.inputs)}
        shapes = {graph.input: graph.shape} | {node.name: node.shape for node in graph.nodes}
        for node in graph.nodes:
            values = [known[name] for name in node.inputs]
            if node.affine:
                known[node.name] = self._operator(node, [shapes[name] for name in node.inputs], values)
            else:
                known[node.name] = self._nonlinearity(node, places[node.name], values[0], shapes[node.inputs[0]])
        self.outputs = known[graph.output]
        self._owner = np.concatenate(
            [
                np.zeros(0, dtype=np.int64),
                *(m.first + np.repeat(np.arange(len(m.source)), m.source.shape[1]) for m in self.maxima),
            ]
        )  # the variable that each piece is one of
        every = len(self._owner)
        owned = sparse.csr_array((np.ones(every), (np.arange(every), self._owner)), shape=(every, self.width))
        pieces = sparse.vstack([sparse.csr_array((0, self.width)), *(m.pieces.matrix for m in self.maxima)])
        self._above = sparse.csr_array(owned - pieces)  # y - P v
        self._constant = np.concatenate([np.zeros(0), *(m.pieces.constant for m in self.maxima)])

    # ---- the network

    def _variables(self, first: int, count: int) -> Affine:
        return Affine(sparse.eye_array(count, self.width, k=first, format="csr"), np.zeros(count))

    def _operator(self, node: Node, shapes: list[torch.Size], values: list[Affine]) -> Affine:
        """An affine operator after affine functions: its matrix is its vector-Jacobian product with every unit vector."""
        zeros = [self.like.new_zeros(1, *shape) for shape in shapes]
        size = math.prod(node.shape)
        constant = _numbers(node.apply(*zeros))
        pull = torch.func.vjp(node.apply, *zeros)[1]
        blocks: list[list[Any]] = [[] for _ in zeros]
        for start in range(0, size, _CHUNK):
            count = min(_CHUNK, size - start)
            rows = self.like.new_zeros(count, size)
            rows[torch.arange(count), start + torch.arange(count)] = 1
            for block, part in zip(blocks, torch.vmap(pull)(rows.view(count, 1, *node.shape)), strict=True):
                block.append(sparse.csr_array(_numbers(part).reshape(count, -1)))
        matrices = [sparse.vstack(block, format="csr") for block in blocks]
        total = sum((matrix @ value.matrix for matrix, value in zip(matrices, values, strict=True)), start=0)
        moved = sum((matrix @ value.constant for matrix, value in zip(matrices, values, strict=True)), start=constant)
        return Affine(sparse.csr_array(total), moved)

    def _nonlinearity(self, node: Node, first: int, z: Affine, shape: torch.Size) -> Affine:
        """What it gives, from the variables that it adds."""
        own = self._variables(first, math.prod(node.shape))
        match node.op:
            case "relu" | "leaky_relu":
                units = np.arange(len(z.constant))
                self._add(node, first, z, np.stack([np.full_like(units, -1), units], axis=1), 0.0)
                if node.op == "relu":
                    return own
                slope = node.arguments[1] if len(node.arguments) > 1 else 0.01  # z or s z: s z + (1 - s) relu(z)
                return Affine(slope * z.matrix + (1 - slope) * own.matrix, slope * z.constant)
            case "max_pool2d" | "max_pool2d_with_indices":
                self._add(node, first, z, _windows(node, shape), -math.inf)
                return own
        raise ModelError(f"{node.op} (at {node.name}) is none of what is known here: relu, leaky_relu, max_pool2d")

    def _add(self, node: Node, first: int, z: Affine, source: Places, otherwise: float) -> None:
        flat = source.reshape(-1)
        (rows,) = np.nonzero(flat >= 0)
        chosen = sparse.csr_array((np.ones(len(rows)), (rows, flat[rows])), shape=(len(flat), len(z.constant)))
        constant = np.full(len(flat), otherwise)
        constant[rows] = z.constant[flat[rows]]
        self.maxima.append(Maxima(node, first, Affine(sparse.csr_array(chosen @ z.matrix), constant), source))

    def variables(self, x: Tensor) -> Array:
        """All variables for one input (...), in float64."""
        v = np.zeros(self.width)
        v[: self.inputs] = _numbers(x)
        for m in self.maxima:
            v[m.columns] = m.values(v).max(1)
        return v

    def pattern(self, v: Array) -> dict[str, Places]:
        """The largest piece of every unit, by node."""
        return {m.node.name: m.values(v).argmax(1) for m in self.maxima}

    # ---- the programme

    def system(self, boxes: Mapping[str, Box], only: Mapping[str, Places] | None = None, *, whole: bool = True) -> System:
        """The constraints for inputs in a box, for which boxes of other values by name are bounds already.

        boxes: of one domain, (1, ...) or (...) each. only: by node, the one piece of each unit that is to be the largest, -1
        where any may be. whole: whether choices between pieces are whole numbers; else they are relaxed.
        """
        lower, upper = np.zeros(self.width), np.zeros(self.width)
        lower[: self.inputs], upper[: self.inputs] = (self._of_one(end) for end in _ends(boxes[self.graph.input]))
        if (lower > upper).any():
            raise InputError(
                f"the box of inputs is empty: its lower end is above its upper one in {(lower > upper).sum()} places"
            )
        alive, allowed, slack, count = [], [], [], []
        for m in self.maxima:
            low, high = (ends.reshape(m.source.shape) for ends in m.pieces.over(lower, upper))
            if m.node.inputs[0] in boxes:
                _tighten(low, high, m.source, boxes[m.node.inputs[0]])
            lower[m.columns], upper[m.columns] = low.max(1), np.maximum(low.max(1), high.max(1))
            live = high > low.max(1, keepdims=True)
            live[np.arange(len(live)), low.argmax(1)] = True
            may = live.copy()
            if only is not None and m.node.name in only:
                told = only[m.node.name]
                may = np.where(told[:, None] >= 0, told[:, None] == np.arange(live.shape[1]), may)
            alive.append((live | may).reshape(-1))
            allowed.append(may.reshape(-1))
            slack.append((_others(np.where(may, high, -math.inf)) - low).reshape(-1))
            count.append(np.broadcast_to(may.sum(1, keepdims=True), may.shape).reshape(-1))
        if not self.maxima:
            empty = np.zeros(0)
            return System(sparse.csr_array((0, self.width)), empty, empty, lower, upper, np.zeros(self.width, dtype=bool))
        live, may, room, choices = (np.concatenate(parts) for parts in (alive, allowed, slack, count))
        sure, open_ = live & may & (choices == 1), np.nonzero(may & (choices > 1))[0]
        known = System(
            self._above[live], self._constant[live], np.where(sure, self._constant, math.inf)[live],
            lower, upper, np.zeros(self.width, dtype=bool),
        )  # fmt: skip
        if not len(open_):
            return known
        each = np.arange(len(open_))
        _, unit = np.unique(self._owner[open_], return_inverse=True)
        sums = sparse.csr_array((np.ones(len(open_)), (unit, each)), shape=(int(unit.max()) + 1, len(open_)))
        below = sparse.hstack([self._above[open_], sparse.diags_array(room[open_])])
        one = sparse.hstack([sparse.csr_array((sums.shape[0], self.width)), sums])
        system = known.extended(
            sparse.vstack([below, one], format="csr"),
            np.concatenate([np.full(len(open_), -math.inf), np.ones(sums.shape[0])]),
            np.concatenate([self._constant[open_] + room[open_], np.ones(sums.shape[0])]),
            np.zeros(len(open_)), np.ones(len(open_)),
        )  # fmt: skip
        system.whole[self.width :] = whole
        return system

    def _of_one(self, values: Tensor) -> Array:
        if values.numel() != self.inputs:
            wanted = tuple(self.graph.shape)
            raise InputError(f"boxes are of one input of shape {wanted} at a time; got a tensor of shape {tuple(values.shape)}")
        return _numbers(values)

    def objective(self, row: Tensor) -> tuple[Array, float]:
        """row (C,) times the outputs, as coefficients of the variables and a constant."""
        weights = _numbers(row)
        if len(weights) != len(self.outputs.constant):
            raise InputError(f"row must have one number for each of {len(self.outputs.constant)} outputs; got {len(weights)}")
        return self.outputs.matrix.T @ weights, float(self.outputs.constant @ weights)

    def minimise(
        self, box: Box, row: Tensor, boxes: Mapping[str, Box] | None = None, *, seconds: float = 60.0, gap: float = 1e-6
    ) -> Least:
        """The least value of row (C,) times the outputs, over inputs in a box (...).

        boxes: bounds of other values that are known, such as `Bounded.boxes`, which save binaries. seconds: at most so many.
        gap: relative, between value and bound, at which it is enough. Errors: `InputError`.
        """
        if seconds <= 0 or gap < 0:
            raise InputError(f"seconds must be above 0 and gap at least 0; got {seconds} and {gap}")
        cost, constant = self.objective(row)
        status, bound, v = self.system({**(boxes or {}), self.graph.input: box}).minimise(cost, seconds, gap)
        if v is None:
            return Least(math.inf, bound + constant, None, status)
        x = self.point(v, box)
        return Least(float(cost @ self.variables(x)) + constant, bound + constant, x, status)

    def leaf(
        self, boxes: Mapping[str, Box], signs: Mapping[str, Tensor], rows: Tensor, constants: Tensor | float = 0.0
    ) -> tuple[float, Tensor | None]:
        """The least of the largest of rows (K, C) times the outputs plus constants (K,), in one domain, and a minimiser.

        rows may be one row (C,). boxes: of the domain, by name, at least the input's. signs: of what goes into ReLUs, by node,
        +1, -1 or 0 where it is open, which is relaxed by the triangle; so the value is exact where no crossing ReLU is open,
        and a lower bound always (by weak duality, whatever the solver's tolerance). inf and None where no input has these
        signs, up to 1e-7.
        """
        only = {name: (_numbers(sign) > 0) - (_numbers(sign) == 0).astype(np.int64) for name, sign in signs.items()}
        found = [self.objective(row) for row in rows.view(-1, rows.shape[-1])]
        offsets = np.array([offset for _, offset in found]) + _numbers(torch.as_tensor(constants))
        system = self.system(boxes, only, whole=False)
        if len(found) == 1:
            value, v = system.lowest(found[0][0])
            return value + float(offsets[0]), None if v is None else self.point(v, boxes[self.graph.input])
        width = len(system.lower)  # the largest is one more variable, t >= c v for all rows c
        costs = sparse.csr_array(np.stack([np.pad(cost, (0, width - len(cost))) for cost, _ in found]))
        low, high = (float(end.max()) for end in Affine(costs, offsets).over(system.lower, system.upper))
        above = sparse.hstack([-costs, np.ones((len(found), 1))], format="csr")
        system = system.extended(above, offsets, np.full(len(found), math.inf), np.array([low]), np.array([high]))
        value, v = system.lowest(np.eye(1, width + 1, width)[0])
        return value, None if v is None else self.point(v, boxes[self.graph.input])

    def point(self, v: Array, box: Box) -> Tensor:
        """The input (...) among the variables, in the network's dtype, and inside of the box."""
        lower, upper = (end.reshape(self.graph.shape) for end in _ends(box))
        x = torch.from_numpy(v[: self.inputs].copy()).to(self.like).view(self.graph.shape)
        return torch.minimum(torch.maximum(x, lower.to(x)), upper.to(x))


def _numbers(values: Tensor) -> Array:
    found: Array = values.detach().cpu().double().reshape(-1).numpy()
    return found


def _ends(box: Box) -> tuple[Tensor, Tensor]:
    return box.lower, box.upper


def _windows(node: Node, shape: torch.Size) -> Places:
    """Which elements of its input each output of a max pooling is the largest of, (units, k); -1 for padding."""
    settings = [*node.arguments[1:], *([], 0, 1, False)[max(0, len(node.arguments) - 2) :]]
    kernel, stride, padding, dilation, ceil = settings
    if ceil:
        raise ModelError(f"max pooling (at {node.name}) with ceil_mode isn't known here")
    numbered = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).view(1, *shape)
    windows = unfold(numbered, kernel, dilation, padding, stride or kernel).long() - 1  # (1, C * k, L)
    found: Places = windows.view(shape[0], -1, windows.shape[2]).transpose(1, 2).reshape(math.prod(node.shape), -1).numpy()
    return found


def _tighten(low: Array, high: Array, source: Places, box: Box) -> None:
    """Cut the pieces' bounds, in place, with bounds that were computed in the network's dtype."""
    lower, upper = (_numbers(end) for end in _ends(box))
    scale = 1 + max(np.abs(lower).max(initial=0), np.abs(upper).max(initial=0))
    error = _ROUNDING * torch.finfo(box.lower.dtype).eps * scale
    known = source >= 0
    low[known] = np.maximum(low[known], lower[source[known]] - error)
    high[known] = np.minimum(high[known], upper[source[known]] + error)


def _others(high: Array) -> Array:
    """The largest in each row (units, k) but for the element itself."""
    order = np.argsort(high, axis=1)
    first, second = order[:, -1:], order[:, -2:-1]
    best, next_ = np.take_along_axis(high, first, 1), np.take_along_axis(high, second, 1)
    found: Array = np.where(np.arange(high.shape[1]) == first, next_, best)
    return found
