"""Complete search for networks of few inputs: boxes are halved until each one is proved, many at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saddlepoint.propagation.bounds import Bounded, Box, Linear
from saddlepoint.propagation.nodes import Graph, Node
from saddlepoint.verify.cases import Cases
from saddlepoint.verify.search import Found, Verdict

_BATCH = 2048  # boxes that are halved at once; up to twice as many where small batches are joined
_MOST = 2**31  # bytes that the bounds of open boxes may take


@dataclass(frozen=True)
class _Open:
    """D boxes that aren't proved.

    case: whose they are. bound: what is proved of each. place: the input, by its flat position, along which each is to be
    halved; -1 for not at all. inner: bounds of what goes into nonlinearities, by name, which hold in all parts of a box too.
    """

    boxes: Box
    case: Tensor
    bound: Tensor
    place: Tensor
    inner: dict[str, Box]

    def __len__(self) -> int:
        return len(self.case)

    def take(self, index: Tensor) -> _Open:
        """Some of them."""
        inner = {name: box.rows(index) for name, box in self.inner.items()}
        return _Open(self.boxes.rows(index), self.case[index], self.bound[index], self.place[index], inner)

    def halves(self) -> _Open | None:
        """Both halves of each box, all first ones first; None if one can't be halved in this dtype."""
        lower, upper = self.boxes.lower.flatten(1), self.boxes.upper.flatten(1)
        split = (self.place >= 0).nonzero()[:, 0]
        at = self.place[split]
        first, second = lower[split, at], upper[split, at]
        middle = first + (second - first) / 2
        if bool(((middle <= first) | (middle >= second)).any()):
            return None
        ends, starts = upper.index_put((split, at), middle), lower[split]
        starts[torch.arange(len(split), device=at.device), at] = middle
        both = self.take(torch.cat([torch.arange(len(self), device=at.device), split]))
        shape = self.boxes.lower.shape[1:]
        boxes = Box(torch.cat([lower, starts]).view(-1, *shape), torch.cat([ends, upper[split]]).view(-1, *shape))
        return replace(both, boxes=boxes)


def _joined(parts: Sequence[_Open]) -> _Open:
    def boxes(ends: Sequence[Box]) -> Box:
        return Box(torch.cat([end.lower for end in ends]), torch.cat([end.upper for end in ends]))

    if len(parts) == 1:
        return parts[0]
    case, bound, place = (torch.cat([getattr(one, name) for one in parts]) for name in ("case", "bound", "place"))
    inner = {name: boxes([one.inner[name] for one in parts]) for name in parts[0].inner}
    return _Open(boxes([one.boxes for one in parts]), case, bound, place, inner)


class InputSearch:
    """Branch and bound on the inputs.

    Each box is bounded by CROWN, within the inner bounds of the box that it is a part of, and cut to where no linear bound
    proves it (`clipped`). What is left is halved along the input that the looseness of the bound is due to most, see `_place`.
    The newest boxes come first, so that few are open at once, and of those the worst. The minimiser of each bound and the
    middle of each box are tried as counterexamples. Any nonlinearity will do. check, deadline, clock, tolerance: as in
    `Search`. outward: take off what rounding can add.
    """

    def __init__(
        self, graph: Graph, cases: Cases, check: Callable[[Tensor, Tensor], Tensor | None], *, deadline: float,
        clock: Callable[[], float] = time.perf_counter, tolerance: float = 0.0, outward: bool = False,
    ) -> None:  # fmt: skip
        self.graph, self.cases, self.check, self.outward = graph, cases, check, outward
        self.deadline, self.clock, self.tolerance = deadline, clock, tolerance
        self.count = 0
        self.counterexample: Tensor | None = None
        self.curved = [node for node in graph.nodes if node.rule is not None]

    @torch.no_grad()
    def run(self) -> Found:
        """Until every box is proved, a counterexample is found, or time is up."""
        started, reason = self.clock(), ""
        whole = self._whole()
        self.stack = [whole.take(part) for part in torch.split(whole.case, _BATCH)]
        most = _MOST // max(1, sum(2 * box.lower[0].numel() * box.lower.element_size() for box in whole.inner.values()))
        while self.stack:
            number = sum(map(len, self.stack))
            if self.clock() >= self.deadline:
                reason = f"time is up; {number} boxes of {self.count} are open"
                break
            if number > most:
                reason = f"more than {most} boxes are open"
                break
            chosen = [self.stack.pop()]
            while self.stack and sum(map(len, chosen)) < _BATCH:
                chosen.append(self.stack.pop())
            halves = _joined(chosen).halves()
            if halves is None:
                self.stack += chosen
                reason = "a box can't be halved any further in this dtype, and its bound is not above 0"
                break
            left = self._bounded(halves)
            if self.counterexample is not None:
                self.stack += chosen  # their bounds still hold
                break
            worst_last = left.bound.argsort(descending=True, stable=True)
            self.stack += [left.take(part) for part in torch.split(worst_last, _BATCH) if len(part)]
        verdict: Verdict = "falsified" if self.counterexample is not None else "unknown" if self.stack else "robust"
        least = min((float(part.bound.min()) for part in self.stack), default=self.tolerance)
        return Found(verdict, least, self.counterexample, self.count, self.clock() - started, reason)

    def _whole(self) -> _Open:
        """The sets themselves."""
        case = torch.arange(len(self.cases), device=self.cases.rows.device)
        unknown = self.cases.constants.new_full((len(case),), -torch.inf)
        bounded = Bounded.of(self.graph, self.cases.inputs, outward=self.outward)
        inner = {name: box.rows(self.cases.of) for name, box in self._inner(bounded).items()}
        return _Open(self.cases.sets, case, unknown, torch.full_like(case, -1), inner)

    def _inner(self, bounded: Bounded) -> dict[str, Box]:
        names = dict.fromkeys(name for node in self.curved for name in node.inputs if name != self.graph.input)
        return {name: bounded.boxes[name] for name in names}

    def _bounded(self, part: _Open) -> _Open:
        """Those that stay open, with what is known of them then."""
        self.count += len(part)
        part, _, _ = self._cut(part, self._within(part))  # many need no tighter inner bounds
        if not len(part):
            return part
        bounded = self._within(part)
        bounded.refine()
        whole, rows = part.boxes, self.cases.rows[part.case]
        line = bounded.linear(self.graph.output, rows)
        points = torch.cat([line.lowest_at(whole).flatten(0, 1), (whole.lower + whole.upper) / 2])
        self.counterexample = self.check(points, torch.cat([part.case.repeat_interleave(rows.shape[1]), part.case]))
        part, line, kept = self._cut(replace(part, inner=self._inner(bounded)), bounded, line)
        if self.counterexample is not None or not len(part):
            return part
        gaps = {node.name: _gap(node, bounded)[kept] for node in self.curved}
        return replace(part, place=self._place(part.boxes, line, gaps))

    def _within(self, part: _Open) -> Bounded:
        """Intervals, and the inner bounds that are known."""
        bounded = Bounded.of(self.graph, part.boxes, outward=self.outward)
        bounded.boxes.update({name: bounded.boxes[name].within(box) for name, box in part.inner.items()})
        return bounded

    def _cut(self, part: _Open, bounded: Bounded, line: Linear | None = None) -> tuple[_Open, Linear, Tensor]:
        """The boxes that linear bounds don't prove, cut to where they don't; those bounds, and which boxes it are."""
        rows, constants = self.cases.rows[part.case], self.cases.constants[part.case]
        line = bounded.linear(self.graph.output, rows) if line is None else line
        error = bounded.error(self.graph.output, rows) if self.outward else torch.zeros_like(constants)
        boxes, bound = part.boxes, part.bound
        for row in range(rows.shape[1]):  # in turn: each makes the box smaller for the next
            a = line.coefficients[:, row]
            low = Linear(a[:, None], line.constant[:, row, None], {}).lowest(boxes)[:, 0] - error[:, row] + constants[:, row]
            bound = torch.maximum(bound, low)
            boxes = clipped(boxes, a, (self.tolerance - low).clamp(min=0))
        kept = (~(bound > self.tolerance)).nonzero()[:, 0]  # NaN proves nothing
        line = Linear(line.coefficients[kept], line.constant[kept], {name: a[kept] for name, a in line.inner.items()})
        return replace(part, boxes=boxes, bound=bound).take(kept), line, kept

    def _place(self, boxes: Box, line: Linear, gaps: Mapping[str, Tensor]) -> Tensor:
        """The input (D,) that what the bounds lose is due to most.

        At each nonlinearity they lose |a| times the distance of the two planes. That is due to the inputs in proportion to how
        far the value moves between the middles of opposite faces of the box. How far a linear bound itself moves doesn't count:
        it is what boxes are cut by. Where nothing is lost: the widest input.
        """
        lower, width = boxes.lower.flatten(1), (boxes.upper - boxes.lower).flatten(1)
        middle = lower + width / 2
        pull = torch.zeros_like(width)
        moves = self._moves(boxes, [_source(node) for node in self.curved])
        for node in self.curved:
            if node.name in line.inner:
                loss = (line.inner[node.name].abs().sum(1) * gaps[node.name]).flatten(1)
                move = moves[_source(node)]
                share = move / move.sum(1, keepdim=True).clamp(min=torch.finfo(move.dtype).tiny)
                pull = pull + torch.einsum("df,dnf->dn", loss, share)
        pull, tiny = pull.nan_to_num(0.0), torch.finfo(width.dtype).tiny
        pull, width = (one / one.amax(1, keepdim=True).clamp(min=tiny) for one in (pull, width))
        return torch.where((middle > lower) & (middle < boxes.upper.flatten(1)), pull + 1e-6 * width, -1).argmax(1)

    def _moves(self, boxes: Box, names: Sequence[str]) -> dict[str, Tensor]:
        """How far values move, (D, I, F), when each of I inputs goes through the box and the others stay in the middle."""
        lower, upper = boxes.lower.flatten(1), boxes.upper.flatten(1)
        middle, count = (lower + upper) / 2, lower.shape[1]

        def values(one: Tensor) -> dict[str, Tensor]:
            known = self.graph.values(one.view(1, *self.graph.shape))
            return {name: known[name].flatten() for name in names}

        found = []
        for place in range(count):
            first, second = (middle.clone() for _ in range(2))
            first[:, place], second[:, place] = lower[:, place], upper[:, place]
            low, high = torch.vmap(values)(first), torch.vmap(values)(second)
            found.append({name: (high[name] - low[name]).abs() for name in names})
        return {name: torch.stack([one[name] for one in found], 1) for name in names}


def _source(node: Node) -> str:
    """The value whose moves count: the input of a function of each element, else the output."""
    return node.inputs[0] if len(node.inputs) == 1 and node.like[0].shape[1:] == node.shape else node.name


def _gap(node: Node, bounded: Bounded) -> Tensor:
    """How far a nonlinearity's planes are apart in the middle of its box, (D, ...)."""
    assert node.rule is not None
    planes = bounded.planes(node)
    middles = [((bounded.boxes[name].lower + bounded.boxes[name].upper) / 2)[:, None] for name in node.inputs]
    low, high = (side[:, 0] for side in node.rule.push(planes, middles, middles))
    low = low if planes.low_offset is None else low + planes.low_offset
    return (high if planes.high_offset is None else high + planes.high_offset) - low


def clipped(boxes: Box, a: Tensor, slack: Tensor) -> Box:
    """Boxes (D, ...) cut to where linear functions a (D, ...) are at most slack (D,) above their least value in the box.

    A counterexample is where every linear lower bound is <= 0. As the other inputs add no less than they do at the minimiser,
    |a_i| (x_i - l_i) <= slack for a_i > 0, and from the other end for a_i < 0. Rounded outward.
    """
    lower, upper = boxes.lower, boxes.upper
    slack = slack.view(-1, *[1] * (a.dim() - 1))
    tiny = 8 * torch.finfo(a.dtype).eps
    reach = (slack / a.abs() * (1 + tiny) + tiny * (lower.abs() + upper.abs())).nan_to_num(torch.inf, torch.inf)
    return Box(
        torch.where(a < 0, torch.maximum(lower, upper - reach), lower),
        torch.where(a > 0, torch.minimum(upper, lower + reach), upper),
    )
