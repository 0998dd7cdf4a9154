"""Input transformations of a defended model, each with the way in which it is to be attacked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saddlepoint.errors import InputError


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
    random: whether two calls differ, so that attacks must average over draws (expectation over transformation).
    """

    name: str
    apply: Callable[[Tensor], Tensor]
    backward: Literal["exact", "identity"] | Callable[[Tensor], Tensor] = "exact"
    random: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.backward, str) and self.backward not in ("exact", "identity"):
            raise InputError(f'backward must be "exact", "identity" or a function; got {self.backward!r}')

    def __call__(self, x: Tensor) -> Tensor:
        """Transform a batch, differentiable as declared."""
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


def bit_depth(bits: int, *, low: float = 0.0, high: float = 1.0) -> Transform:
    """Round inputs to 2^bits levels (Xu, Evans & Qi 2018, arXiv:1704.01155). Its gradient is 0, so BPDA identity."""
    if not 1 <= bits <= 16:
        raise InputError(f"bits must be 1 to 16; got {bits}")
    levels = (1 << bits) - 1

    def quantise(x: Tensor) -> Tensor:
        return torch.round((x - low) / (high - low) * levels) / levels * (high - low) + low

    return Transform(name=f"bit_depth({bits})", apply=quantise, backward="identity")


def gaussian_noise(sigma: float) -> Transform:
    """Add N(0, sigma^2) to every feature: a randomised defense, exactly differentiable."""
    if not sigma > 0:
        raise InputError(f"sigma must be positive; got {sigma}")
    return Transform(name=f"gaussian_noise({sigma:g})", apply=lambda x: x + sigma * torch.randn_like(x), random=True)
