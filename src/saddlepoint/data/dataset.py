"""The two values that every loader returns."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from saddlepoint.errors import InputError


@dataclass(frozen=True, eq=False)
class Split:
    """Samples and their labels: x float32 in [0, 1], (N, C, H, W) for images or (N, D) for tables; y int64 (N,).

    Raises `InputError` where dtypes or lengths disagree with that.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if self.x.dtype != torch.float32 or self.x.ndim < 2:
            raise InputError(
                f"x must be float32 of shape (N, ...); got {self.x.dtype} of shape {tuple(self.x.shape)}: convert it"
            )
        if self.y.dtype != torch.int64 or self.y.shape != self.x.shape[:1]:
            raise InputError(
                f"y must be int64 of shape ({len(self.x)},), one label per sample of x; "
                f"got {self.y.dtype} of shape {tuple(self.y.shape)}"
            )

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        return f"Split(x: {tuple(self.x.shape)}, y: {tuple(self.y.shape)})"

    def take(self, count: int) -> Split:
        """The first `count` samples (all of them if there are fewer), sharing memory; `InputError` if count < 1."""
        if count < 1:
            raise InputError(f"take needs a count of at least 1; got {count}")
        return Split(self.x[:count], self.y[:count])

    def shuffle(self, seed: int) -> Split:
        """The same samples in an order that depends on `seed` and the number of samples alone."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return Split(self.x[order], self.y[order])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named classification task with values in `bounds`; `train` is None where only a test part was found."""

    name: str
    train: Split | None
    test: Split
    class_names: tuple[str, ...]
    source: str
    bounds: tuple[float, float] = (0.0, 1.0)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 over shape, samples and labels of the test part, for reports."""
        digest = hashlib.sha256(repr(tuple(self.test.x.shape)).encode())
        for tensor in (self.test.x, self.test.y):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]
