"""Is this input adversarial? Detectors, their combinations, and classifiers that abstain."""

from saddlepoint.detectors.base import DETECTORS, Detector, load, make
from saddlepoint.detectors.density import KernelDensity
from saddlepoint.detectors.guarded import ABSTAINS, Guarded
from saddlepoint.detectors.layers import LAST, activations, hidden_layers
from saddlepoint.detectors.statistics import MaxProbability
from saddlepoint.detectors.uncertainty import DropoutUncertainty

__all__ = [
    "ABSTAINS", "DETECTORS", "LAST", "Detector", "DropoutUncertainty", "Guarded", "KernelDensity", "MaxProbability", "activations", "hidden_layers",
    "load", "make",
]  # fmt: skip
