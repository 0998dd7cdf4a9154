"""Stand-in for the generic loop of `defenses.training`, with its signature; to be deleted once that exists."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saddlepoint.errors import InputError, ModelError
from saddlepoint.models.freeze import global_random_state_kept


@dataclass(frozen=True)
class Sample:
    """A batch of every tensor of the data, the samples' ids (B,), a seed for each epoch, and the epochs done."""

    tensors: tuple[Tensor, ...]
    ids: Tensor
    seed: int
    progress: float


@dataclass(frozen=True)
class Fit:
    """A finished (or, after Ctrl-C, unfinished) training."""

    epochs: tuple[float, ...]
    complete: bool
    config: dict[str, Any]


def fit(
    net: nn.Module,
    data: tuple[Tensor, ...],
    loss: Callable[[Sample], Tensor],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
    on_epoch: Callable[[Any], None] | None = None,
    name: str = "training",
    settings: Mapping[str, object] | None = None,
) -> Fit:
    """Minimise `loss` over batches of `data`; returns the mean loss of each epoch."""
    if epochs < 1 or batch_size < 1:
        raise InputError(f"epochs and batch_size must be at least 1; got {epochs} and {batch_size}")
    optimiser = torch.optim.Adam(net.parameters(), lr=learning_rate) if optimizer is None else optimizer(net.parameters())
    rates, losses = [group["lr"] for group in optimiser.param_groups], []
    batches = math.ceil(len(data[0]) / batch_size)
    with global_random_state_kept():
        torch.manual_seed(seed)
        for epoch in range(epochs):
            net.train()
            total = 0.0
            for number, ids in enumerate(torch.split(torch.randperm(len(data[0])), batch_size)):
                done = (epoch + number / batches) / epochs
                factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]
                for group, rate in zip(optimiser.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                value = loss(Sample(tuple(t[ids] for t in data), ids, seed * 1_000_003 + epoch, epoch + number / batches))
                if not math.isfinite(float(value.detach())):
                    raise ModelError(f"{name}: the loss is {float(value.detach())} in epoch {epoch}, batch {number}")
                optimiser.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]  # untyped in torch
                optimiser.step()
                total += float(value.detach()) * len(ids)
            losses.append(total / len(data[0]))
            if on_epoch is not None:
                on_epoch(losses[-1])
    net.eval()
    net.zero_grad(set_to_none=True)
    return Fit(tuple(losses), True, dict(settings or {}))
