"""Telling models apart: a digest of all that defines one."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import torch

from saddlepoint.models.base import Classifier


def fingerprint(model: Classifier) -> str:
    """SHA-256 over a model's parameters, buffers, layers, normalisation and bounds, 64 hexadecimal digits.

    It doesn't depend on the device. Of code it knows only the layers' names and settings (`repr`): another `forward` under the
    same names, and plain functions, go unnoticed.
    """
    digest = hashlib.sha256(json.dumps(without_classes(model.describe()), sort_keys=True, default=str).encode())
    for net in model.networks():
        digest.update(re.sub(r"0x[0-9a-fA-F]+", "", repr(net)).encode())  # addresses differ between processes
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            data = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def without_classes(description: Any) -> Any:  # Any: JSON
    """A model's description without the number of classes, which a model may know only after its first prediction."""
    match description:
        case dict():
            return {key: without_classes(value) for key, value in description.items() if key != "num_classes"}
        case list() | tuple():
            return [without_classes(value) for value in description]
        case _:
            return description
