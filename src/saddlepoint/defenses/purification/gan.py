"""Defense-GAN: the image that a generator can make which comes closest to the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from saddlepoint.defenses.loop import Fit, Sample, fit
from saddlepoint.defenses.purification.purifier import Purifier, check_images, through
from saddlepoint.errors import InputError


@final
class Generator(nn.Module):
    """Images G(z) (N, C, H, W) in [0, 1] from z (N, latent): a linear layer and two transposed convolutions, 4x4, stride 2.

    width: channels before the last convolution; twice as many before the first. Sizes that are no multiples of 4 are cut.

    Errors: `InputError` for a shape that isn't (C, H, W), or sizes below 1.

    Source: Radford, Metz & Chintala 2016, arXiv:1511.06434, figure 1, in small and without batch normalisation.
    """

    def __init__(self, shape: Sequence[int] = (1, 28, 28), latent: int = 16, width: int = 16) -> None:
        super().__init__()
        if len(shape) != 3 or min(*shape, latent, width) < 1:
            raise InputError(
                f"shape must be (C, H, W), latent and width at least 1; got {tuple(shape)}, {latent} and {width}"
            )  # fmt: skip
        self.shape, self.latent = tuple(shape), latent
        coarse = (2 * width, math.ceil(shape[1] / 4), math.ceil(shape[2] / 4))
        self.layers = nn.Sequential(
            nn.Linear(latent, math.prod(coarse)),
            nn.ReLU(),
            nn.Unflatten(1, coarse),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, shape[0], 4, stride=2, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, z: Tensor) -> Tensor:
        """G(z)."""
        images: Tensor = self.layers(z)
        return images[:, :, : self.shape[1], : self.shape[2]]


@final
class Critic(nn.Module):
    """A number D(x) (N,) for images (N, C, H, W), higher for real ones: two convolutions, 4x4, stride 2, and a linear layer."""

    def __init__(self, shape: Sequence[int] = (1, 28, 28), width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(shape[0], width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * (shape[1] // 4) * (shape[2] // 4), 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """D(x)."""
        scores: Tensor = self.layers(x)[:, 0]
        return scores


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, share: Tensor, penalty: float = 10.0) -> Tensor:
    """E D(fake) - E D(real) + penalty E (|grad D(u)|_2 - 1)^2, u = share real + (1 - share) fake, a share (N,) in [0, 1] each.

    Source: Gulrajani et al. 2017, Improved training of Wasserstein GANs, arXiv:1704.00028, eq. 3; penalty (lambda) 10.
    """
    share = share.view(-1, *[1] * (real.dim() - 1))
    between = (share * real + (1 - share) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    lipschitz = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    loss: Tensor = critic(fake).mean() - critic(real).mean() + penalty * lipschitz
    return loss


@final
class DefenseGAN(Purifier):
    """G(z*), z* the best of R latent vectors that L steps of gradient descent lead to from random starts.

    z* = argmin_z |G(z) - x|_2^2 (eq. 4). The descent has momentum, on the mean square over the pixels; all restarts of all
    images go through the generator at once. steps: L, restarts: R, 200 and 10 in the paper. learning_rate and momentum: of the
    descent, those of the authors' code. The starts are drawn from torch's global random numbers, at every call anew.

    Unrolled descent has no useful gradient, so attacks pass it by: BPDA identity, averaged over draws (Athalye, Carlini &
    Wagner 2018, arXiv:1802.00420, section 5.4.2, who break it on the generator's manifold and with BPDA).

    Errors: `InputError` for fewer than one step or restart, and for images of another shape than the generator's.

    >>> import saddlepoint as sp
    >>> from saddlepoint.defenses.purification import DefenseGAN, Generator, train_gan
    >>> digits, generator = sp.data.load("digits"), Generator((1, 8, 8), latent=8)
    >>> training = train_gan(generator, digits.train.x, epochs=1)
    >>> DefenseGAN(generator, steps=5, restarts=2)(digits.test.x[:3]).shape
    torch.Size([3, 1, 8, 8])

    Source: Samangouei, Kabkab & Chellappa 2018, Defense-GAN: protecting classifiers against adversarial attacks using
    generative models, arXiv:1805.06605, section 4.
    """

    backward = "identity"
    random = True

    def __init__(
        self, generator: Generator, steps: int = 200, restarts: int = 10, learning_rate: float = 10.0, momentum: float = 0.7
    ) -> None:
        super().__init__()
        if min(steps, restarts) < 1 or not learning_rate > 0 or not 0 <= momentum < 1:
            raise InputError(
                "steps and restarts must be at least 1, learning_rate positive and momentum in [0, 1); got "
                f"{steps}, {restarts}, {learning_rate} and {momentum}"
            )
        self.generator = generator
        self.steps, self.restarts, self.learning_rate, self.momentum = steps, restarts, learning_rate, momentum

    def forward(self, x: Tensor) -> Tensor:
        """G(z*), without a gradient."""
        if tuple(x.shape[1:]) != self.generator.shape:
            raise InputError(f"the generator makes images {self.generator.shape}; got {tuple(x.shape)}")
        z = torch.randn(len(x) * self.restarts, self.generator.latent, dtype=x.dtype, device=x.device)
        return self.project(x, z)

    def project(self, x: Tensor, z: Tensor) -> Tensor:
        """Of the descents from z (N R, latent), R to each image in turn, the nearest G(z) (N, C, H, W)."""
        wanted = x.detach().repeat_interleave(self.restarts, 0)
        z, velocity = z.detach(), torch.zeros_like(z)
        for _ in range(self.steps):
            with torch.enable_grad():
                z.requires_grad_()
                distance = (self.generator(z) - wanted).square().flatten(1).mean(1)
                (gradient,) = torch.autograd.grad(distance.sum(), z)
            velocity = self.momentum * velocity - self.learning_rate * gradient
            z = z.detach() + velocity
        with torch.no_grad():
            found: Tensor = self.generator(z)
            distance = (found - wanted).square().flatten(1).mean(1).view(len(x), self.restarts)
            return found.view(len(x), self.restarts, *x.shape[1:])[torch.arange(len(x)), distance.argmin(1)]


class _Game(nn.Module):
    """Generator and critic as one network for the training loop, with the count of steps, which a checkpoint keeps."""

    step: Tensor

    def __init__(self, generator: Generator, critic: nn.Module) -> None:
        super().__init__()
        self.generator, self.critic = generator, critic
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))


def train_gan(
    generator: Generator,
    x: Tensor,
    *,
    critic: nn.Module | None = None,
    critic_steps: int = 5,
    penalty: float = 10.0,
    epochs: int = 50,
    batch_size: int = 64,
    learning_rate: float = 1e-4,
    **loop: Any,
) -> Fit:
    """Train a Wasserstein GAN with gradient penalty on images x (N, C, H, W) in [0, 1].

    Each batch moves the critic, every critic_steps-th one the generator too, which minimises -E D(G(z)). critic: from images
    to (N,), default `Critic`. Adam with beta (0, 0.9), as in the paper (algorithm 1). The losses of `Fit` are the critic's:
    minus their size is an estimate of the Wasserstein distance. loop: settings of the training loop, such as checkpoint, seed
    and progress (Any since they are passed on).

    Source: Gulrajani et al. 2017, Improved training of Wasserstein GANs, arXiv:1704.00028, algorithm 1.
    """
    check_images(x)
    if tuple(x.shape[1:]) != generator.shape:
        raise InputError(f"the generator makes images {generator.shape}; got {tuple(x.shape)}")
    if critic_steps < 1 or not penalty >= 0:
        raise InputError(f"critic_steps must be at least 1 and penalty >= 0; got {critic_steps} and {penalty}")
    critic = Critic(generator.shape).to(x.dtype) if critic is None else critic
    game = _Game(generator, critic)

    def loss(sample: Sample) -> Tensor:
        (real,) = sample.tensors
        z = torch.randn(len(real), generator.latent, dtype=real.dtype, device=real.device)
        share = torch.rand(len(real), dtype=real.dtype, device=real.device)
        game.step += 1
        moves = int(game.step) % critic_steps == 0
        with torch.set_grad_enabled(moves):
            fake = generator(z)
        value = critic_loss(critic, real, fake.detach(), share, penalty)
        if not moves:
            return value
        deceived = through(fake, lambda images: -critic(images).mean())
        return value + deceived - deceived.detach()

    # what is differentiated twice wants float32
    return fit(
        game, (x,), loss, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, name="GAN",
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=learning_rate, betas=(0.0, 0.9)),
        settings={"critic_steps": critic_steps, "penalty": penalty}, **({"precision": "float32"} | loop),
    )  # fmt: skip
