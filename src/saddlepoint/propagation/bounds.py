"""Bounds of all of a network's values over sets of inputs: intervals, and linear bounds carried backwards (CROWN)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from saddlepoint.errors import InputError, SoundnessError
from saddlepoint.propagation.affine import absolute, batched, pulled, spread
from saddlepoint.propagation.nodes import MONOMIAL, SHAPES, Graph, Node
from saddlepoint.propagation.relax import Elementwise, Planes, offset
from saddlepoint.propagation.sets import Ball as Ball
from saddlepoint.propagation.sets import Box as Box
from saddlepoint.propagation.sets import times

Slopes = dict[str, Tensor]
"""Lower slopes of nonlinearities by node, (N, R, ...): one for each of R functions that are bounded."""

MEMORY = 2**30
_RATE, _DECAY, _MOMENTA = 0.3, 0.93, (0.5, 0.9)  # of the ascent on slopes; the usual momenta are slow to turn within 20 steps
_MEETINGS = 3  # points between 0 and the best multiplier of a cut
_COPIES = 8  # tensors as large as the coefficients that are alive at once; with slopes more
_CACHE = 2**19  # elements of coefficients that are carried at once, so that they stay near the processor


@dataclass
class Bounded:
    """A graph with bounds of every value over N input sets, as far as they are known.

    boxes: by value; that of the input may be a `Ball`. memory: bytes that the coefficients may take; functions are bounded in
    as many parts as that needs. outward: take off what rounding can add, see `error`. cut: linear functions of the input,
    (N, 1, ...), that are at most 0 wherever the bounds that are computed from then on shall hold; with outward by more than
    their own rounding. linear_only: by value, what linear bounds alone say of it, before they are cut with intervals: free
    lower slopes go by that, since what they meet is linear bounds. It is the box itself where no linear bounds were made.
    """

    graph: Graph
    boxes: dict[str, Box]
    memory: int = MEMORY
    outward: bool = False
    cut: Linear | None = None
    linear_only: dict[str, Box] = field(default_factory=dict)
    _planes: dict[str, Planes] = field(default_factory=dict)

    @staticmethod
    def of(
        graph: Graph, lower: Tensor | Box, upper: Tensor | None = None, memory: int = MEMORY, *, outward: bool = False
    ) -> Bounded:
        """Interval bounds of every value, for inputs between lower and upper (N, ...), or in a set. Errors: `InputError`."""
        if isinstance(lower, Box):
            inputs = lower
        elif upper is None:
            raise InputError("lower without upper: give both, or a set of inputs")
        else:
            inputs = Box(lower, upper)
        lower, upper = inputs.lower, inputs.upper
        if lower.shape != upper.shape or lower.shape[1:] != graph.shape:
            found, wanted = (tuple(lower.shape), tuple(upper.shape)), (lower.shape[0], *graph.shape)
            raise InputError(f"lower and upper must both have shape {wanted}; got {found[0]} and {found[1]}")
        if bool((lower > upper).any()):
            raise InputError(f"lower is above upper in {int((lower > upper).sum())} places")
        if not bool(lower.isfinite().all() and upper.isfinite().all()):
            raise InputError("lower and upper must be finite")
        bounded = Bounded(graph, {graph.input: inputs}, memory, outward)
        for node in graph.nodes:
            bounded.boxes[node.name] = bounded.interval(node)
        return bounded

    def take(self, index: Tensor) -> Bounded:
        """The bounds of some of the N sets, each as often as it is named."""
        cut = None if self.cut is None else self.cut.rows(index)
        boxes = {name: ends.rows(index) for name, ends in self.boxes.items()}
        linear_only = {name: ends.rows(index) for name, ends in self.linear_only.items()}
        return Bounded(self.graph, boxes, self.memory, self.outward, cut, linear_only)

    def interval(self, node: Node) -> Box:
        """The box of a node's output that the boxes of its inputs give."""
        inputs = [self.boxes[name] for name in node.inputs]
        if node.rule is not None:
            ends = node.rule.ends(*inputs)
            slack = 4 * torch.finfo(ends.lower.dtype).eps if self.outward else 0.0
            return Box(ends.lower - slack * ends.lower.abs(), ends.upper + slack * ends.upper.abs()) if slack else ends
        middle = batched(node, node.apply, *(box.middle for box in inputs))
        radius = spread(node, [box.radius for box in inputs])
        if self.outward and node.op not in SHAPES:
            size = spread(node, [box.lower.abs() + box.upper.abs() for box in inputs])
            radius = radius + self.unit() * (size if node.constant is None else size + node.constant.abs())
        # A linear bound may end a rounding inside the other end of a box that is a point: inverted before this operator.
        inverted = not radius.requires_grad and bool((radius < 0).any())
        if inverted and not any(bool((box.radius < 0).any()) for box in inputs):
            raise SoundnessError(f"intervals of {node.op} (at {node.where}) are inverted; please report the network")
        if radius.requires_grad:  # training stops at losses that aren't finite, and nan_to_num's derivative is slow
            return Box.around(middle, radius)
        lower, upper = middle - radius, middle + radius
        return Box(lower.nan_to_num(-torch.inf, torch.inf, -torch.inf), upper.nan_to_num(torch.inf, torch.inf, -torch.inf))

    def planes(self, node: Node) -> Planes:
        """Those of a nonlinearity over its boxes; kept until they are tightened."""
        if node.name not in self._planes:
            assert node.rule is not None
            boxes = [self.boxes[name] for name in node.inputs]
            boxes += [self.linear_only[name] for name in node.inputs if node.rule.free and name in self.linear_only]
            self._planes[node.name] = node.rule.planes(*boxes)
        return self._planes[node.name]

    def refine(self, steps: int = 0) -> None:
        """Tighten the bounds of what goes into nonlinearities by linear bounds, layer by layer.

        Of what only ReLUs use, only what crosses 0. steps: of ascent on the lower slopes, for each bound its own; 0 for
        CROWN's.
        """
        done = set()
        for node in self.graph.nodes:
            if node.rule is None:
                if any(name in done for name in node.inputs):  # what comes after a tightened value is tighter too
                    self.hold(node.name, self.interval(node))
                    done.add(node.name)
                continue
            for name in node.inputs:
                self.hold(name, self.tightened(name, steps))
            self.hold(node.name, self.interval(node))
            done.add(node.name)

    def hold(self, name: str, box: Box) -> None:
        """That the box holds a value too is known from now on; a `Ball` stays one."""
        if name == self.graph.input:
            return
        self.boxes[name] = self.boxes[name].within(box)
        for node in self.graph.nodes:
            if name in node.inputs:
                self._planes.pop(node.name, None)

    def tightened(self, name: str, steps: int = 0, only: Tensor | None = None) -> Box:
        """The box of a value that goes into nonlinearities, by linear bounds; see `refine`. only: elements (N, ...) bool."""
        box = self.boxes[name]
        if name == self.graph.input or self.exact(name):
            return box
        users = [node for node in self.graph.nodes if name in node.inputs and node.rule is not None]
        if steps and all(node.rule is not None and node.rule.free for node in users):
            box = self.tightened(name, 0)  # what is stable then needs no ascent
        crossing = (box.lower < 0) & (box.upper > 0)  # all that ReLUs need; other nonlinearities profit everywhere
        free = all(node.rule is not None and node.rule.free for node in users)
        open_ = (crossing if free else box.lower < box.upper).flatten(1)
        open_ = open_ if only is None else open_ & only.flatten(1)
        lower, upper = box.lower.flatten(1).clone(), box.upper.flatten(1).clone()
        width, shape = lower.shape[1], box.lower.shape[1:]
        for samples, rows in self._chunks(open_, steps):
            part = self if len(samples) == len(lower) else self.take(samples)
            start = lower.new_zeros(len(samples), rows.shape[1], width).scatter_(2, rows[..., None], 1)
            start = start.view(*rows.shape, *shape)
            found, where = part.ends(name, start, steps), (samples[:, None], rows)
            lower[where], upper[where] = found.lower, found.upper
        self.linear_only[name] = Box(lower.view_as(box.lower), upper.view_as(box.upper))
        return box.within(self.linear_only[name])

    def exact(self, name: str) -> bool:
        """Whether linear bounds can't be better than the intervals.

        So it is where one operator after the input mixes elements, and none branches; and for a function of each element.
        """
        mixed = 0
        table = {node.name: node for node in self.graph.nodes}
        if isinstance(table[name].rule, Elementwise) and len(table[name].inputs) == 1:
            return True
        while name != self.graph.input:
            node = table[name]
            if node.rule is not None or len(node.inputs) > 1:
                return False
            mixed += node.op not in MONOMIAL
            (name,) = node.inputs
        return mixed <= 1 and type(self.boxes[name]) is Box

    def _chunks(self, open_: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Samples (M,) and rows (M, K) of each that are bounded together, within the memory; open_ (N, width).

        Samples with about as many open rows are taken together; those with fewer get some that aren't open, which does no harm.
        """
        counts = open_.sum(1)
        order = open_.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        left = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
        widest = max(math.prod(node.shape) for node in self.graph.nodes)
        element = open_.new_empty((), dtype=self.boxes[self.graph.input].lower.dtype).element_size()
        alive = widest * _COPIES if not steps else 4 * sum(math.prod(node.shape) for node in self.graph.nodes)
        budget = max(1, min(self.memory // (element * alive), _CACHE // widest if open_.device.type == "cpu" else 2**62))
        while len(left):
            most = int(counts[left[0]])
            together = max(1, budget // most)
            samples, left = left[:together].sort().values, left[together:]
            for first in range(0, most, budget):
                yield samples, order[samples, first : min(most, first + budget)]

    def by_intervals(self, rows: Tensor) -> Tensor:
        """Lower bounds (N, R) of rows (N, R, C) times the outputs, from the intervals before the last affine operators.

        Those are joined with the rows first: a difference of two outputs is narrower than the outputs' intervals say.
        """
        terms = self.frontier(self.graph.output, rows)
        bound = terms.constant
        for name, a in terms.coefficients.items():
            bound = bound + self.boxes[name].least(a)
        if self.outward:
            cut = Bounded(self.graph, self.boxes, self.memory, outward=True, _planes=self._constant_planes())
            bound = bound - cut.error(self.graph.output, rows)
        return sound(bound)

    def _constant_planes(self) -> dict[str, Planes]:
        """Planes that are the ends of each nonlinearity, whose rounding is that of intervals."""
        found = {}
        for node in self.graph.nodes:
            if node.rule is not None:
                planes, ends = self.planes(node), self.boxes[node.name]
                flat = tuple(torch.zeros_like(one) for one in planes.low)
                found[node.name] = Planes(flat, ends.lower, flat, ends.upper)
        return found

    def frontier(self, name: str, start: Tensor, *, early: bool = False) -> Terms:
        """R linear functions, coefficients start (N, R, ...), of the value `name`, of nonlinearities' outputs and the input.

        early: and of affine values that nonlinearities among these depend on, whose coefficients aren't complete yet.
        """
        coefficients: dict[str, Tensor] = {name: start}
        left: dict[str, Tensor] = {}
        behind: set[str] = set()
        constant = start.new_zeros(start.shape[:2])
        for node in reversed(self.graph.nodes):
            a = coefficients.pop(node.name, None)
            if a is None:
                continue
            if node.rule is not None or node.name in behind:
                left[node.name] = a
                behind |= self.graph.before(node.name) if early else set()
                continue
            constant = constant if node.constant is None else constant + times(a, node.constant)
            _add(coefficients, node, pulled(node, a))
        return Terms(constant, left | coefficients)

    def lowest(self, name: str, start: Tensor, steps: int) -> Tensor:
        """Lower bounds (N, R) of R linear functions of the value `name`, with the best lower slopes that `steps` of Adam find.

        Every slope in [0, 1] gives a sound bound, so the best one seen of each function counts (Xu et al. 2021,
        arXiv:2011.13824).
        """
        return self._ascended(self._terms(name, start), steps)

    def ends(self, name: str, start: Tensor, steps: int = 0, slopes: Slopes | None = None) -> Box:
        """Lower and upper bounds (N, R) as by `lowest`, or with given slopes as by `backward`, without steps.

        Both begin with the same sweep through the last affine operators.
        """
        terms = self._terms(name, start)
        if slopes is not None:
            return Box(self._backward(terms, slopes), -self._backward(-terms, slopes))
        return Box(self._ascended(terms, steps), -self._ascended(-terms, steps))

    def backward(self, name: str, start: Tensor, slopes: Slopes | None = None) -> Tensor:
        """Lower bounds (N, R) of R linear functions, coefficients start (N, R, ...), of the value `name`.

        slopes: of nonlinearities where they are free; an empty one is filled with CROWN's.
        """
        return self._backward(self._terms(name, start), slopes)

    def _terms(self, name: str, start: Tensor) -> Terms:
        terms = self.frontier(name, start, early=True)
        return replace(terms, error=self.error(name, start)) if self.outward else terms

    def _ascended(self, terms: Terms, steps: int) -> Tensor:
        slopes: Slopes = {}
        best = self._backward(terms, slopes)
        if not steps or not slopes:
            return best
        with torch.enable_grad():
            free = {key: value.detach().clone().requires_grad_() for key, value in slopes.items()}
            optimizer = torch.optim.Adam(free.values(), lr=_RATE, betas=_MOMENTA)
            for step in range(steps):
                bound = self._backward(terms, free)
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

    def _backward(self, terms: Terms, slopes: Slopes | None) -> Tensor:
        line, box = self._linear(terms, slopes), self.boxes[self.graph.input]
        if terms.error is not None:
            line = replace(line, constant=line.constant - terms.error)
        return (line if self.cut is None else line.under(self.cut, box)).lowest(box)

    def unit(self) -> float:
        """(n + 16) u / (1 - ...) for sums of as many terms as any value here can have: the factor of Higham's gamma_n."""
        count = 16 + 2 * sum(node.shape.numel() for node in self.graph.nodes) + self.graph.shape.numel()
        return 2 * count * torch.finfo(self.boxes[self.graph.input].lower.dtype).eps

    def error(self, name: str, start: Tensor, multipliers: Mapping[str, Tensor] | None = None) -> Tensor:
        """How far rounding can have moved what `linear(...).lowest(...)` gives, (N, R), for any lower slopes.

        Each result is a sum of products; its error is at most gamma_n times the same sum of absolute values (Higham 2002,
        "Accuracy and stability of numerical algorithms", sec. 3.1), which is carried backwards here. Small in float64; in
        float32 only for shallow networks.
        """
        sizes: dict[str, Tensor] = {name: start.abs()}
        total = start.new_zeros(start.shape[:2])
        for node in reversed(self.graph.nodes):
            m = sizes.pop(node.name, None)
            if m is None:
                continue
            if node.rule is None:
                total = total if node.constant is None else total + times(m, node.constant.abs())
                parts = [part.abs() for part in pulled(absolute(node), m)]
            else:
                planes = self.planes(node)
                steep = tuple(torch.maximum(low.abs(), high.abs()) if low.is_floating_point() else low
                              for low, high in zip(planes.low, planes.high, strict=True))  # fmt: skip
                steep = tuple(torch.ones_like(one) for one in steep) if node.rule.free else steep
                parts = node.rule.pull(Planes(steep, None, steep, None), m, [one.shape[1:] for one in node.like])
                for one in (planes.low_offset, planes.high_offset):
                    total = total if one is None else total + times(m, one.abs())
                if multipliers is not None and node.name in multipliers:
                    parts[0] = parts[0] + multipliers[node.name].abs()
            _add(sizes, node, parts)
        box = self.boxes[self.graph.input]
        if self.graph.input in sizes:
            total = total + times(sizes[self.graph.input], 2 * torch.maximum(box.lower.abs(), box.upper.abs()))
        return (self.unit() * total).nan_to_num(torch.inf, torch.inf)  # where infinite ends met zeros nothing is known

    def double(self) -> Bounded:
        """The same sets and bounds, for the network in float64, rounding taken off: to check a proof again.

        The bounds of inner values are taken as they are, so make them with `outward`, or in float64 from the start.
        """
        boxes = {name: box.to(torch.float64) for name, box in self.boxes.items()}
        linear_only = {name: box.to(torch.float64) for name, box in self.linear_only.items()}
        return Bounded(self.graph.double, boxes, self.memory, outward=True, linear_only=linear_only)

    def recheck(self, rows: Tensor, slopes: Slopes | None = None, multipliers: Mapping[str, Tensor] | None = None) -> Tensor:
        """Lower bounds (N, R) in float64 of rows (N, R, C) times the outputs, with given slopes, less what rounding can add."""
        wide = self.double()
        given = {key: value.double() for key, value in (slopes or {}).items()}
        forces = None if multipliers is None else {key: value.double() for key, value in multipliers.items()}
        start, output = rows.double(), self.graph.output
        found = wide.linear(output, start, given or None, forces).lowest(wide.boxes[self.graph.input])
        return found - wide.error(output, start, forces)

    def linear(
        self, name: str, start: Tensor, slopes: Slopes | None = None, multipliers: Mapping[str, Tensor] | None = None
    ) -> Linear:
        """A linear function of the input below each of R linear functions of the value `name`; see `backward`.

        multipliers: by nonlinearity, what is taken off the coefficients (N, R, ...) of its input: those of constraints.
        """
        return self._linear(self.frontier(name, start, early=True), slopes, multipliers)

    def _linear(self, terms: Terms, slopes: Slopes | None = None, multipliers: Mapping[str, Tensor] | None = None) -> Linear:
        begin = not slopes
        coefficients, constant = dict(terms.coefficients), terms.constant
        inner: dict[str, Tensor] = {}
        for node in reversed(self.graph.nodes):
            a = coefficients.pop(node.name, None)
            if a is None:
                continue
            if node.rule is None:
                constant = constant if node.constant is None else constant + times(a, node.constant)
                parts = pulled(node, a)
            else:
                planes = self.planes(node)
                inner[node.name] = a
                if slopes is not None and node.rule.free:
                    if begin:
                        slopes[node.name] = planes.low[0][:, None].expand(a.shape)
                    elif node.name in slopes:
                        box = self.boxes[node.inputs[0]]
                        between = ((box.lower < 0) & (box.upper > 0))[:, None]
                        own = slopes[node.name].clamp(min=node.rule.floor) if node.rule.floor else slopes[node.name]
                        low = torch.where(between, own, planes.low[0][:, None])
                        planes = replace(planes, low=(low,))
                parts = node.rule.pull(planes, a, [one.shape[1:] for one in node.like])
                if multipliers is not None and node.name in multipliers:
                    parts[0] = parts[0] - multipliers[node.name]
                constant = constant + offset(planes, a)
            _add(coefficients, node, parts)
        left = coefficients.get(self.graph.input)
        if left is None:  # constant planes all along
            box = self.boxes[self.graph.input]
            left = constant.new_zeros(*constant.shape, *box.lower.shape[1:])
        return Linear(left, constant, inner)


def _add(coefficients: dict[str, Tensor], node: Node, parts: list[Tensor]) -> None:
    for one, part in zip(node.inputs, parts, strict=True):
        coefficients[one] = coefficients[one] + part if one in coefficients else part


def sound(bound: Tensor) -> Tensor:
    """Where infinite ends met zeros nothing is known."""
    return bound.nan_to_num(-torch.inf, torch.inf, -torch.inf)


@dataclass(frozen=True)
class Terms:
    """R linear functions of inner values: a constant (N, R), and coefficients (N, R, ...) by value.

    error: how far rounding can move bounds of them, (N, R), if it counts.
    """

    constant: Tensor
    coefficients: Mapping[str, Tensor]
    error: Tensor | None = None

    def __neg__(self) -> Terms:
        return Terms(-self.constant, {name: -a for name, a in self.coefficients.items()}, self.error)


@dataclass(frozen=True)
class Linear:
    """R linear functions of the input: coefficients (N, R, ...) and constants (N, R).

    inner: the coefficients of each nonlinearity's output on the way.
    """

    coefficients: Tensor
    constant: Tensor
    inner: Mapping[str, Tensor]

    def lowest(self, box: Box) -> Tensor:
        """Their least values over boxes or balls, (N, R)."""
        return sound(self.constant + box.least(self.coefficients))

    def lowest_at(self, box: Box) -> Tensor:
        """Where they are least, (N, R, ...): corners of the boxes, points of the balls."""
        return box.least_at(self.coefficients)

    def rows(self, index: Tensor) -> Linear:
        """Of some of the N sets."""
        return Linear(self.coefficients[index], self.constant[index], {})

    def under(self, cut: Linear, box: Box) -> Linear:
        """What is below them where one more linear function for each set, (N, 1), is at most 0, and least highest.

        For every m >= 0, line + m cut is at most the line there (Lagrange). Its least value over the box is concave in m; each
        point x of the box is a line above it, and the next m is where the two lines meet that enclose the peak.
        """
        weight = self._weights(cut, box)
        wide = weight.view(*weight.shape, *[1] * (self.coefficients.dim() - 2))
        return Linear(self.coefficients + wide * cut.coefficients, self.constant + weight * cut.constant, {})

    @torch.no_grad()
    def _weights(self, cut: Linear, box: Box) -> Tensor:
        """The m of `under`, (N, R)."""
        w, a = self.coefficients.flatten(2), cut.coefficients.flatten(2)

        def at(points: Tensor) -> tuple[Tensor, Tensor]:
            x = points.flatten(2)
            own = torch.einsum("nri,nri->nr", w, x.expand_as(w)) + self.constant
            return own, (torch.matmul(x, a.mT)[..., 0] + cut.constant).expand_as(own)

        left, right = at(box.least_at(self.coefficients)), at(box.least_at(cut.coefficients))  # m = 0, and without end
        best, weight = left[0], torch.zeros_like(left[0])
        for _ in range(_MEETINGS):
            useful = (left[1] > 0) & (right[1] < 0)
            m = torch.where(useful, (right[0] - left[0]) / torch.where(useful, left[1] - right[1], 1), 0).clamp(min=0)
            wide = m.view(*m.shape, *[1] * (self.coefficients.dim() - 2))
            met = at(box.least_at(torch.addcmul(self.coefficients, wide, cut.coefficients)))
            value, rising = met[0] + m * met[1], met[1] > 0
            weight, best = torch.where(value > best, m, weight), torch.maximum(best, value)
            left = (torch.where(rising, met[0], left[0]), torch.where(rising, met[1], left[1]))
            right = (torch.where(rising, right[0], met[0]), torch.where(rising, right[1], met[1]))
        return weight
