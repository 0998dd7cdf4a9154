"""What the adversary may do: norm balls around each input, cut with the input range, a mask and a grid.

A `Threat` is a description (`Linf(8 / 255)`); `threat.around(x, bounds)` binds it to a batch and gives a `Region`, which
projects, takes steepest-ascent steps, draws random points and decides membership. Membership is exact in the
arithmetic of the tensors' own dtype, so a projected point never leaves the ball by a rounding error.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from saddlepoint.errors import CapabilityError, InputError
from saddlepoint.rng import Keys
from saddlepoint.taxonomy import Norm
from saddlepoint.trees import SHARED, rows

Bounds = tuple[float, float] | None

_SLACK = 1.0 - 2.0**-20  # l1 and l2 projections aim inside by this factor, so that rounding cannot lead out


def distance(points: Tensor, origin: Tensor, norm: Norm | str, *, per: str = "feature") -> Tensor:
    """Distance of each point (B, ...) from its origin, as (B,) float64, summed in float64.

    `per="pixel"` makes l0 count pixels (any channel changed, channels first) instead of features.
    """
    delta = points.double() - origin.double()
    delta = delta.flatten(1) if per == "feature" else _per_pixel(delta)
    match Norm(norm):
        case Norm.LINF:
            return delta.abs().amax(1) if delta.shape[1] else delta.new_zeros(len(delta))
        case Norm.L2:
            return _norm(delta, 2)
        case Norm.L1:
            return _norm(delta, 1)
        case Norm.L0:
            return (delta != 0).sum(1).double()


def size(eps: float | None) -> str:
    """An eps: 0.1, 8/255 (where that is what was meant), 12; a dash where there is none."""
    if eps is None or not math.isfinite(eps):
        return "–"
    level = eps * 255
    is_short = math.isclose(float(f"{eps:.3g}"), eps, rel_tol=1e-5)
    if not is_short and 0.5 < level < 255 and math.isclose(level, round(level), rel_tol=1e-5):
        return f"{round(level)}/255"
    return f"{eps:.4g}"


def _norm(delta: Tensor, order: float) -> Tensor:
    """Norms of rows (B, D), summed in float64."""
    norm: Tensor = torch.linalg.vector_norm(delta, ord=order, dim=1, dtype=torch.float64)
    return norm


def _per_pixel(delta: Tensor) -> Tensor:
    """Largest absolute change over the channels of each pixel, (B, H*W)."""
    if delta.dim() != 4:
        raise InputError(f'per="pixel" needs images (N, C, H, W); the inputs have shape {tuple(delta.shape)}')
    return delta.abs().amax(1).flatten(1)


@dataclass(frozen=True)
class Region:
    """A threat bound to a batch: the feasible set S(x) of every sample.

    `lower` and `upper` (B, ...) hold the input range, the mask, the grid and, for l-infinity, the ball itself, with
    every end moved inwards until |end - x| <= eps holds in the dtype's own arithmetic. Subtraction rounds
    monotonically, so all that lies between the ends is inside too, and l-infinity projection is one clamp.
    """

    threat: Threat = field(metadata=SHARED)
    origin: Tensor
    eps: Tensor  # (B,) float64
    lower: Tensor
    upper: Tensor
    bounds: tuple[float, float] = field(default=(-math.inf, math.inf), metadata=SHARED)  # of the input, on the grid

    def without_ball(self) -> Region:
        """The same sets with eps = inf: only the input range and the mask are left."""
        fixed = (self.lower == self.upper) & (self.lower == self.origin)
        low, high = (torch.where(fixed, self.origin, torch.full_like(self.origin, end)) for end in self.bounds)
        return replace(self, eps=torch.full_like(self.eps, math.inf), lower=low, upper=high)

    def project(self, points: Tensor) -> Tensor:
        """The nearest feasible points (in l2; for l-infinity in every norm), exactly inside."""
        return self.threat.project_into(self, points)

    def steepest(self, gradient: Tensor, size: Tensor, points: Tensor) -> Tensor:
        """The displacement of norm `size` (B,) that increases a function with this gradient most."""
        return self.threat.steepest_in(self, gradient, size, points)

    def reach(self, gradient: Tensor, gain: Tensor, points: Tensor) -> Tensor:
        """The smallest displacement from `points` along which a linear function with this gradient changes by `gain` (B,).

        Smallest in the threat's norm, inside [lower, upper]: the projection on a hyperplane that meets the box. Where the box
        does not hold enough, all of what it holds.
        """
        sign = rows(torch.where(gain < 0, -1.0, 1.0).to(gradient.dtype), gradient)
        slope = gradient * sign
        room = torch.where(slope >= 0, self.upper - points, points - self.lower).clamp(min=0)
        weight = slope.flatten(1).abs().double()
        room = torch.where(weight > 0, room.flatten(1).double(), torch.zeros_like(weight))
        size = self.threat.reach_in(weight, room, gain.abs().double(), tuple(gradient.shape[1:]))
        return size.view(gradient.shape).to(gradient.dtype) * slope.sign()

    def extreme(self, gradient: Tensor) -> Tensor:
        """The point of the set that a linear function with this gradient likes most. Needs a finite eps."""
        return self.threat.extreme_in(self, gradient)

    def within(self, eps: Tensor) -> Region:
        """The same sets with radius eps (B,) where that is smaller."""
        radius = torch.minimum(eps.double(), self.eps)
        lower, upper = self.lower, self.upper
        if self.threat.norm is Norm.LINF:
            lower, upper = self.threat.tighten(self.origin, radius, lower, upper)
        return replace(self, eps=radius, lower=lower, upper=upper)

    def random(self, keys: Keys) -> Tensor:
        """A point drawn uniformly from the ball, then projected into the input range."""
        if bool(torch.isinf(self.eps).any()):
            raise CapabilityError("a random point needs a ball of finite size: give the threat a finite eps")
        return self.project((self.origin + self.threat.draw_in(self, keys)).to(self.origin.dtype))

    def snap(self, points: Tensor) -> Tensor:
        """The nearest points on the threat's grid that stay feasible; the points themselves without a grid."""
        return points if self.threat.grid is None else self.threat.snap_in(self, points)

    def contains(self, points: Tensor) -> Tensor:
        """Which points (B, ...) are feasible, exactly: (B,) bool. NaN never is."""
        inside = ((points >= self.lower) & (points <= self.upper)).flatten(1).all(1)
        if self.threat.norm is not Norm.LINF:
            inside &= self.distance(points) <= self.eps
        if self.threat.grid is not None:
            inside &= (_on_grid(points, self.origin, self.threat.grid) == points).flatten(1).all(1)
        return inside

    def distance(self, points: Tensor) -> Tensor:
        """Distance from the origins in the threat's norm, (B,) float64."""
        return self.threat.distance(points, self.origin)


@dataclass(frozen=True, eq=False)
class Threat(ABC):
    """Perturbations of at most `eps` in a norm, inside the input range.

    eps: a number >= 0 or one per sample, in the units of the model's inputs.
    mask: bool, shape of one input (or (N, ...)); features where it is False must not move.
    grid: spacing of the values that inputs may take (1/255 for 8-bit images); inputs must lie on it, and so do results.
        `Region.project` ignores it, so that small steps add up; `Region.snap` goes on to the grid.
    """

    eps: float | Sequence[float] | Tensor
    mask: Tensor | None = None
    grid: float | None = None

    norm: ClassVar[Norm]

    @property
    def minimizes(self) -> bool:
        """Whether this asks for the smallest perturbation rather than one within a budget."""
        return not isinstance(self.eps, Tensor) and self.eps == math.inf

    def __post_init__(self) -> None:
        try:
            given = torch.as_tensor(self.eps, dtype=torch.float64, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"eps must be a number or one per sample; got {self.eps!r}") from None
        if given.dim() > 1:
            raise InputError(f"eps must be a number or one per sample (N,); its shape is {tuple(given.shape)}")
        object.__setattr__(self, "eps", tuple(given.tolist()) if given.dim() else given.item())
        for index, value in enumerate(given.view(-1).tolist()):
            if math.isnan(value) or value < 0:
                raise InputError(f"eps{f'[{index}]' if given.dim() else ''} must be >= 0; it is {value}")
        if self.grid is not None and not 0 < self.grid < math.inf:
            raise InputError(f"grid is the spacing of allowed values, such as 1/255; got {self.grid}")
        if self.mask is not None and not (isinstance(self.mask, Tensor) and self.mask.dtype == torch.bool):
            found = self.mask.dtype if isinstance(self.mask, Tensor) else type(self.mask).__name__
            raise InputError(f"mask must be a bool tensor (True = may move); got {found}")

    @property
    def largest_eps(self) -> float:
        """eps, or the largest where every sample has its own."""
        return max(self.eps) if isinstance(self.eps, tuple) else float(self.eps)  # type: ignore[arg-type]  # __post_init__ leaves numbers and tuples only

    def oversized(self, bounds: tuple[float, float] | None) -> str:
        """A note where an l-infinity eps covers the whole input range, since then it was meant in other units; else empty."""
        if bounds is None or self.norm is not Norm.LINF or self.minimizes or self.largest_eps < bounds[1] - bounds[0]:
            return ""
        return f"eps = {self.largest_eps:g} covers the whole input range {bounds}: is it meant in 1/255?"

    def settings(self) -> dict[str, object]:
        """What defines this threat, ready for JSON (a mask by its shape and hash)."""
        mask = None
        if self.mask is not None:
            data = self.mask.detach().cpu().contiguous()
            digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]
            mask = {"shape": list(data.shape), "free": int(data.sum()), "sha256": digest}
        name, eps = (type(self).__name__, self.eps) if not self.minimizes else ("Minimize", None)
        return {"name": name, "norm": self.norm.value, "eps": eps, "mask": mask, "grid": self.grid}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Threat) and self.settings() == other.settings()

    def __hash__(self) -> int:
        return hash(repr(self.settings()))

    def __str__(self) -> str:
        """In words: `linf eps 0.1`, with what else limits it."""
        if self.minimizes:
            words = f"smallest {self.norm}"
        elif isinstance(self.eps, tuple):
            words = f"{self.norm} eps up to {size(max(self.eps, default=None))}, one per sample"
        else:
            words = f"{self.norm} eps {size(self.largest_eps)}"
        return words + (", on a grid" if self.grid is not None else "") + (", masked" if self.mask is not None else "")

    def at(self, eps: float | Sequence[float] | Tensor) -> Threat:
        """The same threat with another eps."""
        return replace(self, eps=eps)

    def only(self, rows: Tensor, x: Tensor) -> Threat:
        """The same threat for some of the samples: rows (K,) are positions; x: inputs of the rank that it is meant for."""
        mask = self.mask
        if mask is not None and mask.dim() == x.dim() and len(mask) > 1:
            mask = mask[rows.to(mask.device)]
        return replace(self, eps=self.eps_for(rows.cpu()) if isinstance(self.eps, tuple) else self.eps, mask=mask)

    def eps_for(self, index: Tensor) -> Tensor:
        """eps of the samples at the positions `index` (B,) of the input, as (B,) float64."""
        if isinstance(self.eps, tuple):
            table = torch.tensor(self.eps, dtype=torch.float64, device=index.device)
            if len(index) and int(index.max()) >= len(table):
                raise InputError(f"eps has {len(table)} values, but there is a sample at position {int(index.max())}")
            return table[index]
        return torch.full((len(index),), self.largest_eps, dtype=torch.float64, device=index.device)

    def around(self, origin: Tensor, bounds: Bounds = (0.0, 1.0), index: Tensor | None = None) -> Region:
        """Bind to a batch `origin` (B, ...); `index` gives the samples' positions for per-sample eps and masks."""
        if not origin.is_floating_point():
            raise InputError(f"inputs must be floating, in the units of eps; their dtype is {origin.dtype}")
        if index is None:
            index = torch.arange(len(origin), device=origin.device)
        eps = self.eps_for(index)
        low, high = bounds if bounds is not None else (-math.inf, math.inf)
        if self.grid is not None:
            low, high = _grid_ends(low, high, self.grid, origin.dtype)
        lower = torch.full_like(origin, low, memory_format=torch.contiguous_format)
        upper = torch.full_like(origin, high, memory_format=torch.contiguous_format)
        if self.norm is Norm.LINF:
            lower, upper = self.tighten(origin, eps, lower, upper)
        if self.mask is not None:
            free = self._mask_for(origin, index)
            lower, upper = torch.where(free, lower, origin), torch.where(free, upper, origin)
        return Region(self, origin.contiguous(), eps, lower, upper, (low, high))

    def tighten(self, origin: Tensor, eps: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Cut the range [lower, upper] with the l-infinity ball."""
        radius = rows(eps, origin)
        if self.grid is None:
            return (
                torch.maximum(lower, _ball_end(origin, radius, -1)),
                torch.minimum(upper, _ball_end(origin, radius, 1)),
            )
        levels = torch.floor(radius / self.grid + 1e-6)  # membership on a grid is a matter of whole levels
        level = torch.round(origin.double() / self.grid)
        return (
            torch.maximum(lower, _level_value(level - levels, origin, self.grid)),
            torch.minimum(upper, _level_value(level + levels, origin, self.grid)),
        )

    def _mask_for(self, origin: Tensor, index: Tensor) -> Tensor:
        assert self.mask is not None
        mask = self.mask.to(origin.device)
        if mask.dim() == origin.dim() and len(mask) > 1:
            if len(index) and int(index.max()) >= len(mask):
                raise InputError(f"mask has {len(mask)} rows, but there is a sample at position {int(index.max())}")
            mask = mask[index]
        try:
            return mask.expand_as(origin)
        except RuntimeError:
            shape = tuple(self.mask.shape)
            raise InputError(f"mask of shape {shape} does not fit inputs of shape {tuple(origin.shape[1:])}") from None

    def project(self, points: Tensor, origin: Tensor, bounds: Bounds = (0.0, 1.0)) -> Tensor:
        """Project points (B, ...) into the sets around `origin` (B, ...), and onto the grid if there is one."""
        region = self.around(origin, bounds)
        return region.snap(region.project(points))

    def contains(self, points: Tensor, origin: Tensor, bounds: Bounds = (0.0, 1.0)) -> Tensor:
        """Which points are in the sets around `origin`: (B,) bool."""
        return self.around(origin, bounds).contains(points)

    def distance(self, points: Tensor, origin: Tensor) -> Tensor:
        """Distance in this threat's norm, (B,) float64."""
        return distance(points, origin, self.norm)

    def project_into(self, region: Region, points: Tensor) -> Tensor:
        clipped = torch.clamp(points, region.lower, region.upper)
        outside = self.distance(clipped, region.origin) > region.eps
        if not bool(outside.any()):
            return clipped  # where clipping leads into the ball, it is the projection; feasible points stay bit by bit
        origin, lower, upper, start = (_wide(t) for t in (region.origin, region.lower, region.upper, points))
        delta = self._shrink(start - origin, region.eps * _SLACK, lower - origin, upper - origin)
        inside = torch.clamp((origin + delta).to(points.dtype), region.lower, region.upper)
        if bool((self.distance(inside, region.origin) > region.eps).any()):  # x + delta was rounded away from x
            longer = (_wide(inside) - origin).abs() > delta.abs()
            inside = torch.where(longer, _step_towards(region.origin, inside), inside)
            astray = self.distance(inside, region.origin) > region.eps
            inside = torch.where(rows(astray, inside), region.origin, inside)
        return torch.where(rows(outside, inside), inside, clipped)

    def snap_in(self, region: Region, points: Tensor) -> Tensor:
        """To the grid, towards the origin, so that no norm grows."""
        assert self.grid is not None
        start = torch.round(region.origin.double() / self.grid)
        nearest = _on_grid(points, region.origin, self.grid)
        inner = _level_value(start + torch.trunc(points.double() / self.grid - start), region.origin, self.grid)
        return torch.where(nearest == points, nearest, inner).clamp(region.lower, region.upper)

    @abstractmethod
    def _shrink(self, delta: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The nearest displacement in the ball of radius eps (B,) and between low <= 0 and high >= 0."""

    @abstractmethod
    def steepest_in(self, region: Region, gradient: Tensor, size: Tensor, points: Tensor) -> Tensor:
        """The displacement of norm `size` (B,) from `points` along which the gradient promises most."""

    def extreme_in(self, region: Region, gradient: Tensor) -> Tensor:
        move = self.steepest_in(region, gradient, region.eps, region.origin)
        return torch.clamp(region.origin + move, region.lower, region.upper)

    @abstractmethod
    def reach_in(self, weight: Tensor, room: Tensor, gain: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The smallest sizes 0 <= s <= room (B, D) with <weight, s> = gain (B,), for weights >= 0 of inputs of this shape."""

    @abstractmethod
    def draw_in(self, region: Region, keys: Keys) -> Tensor:
        """A displacement drawn uniformly from the ball."""


def _level(slope: Tensor, cap: Tensor, gain: Tensor) -> Tensor:
    """The level t (B, 1) at which sum_i slope_i * min(t, cap_i) = gain (B,); infinite where the caps don't let it be reached.

    slope and cap (B, D) >= 0: the sum is piecewise linear in t and bends at the caps.
    """
    none = torch.zeros_like(slope)
    cap = torch.where(slope > 0, cap, none)
    filled = torch.where(slope > 0, slope * cap, none)
    level, gain = torch.zeros_like(gain[:, None]), gain[:, None].nan_to_num(nan=torch.inf, posinf=torch.inf)
    while True:  # Newton's iteration: the sum is concave, so it rises to the level, past another bend each time
        free = cap > level
        full = torch.where(free, none, filled).sum(1, keepdim=True)
        steepness = torch.where(free, slope, none).sum(1, keepdim=True)
        flat = torch.where(full >= gain, level, torch.full_like(level, torch.inf))
        following = torch.where(steepness > 0, (gain - full) / steepness, flat)
        further = following > level  # not where it is NaN
        if not bool(further.any()):
            return level
        level = torch.where(further, following, level)


def _sums_before(values: Tensor) -> Tensor:
    """The sum of those in front of each of the values (B, D) >= 0; infinite behind an infinite one."""
    return torch.nn.functional.pad(values[:, :-1].cumsum(1), (1, 0))


def _greedy(weight: Tensor, room: Tensor, gain: Tensor, order: Tensor) -> Tensor:
    """Fill the features in this order (B, D), the last as far as needed: sizes (B, D) with <weight, size> = gain (B,)."""
    weight, room = weight.gather(1, order), room.gather(1, order)
    gains = torch.where(weight > 0, weight * room, torch.zeros_like(weight))
    left = (gain[:, None] - _sums_before(gains)).clamp(min=0)
    size = torch.where(weight > 0, torch.minimum(left / weight, room), torch.zeros_like(room))
    return torch.zeros_like(size).scatter(1, order, size)


def _ball_end(origin: Tensor, radius: Tensor, side: int) -> Tensor:
    """origin + side * radius, at most so far away that its distance is <= radius both exactly and rounded.

    With the radius rounded down, end + error = origin + side * radius holds exactly (Knuth's two-sum), so the end is outside
    where the error points inwards. The error is at most half a unit in the last place: one step inwards mends it.
    """
    whole = _rounded_down(radius, origin.dtype)
    reach = side * whole
    end = origin + reach
    moved = end - origin
    error = (end - moved).neg_().add_(origin).add_(reach - moved)
    outside = error < 0 if side > 0 else error > 0
    return torch.where(outside, _step_towards(origin, end), end)


def _rounded_down(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of `dtype` that is no larger than value >= 0."""
    near = value.to(dtype)
    return torch.where(near.double() > value, _step_towards(torch.zeros_like(near), near), near)


def _step_towards(origin: Tensor, points: Tensor) -> Tensor:
    """The numbers next to `points` on the way to `origin`."""
    if points.is_cuda and points.dtype == torch.float16:  # torch has no kernel for it there
        return torch.nextafter(points.cpu(), origin.cpu()).to(points.device)
    return torch.nextafter(points, origin)


def _wide(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _grid_value(level: Tensor, grid: float) -> Tensor:
    """The value of whole grid levels; k / 255 rather than k * (1 / 255), as image loaders compute it."""
    per_unit = round(1 / grid)
    return level / per_unit if per_unit and abs(per_unit * grid - 1) < 1e-12 else level * grid


def _level_value(level: Tensor, origin: Tensor, grid: float) -> Tensor:
    """The value of whole grid levels in the dtype of the origin, and the origin itself at its own level."""
    same = level == torch.round(origin.double() / grid)
    return torch.where(same, origin, _grid_value(level, grid).to(origin.dtype))


def _on_grid(points: Tensor, origin: Tensor, grid: float) -> Tensor:
    return _level_value(torch.round(points.double() / grid), origin, grid)


def _grid_ends(low: float, high: float, grid: float, dtype: torch.dtype) -> tuple[float, float]:
    """The lowest and the highest grid value between low and high."""
    ends = torch.tensor([low, high], dtype=torch.float64) / grid
    levels = torch.stack([torch.ceil(ends[0] - 1e-6), torch.floor(ends[1] + 1e-6)])
    lowest, highest = _grid_value(levels, grid).to(dtype).tolist()
    return lowest, highest


@dataclass(frozen=True, eq=False)
class Linf(Threat):
    """Every feature moves by at most eps: ||x' - x||_inf <= eps."""

    norm = Norm.LINF

    def project_into(self, region: Region, points: Tensor) -> Tensor:
        return torch.clamp(points, region.lower, region.upper)

    def snap_in(self, region: Region, points: Tensor) -> Tensor:
        assert self.grid is not None
        return _on_grid(points, region.origin, self.grid).clamp(region.lower, region.upper)

    def _shrink(self, delta: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return torch.clamp(delta, low, high)

    def steepest_in(self, region: Region, gradient: Tensor, size: Tensor, points: Tensor) -> Tensor:
        return gradient.sign() * rows(size.to(gradient.dtype), gradient)

    def reach_in(self, weight: Tensor, room: Tensor, gain: Tensor, shape: tuple[int, ...]) -> Tensor:
        level = _level(weight, room, gain)
        return torch.minimum(room, torch.where(weight > 0, level, torch.zeros_like(weight)))

    def draw_in(self, region: Region, keys: Keys) -> Tensor:
        uniform = keys.uniform(tuple(region.origin.shape[1:]), _wide(region.origin).dtype)
        return (2 * uniform - 1) * rows(region.eps.to(uniform.dtype), uniform)


@dataclass(frozen=True, eq=False)
class L2(Threat):
    """Euclidean ball: ||x' - x||_2 <= eps."""

    norm = Norm.L2

    def _shrink(self, delta: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """clamp(s * delta, low, high) with the largest s <= 1 that is inside (the KKT conditions of the projection).

        ||clamp(s * delta)||^2 = A s^2 + B while the same features are clamped; solving that for s repeatedly, from below,
        increases s monotonically to the root and never leaves the ball.
        """
        flat, low, high = delta.flatten(1), low.flatten(1), high.flatten(1)
        clipped = torch.clamp(flat, low, high)
        norm = _norm(clipped, 2)
        outside = norm > eps
        if not bool(outside.any()):
            return clipped.view_as(delta)
        full = _norm(flat, 2)
        scale = torch.where(outside, eps / full.clamp(min=torch.finfo(torch.float64).tiny), torch.ones_like(full))
        for _ in range(64):
            moved = flat * scale.to(flat.dtype)[:, None]
            clipped = torch.clamp(moved, low, high)
            free = clipped == moved
            squares = clipped.double() ** 2
            fixed = torch.where(free, torch.zeros_like(squares), squares).sum(1)
            loose = torch.where(free, flat.double() ** 2, torch.zeros_like(squares)).sum(1)
            better = ((eps**2 - fixed).clamp(min=0) / loose.clamp(min=1e-300)).sqrt().clamp(max=1.0)
            better = torch.where(outside, torch.maximum(scale, better), scale)
            if bool((better <= scale * (1 + 1e-7)).all()):
                break
            scale = better
        return clipped.view_as(delta)

    def steepest_in(self, region: Region, gradient: Tensor, size: Tensor, points: Tensor) -> Tensor:
        norm = _norm(gradient.flatten(1), 2)
        factor = torch.where(norm > 0, size / norm, torch.zeros_like(norm))
        return (gradient.double() * rows(factor, gradient)).to(gradient.dtype)  # 1 / norm can overflow a smaller dtype

    def extreme_in(self, region: Region, gradient: Tensor) -> Tensor:
        """min(t |g_i|, room_i) along sign(g_i), with the t that uses up eps: sum_i g_i^2 min(t^2, (room_i / g_i)^2) = eps^2."""
        weight = gradient.flatten(1).abs().double()
        room = torch.where(gradient >= 0, region.upper - region.origin, region.origin - region.lower).flatten(1).double()
        cap = (room / weight.clamp(min=1e-300)) ** 2
        level = _level(weight**2, cap, (region.eps * _SLACK) ** 2).sqrt()
        size = torch.minimum(room, torch.where(weight > 0, level * weight, torch.zeros_like(weight)))
        move = size.view(gradient.shape) * gradient.sign()
        return torch.clamp((region.origin + move).to(gradient.dtype), region.lower, region.upper)

    def reach_in(self, weight: Tensor, room: Tensor, gain: Tensor, shape: tuple[int, ...]) -> Tensor:
        level = _level(weight**2, room / weight.clamp(min=1e-300), gain)
        return torch.minimum(room, torch.where(weight > 0, level * weight, torch.zeros_like(weight)))

    def draw_in(self, region: Region, keys: Keys) -> Tensor:
        """Normal direction, radius eps * u^(1/d) over the d features that may move."""
        free = region.upper > region.lower
        direction = keys.absorb(1).normal(tuple(region.origin.shape[1:]), _wide(region.origin).dtype) * free
        dimension = free.flatten(1).sum(1).clamp(min=1).double()
        radius = region.eps * keys.absorb(2).uniform((), torch.float64) ** (1 / dimension)
        return self.steepest_in(region, direction, radius, region.origin)


@dataclass(frozen=True, eq=False)
class L1(Threat):
    """Sum of absolute changes: ||x' - x||_1 <= eps."""

    norm = Norm.L1

    def _shrink(self, delta: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Exact projection on ball and box: |d_i| = min(max(|v_i| - t, 0), room_i), t from sorted breakpoints.

        The l1 norm of that is piecewise linear in t; it bends at |v_i| (feature i starts to move) and at |v_i| - room_i
        (it reaches its bound).
        """
        flat, low, high = delta.flatten(1), low.flatten(1), high.flatten(1)
        size = flat.abs()
        room = torch.where(flat >= 0, high, -low)
        outside = torch.minimum(size, room).sum(1, dtype=torch.float64) > eps
        result = torch.clamp(flat, low, high)
        if bool(outside.any()):
            size, room, radius = size[outside].double(), room[outside].double(), eps[outside, None]
            bends = torch.cat([size, (size - room).clamp(min=0)], 1)
            slope = torch.cat([torch.ones_like(size), -torch.ones_like(size)], 1)
            bends, order = bends.sort(1, descending=True)
            slope = slope.gather(1, order)
            slopes, sums = slope.cumsum(1), (slope * bends).cumsum(1)
            last = ((sums - bends * slopes <= radius).sum(1, keepdim=True) - 1).clamp(min=0)
            threshold = (sums.gather(1, last) - radius) / slopes.gather(1, last).clamp(min=1)
            kept = torch.minimum((size - threshold).clamp(min=0), room)
            result[outside] = (kept * flat[outside].sign()).to(flat.dtype)
        return result.view_as(delta)

    def steepest_in(self, region: Region, gradient: Tensor, size: Tensor, points: Tensor) -> Tensor:
        """Spend `size` on the features with the largest gradient, each up to its room in the input range.

        The linear programme max <g, d> with ||d||_1 <= size inside the box is solved by this greedy rule; without
        a box it moves one feature.
        """
        flat = gradient.flatten(1)
        room = torch.where(gradient >= 0, region.upper - points, points - region.lower).flatten(1).clamp(min=0)
        order = torch.where(room > 0, flat.abs(), torch.full_like(flat, -1.0)).argsort(dim=1, descending=True)
        room = torch.minimum(room.gather(1, order).double(), size[:, None])
        spent = room.cumsum(1) - room
        amount = torch.minimum(room, (size[:, None] - spent).clamp(min=0)).to(flat.dtype)
        return torch.zeros_like(flat).scatter_(1, order, amount).mul_(flat.sign()).view_as(gradient)

    def extreme_in(self, region: Region, gradient: Tensor) -> Tensor:
        move = self.steepest_in(region, gradient, region.eps * _SLACK, region.origin)
        return torch.clamp(region.origin + move, region.lower, region.upper)

    def reach_in(self, weight: Tensor, room: Tensor, gain: Tensor, shape: tuple[int, ...]) -> Tensor:
        return _greedy(weight, room, gain, weight.argsort(1, descending=True))

    def draw_in(self, region: Region, keys: Keys) -> Tensor:
        """Exponentials with random signs over their sum and one more: uniform in the l1 ball."""
        shape = tuple(region.origin.shape[1:])
        free = region.upper > region.lower
        size = -keys.absorb(1).uniform(shape, torch.float64).log() * free
        total = size.flatten(1).sum(1) - keys.absorb(2).uniform((), torch.float64).log()
        sign = keys.absorb(3).sign(shape, torch.float64)
        return size * sign * rows(region.eps / total, size)


@dataclass(frozen=True, eq=False)
class L0(Threat):
    """At most eps features (or pixels, with all their channels) change: ||x' - x||_0 <= eps."""

    per: Literal["feature", "pixel"] = "feature"

    norm = Norm.L0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per not in ("feature", "pixel"):
            raise InputError(f'per must be "feature" or "pixel"; got {self.per!r}')

    def settings(self) -> dict[str, object]:
        return super().settings() | {"per": self.per}

    def distance(self, points: Tensor, origin: Tensor) -> Tensor:
        return distance(points, origin, Norm.L0, per=self.per)

    def _keep_best(self, gain: Tensor, eps: Tensor) -> Tensor:
        """Which features (B, ...) to keep so that the summed gain is largest and at most eps units change."""
        units = gain.flatten(1)
        if self.per == "pixel":
            if gain.dim() != 4:
                raise InputError(f'L0(per="pixel") needs images (N, C, H, W); the inputs are {tuple(gain.shape)}')
            units = gain.sum(1).flatten(1)
        rank = units.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        keep = (rank < torch.floor(eps + 1e-9)[:, None]) & (units > 0)
        if self.per == "pixel":
            return keep.view(len(gain), 1, *gain.shape[2:]).expand_as(gain)
        return keep.view_as(gain)

    def project_into(self, region: Region, points: Tensor) -> Tensor:
        low, high = region.lower - region.origin, region.upper - region.origin
        moves = self._shrink(points - region.origin, region.eps, low, high) != 0
        # features that stay keep the origin's very bits: only a changed value may count
        return torch.where(moves, torch.clamp(points, region.lower, region.upper), region.origin)

    def _shrink(self, delta: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        clipped = torch.clamp(delta, low, high)
        # |delta|^2 - |delta - clipped|^2, without the cancellation and the underflow
        keep = self._keep_best(clipped.double() * (2 * delta.double() - clipped.double()), eps)
        return torch.where(keep, clipped, torch.zeros_like(clipped))

    def steepest_in(self, region: Region, gradient: Tensor, size: Tensor, points: Tensor) -> Tensor:
        """Move the `size` features of largest gain |g_i| * room_i to the ends of their range."""
        room = torch.where(gradient >= 0, region.upper - points, points - region.lower)
        if bool(torch.isinf(room).any()):
            raise CapabilityError("an l0 step needs bounds: without them one feature can move without limit")
        gain = gradient.abs() * room
        return torch.where(self._keep_best(gain, size), room * gradient.sign(), torch.zeros_like(room))

    def reach_in(self, weight: Tensor, room: Tensor, gain: Tensor, shape: tuple[int, ...]) -> Tensor:
        worth = torch.where(room > 0, weight * room, torch.zeros_like(room))
        if self.per == "pixel":  # a pixel's channels one after another, so that the last pixel alone is moved in part
            worth = worth.view(len(worth), *shape).sum(1, keepdim=True).expand(-1, *shape).flatten(1)
            order = torch.arange(worth.shape[1], device=worth.device).view(shape[0], -1).T.flatten()
            return _greedy(weight, room, gain, order[worth[:, order].argsort(dim=1, descending=True, stable=True)])
        return _greedy(weight, room, gain, worth.argsort(1, descending=True))

    def draw_in(self, region: Region, keys: Keys) -> Tensor:
        """Uniform values for eps units chosen at random."""
        shape = tuple(region.origin.shape[1:])
        lower, upper, origin = (_wide(t) for t in (region.lower, region.upper, region.origin))
        delta = lower + (upper - lower) * keys.absorb(1).uniform(shape, origin.dtype) - origin
        if not bool(torch.isfinite(delta).all()):
            raise CapabilityError("a random point in an l0 ball needs bounds")
        moves = delta != 0
        if self.per == "pixel":  # one chance a pixel, however many of its channels may move
            shape, moves = (1, *shape[1:]), moves.any(1, keepdim=True)
        chance = keys.absorb(2).uniform(shape, origin.dtype) * moves
        return torch.where(self._keep_best(chance, region.eps), delta, torch.zeros_like(delta))


BALLS: dict[Norm, type[Threat]] = {Norm.LINF: Linf, Norm.L2: L2, Norm.L1: L1, Norm.L0: L0}


def ball(norm: Norm | str, eps: float | Sequence[float] | Tensor) -> Threat:
    """The threat for a norm's name: `ball("l2", 0.5)` is `L2(0.5)`."""
    try:
        return BALLS[Norm(norm)](eps)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"unknown norm {norm!r}; known are {', '.join(n.value for n in Norm)}") from None


def Minimize(  # noqa: N802  # reads as the thing it makes, beside Linf(...) and L2(...)
    norm: Norm | str,
    *,
    mask: Tensor | None = None,
    grid: float | None = None,
    per: Literal["feature", "pixel"] = "feature",
) -> Threat:
    """In place of a threat: find the smallest perturbation in `norm`. It is the ball with eps = inf.

    For attacks that declare `minimizes=True`, such as "minimal", the recommended sequence of them.
    Errors: `InputError` for an unknown norm.
    """
    threat = replace(ball(norm, math.inf), mask=mask, grid=grid)
    return replace(threat, per=per) if isinstance(threat, L0) else threat
