"""Is this input adversarial? Detectors, their combinations, and classifiers that abstain."""

from saddlepoint.detectors.base import DETECTORS, Detector, load, make
from saddlepoint.detectors.combination import AnyOf, Combination, Regression
from saddlepoint.detectors.consistency import LogOdds, NoiseConsistency, RotationConsistency
from saddlepoint.detectors.decoder import ClassReconstruction, LogitsDecoder
from saddlepoint.detectors.density import KernelDensity
from saddlepoint.detectors.guarded import ABSTAINS, Guarded
from saddlepoint.detectors.intrinsic import LocalIntrinsicDimensionality
from saddlepoint.detectors.layers import LAST, activations, hidden_layers
from saddlepoint.detectors.mahalanobis import Mahalanobis
from saddlepoint.detectors.metrics import auc_limits, average_precision, roc_auc, roc_curve
from saddlepoint.detectors.networks import ExtraClass, InputNetwork, LayerNetwork
from saddlepoint.detectors.reconstruction import ReconstructionDivergence, ReconstructionError
from saddlepoint.detectors.samples import Samples
from saddlepoint.detectors.scanning import SubsetScan
from saddlepoint.detectors.spectrum import TailVariance
from saddlepoint.detectors.squeezing import AdaptiveSqueezing, FeatureSqueezing
from saddlepoint.detectors.statistics import Energy, Entropy, LogitMargin, MaxProbability
from saddlepoint.detectors.uncertainty import DropoutUncertainty

__all__ = [
    "ABSTAINS", "DETECTORS", "LAST", "AdaptiveSqueezing", "AnyOf", "ClassReconstruction", "Combination", "Detector",
    "DropoutUncertainty", "Energy", "Entropy", "ExtraClass", "FeatureSqueezing", "Guarded", "InputNetwork", "KernelDensity",
    "LayerNetwork", "LocalIntrinsicDimensionality", "LogOdds", "LogitMargin", "LogitsDecoder", "Mahalanobis",
    "MaxProbability", "NoiseConsistency", "ReconstructionDivergence", "ReconstructionError", "Regression",
    "RotationConsistency", "Samples", "SubsetScan", "TailVariance", "activations", "auc_limits", "average_precision",
    "hidden_layers", "load", "make", "roc_auc", "roc_curve",
]  # fmt: skip
