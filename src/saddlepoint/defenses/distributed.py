"""Several processes that train one network: each has its share of every batch, and all make the same step.

A launcher (`accelerate launch`, torchrun) starts the same program several times. Gradients are summed over the processes by
hand, between the backward pass and the step: what an objective does with the network needs no wrapper around it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from saddlepoint.errors import InputError, MissingExtraError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, `count` of them, and which of them this one is. What is said of all of them is called by all."""

    count: int = 1
    rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, index: Tensor) -> Tensor:
        """This process's entries of `index` (B,), every count-th; all of them where there are fewer than processes."""
        return index[self.rank :: self.count] if len(index) >= self.count else index

    def mean(self, tensors: Sequence[Tensor], size: int) -> list[Tensor]:
        """Means over all samples, from each process's means over its own `size` samples; in one message."""
        if self.count == 1:
            return list(tensors)
        from accelerate.utils import reduce

        flat = torch.cat([tensors[0].new_ones(1), *(tensor.detach().reshape(-1) for tensor in tensors)])
        total, means = reduce(size * flat, "sum").split([1, len(flat) - 1])
        parts = (means / total).split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]

    def from_main(self, tensor: Tensor) -> Tensor:
        """The main process's tensor, of the same shape and type as this process's own."""
        if self.count == 1:
            return tensor
        from accelerate.utils import broadcast

        sent: Tensor = broadcast(tensor.detach().clone(memory_format=torch.contiguous_format))
        return sent

    def gather(self, value: T) -> list[T]:
        """What each process gave, plain data, in their order."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        gathered: list[T] = gather_object([value])
        return gathered


def processes(device: torch.device | None = None) -> Processes:
    """The processes that the launcher started; this one alone where there was none.

    device: where the network is; it must be the one that accelerate has for this process. Errors: `MissingExtraError`;
    `InputError` where accelerate knows of other processes than the launcher, or of another device.
    """
    count = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = torch.distributed.get_world_size()
    if count == 1:
        return Processes()
    try:
        from accelerate import PartialState
    except ImportError:
        raise MissingExtraError(f"training in {count} processes", "accelerate", "distributed") from None
    state = PartialState(cpu=True) if device is not None and device.type == "cpu" else PartialState()
    if state.num_processes != count:
        raise InputError(
            f"{count} processes were launched, but accelerate was set up for {state.num_processes}: on CPUs, say "
            "accelerate.PartialState(cpu=True) or Accelerator(cpu=True) before training"
        )
    own = torch.device(state.device)
    if device is not None and (device.type, device.index or 0) != (own.type, own.index or 0):
        raise InputError(f"the network is on {device}, but this process has {own}: net.to(accelerate.PartialState().device)")
    return Processes(count, state.process_index)
