"""Bounds of a network's outputs over boxes: intervals, and linear bounds carried backwards through the graph (CROWN)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from saddlepoint.errors import InputError
from saddlepoint.propagation.graph import Graph, Node
from saddlepoint.propagation.relax import Relaxation, relaxation

Method = Literal["ibp", "crown-ibp", "crown", "alpha-crown"]
Slopes = dict[str, Tensor]
"""Lower slopes of nonlinearities by node, (N, R, ...): one for each of R functions that are bounded."""

_STEPS, _RATE, _DECAY = 20, 0.1, 0.98  # of the ascent on slopes
_ROWS = 2**24  # elements of the coefficients that are carried at once


@dataclass(frozen=True)
class Box:
    """Lower and upper ends of a value for N boxes, (N, ...) each."""

    lower: Tensor
    upper: Tensor

    def within(self, other: Box) -> Box:
        """The intersection: both hold."""
        return Box(torch.maximum(self.lower, other.lower), torch.minimum(self.upper, other.upper))


@dataclass
class Bounded:
    """A graph with bounds of every value over N input boxes, as far as they are known."""

    graph: Graph
    boxes: dict[str, Box]
    _zeros: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(graph: Graph, lower: Tensor, upper: Tensor) -> Bounded:
        """Interval bounds of every value, for inputs between lower and upper (N, ...). Errors: `InputError`."""
        if lower.shape != upper.shape or lower.shape[1:] != graph.shape:
            found, wanted = (tuple(lower.shape), tuple(upper.shape)), (lower.shape[0], *graph.shape)
            raise InputError(f"lower and upper must both have shape {wanted}; got {found[0]} and {found[1]}")
        if bool((lower > upper).any()):
            raise InputError(f"lower is above upper in {int((lower > upper).sum())} places")
        bounded = Bounded(graph, {graph.input: Box(lower, upper)})
        for node in graph.nodes:
            bounded.boxes[node.name] = bounded._interval(node)
        return bounded

    def _interval(self, node: Node) -> Box:
        inputs = [self.boxes[name] for name in node.inputs]
        if not node.affine:
            return Box(*_rule(node).ends(inputs[0].lower, inputs[0].upper))
        middles = [(box.lower + box.upper) / 2 for box in inputs]
        radii = [(box.upper - box.lower) / 2 for box in inputs]
        middle, radius = _batched(node.apply)(*middles), _radius(self, node, radii)
        return Box(middle - radius, middle + radius)

    def constant(self, node: Node) -> Tensor:
        """What an affine node gives for zeros, (1, ...): its constant part."""
        if node.name not in self._zeros:
            zeros = [torch.zeros_like(self.boxes[name].lower[:1]) for name in node.inputs]
            self._zeros[node.name] = node.apply(*zeros)
        return self._zeros[node.name]

    def refine(self, steps: int = 0) -> None:
        """Tighten the bounds of what goes into nonlinearities by linear bounds, layer by layer, only where they cross 0.

        steps: of ascent on the lower slopes, for each bound its own; 0 for CROWN's.
        """
        for node in self.graph.nodes:
            if node.affine:
                continue
            (name,) = node.inputs
            self.boxes[name] = self.boxes[name].within(self._tightened(name, steps))
            self.boxes[node.name] = self._interval(node)

    def _tightened(self, name: str, steps: int) -> Box:
        box = self.boxes[name]
        if name == self.graph.input:
            return box
        crossing = (box.lower < 0) & (box.upper > 0)  # all that ReLUs need; other nonlinearities profit everywhere
        users = [node for node in self.graph.nodes if name in node.inputs and not node.affine]
        open_ = (crossing if all(_rule(node).free for node in users) else torch.ones_like(crossing)).flatten(1)
        rows = open_.any(0).nonzero()[:, 0]
        lower, upper = box.lower.flatten(1).clone(), box.upper.flatten(1).clone()
        width = lower.shape[1]
        step = max(1, _ROWS // max(1, len(lower) * max(math.prod(node.shape) for node in self.graph.nodes)))
        for part in torch.split(rows, step):
            start = torch.zeros(len(lower), len(part), width, dtype=lower.dtype, device=lower.device)
            start[:, torch.arange(len(part)), part] = 1
            start = start.view(len(lower), len(part), *box.lower.shape[1:])
            lower[:, part] = self.lowest(name, start, steps)
            upper[:, part] = -self.lowest(name, -start, steps)
        return Box(lower.view_as(box.lower), upper.view_as(box.upper))

    def by_intervals(self, rows: Tensor) -> Tensor:
        """Lower bounds (N, R) of rows (N, R, C) times the outputs, from the intervals before the last affine operators.

        Those are joined with the rows first: a difference of two outputs is narrower than the outputs' intervals say.
        """
        coefficients = {self.graph.output: rows}
        bound = rows.new_zeros(rows.shape[:2])
        for node in reversed(self.graph.nodes):
            a = coefficients.pop(node.name, None)
            if a is None:
                continue
            if not node.affine:
                bound = bound + _least(a, self.boxes[node.name])
                continue
            bound = bound + (a * self.constant(node)[None]).flatten(2).sum(2)
            parts = _pulled(node, a, [self.boxes[one].lower[:1] for one in node.inputs])
            for one, part in zip(node.inputs, parts, strict=True):
                coefficients[one] = coefficients[one] + part if one in coefficients else part
        left = coefficients.get(self.graph.input)
        return bound if left is None else bound + _least(left, self.boxes[self.graph.input])

    def lowest(self, name: str, start: Tensor, steps: int) -> Tensor:
        """Lower bounds (N, R) of R linear functions of the value `name`, with the best lower slopes that `steps` of Adam find.

        Every slope in [0, 1] gives a sound bound, so the best one seen of each function counts (Xu et al. 2021,
        arXiv:2011.13824).
        """
        slopes: Slopes = {}
        best = self.backward(name, start, slopes)
        if not steps or not slopes:
            return best
        with torch.enable_grad():
            free = {key: value.detach().clone().requires_grad_() for key, value in slopes.items()}
            optimizer = torch.optim.Adam(free.values(), lr=_RATE)
            for step in range(steps):
                bound = self.backward(name, start, free)
                best = torch.maximum(best, bound.detach())
                if step + 1 == steps:
                    break
                optimizer.zero_grad()
                torch.autograd.backward(-bound.sum())
                optimizer.step()
                with torch.no_grad():
                    for value in free.values():
                        value.clamp_(0, 1)
                for group in optimizer.param_groups:
                    group["lr"] *= _DECAY
        return best

    def backward(self, name: str, start: Tensor, slopes: Slopes | None = None) -> Tensor:
        """Lower bounds (N, R) of R linear functions, coefficients start (N, R, ...), of the value `name`.

        slopes: of nonlinearities where they are free; an empty one is filled with CROWN's.
        """
        return self.linear(name, start, slopes).lowest(self.boxes[self.graph.input])

    def linear(
        self, name: str, start: Tensor, slopes: Slopes | None = None, multipliers: Mapping[str, Tensor] | None = None
    ) -> Linear:
        """A linear function of the input below each of R linear functions of the value `name`; see `backward`.

        multipliers: by nonlinearity, what is taken off the coefficients (N, R, ...) of its input: those of constraints.
        """
        begin = not slopes
        coefficients: dict[str, Tensor] = {name: start}
        inner: dict[str, Tensor] = {}
        constant = start.new_zeros(start.shape[:2])
        for node in reversed(self.graph.nodes):
            a = coefficients.pop(node.name, None)
            if a is None:
                continue
            if node.affine:
                constant = constant + (a * self.constant(node)[None]).flatten(2).sum(2)
                parts = _pulled(node, a, [self.boxes[one].lower[:1] for one in node.inputs])
            else:
                box = self.boxes[node.inputs[0]]
                inner[node.name] = a
                if slopes is not None and begin and _rule(node).free:
                    slopes[node.name] = _rule(node).lines(box.lower, box.upper)[0][:, None].expand(a.shape)
                moved, offset = _through(node, a, box, None if slopes is None else slopes.get(node.name))
                if multipliers is not None and node.name in multipliers:
                    moved = moved - multipliers[node.name]
                constant, parts = constant + offset, [moved]
            for one, part in zip(node.inputs, parts, strict=True):
                coefficients[one] = coefficients[one] + part if one in coefficients else part
        return Linear(coefficients[self.graph.input], constant, inner)


@dataclass(frozen=True)
class Linear:
    """R linear functions of the input: coefficients (N, R, ...) and constants (N, R).

    inner: the coefficients of each nonlinearity's output on the way.
    """

    coefficients: Tensor
    constant: Tensor
    inner: Mapping[str, Tensor]

    def lowest(self, box: Box) -> Tensor:
        """Their least values over boxes, (N, R)."""
        return self.constant + _least(self.coefficients, box)

    def lowest_at(self, box: Box) -> Tensor:
        """Where they are least: corners of the boxes, (N, R, ...)."""
        return torch.where(self.coefficients > 0, box.lower[:, None], box.upper[:, None])


def bounds(graph: Graph, lower: Tensor, upper: Tensor, specification: Tensor | None = None, method: Method = "crown") -> Tensor:
    """Lower bounds (N, R) of specification (N, R, C) times the outputs, over inputs between lower and upper (N, ...).

    Without a specification those of the outputs themselves. ibp: intervals; crown-ibp: linear bounds backwards, with intervals
    inside; crown: linear bounds everywhere (Zhang et al. 2018, arXiv:1811.00866); alpha-crown: with lower slopes that are
    optimised, layer by layer and for each bound (Xu et al. 2021, arXiv:2011.13824).
    """
    with torch.no_grad():
        bounded = Bounded.of(graph, lower, upper)
        out = bounded.boxes[graph.output]
        classes = out.lower.shape[1]
        rows = torch.eye(classes).to(lower).expand(len(lower), -1, -1) if specification is None else specification.to(lower)
        if method == "ibp":
            return bounded.by_intervals(rows)
        if method in ("crown", "alpha-crown"):
            bounded.refine(_STEPS if method == "alpha-crown" else 0)
        return bounded.lowest(graph.output, rows, _STEPS if method == "alpha-crown" else 0)


def _least(a: Tensor, box: Box) -> Tensor:
    """The least of R linear functions (N, R, ...) over boxes, (N, R)."""
    middle, radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
    return (a * middle[:, None]).flatten(2).sum(2) - (a.abs() * radius[:, None]).flatten(2).sum(2)


# ---- affine operators


def _batched(apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of batches of one as one of batches."""
    return torch.vmap(lambda *values: apply(*(value[None] for value in values))[0])


def _radius(bounded: Bounded, node: Node, radii: list[Tensor]) -> Tensor:
    """How far the output can be from its middle: the sum over inputs of |W| radius."""
    if node.op == "convolution":
        _, weight, _, *settings = node.arguments
        spread: Tensor = torch.ops.aten.convolution(radii[0], weight.abs(), None, *settings)
        return spread
    if node.op in ("addmm", "linear", "mm"):
        matrix: Tensor = node.arguments[2] if node.op == "addmm" else node.arguments[1]
        return radii[0] @ (matrix.abs() if node.op != "linear" else matrix.abs().T)
    zero = bounded.constant(node)
    total: Tensor | None = None
    for place, radius in enumerate(radii):  # other operators scale each element, or add with weights of one sign
        alone = [radius if other == place else torch.zeros_like(one) for other, one in enumerate(radii)]
        moved = (_batched(node.apply)(*alone) - zero).abs()
        total = moved if total is None else total + moved
    assert total is not None
    return total


def _pulled(node: Node, a: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Coefficients (N, R, ...) of the output as such of the inputs: the operator's own vector-Jacobian product."""
    count, rows = a.shape[0], a.shape[1]
    if node.op in ("addmm", "linear", "mm"):
        weight = (
            node.arguments[2].T if node.op == "addmm" else node.arguments[1] if node.op == "linear" else node.arguments[1].T
        )
        return [a @ weight]
    pull = torch.func.vjp(node.apply, *(torch.zeros_like(one) for one in like))[1]
    parts = torch.vmap(pull)(a.reshape(count * rows, 1, *a.shape[2:]))
    return [part.reshape(count, rows, *part.shape[2:]) for part in parts]


# ---- nonlinearities


def _rule(node: Node) -> Relaxation:
    return relaxation(node.op, node.arguments, node.name)


def _through(node: Node, a: Tensor, box: Box, slope: Tensor | None) -> tuple[Tensor, Tensor]:
    """Coefficients (N, R, ...) of the output as such of the input, and what they add to the constant, (N, R).

    slope: of the lower line where it is free: of ReLUs whose box holds 0 inside.
    """
    rule = _rule(node)
    low, low_offset, high, high_offset = (line[:, None] for line in rule.lines(box.lower, box.upper))
    if slope is not None and rule.free:
        low = torch.where(((box.lower < 0) & (box.upper > 0))[:, None], slope, low)
    up, down = a.clamp(min=0), a.clamp(max=0)
    return up * low + down * high, (up * low_offset + down * high_offset).flatten(2).sum(2)
