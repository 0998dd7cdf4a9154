"""Models with planted faults that mask their gradients, made from a network that has none.

None of their layers has a telling name: `diagnose` must find the fault by what the model does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Change = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """A network with something in front of it, and something behind it."""

    def __init__(self, net: nn.Module, before: Change | None = None, after: Change | None = None) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before or nn.Identity(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


def quantised(x: Tensor) -> Tensor:
    """Three bits. There is a gradient, and it is zero."""
    return torch.round(x * 7) / 7


def straight_through(x: Tensor) -> Tensor:
    """Three bits, whose backward pass claims that nothing happened."""
    return x + (quantised(x) - x).detach()


def compressed(x: Tensor) -> Tensor:
    """As JPEG does: the cosine coefficients of each block of 8 x 8 pixels are rounded, the higher ones more coarsely."""
    k, n = torch.arange(8.0)[:, None], torch.arange(8.0)[None, :]
    basis = torch.cos(math.pi * (2 * n + 1) * k / 16) / 2
    basis[0] /= math.sqrt(2)
    basis, step = basis.to(x.dtype), (0.04 * (1 + k + n)).to(x.dtype)
    blocks = x.unfold(2, 8, 8).unfold(3, 8, 8)  # (N, C, H / 8, W / 8, 8, 8)
    rounded = torch.round(basis @ blocks @ basis.T / step) * step
    return (basis.T @ rounded @ basis).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)


def thresholded(x: Tensor) -> Tensor:
    """Black and white, by a comparison that has no gradient."""
    return (x > 0.5).to(x.dtype)


def noisy(x: Tensor) -> Tensor:
    return x + 0.2 * torch.randn_like(x)


def resized(x: Tensor) -> Tensor:
    """Shrunk by a pixel, and put at a random place."""
    size = x.shape[-1]
    left, top = (int(corner) for corner in torch.randint(0, 2, (2,)))
    small = functional.interpolate(x, size=(size - 1, size - 1), mode="bilinear", align_corners=False)
    return functional.pad(small, (left, 1 - left, top, 1 - top))


def dropped(x: Tensor) -> Tensor:
    """Dropout, whatever mode the model was put into."""
    return functional.dropout(x, 0.3, training=True)


def chaotic(x: Tensor) -> Tensor:
    """A faint pattern from a chaotic map, whose derivatives grow with each iteration, drowns the gradient of the rest."""
    state = 0.1 + 0.8 * x
    for _ in range(24):
        state = 3.99 * state * (1 - state)
    return x + 0.02 * (state - 0.5)


def rooted(x: Tensor) -> Tensor:
    """The identity, but the root's derivative is infinite at 0."""
    return torch.sqrt(x) ** 2


def rippled(x: Tensor) -> Tensor:
    """A ripple too small to be seen, whose slope is negative at multiples of 1/16, where all values of clean digits lie."""
    return x - 0.02 * torch.sin(32 * math.pi * x)


def averaged(x: Tensor) -> Tensor:
    """Less of what the batch has in common."""
    return x - 0.5 * x.mean(0, keepdim=True)


class Steep(nn.Module):
    """Hidden units so steep that their derivatives are zero in float32."""

    def __init__(self, net: nn.Sequential, factor: float = 60.0) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor) -> Tensor:
        flatten, first, tanh, last = self.net
        return last(tanh(self.factor * first(flatten(x))))


class Purified(nn.Module):
    """Moves its input to where the network is surer, by gradient steps of its own, and hides them from the gradient."""

    def __init__(self, net: nn.Module, steps: int = 3, size: float = 0.05) -> None:
        super().__init__()
        self.net, self.steps, self.size = net, steps, size

    def forward(self, x: Tensor) -> Tensor:
        moved = x.detach()
        with torch.enable_grad():
            for _ in range(self.steps):
                leaf = moved.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(self.net(leaf).log_softmax(1).amax(1).sum(), leaf)
                moved = (moved + self.size * gradient.sign()).clamp(0, 1)
        return self.net(x + (moved - x).detach())


class Insistent(nn.Module):
    """A step of its own as well, but it relies on the caller to have autograd on."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.net(leaf).amax(1).sum(), leaf)
        return self.net(x + 0.05 * gradient.sign())


class Foreign(nn.Module):
    """Goes through numpy, which refuses tensors that require gradients."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.from_numpy(x.numpy()))


def distilled(teacher: nn.Module, student: nn.Module, x: Tensor, temperature: float = 100.0, epochs: int = 100) -> nn.Module:
    """Defensive distillation (Papernot et al. 2016, arXiv:1511.04508): trained at a temperature, used at 1."""
    with torch.no_grad():
        soft = teacher(x).softmax(1)
    optimiser = torch.optim.Adam(student.parameters(), 0.1)
    for _ in range(epochs):
        optimiser.zero_grad()
        functional.cross_entropy(student(x) / temperature, soft).backward()
        optimiser.step()
    optimiser.zero_grad()
    return student.eval()
