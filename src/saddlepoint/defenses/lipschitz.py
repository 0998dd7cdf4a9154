"""Networks that are 1-Lipschitz in l2 by construction, and the radius within which their answers are thereby proven.

Where no logit moves faster than the input, a margin can't be used up by a small step. Layers are scaled by themselves: no
projection or penalty is needed, and the scaling is part of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, cross_entropy, linear, one_hot

from saddlepoint.attacks.ascent import PGD
from saddlepoint.defenses.objectives import Batch, Objective, check_number, radius, soft
from saddlepoint.defenses.single_step import check_ball
from saddlepoint.engine import Attack
from saddlepoint.errors import InputError, ModelError
from saddlepoint.models.torch_model import Model
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import Threat

_TINY = 1e-12


def _products(rows: Tensor) -> Tensor:
    """sum over offsets of |M M^T| between rows (R, R), of a matrix (R, D) or a kernel (R, D, k, k).

    For a kernel M M^T is its correlation with itself, at every pixel the same one where the convolution has stride 1 and all of
    its outputs. Fewer (a stride, less padding) are some of its rows, or of its columns, which make no norm larger.
    """
    if rows.dim() == 2:
        return (rows @ rows.T).abs()
    return conv2d(rows, rows, padding=(rows.shape[2] - 1, rows.shape[3] - 1)).abs().sum((2, 3))


def _scale(weight: Tensor) -> Tensor:
    """d_i = (sum_j |W^T W|_ij)^(-1/2), by which inputs are scaled: a diagonal of row sums dominates W^T W."""
    return _products(weight.transpose(0, 1)).sum(1).clamp(min=_TINY).rsqrt()


def _check_kernel(kernel: int, who: str) -> None:
    if not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
        raise InputError(f"{who}: kernel must be an odd number, so that images keep their size; got {kernel}")


@final
class AOLLinear(nn.Linear):
    """An almost orthogonal layer: W diag(d) x + b, d_i = (sum_j |W^T W|_ij)^(-1/2), which is 1-Lipschitz in l2.

    Source: Prach & Lampert (2022), Almost-orthogonal layers for efficient general-purpose Lipschitz networks,
    arXiv:2208.03160, theorem 1.

    >>> layer = AOLLinear(8, 4)
    >>> bool(torch.linalg.matrix_norm(layer.scaled(), 2) <= 1 + 1e-6)
    True
    """

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def scaled(self) -> Tensor:
        """The matrix that is applied, (out, in)."""
        return self.weight * _scale(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.scaled(), self.bias)


@final
class AOLConv2d(nn.Conv2d):
    """An almost orthogonal convolution: its input channels are scaled as `AOLLinear`'s inputs are; 1-Lipschitz in l2.

    Padding is with zeros and keeps the size, as the kernel is odd; stride as usual.

    Source: Prach & Lampert (2022), arXiv:2208.03160, theorem 2.

    >>> AOLConv2d(3, 8, 3)(torch.zeros(2, 3, 6, 6)).shape
    torch.Size([2, 8, 6, 6])
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, bias: bool = True) -> None:
        _check_kernel(kernel, "AOLConv2d")
        super().__init__(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        middle = self.kernel_size[0] // 2
        with torch.no_grad():
            nn.init.orthogonal_(self.weight[:, :, middle, middle])
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        scaled = self.weight * _scale(self.weight)[:, None, None]
        return conv2d(input, scaled, self.bias, self.stride, self.padding)


class _Residual(nn.Module):
    """x - 2 W T^-1 relu(W^T x + b), 1-Lipschitz since T = diag(sum_j |W^T W|_ij q_j / q_i) >= W^T W; q > 0 is learned.

    weight: W^T, (hidden, in), or the kernel of a convolution (hidden, in, k, k).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(shape[0]))
        self.log_q = nn.Parameter(torch.zeros(shape[0]))
        nn.init.xavier_normal_(self.weight)

    def _inverse(self) -> Tensor:
        """The diagonal of 2 T^-1, (hidden,)."""
        q = self.log_q.exp()
        return 2 / ((_products(self.weight) * q).sum(1) / q).clamp(min=_TINY)


@final
class SLLLinear(_Residual):
    """A residual layer that is 1-Lipschitz in l2: x - 2 W T^-1 relu(W^T x + b), T = diag(sum_j |W^T W|_ij q_j / q_i).

    features: of x; hidden: rows of W^T, as many by default.

    Source: Araujo, Havens, Delattre, Allauzen & Hu (2023), A unified algebraic perspective on Lipschitz neural networks,
    arXiv:2303.03169, theorem 3 and eq. 11.

    >>> SLLLinear(8, 16)(torch.zeros(2, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(self, features: int, hidden: int | None = None) -> None:
        super().__init__((hidden or features, features))

    def forward(self, input: Tensor) -> Tensor:
        return input - linear(self._inverse() * linear(input, self.weight, self.bias).relu(), self.weight.T)


@final
class SLLConv2d(_Residual):
    """`SLLLinear` as a convolution, with zeros around the image: channels of x, hidden ones, an odd kernel.

    Source: Araujo et al. (2023), arXiv:2303.03169.

    >>> SLLConv2d(4, 8, 3)(torch.zeros(2, 4, 6, 6)).shape
    torch.Size([2, 4, 6, 6])
    """

    def __init__(self, channels: int, hidden: int | None = None, kernel: int = 3) -> None:
        _check_kernel(kernel, "SLLConv2d")
        super().__init__((hidden or channels, channels, kernel, kernel))

    def forward(self, input: Tensor) -> Tensor:
        padding = self.weight.shape[2] // 2
        inner = conv2d(input, self.weight, self.bias, padding=padding).relu()
        return input - conv_transpose2d(self._inverse()[:, None, None] * inner, self.weight, padding=padding)


@final
class MaxMin(nn.Module):
    """Pairs of channels (dimension 1), the larger one first: the one activation here that keeps every gradient's norm.

    Source: Anil, Lucas & Grosse (2019), Sorting out Lipschitz function approximation, arXiv:1811.05381, section 4.1.

    >>> MaxMin()(torch.tensor([[1.0, 2.0, 4.0, 3.0]]))
    tensor([[2., 4., 1., 3.]])
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[1] % 2:
            raise InputError(f"MaxMin sorts pairs of channels; the input has {input.shape[1]}")
        first, second = input[:, ::2], input[:, 1::2]
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], 1)


@final
class FirstChannels(nn.Module):
    """Zeros as channels that x lacks, so that residual layers can be wider than it: 1-Lipschitz.

    >>> FirstChannels(4)(torch.ones(1, 1, 2, 2)).sum()
    tensor(4.)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, input: Tensor) -> Tensor:
        missing = self.channels - input.shape[1]
        if missing < 0:
            raise InputError(f"FirstChannels({self.channels}) can't drop channels; the input has {input.shape[1]}")
        return torch.cat([input, input.new_zeros(len(input), missing, *input.shape[2:])], 1)


_KNOWN = (
    AOLLinear, AOLConv2d, SLLLinear, SLLConv2d, MaxMin, FirstChannels, nn.ReLU, nn.Tanh, nn.Flatten, nn.Unflatten,
    nn.Identity, nn.PixelUnshuffle, nn.PixelShuffle, nn.Dropout,
)  # fmt: skip


def _layers(net: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers in the order in which they run. `ModelError` unless the network is made of `nn.Sequential`s."""
    if type(net) is not nn.Sequential:
        yield name or "the network", net
        return
    for inner, module in net.named_children():
        yield from _layers(module, f"{name}.{inner}" if name else inner)


def certified_radius(model: Model, x: Tensor) -> Tensor:
    """The l2 radius (N,) around each input (N, ...) within which the predicted class is proven to stay.

        min over j of (z_y - z_j) / (L |w_y - w_j|_2)

    w: rows of the last layer where it is linear (`nn.Linear` or `AOLLinear`), else |w_y - w_j| is sqrt(2); L: 1 over the
    smallest std that the model divides by. All other layers must be of those here, or ReLU, tanh, flattening, pixel shuffles,
    in `nn.Sequential`. 0 where two classes tie. Rounding: of the dtype; in float32 subtract 1e-5 of the logits' size.
    Errors: `ModelError` that names the layer which isn't known to be 1-Lipschitz.

    Source: Tsuzuku, Sato & Sugiyama (2018), Lipschitz-margin training, arXiv:1802.04034, proposition 1; for rows of the last
    layer: Singla, Singla & Feizi (2022), arXiv:2108.04062.

    >>> import saddlepoint as sp
    >>> net = nn.Sequential(nn.Flatten(), AOLLinear(64, 32), MaxMin(), AOLLinear(32, 10))
    >>> certified_radius(sp.Model(net), torch.rand(2, 1, 8, 8)).shape
    torch.Size([2])
    """
    if not isinstance(model, Model) or not isinstance(model.net, nn.Module) or model.describe()["gives"] != "logits":
        raise ModelError("a Lipschitz certificate needs a Model of an nn.Module that gives logits, with nothing before it")
    model.check_inputs(x)
    *body, (_, head) = _layers(model.net)
    for name, layer in [*body, *([] if isinstance(head, nn.Linear) else [("the last layer", head)])]:
        if type(layer) not in _KNOWN:
            raise ModelError(
                f"{name} is {type(layer).__name__}, which isn't known to be 1-Lipschitz; known are "
                f"{', '.join(kind.__name__ for kind in _KNOWN)} in nn.Sequential, and nn.Linear as the last layer"
            )
    logits = model.logits(x)
    scores, classes = logits.max(1)
    steep = torch.full((logits.shape[1],) * 2, math.sqrt(2), dtype=logits.dtype, device=logits.device)
    with torch.no_grad():
        if isinstance(head, nn.Linear):
            w = head.scaled() if isinstance(head, AOLLinear) else head.weight
            steep = (w[:, None] - w[None]).norm(dim=2)
            if len(w) != logits.shape[1]:
                raise ModelError(f"the last layer gives {len(w)} numbers, but there are {logits.shape[1]} logits")
    radii = _smallest_std(model) * (scores[:, None] - logits) / steep[classes].clamp(min=_TINY)
    return radii.masked_fill(one_hot(classes, logits.shape[1]).bool(), math.inf).amin(1)


def _smallest_std(model: Model) -> float:
    """What the inputs are divided by, at least."""
    std = model.describe()["std"]
    return 1.0 if std is None else min(std) if isinstance(std, list) else float(str(std))


@final
@dataclass(frozen=True, kw_only=True)
class LipschitzMargin(Objective):
    """Cross-entropy that asks 1-Lipschitz networks for a margin: T L((z - offset e_y) / T, y).

    threat: l2; validation is under its PGD, which is no proof: see `certified_radius`. offset: sqrt(2) times the radius that is
    wished for, or None for that of threat; temperature: T, 1/4 in the paper.

    Source: Prach & Lampert (2022), arXiv:2208.03160, section 5.

    >>> import saddlepoint as sp
    >>> LipschitzMargin(threat=sp.L2(1.0)).margin
    1.4142135623730951
    """

    threat: Threat
    offset: float | None = None
    temperature: float = 0.25

    def __post_init__(self) -> None:
        check_ball(self, self.threat)
        if self.threat.norm is not Norm.L2:
            raise InputError(f"LipschitzMargin is for l2, in which its layers are 1-Lipschitz; got {self.threat}")
        check_number(self, above=0, temperature=self.temperature)
        check_number(self, least=0, offset=self.margin)

    @property
    def margin(self) -> float:
        """The offset."""
        return math.sqrt(2) * radius(self.threat) if self.offset is None else self.offset

    @property
    def adversary(self) -> tuple[Attack, Threat]:
        return PGD(steps=10), self.threat

    def loss(self, batch: Batch) -> Tensor:
        logits = batch.model.forward(batch.x)
        given = soft(batch.y, logits.shape[1], logits.dtype)
        return self.temperature * cross_entropy((logits - self.margin * given) / self.temperature, batch.y)
