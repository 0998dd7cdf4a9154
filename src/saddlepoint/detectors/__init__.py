"""Is this input adversarial? Detectors, their combinations, and classifiers that abstain."""

from saddlepoint.detectors.base import DETECTORS, Detector, load, make
from saddlepoint.detectors.combination import AnyOf, Combination, Regression
from saddlepoint.detectors.guarded import ABSTAINS, Guarded
from saddlepoint.detectors.layers import LAST, activations, hidden_layers
from saddlepoint.detectors.metrics import auc_limits, roc_auc, roc_curve
from saddlepoint.detectors.statistics import MaxProbability

__all__ = [
    "ABSTAINS",
    "DETECTORS",
    "LAST",
    "AnyOf",
    "Combination",
    "Detector",
    "Guarded",
    "MaxProbability",
    "Regression",
    "activations",
    "auc_limits",
    "hidden_layers",
    "load",
    "make",
    "roc_auc",
    "roc_curve",
]  # fmt: skip
