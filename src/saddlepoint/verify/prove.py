"""From the cheapest proof to the dearest: what becomes of cases that one network must satisfy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saddlepoint.precision import full_precision
from saddlepoint.propagation.bounds import Bounded, Box
from saddlepoint.propagation.corners import corners
from saddlepoint.propagation.nodes import Graph
from saddlepoint.propagation.patches import Patches
from saddlepoint.verify.cases import Cases
from saddlepoint.verify.inputs import InputSearch
from saddlepoint.verify.search import Found, Search, Verdict, branching
from saddlepoint.verify.tighten import tighten

FEW_INPUTS = 16
_STEPS = 20
_SHARE = 0.2  # of the time: the most that patches may take
_PRICES = 100  # steps of ascent on the prices of inputs that patches share
_DESCENT = 40  # steps from each corner
_SCATTERED, _SETTLING = 256, 60  # points, and steps from them, where several conditions must hold together
_ASCENT = 0.1  # of the time: twice what ascent on inner bounds may take
_FIRST = 0.04  # of the time: the first search; each later one has twice as long
_OTHER = 0.1  # of the time: left for the search on ReLUs, where inputs are halved first
_WORTH = 0.05  # how much tightening must raise the bounds, as a share of them, to go on with it
_MOST, _GROWTH = 10, 4  # parts for each bound in the first round of tightening, and how they grow


@dataclass(frozen=True)
class Proof:
    """What became of one property.

    stage: what decided it, or the last that was tried. rigorous: whether rounding is allowed for. bound: the least lower bound
    of the cases' margins; positive where all are proved. counterexample: an input (...) or None. parts: how many subproblems
    were bounded. reason: why it is unknown.
    """

    verdict: Verdict
    stage: str
    bound: float
    counterexample: Tensor | None
    parts: int
    seconds: float
    reason: str = ""
    rigorous: bool = False


Replay = Callable[[Tensor, int], bool]
"""Whether an input (...) is a counterexample of the case with this number, by the network itself."""


def prove(
    graph: Graph, cases: Cases, replay: Replay, *, seconds: float, clock: Callable[[], float] = time.perf_counter,
    rigorous: bool = False,
) -> Proof:  # fmt: skip
    """Decide cases by the cheapest means that do: counterexamples, intervals, linear bounds, search.

    corners       the minimisers of linear bounds, and descent from them; from other points too for conditions that must hold
                  together
    ibp, crown-ibp, crown, alpha-crown: see `bounds`
    patches       before alpha-crown, for more than 16 inputs of which each neuron of the first layer sees few, see `Patches`
    inputs        halving boxes, for networks of at most 16 inputs; what has ReLUs leaves time for the search
    search        branch and bound on ReLUs, in turns with tightening the bounds inside by searches of their own as long as
                  that pays

    Each stage gets the cases that are left. rigorous: compute in float64, and take off what rounding can add; it takes about
    twice the time. Otherwise proofs hold up to the rounding of the dtype that the network is in.
    Errors: those of `Bounded`.
    """
    if rigorous:
        graph, cases = graph.double, cases.double()
    with full_precision(cases.rows.device.type):
        return _Prover(graph, cases, replay, seconds, clock, rigorous).run()


class _Prover:
    def __init__(
        self, graph: Graph, cases: Cases, replay: Replay, seconds: float, clock: Callable[[], float], rigorous: bool
    ) -> None:  # fmt: skip
        self.graph, self.cases, self.replay, self.clock, self.rigorous = graph, cases, replay, clock, rigorous
        self.started, self.seconds = clock(), seconds
        self.left = torch.arange(len(cases), device=cases.rows.device)
        self.bound = cases.rows.new_full((len(cases),), -torch.inf)
        self.counterexample: Tensor | None = None
        self.parts = 0
        self.refining = 0.0  # seconds that CROWN's bounds of everything took; a step of ascent takes about half of it

    @property
    def deadline(self) -> float:
        return self.started + self.seconds

    def run(self) -> Proof:
        late = f"the time of {self.seconds:g} s is up"
        last, reason = "none", late
        few = self.graph.shape.numel() <= FEW_INPUTS and type(self.cases.inputs) is Box
        stages: list[tuple[str, Callable[[], str]]] = [
            ("crown-ibp", self._quick),
            ("corners", self._corners),
            ("crown", self._crown),
            *([("inputs", self._inputs)] if few else [("patches", self._patches)]),
            *([] if few and not branching(self.graph) else [("alpha-crown", self._alpha), ("search", self._search)]),
        ]
        for name, stage in stages:
            if self._late():
                break
            last, reason = name, stage() or late
            if self.counterexample is not None:
                return self._proof("falsified", name, "")
            self.left = (~(self.bound > 0)).nonzero()[:, 0]  # NaN proves nothing
            if not len(self.left):
                return self._proof("robust", name, "")
        return self._proof("unknown", last, reason)

    def _proof(self, verdict: Verdict, stage: str, reason: str) -> Proof:
        spent = self.clock() - self.started
        return Proof(
            verdict, stage, float(self.bound.min()), self.counterexample, self.parts, spent, reason, self.rigorous
        )  # fmt: skip

    def _late(self) -> bool:
        return self.clock() >= self.deadline

    def _improve(self, index: Tensor, bound: Tensor) -> None:
        self.bound[index] = torch.maximum(self.bound[index], bound)

    def check(self, points: Tensor, case: Tensor) -> Tensor | None:
        """A counterexample among points (Q, ...) for cases (Q,), which the network itself confirms."""
        with torch.no_grad():
            margin = self.cases.take(case).margin(self.graph.outputs(points))
        for place in margin.argsort()[:4].tolist():
            if float(margin[place]) > 0:
                break
            if self.replay(points[place], int(case[place])):
                return points[place]
        return None

    @torch.no_grad()
    def _quick(self) -> str:
        part = self.cases.take(self.left)
        self.root = Bounded.of(self.graph, self.cases.inputs, outward=self.rigorous)
        wide = self.root.take(part.of)
        joined = torch.maximum(wide.lowest(self.graph.output, part.rows, 0), wide.by_intervals(part.rows))
        self._improve(self.left, (joined + part.constants).amax(1))
        return ""

    @torch.no_grad()
    def _corners(self) -> str:
        part = self.cases.take(self.left)
        began = self.clock()
        self.root.refine()
        self.refining = self.clock() - began
        points = corners(self.root.take(part.of), part.rows).flatten(1, 2)  # (D, S * K, ...)
        case = self.left.repeat_interleave(points.shape[1])
        with torch.enable_grad():
            self.counterexample = self._descend(points.flatten(0, 1), case)
            if self.counterexample is None and part.rows.shape[1] > 1:
                self.counterexample = self._settle(self.left.repeat_interleave(_SCATTERED))
        return ""

    def _descend(self, points: Tensor, case: Tensor) -> Tensor | None:
        """Follow the sign of the margin's gradient down, in steps that shrink."""
        part = self.cases.take(case)
        sets = part.sets
        width = (sets.upper - sets.lower) / 2
        for step in range(_DESCENT):
            if (found := self.check(points, case)) is not None or self._late():
                return found
            leaf = points.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(part.excess(self.graph.outputs(leaf)).sum(), leaf)
            size = width * (1 - step / _DESCENT)
            points = sets.inside(points - size * gradient.sign())
        return self.check(points, case)

    def _settle(self, case: Tensor) -> Tensor | None:
        """By Adam, from points all over the boxes: what several conditions want together is seldom at a corner of one."""
        part = self.cases.take(case)
        lower, width = part.sets.lower, part.sets.upper - part.sets.lower
        generator = torch.Generator().manual_seed(0)
        share = torch.rand(lower.shape, generator=generator, dtype=torch.float64).to(lower).requires_grad_()
        optimizer = torch.optim.Adam([share], lr=0.1)
        for step in range(_SETTLING):
            points = part.sets.inside(lower + width * share)
            (share.grad,) = torch.autograd.grad(part.excess(self.graph.outputs(points)).sum(), share)
            if step % 5 == 4 and ((found := self.check(points.detach(), case)) is not None or self._late()):
                return found
            optimizer.step()
            with torch.no_grad():
                share.clamp_(0, 1)
            optimizer.param_groups[0]["lr"] *= 0.95
        return None

    @torch.no_grad()
    def _crown(self) -> str:
        return self._linear(0)

    @torch.no_grad()
    def _patches(self) -> str:
        if (patches := Patches.of(self.root)) is None:
            return ""
        until = min(self.deadline, self.clock() + _SHARE * self.seconds)
        for case in self.left.tolist():
            index = self.left.new_tensor([case])
            part = self.cases.take(index)
            root = self.root.take(part.of)
            for row, constant in zip(part.rows.unbind(1), part.constants.unbind(1), strict=True):
                low = patches.lowest(root, row[:, None], _PRICES, -constant, lambda: self.clock() >= until)
                self._improve(index, low + constant)
                if bool(self.bound[case] > 0) or self.clock() >= until:
                    break
        return ""

    @torch.no_grad()
    def _alpha(self) -> str:
        steps = int(min(_STEPS, _ASCENT * self.seconds / max(self.refining, 1e-9)))
        if steps:
            self.root.refine(steps)
        return self._linear(_STEPS)

    def _linear(self, steps: int) -> str:
        part = self.cases.take(self.left)
        wide = self.root.take(part.of)
        self._improve(self.left, (wide.lowest(self.graph.output, part.rows, steps) + part.constants).amax(1))
        return ""

    def _inputs(self) -> str:
        part, left = self.cases.take(self.left), self.left
        search = InputSearch(
            self.graph, part, lambda points, case: self.check(points, left[case]),
            deadline=self.deadline - (_OTHER * self.seconds if branching(self.graph) else 0), clock=self.clock,
            outward=self.rigorous,
        )  # fmt: skip
        found = search.run()
        self._improve(left, self.bound.new_full(left.shape, found.bound))
        return self._took(found, search.counterexample)

    def _search(self) -> str:
        if not branching(self.graph):
            return "there are no ReLUs to split"
        part, left = self.cases.take(self.left), self.left
        used, of = torch.unique(part.of, return_inverse=True)
        root = self.root.take(used)
        part = Cases(root.boxes[self.graph.input], of, part.rows, part.constants)
        slice_, most = _FIRST * self.seconds, _MOST

        def search() -> Search:
            return Search(
                root, part, lambda points, case: self.check(points, left[case]),
                deadline=min(self.deadline, self.clock() + slice_), clock=self.clock,
            )  # fmt: skip

        now, pays = search(), True
        while True:
            found = now.run()
            reason = self._took(found, now.counterexample)
            self._improve(left, now.bounds)
            if found.verdict != "unknown" or self._late():
                return reason
            if pays:
                slice_ *= 2
                tighten(root, most, deadline=min(self.deadline, self.clock() + slice_), clock=self.clock)
                most *= _GROWTH
                again = search()
                again.begin()
                self.parts += again.count
                gained = float((again.first - now.first).sum())
                pays = again.counterexample is not None or gained > _WORTH * float(now.first.abs().sum())
                now = again if pays else now
            elif not len(now.open):  # nothing is left to split
                return reason
            now.deadline = min(self.deadline, self.clock() + slice_) if pays else self.deadline

    def _took(self, found: Found, counterexample: Tensor | None) -> str:
        self.parts += found.domains
        self.counterexample = counterexample
        if found.verdict == "robust":
            self.bound[self.left] = self.bound[self.left].clamp(min=_above(self.bound, 0.0))
        return found.reason


def _above(like: Tensor, value: float) -> float:
    """The next number."""
    return float(torch.nextafter(like.new_tensor(value), like.new_tensor(torch.inf)))
