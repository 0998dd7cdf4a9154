"""What attacks share: steps from the input, and samples that are at different things."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar, final

import torch
from torch import Tensor

from saddlepoint.engine import Attack, Problem
from saddlepoint.errors import InputError
from saddlepoint.taxonomy import Norm
from saddlepoint.trees import put, rows, take

S = TypeVar("S")


def advance(which: Tensor, step: Callable[[Problem, S], S], problem: Problem, state: S) -> S:
    """Take `step` for the samples where `which` (B,) is True, and for no other."""
    index = which.nonzero()[:, 0].to(problem.origin.device)
    if len(index) in (0, len(which)):
        return step(problem, state) if len(index) else state
    taken = take(state, index)
    return put(state, index, step(problem.only(index), taken), taken)


def on_the_way(problem: Problem, start: Tensor, share: Tensor) -> Tensor:
    """The point between the input (share 0) and `start` (share 1) that the norm asks for."""
    region, origin = problem.region, problem.origin
    change, at = start - origin, rows(share.to(start.dtype), start)
    largest = rows(change.flatten(1).abs().amax(1), change)
    match region.threat.norm:
        case Norm.LINF:
            change = torch.clamp(change, -at * largest, at * largest)
        case Norm.L2:
            change = change * at
        case Norm.L1:
            change = (change.abs() - (1 - at) * largest).clamp(min=0) * change.sign()
        case Norm.L0:
            change = torch.where(change.abs() >= (1 - at) * largest, change, torch.zeros_like(change))
    return torch.clamp(origin + change, region.lower, region.upper)


class Stepping(Attack):
    """Base of attacks with `steps` steps, the first of which evaluates the input itself."""

    steps: int

    @property
    @final
    def iterations(self) -> int:
        return self.steps

    @property
    @final
    def starts_at_origin(self) -> bool:
        return True

    def _check_whole(self, **least: int) -> None:
        """Raise `InputError` unless these hyperparameters are whole numbers of at least this size."""
        for name, smallest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < smallest:
                raise InputError(f"{name} must be a whole number >= {smallest}; got {value!r}")

    def _check_positive(self, *names: str) -> None:
        """Raise `InputError` unless these hyperparameters are positive and finite."""
        for name in names:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise InputError(f"{name} must be a positive number; got {value!r}")
