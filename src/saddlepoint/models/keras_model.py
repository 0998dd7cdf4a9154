"""Keras 3 models on PyTorch."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor, nn

from saddlepoint.errors import InputError
from saddlepoint.models.adapt import Adapted
from saddlepoint.taxonomy import Access


@final
class KerasNetwork(nn.Module):
    """A Keras model as in inference, (N, ...) -> (N, C), with logits where it ends in a softmax or sigmoid.

    Keras leaves them on the tensor that these activations return, for its own losses. Whatever it does to its inputs, such as
    taking channels last, stays as it is.
    """

    def __init__(self, net: Any) -> None:  # Any: keras is an extra
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x, training=False)
        return getattr(found, "_keras_logits", found)


def recognises(net: object) -> bool:
    """Whether it is a `keras.Model`."""
    return any(cls.__name__ == "Model" and cls.__module__.split(".")[0] == "keras" for cls in type(net).__mro__)


def adapted(net: Any) -> Adapted:
    """What `Model` needs of a Keras model. Errors: `InputError` unless Keras runs on PyTorch."""
    if not isinstance(net, nn.Module):
        raise InputError(
            "this Keras model doesn't run on PyTorch: set KERAS_BACKEND=torch before Python starts and load it again, or "
            'attack its scores alone, sp.Model(net.predict_on_batch, inputs="numpy", gives="probabilities")'
        )
    return Adapted(KerasNetwork(net), Access.GRADIENTS, name=str(net.name))
