"""What a run may cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saddlepoint.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of a run; None means no limit.

    passes: forward and backward passes of one sample together. queries: forward passes of one sample.
    seconds: wall time of the whole run; then every sample keeps its best so far.
    The confirmation of a success and the model's probe are counted apart.
    """

    passes: int | None = None
    queries: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("passes", "queries", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"Budget({name}=...) must be positive; got {value}")

    @property
    def counts_passes(self) -> bool:
        """Whether it matters how many passes a sample makes."""
        return self.passes is not None or self.queries is not None

    def covers(self, forward: Tensor, backward: Tensor) -> Tensor:
        """Where so many passes (Q,) of a sample are within the limits, (Q,) bool."""
        covered = torch.ones_like(forward, dtype=torch.bool)
        if self.passes is not None:
            covered &= forward + backward <= self.passes
        if self.queries is not None:
            covered &= forward <= self.queries
        return covered
