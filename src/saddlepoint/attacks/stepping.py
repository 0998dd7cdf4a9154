"""What attacks share that take `steps` steps from the input."""

from __future__ import annotations

import math
from typing import final

from saddlepoint.engine import Attack
from saddlepoint.errors import InputError


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
