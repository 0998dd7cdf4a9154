"""What is done to the weights: penalties, Parseval frames, bounds on their spectral norms, and adversarial perturbations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from saddlepoint.defenses.distributed import processes
from saddlepoint.defenses.objectives import Around, Batch, MinMax, check_number
from saddlepoint.engine import Attack
from saddlepoint.errors import InputError
from saddlepoint.rng import Keys
from saddlepoint.threats import Threat

_AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ROWS = 0x9A12  # purpose of random numbers


def affine(net: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d]]:
    """The linear and convolutional layers with their names. `InputError` if there are none."""
    found = [(name, module) for name, module in net.named_modules() if isinstance(module, _AFFINE)]
    if not found:
        raise InputError("the network has no linear or convolutional layers")
    yield from found


def matrix(layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[Tensor, float]:
    """A layer's weights as a matrix W (out, in * k), and s such that s * ||W||_2 bounds the layer's own spectral norm.

    A convolution maps overlapping patches of k pixels by W; a pixel is in at most k of them (where the stride is 1, fewer
    otherwise), so the layer's norm is at most sqrt(k) ||W||_2 (Cisse et al. 2017, section 3.2).
    """
    flat = layer.weight.flatten(1)
    if isinstance(layer, nn.Linear):
        return flat, 1.0
    overlap = math.prod(math.ceil(size / stride) for size, stride in zip(layer.kernel_size, layer.stride, strict=True))
    return flat, math.sqrt(overlap)


@final
@dataclass(frozen=True)
class WeightPenalty(Around):
    """inner + lambda * sum over layers of sum |w|^p: weight decay for p = 2, sparse weights for p = 1.

    Biases and normalisation are left alone. strength: lambda; power: p >= 1. A large lambda bounds how steep the network is,
    and with it how small a perturbation can be; more than a little costs accuracy at once.

    Source: Goodfellow, Shlens & Szegedy (2015), Explaining and harnessing adversarial examples, arXiv:1412.6572, section 5.
    """

    strength: float = 5e-4
    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, least=0, strength=self.strength)
        check_number(self, least=1, power=self.power)

    def loss(self, batch: Batch) -> Tensor:
        sizes = [layer.weight.abs().pow(self.power).sum() for _, layer in affine(batch.net)]
        return self.inner.loss(batch) + self.strength * torch.stack(sizes).sum()


@final
@dataclass(frozen=True)
class Parseval(Around):
    """Weights that stay tight frames, W W^T = I, so that no layer stretches anything: after every step

        W_S <- (1 + beta) W_S - beta W_S W_S^T W_S

    which descends beta / 4 * ||W_S W_S^T - I||_F^2. The matrix of a convolution is sqrt(k) times its kernel, k the pixels of a
    patch that overlap; see `matrix`. A layer with more outputs than inputs becomes W^T W = I in the same way.
    beta: 0.0003 in the paper, 0.001 for its smaller networks; where ||W_S||_F^2 > 1 / beta, its inverse takes beta's place, so
    that large weights shrink and don't diverge. share: of the rows S, drawn at each step, 0.3 for its fully connected networks.
    The paper's convex combinations of residual branches are not part of this.

    Source: Cisse, Bojanowski, Grave, Dauphin & Usunier (2017), Parseval networks: improving robustness to adversarial examples,
    arXiv:1704.08847, eq. 9 and algorithm 1.
    """

    beta: float = 3e-4
    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, above=0, most=0.5, beta=self.beta)
        check_number(self, above=0, most=1, share=self.share)

    def loss(self, batch: Batch) -> Tensor:
        return self.inner.loss(batch)

    def after_step(self, batch: Batch) -> None:
        self.inner.after_step(batch)
        with torch.no_grad():
            for number, (_, layer) in enumerate(affine(batch.net)):
                flat, stretch = matrix(layer)
                w = flat * stretch
                rows = slice(None) if self.share == 1 else self._rows(batch, number, len(w))
                part = w[rows]
                beta = (1 / part.square().sum().clamp(min=1e-12)).clamp(max=self.beta)
                w[rows] = (1 + beta) * part - beta * (part @ part.T @ part)
                layer.weight.copy_((w / stretch).view_as(layer.weight))

    def _rows(self, batch: Batch, number: int, count: int) -> Tensor:
        numbers = batch.common_keys().absorb(_ROWS).absorb(number).uniform((count,))[0]
        return numbers.argsort()[: max(1, round(self.share * count))]


def spectral_norm(batch: Batch, name: str, w: Tensor, iterations: int) -> Tensor:
    """||W||_2 by power iteration from the last batch's singular vector; differentiable with respect to W."""
    memory = batch.memory.setdefault("spectral", {})
    with torch.autocast(w.device.type, enabled=False):
        with torch.no_grad():
            if name not in memory:
                ids = torch.zeros(1, dtype=torch.int64, device=w.device)
                memory[name] = Keys.of(0, ids).normal((w.shape[1],), w.dtype)[0]
            v = memory[name]
            for _ in range(iterations):
                u = nn.functional.normalize(w @ v, dim=0)
                v = nn.functional.normalize(w.T @ u, dim=0)
            memory[name] = v
        norm: Tensor = u @ (w @ v)
    return norm


@final
@dataclass(frozen=True)
class LipschitzPenalty(Around):
    """inner + lambda * product over layers of their spectral norms: an upper bound of the Lipschitz constant in l2.

    It holds where what lies between the layers (ReLU, pooling, flattening) stretches nothing and the layers form a chain; the
    bound is loose. Spectral norms by power iteration, continued from batch to batch; a convolution's is bounded as in `matrix`.
    strength: lambda. iterations: of each batch.

    Source: Szegedy et al. (2014), Intriguing properties of neural networks, arXiv:1312.6199, section 4.3 (the bound);
    Yoshida & Miyato (2017), Spectral norm regularization, arXiv:1705.10941.
    """

    strength: float = 1e-3
    iterations: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, least=0, strength=self.strength)
        check_number(self, least=1, iterations=self.iterations)

    def loss(self, batch: Batch) -> Tensor:
        inner = self.inner.loss(batch)
        sizes = []
        for name, layer in affine(batch.net):
            w, stretch = matrix(layer)
            sizes.append(stretch * spectral_norm(batch, name, w, self.iterations))
        return inner + self.strength * torch.stack(sizes).prod()


@final
@dataclass(frozen=True)
class LipschitzProjection(Around):
    """After every step each layer's spectral norm is cut down to at most `bound`: W <- W * min(1, bound / ||W||_2).

    The network's Lipschitz constant in l2 is then at most bound^layers, under what `LipschitzPenalty` states, up to the
    precision of the power iteration.

    Source: Gouk, Frank, Pfahringer & Cree (2021), Regularisation of neural networks by enforcing Lipschitz continuity,
    arXiv:1804.04368, algorithm 1.
    """

    bound: float = 1.0
    iterations: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, above=0, bound=self.bound)
        check_number(self, least=1, iterations=self.iterations)

    def loss(self, batch: Batch) -> Tensor:
        return self.inner.loss(batch)

    def after_step(self, batch: Batch) -> None:
        self.inner.after_step(batch)
        with torch.no_grad():
            for name, layer in affine(batch.net):
                w, stretch = matrix(layer)
                size = stretch * spectral_norm(batch, name, w, self.iterations)
                layer.weight.mul_((self.bound / size.clamp(min=1e-12)).clamp(max=1))


@final
@dataclass(frozen=True)
class AWP(MinMax):
    """Adversarial weight perturbation: the min-max loss where the weights too are moved against the network.

        min_w  max_{v}  L_inner(w + v, x'),   v_l = gamma * ||w_l|| * g_l / ||g_l||,   g = grad_w L_inner(w, x')

    for each weight tensor l of at least two dimensions; the step is taken with the gradient at w + v, from w. It flattens the
    loss over the weights, which closes part of the gap between robust training and test accuracy. x' is made before, at w.
    inner: TRADES, Adversarial, MART or another with examples. gamma: 0.005 with TRADES, 0.01 with PGD training.
    warmup: epochs without it (the paper: 10 of 200 with TRADES, 0 with PGD). It costs one more forward and backward pass.

    Source: Wu, Xia & Wang (2020), Adversarial weight perturbation helps robust generalization, arXiv:2004.05884, eq. 7 to
    10 and algorithm 1.
    """

    inner: MinMax
    gamma: float = 0.005
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.inner, MinMax):
            raise InputError(f"AWP goes around an objective that makes examples, such as TRADES(...); got {self.inner!r}")
        check_number(self, least=0, gamma=self.gamma, warmup=self.warmup)

    @property
    def adversary(self) -> tuple[Attack, Threat] | None:
        return self.inner.adversary

    def examples(self, batch: Batch) -> Tensor:
        return self.inner.examples(batch)

    def loss_at(self, batch: Batch, examples: Tensor) -> Tensor:
        if batch.progress < self.warmup:
            return self.inner.loss_at(batch, examples)
        weights = [w for w in batch.net.parameters() if w.requires_grad and w.dim() > 1]
        statistics = {name: buffer.clone() for name, buffer in batch.net.named_buffers()}
        with torch.enable_grad():
            loss = self.inner.loss_at(batch, examples)
            own = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        gradients = processes().mean(own, len(batch.ids))
        with torch.no_grad():
            for name, buffer in batch.net.named_buffers():  # the look ahead is no training step
                buffer.copy_(statistics[name])
            batch.memory["awp.weights"] = [w.detach().clone() for w in weights]
            for w, g in zip(weights, gradients, strict=True):
                w.add_(g * (self.gamma * w.norm() / g.norm().clamp(min=1e-20)))
        torch.clear_autocast_cache()  # mixed precision keeps rounded copies of the weights
        return self.inner.loss_at(batch, examples)

    def after_backward(self, batch: Batch) -> None:
        with torch.no_grad():
            kept = batch.memory.pop("awp.weights", None)
            if kept is not None:
                moved = [w for w in batch.net.parameters() if w.requires_grad and w.dim() > 1]
                for w, own in zip(moved, kept, strict=True):
                    w.copy_(own)
        self.inner.after_backward(batch)

    def after_step(self, batch: Batch) -> None:
        self.inner.after_step(batch)
