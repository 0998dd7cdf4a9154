"""The system under attack: one interface, and its adapters."""

from saddlepoint.models.base import Classifier, Probe
from saddlepoint.models.compose import Borrowed, Defended, Ensemble
from saddlepoint.models.http_model import HttpModel
from saddlepoint.models.huggingface_model import embed_tokens, hugging_face
from saddlepoint.models.onnx_graph import OnnxNetwork, read_graph
from saddlepoint.models.onnx_model import OnnxSession
from saddlepoint.models.torch_model import Model
from saddlepoint.models.transforms import InputTransform, Transform, TransformLayer
from saddlepoint.models.trees_exact import TreeEnsemble, tree_ensemble

__all__ = [
    "Borrowed", "Classifier", "Defended", "Ensemble", "HttpModel", "InputTransform", "Model", "OnnxNetwork", "OnnxSession",
    "Probe", "Transform", "TransformLayer", "TreeEnsemble", "embed_tokens", "hugging_face", "read_graph", "tree_ensemble",
]  # fmt: skip
