"""Complete search for ReLU networks: branch and bound on the signs of what goes into them, many domains at once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saddlepoint.propagation.bounds import Bounded, Box, Slopes
from saddlepoint.propagation.graph import Graph, Node

Verdict = Literal["robust", "falsified", "unknown"]
_BATCH = 256
_CANDIDATES = 4
_STEPS, _SLOPE_RATE, _SIGN_RATE, _DECAY = 20, 0.1, 0.1, 0.98


@dataclass(frozen=True)
class Found:
    """What a search came to.

    bound: the least lower bound that is left; counterexample (...) or None; domains: how many were bounded.
    """

    verdict: Verdict
    bound: float
    counterexample: Tensor | None
    domains: int
    seconds: float


@dataclass
class _Domains:
    """D parts of the input's box, each with the sign of some ReLUs' inputs fixed, and one function to bound.

    signs, slopes, multipliers: by node, (D, ...) each. rows (D, C); bound (D,).
    """

    rows: Tensor
    signs: dict[str, Tensor]
    slopes: dict[str, Tensor]
    multipliers: dict[str, Tensor]
    bound: Tensor

    def __len__(self) -> int:
        return len(self.bound)

    def take(self, index: Tensor) -> _Domains:
        """Some of them."""

        def some(table: dict[str, Tensor]) -> dict[str, Tensor]:
            return {key: value[index] for key, value in table.items()}

        return _Domains(self.rows[index], some(self.signs), some(self.slopes), some(self.multipliers), self.bound[index])

    @staticmethod
    def join(parts: list[_Domains]) -> _Domains:
        """All together."""

        def all_of(tables: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {key: torch.cat([table[key] for table in tables]) for key in tables[0]}

        return _Domains(
            torch.cat([part.rows for part in parts]),
            all_of([part.signs for part in parts]),
            all_of([part.slopes for part in parts]),
            all_of([part.multipliers for part in parts]),
            torch.cat([part.bound for part in parts]),
        )


class Search:
    """Branch and bound over one input box, for rows (R, C) all of which must stay positive."""

    def __init__(self, graph: Graph, root: Bounded, rows: Tensor, deadline: float) -> None:
        self.graph, self.root, self.deadline = graph, root, deadline
        self.relus: list[Node] = [node for node in graph.nodes if not node.affine]
        self.rows, self.count = rows, 0
        self.counterexample: Tensor | None = None

    def run(self) -> Found:
        """Until everything is bounded above 0, a counterexample is found, or time is up."""
        started = time.perf_counter()
        size = len(self.rows)
        empty = {node.name: torch.zeros(size, *node.shape, dtype=torch.int8) for node in self.relus}
        slopes: Slopes = {}
        self._bounded(empty).linear(self.graph.output, self.rows[:, None], slopes)
        first = {key: value[:, 0].detach().clone() for key, value in slopes.items()}
        none = {node.name: torch.zeros(size, *node.shape) for node in self.relus}
        open_ = self._solved(_Domains(self.rows, empty, first, none, torch.zeros(size)))
        open_ = open_.take((open_.bound <= 0).nonzero()[:, 0])
        while len(open_) and self.counterexample is None and time.perf_counter() < self.deadline:
            order = open_.bound.argsort()
            worst, rest = open_.take(order[:_BATCH]), open_.take(order[_BATCH:])
            children = self._solved(self._split(worst))
            children = children.take((children.bound <= 0).nonzero()[:, 0])
            open_ = _Domains.join([children, rest])
        verdict: Verdict = "falsified" if self.counterexample is not None else "unknown" if len(open_) else "robust"
        bound = float(open_.bound.min()) if len(open_) else 0.0
        return Found(verdict, bound, self.counterexample, self.count, time.perf_counter() - started)

    def _bounded(self, signs: dict[str, Tensor]) -> Bounded:
        """The root's bounds, for each domain, cut by its signs."""
        size = len(next(iter(signs.values())))
        boxes = {name: Box(box.lower.expand(size, *box.lower.shape[1:]), box.upper.expand(size, *box.upper.shape[1:]))
                 for name, box in self.root.boxes.items()}  # fmt: skip
        for node in self.relus:
            (name,), sign = node.inputs, signs[node.name]
            box = boxes[name]
            boxes[name] = Box(
                torch.where(sign > 0, box.lower.clamp(min=0), box.lower),
                torch.where(sign < 0, box.upper.clamp(max=0), box.upper),
            )
        return Bounded(self.graph, boxes)

    def _solved(self, domains: _Domains) -> _Domains:
        """Bounds by ascent on slopes and multipliers together (Wang et al. 2021, arXiv:2103.06624)."""
        bounded = self._bounded(domains.signs)
        self.count += len(domains)
        signs = {key: value.to(domains.rows.dtype) for key, value in domains.signs.items()}
        slopes = {key: value.clone().requires_grad_() for key, value in domains.slopes.items()}
        betas = {key: value.clone().requires_grad_() for key, value in domains.multipliers.items()}
        optimizer = torch.optim.Adam(
            [{"params": list(slopes.values()), "lr": _SLOPE_RATE}, {"params": list(betas.values()), "lr": _SIGN_RATE}]
        )
        best = torch.full((len(domains),), -torch.inf)
        box = bounded.boxes[self.graph.input]
        for step in range(_STEPS):
            wide = {key: value[:, None] for key, value in slopes.items()}
            constraints = {key: (betas[key] * signs[key])[:, None] for key in betas}
            line = bounded.linear(self.graph.output, domains.rows[:, None], wide, constraints)
            bound = line.lowest(box)[:, 0]
            best = torch.maximum(best, bound.detach())
            if step == 0 or step + 1 == _STEPS:
                self._try(line.lowest_at(box)[:, 0].detach(), domains.rows)
            if bool((best > 0).all()) or step + 1 == _STEPS or self.counterexample is not None:
                break
            optimizer.zero_grad()
            torch.autograd.backward(-bound[best <= 0].sum())
            optimizer.step()
            with torch.no_grad():
                for value in slopes.values():
                    value.clamp_(0, 1)
                for value in betas.values():
                    value.clamp_(min=0)
            for group in optimizer.param_groups:
                group["lr"] *= _DECAY
        slopes, betas = ({key: value.detach() for key, value in table.items()} for table in (slopes, betas))
        return _Domains(domains.rows, domains.signs, slopes, betas, best)

    def _try(self, points: Tensor, rows: Tensor) -> None:
        """Whether one of these inputs is a counterexample."""
        with torch.no_grad():
            outputs = torch.cat([self.graph.values(point[None])[self.graph.output] for point in points[:64]])
            margins = (outputs @ self.rows.T).amin(1)
            if bool((margins <= 0).any()):
                self.counterexample = points[int(margins.argmin())]

    def _split(self, domains: _Domains) -> _Domains:
        """Each domain twice, with another ReLU's sign fixed: of the likeliest ones that with the best children."""
        with torch.no_grad():
            bounded = self._bounded(domains.signs)
            wide = {key: value[:, None] for key, value in domains.slopes.items()}
            line = bounded.linear(self.graph.output, domains.rows[:, None], wide)
            scores = []
            for node in self.relus:
                box, a = bounded.boxes[node.inputs[0]], line.inner[node.name][:, 0]
                between = (box.lower < 0) & (box.upper > 0)
                gap = -box.lower * box.upper / torch.where(between, box.upper - box.lower, 1)
                loss = (-a).clamp(min=0) * gap + a.clamp(min=0) * torch.minimum(-box.lower, box.upper).clamp(min=0)
                scores.append(torch.where(between, loss, -torch.inf).flatten(1))
            top = torch.cat(scores, 1).topk(min(_CANDIDATES, sum(s.shape[1] for s in scores)), dim=1)
            best: tuple[Tensor, Tensor] | None = None
            for place in top.indices.T:
                both = self._children(domains, place)
                child = self._bounded(both.signs)
                wide = {key: value[:, None] for key, value in both.slopes.items()}
                lows = child.linear(self.graph.output, both.rows[:, None], wide).lowest(child.boxes[self.graph.input])[:, 0]
                gain = lows.clamp(max=0).view(2, -1).sum(0)
                best = (gain, place) if best is None else (
                    torch.maximum(best[0], gain), torch.where(gain > best[0], place, best[1])
                )  # fmt: skip
            assert best is not None
            return self._children(domains, best[1])

    def _children(self, domains: _Domains, place: Tensor) -> _Domains:
        """Both signs of the ReLU at `place` (D,) of all in a row."""
        two = []
        for sign in (1, -1):
            signs, offset = {}, 0
            for node in self.relus:
                flat = domains.signs[node.name].flatten(1).clone()
                inside = ((place >= offset) & (place < offset + flat.shape[1])).nonzero()[:, 0]
                flat[inside, place[inside] - offset] = sign
                signs[node.name] = flat.view_as(domains.signs[node.name])
                offset += flat.shape[1]
            two.append(_Domains(domains.rows, signs, domains.slopes, domains.multipliers, domains.bound))
        return _Domains.join(two)
