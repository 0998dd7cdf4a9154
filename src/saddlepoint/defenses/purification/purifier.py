"""What purifiers share: images in, images out, and how that is to be attacked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, final

import torch
from torch import Tensor, nn

from saddlepoint.errors import InputError
from saddlepoint.models.transforms import Transform


class Purifier(nn.Module, ABC):
    """A network that maps images (N, C, H, W) in [0, 1] to images of the same shape, closer to clean ones.

    backward, random: how it is to be attacked, as in `Transform`.

    Source: Meng & Chen 2017, arXiv:1705.09064, who call it a reformer.
    """

    backward: Literal["exact", "identity"] = "exact"
    random: bool = False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), both in [0, 1]."""

    @final
    def transform(self) -> Transform:
        """The input transformation for `sp.Defended(model, [purifier.transform()])`, which attacks then differentiate."""
        return Transform(name=type(self).__name__, apply=self, backward=self.backward, random=self.random)


def check_images(x: Tensor, name: str = "x") -> None:
    """Raise `InputError` unless x holds floating images (N, C, H, W) in [0, 1], at least one."""
    if x.dim() != 4 or not x.is_floating_point() or not len(x):
        raise InputError(f"{name} must be floating images (N, C, H, W), at least one; got {x.dtype} of shape {tuple(x.shape)}")
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise InputError(f"{name} must lie in [0, 1]; its values range from {float(x.min()):g} to {float(x.max()):g}")


def through(point: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """loss(point), differentiable with respect to `point` alone: the parameters of networks inside `loss` get no gradient."""
    leaf = point.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach() + ((point - leaf.detach()) * gradient).sum()
