"""Ascent whose examples are meant for other models: gradients averaged over what those may see differently.

Momentum ascent (`MIFGSM`, `NIFGSM`) fits its own model, and more so the longer it runs. What carries over to others is found by
gradients at several views of the same input, and around it:

    g_k     = W * mean_i grad_x L(D(x_k / 2^i), y),  i = 0 ... scales - 1     D: resized and padded at random; W: a Gaussian
    v_k     = mean_j g(x_k + r_j) - g(x_k),          j = 1 ... neighbours     r_j: random in neighbourhood * eps
    m_(k+1) = momentum * m_k + (g_k + v_(k-1)) / mean|g_k + v_(k-1)|
    x_(k+1) = project(x_k + alpha * steepest(m_(k+1)))

Each part can be had with each other one; the names below are the literature's settings. As measured on one's own model these
attacks are weaker than PGD. Judge them by `sp.transfer_matrix`, or attack an `sp.Ensemble` with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from saddlepoint.attacks.ascent import Recipe, SteepestAscent
from saddlepoint.attacks.registry import register
from saddlepoint.engine import Declaration, Problem
from saddlepoint.errors import InputError
from saddlepoint.goals import Loss
from saddlepoint.rng import Keys
from saddlepoint.taxonomy import Norm
from saddlepoint.trees import rows, take

_SMALLEST = 0.9  # of an input's side, when it is resized: 299 of 330 pixels in Xie et al. (2019)
_SPREAD = 3.0  # standard deviations from the middle of the Gaussian kernel to its end
_NORMS = frozenset({Norm.LINF, Norm.L2})


@dataclass(frozen=True)
class Views:
    """The mean gradient over scaled copies of a point, each resized with probability `diversity`, smoothed by a kernel."""

    diversity: float
    kernel: int
    scales: int

    def __post_init__(self) -> None:
        if not 0 <= self.diversity <= 1:
            raise InputError(f"diversity is a probability in [0, 1]; got {self.diversity}")
        if not isinstance(self.kernel, int) or self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError(f"kernel must be an odd whole number of pixels, 1 for none; got {self.kernel}")
        if not isinstance(self.scales, int) or self.scales < 1:
            raise InputError(f"scales must be a whole number >= 1; got {self.scales}")

    @property
    def rows(self) -> int:
        return self.scales

    @property
    def own(self) -> bool:
        return self.diversity == 0

    def __call__(self, problem: Problem, points: Tensor, loss: str | Loss, owner: Tensor | None, keys: Keys) -> Tensor:
        if self.scales == 1 and self.own:
            return self._smoothed(problem.loss_and_grad(points, loss, owner).gradient)
        each = torch.arange(len(points), device=points.device).repeat_interleave(self.scales)
        power = torch.arange(self.scales - 1, -1, -1, device=points.device).repeat(len(points))  # the point itself comes last
        owners, factor = each if owner is None else owner[each], rows((0.5**power).to(points.dtype), points)
        views = points[each] * factor
        if self.own:
            gradient = problem.loss_and_grad(views, loss, owners).gradient
        else:
            matrices = resizing(take(keys, each).absorb(power), views, self.diversity)
            low, high = problem.region.bounds
            border = min(max(0.0, low), high)
            seen = _along(views - border, matrices) + border
            gradient = _along(problem.loss_and_grad(seen, loss, owners).gradient, [matrix.mT for matrix in matrices])
        return self._smoothed((gradient * factor).view(len(points), self.scales, *points.shape[1:]).mean(1))

    def _smoothed(self, gradient: Tensor) -> Tensor:
        if self.kernel == 1:
            return gradient
        return _along(gradient, [gaussian(gradient.shape[axis], self.kernel).to(gradient) for axis in _axes(gradient)])


def _axes(x: Tensor) -> range:
    """The axes of x (Q, ...) along which neighbours are alike: all behind the channels, or the only one."""
    return range(2, x.dim()) if x.dim() > 2 else range(1, 2)


def _along(x: Tensor, matrices: list[Tensor]) -> Tensor:
    """x (Q, ...) times a matrix (n, n) or (Q, n, n) along each of its axes."""
    for axis, matrix in zip(_axes(x), matrices, strict=True):
        moved = x.movedim(axis, 1)
        x = (matrix @ moved.reshape(*moved.shape[:2], -1)).view(moved.shape).movedim(1, axis)
    return x


def resizing(keys: Keys, x: Tensor, probability: float) -> list[Tensor]:
    """For each axis of x (Q, ...) matrices (Q, n, n) that shrink to a random size and put the result at a random place.

    Bilinear, from 0.9 of the size upwards, the same share along all axes; with zeros around. One in 1 / probability is changed,
    for the others they are the identity.
    """
    changed = keys.absorb(0).uniform((), torch.float64) < probability
    share, matrices = keys.absorb(1).uniform((), torch.float64), []
    for axis in _axes(x):
        side = x.shape[axis]
        least = max(1, math.floor(_SMALLEST * side))
        size = torch.where(changed, least + (share * (side - least)).floor(), side)
        offset = (keys.absorb(1 + axis).uniform((), torch.float64) * (side - size + 1)).floor()
        matrices.append(resized(size, offset, side).to(x.dtype))
    return matrices


def resized(size: Tensor, offset: Tensor, side: int) -> Tensor:
    """Matrices (Q, side, side) that interpolate `side` entries to `size` (Q,) ones, which begin at `offset` (Q,)."""
    place = torch.arange(side, dtype=torch.float64, device=size.device)
    row = place - offset[:, None]
    source = ((row + 0.5) * (side / size)[:, None] - 0.5).clamp(0, side - 1)  # centres of pixels, as in interpolate()
    weight = (1 - (source[:, :, None] - place).abs()).clamp(min=0)
    return weight * ((row >= 0) & (row < size[:, None]))[:, :, None]


def gaussian(side: int, length: int) -> Tensor:
    """The matrix (side, side) that convolves with a Gaussian of so many entries, three standard deviations to each end."""
    half = length // 2
    offsets = torch.arange(side, dtype=torch.float64)
    offsets = offsets[:, None] - offsets

    def density(offset: Tensor) -> Tensor:
        return torch.exp(-((_SPREAD * offset / max(half, 1)) ** 2) / 2)

    return density(offsets) * (offsets.abs() <= half) / density(torch.arange(-half, half + 1)).sum()


@dataclass(frozen=True, kw_only=True)
class _Transferring(SteepestAscent):
    """Base of the family: all its parts, each off. The members differ in their defaults."""

    steps: int = 10
    step_size: float | None = None
    momentum: float = 1.0
    look_ahead: bool = False
    diversity: float = 0.0
    kernel: int = 1
    scales: int = 1
    neighbours: int = 0
    neighbourhood: float = 1.5
    loss: str | Loss = "cross_entropy"

    @final
    def recipe(self) -> Recipe:
        views = Views(self.diversity, self.kernel, self.scales)
        return Recipe(
            steps=self.steps,
            loss=self.loss,
            step_size=self.step_size,
            momentum=self.momentum,
            look_ahead=self.look_ahead,
            slope=None if views == Views(0.0, 1, 1) else views,
            neighbours=self.neighbours,
            neighbourhood=self.neighbourhood,
        )


@register(
    Declaration(
        summary="momentum, with the gradient of a randomly resized and padded input",
        reference="Xie et al. 2019, arXiv:1803.06978",
        norms=_NORMS,
        spatial=True,
        no_oracle="the gradient of a resized input is that of the input blurred and moved",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class DIFGSM(_Transferring):
    """M-DI2-FGSM: before each gradient the input is resized and padded at random with probability `diversity`.

    diversity: p, 0.5 in the paper. The paper enlarges 299 pixels to up to 330; here the input keeps its size, so it shrinks to
    0.9 of it at least, and lies somewhere on a ground of 0. momentum: 1 in the paper, 0 for its DI2-FGSM.
    step_size: None means eps / steps. The other settings add the other parts: see this module, and `TIFGSM`, `SINIFGSM`,
    `VMIFGSM`. Along all axes behind the channels, or the only one.

    Source: Xie, Zhang, Zhou, Bai, Wang, Ren & Yuille (2019), Improving transferability of adversarial examples with input
    diversity, arXiv:1803.06978, section 3.3 and algorithm 1.
    """

    diversity: float = 0.5


@register(
    Declaration(
        summary="momentum, with the gradient smoothed as over all small translations of the input",
        reference="Dong et al. 2019, arXiv:1904.02884",
        norms=_NORMS,
        spatial=True,
        no_oracle="smoothing mixes the gradient's entries, so that the step is no longer the steepest one",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class TIFGSM(_Transferring):
    """TI-MI-FGSM: the gradient W * grad L, convolved with a Gaussian W, stands for that over translated inputs.

    kernel: pixels along each axis, 15 in the paper (on 299 x 299 images), up to three standard deviations from the middle.
    `TIFGSM(diversity=0.5)` is the paper's TI-DIM. The others as in `DIFGSM`.

    Source: Dong, Pang, Su & Zhu (2019), Evading defenses to transferable adversarial examples by translation-invariant
    attacks, arXiv:1904.02884, eq. 6 to 9.
    """

    kernel: int = 15


@register(
    Declaration(
        summary="Nesterov momentum, with the mean gradient of the input at several scales",
        reference="Lin et al. 2020, arXiv:1908.06281",
        norms=_NORMS,
        linear_oracle=1.0,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class SINIFGSM(_Transferring):
    """SI-NI-FGSM: the gradient is the mean of those of L(x / 2^i), i = 0 ... scales - 1, taken at the point ahead.

    scales: m, 5 in the paper: as many forward and backward passes a step, and one more that judges the iterate.
    look_ahead: False gives SI-MI-FGSM. With kernel=7 and diversity=0.5 it is the paper's SI-NI-TI-DIM. The others as in
    `DIFGSM`.

    Source: Lin, Song, He, Wang & Hopcroft (2020), Nesterov accelerated gradient and scale invariance for adversarial
    attacks, arXiv:1908.06281, eq. 6 to 9 and algorithm 1.
    """

    look_ahead: bool = True
    scales: int = 5


_VARIANCE = "Wang & He 2021, arXiv:2103.15571"


@register(
    Declaration(
        summary="momentum, with the gradient corrected by those around the last point",
        reference=_VARIANCE,
        norms=_NORMS,
        linear_oracle=1.0,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class VMIFGSM(_Transferring):
    """VMI-FGSM: m_(k+1) = mu m_k + (g_k + v_(k-1)) / mean|.|, with v the mean gradient of neighbours less the gradient.

    neighbours: N, 20 in the paper. neighbourhood: beta, 1.5; they are drawn uniformly from the ball of beta * eps. From the
    second step on a step costs 1 + N passes of each kind. The others as in `DIFGSM`.

    Source: Wang & He (2021), Enhancing the transferability of adversarial attacks through variance tuning,
    arXiv:2103.15571, eq. 3 to 6 and algorithm 1.
    """

    neighbours: int = 20


@register(
    Declaration(
        summary="Nesterov momentum, with the gradient corrected by those around the last point",
        reference=_VARIANCE,
        norms=_NORMS,
        linear_oracle=1.0,
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class VNIFGSM(_Transferring):
    """VNI-FGSM: `VMIFGSM` with the gradients taken at the point ahead, x_k + alpha * mu * m_k.

    With diversity=0.5, kernel=7 and scales=5 it is the paper's VNI-CT-FGSM. The others as in `VMIFGSM`.

    Source: Wang & He (2021), as for `VMIFGSM`.
    """

    look_ahead: bool = True
    neighbours: int = 20
