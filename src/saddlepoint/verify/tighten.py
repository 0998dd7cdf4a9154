"""Tighter bounds of what goes into ReLUs, by a complete search for each of them that stays small."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from saddlepoint.propagation.bounds import Bounded, Box
from saddlepoint.propagation.nodes import Node
from saddlepoint.verify.cases import Cases
from saddlepoint.verify.search import Search, branching

_STEPS = 20


def tighten(root: Bounded, most: int, *, deadline: float, clock: Callable[[], float] = time.perf_counter) -> None:
    """Bound, layer by layer, each ReLU's input that can have either sign by about `most` parts of its own search.

    Everything behind profits: where a layer is narrow, as towards the end of deep networks, most of what linear bounds lose
    is lost on the way to it. Mixed-integer programmes do the same in other verifiers (Tjeng et al. 2019, arXiv:1711.07356);
    here each is branch and bound over the layers before, and any stage of it is a sound bound.
    The layers share the time evenly.
    """
    graph = root.graph
    relus = branching(graph)
    deep = [node for node in relus if any(one.name in graph.before(node.inputs[0]) for one in relus)]
    left = len(deep)
    for node in graph.nodes:
        if node in deep:
            (name,) = node.inputs
            with torch.no_grad():
                root.hold(name, root.tightened(name, _STEPS if clock() < deadline else 0))
            until = clock() + (deadline - clock()) / left
            root.hold(name, _searched(root, node, most, min(until, deadline), clock))
            left -= 1
        root.hold(node.name, root.interval(node))


def _searched(root: Bounded, node: Node, most: int, deadline: float, clock: Callable[[], float]) -> Box:
    """The box of the ReLU's input after a search for each of its ends."""
    (name,) = node.inputs
    box = root.boxes[name]
    lower, upper = box.lower.flatten(1).clone(), box.upper.flatten(1).clone()
    which, place = ((lower < 0) & (upper > 0)).nonzero(as_tuple=True)
    if not len(which) or clock() >= deadline:
        return box
    row = lower.new_zeros(len(which), lower.shape[1]).scatter_(1, place[:, None], 1)
    rows = torch.cat([row, -row])[:, None].view(2 * len(which), 1, *box.lower.shape[1:])
    cases = Cases(root.boxes[root.graph.input], which.repeat(2), rows, lower.new_zeros(len(rows), 1))
    search = Search(root, cases, _nothing, deadline=deadline, clock=clock, name=name, fair=True)
    search.run(most * len(rows))
    low, high = search.bounds.view(2, -1)
    lower[which, place] = torch.maximum(lower[which, place], low)
    upper[which, place] = torch.minimum(upper[which, place], -high)
    return Box(lower.view_as(box.lower), upper.view_as(box.upper))


def _nothing(points: Tensor, case: Tensor) -> None:
    """There is no counterexample to look for."""
