"""Scanning a layer for the subset of units whose activations are the least usual together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

import torch
from torch import Tensor

from saddlepoint.detectors.base import Detector
from saddlepoint.detectors.layers import activations, hidden_layers
from saddlepoint.errors import InputError

Statistic = Literal["berk-jones", "higher-criticism"]
Tail = Literal["both", "upper", "lower"]


@final
@dataclass(eq=False, kw_only=True)
class SubsetScan(Detector):
    """Some units of a layer are unusual together: the largest score of any subset S of them,

        score(x) = max over alpha and S of phi(alpha, N_alpha(S), |S|),   N_alpha(S) = how many in S have p_j <= alpha

    p_j is the empirical p-value of unit j, (1 + how many clean samples are as extreme) / (samples + 1), and phi is
    "berk-jones":       |S| KL( N_alpha / |S|, alpha ), between coins of these odds
    "higher-criticism": (N_alpha - |S| alpha) / sqrt(|S| alpha (1 - alpha))

    For a given alpha the best subset is all the units with p_j <= alpha; so with p_(1) <= p_(2) <= ... the maximum is that of
    -k log p_(k), or of sqrt(k (1 - p_(k)) / p_(k)), over k.

    layer: a module's name; None: the first hidden layer, where the papers see the most. In the last one, adversarial examples
        look more usual than clean inputs: in ours, its area under the ROC curve was below 0.5.
    statistic: phi. tail: which activations are extreme, "upper" as in the papers, "lower", or the rarer of "both" sides.
    largest_alpha: alpha is at most that, 0.5 in the papers.
    samples: how many clean samples to compare with, drawn at random.

    Counts have no gradient; attacks ask for scores.
    Source: Speakman, Sridharan, Remy, Weldemariam & McFowland (2018), Subset scanning over neural network activations,
    arXiv:1810.08676, section 3; for single inputs Cintas, Speakman, Akinwande, Ogallo, Weldemariam, Sridharan & McFowland
    (2020), Detecting adversarial attacks via subset scanning of autoencoder activations and reconstruction error, IJCAI.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> detector = sp.detectors.SubsetScan(samples=500).fit(model, digits.train)
    >>> detector.score(digits.test.x[:4]).shape
    torch.Size([4])
    """

    summary: ClassVar[str] = "some units of a hidden layer are unusual together"
    reference: ClassVar[str] = "Speakman et al. 2018, arXiv:1810.08676; Cintas et al. 2020"
    differentiable: ClassVar[bool] = False

    layer: str | None = None
    statistic: Statistic = "higher-criticism"
    tail: Tail = "both"
    largest_alpha: float = 0.5
    samples: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layer = None if self.layer is None else str(self.layer)  # in text, the name "3" is read as a number
        for name, value, known in (("statistic", self.statistic, Statistic), ("tail", self.tail, Tail)):
            if value not in get_args(known):
                raise InputError(f"{name} must be {', '.join(map(repr, get_args(known)))}; got {value!r}")
        if not 0 < self.largest_alpha < 1:
            raise InputError(f"largest_alpha must lie in (0, 1); got {self.largest_alpha}")
        if self.samples < 1:
            raise InputError(f"samples must be at least 1; got {self.samples}")

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        layer = self.layer or hidden_layers(self.model, clean)[0]
        drawn = torch.randperm(len(clean))[: self.samples].to(clean.device)
        units = self.over(lambda x: activations(self.model, x, (layer,))[1][0].flatten(1), clean[drawn])
        return {f"sorted.{layer}": units.T.sort(1).values.contiguous()}

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            ranks, count = self.ranks(x)
            hits = torch.zeros(len(x), count + 1, device=x.device)  # of each p-value there can be: 1 / (count + 1), ...
            hits.scatter_add_(1, ranks - 1, torch.ones_like(ranks, dtype=hits.dtype))
            k = hits.cumsum(1).double()
            p = torch.arange(1, count + 2, device=x.device, dtype=torch.float64) / (count + 1)
            scores = -k * p.log() if self.statistic == "berk-jones" else (k * (1 - p) / p).sqrt()
            return scores.where(p <= self.largest_alpha, 0.0).amax(1).to(x.dtype)

    def ranks(self, x: Tensor) -> tuple[Tensor, int]:
        """p-values (N, J) of each unit times n + 1, whole numbers from 1 to n + 1; and n, the number of clean samples."""
        ((name, clean),) = self.arrays.items()
        units = activations(self.model, x, (name.removeprefix("sorted."),))[1][0].flatten(1).T.contiguous()
        count = clean.shape[1]
        ranks = []
        if self.tail != "lower":
            ranks.append(1 + count - torch.searchsorted(clean, units))
        if self.tail != "upper":
            ranks.append(1 + torch.searchsorted(clean, units, right=True))
        rarer = ranks[0] if len(ranks) == 1 else (2 * torch.minimum(*ranks)).clamp(max=count + 1)
        return rarer.T.contiguous(), count
