"""Sets of inputs that bounds hold over: boxes, and norm balls cut with boxes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from saddlepoint.errors import InputError


@dataclass(frozen=True)
class Box:
    """Lower and upper ends of a value for N boxes, (N, ...) each.

    >>> box = Box(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
    >>> box.least(torch.tensor([[[1.0, -1.0]]]))
    tensor([[-2.]])
    """

    lower: Tensor
    upper: Tensor

    @staticmethod
    def around(middle: Tensor, radius: Tensor) -> Box:
        """The box from middle - radius to middle + radius, which needn't compute these again."""
        box = Box(middle - radius, middle + radius)
        box.__dict__.update(middle=middle, radius=radius)
        return box

    @cached_property
    def middle(self) -> Tensor:
        """(N, ...)."""
        return (self.lower + self.upper) / 2

    @cached_property
    def radius(self) -> Tensor:
        """Half the width, (N, ...)."""
        return (self.upper - self.lower) / 2

    def within(self, other: Box) -> Box:
        """The intersection: both hold."""
        return Box(torch.maximum(self.lower, other.lower), torch.minimum(self.upper, other.upper))

    def rows(self, index: Tensor) -> Box:
        """Some of the N sets."""
        return Box(self.lower[index], self.upper[index])

    def to(self, dtype: torch.dtype) -> Box:
        """In another floating type."""
        return Box(self.lower.to(dtype), self.upper.to(dtype))

    def inside(self, points: Tensor) -> Tensor:
        """Points (N, ...) moved into the sets."""
        return points.clamp(self.lower, self.upper)

    def least(self, a: Tensor) -> Tensor:
        """The least values of R linear functions (N, R, ...) over the set, or what lies below them, (N, R)."""
        return times(a, self.middle) - times(a.abs(), self.radius)

    def least_at(self, a: Tensor) -> Tensor:
        """Points of the set, (N, R, ...), where R linear functions are least, or nearly."""
        return torch.where(a > 0, self.lower[:, None], self.upper[:, None])


@dataclass(frozen=True)
class Ball(Box):
    """The points of a box whose l1 or l2 distance from centre (N, ...) is at most eps (N,).

    By the dual norm a linear function a is at least a centre - eps ||a||_q over the ball, 1/p + 1/q = 1. Where the ball isn't
    inside of the box, the better one of ball and box is taken, which is sound but not exact. The ends of the box must hold the
    ball cut with the allowed inputs; `of` makes them so.
    """

    centre: Tensor
    eps: Tensor
    norm: Literal["l1", "l2"]

    @staticmethod
    def of(centre: Tensor, eps: float | Tensor, norm: str, bounds: tuple[float, float] | None = None) -> Box:
        """The inputs within eps of centre (N, ...), and within bounds. norm: linf, l2 or l1. Errors: `InputError`."""
        if norm not in ("linf", "l2", "l1"):
            raise InputError(f"norm must be linf, l2 or l1; got {norm!r}")
        if not centre.is_floating_point():
            raise InputError(f"centre must be of a floating dtype; got {centre.dtype}")
        if bounds is not None and bounds[0] > bounds[1]:
            raise InputError(f"bounds must be (low, high) with low <= high; got {bounds}")
        radius = torch.as_tensor(eps, dtype=centre.dtype, device=centre.device)
        if radius.shape not in ((), (1,), (len(centre),)):
            raise InputError(
                f"eps must be a number, or one for each of the {len(centre)} sets; got shape {tuple(radius.shape)}"
            )
        radius = radius.expand(len(centre))
        if bool((radius < 0).any()) or not bool(radius.isfinite().all()):
            raise InputError(f"eps must be finite and at least 0; got {eps}")
        wide = radius.view(-1, *[1] * (centre.dim() - 1))
        low, high = bounds if bounds is not None else (-torch.inf, torch.inf)
        lower, upper = (centre - wide).clamp(low, high), (centre + wide).clamp(low, high)
        return Box(lower, upper) if norm == "linf" else Ball(lower, upper, centre, radius, norm)  # type: ignore[arg-type]

    def rows(self, index: Tensor) -> Ball:
        """Some of the N sets."""
        return Ball(self.lower[index], self.upper[index], self.centre[index], self.eps[index], self.norm)

    def to(self, dtype: torch.dtype) -> Ball:
        """In another floating type."""
        return Ball(self.lower.to(dtype), self.upper.to(dtype), self.centre.to(dtype), self.eps.to(dtype), self.norm)

    def inside(self, points: Tensor) -> Tensor:
        """Points (N, ...) moved into the sets: towards the centre, then into the box, which holds the centre."""
        delta = points - self.centre
        size = torch.linalg.vector_norm(delta.flatten(1), 1 if self.norm == "l1" else 2, dim=1)
        share = (self.eps / size.clamp(min=torch.finfo(delta.dtype).tiny)).clamp(max=1) * (1 - 2**-20)
        points = self.centre + delta * share.view(-1, *[1] * (delta.dim() - 1))
        return points.clamp(self.lower, self.upper)

    def least(self, a: Tensor) -> Tensor:
        """The least values of R linear functions (N, R, ...) over the set, or what lies below them, (N, R)."""
        dual = torch.linalg.vector_norm(a.flatten(2), 2 if self.norm == "l2" else torch.inf, dim=2)
        return torch.maximum(times(a, self.centre) - self.eps[:, None] * dual, super().least(a))

    def least_at(self, a: Tensor) -> Tensor:
        """Points of the set, (N, R, ...), where R linear functions are least, or nearly: the ball's, moved into the box."""
        flat = a.flatten(2)
        if self.norm == "l2":
            step = flat / torch.linalg.vector_norm(flat, dim=2, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)
        else:
            most = flat.abs().argmax(2, keepdim=True)
            step = torch.zeros_like(flat).scatter_(2, most, flat.gather(2, most).sign())
        points = self.centre[:, None] - (self.eps[:, None, None] * step).view_as(a)
        inside: Tensor = points.clamp(self.lower[:, None], self.upper[:, None])
        return inside


def times(a: Tensor, value: Tensor) -> Tensor:
    """The sum over features of a (N, R, ...) times value (N or 1, ...), (N, R)."""
    rows, values = a.reshape(*a.shape[:2], -1), value.reshape(len(value), -1)  # also of values without features
    if len(values) == 1:
        return rows @ values[0]
    return torch.matmul(values[:, None], rows.mT).squeeze(1)  # ten times as fast as matrices times vectors on a CPU
