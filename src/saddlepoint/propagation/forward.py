"""Bounds that are carried from the inputs on: linear functions of the input below and above each value, and zonotopes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from saddlepoint.errors import InputError
from saddlepoint.propagation.affine import batched, linear_part, spread
from saddlepoint.propagation.nodes import Node
from saddlepoint.propagation.sets import Box, times

if TYPE_CHECKING:
    from saddlepoint.propagation.bounds import Bounded


@dataclass(frozen=True)
class _Lines:
    """Terms (N, I, ...) and offsets (N, ...) of the linear functions of I inputs below and above each element of a value."""

    low: Tensor
    low_offset: Tensor
    high: Tensor
    high_offset: Tensor

    def box(self, inputs: Box) -> Box:
        """Their extremes over the inputs."""
        return Box(self.low_offset + _least(inputs, self.low), self.high_offset - _least(inputs, -self.high))


def _least(inputs: Box, terms: Tensor) -> Tensor:
    """The least of terms (N, I, ...) times the inputs, (N, ...)."""
    flat = terms.flatten(2).transpose(1, 2)
    return inputs.least(flat.reshape(*flat.shape[:2], *inputs.lower.shape[1:])).view(len(terms), *terms.shape[2:])


def forwards(bounded: Bounded, rows: Tensor) -> Tensor:
    """Lower bounds (N, R) of rows (N, R, C) times the outputs by linear bounds from the inputs on (arXiv:2002.12920, sec. 3.1).

    Errors: `InputError` where the terms don't fit into the memory.
    """
    inputs = bounded.boxes[bounded.graph.input]
    count = inputs.lower[0].numel()
    _afford(bounded, count)
    eye = torch.diag_embed(torch.ones_like(inputs.lower).flatten(1)).view(len(inputs.lower), count, *inputs.lower.shape[1:])
    zero = torch.zeros_like(inputs.lower)
    known = {bounded.graph.input: _Lines(eye, zero, eye, zero)}
    boxes = dict(bounded.boxes)
    for node in bounded.graph.nodes:
        given = [known[name] for name in node.inputs]
        if node.rule is None:
            known[node.name] = _affine_lines(node, given)
        else:
            for name in node.inputs:
                boxes[name] = boxes[name].within(known[name].box(inputs)) if name != bounded.graph.input else inputs
            planes = node.rule.planes(*(boxes[name] for name in node.inputs))
            low, high = node.rule.push(planes, [one.low for one in given], [one.high for one in given])
            below, above = node.rule.push(
                planes, [one.low_offset[:, None] for one in given], [one.high_offset[:, None] for one in given]
            )
            below, above = (end if more is None else end + more
                            for end, more in ((below[:, 0], planes.low_offset), (above[:, 0], planes.high_offset)))  # fmt: skip
            known[node.name] = _Lines(low, below, high, above)
    last, total = bounded.frontier(bounded.graph.output, rows), None
    bound = last.constant
    for name, a in last.coefficients.items():
        lines, up, down = known[name], a.clamp(min=0).flatten(2), a.clamp(max=0).flatten(2)
        terms = up @ lines.low.flatten(2).transpose(1, 2) + down @ lines.high.flatten(2).transpose(1, 2)
        total = terms if total is None else total + terms
        bound = bound + times(up, lines.low_offset) + times(down, lines.high_offset)
    assert total is not None
    found = bound + inputs.least(total.view(*total.shape[:2], *inputs.lower.shape[1:]))
    return found.nan_to_num(-torch.inf, torch.inf, -torch.inf)


def size(bounded: Bounded, count: int) -> int:
    """Bytes that terms of `count` inputs or errors take."""
    inputs = bounded.boxes[bounded.graph.input].lower
    return 4 * count * sum(node.shape.numel() for node in bounded.graph.nodes) * len(inputs) * inputs.element_size()


def _afford(bounded: Bounded, count: int) -> None:
    if (needed := size(bounded, count)) > bounded.memory:
        raise InputError(
            f"forward bounds of {count} inputs take {needed} bytes, memory allows {bounded.memory}: give more, "
            'fewer inputs at once, or method="crown"'
        )


def _affine_lines(node: Node, given: Sequence[_Lines]) -> _Lines:
    middle = linear_part(node, [_flat((one.low + one.high) / 2) for one in given])
    radius = spread(node, [_flat((one.high - one.low) / 2) for one in given])
    at = batched(node, node.apply, *((one.low_offset + one.high_offset) / 2 for one in given))
    around = spread(node, [(one.high_offset - one.low_offset) / 2 for one in given])
    low, high = ((end).view(*given[0].low.shape[:2], *node.shape) for end in (middle - radius, middle + radius))
    return _Lines(low, at - around, high, at + around)


def _flat(terms: Tensor) -> Tensor:
    return terms.flatten(0, 1)


# ---- zonotopes


@dataclass(frozen=True)
class _Zonotope:
    """centre (N, ...) + sum_g e_g generators (N, G, ...), e in [-1, 1]."""

    centre: Tensor
    generators: Tensor

    def box(self) -> Box:
        """Its ends."""
        radius = self.generators.abs().sum(1)
        return Box(self.centre - radius, self.centre + radius)


def zonotopes(bounded: Bounded, rows: Tensor) -> Tensor:
    """Lower bounds (N, R) of rows (N, R, C) times the outputs by zonotopes (Singh et al. 2018), within the intervals.

    A nonlinearity between two parallel planes is their middle and an error term of its own. Memory grows with their number.
    Errors: `InputError` where the terms don't fit into the memory.
    """
    inputs = bounded.boxes[bounded.graph.input]
    middle, radius = (inputs.lower + inputs.upper) / 2, (inputs.upper - inputs.lower) / 2
    count = middle[0].numel()
    eye = torch.diag_embed(radius.flatten(1)).view(len(middle), count, *middle.shape[1:])
    known = {bounded.graph.input: _Zonotope(middle, eye)}
    boxes = dict(bounded.boxes)
    for node in bounded.graph.nodes:
        _afford(bounded, count)
        given = _padded([known[name] for name in node.inputs])
        if node.rule is None:
            moved = linear_part(node, [_flat(one.generators) for one in given])
            centre = batched(node, node.apply, *(one.centre for one in given))
            known[node.name] = _Zonotope(centre, moved.view(*given[0].generators.shape[:2], *node.shape))
            continue
        for name, one in zip(node.inputs, given, strict=True):
            boxes[name] = boxes[name].within(one.box())
        planes = node.rule.parallel(*(boxes[name] for name in node.inputs))
        terms = [one.generators for one in given]
        moved = node.rule.push(planes, terms, terms)[0]
        centres = [one.centre[:, None] for one in given]
        centre = node.rule.push(planes, centres, centres)[0][:, 0]
        low, high = (torch.zeros_like(centre) if end is None else end for end in (planes.low_offset, planes.high_offset))
        if not bool(low.isfinite().all() and high.isfinite().all()):
            return bounded.by_intervals(rows)
        gap, fresh = (high - low).flatten(1) / 2, count - moved.shape[1]
        moved = functional.pad(moved.flatten(2), (0, 0, 0, fresh))  # terms that came up elsewhere
        active = (gap > 0).any(0).nonzero()[:, 0]
        new = torch.zeros(len(gap), len(active), gap.shape[1], dtype=gap.dtype, device=gap.device)
        new[:, torch.arange(len(active), device=gap.device), active] = gap[:, active]
        count += len(active)
        generators = torch.cat([moved, new], 1).view(len(gap), count, *node.shape)
        known[node.name] = _Zonotope(centre + (low + high) / 2, generators)
    last = bounded.frontier(bounded.graph.output, rows)
    return last.constant + _combined(last.coefficients, known)


def _padded(given: Sequence[_Zonotope]) -> list[_Zonotope]:
    """With as many terms: those that a value hasn't are 0."""
    most = max(one.generators.shape[1] for one in given)
    return [
        one if one.generators.shape[1] == most else
        _Zonotope(one.centre, functional.pad(one.generators.flatten(2), (0, 0, 0, most - one.generators.shape[1]))
                  .view(len(one.centre), most, *one.centre.shape[1:]))
        for one in given
    ]  # fmt: skip


def _combined(left: Mapping[str, Tensor], known: Mapping[str, _Zonotope]) -> Tensor:
    names = list(left)
    values = _padded([known[name] for name in names])
    pairs = [(left[name], value) for name, value in zip(names, values, strict=True)]
    centre = torch.stack([times(a, value.centre) for a, value in pairs]).sum(0)
    terms = torch.stack([a.flatten(2) @ value.generators.flatten(2).transpose(1, 2) for a, value in pairs]).sum(0)
    return centre - terms.abs().sum(2)
