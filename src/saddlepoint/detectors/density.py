"""How dense the clean samples of the predicted class lie around an input, in a hidden layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from saddlepoint.detectors.base import Detector
from saddlepoint.detectors.layers import LAST, activations, squared_distances
from saddlepoint.errors import InputError

_BANDWIDTHS, _HELD_OUT, _CHUNK = 20, 1000, 2**22  # tried, samples judged, and entries of a matrix of distances at once


@final
@dataclass(eq=False, kw_only=True)
class KernelDensity(Detector):
    """Few clean samples of the predicted class lie near the input, in a hidden layer:

        score(x) = -log (1 / |X_t|) sum_{x_i in X_t} N(phi(x); phi(x_i), h^2 I)

    phi is the layer's output, t the predicted class, X_t its clean samples. A class without a clean sample is measured against
    all of them.

    layer: a module's name; by default the last hidden layer, as in the paper.
    bandwidth: h, in units of the layer; the paper has 1.20 for MNIST, 0.26 for CIFAR-10, 1.00 for SVHN. None: one for all
        classes, by cross-validation. Of 1,000 samples (or all) each is left out in turn, and of 20 bandwidths that one is
        taken under which the others of its class make it most likely.
    samples: how many to keep of each class, drawn at random; None: all.

    Source: Feinman, Curtin, Shintre & Gardner (2017), Detecting adversarial samples from artifacts, arXiv:1703.00410,
    section 4.1; normalised, so that it is a density.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> detector = sp.detectors.KernelDensity(samples=50).fit(model, digits.train)
    >>> detector.score(digits.test.x[:4]).shape
    torch.Size([4])
    """

    summary: ClassVar[str] = "few clean samples of the predicted class are near it in the last hidden layer"
    reference: ClassVar[str] = "Feinman et al. 2017, arXiv:1703.00410"

    layer: str = LAST
    bandwidth: float | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layer = str(self.layer)  # in text, the name "3" is read as a number
        if self.bandwidth is not None and not 0 < self.bandwidth < math.inf:
            raise InputError(f"bandwidth must be positive, or None for cross-validation; got {self.bandwidth}")
        if self.samples is not None and self.samples < 1:
            raise InputError(f"samples must be at least 1, or None for all; got {self.samples}")

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        kept = slice(None) if self.samples is None else at_most(labels, self.samples)
        points = self.over(lambda x: activations(self.model, x, (self.layer,))[1][0].flatten(1), clean[kept])
        labels = labels[kept]
        h = likeliest_bandwidth(points, labels) if self.bandwidth is None else points.new_tensor(self.bandwidth)
        return {"points": points, "labels": labels, "bandwidth": h}

    def forward(self, x: Tensor) -> Tensor:
        points, labels, h = (self.arrays[name] for name in ("points", "labels", "bandwidth"))
        logits, (phi,) = activations(self.model, x, (self.layer,))
        own = labels == logits.argmax(1)[:, None]
        return -_log_density(squared_distances(phi.flatten(1), points), own, h, points.shape[1])


def _log_density(distances: Tensor, own: Tensor, h: Tensor, dimension: int) -> Tensor:
    """log of the mean over own (N, M) of N(.; ., h^2 I) at squared distances (N, M); over all where none is its own."""
    own = own | ~own.any(1, keepdim=True)
    kernels = (-distances / (2 * h * h)).masked_fill(~own, -math.inf)
    return kernels.logsumexp(1) - own.sum(1).to(distances).log() - dimension * (h.log() + math.log(2 * math.pi) / 2)


def likeliest_bandwidth(points: Tensor, labels: Tensor) -> Tensor:
    """The bandwidth () under which points (N, D) are most likely, each by the others of its class.

    At a stationary point of the likelihood, h^2 D is a mean of weighted squared distances to the others, and therefore lies
    between the mean to the nearest and the mean to all: so the bandwidths tried are spread between these two.
    """
    judged = torch.randperm(len(points))[:_HELD_OUT].to(points.device)
    chunks = torch.split(judged, max(1, _CHUNK // len(points)))

    def left_out(rows: Tensor) -> tuple[Tensor, Tensor]:
        distances = squared_distances(points[rows], points)
        others = torch.arange(len(points), device=points.device) != rows[:, None]
        own = (labels == labels[rows, None]) & others
        return distances, torch.where(own.any(1, keepdim=True), own, others)

    nearest, overall = points.new_zeros((), dtype=torch.float64), points.new_zeros((), dtype=torch.float64)
    for rows in chunks:
        distances, own = left_out(rows)
        nearest += distances.masked_fill(~own, math.inf).amin(1).double().sum()
        overall += ((distances * own).sum(1) / own.sum(1)).double().sum()
    dimension = points.shape[1]
    largest = float(overall / len(judged) / dimension) ** 0.5 or 1.0  # all the same: any will do
    smallest = max(float(nearest / len(judged) / dimension) ** 0.5, 1e-3 * largest)
    tried = torch.logspace(math.log10(smallest), math.log10(largest), _BANDWIDTHS, dtype=torch.float64).to(points)
    likelihood = torch.zeros_like(tried, dtype=torch.float64)
    for rows in chunks:
        distances, own = left_out(rows)
        likelihood += torch.stack([_log_density(distances, own, h, dimension).double().sum() for h in tried])
    return tried[likelihood.argmax()]


def at_most(labels: Tensor, count: int) -> Tensor:
    """Indices of `count` random samples of each class in labels (N,), or of all that it has."""
    order = torch.randperm(len(labels)).to(labels.device)
    order = order[labels[order].argsort(stable=True)]
    _, counts = torch.unique(labels, return_counts=True)
    rank = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return order[rank < count]
