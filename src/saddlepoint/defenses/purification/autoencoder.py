"""MagNet: a denoising autoencoder that reforms inputs, and the scores of its detectors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from saddlepoint.defenses.loop import Fit, Sample, fit
from saddlepoint.defenses.purification.purifier import Purifier, check_images
from saddlepoint.errors import InputError, SaddlepointWarning
from saddlepoint.models.base import Classifier

MNIST: tuple[int | Literal["pool"], ...] = (3, "pool", 3)
MNIST_DETECTOR: tuple[int | Literal["pool"], ...] = (3,)
CIFAR: tuple[int | Literal["pool"], ...] = (32,)
_LEARNT = 0.5  # of the images' variance; a trained one leaves a tenth or less


@final
class Autoencoder(Purifier):
    """MagNet's reformer: a convolutional autoencoder ae(x), trained to undo Gaussian noise.

    channels: of the images. structure: widths of 3x3 convolutions with a sigmoid each, and "pool" for 2x2 average pooling;
    then the same backwards, with nearest-neighbour upsampling in the place of pooling, and a convolution to `channels`. The
    paper's: (3, "pool", 3) for MNIST (`MNIST`; its second detector (3,)), (32,) for CIFAR-10 (`CIFAR`).

    It is differentiable, and so attacked exactly: an adversary who knows it breaks it (Carlini & Wagner 2017,
    arXiv:1711.08478).

    Errors: `InputError` for a structure of other things than widths and "pool".

    >>> import saddlepoint as sp
    >>> from saddlepoint.defenses.purification import Autoencoder, train_autoencoder
    >>> digits, net = sp.data.load("digits"), sp.zoo.build("digits-cnn")
    >>> reformer = Autoencoder(channels=1, structure=(32,))
    >>> training = train_autoencoder(reformer, digits.train.x, epochs=2, batch_size=32, learning_rate=0.01)
    >>> sp.Defended(sp.Model(net), [reformer.transform()]).predict(digits.test.x).shape
    torch.Size([500])

    Source: Meng & Chen 2017, MagNet: a two-pronged defense against adversarial examples, arXiv:1705.09064, tables 3 and 4.
    """

    def __init__(self, channels: int = 1, structure: Sequence[int | Literal["pool"]] = MNIST) -> None:
        super().__init__()
        if not structure or any(part != "pool" and (not isinstance(part, int) or part < 1) for part in structure):
            raise InputError(f'structure must hold widths of convolutions and "pool"; got {tuple(structure)}')
        layers: list[nn.Module] = []
        width = channels
        for part in structure:
            if isinstance(part, int):
                layers += [nn.Conv2d(width, part, 3, padding=1), nn.Sigmoid()]
                width = part
            else:
                layers.append(nn.AvgPool2d(2))
        for part in reversed(structure):
            if isinstance(part, int):
                layers += [nn.Conv2d(width, part, 3, padding=1), nn.Sigmoid()]
                width = part
            else:
                layers.append(nn.Upsample(scale_factor=2))
        self.pools = 2 ** sum(part == "pool" for part in structure)
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """ae(x)."""
        if any(size % self.pools for size in x.shape[2:]):
            raise InputError(
                f"this autoencoder halves images: height and width must be multiples of {self.pools}; got {x.shape}"
            )
        reconstructed: Tensor = self.layers(x)
        return reconstructed

    def loss(self, x: Tensor, noise: float) -> Tensor:
        """Mean of (ae(x + noise N(0, 1), clipped to [0, 1]) - x)^2 (section 3.2; noise drawn from torch's global state)."""
        corrupted = (x + noise * torch.randn_like(x)).clamp(0, 1)
        return functional.mse_loss(self.forward(corrupted), x)

    def reconstruction_error(self, x: Tensor, p: int = 1) -> Tensor:
        """A detector's scores (N,): the mean of |x - ae(x)|^p over the features (eq. 5); the higher, the more suspect.

        p: 1 or 2 in the paper; the threshold is chosen on clean images for a false-positive rate.
        """
        if p < 1:
            raise InputError(f"p must be at least 1; got {p}")
        return (x - self.forward(x)).abs().pow(p).flatten(1).mean(1)

    def divergence(self, model: Classifier, x: Tensor, temperature: float = 10.0) -> Tensor:
        """A detector's scores (N,): how differently x and ae(x) are classified, by Jensen and Shannon (section 4.4).

        JSD(P, Q) = KL(P, M) / 2 + KL(Q, M) / 2 with M = (P + Q) / 2, P = softmax(logits(x) / T), Q the same for ae(x).
        temperature: T, 10 and 40 in the paper.
        """
        if not temperature > 0:
            raise InputError(f"temperature must be positive; got {temperature}")
        log_p, log_q = ((model.forward(inputs) / temperature).log_softmax(1) for inputs in (x, self(x)))
        log_m = torch.stack([log_p, log_q]).logsumexp(0) - torch.tensor(2.0, dtype=x.dtype).log()
        return sum((log.exp() * (log - log_m)).sum(1) for log in (log_p, log_q)) / 2  # type: ignore[return-value]


def train_autoencoder(
    net: Autoencoder,
    x: Tensor,
    *,
    noise: float = 0.1,
    weight_penalty: float = 1e-9,
    epochs: int = 100,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    **loop: Any,
) -> Fit:
    """Train a reformer on clean images x (N, C, H, W) in [0, 1]: no attack is needed.

    noise: standard deviation of the corruption, 0.1 for MNIST and 0.025 for CIFAR-10. weight_penalty: times the sum of
    squared weights. loop: settings of the training loop, such as checkpoint, seed and progress (Any since they are passed on).
    A `SaddlepointWarning` says when it has hardly learnt, and gives little more than the mean image.
    """
    check_images(x)
    if not noise >= 0 or not weight_penalty >= 0:
        raise InputError(f"noise and weight_penalty must be >= 0; got {noise} and {weight_penalty}")
    weights = [weight for weight in net.parameters() if weight.dim() > 1]

    def loss(sample: Sample) -> Tensor:
        penalty = torch.stack([weight.square().sum() for weight in weights]).sum()
        return net.loss(sample.tensors[0], noise) + weight_penalty * penalty

    found = fit(
        net, (x,), loss, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, name="autoencoder",
        settings={"noise": noise, "weight_penalty": weight_penalty}, **loop,
    )  # fmt: skip
    _check_learnt(net, x[:1000])
    return found


@torch.no_grad()
def _check_learnt(net: Autoencoder, x: Tensor) -> None:
    """Warn of a reformer that gives little more than the mean image, since every classifier behind it is ruined."""
    x = x.to(next(net.parameters()).device)
    error, variance = float((net(x) - x).square().mean()), float((x - x.mean(0)).square().mean())
    if error > _LEARNT * variance:
        warnings.warn(
            f"the autoencoder has hardly learnt: its squared error is {error:.3g}, that of the mean image {variance:.3g}. "
            "Train it for more epochs, with smaller batches or a higher learning rate, or widen it, such as structure=(32,)",
            SaddlepointWarning,
            stacklevel=3,
        )
