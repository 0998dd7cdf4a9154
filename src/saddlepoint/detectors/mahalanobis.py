"""Distances to the nearest class in hidden layers, measured by the spread that the classes share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from saddlepoint.detectors.base import Detector
from saddlepoint.detectors.layers import activations, checked_layers, hidden_layers, layers_in, squared_distances
from saddlepoint.errors import InputError


@final
@dataclass(eq=False, kw_only=True)
class Mahalanobis(Detector):
    """Hidden layers are far from those of every class:

        d_l(x) = min_c (f_l(x) - mu_lc)^T S_l^-1 (f_l(x) - mu_lc),   score(x) = sum_l (d_l(x) - mean_l) / std_l

    f_l is the mean over all positions of a feature map, mu_lc a class's mean, S_l the covariance around the class means, which
    all classes share, and mean_l and std_l standardise the distances of the clean samples. Classes without a sample don't
    count. Weights learnt on adversarial examples, as in the paper, are a combination's: one detector a layer.

    layers: names of modules, or `LAST`; None: all hidden layers, as in the paper.
    ridge: the part of the mean variance that is added to the variance in each direction. Without it, directions in which
        clean samples don't vary, such as units that are always 0, would make the distance infinite.
    step: of the paper's preprocessing, x - step sign(grad score(x)): clean inputs come nearer than adversarial ones. The paper
        tries 0 to 0.01. It costs a gradient, and here one step is made for all layers.

    Source: Lee, Lee, Lee & Shin (2018), A simple unified framework for detecting out-of-distribution samples and adversarial
    attacks, arXiv:1807.03888, equations 1 and 2, algorithm 1.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> detector = sp.detectors.Mahalanobis(layers=("1", "3")).fit(model, digits.train)
    >>> detector.score(digits.test.x[:4]).shape
    torch.Size([4])
    """

    summary: ClassVar[str] = "hidden layers are far from those of every class, by the spread within classes"
    reference: ClassVar[str] = "Lee et al. 2018, arXiv:1807.03888"

    layers: tuple[str, ...] | None = None
    ridge: float = 1e-4
    step: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layers = checked_layers(self.layers)
        if not 0 < self.ridge < math.inf:
            raise InputError(f"ridge must be positive; got {self.ridge}")
        if not 0 <= self.step < math.inf:
            raise InputError(f"step must be at least 0; got {self.step}")

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        layers = self.layers or hidden_layers(self.model, clean)
        found: dict[str, Tensor] = {}
        classes, own = torch.unique(labels, return_inverse=True)
        widths = [f.shape[1] for f in self._features(clean[:1], layers)]
        joined = self.over(lambda x: torch.cat(self._features(x, layers), 1), clean)
        for layer, f in zip(layers, torch.split(joined, widths, 1), strict=True):
            wide = f.double()
            means = wide.new_zeros(len(classes), f.shape[1]).index_add(0, own, wide) / own.bincount()[:, None]
            within = wide - means[own]
            covariance = within.T @ within / len(f)
            variance = float(covariance.diagonal().mean()) or 1.0  # 0 where nothing varies; then any unit will do
            covariance.diagonal().add_(self.ridge * variance)
            identity = torch.eye(f.shape[1], dtype=wide.dtype, device=wide.device)
            whiten = (
                torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), identity, upper=False).T.contiguous().to(f)
            )
            whitened = means.to(f) @ whiten
            distances = squared_distances(f @ whiten, whitened).amin(1).double()
            std = distances.std(correction=0)
            found |= {
                f"whiten.{layer}": whiten, f"means.{layer}": whitened,
                f"scale.{layer}": torch.stack([distances.mean(), torch.where(std > 0, std, 1.0)]).to(f),
            }  # fmt: skip
        return found

    def forward(self, x: Tensor) -> Tensor:
        if self.step:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.distance(leaf).sum(), leaf)
            low, high = self.model.bounds or (None, None)
            x = (x - self.step * gradient.sign()).clamp(low, high)
        return self.distance(x)

    def distance(self, x: Tensor) -> Tensor:
        """The score without preprocessing, (N,)."""
        layers = layers_in(self.arrays, "means.")
        total = torch.zeros((), device=x.device)
        for layer, f in zip(layers, self._features(x, layers), strict=True):
            whiten, means, (mean, std) = (self.arrays[f"{name}.{layer}"] for name in ("whiten", "means", "scale"))
            total = total + (squared_distances(f @ whiten, means).amin(1) - mean) / std
        return total

    def _features(self, x: Tensor, layers: Sequence[str]) -> list[Tensor]:
        """Of each layer the mean over all positions: (N, C, ...) -> (N, C)."""
        return [f.reshape(*f.shape[:2], -1).mean(2) for f in activations(self.model, x, layers)[1]]
