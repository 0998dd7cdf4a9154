"""Complete search for ReLU networks: branch and bound on the signs of what goes into them, many domains at once."""

from __future__ import annotations

import time
from collections.abc import Callable
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
_WIDTH = 2**22  # numbers of a value that are carried at once
_ROUNDS = 3
_STRONGEST = 16
VERBOSE = False
_NUMBERS = 2**28  # that open domains may hold together before the easiest come first, so that they become fewer


@dataclass(frozen=True)
class Found:
    """What a search came to.

    bound: the least lower bound that is left, positive where everything is proved. counterexample: an input (...), or None.
    domains: how many parts were bounded. seconds: by the clock that was given. reason: why the verdict is "unknown".
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
    arXiv:2103.06624), its inner bounds are the root's, cut by the signs. The ReLU to split is, of the few that lose most in the
    bound (Bunel et al. 2020, arXiv:1909.06588), the one whose children are best. Where all signs are fixed, a linear programme
    decides. Every minimiser is tried as a counterexample.

    root: bounds over the cases' sets, (B, ...) each. check: of inputs (Q, ...) for the cases
    with these numbers (Q,), a counterexample or None. deadline: on `clock`. name: the value that the rows speak of, if it isn't
    the output. fair: whether cases take turns, so that the bound of each grows, where otherwise the worst comes first.
    bounds (D,): after `run`, what is proved of each case. The search is deterministic.
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
        self.used = dict.fromkeys([self.graph.input, *(name for node in self.graph.nodes if node.rule for name in node.inputs)])
        self.bounds = cases.rows.new_full((len(cases),), -torch.inf)
        self.sizes = [len(self.free[node.name]) for node in self.relus]
        self.count = 0
        widest = max((node.shape.numel() for node in self.graph.nodes), default=1) * cases.rows.shape[1]
        self.batch = max(1, min(_BATCH, _WIDTH // widest))
        self.counterexample: Tensor | None = None

    def run(self, most: int | None = None) -> Found:
        """Until everything is proved, a counterexample is found, time is up, or more than `most` parts were bounded."""
        started, reason = self.clock(), ""
        whole = self._whole()
        open_ = _Domains.join([self._begun(whole.take(part)) for part in torch.split(whole.case, self.batch)])
        fixed = open_.take(open_.case[:0])
        while len(open_) and self.counterexample is None:
            if reason := self._late(len(open_), most):
                break
            worst, rest = self._worst(open_)
            splittable = ((worst.lower < 0) & (worst.upper > 0)).any(1)
            fixed = _Domains.join([fixed, self._open(self._leaves(worst.take(~splittable)))])
            worst = worst.take(splittable)
            open_ = _Domains.join([self._open(self._solved(self._split(worst))), rest]) if len(worst) else rest
        if len(fixed) and not reason:
            reason = f"every ReLU of {len(fixed)} parts is fixed, and their bounds are not above 0"
        open_ = _Domains.join([open_, fixed])
        verdict: Verdict = "falsified" if self.counterexample is not None else "unknown" if len(open_) else "robust"
        self.bounds = torch.full_like(self.bounds, self.tolerance).scatter_reduce(0, open_.case, open_.bound, "amin")
        bound = float(open_.bound.min()) if len(open_) else self.tolerance
        return Found(verdict, bound, self.counterexample, self.count, self.clock() - started, reason)

    def _whole(self) -> _Domains:
        """The cases themselves, with CROWN's slopes."""
        size, rows, width = len(self.cases), self.cases.rows.shape[1], sum(self.sizes)
        like = self.cases.rows
        zero, of = like.new_zeros(size, rows, width), self.cases.of
        case = torch.arange(size, device=like.device)
        signs = torch.zeros(size, width, dtype=torch.int8, device=like.device)
        lower = self._compact({n.name: self.root.boxes[n.inputs[0]].lower for n in self.relus}, 1, like)[of]
        upper = self._compact({n.name: self.root.boxes[n.inputs[0]].upper for n in self.relus}, 1, like)[of]
        found = _Domains(case, signs, lower, upper, zero, zero, like.new_full((size,), -torch.inf))
        slopes: dict[str, Tensor] = {}
        self._bounded(found).linear(self.name, like, slopes)
        return replace(found, slopes=self._compact(slopes, 2, zero))

    def _begun(self, domains: _Domains) -> _Domains:
        """Cases that aren't proved by inner bounds that are cut as long as it helps."""
        for _ in range(_ROUNDS):
            before = domains.bound
            domains = self._open(self._solved(domains, sum(self.sizes)))
            if VERBOSE: print('  begun', domains.bound, f'{self.clock():.2f}')
            if not len(domains) or self.counterexample is not None: break
        return domains

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

    def _open(self, domains: _Domains) -> _Domains:
        return domains.take((domains.bound <= self.tolerance).nonzero()[:, 0])

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

    def _compact(self, table: dict[str, Tensor], lead: int, like: Tensor) -> Tensor:
        parts = [table[node.name].flatten(lead)[..., self.free[node.name]] for node in self.relus]
        return torch.cat(parts, -1) if parts else like

    def _bounded(self, domains: _Domains, cut: Linear | None = None) -> Bounded:
        """The root's bounds, for each domain, with its own of the ReLUs that are not fixed at the root."""
        of = self.cases.of[domains.case]
        boxes = {name: self.root.boxes[name].rows(of) for name in self.used}
        ends = (torch.split(end, self.sizes, 1) for end in (domains.lower, domains.upper))
        for node, lower, upper in zip(self.relus, *ends, strict=True):
            box, free = boxes[node.inputs[0]], self.free[node.name]
            boxes[node.inputs[0]] = Box(*(
                end.flatten(1).index_copy(1, free, own).view_as(end)
                for end, own in ((box.lower, lower), (box.upper, upper))
            ))  # fmt: skip
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

    def _solved(self, domains: _Domains, strongest: int = 0) -> _Domains:
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
                domains = self._cut(domains, bounded, line, bound, done, strongest or _STRONGEST)
                bounded = self._bounded(domains)
        return replace(domains, slopes=slopes.detach(), multipliers=betas.detach(), bound=best)

    @torch.no_grad()
    def _cut(
        self, domains: _Domains, bounded: Bounded, line: Linear, bound: Tensor, done: Tensor, strongest: int
    ) -> _Domains:
        """Inner bounds that hold wherever a counterexample can be: where the line below the output isn't positive.

        (Kotha et al. 2023, arXiv:2302.01404; Zhou et al. 2025, arXiv:2512.11087). Of the ReLUs only those that lose most.
        """
        nearest = bound.argmax(1)
        which = torch.arange(len(nearest), device=nearest.device)
        cut = Linear(line.coefficients[which, nearest][:, None], line.constant[which, nearest][:, None] - self.tolerance, {})
        sets = bounded.boxes[self.graph.input]
        middle = times(cut.coefficients, (sets.lower + sets.upper) / 2) + cut.constant
        index = (~done & (middle[:, 0] > 0)).nonzero()[:, 0]
        if not len(index):
            return domains
        some = domains.take(index)
        inner = {name: a[index, nearest[index]] for name, a in line.inner.items()}
        part = self._bounded(some, cut.rows(index))
        losses = self._compact(
            {node.name: inner[node.name].abs() * gap(part.boxes[node.inputs[0]]) for node in self.relus}, 1, some.lower
        )
        least = losses.topk(min(strongest, losses.shape[1]), dim=1).values[:, -1:]
        chosen = self._wide((losses >= least) & (losses > 0))
        for node in self.relus:
            (name,) = node.inputs
            part.boxes[name] = part.boxes[name].within(part.tightened(name, 0, chosen[node.name]))
        ends = [
            self._compact({node.name: getattr(part.boxes[node.inputs[0]], end) for node in self.relus}, 1, some.lower)
            for end in ("lower", "upper")
        ]
        return replace(
            domains, lower=domains.lower.index_copy(0, index, ends[0]), upper=domains.upper.index_copy(0, index, ends[1])
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
            loss = (-a).clamp(min=0) * gap(ends) + a.clamp(min=0) * torch.minimum(-ends.lower, ends.upper).clamp(min=0)
            tables[node.name] = torch.where(between, loss, -torch.inf)
        top = self._compact(tables, 1, domains.lower).topk(min(_CANDIDATES, sum(self.sizes)), dim=1)
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


def gap(ends: Box) -> Tensor:
    """How far the chord is above 0, where a ReLU is 0: - lower upper / (upper - lower), 0 where the sign is known."""
    between = (ends.lower < 0) & (ends.upper > 0)
    return torch.where(between, -ends.lower * ends.upper / torch.where(between, ends.upper - ends.lower, 1), 0)


def _ranks(values: Tensor) -> Tensor:
    """How many equal values stand before each, (D,)."""
    order = values.argsort(stable=True)
    first = torch.searchsorted(values[order].contiguous(), values[order].contiguous())
    return torch.empty_like(order).index_copy(0, order, torch.arange(len(values), device=values.device) - first)
