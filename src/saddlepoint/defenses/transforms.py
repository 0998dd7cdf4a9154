"""Input transformations as defenses, for `sp.Defended(model, [BitDepth(4), Median(2)])`, each with its adaptive attack.

Every one is the settings of a `Transform`, which says how to differentiate it. Windows are mirrored at the edges, edge pixels
included (scipy's "reflect"). Random ones draw for each input apart. Where a setting measures values of inputs, it does so in
parts of the model's range; only `GaussianNoise` is in the inputs' own units.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, pad

from saddlepoint.errors import InputError
from saddlepoint.models.transforms import Bounds, InputTransform, Transform

__all__ = [
    "JPEG", "Bilateral", "BitDepth", "CropRescale", "Gaussian", "GaussianNoise", "Mean", "Median", "NonLocalMeans",
    "RandomResizePad", "Thermometer", "TotalVariance",
]  # fmt: skip

Function = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class BitDepth(InputTransform):
    """Rounding to 2^bits levels: round(x (2^bits - 1)) / (2^bits - 1). Its gradient is 0, so BPDA with the identity.

    bits: 1 to 16; the paper has 1 for MNIST, 4 or 5 for colours. Any input shape.
    Source: Xu, Evans & Qi 2018, "Feature squeezing", arXiv:1704.01155, section III-A.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        _within(self, "bits", 1, 16)

    def transform(self, bounds: Bounds) -> Transform:
        levels = (1 << self.bits) - 1
        rounded = _in_unit_range(self, lambda x: torch.round(x * levels) / levels, bounds)
        return Transform(name=repr(self), apply=rounded, backward="identity")


@final
@dataclass(frozen=True)
class GaussianNoise(InputTransform):
    """x + N(0, sigma^2) for every feature, in the inputs' units and not clipped; attacked by averages over draws.

    Any input shape. With votes in place of averages it is `Smoothed`.
    """

    sigma: float

    def __post_init__(self) -> None:
        _within(self, "sigma", 0, math.inf, low_excluded=True)

    def transform(self, bounds: Bounds) -> Transform:
        return Transform(name=repr(self), apply=lambda x: x + self.sigma * torch.randn_like(x), random=True)


@final
@dataclass(frozen=True)
class Median(InputTransform):
    """The median of each window of size x size pixels (of an even number the upper one), channel by channel.

    Differentiable as it is: the gradient goes to the pixel in the middle. size: the paper has 2 and 3. Images only.
    Source: Xu, Evans & Qi 2018, arXiv:1704.01155, section III-B.
    """

    size: int = 2

    def __post_init__(self) -> None:
        _within(self, "size", 1, 99)

    def transform(self, bounds: Bounds) -> Transform:
        middle = self.size**2 // 2 + 1
        return _smoothing(self, lambda x: _windows(x, self.size).flatten(4).kthvalue(middle).values)


@final
@dataclass(frozen=True)
class Mean(InputTransform):
    """The mean of each window of size x size pixels, which is differentiable. Images only.

    Source: as a defense Li & Li 2017, arXiv:1612.07767, section 5 (3 x 3).
    """

    size: int = 3

    def __post_init__(self) -> None:
        _within(self, "size", 1, 99)

    def transform(self, bounds: Bounds) -> Transform:
        return _smoothing(self, lambda x: avg_pool2d(_mirrored(x, self.size), self.size, stride=1))


@final
@dataclass(frozen=True)
class Gaussian(InputTransform):
    """Convolution with a Gaussian of standard deviation `sigma` pixels, cut off at 4 sigma; differentiable. Images only."""

    sigma: float = 1.0

    def __post_init__(self) -> None:
        _within(self, "sigma", 0, 25, low_excluded=True)

    def transform(self, bounds: Bounds) -> Transform:
        radius = int(4 * self.sigma + 0.5)

        def blurred(x: Tensor) -> Tensor:
            weights = _gaussian(torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device), self.sigma)
            kernel, channels = (weights / weights.sum())[None, None, None], x.shape[1]
            rows = _mirrored(x, 2 * radius + 1)
            for filter_ in (kernel, kernel.mT):
                rows = conv2d(rows, filter_.repeat(channels, 1, 1, 1), groups=channels)
            return rows

        return _smoothing(self, blurred)


@final
@dataclass(frozen=True)
class Bilateral(InputTransform):
    """A mean over each window, weighted by nearness in the plane and in colour; differentiable. Images only.

    z_i = sum_j w_ij x_j / sum_j w_ij with w_ij = exp(-|i - j|^2 / (2 sigma_space^2) - |x_i - x_j|^2 / (2 sigma_color^2))

    size: of the window. sigma_color: of colours, l2 over the channels, in parts of the range. sigma_space: in pixels.
    Source: Tomasi & Manduchi 1998, "Bilateral filtering for gray and color images", section 2.
    """

    size: int = 5
    sigma_color: float = 0.1
    sigma_space: float = 1.5

    def __post_init__(self) -> None:
        _within(self, "size", 1, 99)
        _within(self, "sigma_color", 0, math.inf, low_excluded=True)
        _within(self, "sigma_space", 0, math.inf, low_excluded=True)

    def transform(self, bounds: Bounds) -> Transform:
        def filtered(x: Tensor) -> Tensor:
            windows = _windows(x, self.size)
            away = torch.arange(self.size, dtype=x.dtype, device=x.device) - self.size // 2
            near = _gaussian(away[:, None], self.sigma_space) * _gaussian(away, self.sigma_space)
            alike = (windows - x[..., None, None]).square().sum(1, keepdim=True) / (2 * self.sigma_color**2)
            weights = near * torch.exp(-alike)
            return (weights * windows).sum((-2, -1)) / weights.sum((-2, -1))

        return _smoothing(self, _in_unit_range(self, filtered, bounds))


@final
@dataclass(frozen=True)
class NonLocalMeans(InputTransform):
    """A mean over a search window, weighted by how alike the patches around the pixels are; differentiable. Images only.

    z_i = sum_j w_ij x_j / sum_j w_ij with w_ij = exp(-|P_i - P_j|^2 / strength^2), |.|^2 the mean over a patch and its channels

    search, patch: odd sizes in pixels; strength in parts of the range. The paper on defenses has 11-3-4 and 13-3-2 (the last in
    255ths) for colours.
    Sources: Buades, Coll & Morel 2005, "A non-local algorithm for image denoising", section 3; Xu, Evans & Qi 2018,
    arXiv:1704.01155, section III-B.
    """

    search: int = 11
    patch: int = 3
    strength: float = 4 / 255

    def __post_init__(self) -> None:
        for name in ("search", "patch"):
            _within(self, name, 1, 99)
            if getattr(self, name) % 2 == 0:
                raise InputError(f"{name} must be odd, so that a pixel is in the middle; got {getattr(self, name)}")
        _within(self, "strength", 0, math.inf, low_excluded=True)

    def transform(self, bounds: Bounds) -> Transform:
        def filtered(x: Tensor) -> Tensor:
            (height, width), edge = x.shape[2:], self.patch // 2
            around, inner = _mirrored(x, self.search + self.patch - 1), _mirrored(x, self.patch)
            total, values = torch.zeros_like(x[:, :1]), torch.zeros_like(x)
            for down in range(self.search):
                for right in range(self.search):
                    other = around[..., down : down + inner.shape[2], right : right + inner.shape[3]]
                    unlike = avg_pool2d((other - inner).square().mean(1, keepdim=True), self.patch, stride=1)
                    weight = torch.exp(-unlike / self.strength**2)
                    total = total + weight
                    values = values + weight * other[..., edge : edge + height, edge : edge + width]
            return values / total

        return _smoothing(self, _in_unit_range(self, filtered, bounds))


@final
@dataclass(frozen=True)
class JPEG(InputTransform):
    """Compression and decompression by Pillow, of grey or RGB images; BPDA with a JPEG that can be differentiated.

    The substitute does what JPEG does, colours at half the resolution included, except that a coefficient c is rounded to
    round(c) + (d + d^3) / 2 with d = c - round(c). The paper's d^3 has no gradient where c is close to a whole number, as most
    coefficients are to 0; the identity's d forgets the rounding. On digits (eps 0.1 and 0.15, qualities 20 to 90) PGD breaks
    more by the mean of both than by the better one, except at quality 90, where it comes close to the identity.
    quality: 1 to 100; the papers have 75.
    Sources: Dziugaite, Ghahramani & Roy 2016, arXiv:1608.00853 (the defense); Shin & Song 2017, "JPEG-resistant adversarial
    images" (the substitute).
    """

    quality: int = 75

    def __post_init__(self) -> None:
        _within(self, "quality", 1, 100)

    def transform(self, bounds: Bounds) -> Transform:
        return Transform(
            name=repr(self), apply=_in_unit_range(self, self._compressed, bounds),
            backward=_in_unit_range(self, self._differentiable, bounds), images=True,
        )  # fmt: skip

    def _compressed(self, x: Tensor) -> Tensor:
        from PIL import Image

        self._check_channels(x)
        pixels = (x.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
        decoded = []
        for image in pixels:
            with io.BytesIO() as file:
                Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "JPEG", quality=self.quality)
                with Image.open(file) as found:
                    decoded.append(torch.frombuffer(bytearray(found.tobytes()), dtype=torch.uint8).view(image.shape))
        together = torch.stack(decoded) if decoded else torch.empty(pixels.shape, dtype=torch.uint8)
        return together.permute(0, 3, 1, 2).to(x.device, x.dtype) / 255

    def _differentiable(self, x: Tensor) -> Tensor:
        self._check_channels(x)
        luma, chroma = (torch.tensor(table, dtype=x.dtype, device=x.device) for table in _quantisation(self.quality))
        height, width = x.shape[2:]
        unit = 8 if x.shape[1] == 1 else 16
        x = pad(255 * x, (0, -width % unit, 0, -height % unit), mode="replicate")
        if x.shape[1] == 1:
            return _rounded_blocks(x - 128, luma)[..., :height, :width] / 255 + 128 / 255
        colours = torch.tensor(_YCBCR, dtype=x.dtype, device=x.device)
        x = torch.einsum("kc,nchw->nkhw", colours, x)
        y = _rounded_blocks(x[:, :1] - 128, luma) + 128
        half = _rounded_blocks(avg_pool2d(x[:, 1:], 2), chroma)
        x = torch.cat([y, interpolate(half, scale_factor=2, mode="bilinear")], 1)
        return torch.einsum("kc,nchw->nkhw", torch.linalg.inv(colours.double()).to(x.dtype), x)[..., :height, :width] / 255

    @staticmethod
    def _check_channels(x: Tensor) -> None:
        if x.shape[1] not in (1, 3):
            raise InputError(f"JPEG is for images of 1 or 3 channels (N, C, H, W); the inputs' shape is {tuple(x.shape)}")


@final
@dataclass(frozen=True)
class TotalVariance(InputTransform):
    """A share `drop` of the values is dropped at random; the image of least variation that fits the others takes their place.

    min_z  1/2 sum_kept (z - x)^2 + weight * [ sum_i |z_i,: - z_i-1,:|_2 + sum_j |z_:,j - z_:,j-1|_2 ]   for each channel

    which has one norm for each pair of neighbouring rows and columns, as in the authors' code. drop: 0.5, weight: 0.03 as in
    the paper. steps: of the primal-dual iteration (Chambolle & Pock 2011). BPDA with the identity, averaged over draws, as in
    Athalye, Carlini & Wagner (2018), section 5.3. Images only.
    Source: Guo et al. 2018, "Countering adversarial images using input transformations", arXiv:1711.00117, section 4.3.
    """

    drop: float = 0.5
    weight: float = 0.03
    steps: int = 100

    def __post_init__(self) -> None:
        _within(self, "drop", 0, 1)
        _within(self, "weight", 0, math.inf, low_excluded=True)
        _within(self, "steps", 1, 100_000)

    def transform(self, bounds: Bounds) -> Transform:
        def simplest(x: Tensor) -> Tensor:
            return least_variation(x, (torch.rand_like(x) >= self.drop).to(x.dtype), self.weight, self.steps)

        apply = _in_unit_range(self, simplest, bounds)
        return Transform(name=repr(self), apply=apply, backward="identity", random=self.drop > 0, images=True)


@final
@dataclass(frozen=True)
class RandomResizePad(InputTransform):
    """Each image is resized to s x s pixels, s from {smallest, ..., size - 1}, and put at a random place on size x size.

    Resized by nearest neighbours, padded with the low end of the range (0 without one). Exactly differentiable, averaged over
    draws. The network has to take size x size images: one for 299 pixels that takes others has smallest=299, size=331 in the
    paper; otherwise `size` is the images' own, and `smallest` a little less. Images only.
    Source: Xie et al. 2018, "Mitigating adversarial effects through randomization", arXiv:1711.01991, section 3.
    """

    smallest: int
    size: int

    def __post_init__(self) -> None:
        if not 1 <= self.smallest < self.size:
            raise InputError(f"1 <= smallest < size must hold; got smallest={self.smallest}, size={self.size}")

    def transform(self, bounds: Bounds) -> Transform:
        fill = bounds[0] if bounds is not None else 0.0

        def placed(x: Tensor) -> Tensor:
            side = torch.randint(self.smallest, self.size, (len(x), 1), device=x.device)
            rows, height = self._source(side, x.shape[2])
            columns, width = self._source(side, x.shape[3])
            inside = height[:, None, :, None] & width[:, None, None, :]
            return torch.where(inside, _gathered(x, rows, columns), torch.full((), fill, dtype=x.dtype, device=x.device))

        return Transform(name=repr(self), apply=placed, random=True, images=True)

    def _source(self, side: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Which row (or column) of the input each of the output's shows, (N, size), and which ones show any."""
        room = self.size - side + 1
        start = (torch.rand(len(side), 1, device=side.device) * room).long().clamp(max=room - 1)
        place = torch.arange(self.size, device=side.device) - start
        inside = (place >= 0) & (place < side)
        return (place * length // side).clamp(0, length - 1), inside


@final
@dataclass(frozen=True)
class CropRescale(InputTransform):
    """A random crop of size x size pixels, brought back to the images' size (bilinear); averaged over draws.

    size: the paper has 90 of 224 pixels and averages predictions over 30 crops: `sp.Defended(..., draws=30)`. Images only.
    Source: Guo et al. 2018, arXiv:1711.00117, section 4.1.
    """

    size: int

    def __post_init__(self) -> None:
        _within(self, "size", 1, 100_000)

    def transform(self, bounds: Bounds) -> Transform:
        def cropped(x: Tensor) -> Tensor:
            if self.size > min(x.shape[2:]):
                raise InputError(f"a crop of {self.size} pixels doesn't fit into images of shape {tuple(x.shape)}")
            rows, columns = (
                torch.randint(0, length - self.size + 1, (len(x), 1), device=x.device)
                + torch.arange(self.size, device=x.device)
                for length in x.shape[2:]
            )
            return interpolate(_gathered(x, rows, columns), x.shape[2:], mode="bilinear", align_corners=False)

        return Transform(name=repr(self), apply=cropped, random=True, images=True)


@final
@dataclass(frozen=True)
class Thermometer(InputTransform):
    """Each value x in the unit range becomes `levels` values: code_k = 1 if x > k / levels, else 0; k = 1, ..., levels.

    (N, C, ...) becomes (N, C * levels, ...), so the network is one that was trained on codes:
    `nn.Sequential(TransformLayer(Thermometer(16)), net)`. BPDA with the ramp min(max(2 (x - k / levels) + 1/2, 0), 1), which
    tells of the levels just above as well. By min(max(x - k / levels, 0), 1) of the paper on the attack, which knows those
    below alone, PGD leaves 47 % of digits (eps 0.15), by this one 18 %; slopes of 1/2 to 8 come to nearly the same.
    levels: 16 in the paper. Any input shape.
    Sources: Buckman et al. 2018, "Thermometer encoding: one hot way to resist adversarial examples", section 3; the attack:
    Athalye, Carlini & Wagner 2018, arXiv:1802.00420, section 5.2.
    """

    levels: int = 16

    def __post_init__(self) -> None:
        _within(self, "levels", 2, 1000)

    def transform(self, bounds: Bounds) -> Transform:
        def above(x: Tensor) -> Tensor:
            thresholds = torch.arange(1, self.levels + 1, dtype=x.dtype, device=x.device) / self.levels
            return x.unsqueeze(2) - thresholds.view(-1, *[1] * (x.dim() - 2))

        return Transform(
            name=repr(self),
            apply=_from_unit_range(self, lambda x: (above(x) > 0).to(x.dtype).flatten(1, 2), bounds),
            backward=_from_unit_range(self, lambda x: (2 * above(x) + 0.5).clamp(0, 1).flatten(1, 2), bounds),
        )


def least_variation(x: Tensor, kept: Tensor, weight: float, steps: int) -> Tensor:
    """The minimiser of `TotalVariance` for images x (N, C, H, W) and kept (N, C, H, W) of 0 and 1.

    The primal-dual iteration on  min_z max_{|p_i| <= weight}  1/2 sum kept (z - x)^2 + <p, D z>,  D the differences of rows and
    of columns, |D|^2 <= 8; p begins at 0, z at the mean of what is kept. With a weight of 0.03 a hundred steps come to 0.003 of
    the minimiser on photographs and digits.
    """
    primal = 0.12 / weight  # the product was measured; the step lengths' product must be 1 / 8 at most
    dual = 1 / (8 * primal)
    mean = (kept * x).sum((2, 3), keepdim=True) / kept.sum((2, 3), keepdim=True).clamp(min=1)
    z = ahead = torch.where(kept > 0, x, mean)
    p, q = torch.zeros_like(x[..., 1:, :]), torch.zeros_like(x[..., 1:])
    for _ in range(steps):
        p = _shortened(p + dual * ahead.diff(dim=2), weight, 3)
        q = _shortened(q + dual * ahead.diff(dim=3), weight, 2)
        slope = pad(p, (0, 0, 1, 0)) - pad(p, (0, 0, 0, 1)) + pad(q, (1, 0)) - pad(q, (0, 1))
        before, z = z, (z - primal * slope + primal * kept * x) / (1 + primal * kept)
        ahead = 2 * z - before
    return z


_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # the JPEG file format's


def _shortened(p: Tensor, length: float, dim: int) -> Tensor:
    """Vectors along `dim`, brought to `length` where they are longer."""
    shortened: Tensor = p * (length / p.norm(dim=dim, keepdim=True).clamp(min=length))
    return shortened


@cache
def _quantisation(quality: int) -> tuple[list[list[int]], list[list[int]]]:
    """The 8 x 8 tables for brightness and colour that Pillow divides by."""
    from PIL import Image

    with io.BytesIO() as file:
        Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
        with Image.open(file) as image:
            tables: dict[int, list[int]] = image.quantization  # type: ignore[attr-defined]  # which JPEG files have
    luma, chroma = ([list(tables[number][row : row + 8]) for row in range(0, 64, 8)] for number in (0, 1))
    return luma, chroma


def _rounded_blocks(x: Tensor, table: Tensor) -> Tensor:
    """Cosine coefficients of 8 x 8 blocks, divided by the table, softly rounded, and back."""
    k, n = torch.arange(8, dtype=x.dtype, device=x.device)[:, None], torch.arange(8, dtype=x.dtype, device=x.device)
    basis = torch.cos(math.pi * (2 * n + 1) * k / 16) / 2
    basis = torch.cat([basis[:1] / math.sqrt(2), basis[1:]])
    coefficients = basis @ x.unfold(2, 8, 8).unfold(3, 8, 8) @ basis.T / table
    whole = coefficients.detach().round()
    rest = coefficients - whole
    blocks = basis.T @ ((whole + (rest + rest**3) / 2) * table) @ basis
    return blocks.transpose(3, 4).reshape(x.shape)


def _gaussian(away: Tensor, sigma: float) -> Tensor:
    return torch.exp(-away.square() / (2 * sigma**2))


def _mirrored(x: Tensor, size: int) -> Tensor:
    """Images (N, C, H, W) with what windows of size x size pixels need beyond the edges, to (N, C, H + size - 1, ...)."""
    for dim in (2, 3):
        length = x.shape[dim]
        place = torch.arange(-(size // 2), length + (size - 1) // 2, device=x.device) % (2 * length)
        x = x.index_select(dim, torch.minimum(place, 2 * length - 1 - place))
    return x


def _windows(x: Tensor, size: int) -> Tensor:
    """The windows of size x size pixels around each pixel, (N, C, H, W, size, size)."""
    return _mirrored(x, size).unfold(2, size, 1).unfold(3, size, 1)


def _gathered(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """From images (N, C, H, W) the rows (N, P) and columns (N, Q) of each, (N, C, P, Q)."""
    batch, channel = torch.arange(len(x), device=x.device), torch.arange(x.shape[1], device=x.device)
    return x[batch[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def _smoothing(settings: InputTransform, function: Function) -> Transform:
    return Transform(name=repr(settings), apply=function, images=True)


def _from_unit_range(settings: InputTransform, function: Function, bounds: Bounds) -> Function:
    """The function of inputs in [0, 1] for inputs in `bounds`."""
    if bounds is None:
        raise InputError(f"{settings!r} needs inputs with a range: give the model finite bounds")
    low, high = bounds
    return lambda x: function((x - low) / (high - low))


def _in_unit_range(settings: InputTransform, function: Function, bounds: Bounds) -> Function:
    """The same where what comes out is in that range too, and goes back to `bounds`."""
    inner = _from_unit_range(settings, function, bounds)
    low, high = bounds if bounds is not None else (0.0, 1.0)
    return lambda x: inner(x) * (high - low) + low


def _within(settings: InputTransform, name: str, low: float, high: float, *, low_excluded: bool = False) -> None:
    value = getattr(settings, name)
    if not (low < value if low_excluded else low <= value) or not value <= high or value == math.inf:
        least = f"above {low:g}" if low_excluded else f"at least {low:g}"
        raise InputError(f"{name} must be {least}" + (f" and at most {high:g}" if high < math.inf else "") + f"; got {value}")
