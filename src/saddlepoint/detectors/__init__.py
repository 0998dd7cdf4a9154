"""Is this input adversarial? Detectors, their combinations, and classifiers that abstain."""

from saddlepoint.detectors.base import DETECTORS, Detector, load, make
from saddlepoint.detectors.density import KernelDensity
from saddlepoint.detectors.guarded import ABSTAINS, Guarded
from saddlepoint.detectors.intrinsic import LocalIntrinsicDimensionality
from saddlepoint.detectors.layers import LAST, activations, hidden_layers
from saddlepoint.detectors.mahalanobis import Mahalanobis
from saddlepoint.detectors.scanning import SubsetScan
from saddlepoint.detectors.spectrum import TailVariance
from saddlepoint.detectors.statistics import Energy, Entropy, LogitMargin, MaxProbability
from saddlepoint.detectors.uncertainty import DropoutUncertainty

__all__ = [
    "ABSTAINS", "DETECTORS", "LAST", "Detector", "DropoutUncertainty", "Energy", "Entropy", "Guarded", "KernelDensity",
    "LocalIntrinsicDimensionality", "LogitMargin", "Mahalanobis", "MaxProbability", "SubsetScan", "TailVariance", "activations",
    "hidden_layers", "load", "make",
]  # fmt: skip
