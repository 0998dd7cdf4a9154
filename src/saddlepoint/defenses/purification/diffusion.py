"""Diffusion purification: drown the perturbation in noise, then take the noise away step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from saddlepoint.defenses.loop import Fit, Sample, fit
from saddlepoint.defenses.purification.purifier import Purifier, check_images
from saddlepoint.defenses.purification.unet import UNet
from saddlepoint.errors import InputError

_TIME_FEATURES = 32


@final
class Diffusion(nn.Module):
    """A denoising diffusion model of images, in T steps.

    Forward, q(x_t | x_0) = N(sqrt(a_t) x_0, (1 - a_t) I) for x_0 scaled to [-1, 1], with a_t = prod_(s <= t) (1 - beta_s),
    t = 1 ... T. A U-Net e(x_t, t) predicts the noise. betas: linear from 1e-4 to 0.02 in the paper, for T = 1000; here from
    0.1 / T to 20 / T, which is the same noise in T steps (Song et al. 2021, arXiv:2011.13456, appendix C).

    channels, widths, depth: of the U-Net, as in `Denoiser`; normalised by groups, since a batch holds many times t.

    Errors: `InputError` for fewer than 21 steps, with which beta_T would exceed 1.

    Source: Ho, Jain & Abbeel 2020, Denoising diffusion probabilistic models, arXiv:2006.11239.
    """

    keep: Tensor  # 1 - beta_t at t - 1
    kept: Tensor  # a_t at t, a_0 = 1

    def __init__(self, channels: int = 1, steps: int = 100, widths: Sequence[int] = (16, 32, 64), depth: int = 2) -> None:
        super().__init__()
        if steps < 21:
            raise InputError(f"steps must be at least 21; got {steps}")
        self.steps = steps
        keep = 1 - torch.linspace(0.1, 20, steps, dtype=torch.float64) / steps
        self.register_buffer("keep", keep.float())
        self.register_buffer("kept", torch.cat([keep.new_ones(1), keep.cumprod(0)]).float())
        self.time = nn.Sequential(nn.Linear(_TIME_FEATURES, 64), nn.ReLU())
        self.unet = UNet(channels, widths, depth=depth, norm=_groups, embedding=64)

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """e(x_t, t): the noise seen in x (N, C, H, W) at times t (N,) in 1 ... T."""
        frequency = torch.exp(torch.linspace(0, math.log(self.steps), _TIME_FEATURES // 2, dtype=x.dtype, device=x.device))
        angle = (t.to(x.dtype) / self.steps)[:, None] * frequency
        predicted: Tensor = self.unet(x, self.time(torch.cat([angle.sin(), angle.cos()], 1)))
        return predicted

    def diffuse(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """sqrt(a_t) x + sqrt(1 - a_t) noise, for x in [-1, 1] and times t (N,)."""
        kept = self.kept[t].to(x.dtype).view(-1, 1, 1, 1)
        return kept.sqrt() * x + (1 - kept).sqrt() * noise

    def loss(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Mean of (e(x_t, t) - noise)^2 for images x in [0, 1] (eq. 14)."""
        return functional.mse_loss(self.noise(self.diffuse(2 * x - 1, t, noise), t), noise)

    def reverse(self, x: Tensor, t: int, noise: Tensor) -> Tensor:
        """x_(t-1) from x_t (eq. 11): (x_t - beta_t / sqrt(1 - a_t) e) / sqrt(1 - beta_t) + sigma_t noise; none at t = 1.

        sigma_t^2 = beta_t (1 - a_(t-1)) / (1 - a_t), the variance of the forward process given x_0.
        """
        keep, kept, before = (float(v) for v in (self.keep[t - 1], self.kept[t], self.kept[t - 1]))
        predicted = self.noise(x, torch.full((len(x),), t, device=x.device))
        mean = (x - (1 - keep) / math.sqrt(1 - kept) * predicted) / math.sqrt(keep)
        return mean + math.sqrt((1 - keep) * (1 - before) / (1 - kept)) * noise


def _groups(width: int) -> nn.Module:
    return nn.GroupNorm(math.gcd(4, width), width)


@final
class DiffusionPurifier(Purifier):
    """DiffPure: diffuse an image to time t*, and reverse from there to 0; clipped to [0, 1].

    strength: t* as a share of all steps, 0.1 to 0.15 in the paper: enough noise to drown a perturbation, not so much that the
    image is lost. The noise is drawn from torch's global random numbers.

    It is differentiable: attacks average exact gradients over draws. backward: "exact", with the steps computed again for the
    gradient, so that memory holds one of them at a time; "identity" where that takes too long (BPDA). The gradient through all
    steps breaks much of what the adjoint method left (Lee & Kim 2023, arXiv:2303.09051).

    Errors: `InputError` for a strength outside (0, 1].

    >>> import saddlepoint as sp
    >>> from saddlepoint.defenses.purification import Diffusion, DiffusionPurifier, train_diffusion
    >>> digits, diffusion = sp.data.load("digits"), Diffusion(steps=30, widths=(8, 16))
    >>> training = train_diffusion(diffusion, digits.train.x[:128], epochs=1)
    >>> purifier = DiffusionPurifier(diffusion, strength=0.2)
    >>> sp.Defended(sp.Model(sp.zoo.build("digits-cnn")), [purifier.transform()]).draws
    10

    Source: Nie et al. 2022, Diffusion models for adversarial purification, arXiv:2205.07460, section 3.
    """

    random = True

    def __init__(self, diffusion: Diffusion, strength: float = 0.15, backward: Literal["exact", "identity"] = "exact") -> None:
        super().__init__()
        if not 0 < strength <= 1:
            raise InputError(f"strength must lie in (0, 1]; got {strength}")
        if backward not in ("exact", "identity"):
            raise InputError(f'backward must be "exact" or "identity"; got {backward!r}')
        self.diffusion, self.strength, self.backward = diffusion, strength, backward

    @property
    def start(self) -> int:
        """t*, at least 1."""
        return max(1, round(self.strength * self.diffusion.steps))

    def forward(self, x: Tensor) -> Tensor:
        """The purified images, another draw at every call."""
        times = torch.full((len(x),), self.start, device=x.device)
        noisy = self.diffusion.diffuse(2 * x - 1, times, torch.randn_like(x))
        for t in range(self.start, 0, -1):
            noisy = checkpoint(self.diffusion.reverse, noisy, t, torch.randn_like(x), use_reentrant=False)
        return ((noisy + 1) / 2).clamp(0, 1)


def train_diffusion(
    net: Diffusion,
    x: Tensor,
    *,
    epochs: int = 100,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    **loop: Any,
) -> Fit:
    """Train a diffusion model on images x (N, C, H, W) in [0, 1], each with a random time and noise in every epoch.

    loop: settings of the training loop, such as checkpoint, seed and progress (Any since they are passed on).
    """
    check_images(x)

    def loss(sample: Sample) -> Tensor:
        (images,) = sample.tensors
        times = torch.randint(1, net.steps + 1, (len(images),), device=images.device)
        return net.loss(images, times, torch.randn_like(images))

    return fit(
        net, (x,), loss, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, name="diffusion",
        settings={"steps": net.steps}, **loop,
    )  # fmt: skip
