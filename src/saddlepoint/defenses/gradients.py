"""Penalties on the derivatives with respect to the input: gradient, Jacobian, curvature. Each goes around another objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from saddlepoint.defenses.objectives import Around, Batch, check_number, each_loss
from saddlepoint.errors import InputError
from saddlepoint.trees import rows

_PROJECTION = 0x1AC0  # purpose of random numbers


def input_gradient(batch: Batch, x: Tensor, *, graph: bool) -> Tensor:
    """grad_x of each sample's cross-entropy (B, ...), in the modes that the network is in. graph: differentiable itself."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        loss = each_loss(batch.model.forward(leaf), batch.y).sum()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=graph)
    return gradient


@final
@dataclass(frozen=True)
class InputGradientPenalty(Around):
    """inner + lambda * mean ||grad_x L(x)||_2^2: double backpropagation.

    strength: lambda; the paper searches 0.1 to 1000 on a logarithmic scale, larger than what clean training needs. What it
    gives is real but small, and partly a smaller loss rather than a larger distance: trust only attacks that don't depend on
    the loss's scale. It costs a second derivative, about twice the time.

    Source: Ross & Doshi-Velez (2018), Improving the adversarial robustness and interpretability of deep neural networks by
    regularizing their input gradients, arXiv:1711.09404, eq. 4; Drucker & Le Cun (1992), Double backpropagation.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, least=0, strength=self.strength)

    def loss(self, batch: Batch) -> Tensor:
        gradient = input_gradient(batch, batch.x, graph=True)
        return self.inner.loss(batch) + self.strength * gradient.flatten(1).square().sum(1).mean()


@final
@dataclass(frozen=True)
class JacobianPenalty(Around):
    """inner + lambda / 2 * mean ||J(x)||_F^2, with J = dz/dx the Jacobian of the logits z (C, D).

    Estimated by random unit vectors v of the logits' space, ||J||_F^2 = C E ||v^T J||_2^2, one backward pass each.
    strength: lambda, 0.01 in the paper; projections: 1 there. projections=0: all C rows, exactly.

    Source: Hoffman, Roberts & Yaida (2019), Robust learning with Jacobian regularization, arXiv:1908.02729, eq. 7 and
    algorithm 1.
    """

    strength: float = 0.01
    projections: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, least=0, strength=self.strength)
        if not isinstance(self.projections, int) or self.projections < 0:
            raise InputError(f"projections must be a whole number >= 0; got {self.projections}")

    def loss(self, batch: Batch) -> Tensor:
        with torch.enable_grad():
            leaf = batch.x.detach().requires_grad_()
            logits = batch.model.forward(leaf)
        count = logits.shape[1]
        if self.projections:
            drawn = batch.keys(_PROJECTION).normal((self.projections, count), logits.dtype)
            each = list((drawn / torch.linalg.vector_norm(drawn, dim=2, keepdim=True)).unbind(1))
            scale = count / self.projections
        else:
            each, scale = [row.expand_as(logits) for row in torch.eye(count, dtype=logits.dtype, device=logits.device)], 1.0
        squares = [
            torch.autograd.grad(logits, leaf, vector, create_graph=True)[0].flatten(1).square().sum(1) for vector in each
        ]
        return self.inner.loss(batch) + self.strength / 2 * scale * torch.stack(squares).sum(0).mean()


@final
@dataclass(frozen=True)
class CURE(Around):
    """Curvature regularisation: how much the loss's gradient changes along the direction in which attacks go.

        inner + gamma * mean ||grad L(x + h z) - grad L(x)||_2^2,   z = sign(grad L(x)) / ||sign(grad L(x))||_2

    h z is constant. strength: gamma, 4 in the paper; step: h, grown from 0 to 1.5 there over the first epochs (`warmup`), for
    inputs in [0, 1]. Meant for a few epochs on top of a network that was trained before.

    Source: Moosavi-Dezfooli, Fawzi, Uesato & Frossard (2019), Robustness via curvature regularization, and vice versa,
    arXiv:1811.09716, section 4.
    """

    strength: float = 4.0
    step: float = 1.5
    warmup: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, least=0, strength=self.strength, warmup=self.warmup)
        check_number(self, above=0, step=self.step)

    def loss(self, batch: Batch) -> Tensor:
        h = self.step * min(1.0, batch.progress / self.warmup) if self.warmup else self.step
        here = input_gradient(batch, batch.x, graph=True)
        sign = here.detach().sign()
        length = torch.linalg.vector_norm(sign.flatten(1), dim=1).clamp(min=1)
        there = input_gradient(batch, batch.x + h * sign / rows(length, sign), graph=True)
        return self.inner.loss(batch) + self.strength * (there - here).flatten(1).square().sum(1).mean()
