"""How nonlinearities lie between planes, for inputs in boxes: the relaxations that linear bounds are made of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from saddlepoint.errors import ModelError
from saddlepoint.propagation.sets import Box, times

if TYPE_CHECKING:
    from saddlepoint.propagation.nodes import Node

_BISECTIONS = 40
_FREE = ("relu", "leaky_relu")
_ROUNDING = 1e-6  # share of its size by which a sum of squares, say, can come out below 0


@dataclass(frozen=True)
class Planes:
    """sum_k low_k x_k + low_offset <= f(x_1, ...) <= sum_k high_k x_k + high_offset, for N boxes.

    What low_k and high_k are is the rule's affair: slopes of each element, places, matrices. Offsets (N, ...); None is 0.
    """

    low: tuple[Tensor, ...]
    low_offset: Tensor | None
    high: tuple[Tensor, ...]
    high_offset: Tensor | None


class Rule(ABC):
    """What is known of a nonlinearity over boxes."""

    free: bool = False
    """Whether its lower slope can be optimised where l < 0 < u: it may be anything between `floor` and 1."""
    floor: float = 0.0

    @abstractmethod
    def ends(self, *boxes: Box) -> Box:
        """The least and largest values."""

    @abstractmethod
    def planes(self, *boxes: Box) -> Planes:
        """A plane below and one above."""

    @abstractmethod
    def pull(self, planes: Planes, a: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Coefficients (N, R, ...) of the output as such of the inputs: the lower plane where a > 0, the upper one elsewhere.

        Lower slopes may be given for each function, (N, R, ...), by elementwise rules.
        """

    @abstractmethod
    def push(self, planes: Planes, low: Sequence[Tensor], high: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The lower and upper plane of terms (N, G, ...) that lie below and above each input; without offsets."""

    def parallel(self, *boxes: Box) -> Planes:
        """Two parallel planes, for zonotopes; constants unless something better is known."""
        ends = self.ends(*boxes)
        flat = self.planes(*boxes)
        return Planes(tuple(torch.zeros_like(one) for one in flat.low), ends.lower, flat.low, ends.upper)


def offset(planes: Planes, a: Tensor) -> Tensor | float:
    """What the planes of coefficients a (N, R, ...) add to the constant, (N, R)."""
    low = 0.0 if planes.low_offset is None else times(a.clamp(min=0), planes.low_offset)
    return low if planes.high_offset is None else low + times(a.clamp(max=0), planes.high_offset)


# ---- elementwise functions, of one or several inputs


class Elementwise(Rule):
    """Each element of the output depends on one element of each input, which are broadcast against each other."""

    def pull(self, planes: Planes, a: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Coefficients (N, R, ...) of the inputs."""
        up, down = a.clamp(min=0), a.clamp(max=0)
        return [
            _summed(torch.addcmul(up * (low if low.dim() == a.dim() else low[:, None]), down, high[:, None]), shape)
            for low, high, shape in zip(planes.low, planes.high, shapes, strict=True)
        ]

    def push(self, planes: Planes, low: Sequence[Tensor], high: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Terms below and above the output."""

        def side(slopes: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
            parts = [s[:, None].clamp(min=0) * one + s[:, None].clamp(max=0) * two
                     for s, one, two in zip(slopes, wide(slopes, first), wide(slopes, second), strict=True)]  # fmt: skip
            return parts[0] if len(parts) == 1 else parts[0] + parts[1]

        def wide(slopes: Sequence[Tensor], terms: Sequence[Tensor]) -> list[Tensor]:
            return [one.reshape(*one.shape[:2], *[1] * (s.dim() + 1 - one.dim()), *one.shape[2:])
                    for s, one in zip(slopes, terms, strict=True)]  # fmt: skip

        return side(planes.low, low, high), side(planes.high, high, low)


def aligned(*values: Tensor) -> list[Tensor]:
    """Values (N, ...) of one rank, so that they are broadcast from the last dimension on, sample by sample."""
    rank = max(value.dim() for value in values)
    return [value.reshape(len(value), *[1] * (rank - value.dim()), *value.shape[1:]) for value in values]


def _summed(a: Tensor, shape: torch.Size) -> Tensor:
    """Coefficients of a broadcast value as those of the value itself."""
    if a.shape[2:] == shape:
        return a
    extra = a.dim() - 2 - len(shape)
    a = a.sum(tuple(range(2, 2 + extra))) if extra else a
    ones = [place + 2 for place, size in enumerate(shape) if size == 1 and a.shape[place + 2] != 1]
    return a.sum(ones, keepdim=True) if ones else a


class Relu(Elementwise):
    """max(x, slope x), 0 <= slope <= 1: the chord above; below one of both pieces, whichever leaves less area."""

    free = True

    def __init__(self, slope: float = 0.0) -> None:
        self.floor = slope

    def ends(self, *boxes: Box) -> Box:
        """The function is increasing."""
        return Box(*(torch.where(end > 0, end, self.floor * end) if self.floor else end.relu()
                     for end in (boxes[0].lower, boxes[0].upper)))  # fmt: skip

    def planes(self, *boxes: Box) -> Planes:
        """The triangle (Zhang et al. 2018, arXiv:1811.00866). A second box is that whose area the lower slope goes by."""
        lower, upper, floor = boxes[0].lower, boxes[0].upper, self.floor
        between = (lower < 0) & (upper > 0)
        steep = torch.where(between, boxes[-1].upper > -boxes[-1].lower, lower >= 0)
        low = torch.where(steep, 1.0, lower.new_tensor(floor))  # two Python numbers would make it float32
        high = torch.where(between, (upper - floor * lower) / torch.where(between, upper - lower, 1), low)
        exact = torch.maximum((floor - high) * lower, upper * (1 - high))  # both ends are below, whatever the slope rounds to
        about = torch.finfo(lower.dtype)
        high_offset = torch.where(between, exact * (1 + 2 * about.eps) + about.tiny, 0)
        return Planes((low,), None, (high,), high_offset)

    def parallel(self, *boxes: Box) -> Planes:
        """The chord and its parallel through 0 (Singh et al. 2018, "Fast and effective robustness certification", thm 3.1)."""
        planes = self.planes(*boxes)
        return Planes(planes.high, None, planes.high, planes.high_offset)


@dataclass(frozen=True)
class Curve(Elementwise):
    """A function of one element.

    slope: its derivative. convex, concave: where it is so, intervals that together cover the domain. points: where it has kinks
    or is stationary. domain: what inputs must be in; nothing is known of boxes that leave it by more than rounding. pole:
    whether it is unbounded at the domain's lower end, 0, so that nothing is known of boxes that hold it. slack: how far below
    `value` the function may be.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    convex: tuple[tuple[float, float], ...] = ()
    concave: tuple[tuple[float, float], ...] = ()
    points: tuple[float, ...] = ()
    domain: tuple[float, float] = (-math.inf, math.inf)
    pole: bool = False
    slack: float = 0.0

    def ends(self, *boxes: Box) -> Box:
        """At the ends of the box, or where the function is stationary between them."""
        lower, upper, unknown = self._inside(boxes[0])
        places = [lower, upper, *(torch.full_like(lower, point).clamp(lower, upper) for point in self.points)]
        values = torch.stack([self.value(place) for place in places])
        dtype = boxes[0].lower.dtype
        least = torch.where(unknown, -torch.inf, values.amin(0).nan_to_num(-torch.inf, torch.inf, -torch.inf))
        most = torch.where(unknown, torch.inf, values.amax(0).nan_to_num(torch.inf, torch.inf, -torch.inf))
        return Box(_down(least - self.slack, dtype), -_down(-most, dtype))

    def _inside(self, box: Box) -> tuple[Tensor, Tensor, Tensor]:
        """The box's ends in float64, cut with the domain, and where nothing is known."""
        lower, upper = box.lower.double(), box.upper.double()
        unknown = lower < self.domain[0] - _ROUNDING * (upper - self.domain[0]).clamp(min=0)
        lower, upper = lower.clamp(*self.domain), upper.clamp(*self.domain)
        unknown = unknown | (lower <= 0) & (upper >= 0) if self.pole else unknown
        return torch.where(unknown, 1.0, lower), torch.where(unknown, 1.0, upper), unknown

    def planes(self, *boxes: Box) -> Planes:
        """In the middle of the box as close as lines get that touch the curve, and sound by construction; see `_below`."""
        lower, upper, unknown = self._inside(boxes[0])
        dtype = boxes[0].lower.dtype
        low, low_offset = _below(self.value, self.slope, self.convex, self._breaks(), lower, upper, dtype)
        high, high_offset = _below(_minus(self.value), _minus(self.slope), self.concave, self._breaks(), lower, upper, dtype)
        ends = self.ends(*boxes)
        good = low.isfinite() & low_offset.isfinite() & ~unknown
        good_high = high.isfinite() & high_offset.isfinite() & ~unknown
        return Planes(
            (torch.where(good, low, 0),), torch.where(good, self._less(low_offset), ends.lower),
            (torch.where(good_high, -high, 0),), torch.where(good_high, -high_offset, ends.upper),
        )  # fmt: skip

    def parallel(self, *boxes: Box) -> Planes:
        """With the chord's slope."""
        lower, upper, unknown = self._inside(boxes[0])
        dtype, ends = boxes[0].lower.dtype, self.ends(*boxes)
        slope = _chord(self.value, lower, upper).to(dtype)
        low = _offset(self.value, self.slope, self.convex, self._breaks(), lower, upper, slope)
        low = self._less(low)
        high = -_offset(_minus(self.value), _minus(self.slope), self.concave, self._breaks(), lower, upper, -slope)
        good = slope.isfinite() & low.isfinite() & high.isfinite() & ~unknown
        slope = torch.where(good, slope, 0)
        return Planes((slope,), torch.where(good, low, ends.lower), (slope,), torch.where(good, high, ends.upper))

    def _less(self, offset: Tensor) -> Tensor:
        return _down(offset.double() - self.slack, offset.dtype) if self.slack else offset

    def _breaks(self) -> tuple[float, ...]:
        inner = {end for piece in self.convex + self.concave for end in piece if math.isfinite(end)}
        return tuple(sorted(inner | set(self.points)))


Function = Callable[[Tensor], Tensor]
Pieces = tuple[tuple[float, float], ...]


def _minus(value: Function) -> Function:
    return lambda x: -value(x)


def _down(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Not above a float64 value that has been rounded to nearest, in another type."""
    value = value - 4 * torch.finfo(torch.float64).eps * value.abs().nan_to_num(0, 0, 0)
    if dtype == torch.float64:
        return value
    cast = value.to(dtype)
    return torch.where(cast.double() > value, torch.nextafter(cast, torch.full_like(cast, -torch.inf)), cast)


def _chord(value: Function, lower: Tensor, upper: Tensor) -> Tensor:
    wide = upper - lower
    return torch.where(wide > 0, (value(upper) - value(lower)) / torch.where(wide > 0, wide, 1), 0)


def _below(
    value: Function, slope: Function, convex: Pieces, breaks: Sequence[float], lower: Tensor, upper: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Slope and offset of a line below a function on [lower, upper], the highest of some in the middle.

    Those are the chord, lines from breaks to the ends, and for each convex piece the tangent that touches nearest to the middle
    among those that stay below both ends. Each is then moved until it is below: see `_offset`. All is in float64.
    """
    middle = (lower + upper) / 2
    with torch.no_grad():
        slopes = [_chord(value, lower, upper)]
        for low, high in convex:
            p, q = (torch.full_like(lower, end).clamp(lower, upper) for end in (low, high))
            for _ in range(_BISECTIONS):
                t = (p + q) / 2
                steep = slope(t)
                at, left, right = (value(x) - steep * x for x in (t, lower, upper))
                rightward = torch.where((left < at) & (left <= right), True, torch.where(right < at, False, t < middle))
                p, q = torch.where(rightward, t, p), torch.where(rightward, q, t)
            slopes.append(slope((p + q) / 2))
        for point in breaks:
            k = torch.full_like(lower, point).clamp(lower, upper)
            slopes += [_chord(value, lower, k), _chord(value, k, upper)]
        slopes = [one.to(dtype) for one in slopes]
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for one in slopes:
        offset = _offset(value, slope, convex, breaks, lower, upper, one)
        height = (one * middle + offset).nan_to_num(-torch.inf)
        if best is None:
            best = (one, offset, height)
        else:
            better = height > best[2]
            best = (
                torch.where(better, one, best[0]),
                torch.where(better, offset, best[1]),
                torch.where(better, height, best[2]),
            )
    assert best is not None
    return best[0], best[1]


def _offset(
    value: Function, slope: Function, convex: Pieces, breaks: Sequence[float], lower: Tensor, upper: Tensor, steep: Tensor
) -> Tensor:
    """The least of g(x) = f(x) - steep x on [lower, upper], or a little less.

    On concave pieces it is at an end; on a convex one between two points of a bisection on g', where a tangent is below g.
    """
    s = steep.double()
    places = [lower, upper, *(torch.full_like(lower, point).clamp(lower, upper) for point in breaks)]
    values = [value(place) for place in places]
    least = torch.stack([f - s * place for f, place in zip(values, places, strict=True)]).amin(0)
    size = torch.stack([f.abs() for f in values]).amax(0) + s.abs() * torch.maximum(lower.abs(), upper.abs())
    for low, high in convex:
        with torch.no_grad():
            p, q = (torch.full_like(lower, end).clamp(lower, upper) for end in (low, high))
            for _ in range(_BISECTIONS):
                t = (p + q) / 2
                rising = slope(t) >= s
                p, q = torch.where(rising, p, t), torch.where(rising, t, q)
        least = torch.minimum(least, value(p) - s * p + (slope(p) - s).clamp(max=0) * (q - p))
    return _down(least - 8 * torch.finfo(torch.float64).eps * size, steep.dtype)


class Product(Elementwise):
    """x y for x in X, y in Y with middles m and radii r: m_y x + m_x y - m_x m_y -+ r_x r_y.

    The means of both lower and of both upper planes of McCormick (1976), which are equally good in the middle.
    """

    def ends(self, *boxes: Box) -> Box:
        """At a corner."""
        x, y = _paired(boxes)
        corners = torch.stack([a * b for a in (x.lower, x.upper) for b in (y.lower, y.upper)])
        corners = torch.where(corners.isnan(), 0, corners)  # 0 times infinity: the other end is 0 for all there is
        return Box(corners.amin(0), corners.amax(0))

    def planes(self, *boxes: Box) -> Planes:
        """See the class; constants where an end is infinite."""
        (mx, rx), (my, ry) = (((box.lower + box.upper) / 2, (box.upper - box.lower) / 2) for box in _paired(boxes))
        at, gap = mx * my, rx * ry
        gap = gap + 8 * torch.finfo(at.dtype).eps * (at.abs() + gap)
        good = at.isfinite() & gap.isfinite()
        ends = self.ends(*boxes)
        slopes = torch.where(good, my, 0), torch.where(good, mx, 0)
        return Planes(slopes, torch.where(good, -at - gap, ends.lower), slopes, torch.where(good, gap - at, ends.upper))

    def parallel(self, *boxes: Box) -> Planes:
        """They are parallel."""
        return self.planes(*boxes)


def _paired(boxes: Sequence[Box]) -> list[Box]:
    ends = zip(aligned(*(box.lower for box in boxes)), aligned(*(box.upper for box in boxes)), strict=True)
    return [Box(lower, upper) for lower, upper in ends]


# ---- the largest of several elements


class Largest(Rule):
    """The largest of K elements of the input, such as of a pooling window.

    index (*output, K): their places; -1 for none. shape: of one input. apply: the operator, on a batch of one.
    Below it lies the element with the largest lower end; above it that one too where none can be larger, else a constant.
    """

    def __init__(self, index: Tensor, shape: torch.Size, apply: Callable[[Tensor], Tensor]) -> None:
        self.index, self.shape, self.width = index, index.shape[:-1], math.prod(shape)
        self.apply: Callable[[Tensor], Tensor] = torch.vmap(lambda one: apply(one[None])[0])

    def _elements(self, end: Tensor) -> Tensor:
        index = self.index.to(end.device)
        return torch.where(index >= 0, end.flatten(1)[:, index.clamp(min=0)], -torch.inf)

    def ends(self, *boxes: Box) -> Box:
        """The largest of the ends, by the operator itself, which is much faster than by places."""
        return Box(self.apply(boxes[0].lower), self.apply(boxes[0].upper))

    def planes(self, *boxes: Box) -> Planes:
        """low, high: a weight of 1 or 0, (N, *output), and after them the places of what they weigh."""
        lower, upper = self._elements(boxes[0].lower), self._elements(boxes[0].upper)
        least, which = lower.max(-1, keepdim=True)
        others = upper.scatter(-1, which, -torch.inf).amax(-1)
        sure = others <= least[..., 0]
        place = self.index.to(which.device).expand_as(lower).gather(-1, which)[..., 0]
        one = torch.ones_like(others)
        return Planes((one, place), None, (sure.to(one), place), torch.where(sure, 0, upper.amax(-1)))

    def pull(self, planes: Planes, a: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Each coefficient goes to the place that its output's plane weighs."""
        moved = (torch.where(a > 0, planes.low[0][:, None], planes.high[0][:, None]) * a).flatten(2)
        place = planes.low[1].flatten(1)[:, None].expand_as(moved)
        flat = moved.new_zeros(*moved.shape[:2], self.width).scatter_add(2, place, moved)
        return [flat.view(*moved.shape[:2], *shapes[0])]

    def push(self, planes: Planes, low: Sequence[Tensor], high: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The terms at the places, weighed."""
        place = planes.low[1].flatten(1)[:, None]

        def at(terms: Tensor, weight: Tensor) -> Tensor:
            flat = terms.flatten(2)
            found = flat.gather(2, place.expand(-1, flat.shape[1], -1))
            return found.view(*found.shape[:2], *self.shape) * weight[:, None]

        return at(low[0], planes.low[0]), at(high[0], planes.high[0])

    def parallel(self, *boxes: Box) -> Planes:
        """The element itself where it is sure; constants elsewhere."""
        planes, ends = self.planes(*boxes), self.ends(*boxes)
        sure = planes.high[0] > 0
        high_offset = planes.high_offset
        return Planes(planes.high, torch.where(sure, 0, ends.lower), planes.high, high_offset)


class Softmax(Rule):
    """exp(x_i) / sum_j exp(x_j) = 1 / S_i with S_i = sum_j exp(x_j - x_i), along one dimension, counted from the last.

    1 / S is convex in S: a tangent below it takes the chords of exp, a chord above it takes tangents of exp (the construction
    of Wei et al. 2023, arXiv:2303.01713). low, high: matrices (N, ..., i, j). Constants where they are better in the middle.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def ends(self, *boxes: Box) -> Box:
        """Least where x_i is low and all others are high."""
        lower, upper = (end.double().movedim(self.dim, -1) for end in (boxes[0].lower, boxes[0].upper))
        ends = Box(
            *(1 / _others(most - least).sum(-1) for most, least in (_differences(lower, upper), _differences(upper, lower)))
        )
        dtype = boxes[0].lower.dtype
        slack = 1e-12
        return Box(_down(ends.lower * (1 - slack), dtype).movedim(-1, self.dim),
                   -_down(-ends.upper * (1 + slack), dtype).movedim(-1, self.dim))  # fmt: skip

    def planes(self, *boxes: Box) -> Planes:
        """In float64; what rounding to float32 does to the matrices is put into the offsets."""
        dtype = boxes[0].lower.dtype
        lower, upper = (end.double().movedim(self.dim, -1) for end in (boxes[0].lower, boxes[0].upper))
        middle = (lower + upper) / 2
        least, most = lower[..., None, :] - upper[..., :, None], upper[..., None, :] - lower[..., :, None]  # of x_j - x_i
        itself = torch.eye(lower.shape[-1], dtype=torch.bool, device=lower.device)
        least, most = torch.where(itself, 0, least), torch.where(itself, 0, most)
        chord = torch.where(most > least, (most.exp() - least.exp()) / torch.where(most > least, most - least, 1), least.exp())
        above = least.exp() - chord * least
        point = torch.minimum((least + most) / 2, least + 1)
        tangent = point.exp()
        below = tangent * (1 - point)
        small, large = least.exp().sum(-1), most.exp().sum(-1)
        at = (small + large) / 2
        ends = self.ends(*boxes)
        ends = Box(ends.lower.movedim(self.dim, -1), ends.upper.movedim(self.dim, -1))
        bounds = torch.maximum(lower.abs(), upper.abs())

        def plane(steep: Tensor, factor: Tensor, rest: Tensor, sign: float, end: Tensor) -> tuple[Tensor, Tensor]:
            matrix = factor[..., None] * torch.where(itself, 0, steep)
            matrix = (matrix - torch.diag_embed(matrix.sum(-1))).to(dtype)
            error = 1e-11 * ((matrix.double().abs() * bounds[..., None, :]).sum(-1) + rest.abs())
            # the rounding of the matrix moves the plane by at most this over the box
            exact = factor[..., None] * torch.where(itself, 0, steep)
            exact = exact - torch.diag_embed(exact.sum(-1))
            error = error + ((matrix.double() - exact).abs() * bounds[..., None, :]).sum(-1)
            offset = rest - sign * error
            height = (matrix.double() * middle[..., None, :]).sum(-1) + offset
            good = (sign * height > sign * end.double()) & height.isfinite()
            rounded = sign * _down(sign * offset, dtype)
            return torch.where(good[..., None], matrix, 0), torch.where(good, rounded, end)

        low, low_offset = plane(chord, -1 / at**2, 2 / at - above.sum(-1) / at**2, 1.0, ends.lower)
        high, high_offset = plane(
            tangent, -1 / (small * large), 1 / small + 1 / large - below.sum(-1) / (small * large), -1.0, ends.upper
        )
        return Planes((low,), low_offset.movedim(-1, self.dim), (high,), high_offset.movedim(-1, self.dim))

    def pull(self, planes: Planes, a: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Products with the matrices."""
        moved = a.movedim(self.dim, -1)[..., None, :]
        found = moved.clamp(min=0) @ planes.low[0][:, None] + moved.clamp(max=0) @ planes.high[0][:, None]
        return [found[..., 0, :].movedim(-1, self.dim)]

    def push(self, planes: Planes, low: Sequence[Tensor], high: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Products with the matrices' positive and negative parts."""
        below, above = (one[0].movedim(self.dim, -1)[..., None] for one in (low, high))

        def side(matrix: Tensor, first: Tensor, second: Tensor) -> Tensor:
            found = matrix[:, None].clamp(min=0) @ first + matrix[:, None].clamp(max=0) @ second
            return found[..., 0].movedim(-1, self.dim)

        return side(planes.low[0], below, above), side(planes.high[0], above, below)


def _differences(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return high[..., None, :], low[..., :, None]


def _others(difference: Tensor) -> Tensor:
    itself = torch.eye(difference.shape[-1], dtype=torch.bool, device=difference.device)
    return torch.where(itself, 0, difference).exp()


# ---- which operator has which rule


def _sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def _gelu_slope(x: Tensor) -> Tensor:
    return (1 + torch.erf(x / math.sqrt(2))) / 2 + x * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    root, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(root * (x + cubic * x**3))
    return (1 + t) / 2 + x / 2 * (1 - t.square()) * root * (1 + 3 * cubic * x.square())


def _logistic_slope(x: Tensor) -> Tensor:
    return x.sigmoid() * (-x).sigmoid()


def _silu_slope(x: Tensor) -> Tensor:
    return x.sigmoid() * (1 + x * (-x).sigmoid())


_ALL, _LEFT, _RIGHT = ((-math.inf, math.inf),), ((-math.inf, 0.0),), ((0.0, math.inf),)
_BELL, _SWISH, _TANH_BELL = math.sqrt(2), 2.3993572805154, 1.418504008790828


def _outside(turn: float) -> Pieces:
    return ((-math.inf, -turn), (turn, math.inf))


_CURVES: Mapping[str, Curve] = {
    "sigmoid": Curve(torch.sigmoid, _logistic_slope, _LEFT, _RIGHT),
    "tanh": Curve(torch.tanh, lambda x: 1 - x.tanh().square(), _LEFT, _RIGHT),
    "erf": Curve(torch.erf, lambda x: 2 / math.sqrt(math.pi) * torch.exp(-x.square()), _LEFT, _RIGHT),
    "atan": Curve(torch.atan, lambda x: 1 / (1 + x.square()), _LEFT, _RIGHT),
    "silu": Curve(functional.silu, _silu_slope, ((-_SWISH, _SWISH),), _outside(_SWISH), (-1.2784645427610738,)),
    "gelu": Curve(functional.gelu, _gelu_slope, ((-_BELL, _BELL),), _outside(_BELL), (-0.7517915246935645,)),
    "exp": Curve(torch.exp, torch.exp, _ALL),
    "expm1": Curve(torch.expm1, torch.exp, _ALL),
    "log1p": Curve(torch.log1p, lambda x: 1 / (1 + x), (), ((-1.0, math.inf),), domain=(-1.0, math.inf)),
    "log": Curve(torch.log, torch.reciprocal, (), _RIGHT, domain=(0.0, math.inf)),
    "sqrt": Curve(torch.sqrt, lambda x: 0.5 * x.rsqrt(), (), _RIGHT, domain=(0.0, math.inf)),
    "rsqrt": Curve(torch.rsqrt, lambda x: -0.5 * x ** (-1.5), _RIGHT, domain=(0.0, math.inf), pole=True),
    "reciprocal": Curve(torch.reciprocal, lambda x: -1 / x.square(), _RIGHT, _LEFT, pole=True),
    "square": Curve(torch.square, lambda x: 2 * x, _ALL, points=(0.0,)),
    "abs": Curve(torch.abs, _sign, _ALL, points=(0.0,)),
}


def rule(node: Node) -> Rule:
    """The rule of an operator of ATen. Errors: `ModelError`, which names it and its layer, where there is none."""
    op, arguments = node.op, node.arguments
    place = f"(at {node.where})"
    if op in ("relu", "leaky_relu", "prelu", "_prelu_kernel"):
        given: Any = 0.0 if op == "relu" else arguments[1] if len(arguments) > 1 else 0.01
        if isinstance(given, Tensor):
            if given.numel() != 1:
                raise ModelError(f"{op} {place} has a slope for each channel: bounds are known for one slope")
            given = float(given)
        if not 0 <= given <= 1:
            raise ModelError(f"{op} {place} has slope {given}: bounds are known for slopes in [0, 1]")
        return Relu(given)
    if op == "gelu" and (node.settings.get("approximate", arguments[1] if len(arguments) > 1 else "none")) == "tanh":
        return Curve(lambda x: functional.gelu(x, approximate="tanh"), _gelu_tanh_slope, ((-_TANH_BELL, _TANH_BELL),),
                     _outside(_TANH_BELL), (-0.7524614220710162,))  # fmt: skip
    if op in ("clamp", "hardtanh", "clamp_min", "clamp_max", "relu6"):
        return _clamp(op, arguments, node.settings, place)
    if op == "elu":
        return _elu(arguments, node.settings, place)
    if op == "softplus":
        return _softplus(arguments, node.settings, place)
    if op == "pow":
        return _power(arguments, place)
    if op == "product":
        return Product()
    if op in ("max_pool2d_with_indices", "amax", "max"):
        return Largest(_windows(node, place), node.like[0].shape[1:], node.apply)
    if op == "_softmax":
        if int(arguments[1]) % node.rank < node.rank - len(node.like[0].shape[1:]):
            raise ModelError(f"softmax {place} is over the batch: no bounds are known")
        return Softmax(int(arguments[1]) - (node.rank if arguments[1] >= 0 else 0))
    if op not in _CURVES:
        raise ModelError(f"no bounds are known for the operator {op} {place}")
    return _CURVES[op]


def _clamp(op: str, arguments: Sequence[Any], settings: Mapping[str, Any], place: str) -> Curve:
    if any(
        isinstance(end, str) or (isinstance(end, Tensor) and end.numel() > 1) for end in (*arguments[1:], *settings.values())
    ):
        raise ModelError(f"{op} {place} has ends that aren't one number each: no bounds are known")
    if op == "relu6":
        low, high = 0.0, 6.0
    elif op == "hardtanh":
        low, high = (float(arguments[1]) if len(arguments) > 1 else -1.0), (float(arguments[2]) if len(arguments) > 2 else 1.0)
    else:
        ends = dict(zip(("min", "max") if op == "clamp" else (op[6:],), arguments[1:], strict=False)) | dict(settings)
        low, high = (float(end if end is not None else default)
                     for end, default in ((ends.get("min"), -math.inf), (ends.get("max"), math.inf)))  # fmt: skip
    middle = (low + high) / 2 if math.isfinite(low) and math.isfinite(high) else -high if math.isfinite(high) else math.inf
    middle = -math.inf if low == -math.inf and math.isfinite(high) else middle
    return Curve(
        lambda x: x.clamp(low, high),
        lambda x: ((x >= low) & (x <= high)).to(x),
        ((-math.inf, middle),) if middle > -math.inf else (),
        ((middle, math.inf),) if middle < math.inf else (),
        tuple(end for end in (low, high) if math.isfinite(end)),
    )


def _elu(arguments: Sequence[Any], settings: Mapping[str, Any], place: str) -> Curve:
    given = dict(zip(("alpha", "scale", "input_scale"), arguments[1:], strict=False)) | dict(settings)
    alpha, scale, inside = (float(given.get(key, 1)) for key in ("alpha", "scale", "input_scale"))
    if scale <= 0 or inside <= 0 or alpha < 0:
        raise ModelError(f"elu {place} has alpha {alpha} and scales {scale}, {inside}: bounds are known for positive ones")
    convex = alpha * inside <= 1
    return Curve(
        lambda x: scale * torch.where(x > 0, x, alpha * torch.expm1(inside * x.clamp(max=0))),
        lambda x: scale * torch.where(x > 0, 1.0, alpha * inside * torch.exp(inside * x.clamp(max=0))),
        _ALL if convex else _LEFT,
        () if convex else _RIGHT,
        (0.0,),
    )


def _softplus(arguments: Sequence[Any], settings: Mapping[str, Any], place: str) -> Curve:
    given = dict(zip(("beta", "threshold"), arguments[1:], strict=False)) | dict(settings)
    beta, threshold = float(given.get("beta", 1)), float(given.get("threshold", 20))
    if beta <= 0 or threshold < 20:
        raise ModelError(
            f"softplus {place} has beta {beta} and threshold {threshold}: bounds are known for beta > 0 and 20 or more"
        )
    # beyond its threshold PyTorch takes x itself, which is less by at most 2.1e-9 / beta
    return Curve(lambda x: functional.softplus(x, beta, 1e9), lambda x: (beta * x).sigmoid(), _ALL, slack=2.1e-9 / beta)


def _power(arguments: Sequence[Any], place: str) -> Curve:
    n = arguments[1]
    if isinstance(n, Tensor) and n.numel() == 1:
        n = n.item()
    if not isinstance(n, int | float):
        raise ModelError(f"pow {place} has an exponent that isn't one number: no bounds are known")
    if n == 2:
        return _CURVES["square"]
    if n < 0:
        return Curve(lambda x: x**n, lambda x: n * x ** (n - 1), _RIGHT, domain=(0.0, math.inf), pole=True)
    if n != int(n):
        convex = n > 1
        return Curve(lambda x: x**n, lambda x: n * x ** (n - 1), _RIGHT if convex else (), () if convex else _RIGHT,
                     domain=(0.0, math.inf))  # fmt: skip
    even = int(n) % 2 == 0
    return Curve(lambda x: x**n, lambda x: n * x ** (n - 1), _ALL if even else _RIGHT, () if even else _LEFT, (0.0,))


def _windows(node: Node, place: str) -> Tensor:
    """The places that each output is the largest of, (*output, K)."""
    shape = node.like[0].shape[1:]
    places = torch.arange(math.prod(shape)).view(shape)
    arguments = node.arguments
    if node.op != "max_pool2d_with_indices":
        given = arguments[1] if len(arguments) > 1 else node.settings.get("dim", ())
        dims = [given] if isinstance(given, int) else list(given)
        dims = [dim - node.rank if dim >= 0 else dim for dim in dims] or list(range(-len(shape), 0))
        if any(-dim > len(shape) for dim in dims):
            raise ModelError(f"{node.op} {place} is over the batch: no bounds are known")
        moved = places.movedim(dims, list(range(-len(dims), 0)))
        return moved.flatten(-len(dims)).reshape(*node.shape, -1)
    kernel, stride, padding, dilation = (
        _pair(arguments[i]) if len(arguments) > i and arguments[i] not in ([], ()) else None for i in (1, 2, 3, 4)
    )
    assert kernel is not None
    if len(shape) != 3:
        raise ModelError(f"{node.op} {place} is of values without a batch: no bounds are known")
    stride, padding, dilation = stride or kernel, padding or (0, 0), dilation or (1, 1)
    pads = []
    for axis in (1, 0):  # the last dimension first; enough after the end for as many windows as there are
        need = (node.shape[axis + 1] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        pads += [padding[axis], max(0, need - shape[axis + 1] - padding[axis])]
    wide = functional.pad(places, pads, value=-1)
    for axis in (0, 1):
        rows = torch.arange(node.shape[axis + 1])[:, None] * stride[axis] + torch.arange(kernel[axis]) * dilation[axis]
        at = 1 + axis * 2
        wide = wide.index_select(at, rows.flatten()).reshape(*wide.shape[:at], *rows.shape, *wide.shape[at + 1 :])
    return wide.movedim(2, 3).flatten(3)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))
