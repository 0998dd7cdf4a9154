"""The system under attack: one interface, and its adapters."""

from saddlepoint.models.base import Classifier, Probe
from saddlepoint.models.compose import Borrowed, Defended, Ensemble
from saddlepoint.models.torch_model import Model
from saddlepoint.models.transforms import Transform, bit_depth, gaussian_noise

__all__ = ["Borrowed", "Classifier", "Defended", "Ensemble", "Model", "Probe", "Transform", "bit_depth", "gaussian_noise"]
