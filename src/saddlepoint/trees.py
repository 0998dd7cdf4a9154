"""Per-sample state: (nested) frozen dataclasses and tuples of tensors whose first dimension is the sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final, TypeVar, cast

import torch
from torch import Tensor

from saddlepoint.errors import InputError

T = TypeVar("T")

SHARED: Final[Mapping[str, bool]] = {"shared": True}
"""Metadata of a dataclass field that belongs to all samples together: `field(metadata=SHARED)`."""


def rows(values: Tensor, like: Tensor) -> Tensor:
    """View per-sample numbers (B,) so that they broadcast over `like` (B, ...)."""
    return values.view(-1, *([1] * (like.dim() - 1)))


def tree_map(function: Callable[..., Tensor], tree: T, *others: T) -> T:
    """Apply to all tensors of equally built trees; what is shared or no tensor is taken from the first.

    Errors: `InputError` where a tree has a dictionary or a list.
    """
    if isinstance(tree, Tensor):
        return cast(T, function(tree, *others))  # a Tensor in gives a Tensor out, which the type variable can't say
    if isinstance(tree, tuple):
        return cast(T, tuple(tree_map(function, *branch) for branch in zip(tree, *cast(Any, others), strict=True)))
    if not dataclasses.is_dataclass(tree) or isinstance(tree, type):
        if isinstance(tree, dict | list):
            raise InputError(f"per-sample state must be tensors, tuples and dataclasses; found a {type(tree).__name__}")
        return tree
    changed: dict[str, Any] = {}  # Any: the fields of an arbitrary dataclass
    for name in _of_samples(type(tree)):
        branches = [getattr(branch, name) for branch in (tree, *others)]
        changed[name] = tree_map(function, *branches)
    return dataclasses.replace(tree, **changed)


@cache
def _of_samples(cls: type[Any]) -> tuple[str, ...]:
    """The fields of a dataclass that aren't shared."""
    return tuple(field.name for field in dataclasses.fields(cls) if not field.metadata.get("shared"))


def take(tree: T, index: Tensor) -> T:
    """The samples in `index` (Q,)."""
    return tree_map(lambda t: t[index.to(t.device)], tree)


def join(first: T, second: T) -> T:
    """The samples of both, in order."""
    return tree_map(lambda a, b: torch.cat([a, b]), first, second)


def select(mask: Tensor, chosen: T, other: T) -> T:
    """`chosen` where mask (B,) is True, `other` elsewhere."""
    return tree_map(lambda a, b: torch.where(rows(mask.to(a.device), a), a, b), chosen, other)


def put(tree: T, index: Tensor, part: T, taken: T | None = None) -> T:
    """The tree with the samples `index` (P,) replaced by those of `part`.

    taken: what `take` gave for `index`, from which `part` was made. Tensors that are still the same aren't copied. A change in
        place counts, unless PyTorch can't see it (`.data`, NumPy).
    """

    def replaced(old: Tensor, new: Tensor, before: Tensor | None = None) -> Tensor:
        same = new is before and not new._version  # an in-place change counts
        return old if same else old.index_copy(0, index.to(old.device), new)

    return tree_map(replaced, tree, part) if taken is None else tree_map(replaced, tree, part, taken)
