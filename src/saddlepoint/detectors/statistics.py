"""What the model's own outputs tell: the largest probability, energy, and other statistics of its logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from saddlepoint.detectors.base import Detector
from saddlepoint.errors import InputError
from saddlepoint.taxonomy import Access

_LOWEST = -1e4  # logarithm of a probability that is 0 in any float, so that 0 times it is 0


@final
@dataclass(eq=False, kw_only=True)
class MaxProbability(Detector):
    """The model is unsure: score(x) = -max_i softmax(z(x))_i.

    Source: Hendrycks & Gimpel (2017), A baseline for detecting misclassified and out-of-distribution examples,
    arXiv:1610.02136, section 2.
    """

    summary: ClassVar[str] = "the largest probability is low"
    reference: ClassVar[str] = "Hendrycks & Gimpel 2017, arXiv:1610.02136"
    access: ClassVar[Access] = Access.SCORES

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        return -self.model.forward(x).softmax(1).amax(1)


@final
@dataclass(eq=False, kw_only=True)
class LogitMargin(Detector):
    """The second class is close: score(x) = z_(2)(x) - z_(1)(x), the second largest logit less the largest.

    For two classes it orders inputs as `MaxProbability` does, but still tells those apart whose probability rounds to 1. For
    more, the other classes don't count.

    Source: the statistic that Carlini & Wagner (2017), arXiv:1608.04644, section V.A, minimize, with its sign changed.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> detector = sp.detectors.LogitMargin().fit(sp.Model(sp.zoo.build("digits-cnn")), digits.train)
    >>> bool((detector.score(digits.test.x[:4]) <= 0).all())
    True
    """

    summary: ClassVar[str] = "the second class is close"
    reference: ClassVar[str] = "Carlini & Wagner 2017, arXiv:1608.04644"
    access: ClassVar[Access] = Access.SCORES

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.model.forward(x).topk(2, 1).values.unbind(1)
        return second - first


@final
@dataclass(eq=False, kw_only=True)
class Entropy(Detector):
    """The probabilities are near to uniform: score(x) = -sum_i p_i log p_i = log C - KL(p, uniform), p = softmax(z(x)).

    Source: Hendrycks & Gimpel (2017), Early methods for detecting adversarial images, arXiv:1608.00530, appendix, where it
    is KL(p, uniform).

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Flatten(), bounds=None)
    >>> detector = sp.detectors.Entropy().fit(model, torch.zeros(2, 4))
    >>> round(float(detector.score(torch.zeros(1, 4)).exp()), 4)
    4.0
    """

    summary: ClassVar[str] = "the probabilities are near to uniform"
    reference: ClassVar[str] = "Hendrycks & Gimpel 2017, arXiv:1608.00530"
    access: ClassVar[Access] = Access.SCORES

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        log_p = self.model.forward(x).log_softmax(1)
        return -(log_p.exp() * log_p.clamp(min=_LOWEST)).sum(1)


@final
@dataclass(eq=False, kw_only=True)
class Energy(Detector):
    """All logits are low: score(x) = -T log sum_i exp(z_i(x) / T). Unlike probabilities it notices when all fall together.

    temperature: T, 1 in the paper.
    Source: Liu, Wang, Owens & Li (2020), Energy-based out-of-distribution detection, arXiv:2010.03759, equation 4.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Flatten(), bounds=None)
    >>> detector = sp.detectors.Energy().fit(model, torch.zeros(2, 4))
    >>> bool(detector.score(torch.full((1, 4), -1.0)) > detector.score(torch.zeros(1, 4)))
    True
    """

    summary: ClassVar[str] = "all logits are low"
    reference: ClassVar[str] = "Liu et al. 2020, arXiv:2010.03759"
    access: ClassVar[Access] = Access.SCORES

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature must be positive; got {self.temperature}")

    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        return -self.temperature * (self.model.forward(x) / self.temperature).logsumexp(1)
