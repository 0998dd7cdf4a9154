"""Adversarial inputs lie close to a boundary: noise and small movements, which clean ones withstand, change the prediction."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from saddlepoint.detectors.base import Detector
from saddlepoint.detectors.squeezing import Change, change, check_change
from saddlepoint.errors import InputError
from saddlepoint.taxonomy import Access


@dataclass(eq=False, kw_only=True)
class _Noisy(Detector, ABC):
    """The model's logits under Gaussian noise.

    sigma: standard deviation, in the inputs' units. draws: of the noise, made in fitting and the same for all inputs ever
    after. So the score is no random one: nobody gains by asking twice, and an attack has its true gradients.
    """

    access: ClassVar[Access] = Access.SCORES

    sigma: float = 0.1
    draws: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma < math.inf:
            raise InputError(f"sigma must be positive; got {self.sigma}")
        if self.draws < 1:
            raise InputError(f"draws must be at least 1; got {self.draws}")

    def _drawn(self, clean: Tensor) -> Tensor:
        """The noise, (draws, ...)."""
        return self.sigma * torch.randn(self.draws, *clean.shape[1:], dtype=clean.dtype, device=clean.device)

    def _mean(self, x: Tensor, noise: Tensor, statistic: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of statistic(logits (N, C) of x + noise) over the draws."""
        if x.shape[1:] != noise.shape[1:]:
            raise InputError(f"fitted on inputs of shape {tuple(noise.shape[1:])}; got {tuple(x.shape[1:])}")
        return torch.stack([statistic(self.model.forward(x + one)) for one in noise]).mean(0)


@final
@dataclass(eq=False, kw_only=True)
class NoiseConsistency(_Noisy):
    """Under noise it is classified differently: score(x) = mean over eta of |softmax(z(x)) - softmax(z(x + eta))|_1.

    eta are `draws` draws of N(0, sigma^2), made in fitting and then the same for all inputs, so that the score isn't random and
    an attack has its true gradients. sigma: in the inputs' units. norm: "l1", "l2" or "kl". The noisy inputs aren't clipped.

    Errors: `InputError` unless sigma > 0 and draws >= 1, and for inputs of another shape than those that it was fitted on.
    Source: as feature squeezing (Xu, Evans & Qi 2018, arXiv:1704.01155, section V), with noise; that adversarial inputs are
    less stable under it: Roth, Kilcher & Hofmann (2019), arXiv:1902.04818, section 3.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> sp.detectors.NoiseConsistency(sigma=0.2).fit(model, digits.train).score(digits.test.x[:4]).shape
    torch.Size([4])
    """

    summary: ClassVar[str] = "under noise, it is classified differently"
    reference: ClassVar[str] = "Roth, Kilcher & Hofmann 2019, arXiv:1902.04818"

    norm: Change = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_change(self.norm)

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        return {"noise": self._drawn(clean)}

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model.forward(x)
        return self._mean(x, self.arrays["noise"], lambda noisy: change(logits, noisy, self.norm))


@final
@dataclass(eq=False, kw_only=True)
class LogOdds(_Noisy):
    """Noise moves its logits as it moves no clean input's: score(x) = max_(c != k) (g_kc(x) - mu_kc) / s_kc, k = predicted.

        g_kc(x) = mean over eta of [z_c(x + eta) - z_k(x + eta)] - [z_c(x) - z_k(x)]

    mu_kc and s_kc are its mean and standard deviation over the clean inputs that are predicted as k; those of all inputs and
    pairs where fewer than two are. sigma: of the noise, in the inputs' units; the paper looks at several. draws: 256 in the
    paper; they are made in fitting and then the same for all inputs, so that the score isn't random.

    The paper shows it on CIFAR-10 and ImageNet. On digits and MNIST noise doesn't undo the examples: it detects none of them.

    Errors: `InputError` as of `NoiseConsistency`.
    Source: Roth, Kilcher & Hofmann (2019), The odds are odd: a statistical test for detecting adversarial examples,
    arXiv:1902.04818, section 3 (equations 5 to 8).

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> sp.detectors.LogOdds(draws=4).fit(model, digits.train).score(digits.test.x[:4]).shape
    torch.Size([4])
    """

    summary: ClassVar[str] = "noise moves its log-odds as it does no clean input's"
    reference: ClassVar[str] = "Roth, Kilcher & Hofmann 2019, arXiv:1902.04818"

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        noise = self._drawn(clean)
        moved = self.over(lambda x: self._moved(x, noise)[0], clean).double()
        classes = moved.shape[1]
        own = self.model.predict(clean)[:, None] == torch.arange(classes, device=moved.device)
        members = own.to(moved)
        count = members.sum(0)[:, None]
        mean = members.T @ moved / count.clamp(min=1)
        variance = (members.T @ (moved - members @ mean).square()) / (count - 1).clamp(min=1)
        rival = moved[~own]
        known, floor = count >= 2, 1e-3 * rival.std() + torch.finfo(clean.dtype).tiny
        return {
            "noise": noise,
            "mean": torch.where(known, mean, rival.mean()).to(clean.dtype),
            "std": torch.where(known, variance.sqrt(), rival.std()).clamp(min=floor).to(clean.dtype),
        }

    def _moved(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """g_kc(x) for each class c, (N, C), which is 0 for c = k, and k, (N,)."""
        logits = self.model.forward(x)
        predicted = logits.argmax(1)
        shift = self._mean(x, noise, lambda noisy: noisy) - logits
        return shift - shift.gather(1, predicted[:, None]), predicted

    def forward(self, x: Tensor) -> Tensor:
        moved, predicted = self._moved(x, self.arrays["noise"])
        unusual = (moved - self.arrays["mean"][predicted]) / self.arrays["std"][predicted]
        return unusual.scatter(1, predicted[:, None], -torch.inf).amax(1)


@final
@dataclass(eq=False, kw_only=True)
class RotationConsistency(Detector):
    """Turned or shifted a little, it is classified differently: score(x) = mean over t of |softmax(z(x)) - softmax(z(t(x)))|_1.

    t are rotations about the centre by each of `degrees`, and shifts by `pixels` in the four directions; interpolated
    bilinearly, with the border's pixels beyond the edges. The paper lets a classifier judge, and draws them anew for each input
    against adversaries who know it; here all are looked at, so that the score isn't random and an attack has true gradients.
    norm: "l1", "l2" or "kl". Images only.

    Errors: `InputError` for other inputs than images (N, C, H, W), and where there are neither degrees nor pixels.
    Source: Tian, Yang & Cai (2018), Detecting adversarial examples through image transformation, AAAI.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> sp.detectors.RotationConsistency(degrees=(-5, 5)).fit(model, digits.train).score(digits.test.x[:4]).shape
    torch.Size([4])
    """

    summary: ClassVar[str] = "turned or shifted a little, it is classified differently"
    reference: ClassVar[str] = "Tian, Yang & Cai 2018, AAAI"
    access: ClassVar[Access] = Access.SCORES

    degrees: tuple[float, ...] = (-10.0, -5.0, 5.0, 10.0)
    pixels: float = 1.0
    norm: Change = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.degrees = tuple(self.degrees)
        check_change(self.norm)
        if not all(math.isfinite(angle) for angle in self.degrees) or not 0 <= self.pixels < math.inf:
            raise InputError(f"degrees must be numbers, and pixels at least 0; got {self.degrees} and {self.pixels}")
        if not self.degrees and not self.pixels:
            raise InputError("name rotations, degrees=(-5, 5), or a shift, pixels=1")

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        self._moved(clean[:1])  # which says so if they are no images
        return {}

    def _moved(self, x: Tensor) -> list[Tensor]:
        """The images, turned and shifted."""
        if x.dim() != 4:
            raise InputError(f"RotationConsistency is for images (N, C, H, W); the inputs' shape is {tuple(x.shape)}")
        height, width = x.shape[2:]
        step = 2 * self.pixels  # in a grid from -1 to 1
        movements = [_rotation(angle, height, width) for angle in self.degrees]
        if self.pixels:
            movements += [
                [[1.0, 0.0, right * step / width], [0.0, 1.0, down * step / height]]
                for right, down in ((1, 0), (-1, 0), (0, 1), (0, -1))
            ]
        moved = []
        for movement in movements:
            matrix = torch.tensor(movement, dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
            grid = affine_grid(matrix, list(x.shape), align_corners=False)
            moved.append(grid_sample(x, grid, padding_mode="border", align_corners=False))
        return moved

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model.forward(x)
        return torch.stack([change(logits, self.model.forward(other), self.norm) for other in self._moved(x)]).mean(0)


def _rotation(degrees: float, height: int, width: int) -> Sequence[Sequence[float]]:
    """As `affine_grid` has it, whose units are half an image's sides, so that pixels turn on a circle."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]
