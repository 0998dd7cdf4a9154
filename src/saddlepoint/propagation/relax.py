"""How nonlinearities lie between lines, elementwise, for inputs in a box: the relaxations that linear bounds are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saddlepoint.errors import ModelError

Lines = tuple[Tensor, Tensor, Tensor, Tensor]
"""Lower slope and offset, upper slope and offset, each like the box's ends."""
_BISECTIONS = 40
_TINY = 1e-12


@dataclass(frozen=True)
class Relaxation:
    """A function between two lines over [l, u].

    value: the function; ends: its least and largest values there. lines: see `Lines`. free: whether any lower slope between 0
    and 1 is sound where l < 0 < u, so that it can be optimised.
    """

    value: Callable[[Tensor], Tensor]
    ends: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    lines: Callable[[Tensor, Tensor], Lines]
    free: bool = False


def _monotone(value: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda lower, upper: (value(lower), value(upper))


def _relu(lower: Tensor, upper: Tensor) -> Lines:
    """The triangle: the chord above; below 0 or the identity, whichever leaves less area."""
    off, on = upper <= 0, lower >= 0
    between = ~(off | on)
    high = torch.where(between, upper / torch.where(between, upper - lower, 1), on.to(lower))
    low = torch.where(between, (upper > -lower).to(lower), on.to(lower))
    zero = torch.zeros_like(lower)
    return low, zero, high, torch.where(between, -high * lower, zero)


def _leaky(slope: float) -> Callable[[Tensor, Tensor], Lines]:
    """max(x, slope x): convex, so the chord above, and either piece below."""

    def lines(lower: Tensor, upper: Tensor) -> Lines:
        low, zero, high, offset = _relu(lower, upper)  # max(x, s x) = s x + (1 - s) relu(x)
        return slope + (1 - slope) * low, zero, slope + (1 - slope) * high, (1 - slope) * offset

    return lines


def _chord(value: Callable[[Tensor], Tensor], lower: Tensor, upper: Tensor) -> Tensor:
    wide = upper - lower
    return torch.where(wide > _TINY, (value(upper) - value(lower)) / wide.clamp(min=_TINY), 0)


def _s_shaped(value: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Lines]:
    """Increasing, convex left of 0 and concave right of it, such as tanh and the logistic function.

    On one side of 0 the chord and the tangent at the middle; across 0 the lines through an end that touch the curve on the
    other side, found by bisection, whose last safe end is taken, so that they are sound (Zhang et al. 2018, arXiv:1811.00866).
    """

    def lines(lower: Tensor, upper: Tensor) -> Lines:
        chord, middle = _chord(value, lower, upper), (lower + upper) / 2
        tangent, tangent_offset = slope(middle), value(middle) - slope(middle) * middle
        chord_offset = value(lower) - chord * lower
        across = (lower < 0) & (upper > 0)
        low = _touching(lower, upper, from_upper=True)
        high = _touching(lower, upper, from_upper=False)
        convex = upper <= 0
        point = (lower == upper) | ((upper - lower) <= _TINY)
        parts = (
            torch.where(across, low[0], torch.where(convex, tangent, chord)),
            torch.where(across, low[1], torch.where(convex, tangent_offset, chord_offset)),
            torch.where(across, high[0], torch.where(convex, chord, tangent)),
            torch.where(across, high[1], torch.where(convex, chord_offset, tangent_offset)),
        )
        zero = torch.zeros_like(lower)
        return (
            torch.where(point, zero, parts[0]), torch.where(point, value(lower), parts[1]),
            torch.where(point, zero, parts[2]), torch.where(point, value(upper), parts[3]),
        )  # fmt: skip

    def _touching(lower: Tensor, upper: Tensor, *, from_upper: bool) -> tuple[Tensor, Tensor]:
        """The line through one end that touches the curve beyond 0; the chord where that lies outside of the box."""
        end, far = (upper, lower) if from_upper else (lower, upper)
        # at `safe` the tangent lies on the right side of the curve's end, at `other` it doesn't
        safe, other = far.clone(), torch.zeros_like(far)
        for _ in range(_BISECTIONS):
            trial = (safe + other) / 2
            reach = value(trial) + slope(trial) * (end - trial)
            sound = reach <= value(end) if from_upper else reach >= value(end)
            safe, other = torch.where(sound, trial, safe), torch.where(sound, other, trial)
        steep = slope(safe)
        reach = value(far) + slope(far) * (end - far)
        inside = reach <= value(end) if from_upper else reach >= value(end)
        chord = _chord(value, lower, upper)
        return torch.where(inside, steep, chord), torch.where(inside, value(safe) - steep * safe, value(end) - chord * end)

    return lines


def _logistic_slope(x: Tensor) -> Tensor:
    return x.sigmoid() * (1 - x.sigmoid())


def relaxation(op: str, arguments: tuple[object, ...], where: str) -> Relaxation:
    """The relaxation of an operator of ATen. Errors: `ModelError`, which names it, where there is none."""
    if op == "leaky_relu":
        given = arguments[1] if len(arguments) > 1 else 0.01
        slope = given if isinstance(given, float | int) else 0.01
        if not 0 <= slope <= 1:
            raise ModelError(f"leaky_relu at {where} has slope {slope}: bounds are known for slopes in [0, 1]")

        def leak(x: Tensor) -> Tensor:
            return torch.where(x > 0, x, slope * x)

        return Relaxation(leak, _monotone(leak), _leaky(slope))
    if op not in _KNOWN:
        raise ModelError(f"no bounds are known for the operator {op} (at {where}); known are {', '.join(sorted(_KNOWN))}")
    return _KNOWN[op]


_KNOWN: Mapping[str, Relaxation] = {
    "relu": Relaxation(torch.relu, _monotone(torch.relu), _relu, free=True),
    "sigmoid": Relaxation(torch.sigmoid, _monotone(torch.sigmoid), _s_shaped(torch.sigmoid, _logistic_slope)),
    "tanh": Relaxation(torch.tanh, _monotone(torch.tanh), _s_shaped(torch.tanh, lambda x: 1 - x.tanh().square())),
}
