"""`Guarded`: a classifier that refuses to answer where its detector sees an adversarial input."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from saddlepoint.detectors.base import Detector
from saddlepoint.errors import InputError
from saddlepoint.models.adapt import one_hot
from saddlepoint.models.base import Classifier
from saddlepoint.taxonomy import Access

ABSTAINS = -1
_DRAWS = 10  # of a random detector


@final
class Guarded(Classifier):
    """A model and its detector as one classifier, with one class more for what is rejected, so that every attack can meet both.

        z_(C+1)(x) = max_i z_i(x) + alpha (score(x) - threshold) / spread

    z are the model's logits. So the last class wins exactly where the detector fires. alpha is the model's typical margin and
    the spread that of clean scores, both from calibration: then neither part of an attack's joint loss drowns the other. On
    such a model, goals count only what is accepted (`Aim.rejects`). Gradients are those of model and detector; a detector
    without gradients leaves scores.

    threshold: default the calibrated one. draws: that a gradient averages over, default 10 where the detector is random.
    Errors: `InputError` unless the detector is calibrated, for this model.
    Source: the function G of Carlini & Wagner (2017), Adversarial examples are not easily detected, arXiv:1705.07263,
    section 3.3, with a sum in the place of their product, which needs positive logits.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> detector = sp.detectors.MaxProbability().fit(model, digits.train).calibrate(digits.test.x[:200], fpr=0.1)
    >>> guarded = sp.Guarded(model, detector)
    >>> guarded.predict_or_abstain(digits.test.x[200:204]).shape
    torch.Size([4])
    """

    rejects = True

    def __init__(self, model: Classifier, detector: Detector, threshold: float | None = None, draws: int | None = None) -> None:
        if not isinstance(detector, Detector):
            raise InputError(f"detector must be one of sp.detectors, fitted and calibrated; got {type(detector).__name__}")
        if not isinstance(model, Classifier):
            raise InputError(f"model must be a Saddlepoint model: sp.Model(net, ...); got {type(model).__name__}")
        if model.rejects:
            raise InputError("the model has a detector already: combine detectors, sp.detectors.AnyOf(...)")
        if detector.model is not model:
            raise InputError("the detector was fitted for another model: fit it for this one, or guard detector.model")
        if threshold is not None and (not isinstance(threshold, int | float) or math.isnan(threshold)):
            raise InputError(f"threshold must be a number; got {threshold!r}")
        self.threshold = detector.threshold if threshold is None else float(threshold)
        access = model.access if detector.differentiable else min(model.access, Access.SCORES)
        if draws is None:
            draws = max(model.draws, _DRAWS if detector.random else 1)
        classes = None if model.num_classes is None else model.num_classes + 1
        super().__init__(model.bounds, access, classes, draws, model.device)
        self.model, self.detector = model, detector
        self._slope = detector.typical_margin / detector.spread

    def networks(self) -> tuple[nn.Module, ...]:
        return self.model.networks() + self.detector.networks()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model.forward(x)
        excess = self._slope * (self.detector.forward(x) - self.threshold)
        joint = torch.cat([logits, (logits.amax(1) + excess.to(logits.dtype))[:, None]], 1)
        return joint if self.access > Access.LABELS else one_hot(joint.argmax(1), joint.shape[1], joint.dtype)

    def features(self, x: Tensor, layer: str) -> Tensor:
        return self.model.features(x, layer)

    def describe(self) -> dict[str, object]:
        return {
            "name": "Guarded", "rejects": True, "detector": self.detector.settings(), "threshold": self.threshold,
            "draws": self.draws, "model": self.model.describe(),
        }  # fmt: skip

    def predict_or_abstain(self, x: Tensor) -> Tensor:
        """Predicted classes (N,) int64, `ABSTAINS` (-1) where the detector fires; counted."""
        found = self.predict(x)
        return torch.where(found == (self.num_classes or self.probe(x).num_classes) - 1, ABSTAINS, found)
