"""Complete search for networks of few inputs: boxes are halved until each one is proved, many at once."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from saddlepoint.propagation.bounds import Bounded, Box
from saddlepoint.propagation.nodes import Graph
from saddlepoint.verify.cases import Cases
from saddlepoint.verify.search import Found, Verdict

_BATCH = 2048
_MOST = 2_000_000  # boxes that may be open at once


class InputSearch:
    """Branch and bound on the inputs.

    Each box is bounded by CROWN with interval bounds joined in where those are tighter; it is halved along the input that moves
    the bounds most, |A| * width, summed over the rows: which of them will prove a part isn't known before. The minimiser of
    each bound and the middle of each box are tried as counterexamples. Any nonlinearity will do. check, deadline, clock,
    tolerance: as in `Search`. outward: take off what rounding can add.
    """

    def __init__(
        self, graph: Graph, cases: Cases, check: Callable[[Tensor, Tensor], Tensor | None], *, deadline: float,
        clock: Callable[[], float] = time.perf_counter, tolerance: float = 0.0, outward: bool = False,
    ) -> None:  # fmt: skip
        self.graph, self.cases, self.check, self.outward = graph, cases, check, outward
        self.deadline, self.clock, self.tolerance = deadline, clock, tolerance
        self.count = 0
        self.counterexample: Tensor | None = None

    @torch.no_grad()
    def run(self) -> Found:
        """Until every box is proved, a counterexample is found, or time is up."""
        started = self.clock()
        lower, upper = self.cases.sets.lower, self.cases.sets.upper
        case = torch.arange(len(self.cases), device=lower.device)
        least, reason = torch.full_like(lower.flatten(1)[:, 0], -torch.inf), ""
        while len(case):
            if self.clock() >= self.deadline:
                reason = f"time is up; {len(case)} boxes of {self.count} are open"
                break
            if len(case) > _MOST:
                reason = f"more than {_MOST} boxes are open"
                break
            order = least.argsort()  # the worst ones hold counterexamples, and the list stays short enough
            chosen, rest = order[:_BATCH], order[_BATCH:]
            part = self.cases.take(case[chosen])
            bound, pull = self._bounded(part, Box(lower[chosen], upper[chosen]), case[chosen])
            if self.counterexample is not None:
                break
            left = (bound <= self.tolerance).nonzero()[:, 0]
            ends = _halves(lower[chosen][left], upper[chosen][left], pull[left])
            if ends is None:
                reason = "a box can't be halved any further in this dtype, and its bound is not above 0"
                break
            lower, upper = torch.cat([ends[0], lower[rest]]), torch.cat([ends[1], upper[rest]])
            case = torch.cat([case[chosen][left].repeat(2), case[rest]])
            least = torch.cat([bound[left].repeat(2), least[rest]])
        verdict: Verdict = "falsified" if self.counterexample is not None else "unknown" if len(case) else "robust"
        bound_left = float(least.min()) if len(case) else self.tolerance
        return Found(verdict, bound_left, self.counterexample, self.count, self.clock() - started, reason)

    def _bounded(self, part: Cases, boxes: Box, case: Tensor) -> tuple[Tensor, Tensor]:
        """Lower bounds (D,) of the cases' best rows, and how much each input moves them, (D, ...)."""
        self.count += len(part)
        bounded = Bounded.of(self.graph, boxes, outward=self.outward)
        bound = bounded.backward(self.graph.output, part.rows) + part.constants
        open_ = (bound.amax(1) <= self.tolerance).nonzero()[:, 0]
        pull = torch.zeros_like(boxes.lower)
        if not len(open_):
            return bound.amax(1), pull
        few, boxes = part.take(open_), boxes.rows(open_)
        bounded = Bounded.of(self.graph, boxes, outward=self.outward)
        bounded.refine()
        line = bounded.linear(self.graph.output, few.rows)
        low = line.lowest(boxes) - (bounded.error(self.graph.output, few.rows) if self.outward else 0)
        tighter = torch.maximum(low + few.constants, bound[open_])
        points = torch.cat([line.lowest_at(boxes).flatten(0, 1), (boxes.lower + boxes.upper) / 2])
        owners = torch.cat([case[open_].repeat_interleave(few.rows.shape[1]), case[open_]])
        self.counterexample = self.check(points, owners)
        pull[open_] = (line.coefficients.abs() * (boxes.upper - boxes.lower)[:, None]).sum(1)
        return bound.amax(1).index_copy(0, open_, tighter.amax(1)), pull


def _halves(lower: Tensor, upper: Tensor, pull: Tensor) -> tuple[Tensor, Tensor] | None:
    """Boxes (D, ...) halved along the input that pulls most, all first halves first; None if one can't be halved."""
    flat_lower, flat_upper = lower.flatten(1), upper.flatten(1)
    width = flat_upper - flat_lower
    weight = pull.flatten(1) + 1e-6 * width / width.amax(1, keepdim=True).clamp(min=torch.finfo(width.dtype).tiny)
    place = torch.where(width > 0, weight, -1).argmax(1, keepdim=True)
    middle = (flat_lower.gather(1, place) + flat_upper.gather(1, place)) / 2
    if bool(((middle <= flat_lower.gather(1, place)) | (middle >= flat_upper.gather(1, place))).any()):
        return None
    first, second = flat_upper.scatter(1, place, middle), flat_lower.scatter(1, place, middle)
    return (
        torch.cat([flat_lower, second]).view(-1, *lower.shape[1:]),
        torch.cat([first, flat_upper]).view(-1, *upper.shape[1:]),
    )
