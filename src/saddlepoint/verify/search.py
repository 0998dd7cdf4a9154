"""Complete search for ReLU networks: branch and bound on the signs of what goes into them, many domains at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from saddlepoint.errors import ModelError
from saddlepoint.propagation.bounds import Bounded, Box, Linear
from saddlepoint.propagation.nodes import Graph, Node
from saddlepoint.propagation.sets import times
from saddlepoint.verify.cases import Cases
from saddlepoint.verify.milp import Programme

Verdict = Literal["robust", "falsified", "unknown"]
_BATCH = 256
_CANDIDATES = 4
_STEPS, _SLOPE_RATE, _SIGN_RATE, _DECAY = 20, 0.1, 0.1, 0.98
_WIDTH = 2**18  # numbers of a value that are carried at once
_ROUNDS, _WORTH = 4, 0.05  # times that a case's inner bounds are cut, as long as its bound rises by such a share
_STRONGEST = 64  # ReLUs whose inner bounds are cut in each domain
_NUMBERS = 2**28  # that open domains may hold together before the easiest come first, so that they become fewer


@dataclass(frozen=True)
class Found:
    """What a search came to.

    bound: the least lower bound that is left, positive where everything is proved. counterexample: an input (...), or None.
    domains: how many parts this run bounded. seconds: by the clock that was given. reason: why the verdict is "unknown".
    """

    verdict: Verdict
    bound: float
    counterexample: Tensor | None
    domains: int
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class _Domains:
    """D parts of cases' boxes: the signs of some ReLUs' inputs are fixed.

    case (D,): which one. signs (D, F) int8: of the ReLUs that are not fixed at the root. lower, upper (D, F): bounds of what
    goes into them. slopes, multipliers (D, K, F): for each of the case's rows. bound (D,).
    """

    case: Tensor
    signs: Tensor
    lower: Tensor
    upper: Tensor
    slopes: Tensor
    multipliers: Tensor
    bound: Tensor

    def __len__(self) -> int:
        return len(self.case)

    def take(self, index: Tensor) -> _Domains:
        """Some of them."""
        return _Domains(*(getattr(self, part.name)[index] for part in fields(self)))

    @staticmethod
    def join(parts: list[_Domains]) -> _Domains:
        """All together."""
        return _Domains(*(torch.cat([getattr(part, one.name) for part in parts]) for one in fields(_Domains)))


class Search:
    """Branch and bound over cases whose boxes' bounds are known.

    Each domain is bounded by ascent on lower slopes and on the multipliers of its signs together (beta-CROWN, Wang et al. 2021,
    arXiv:2103.06624). Its inner bounds are its parent's, cut by the signs, and by what is known of counterexamples: they are
    where the linear function below the output isn't positive (Kotha et al. 2023, arXiv:2302.01404; Zhou et al. 2025,
    arXiv:2512.11087); the nearer a domain is to a proof, the less of it that leaves. The ReLU to split is, of the few that lose
    most in the bound (Bunel et al. 2020, arXiv:1909.06588), the one whose children are best. Where all signs are fixed, a
    linear programme decides. Every minimiser is tried as a counterexample.

    root: bounds over the cases' sets, (B, ...) each. check: of inputs (Q, ...) for the cases with these numbers (Q,), a
    counterexample or None. deadline: on `clock`; it may be moved, and `run` goes on. name: the value that the rows speak of, if
    it isn't the output. fair: whether cases take turns, so that the bound of each grows, where otherwise the worst comes first.
    first (D,): what was proved of each case before the first split. The search is deterministic.
    """

    def __init__(
        self, root: Bounded, cases: Cases, check: Callable[[Tensor, Tensor], Tensor | None], *,
        deadline: float, clock: Callable[[], float] = time.perf_counter, tolerance: float = 0.0, name: str = "",
        fair: bool = False,
    ) -> None:  # fmt: skip
        self.graph: Graph = root.graph
        self.name, self.fair = name or self.graph.output, fair
        self.root, self.cases, self.check = root, cases, check
        self.deadline, self.clock, self.tolerance = deadline, clock, tolerance
        before = self.graph.before(self.name)
        self.relus: list[Node] = [node for node in branching(self.graph) if node.name in before]
        self.free: dict[str, Tensor] = {}  # by ReLU, which of its elements are open in any box
        for node in self.relus:
            ends = root.boxes[node.inputs[0]]
            self.free[node.name] = ((ends.lower < 0) & (ends.upper > 0)).flatten(1).any(0).nonzero()[:, 0]
        self.sizes = [len(self.free[node.name]) for node in self.relus]
        self.used = {self.graph.input, *(name for node in self.graph.nodes if node.rule is not None for name in node.inputs)}
        self.count = 0
        widest = max((node.shape.numel() for node in self.graph.nodes), default=1) * cases.rows.shape[1]
        self.batch = max(1, min(_BATCH, _WIDTH // widest))
        self.counterexample: Tensor | None = None
        self.first = cases.rows.new_full((len(cases),), -torch.inf)
        self.begun, self.open = False, self._whole()
        self.fixed = self.open.take(self.open.case[:0])  # parts that nothing can be split of

    @property
    def bounds(self) -> Tensor:
        """What is proved of each case so far, (D,): lower bounds, at most the tolerance."""
        left = _Domains.join([self.open, self.fixed])
        return torch.full_like(self.first, self.tolerance).scatter_reduce(0, left.case, left.bound, "amin")

    def run(self, most: int | None = None) -> Found:
        """Until everything is proved, a counterexample is found, time is up, or more than `most` parts were bounded."""
        started, counted, reason = self.clock(), self.count, ""
        self.begin()
        while len(self.open) and self.counterexample is None:
            if reason := self._late(len(self.open), most):
                break
            self.open = self._step(*self._worst(self.open))
        left = _Domains.join([self.open, self.fixed])
        if len(self.fixed) and not reason:
            reason = f"every ReLU of {len(self.fixed)} parts is fixed, and their bounds are not above 0"
        verdict: Verdict = "falsified" if self.counterexample is not None else "unknown" if len(left) else "robust"
        bound = float(left.bound.min()) if len(left) else self.tolerance
        return Found(verdict, bound, self.counterexample, self.count - counted, self.clock() - started, reason)

    def begin(self) -> None:
        """Bound the cases as they are, inner bounds cut as long as it helps; what `run` does first."""
        if self.begun:
            return
        found = []
        for part in torch.split(self.open.case, self.batch):
            domains = self.open.take(part)
            for _ in range(1 if self.fair else _ROUNDS):
                solved = self._solved(domains, sum(self.sizes))
                risen = solved.bound - domains.bound > _WORTH * solved.bound.abs()
                domains = self._left(solved)
                if not bool((risen & (solved.bound <= self.tolerance)).any()):
                    break
            found.append(domains)
        self.begun, self.open = True, _Domains.join(found)
        self.first = self.bounds

    def _whole(self) -> _Domains:
        """The cases themselves, with CROWN's slopes."""
        rows, of = self.cases.rows, self.cases.of
        zero = rows.new_zeros(len(rows), rows.shape[1], sum(self.sizes))
        whole = self.root.take(of)
        signs, case = zero[:, 0].to(torch.int8), torch.arange(len(rows), device=rows.device)
        slopes: dict[str, Tensor] = {}
        whole.linear(self.name, rows, slopes)
        bound = rows.new_full((len(rows),), -torch.inf)
        return _Domains(case, signs, *self._ends(whole.boxes), self._compact(slopes, zero), zero, bound)

    def _step(self, worst: _Domains, rest: _Domains) -> _Domains:
        """What is open when some parts have been split, or decided where nothing is left to split."""
        splittable = ((worst.lower < 0) & (worst.upper > 0)).any(1)
        self.fixed = _Domains.join([self.fixed, self._left(self._leaves(worst.take(~splittable)))])
        worst = worst.take(splittable)
        return _Domains.join([self._left(self._solved(self._split(worst))), rest]) if len(worst) else rest

    def _late(self, count: int, most: int | None) -> str:
        """Why the search ends with so many parts open."""
        if self.clock() >= self.deadline:
            return f"time is up; {count} parts of {self.count} are open"
        return f"{most} parts are bounded; {count} are open" if most is not None and self.count > most else ""

    def _worst(self, open_: _Domains) -> tuple[_Domains, _Domains]:
        """The parts to go on with, and the rest."""
        easy = len(open_) * (2 * open_.slopes.shape[1] + 3) * sum(self.sizes) > _NUMBERS
        order = open_.bound.argsort(descending=easy)
        if self.fair:
            order = order[_ranks(open_.case[order]).argsort(stable=True)]
        return open_.take(order[: self.batch]), open_.take(order[self.batch :])

    def _left(self, domains: _Domains) -> _Domains:
        return domains.take((~(domains.bound > self.tolerance)).nonzero()[:, 0])  # NaN proves nothing

    def _leaves(self, domains: _Domains) -> _Domains:
        """Parts with nothing left to split, by a linear programme each: exact where all but ReLUs is affine."""
        if not len(domains) or self.programme is None:
            return domains
        bounded, bound = self._bounded(domains), domains.bound.clone()
        signs = self._wide(domains.signs)
        for place, case in enumerate(domains.case.tolist()):
            boxes = {name: ends.rows(torch.tensor([place], device=bound.device)) for name, ends in bounded.boxes.items()}
            least, point = self.programme.leaf(
                boxes, {name: sign[place] for name, sign in signs.items()}, self.cases.rows[case], self.cases.constants[case]
            )
            if not (self.root.outward and math.isinf(least)):  # that no input has these signs is the solver's word, up to 1e-7
                bound[place] = max(float(bound[place]), least)
            if point is not None and self.counterexample is None:
                owner = domains.case[place : place + 1]
                self.counterexample = self.check(self.cases.take(owner).sets.inside(point[None].to(bound.device)), owner)
        return replace(domains, bound=bound)

    @cached_property
    def programme(self) -> Programme | None:
        """Of the graph up to the value; None where it has other nonlinearities."""
        try:
            return Programme(replace(self.graph, output=self.name), self.cases.inputs.lower[:1])
        except ModelError:
            return None

    # ---- between the compact form (D, ..., F) and that of the graph's values

    def _wide(self, compact: Tensor) -> dict[str, Tensor]:
        """(..., F) as a table of (..., *shape), 0 elsewhere."""
        table = {}
        for node, part in zip(self.relus, torch.split(compact, self.sizes, -1), strict=True):
            full = part.new_zeros(*part.shape[:-1], node.shape.numel())
            table[node.name] = full.index_copy(-1, self.free[node.name], part).view(*part.shape[:-1], *node.shape)
        return table

    def _compact(self, table: dict[str, Tensor], like: Tensor) -> Tensor:
        """Of tables by ReLU (..., *shape) what is in the compact form, (..., F) as like is."""
        parts = [table[node.name].flatten(like.dim() - 1)[..., self.free[node.name]] for node in self.relus]
        return torch.cat(parts, -1) if parts else like

    def _ends(self, boxes: Mapping[str, Box]) -> tuple[Tensor, Tensor]:
        """Bounds of what goes into ReLUs, (D, F) each."""
        sets = boxes[self.graph.input].lower
        like, ends = sets.new_zeros(len(sets), 0), {node.name: boxes[node.inputs[0]] for node in self.relus}
        lower = self._compact({name: end.lower for name, end in ends.items()}, like)
        return lower, self._compact({name: end.upper for name, end in ends.items()}, like)

    def _bounded(self, domains: _Domains, cut: Linear | None = None) -> Bounded:
        """The root's bounds, for each domain, with its own of the ReLUs that are not fixed at the root."""
        of = self.cases.of[domains.case]
        boxes = {name: self.root.boxes[name].rows(of) for name in self.used}
        ends = (torch.split(end, self.sizes, 1) for end in (domains.lower, domains.upper))
        for node, lower, upper in zip(self.relus, *ends, strict=True):
            box, free = boxes[node.inputs[0]], self.free[node.name]
            low, high = box.lower.flatten(1), box.upper.flatten(1)
            low = low.index_copy(1, free, torch.maximum(low[:, free], lower))
            high = high.index_copy(1, free, torch.minimum(high[:, free], upper))
            boxes[node.inputs[0]] = Box(low.view_as(box.lower), high.view_as(box.upper))
        return Bounded(self.graph, boxes, self.root.memory, self.root.outward, cut)

    def _line(self, bounded: Bounded, domains: _Domains, slopes: Tensor, multipliers: Tensor | None) -> Linear:
        """Linear functions below the case's rows, constants included."""
        below = None if multipliers is None else self._wide(multipliers * domains.signs[:, None].to(multipliers))
        line = bounded.linear(self.name, self.cases.rows[domains.case], self._wide(slopes), below)
        return Linear(line.coefficients, line.constant + self.cases.constants[domains.case], line.inner)

    @torch.no_grad()
    def _error(self, bounded: Bounded, domains: _Domains, multipliers: Tensor) -> Tensor:
        """How far rounding can have moved the bounds of `_line`, (D, K)."""
        return bounded.error(self.name, self.cases.rows[domains.case], self._wide(multipliers))

    # ---- bounding

    def _solved(self, domains: _Domains, strongest: int = _STRONGEST) -> _Domains:
        """Bounds by ascent on slopes and multipliers together; a domain is safe if one of its rows is positive."""
        bounded, ends = self._bounded(domains), self.graph.input
        self.count += len(domains)
        slopes, betas = domains.slopes.clone().requires_grad_(), domains.multipliers.clone().requires_grad_()
        optimizer = torch.optim.Adam([{"params": [slopes], "lr": _SLOPE_RATE}, {"params": [betas], "lr": _SIGN_RATE}])
        best, most = domains.bound.clone(), domains.multipliers.clone()
        for step in range(_STEPS):
            last = step + 1 == _STEPS
            with torch.set_grad_enabled(not last):
                line = self._line(bounded, domains, slopes, betas)
                bound = line.lowest(bounded.boxes[ends])
            if self.root.outward:  # what rounding can add, with the largest multipliers of any step so far
                most = torch.maximum(most, betas.detach())
                error = self._error(bounded, domains, most)
                bound = bound - error
                line = replace(line, constant=line.constant - 2 * error)
            best = torch.maximum(best, bound.detach().amax(1))
            done = best > self.tolerance
            if step == 0 or last:
                self._try(line.lowest_at(bounded.boxes[ends]).detach(), domains.case)
            if last or bool(done.all()) or self.counterexample is not None:
                break
            optimizer.zero_grad()
            torch.autograd.backward(-bound[~done].sum())
            optimizer.step()
            with torch.no_grad():
                slopes.clamp_(0, 1)
                betas.clamp_(min=0)
            for group in optimizer.param_groups:
                group["lr"] *= _DECAY
            if step + 1 == _STEPS // 2:
                domains = self._cut(domains, line, bound, strongest)
                bounded = self._bounded(domains)
        return replace(domains, slopes=slopes.detach(), multipliers=betas.detach(), bound=best)

    @torch.no_grad()
    def _cut(self, domains: _Domains, line: Linear, bound: Tensor, strongest: int) -> _Domains:
        """Inner bounds again, of so many ReLUs that lose most, but only where the line (D, K, ...) isn't positive.

        No counterexample is elsewhere. bound (D, K): the line's. Domains of whose values the cut leaves half or more are left
        as they are.
        """
        sets, nearest = self.cases.inputs.rows(self.cases.of[domains.case]), bound.argmax(1)  # of the rows, nearest to a proof
        each = torch.arange(len(nearest), device=nearest.device)
        cut = Linear(line.coefficients[each, nearest][:, None], line.constant[each, nearest][:, None] - self.tolerance, {})
        lowest = bound[each, nearest] - self.tolerance
        middle = (times(cut.coefficients, (sets.lower + sets.upper) / 2) + cut.constant)[:, 0]
        index = ((lowest <= 0) & (middle > -lowest)).nonzero()[:, 0]
        if not len(index):
            return domains
        some = domains.take(index)
        part = self._bounded(some, cut.rows(index))
        inner = {name: a[index, nearest[index]].abs() for name, a in line.inner.items()}
        loss = self._compact(
            {node.name: inner[node.name] * _gap(part.boxes[node.inputs[0]]) for node in self.relus}, some.lower
        )
        least = loss.topk(min(strongest, loss.shape[1]), dim=1).values[:, -1:]
        chosen = self._wide((loss >= least) & (loss > 0))
        for node in self.relus:
            (name,) = node.inputs
            part.hold(name, part.tightened(name, only=chosen[node.name]))
        lower, upper = self._ends(part.boxes)
        return replace(
            domains, lower=domains.lower.index_copy(0, index, lower), upper=domains.upper.index_copy(0, index, upper)
        )

    def _try(self, points: Tensor, case: Tensor) -> None:
        """Whether one of the minimisers (D, K, ...) is a counterexample."""
        if self.counterexample is None:
            self.counterexample = self.check(points.flatten(0, 1), case.repeat_interleave(points.shape[1]))

    # ---- branching

    @torch.no_grad()
    def _split(self, domains: _Domains) -> _Domains:
        """Each domain twice, with another ReLU's sign fixed: of the likeliest ones that with the best children."""
        bounded = self._bounded(domains)
        line = self._line(bounded, domains, domains.slopes, None)
        nearest = line.lowest(bounded.boxes[self.graph.input]).argmax(1)  # of a case's rows, the one nearest to a proof
        inner = {name: a[torch.arange(len(a)), nearest] for name, a in line.inner.items()}
        tables = {}
        for node in self.relus:
            ends, a = bounded.boxes[node.inputs[0]], inner[node.name]
            between = (ends.lower < 0) & (ends.upper > 0)
            loss = (-a).clamp(min=0) * _gap(ends) + a.clamp(min=0) * torch.minimum(-ends.lower, ends.upper).clamp(min=0)
            tables[node.name] = torch.where(between, loss, -torch.inf)
        top = self._compact(tables, domains.lower).topk(min(_CANDIDATES, sum(self.sizes)), dim=1)
        best: tuple[Tensor, Tensor] | None = None
        for place, score in zip(top.indices.T, top.values.T, strict=True):
            both = self._children(domains, place)
            child = self._bounded(both)
            lows = self._line(child, both, both.slopes, None).lowest(child.boxes[self.graph.input]).amax(1)
            gain = lows.clamp(max=0).view(2, -1).sum(0).masked_fill(score == -torch.inf, -torch.inf)
            best = (gain, place) if best is None else (
                torch.maximum(best[0], gain), torch.where(gain > best[0], place, best[1])
            )  # fmt: skip
        assert best is not None
        return self._children(domains, best[1])

    def _children(self, domains: _Domains, place: Tensor) -> _Domains:
        """Both signs of the ReLU at `place` (D,) of the compact form."""
        here = place[:, None]
        above = domains.lower.scatter(1, here, domains.lower.gather(1, here).clamp(min=0))
        below = domains.upper.scatter(1, here, domains.upper.gather(1, here).clamp(max=0))
        return _Domains.join([
            replace(domains, signs=domains.signs.scatter(1, here, 1), lower=above),
            replace(domains, signs=domains.signs.scatter(1, here, -1), upper=below),
        ])  # fmt: skip


def branching(graph: Graph) -> list[Node]:
    """Nonlinearities with two linear pieces that meet at 0: ReLU and leaky ReLU."""
    return [node for node in graph.nodes if node.rule is not None and node.rule.free]


def _gap(ends: Box) -> Tensor:
    """How far the chord is above 0, where a ReLU is 0: - lower upper / (upper - lower), 0 where the sign is known."""
    between = (ends.lower < 0) & (ends.upper > 0)
    return torch.where(between, -ends.lower * ends.upper / torch.where(between, ends.upper - ends.lower, 1), 0)


def _ranks(values: Tensor) -> Tensor:
    """How many equal values stand before each, (D,)."""
    order = values.argsort(stable=True)
    first = torch.searchsorted(values[order].contiguous(), values[order].contiguous())
    return torch.empty_like(order).index_copy(0, order, torch.arange(len(values), device=values.device) - first)
