"""PixelDefend: an autoregressive model of clean images, and purification by greedy decoding near the input."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from saddlepoint.defenses.loop import Fit, Sample, fit
from saddlepoint.defenses.purification.purifier import Purifier, check_images
from saddlepoint.errors import InputError


def _gated(x: Tensor) -> Tensor:
    """tanh(a) sigmoid(b) of the two halves of the channels."""
    a, b = x.chunk(2, 1)
    return a.tanh() * b.sigmoid()


class _Layer(nn.Module):
    """A gated layer of two stacks: one sees the rows above a pixel, the other what is left of it in its row (fig. 2).

    Zeros in front and nothing behind make a convolution causal. In the first layer both stacks stop before the pixel's own
    place; in later ones they hold only what came before it already, so that the place itself may be used.
    """

    def __init__(self, before: int, width: int, kernel: int, first: bool) -> None:
        super().__init__()
        self.reach, self.first = kernel // 2, first
        self.above = nn.Conv2d(before, 2 * width, (self.reach + (not first), 2 * self.reach + 1))
        self.left = nn.Conv2d(before, 2 * width, (1, self.reach + (not first)))
        self.joined = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def vertical(self, x: Tensor) -> Tensor:
        """(N, before, H, W) -> (N, 2 width, H, W) from the rows above, gates still open."""
        x = functional.pad(x, (self.reach, self.reach, self.reach, 0))
        return self.above(x[:, :, :-1] if self.first else x)  # type: ignore[no-any-return]

    def horizontal(self, x: Tensor, seen: Tensor) -> Tensor:
        """(N, before, h, W) -> (N, width, h, W) from the row itself and from `seen`, what `vertical` gave for these rows."""
        padded = functional.pad(x, (self.reach, 0))
        found = self.out(_gated(self.left(padded[..., :-1] if self.first else padded) + self.joined(seen)))
        return found if self.first else x + found  # type: ignore[no-any-return]


@final
class PixelCNN(nn.Module):
    """p(x) = prod_i p(x_i | x_1, ..., x_(i-1)) over the pixels in order: row by row, left to right, channel by channel.

    Images (N, C, H, W) in [0, 1] are rounded to `levels` values; each conditional is a softmax over these. The channels of a
    pixel become neighbouring columns, each marked with its channel, so that colours are conditioned on one another as well.
    width: of the features. layers: gated ones of 3 x 3 after the first of 7 x 7, which together reach `layers + 3` rows up.

    Errors: `InputError` for fewer than 2 levels, or sizes below 1.

    Source: van den Oord et al. 2016, Conditional image generation with PixelCNN decoders, arXiv:1606.05328, section 2.
    """

    def __init__(self, channels: int = 1, levels: int = 256, width: int = 16, layers: int = 5) -> None:
        super().__init__()
        if not 2 <= levels <= 256 or min(channels, width, layers) < 1:
            raise InputError(
                "levels must be 2 to 256, and channels, width and layers at least 1; got "
                f"{levels}, {channels}, {width} and {layers}"
            )
        self.channels, self.levels = channels, levels
        self.layers = nn.ModuleList([_Layer(1 + channels, width, 7, first=True)])
        self.layers.extend(_Layer(width, width, 3, first=False) for _ in range(layers - 1))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, levels, 1))

    @property
    def _stack(self) -> Iterable[_Layer]:
        return self.layers  # type: ignore[return-value]  # torch doesn't say of what a ModuleList is

    def quantised(self, x: Tensor) -> Tensor:
        """Levels 0 to levels - 1 of images (N, C, H, W) in [0, 1], int64 as rows of pixels (N, H, W C)."""
        if x.shape[1] != self.channels:
            raise InputError(f"this PixelCNN is of images with {self.channels} channels; got shape {tuple(x.shape)}")
        return (x * (self.levels - 1)).round().long().permute(0, 2, 3, 1).flatten(2)

    def image(self, levels: Tensor) -> Tensor:
        """The images (N, C, H, W) of levels (N, H, W C)."""
        count, height, width = levels.shape
        x = levels.view(count, height, width // self.channels, self.channels).permute(0, 3, 1, 2)
        return x.to(next(self.parameters()).dtype) / (self.levels - 1)

    def planes(self, levels: Tensor) -> Tensor:
        """(N, 1 + C, H, W C): the values, and for each channel a plane that is 1 where a column is of that channel."""
        values = levels.to(next(self.parameters()).dtype) / (self.levels - 1)
        column = torch.arange(levels.shape[2], device=levels.device) % self.channels
        marks = functional.one_hot(column, self.channels).to(values.dtype).T[None, :, None]
        return torch.cat([values[:, None], marks.expand(len(levels), -1, levels.shape[1], -1)], 1)

    def seen_above(self, planes: Tensor) -> list[Tensor]:
        """What each layer sees in the rows above."""
        x, seen = planes, []
        for layer in self._stack:
            seen.append(layer.vertical(x))
            x = _gated(seen[-1])
        return seen

    def along_rows(self, planes: Tensor, seen: list[Tensor]) -> Tensor:
        """The logits (N, levels, h, W C) of rows, of which `seen` tells what is above them."""
        x = planes
        for layer, above in zip(self._stack, seen, strict=True):
            x = layer.horizontal(x, above)
        logits: Tensor = self.last(x)
        return logits

    def forward(self, levels: Tensor) -> Tensor:
        """The logits (N, levels, H, W C) of each pixel's level given those before it, for levels (N, H, W C)."""
        planes = self.planes(levels)
        return self.along_rows(planes, self.seen_above(planes))

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log p(x), natural logarithm, for images (N, C, H, W); (N,)."""
        levels = self.quantised(x)
        return -functional.cross_entropy(self(levels), levels, reduction="none").flatten(1).sum(1)

    def bits_per_dimension(self, x: Tensor) -> Tensor:
        """-log2 p(x) / (C H W); (N,)."""
        return -self.log_likelihood(x) / (math.log(2) * x[0].numel())


def p_values(log_likelihood: Tensor, reference: Tensor) -> Tensor:
    """Of the test that an input is as likely as training images: (1 + #{i: log p(x_i) <= log p(x)}) / (n + 1) (section 4.2).

    log_likelihood: of the inputs (N,). reference: of training images (n,). Small values are suspect.
    """
    if log_likelihood.dim() != 1 or reference.dim() != 1 or not len(reference):
        raise InputError("log_likelihood (N,) and reference (n,) must be vectors, reference of one value at least")
    ordered = reference.sort().values
    ranks = torch.searchsorted(ordered, log_likelihood.contiguous(), right=True)
    return (1 + ranks).to(log_likelihood.dtype) / (len(ordered) + 1)


@final
class PixelDefend(Purifier):
    """Replace every pixel, in order, by the likeliest level within eps_defend of it, given the pixels replaced before.

    x*_i = argmax p(z | x*_1, ..., x*_(i-1)) over levels z with |z - x_i| <= eps_defend (algorithm 1); the level nearest to x_i
    is always allowed. eps_defend: in units of the image's range, the paper's are 32/255 for Fashion-MNIST and 16/255 for
    CIFAR-10. threshold: adaptive PixelDefend; images with log p(x) of at least this are left as they are but for rounding.

    Decoding has no gradient, so attacks pass it by: BPDA identity (Athalye, Carlini & Wagner 2018, arXiv:1802.00420, section
    5.4.2: 9% accuracy is left). A decoding takes a pass along the row for every pixel, of the whole batch at once.

    Errors: `InputError` for a negative eps_defend.

    >>> import saddlepoint as sp
    >>> from saddlepoint.defenses.purification import PixelCNN, PixelDefend, train_pixelcnn
    >>> digits, density = sp.data.load("digits"), PixelCNN(levels=16)
    >>> training = train_pixelcnn(density, digits.train.x, epochs=1)
    >>> purified = PixelDefend(density, eps_defend=0.2)(digits.test.x[:10])
    >>> float((purified - digits.test.x[:10]).abs().max()) <= 0.2 + 1e-6
    True

    Source: Song et al. 2018, PixelDefend: leveraging generative models to understand and defend against adversarial examples,
    arXiv:1710.10766, section 5.
    """

    backward = "identity"

    def __init__(self, density: PixelCNN, eps_defend: float, threshold: float | None = None) -> None:
        super().__init__()
        if not eps_defend >= 0:
            raise InputError(f"eps_defend must be >= 0; got {eps_defend}")
        self.density, self.eps_defend, self.threshold = density, eps_defend, threshold

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x*, without a gradient."""
        levels = self.density.quantised(x)
        allowed = self._allowed(x, levels)
        if self.threshold is None:
            return self.density.image(self._decoded(levels, allowed))
        doubtful = self.density.log_likelihood(x) < self.threshold
        if bool(doubtful.any()):
            levels[doubtful] = self._decoded(levels[doubtful], allowed[doubtful])
        return self.density.image(levels)

    def _allowed(self, x: Tensor, levels: Tensor) -> Tensor:
        """Which levels each pixel may take; (N, levels, H, W C)."""
        values = torch.arange(self.density.levels, dtype=x.dtype, device=x.device)[:, None, None] / (self.density.levels - 1)
        pixels = x.permute(0, 2, 3, 1).flatten(2)[:, None]
        near = (values - pixels).abs() <= self.eps_defend + 4 * torch.finfo(x.dtype).eps
        return near.scatter(1, levels[:, None], True)

    def _decoded(self, levels: Tensor, allowed: Tensor) -> Tensor:
        """Greedy decoding. What the rows above tell is found once a row, the row itself passes once for every pixel."""
        levels, reach = levels.clone(), len(self.density.layers) + 2
        for row in range(levels.shape[1]):
            top = max(0, row - reach)
            seen = [layer[:, :, -1:] for layer in self.density.seen_above(self.density.planes(levels[:, top : row + 1]))]
            for column in range(levels.shape[2]):
                planes = self.density.planes(levels[:, row : row + 1])
                logits = self.density.along_rows(planes, seen)[:, :, 0, column]
                logits = logits.masked_fill(~allowed[:, :, row, column], -torch.inf)
                levels[:, row, column] = logits.argmax(1)
        return levels


def train_pixelcnn(
    net: PixelCNN,
    x: Tensor,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    **loop: Any,
) -> Fit:
    """Fit a PixelCNN to clean images x (N, C, H, W) in [0, 1] by maximum likelihood, in nats per pixel and channel.

    loop: settings of the training loop, such as checkpoint, seed and progress (Any since they are passed on).
    """
    check_images(x)

    def loss(sample: Sample) -> Tensor:
        levels = net.quantised(sample.tensors[0])
        return functional.cross_entropy(net(levels), levels)

    return fit(
        net, (x,), loss, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, name="PixelCNN",
        settings={"levels": net.levels}, **({"precision": "float32"} | loop),  # likelihoods want float32
    )  # fmt: skip
