"""The nearest input of another class, exactly: what attacks can be measured by.

With logits f and the class y, that is for each other class t

    least distance(x', x)   such that   f_t(x') >= f_y(x'),   x' in the input range.

For linear models it is a projection on a hyperplane, in closed form. For piecewise linear networks an attack finds a first
point, at distance r, and the mixed-integer programme (`Programme`) of

    least f_y(x') - f_t(x')   such that   distance(x', x) <= (1 - delta) r

proves that there is no nearer one, or finds one, whose activation pattern's nearest point, by a linear programme, is the next.
That is much faster than the programme of the distance itself, in which every feature has constraints.

Source: Carlini, Katz, Barrett & Dill 2017, "Ground-truth adversarial examples", arXiv:1709.10207, who bisect the distance with
Reluplex, from what an attack found; the programme is that of Tjeng, Xiao & Tedrake 2019, arXiv:1711.07356.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.engine import Attack
from saddlepoint.engine.source import check_labels
from saddlepoint.errors import CapabilityError, InputError
from saddlepoint.models.base import Classifier
from saddlepoint.propagation.bounds import Bounded, Box
from saddlepoint.propagation.graph import Graph, read
from saddlepoint.propagation.methods import check_model
from saddlepoint.taxonomy import Access, Norm
from saddlepoint.threats import Minimize, ball, distance
from saddlepoint.verify.milp import Array, Programme, System

_GAP = 1e-6  # of the programmes, relative
_SHORTER = (2e-4, 2e-3, 2e-2, 2e-1)  # by how much less than what was found distances are searched: more where that fails
_SAME = 1e-3  # distances that differ by less, relatively, are one
_TOLERANCE = 1e-6  # of margins, of the largest logit: what HiGHS may miss
_TIE, _MORE, _TRIES = 1e-7, 4.0, 12  # by how much the other class shall win, of the largest logit; more until it does
_STEPS, _HALVINGS = 20, 12  # of the ascent on slopes; of the bisection of radii that bounds prove


@dataclass(frozen=True)
class Nearest:
    """The nearest inputs of other classes, for N inputs.

    points (N, ...): the nearest that were found, which the model itself gives another class; the inputs where there is none.
    distance (N,) float64: theirs; inf where there is none. lower (N,): no input of another class is nearer. proved (N,) bool:
    both agree, to a thousandth. classes (N,): the model's at the points. seconds (N,): of the proofs.

    lower holds for the network in exact arithmetic and up to the solver's tolerances (see `Programme`); the model's own
    arithmetic can give a tie to either class.
    """

    points: Tensor
    distance: Tensor
    lower: Tensor
    proved: Tensor
    classes: Tensor
    seconds: Tensor
    norm: Norm

    def __len__(self) -> int:
        return len(self.distance)

    def __str__(self) -> str:
        found = self.distance[self.distance.isfinite()]
        mean = f"mean {self.norm} distance {float(found.mean()):.4g}" if len(found) else "none found"
        return f"nearest inputs of another class for {len(self)}: {mean}, {int(self.proved.sum())} proved to be the nearest"


def nearest(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    norm: Norm | str = "linf",
    *,
    seconds: float = 60.0,
    attack: Attack | str = "minimal",
    seed: int = 0,
) -> Nearest:
    """The nearest input of another class to each of x (N, ...), classes y (N,), inside the model's input range.

    For tiny networks of affine operators, ReLUs, leaky ReLUs and max pooling, in linf and l1; for linear models in every norm.
    seconds: for each input, shared by the classes; where they aren't enough, `proved` is False and `lower` what is known.
    attack: what is tried first, since a smaller ball is searched faster; seed: its own.

    Errors: `InputError` for bad input, `CapabilityError` for norms that can't be done, random models and those whose weights
    aren't known, `ModelError` for other networks.

    >>> import torch, saddlepoint as sp
    >>> net = torch.nn.Linear(2, 2)
    >>> _ = net.weight.data.copy_(torch.tensor([[2.0, 1.0], [0.0, 0.0]])), net.bias.data.zero_()
    >>> model, x, y = sp.Model(net, bounds=(-1, 1)), torch.tensor([[0.4, 0.1]]), torch.tensor([0])
    >>> {norm: round(float(nearest(model, x, y, norm).distance), 4) for norm in ("linf", "l2", "l1", "l0")}
    {'linf': 0.3, 'l2': 0.4025, 'l1': 0.45, 'l0': 1.0}
    """
    model.require(Access.PARAMETERS, "nearest")
    model.check_inputs(x)
    if not seconds > 0:
        raise InputError(f"seconds must be above 0; got {seconds}")
    if model.rejects:
        raise CapabilityError(
            "the model can refuse to answer; the nearest input of another class is known for classifiers only"
        )
    norm = ball(norm, math.inf).norm
    if not len(x):
        none = torch.zeros(0, dtype=torch.float64)
        return Nearest(x, none, none, none > 0, model.predict(x), none, norm)
    y = check_labels(y, len(x), check_model(model, x))
    x = x.to(model.device)
    programme = Programme(read(model, x[:1]), x[:1])
    if programme.maxima and norm not in (Norm.LINF, Norm.L1):
        raise CapabilityError(f"{norm} is known for linear models; for networks it is no linear programme: take linf or l1")
    points, before = x.clone(), model.predict(x)
    found = torch.full((len(x),), math.inf, dtype=torch.float64)
    found[(before != y.to(x.device)).cpu()] = 0
    right = (found > 0).nonzero()[:, 0]
    if programme.maxima and len(right):  # what an attack finds is a ball to search in
        tried = run_attack(model, x[right], y[right], attack, Minimize(norm), seed=seed)
        fooled = tried.success.cpu()
        points[right[fooled]] = tried.adversarial[fooled].to(x)
        found[right[fooled]] = tried.distances[norm.value][fooled].double().cpu()
    lower, took = torch.zeros_like(found), torch.zeros_like(found)
    for i in right.tolist():
        started = time.perf_counter()
        search = _Search(model, programme, x[i], int(y[i]), norm, points[i], float(found[i]), started + seconds)
        lower[i] = search.run()
        points[i], found[i] = search.point, search.found
        took[i] = time.perf_counter() - started
    none = found.isinf() & lower.isinf()
    proved = none | (found - lower <= _SAME * found) & found.isfinite()
    return Nearest(points, found, lower, proved, model.predict(points), took, norm)


class _Search:
    """For one input: the best point so far, and what improves it."""

    def __init__(
        self,
        model: Classifier,
        programme: Programme,
        x: Tensor,
        y: int,
        norm: Norm,
        point: Tensor,
        found: float,
        deadline: float,
    ) -> None:
        self.model, self.programme, self.x, self.y, self.norm = model, programme, x, y, norm
        self.point, self.found, self.deadline = point, found, deadline
        self.start: Array = x.detach().cpu().double().reshape(-1).numpy()
        outputs = programme.outputs(programme.variables(x))
        self.scale = float(1 + np.abs(outputs).max())
        self.tolerance = _TOLERANCE * self.scale
        others = np.argsort(outputs, kind="stable")  # what is proved fast leaves its time to the rest
        self.targets: list[int] = [int(t) for t in others if t != y]

    def run(self) -> float:
        """A lower bound of the distance; the point and its distance are in `point` and `found`."""
        least = math.inf
        for place, target in enumerate(self.targets):
            if self.programme.maxima:
                share = (self.deadline - time.perf_counter()) / (len(self.targets) - place)
                least = min(least, self._network(target, share))
            else:
                least = min(least, self._hyperplane(target))
        if self.programme.maxima and least < (1 - _SAME) * self.found:  # any ball of these norms lies in that of l-infinity
            least = max(least, proved_radius(self.programme.graph, self.x, self.y, self.model.bounds, self.found))
        return min(least, self.found)

    def _replayed(self, points: Iterator[Tensor | None]) -> None:
        """Keep the first of these that the model itself gives another class, if it is the nearest so far."""
        for point in points:
            if point is not None and int(self.model.predict(point[None])) != self.y:
                size = float(distance(point[None], self.x[None], self.norm))
                if size < self.found:
                    self.point, self.found = point, size
                return

    def _margins(self) -> list[float]:
        """By how much the other class shall win: so little that the distance hardly changes, and more where a tie remains."""
        return [self.scale * _TIE * _MORE**k for k in range(_TRIES)]

    def _row(self, target: int) -> tuple[Array, float]:
        """The logit of the target less that of the class, as coefficients of the variables and a constant."""
        row = torch.zeros(len(self.programme.outputs.constant), dtype=torch.float64)
        row[target], row[self.y] = 1, -1
        return self.programme.objective(row)

    # ---- linear models

    def _hyperplane(self, target: int) -> float:
        """The distance to where a linear model ties, in closed form, in every norm and inside the input range."""
        slope, constant = self._row(target)
        origin = self.x[None].cpu().double()
        gradient = torch.from_numpy(slope).view_as(origin)
        gain = -float(slope @ self.start + constant)
        region = ball(self.norm, math.inf).around(origin, self.model.bounds)

        def moved(gain: float) -> Tensor | None:
            """The nearest input where the margin has grown so far; None where none in the range has."""
            move = region.reach(gradient, torch.tensor([gain], dtype=torch.float64), origin)
            return origin + move if float((gradient * move).sum()) >= gain * (1 - 1e-9) else None

        tie = moved(gain)
        if tie is None:
            return math.inf
        if (size := float(region.distance(tie))) < self.found:
            beyond = (moved(gain + margin) for margin in self._margins())
            self._replayed(None if one is None else self._into(one[0]) for one in beyond)
        return size

    def _into(self, point: Tensor) -> Tensor:
        low, high = self.model.bounds or (-math.inf, math.inf)
        return point.to(self.x).clamp(low, high)

    # ---- piecewise linear networks

    def _network(self, target: int, seconds: float) -> float:
        """No input for which the target wins is nearer; nearer ones that are found on the way are kept."""
        ends = time.perf_counter() + seconds
        for shorter in _SHORTER:
            while (left := ends - time.perf_counter()) > 0:
                before, radius = self.found, (1 - shorter) * self.found
                if self._none_within(radius, target, left):
                    return radius
                if not self.found < before:
                    break
        return 0.0

    def _none_within(self, radius: float, target: int, seconds: float) -> bool:
        """Whether it is proved that the target wins nowhere in this ball; what is found there is kept if it is nearer."""
        box = _ball(self.x, radius, self.model.bounds)
        if not bool((box.lower.isfinite() & box.upper.isfinite()).all()):
            return False
        bounded = Bounded.of(self.programme.graph, box.lower, box.upper)
        row = torch.zeros(1, 1, len(self.programme.outputs.constant)).to(self.x)
        row[..., self.y], row[..., target] = 1, -1
        with torch.no_grad():
            bounded.refine(_STEPS)
        if float(bounded.lowest(self.programme.graph.output, row, _STEPS)) > self.tolerance:
            return True
        system, (cost, constant) = self.programme.system(bounded.boxes), self._row(target)
        if self.norm is not Norm.LINF:
            system, _ = self._with_distance(system, radius)
        status, bound, v = system.minimise(-cost, seconds, _GAP)
        if status == "infeasible" or bound - constant > self.tolerance:
            return True
        if v is not None:
            self._replayed(self._beyond(target, v, bounded, seconds))
        return False

    def _beyond(self, target: int, v: Array, bounded: Bounded, seconds: float) -> Iterator[Tensor]:
        """The nearest points with the same activation pattern where the target wins, by more and more; and v itself."""
        box = bounded.boxes[self.programme.graph.input]
        pattern = self.programme.pattern(self.programme.variables(self.programme.point(v, box)))
        system, (slope, constant) = self.programme.system(bounded.boxes, pattern), self._row(target)
        system, size = self._with_distance(system, math.inf)
        wins, none = sparse.csr_array(np.pad(slope, (0, len(size) - len(slope)))[None]), np.zeros(0)
        for margin in self._margins():
            nearer = system.extended(wins, np.array([margin - constant]), np.array([math.inf]), none, none)
            found = nearer.minimise(size, seconds, _GAP)[2]
            if found is not None:
                yield self.programme.point(found, box)
        yield self.programme.point(v, box)

    def _with_distance(self, system: System, radius: float) -> tuple[System, Array]:
        """With variables d, one for l-infinity and one for each feature for l1, that hold |x' - x|, and their sum <= radius."""
        features, width = len(self.start), system.matrix.shape[1]
        spread = np.ones((features, 1)) if self.norm is Norm.LINF else sparse.eye_array(features)
        count = spread.shape[1]
        one = sparse.eye_array(features, width)
        total = np.pad(np.ones(count), (width, 0))
        rows = sparse.vstack([sparse.hstack([one, -spread]), sparse.hstack([-one, -spread]), total[None]], format="csr")
        high = np.concatenate([self.start, -self.start, [radius]])
        low = np.full(len(high), -math.inf)
        return system.extended(rows, low, high, np.zeros(count), np.full(count, math.inf)), total


def proved_radius(graph: Graph, x: Tensor, y: int, bounds: tuple[float, float] | None, upto: float, steps: int = 0) -> float:
    """The largest l-infinity radius, up to a limit, around x (...) in which linear bounds prove class y, by bisection.

    bounds: the input range. steps: of ascent on slopes, 0 for CROWN's (see `Bounded`). 0 where neither limits the ball.
    """
    upto = min(upto, bounds[1] - bounds[0] if bounds is not None else math.inf)
    if math.isinf(upto):
        return 0.0
    classes = math.prod(next(node.shape for node in graph.nodes if node.name == graph.output))
    rows = (torch.eye(classes)[y] - torch.eye(classes))[torch.arange(classes) != y].to(x)
    low, high = 0.0, upto
    for trial in range(_HALVINGS):
        middle = upto if trial == 0 else (low + high) / 2
        box = _ball(x, middle, bounds)
        bounded = Bounded.of(graph, box.lower, box.upper)
        with torch.no_grad():
            bounded.refine(steps)
        holds = bool((bounded.lowest(graph.output, rows[None], steps) > 0).all())
        low, high = (middle, high) if holds else (low, middle)
        if low == upto:
            break
    return low


def _ball(x: Tensor, radius: float, bounds: tuple[float, float] | None) -> Box:
    """Inputs (1, ...) within this distance in l-infinity and in the input range."""
    low, high = bounds or (-math.inf, math.inf)
    return Box((x - radius).clamp(min=low)[None], (x + radius).clamp(max=high)[None])
