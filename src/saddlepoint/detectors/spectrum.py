"""How much of an input lies along the principal components that clean inputs hardly use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from saddlepoint.detectors.base import Detector
from saddlepoint.errors import InputError
from saddlepoint.taxonomy import Access

_LARGEST = 2**14  # features; the covariance then takes 2 GB


@final
@dataclass(eq=False, kw_only=True)
class TailVariance(Detector):
    """The last PCA-whitened coefficients of the input vary:

        z = L^-1/2 V^T (x - mean),   score(x) = variance of z_s, ..., z_D

    V are the principal components of the clean inputs, by falling variance L. The network isn't looked at.

    Components of (nearly) no variance, such as MNIST's constant pixels, stay in: perturbations of them show nowhere else. But
    their variance counts as `floor` of the mean variance of an input feature, for divided by 0 or by rounding errors, the
    first clean input with a stroke at the rim would weigh more than any adversarial one.

    start: s, the first entry that counts, from 0; below 1 a share of D. The paper has 700 of 784 for MNIST, 2,500 of 3,072 for
        CIFAR-10 and 10,000 of 12,288 for Tiny ImageNet; the default lies among these shares.
    floor: smallest variance of a component, in units of the mean variance of a feature.

    Errors: `InputError` in fitting where there is no such entry, and for more than 16,384 features, whose covariance is too
    large.
    Source: Hendrycks & Gimpel (2017), Early methods for detecting adversarial images, arXiv:1608.00530, figure 1 and table 1;
    the floor is ours.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> detector = sp.detectors.TailVariance(start=48).fit(sp.Model(sp.zoo.build("digits-cnn")), digits.train)
    >>> x = digits.test.x[:100]
    >>> bool(detector.score((x + 0.1 * x.sin().sign()).clamp(0, 1)).median() > detector.score(x).median())
    True
    """

    summary: ClassVar[str] = "it varies along the components along which clean inputs don't"
    reference: ClassVar[str] = "Hendrycks & Gimpel 2017, arXiv:1608.00530"
    access: ClassVar[Access] = Access.TRANSFER

    start: float = 0.85
    floor: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.start >= 0 or (self.start >= 1 and self.start != int(self.start)):
            raise InputError(f"start must be an entry, 1, 2, ..., or a share of them in [0, 1); got {self.start}")
        if not 0 < self.floor < float("inf"):
            raise InputError(f"floor must be positive; got {self.floor}")

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        flat = clean.flatten(1)
        dimension = flat.shape[1]
        if dimension > _LARGEST:
            raise InputError(f"the covariance of {dimension:,} features is too large: TailVariance takes at most {_LARGEST:,}")
        start = int(self.start) if self.start >= 1 else int(self.start * dimension)
        if start > dimension - 2:
            raise InputError(f"inputs have {dimension} features: at least two must come after start={self.start:g}")
        mean = flat.double().mean(0)
        covariance = torch.zeros(dimension, dimension, dtype=torch.float64, device=flat.device)
        for part in torch.split(flat, 1024):
            covariance.addmm_((part - mean).T, part - mean, alpha=1 / len(flat))
        variances, components = torch.linalg.eigh(covariance)  # rising
        smallest = self.floor * float(variances.mean()) or 1.0  # 0 where all inputs are the same; then any unit will do
        tail = slice(0, dimension - start)
        whiten = components[:, tail] / variances[tail].clamp(min=smallest).sqrt()
        return {"mean": mean.to(flat), "whiten": whiten.to(flat).contiguous()}

    def forward(self, x: Tensor) -> Tensor:
        return ((x.flatten(1) - self.arrays["mean"]) @ self.arrays["whiten"]).var(1, correction=0)
