"""Is this input adversarial? Detectors, their combinations, and classifiers that abstain."""

from saddlepoint.detectors.base import DETECTORS, Detector, load, make
from saddlepoint.detectors.consistency import LogOdds, NoiseConsistency, RotationConsistency
from saddlepoint.detectors.decoder import ClassReconstruction, LogitsDecoder
from saddlepoint.detectors.guarded import ABSTAINS, Guarded
from saddlepoint.detectors.layers import LAST, activations, hidden_layers
from saddlepoint.detectors.networks import ExtraClass, InputNetwork, LayerNetwork
from saddlepoint.detectors.reconstruction import ReconstructionDivergence, ReconstructionError
from saddlepoint.detectors.squeezing import AdaptiveSqueezing, FeatureSqueezing
from saddlepoint.detectors.statistics import MaxProbability

__all__ = [
    "ABSTAINS", "DETECTORS", "LAST", "AdaptiveSqueezing", "ClassReconstruction", "Detector", "ExtraClass", "FeatureSqueezing",
    "Guarded", "InputNetwork", "LayerNetwork", "LogOdds", "LogitsDecoder", "MaxProbability", "NoiseConsistency",
    "ReconstructionDivergence", "ReconstructionError", "RotationConsistency", "activations", "hidden_layers", "load", "make",
]  # fmt: skip
