"""What the model's own outputs tell: the largest probability, energy, and other statistics of its logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from saddlepoint.detectors.base import Detector
from saddlepoint.taxonomy import Access


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
