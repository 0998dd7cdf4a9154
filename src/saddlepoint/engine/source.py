"""Samples on their way into the engine: one tensor, or a stream of batches, checked as they come."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saddlepoint.errors import CapabilityError, InputError
from saddlepoint.goals import UNRESOLVED, Goal, Targeted
from saddlepoint.models.base import Classifier
from saddlepoint.threats import L0, Threat
from saddlepoint.trees import join, take

Batches = Iterable[Any]  # (x, y) pairs, or x alone where the goal needs no labels; what a DataLoader yields is untyped


@dataclass(frozen=True)
class Samples:
    """Inputs with their names: all (B, ...)."""

    x: Tensor
    labels: Tensor
    targets: Tensor  # given targets; the goal decides where it has none to give
    ids: Tensor
    sample: Tensor  # position in the input
    index: Tensor  # position in the output; differs where a sample is attacked towards several targets

    def __len__(self) -> int:
        return len(self.x)


def check_labels(y: Tensor, count: int, num_classes: int, name: str = "y") -> Tensor:
    """`y` as int64 of shape (count,) with values in 0..num_classes-1; `InputError` otherwise."""
    if not isinstance(y, Tensor) or y.is_floating_point() or y.dtype == torch.bool:
        found = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"{name} must be a tensor of integer classes (N,); got {found}")
    if y.shape != (count,):
        raise InputError(f"{name} must have shape ({count},), one class per input; its shape is {tuple(y.shape)}")
    bad = (y < 0) | (y >= num_classes)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise InputError(f"{name}[{first}] = {int(y[first])}, but the model has classes 0 to {num_classes - 1}")
    return y.long()


class Source:
    """Hands out samples in order, a few at a time. `skip` holds output positions that are done already."""

    def __init__(
        self,
        x: Tensor | Batches,
        y: Tensor | None,
        ids: Tensor | None,
        *,
        model: Classifier,
        threat: Threat,
        goal: Goal,
        skip: frozenset[int] = frozenset(),
    ) -> None:
        if not isinstance(x, Tensor) and hasattr(x, "__array__"):
            raise InputError("x is an array: give a tensor, torch.from_numpy(x)")
        self._model, self._threat, self._goal, self._skip = model, threat, goal, skip
        self.every_target = isinstance(goal, Targeted) and isinstance(goal.classes, str) and goal.classes == "all"
        self.total = len(x) if isinstance(x, Tensor) else None
        self._batches = iter([(x, y)] if isinstance(x, Tensor) else x)
        self._ids = ids
        if isinstance(x, Tensor) and ids is not None and ids.shape != (len(x),):
            raise InputError(f"ids must have shape ({len(x)},), one per input; its shape is {tuple(ids.shape)}")
        if not isinstance(x, Tensor) and y is not None:
            raise InputError("with a stream of batches the labels come in its (x, y) pairs: leave y out")
        self._position = 0
        self._waiting: Samples | None = None
        self._shape: torch.Size | None = None
        self._checked = self._load()

    def first(self) -> Tensor:
        """The first batch of inputs, which stays in the queue; empty if there is none."""
        self._fill(1)
        return self._waiting.x if self._waiting is not None else torch.empty(0, 1)

    def take(self, count: int) -> Samples | None:
        """Up to `count` samples; None when all have been handed out."""
        self._fill(count)
        if self._waiting is None or not len(self._waiting):
            return None
        index = torch.arange(len(self._waiting))
        part, self._waiting = take(self._waiting, index[:count]), take(self._waiting, index[count:])
        return part

    def _fill(self, count: int) -> None:
        while self._waiting is None or len(self._waiting) < count:
            batch = next(self._checked, None)
            if batch is None:
                return
            if self._waiting is None or not len(self._waiting):
                self._waiting = batch
            else:
                self._waiting = join(self._waiting, batch)

    def _load(self) -> Iterator[Samples]:
        for number, item in enumerate(self._batches):
            if isinstance(item, tuple | list) and len(item) != 2:
                raise InputError(
                    f"batch {number} has {len(item)} parts; give (x, y) pairs, or x alone where no labels are needed"
                )
            x, y = item if isinstance(item, tuple | list) else (item, None)
            where = "" if self.total is not None else f"batch {number}: "
            try:
                yield self._check(x, y)
            except InputError as error:
                raise type(error)(f"{where}{error}") from None if where else error

    def _check(self, x: Any, y: Any) -> Samples:  # Any: a stream may yield anything, which is what is checked here
        self._model.check_inputs(x)
        if self._shape is not None and x.shape[1:] != self._shape:
            raise InputError(f"inputs of shape {tuple(x.shape[1:])} follow inputs of shape {tuple(self._shape)}")
        self._shape = x.shape[1:]
        if isinstance(self._threat, L0) and self._threat.per == "pixel" and x.dim() != 4:
            raise CapabilityError(f'L0(per="pixel") needs images (N, C, H, W); the inputs have shape {tuple(x.shape)}')
        x = x.detach()
        self._check_grid(x)
        classes = (self._model.num_classes or self._model.probe(x).num_classes) - self._model.rejects
        if y is None:
            if self._goal.needs_labels:
                raise InputError(f"{type(self._goal).__name__} needs the true labels y (N,)")
            labels = torch.full((len(x),), UNRESOLVED)
        else:
            labels = check_labels(y, len(x), classes)
        sample = torch.arange(self._position, self._position + len(x))
        self._position += len(x)
        if self._ids is not None and self._position > len(self._ids):
            raise InputError(f"there are {len(self._ids)} ids, but a sample at position {self._position - 1}")
        ids = sample if self._ids is None else self._ids[sample].long().cpu()
        batch = Samples(x, labels.cpu(), self._given_targets(labels.cpu(), sample, classes), ids, sample, sample)
        if self.every_target:
            batch = self._towards_each_class(batch, classes)
        if self._skip:
            keep = [row for row, index in enumerate(batch.index.tolist()) if index not in self._skip]
            batch = take(batch, torch.tensor(keep, dtype=torch.int64))
        return batch

    @staticmethod
    def _towards_each_class(batch: Samples, classes: int) -> Samples:
        """Each sample once for every class but its own."""
        per_sample = classes - 1
        rows = torch.arange(len(batch)).repeat_interleave(per_sample)
        other = torch.arange(per_sample).repeat(len(batch))
        labels = batch.labels[rows]
        index = batch.sample[rows] * per_sample + other
        return replace(take(batch, rows), targets=other + (other >= labels), index=index)

    def _check_grid(self, x: Tensor) -> None:
        grid = self._threat.grid
        if grid is None or not x.numel():
            return
        off = (x.double() / grid - torch.round(x.double() / grid)).abs()
        if float(off.max()) > 1e-3:
            where = tuple(int(i) for i in (off == off.max()).nonzero()[0])
            raise InputError(f"x{list(where)} = {float(x[where]):g} is not on the threat's grid of multiples of {grid:g}")

    def _given_targets(self, labels: Tensor, sample: Tensor, classes: int) -> Tensor:
        """Targets that the caller stated, -1 where the goal has none to give."""
        given = self._goal.classes if isinstance(self._goal, Targeted) else None
        match given:
            case Tensor():
                if len(sample) and int(sample.max()) >= len(given):
                    raise InputError(f"there are {len(given)} targets, but a sample at position {int(sample.max())}")
                targets = check_labels(given.cpu()[sample], len(sample), classes, "targets")
            case int():
                targets = check_labels(torch.full_like(labels, given), len(sample), classes, "targets")
            case frozenset():
                check_labels(torch.tensor(sorted(given)), len(given), classes, "targets")
                own = torch.isin(labels, torch.tensor(sorted(given)))
                self._refuse_own_label(own.nonzero()[:, 0], sample, labels)
                return torch.full_like(labels, UNRESOLVED)
            case _:
                return torch.full_like(labels, UNRESOLVED)
        self._refuse_own_label((targets == labels).nonzero()[:, 0], sample, labels)
        return targets

    @staticmethod
    def _refuse_own_label(rows: Tensor, sample: Tensor, labels: Tensor) -> None:
        if len(rows):
            raise InputError(
                f"the target of sample {int(sample[rows[0]])} is its own label {int(labels[rows[0]])} "
                f"({len(rows)} such samples): leave those samples out, or choose another target"
            )


def fingerprint(x: Tensor, y: Tensor | None) -> str:
    """A checksum of inputs and labels, by which a resumed run knows its data again."""
    checksum = 0
    for tensor in (x, y):
        if tensor is not None:
            data = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            checksum = zlib.crc32(data.flatten().view(torch.uint8).numpy().data, checksum)
    return f"{tuple(x.shape)} crc32 {checksum:08x}"
