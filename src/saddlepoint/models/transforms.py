"""What happens to inputs before a classifier sees them, and the way in which that is to be attacked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from saddlepoint.errors import InputError

Bounds = tuple[float, float] | None


class _Substituted(torch.autograd.Function):
    """Forward: a given value. Backward: the gradient goes to the substitute, as if its value had been used."""

    @staticmethod
    def forward(ctx: Any, substitute: Tensor, value: Tensor) -> Tensor:  # Any: autograd's context has no public type
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@dataclass(frozen=True, kw_only=True)
class Transform:
    """What happens to an input before the classifier sees it.

    apply: (N, ...) -> (N, ...).
    backward: how to differentiate it. "exact": by autograd. "identity": BPDA, as if it were x -> x. A function: BPDA with the
        gradient of that differentiable substitute (Athalye, Carlini & Wagner 2018, arXiv:1802.00420, section 4.1).
    random: whether two calls differ, so that attacks must average over draws (expectation over transformation, section 4.2).
        Each row of a batch needs a draw of its own, from torch's global random numbers, which a run seeds and restores.
    images: whether inputs must be (N, C, H, W).
    """

    name: str
    apply: Callable[[Tensor], Tensor]
    backward: Literal["exact", "identity"] | Callable[[Tensor], Tensor] = "exact"
    random: bool = False
    images: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.backward, str) and self.backward not in ("exact", "identity"):
            raise InputError(f'backward must be "exact", "identity" or a function; got {self.backward!r}')

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The networks inside, which a run freezes."""
        return tuple(function for function in (self.apply, self.backward) if isinstance(function, nn.Module))

    @property
    def attacked(self) -> str:
        """How an adversary who knows it takes gradients, in words."""
        how = "its own gradients" if self.backward == "exact" else "BPDA, "
        if self.backward != "exact":
            how += "identity" if self.backward == "identity" else "a differentiable substitute"
        return how + (", averaged over draws" if self.random else "")

    def __call__(self, x: Tensor) -> Tensor:
        """Transform a batch, differentiable as declared."""
        if self.images and x.dim() != 4:
            raise InputError(f"{self.name} is for images (N, C, H, W); the inputs' shape is {tuple(x.shape)}")
        if self.backward == "exact":
            return self.apply(x)
        with torch.no_grad():
            value = self.apply(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return value
        substitute = x if isinstance(self.backward, str) else self.backward(x)
        if substitute.shape != value.shape:
            found, wanted = tuple(substitute.shape), tuple(value.shape)
            raise InputError(f"{self.name}: the backward substitute gives shape {found}, the transform {wanted}")
        replaced: Tensor = _Substituted.apply(substitute, value)  # type: ignore[no-untyped-call]  # untyped in torch
        return replaced


class InputTransform(ABC):
    """The settings of a transformation; bound to a model's input range they give the `Transform`."""

    @abstractmethod
    def transform(self, bounds: Bounds) -> Transform:
        """What it does to inputs in `bounds`. Errors: `InputError` where it needs a range, and there is none."""

    @final
    def __call__(self, x: Tensor, bounds: Bounds = (0.0, 1.0)) -> Tensor:
        """Transform a batch (N, ...) of inputs in `bounds`, differentiable as declared."""
        return self.transform(bounds)(x)


def bound(transform: Transform | InputTransform, bounds: Bounds) -> Transform:
    """The transformation for inputs in `bounds`; one that is a function already stays as it is."""
    if isinstance(transform, InputTransform):
        return transform.transform(bounds)
    if isinstance(transform, Transform):
        return transform
    raise InputError(
        "a transformation must be such as sp.transforms.Median(3), or a function in sp.Transform(name=..., apply=...); "
        f"got {type(transform).__name__}"
    )


@final
class TransformLayer(nn.Module):
    """A transformation as a layer: `nn.Sequential(TransformLayer(Thermometer(16)), net)` trains a network behind it.

    Its gradient is the declared one, so that adversarial training behind it meets the adaptive attack.
    """

    def __init__(self, transform: Transform | InputTransform, bounds: Bounds = (0.0, 1.0)) -> None:
        super().__init__()
        self.transform = bound(transform, bounds)
        self.networks = nn.ModuleList(self.transform.networks)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, ...)."""
        return self.transform(x)

    def extra_repr(self) -> str:
        """What it does, which campaigns compare."""
        return self.transform.name
