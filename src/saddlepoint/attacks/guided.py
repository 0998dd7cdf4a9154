"""The attack that begins where bounds are least: what a proof can't exclude is where to look."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from saddlepoint.engine import Attack, Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.models.base import Classifier
from saddlepoint.models.fingerprint import fingerprint
from saddlepoint.precision import full_precision
from saddlepoint.propagation.bounds import Bounded
from saddlepoint.propagation.corners import corners
from saddlepoint.propagation.graph import Exported, export
from saddlepoint.propagation.nodes import Graph
from saddlepoint.propagation.regions import inputs_of
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.threats import Region
from saddlepoint.trees import take, tree_map

_CHOICES = 4  # of lower slopes, in `corners`
_ELEMENTS = 2**24  # coefficients that are held at once


@dataclass(frozen=True)
class Descent:
    """Each sample's S points (B, S, ...), and the combinations of logits that they ascend (B, S, C)."""

    points: Tensor
    ascended: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class BoundGuided(Attack):
    """From the points of the threat's set where linear lower bounds of the margins are least, down the margins.

        a_j . x' + b_j <= z_y(x') - z_j(x')                      for all x' of the set (CROWN), for the likeliest classes j
        x_0     = argmin a_j . x'
        x_(k+1) = project(x_k + alpha_k argmax_{||d|| <= 1} <grad (z_j - z_y)(x_k), d>),   alpha_k = eps (1 - k / steps)

    The bounds see the whole set, while a gradient sees one point: where gradients lead astray, as in networks that were trained
    for a proof or whose gradients are masked, such starts often lie behind the wall. Four choices of lower slopes give four
    starts for each class, and all of them descend together.

    model: the network whose bounds are used; with that of another model than the one under attack it is a transfer attack.
    steps: of the descent, the first one at the starts. classes: other classes that get starts, those of the least bounds;
    towards a target, those that are hardest to beat.

    The bounds cost no query, but they aren't free: for each sample about as much as one pass for each neuron that can be on
    either side of 0, and memory in proportion. Reading the network takes one pass, once. Nothing is random. When the weights of
    `model` change, so do the bounds.

    Errors: `CapabilityError` for models whose parameters aren't granted, `ModelError` for operators without known bounds.

    Source: ours, of known parts: the bounds of Zhang, Weng, Chen, Hsieh & Daniel (2018), arXiv:1811.00866; that relaxations
    propose counterexamples is usual in complete verifiers, see Bunel, Lu, Turkaslan, Torr, Kohli & Kumar (2020), Branch and
    bound for piecewise linear neural network verification, arXiv:1909.06588.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))
    >>> x = torch.rand(3, 4)
    >>> found = sp.attack(model, x, model.predict(x), sp.attacks.BoundGuided(model, steps=5), sp.Linf(0.1))
    >>> bool((found.distance <= 0.1).all())
    True
    """

    model: Classifier = field(kw_only=False)
    steps: int = 40
    classes: int = 3
    _exported: dict[torch.Size, Exported] = field(init=False, repr=False, compare=False, default_factory=dict)

    declaration: ClassVar[Declaration] = Declaration(
        summary="from where linear bounds of the margins are least, down the margins",
        reference="ours; bounds of Zhang et al. 2018, arXiv:1811.00866",
        norms=frozenset({Norm.LINF, Norm.L2, Norm.L1}),
        access=Access.PARAMETERS,
        linear_oracle=1.0,
    )

    def __post_init__(self) -> None:
        if not isinstance(self.model, Classifier):
            raise InputError(f"model must be a Saddlepoint model: sp.Model(net, ...); got {type(self.model).__name__}")
        self.model.require(Access.PARAMETERS, "BoundGuided")
        for name, value in (("steps", self.steps), ("classes", self.classes)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number >= 1; got {value}")

    def __repr__(self) -> str:
        return f"BoundGuided({self._name}, steps={self.steps}, classes={self.classes})"

    @property
    def _name(self) -> str:
        return str(self.model.describe().get("name") or type(self.model).__name__)

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def looks_last(self) -> bool:
        return False

    @property
    def randomized(self) -> bool:
        return False

    @property
    def width(self) -> int:
        return _CHOICES * self.classes

    def cost(self, classes: int) -> tuple[int, int]:
        starts = _CHOICES * min(self.classes, classes - 1)
        return starts, starts

    def settings(self) -> dict[str, object]:
        return super().settings() | {"model": f"{self._name}, {fingerprint(self.model)[:16]}"}

    def graph(self, x: Tensor) -> Graph:
        """The network for inputs like x (1, ...), with the weights of now; a pass the first time. Errors: `ModelError`."""
        shape = x.shape[1:]
        if shape not in self._exported:
            self._exported[shape] = export(self.model, x[:1].detach().to(self.model.device))
            self.model.queries.forward += 1  # the network runs once
        return self._exported[shape].graph()

    def current(self, state: Descent) -> Tensor:
        return state.points[:, 0]

    @torch.no_grad()
    def init(self, problem: Problem) -> Descent:
        count, device = len(problem.k), problem.origin.device
        if not count:
            return Descent(problem.origin[:, None], problem.aim.wanted[:, None].to(problem.origin))
        graph = self.graph(problem.origin)
        others = problem.aim.unwanted if problem.aim.goal.targeted else problem.aim.wanted
        each = graph.shape.numel() + sum(node.shape.numel() for node in graph.nodes)
        size = max(1, _ELEMENTS // (each * _CHOICES * others.shape[1]))
        parts = []
        with full_precision(self.model.device.type):
            for part in torch.split(torch.arange(count, device=device), size):
                parts.append(self._starts(graph, take(problem.region, part), problem, part))
        points, ascended = (torch.cat(each) for each in zip(*parts, strict=True))
        owner = torch.arange(count, device=device).repeat_interleave(points.shape[1])
        inside = problem.project(points.flatten(0, 1), owner)
        return Descent(inside.view_as(points), ascended)

    def _starts(self, graph: Graph, region: Region, problem: Problem, part: Tensor) -> tuple[Tensor, Tensor]:
        """Starts (P, S, ...), and what to ascend from them (P, S, C)."""
        home, origin = self.model.device, region.origin
        bounded = Bounded.of(graph, tree_map(lambda end: end.to(home), inputs_of(region)))
        bounded.refine()
        chosen, margins = self._margins(bounded, problem, part)
        points = corners(bounded, chosen)  # (P, choices, K, ...)
        ascended = -margins[:, None].expand(-1, points.shape[1], -1, -1)
        points = points.flatten(1, 2).to(origin)
        return torch.where(points.isfinite(), points, origin[:, None]), ascended.flatten(1, 2)

    def _margins(self, bounded: Bounded, problem: Problem, part: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (P, K, C) of margins that shall get small, of the likeliest classes: where the bounds are, and the attack."""
        targeted, aim = problem.aim.goal.targeted, problem.aim
        others = (aim.unwanted if targeted else aim.wanted)[part]
        classes, outputs = others.shape[1], bounded.boxes[bounded.graph.output].lower
        if outputs.shape[1:] != (classes,):
            raise InputError(
                f"{self._name} gives outputs {tuple(outputs.shape[1:])}; the model under attack has {classes} classes"
            )
        anchor = aim.wanted[part].int().argmax(1) if targeted else problem.labels[part]
        eye = torch.eye(classes).to(problem.origin)
        margins = (eye[anchor][:, None] - eye) * (-1 if targeted else 1)  # (P, C, C); 0 for the anchor itself
        bound = bounded.backward(bounded.graph.output, margins.to(outputs)).to(others.device)
        count = min(self.classes, int(others.sum(1).amin()))
        likely = bound if targeted else -bound
        which = likely.masked_fill(~others, -torch.inf).nan_to_num(nan=0.0).topk(count, 1).indices
        rows = margins.gather(1, which[..., None].expand(-1, -1, classes))
        return rows.to(outputs), rows

    def step(self, problem: Problem, state: Descent) -> Descent:
        count, starts = state.points.shape[:2]
        owner = torch.arange(count, device=state.points.device).repeat_interleave(starts)
        points = state.points.flatten(0, 1)
        slope = problem.vjp(points, state.ascended.flatten(0, 1), owner).gradient
        size = problem.eps * (1 - problem.k / self.steps).to(problem.eps)
        region = take(problem.region, owner)
        moved = region.project(points + region.steepest(slope, size[owner], points))
        return Descent(moved.view_as(state.points), state.ascended)
