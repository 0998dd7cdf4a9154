"""The nearest input of another class, exactly: what attacks can be measured by.

For each other class t, with margins of logits f,

    least distance(x', x)   such that   f_t(x') >= f_y(x'),   x' in the input range,

is a mixed-integer programme for piecewise linear networks and l-infinity or l1 (`Programme`), and a projection on a hyperplane
for linear ones. Attacks make it small: what they find bounds the ball in which the network's values need to be bounded.

Source: Carlini, Katz, Barrett & Dill 2017, "Ground-truth adversarial examples", arXiv:1709.10207, who bisect the distance with
Reluplex; the programme is that of Tjeng, Xiao & Tedrake 2019, arXiv:1711.07356.
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
from saddlepoint.errors import CapabilityError, InputError
from saddlepoint.models.base import Classifier
from saddlepoint.propagation.bounds import Bounded, Box
from saddlepoint.propagation.graph import read
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import Minimize, ball, distance
from saddlepoint.verify.milp import Array, Places, Programme, System

_GAP = 1e-6  # of the programmes, relative
_SAME = (1e-4, 1e-6)  # distances that differ by less, relative or absolute, are one
_TIE, _MORE, _TRIES = 1e-6, 4.0, 10  # by how much the other class shall win, of the largest logit; more until it does


@dataclass(frozen=True)
class Nearest:
    """The nearest inputs of other classes, for N inputs.

    points (N, ...): the nearest that were found, which the model itself gives another class; the inputs where there is none.
    distance (N,) float64: theirs; inf where there is none. lower (N,): no input of another class is nearer. proved (N,) bool:
    both agree, to 1e-4 of the distance or 1e-6. classes (N,): the model's at the points. seconds (N,): of the proofs.

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

    Errors: `InputError` for bad input, `CapabilityError` for norms that can't be done, `ModelError` for other networks.

    >>> import torch, saddlepoint as sp
    >>> net = torch.nn.Linear(2, 2)
    >>> _ = net.weight.data.copy_(torch.tensor([[2.0, 1.0], [0.0, 0.0]])), net.bias.data.zero_()
    >>> model, x, y = sp.Model(net, bounds=(-1, 1)), torch.tensor([[0.4, 0.1]]), torch.tensor([0])
    >>> {norm: round(float(nearest(model, x, y, norm).distance), 4) for norm in ("linf", "l2", "l1", "l0")}
    {'linf': 0.3, 'l2': 0.4025, 'l1': 0.45, 'l0': 1.0}
    """
    model.check_inputs(x)
    if y.shape != (len(x),):
        raise InputError(f"y must hold one class for each of {len(x)} inputs; its shape is {tuple(y.shape)}")
    if seconds <= 0:
        raise InputError(f"seconds must be above 0; got {seconds}")
    if model.rejects:
        raise CapabilityError(
            "the model can refuse to answer; the nearest input of another class is known for classifiers only"
        )
    norm = ball(norm, math.inf).norm
    x = x.to(model.device)
    programme = Programme(read(model, x[:1]), x[:1])
    if programme.maxima and norm not in (Norm.LINF, Norm.L1):
        raise CapabilityError(f"{norm} is known for linear models; for networks it is no linear programme: take linf or l1")
    classes = len(programme.outputs.constant)
    if bool(((y < 0) | (y >= classes)).any()):
        raise InputError(f"y must hold classes from 0 to {classes - 1}; got {int(y.min())} to {int(y.max())}")
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
    proved = none | (found - lower <= torch.clamp(_SAME[0] * found, min=_SAME[1])) & found.isfinite()
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
        self.scale = _TIE * float(1 + np.abs(outputs).max())
        others = np.argsort(-outputs, kind="stable")
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
        return [self.scale * _MORE**k for k in range(_TRIES)]

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
        """No input that ties is nearer, by the programme in the ball of the best point so far; which may improve on that."""
        box = self._box()
        if seconds <= 0 or not bool((box.lower.isfinite() & box.upper.isfinite()).all()):
            return 0.0
        bounded = Bounded.of(self.programme.graph, box.lower, box.upper)
        with torch.no_grad():
            bounded.refine()
        started = time.perf_counter()
        status, bound, v = self._solved(bounded, target, 0.0, seconds)
        if status == "infeasible":
            return self.found  # nothing in the ball
        if v is not None:
            pattern = self.programme.pattern(self.programme.variables(self.programme.point(v, box)))

            def nearby() -> Iterator[Tensor | None]:
                """A little beyond the tie, by linear programmes where the pattern allows it, otherwise by a new search."""
                for margin in self._margins():
                    left = seconds - (time.perf_counter() - started)
                    beyond = self._solved(bounded, target, margin, max(left, 1.0), pattern)[2]
                    if beyond is None and left > 0:
                        beyond = self._solved(bounded, target, margin, left)[2]
                    yield None if beyond is None else self.programme.point(beyond, box)

            if bound < self.found:
                self._replayed(nearby())
        return max(bound, 0.0)

    def _box(self) -> Box:
        """The ball of the best point so far, a little widened, inside the input range."""
        low, high = self.model.bounds or (-math.inf, math.inf)
        radius = self._radius()
        return Box((self.x - radius).clamp(min=low)[None], (self.x + radius).clamp(max=high)[None])

    def _radius(self) -> float:
        precision = torch.finfo(self.x.dtype).eps * (1 + float(self.x.abs().max()))
        return self.found * (1 + 1e-5) + 4 * precision

    def _solved(
        self, bounded: Bounded, target: int, margin: float, seconds: float, pattern: dict[str, Places] | None = None
    ) -> tuple[str, float, Array | None]:
        """The programme: least distance such that the target wins by a margin."""
        system = self.programme.system(bounded.boxes, pattern)
        slope, constant = self._row(target)
        wins = sparse.csr_array(np.pad(slope, (0, system.matrix.shape[1] - len(slope)))[None])
        none = np.zeros(0)
        system = system.extended(wins, np.array([margin - constant]), np.array([math.inf]), none, none)
        system, cost = self._with_distance(system)
        return system.minimise(cost, seconds, _GAP)

    def _with_distance(self, system: System) -> tuple[System, Array]:
        """With variables d, one for l-infinity and one for each feature for l1, that hold |x' - x|, and their sum."""
        features, width = len(self.start), system.matrix.shape[1]
        spread = np.ones((features, 1)) if self.norm is Norm.LINF else sparse.eye_array(features)
        count = spread.shape[1]
        one = sparse.eye_array(features, width)
        total = np.pad(np.ones(count), (width, 0))
        rows = sparse.vstack([sparse.hstack([one, -spread]), sparse.hstack([-one, -spread]), total[None]], format="csr")
        radius = self._radius()
        high = np.concatenate([self.start, -self.start, [radius]])
        low = np.full(len(high), -math.inf)
        return system.extended(rows, low, high, np.zeros(count), np.full(count, radius)), total
