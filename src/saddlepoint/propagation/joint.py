"""Lower slopes of all layers that ascend the last bounds together."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saddlepoint.propagation.bounds import Bounded, Box, Slopes
from saddlepoint.propagation.nodes import Node

_RATE, _DECAY = 0.1, 0.98
_COPIES = 6  # tensors as large as the coefficients, with slopes and their gradients, that are alive at once


def jointly(bounded: Bounded, rows: Tensor, steps: int) -> Tensor:
    """Lower bounds (N, R) of rows (N, R, C) times the outputs by `Joint`, of as many sets at once as the memory allows."""
    size, before = 0, 0
    for node in bounded.graph.nodes:
        if node.rule is not None and node.rule.free:
            before += node.shape.numel()
            size += 2 * before * int(_open(bounded, node).sum())
    some = max(1, bounded.memory // (_COPIES * rows.element_size() * max(1, size)))
    places = torch.arange(len(rows), device=rows.device)
    return torch.cat([Joint(bounded.take(part)).lowest(rows[part], steps) for part in torch.split(places, some)])


def _open(bounded: Bounded, node: Node) -> Tensor:
    """Which elements of a ReLU's input (F,) can have either sign in any of the sets; none where intervals are exact."""
    (name,) = node.inputs
    ends = bounded.boxes[name]
    return ((ends.lower < 0) & (ends.upper > 0)).flatten(1).any(0) & (not bounded.exact(name))


class Joint:
    """alpha-CROWN, the joint form: the slopes of inner bounds too are those that help the last ones.

        l_i(alpha) = bounds of what goes into layer i, from slopes of their own and the boxes l_1 ... l_(i-1)
        maximise over all alpha in [0, 1] the lower bounds of the rows, over the boxes l_1 ... l_n

    Layer by layer each inner bound is made tight for itself; here a bound that matters little may give way to one that matters.
    Every choice of slopes is sound, so each result counts where it is better, inner ones too. A step costs a pass backwards for
    every inner value that can have either sign, with gradients: for small networks.

    Source: Xu, Zhang, Wang, Wang, Jana, Lin & Hsieh (2021), Fast and complete: enabling complete verification with rapid and
    massively parallel incomplete verifiers, arXiv:2011.13824, section 3.1.
    """

    def __init__(self, bounded: Bounded) -> None:
        self.bounded, self.graph = bounded, bounded.graph
        self.slopes: dict[str, Slopes] = {}
        self.rows: dict[str, Tensor] = {}
        for node in self.graph.nodes:
            if node.rule is None or not node.rule.free:
                continue
            (name,) = node.inputs
            ends, places = bounded.boxes[name].lower, _open(bounded, node).nonzero()[:, 0]
            if len(places):
                one = torch.zeros(len(places), ends[0].numel(), dtype=ends.dtype, device=ends.device)
                one.scatter_(1, places[:, None], 1)
                both = torch.cat([one, -one]).view(1, -1, *ends.shape[1:])
                self.rows[name] = both.expand(len(ends), *both.shape[1:])

    def lowest(self, rows: Tensor, steps: int) -> Tensor:
        """Lower bounds (N, R) of rows (N, R, C) times the outputs."""
        output = self.graph.output
        best = self._bounds(rows, begin=True)
        leaves = [slope for table in self.slopes.values() for slope in table.values()]
        if not leaves:
            return best
        optimizer = torch.optim.Adam(leaves, lr=_RATE)
        for _ in range(steps):
            with torch.enable_grad():
                bound = self._bounds(rows)
                loss = -bound.sum()
            best = torch.maximum(best, bound.detach())
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            with torch.no_grad():
                for slope in leaves:
                    slope.clamp_(0, 1)
            for group in optimizer.param_groups:
                group["lr"] *= _DECAY
        del self.slopes[output]
        return best

    def _bounds(self, rows: Tensor, begin: bool = False) -> Tensor:
        """One pass through all layers with the slopes as they are. begin: with CROWN's, which are kept."""
        now = replace(self.bounded, boxes=dict(self.bounded.boxes), _planes={})
        for node in self.graph.nodes:
            for name in node.inputs if node.rule is not None else ():
                if name in self.rows:
                    now.hold(name, self._box(now, name, begin))
                    self.bounded.hold(name, Box(now.boxes[name].lower.detach(), now.boxes[name].upper.detach()))
            now.hold(node.name, now.interval(node))
        return self._lower(now, self.graph.output, rows, begin)

    def _box(self, now: Bounded, name: str, begin: bool) -> Box:
        ends, rows = now.boxes[name], self.rows[name]
        low, high = self._lower(now, name, rows, begin).chunk(2, 1)
        places = rows[0, : low.shape[1]].flatten(1).argmax(1)
        lower, upper = ends.lower.flatten(1), ends.upper.flatten(1)
        lower = lower.index_copy(1, places, torch.maximum(lower[:, places], low))
        upper = upper.index_copy(1, places, torch.minimum(upper[:, places], -high))
        return Box(lower.view_as(ends.lower), upper.view_as(ends.upper))

    def _lower(self, now: Bounded, name: str, rows: Tensor, begin: bool) -> Tensor:
        if not begin:
            return now.backward(name, rows, self.slopes[name])
        slopes: Slopes = {}
        found = now.backward(name, rows, slopes)
        self.slopes[name] = {key: slope.detach().clone().requires_grad_() for key, slope in slopes.items()}
        return found
