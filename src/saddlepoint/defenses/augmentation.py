"""What knows no adversary: moved images; for comparison soft labels, mixtures, noise, cut-outs, dropout; static examples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, pad

from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.defenses.distributed import processes
from saddlepoint.defenses.objectives import Around, Batch, check_number, soft
from saddlepoint.engine import Attack, AttackResult
from saddlepoint.errors import InputError
from saddlepoint.models.torch_model import Labelled, Model
from saddlepoint.threats import Threat

_PARTNER, _CENTRE, _NOISE, _PLACE = 0x3A17, 0xC07, 0x6A55, 0x51F7  # purposes of random numbers


@final
@dataclass(frozen=True)
class LabelSmoothing(Around):
    """The inner objective with labels (1 - s) onehot(y) + s / C. share: s = 0.1 in the paper.

    What it gives against single steps is masking: it makes the loss's gradient small, not the distance to the boundary large.

    Source: Szegedy, Vanhoucke, Ioffe, Shlens & Wojna (2016), Rethinking the inception architecture,
    arXiv:1512.00567, section 7.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, least=0, most=1, share=self.share)

    def loss(self, batch: Batch) -> Tensor:
        labels = soft(batch.y, batch.num_classes, batch.x.dtype)
        return self.inner.loss(replace(batch, y=(1 - self.share) * labels + self.share / batch.num_classes))


@final
@dataclass(frozen=True)
class Mixup(Around):
    """The inner objective on mixtures of two samples and of their labels, by one lambda ~ Beta(alpha, alpha) for each batch:

        x~ = lambda x_i + (1 - lambda) x_j,   y~ = lambda y_i + (1 - lambda) y_j

    alpha: 0.1 to 0.4 for ImageNet, 1 for CIFAR-10 in the paper.

    Source: Zhang, Cisse, Dauphin & Lopez-Paz (2018), mixup: beyond empirical risk minimization, arXiv:1710.09412, eq. 2.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, above=0, alpha=self.alpha)

    def loss(self, batch: Batch) -> Tensor:
        share = float(
            np.random.default_rng([abs(batch.seed), int(processes().from_main(batch.ids[:1]))]).beta(self.alpha, self.alpha)
        )
        partner = batch.keys(_PARTNER).uniform().argsort()
        labels = soft(batch.y, batch.num_classes, batch.x.dtype)
        x, y = (share * t + (1 - share) * t[partner] for t in (batch.x, labels))
        return self.inner.loss(replace(batch, x=x, y=y))


@final
@dataclass(frozen=True)
class CropAndFlip(Around):
    """The inner objective on images that are moved by up to `padding` pixels and, if `flip`, mirrored half of the time.

    What comes in from outside is 0. Usual for photographs, where networks overfit without it; no digit is a mirrored digit. An
    inner objective makes its examples from the moved images.

    Source: He, Zhang, Ren & Sun (2016), Deep residual learning for image recognition, arXiv:1512.03385, section 4.2.

    >>> import saddlepoint as sp
    >>> objective = CropAndFlip(sp.defenses.recipe("trades", sp.Linf(8 / 255)).objective)
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.padding, int) or self.padding < 0:
            raise InputError(f"CropAndFlip: padding must be a whole number >= 0; got {self.padding}")

    def loss(self, batch: Batch) -> Tensor:
        if batch.x.dim() != 4:
            raise InputError(f"CropAndFlip needs images (N, C, H, W); got {tuple(batch.x.shape)}")
        _, _, height, width = batch.x.shape
        down, right, mirror = batch.keys(_PLACE).uniform((3,)).unbind(1)
        rows, columns = (
            (number * (2 * self.padding + 1)).long()[:, None] + torch.arange(extent, device=batch.x.device)
            for number, extent in ((down, height), (right, width))
        )
        if self.flip:
            columns = torch.where((mirror < 0.5)[:, None], columns.flip(1), columns)
        padded = pad(batch.x, [self.padding] * 4)
        moved = padded.take_along_dim(rows[:, None, :, None], 2).take_along_dim(columns[:, None, None, :], 3)
        return self.inner.loss(replace(batch, x=moved))


@final
@dataclass(frozen=True)
class Cutout(Around):
    """The inner objective on images in which a square of `size` pixels, centred anywhere, has the value `fill`.

    What lies outside of the image is cut off. size: 16 for CIFAR-10 in the paper, 8 for CIFAR-100; fill: there the mean pixel.

    Source: DeVries & Taylor (2017), Improved regularization of convolutional neural networks with cutout, arXiv:1708.04552,
    section 3.
    """

    size: int = 16
    fill: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, least=1, size=self.size)
        check_number(self, fill=self.fill)

    def loss(self, batch: Batch) -> Tensor:
        if batch.x.dim() != 4:
            raise InputError(f"Cutout needs images (N, C, H, W); got {tuple(batch.x.shape)}")
        count, _, height, width = batch.x.shape
        numbers = batch.keys(_CENTRE).uniform((2,))
        inside = []
        for number, extent in zip(numbers.unbind(1), (height, width), strict=True):
            first = (number * extent).long() - self.size // 2
            position = torch.arange(extent, device=batch.x.device)
            inside.append((position >= first[:, None]) & (position < first[:, None] + self.size))
        hole = inside[0].view(count, 1, height, 1) & inside[1].view(count, 1, 1, width)
        return self.inner.loss(replace(batch, x=batch.x.masked_fill(hole, self.fill)))


@final
@dataclass(frozen=True)
class GaussianAugmentation(Around):
    """The inner objective at x + sigma N(0, I), clipped to the input range.

    clip=False leaves it as it is: what randomised smoothing of the same sigma needs, whose noise isn't clipped.

    Sources: Zantedeschi, Nicolae & Rawat (2017), Efficient defenses against adversarial attacks, arXiv:1707.06728, section 3.2;
    without clipping Cohen, Rosenfeld & Kolter (2019), arXiv:1902.02918, section 3.3.
    """

    sigma: float = 0.1
    clip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, least=0, sigma=self.sigma)

    def loss(self, batch: Batch) -> Tensor:
        x = batch.x + self.sigma * batch.keys(_NOISE).normal(tuple(batch.x.shape[1:]), batch.x.dtype)
        bounds = batch.model.bounds if self.clip else None
        return self.inner.loss(replace(batch, x=x if bounds is None else x.clamp(*bounds)))


@final
@dataclass(frozen=True)
class Dropout(Around):
    """The inner objective with dropout in front of every linear layer but a network's first layer, in train mode only.

    The network itself stays as it is, so that any architecture and any stored weights can be compared with and without.
    rate: 0.5 in the paper. Draws from torch's global random numbers, as `nn.Dropout` does.

    Source: Srivastava, Hinton, Krizhevsky, Sutskever & Salakhutdinov (2014), Dropout, JMLR 15, section 4.
    """

    rate: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, least=0, most=0.99, rate=self.rate)

    def loss(self, batch: Batch) -> Tensor:
        with self._dropping(batch.net):
            return self.inner.loss(batch)

    @contextmanager
    def _dropping(self, net: nn.Module) -> Iterator[None]:
        layers = [module for module in net.modules() if not list(module.children()) and list(module.parameters(False))]
        linear = [layer for layer in layers[1:] if isinstance(layer, nn.Linear)]
        if not linear:
            raise InputError("Dropout: the network has no linear layer behind its first layer")

        def drop(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (dropout(inputs[0], self.rate, module.training), *inputs[1:])

        handles = [layer.register_forward_pre_hook(drop) for layer in linear]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True, eq=False)
class Augmented:
    """Samples and the adversarial examples made from them, as one training set: x (2N, ...), y (2N,).

    crafted: the attack's result.
    """

    x: Tensor
    y: Tensor
    crafted: AttackResult


def static_augmentation(
    model: Model, data: Labelled | tuple[Tensor, Tensor], attack: Attack | str, threat: Threat, *, seed: int = 0
) -> Augmented:
    """Adversarial examples of a finished network, made once and added to the data: the first defense that was tried.

    The network that is trained on both learns these examples and no more ("no better than dropout", Szegedy et al. 2014,
    arXiv:1312.6199, section 4.3): `Adversarial` makes new ones for every batch. Errors: those of `sp.attack`.

    >>> import saddlepoint as sp
    >>> digits, model = sp.data.load("digits"), sp.Model(sp.zoo.build("digits-cnn"))
    >>> len(static_augmentation(model, digits.train.take(10), sp.attacks.FGSM(), sp.Linf(0.1)).x)
    20
    """
    x, y = data if isinstance(data, tuple) else (data.x, data.y)
    crafted = run_attack(model, x, y, attack, threat, seed=seed)
    return Augmented(torch.cat([x, crafted.adversarial.to(x.device)]), torch.cat([y, y]), crafted)
