"""What `Model` makes of what it is given: networks, callables, estimators, files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from saddlepoint.errors import InputError
from saddlepoint.taxonomy import Access

Gives = Literal["logits", "probabilities", "labels"]
GIVES: tuple[Gives, ...] = ("logits", "probabilities", "labels")
_LEAST_PROBABILITY = 1e-12  # estimators say 0, whose logarithm no margin could be measured with


@dataclass(frozen=True)
class Adapted:
    """A classifier as a function of tensors.

    call: (N, ...) -> (N, C), or labels (N,). access: the most that it can grant. gives: what `call` returns.
    """

    call: nn.Module | Callable[[Tensor], Any]  # Any: what a user's network returns is the user's own type
    access: Access = Access.PARAMETERS
    gives: Gives = "logits"
    num_classes: int | None = None
    name: str = ""


class Family(Protocol):
    """A module that knows one kind of classifier. It recognises by names alone: no library is imported for that."""

    def recognises(self, net: object) -> bool: ...

    def adapted(self, net: Any) -> Adapted: ...


def adapt(net: object) -> Adapted:
    """Recognise what `net` is. Errors: `InputError` where it is nothing that can be asked."""
    from saddlepoint.models import estimators, huggingface_model, keras_model, onnx_graph, onnx_model

    if isinstance(net, str | os.PathLike):
        return onnx_graph.adapted(net)
    families: tuple[Family, ...] = (estimators, keras_model, huggingface_model, onnx_model)
    for family in families:
        if family.recognises(net):
            return family.adapted(net)
    if not callable(net):
        raise InputError(
            "net must be an nn.Module, a callable on tensors, a scikit-learn, XGBoost or LightGBM classifier, a Keras model or "
            f"the path of an .onnx file; got {type(net).__name__}"
        )
    return Adapted(net)


def log_probabilities(probabilities: Tensor) -> Tensor:
    """Logits that belong to probabilities (N, C); 0 counts as 1e-12."""
    return probabilities.clamp(min=_LEAST_PROBABILITY).log()


def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Rows (N, C) that say no more than a label: 1 for it, 0 for the others."""
    return nn.functional.one_hot(labels.long(), num_classes).to(dtype)


def labels_only(logits: Tensor) -> Tensor:
    """What is left of logits (N, C) where only labels are shown; rows with NaN stay."""
    hidden = one_hot(logits.argmax(1), logits.shape[1], logits.dtype)
    return torch.where(torch.isfinite(logits).all(1, keepdim=True), hidden, logits)
