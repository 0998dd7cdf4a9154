"""ONNX files run by onnxruntime: what a file says to the letter, without gradients."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from saddlepoint.errors import DataError, MissingExtraError, UnknownNameError
from saddlepoint.models.adapt import Adapted, Gives
from saddlepoint.models.onnx_graph import load_file
from saddlepoint.taxonomy import Access

_GIVES: dict[str, Gives] = {"Softmax": "probabilities", "Sigmoid": "probabilities", "ArgMax": "labels"}
_INPUTS = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(double)": np.float64}


@final
class OnnxSession:
    """An .onnx file as a function of tensors (N, ...), computed by onnxruntime. `Model` takes it and knows what it gives.

    For operators that `read_graph` doesn't know, and for attacks without gradients. output: its name, needed where the file
    has several. threads: how many a call may use; 0 for as many as there are. The batch may be of any size: where the file
    fixes it, inputs go in portions of that size.

    Errors: `DataError` for files that onnxruntime can't run; `MissingExtraError` without onnx and onnxruntime.
    """

    def __init__(self, path: str | os.PathLike[str], output: str | None = None, threads: int = 0) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError("running an ONNX file", "onnxruntime", "onnx") from None
        path = Path(path)
        last = {name: node.op_type for node in load_file(path).graph.node for name in node.output}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # what it raises, and no warnings
        source = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else str(path)
        try:
            self._session: Any = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no public base
            raise DataError(f"{path} can't be run by onnxruntime: {error}") from error
        inputs, outputs = self._session.get_inputs(), [value.name for value in self._session.get_outputs()]
        if len(inputs) != 1 or inputs[0].type not in _INPUTS:
            found = [(value.name, value.type) for value in inputs]
            raise DataError(f"{path}: a classifier has one floating input, this graph has {found}")
        if output is None and len(outputs) > 1:
            raise DataError(f"{path} has several outputs, {outputs}: name one, OnnxSession(path, output=...)")
        if output is not None and output not in outputs:
            raise UnknownNameError("output", output, outputs)
        self.name, self.output = path.name, output or outputs[0]
        self.gives: Gives = _GIVES.get(last.get(self.output, ""), "logits")
        self._input, self._dtype = inputs[0].name, _INPUTS[inputs[0].type]
        batch = inputs[0].shape[0] if inputs[0].shape else None
        self._portion = batch if isinstance(batch, int) and batch > 0 else None

    def __call__(self, x: Tensor) -> Tensor:
        values = x.detach().cpu().numpy().astype(self._dtype, copy=False)
        size = self._portion or max(len(values), 1)
        parts = []
        for start in range(0, len(values), size):
            part = values[start : start + size]
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)])
            parts.append(self._session.run([self.output], {self._input: filled})[0][: len(part)])
        found = torch.from_numpy(np.concatenate(parts)).to(x.device)
        return found.flatten() if self.gives == "labels" else found


def recognises(net: object) -> bool:
    """Whether it is an `OnnxSession`."""
    return isinstance(net, OnnxSession)


def adapted(net: object) -> Adapted:
    """What `Model` needs of an `OnnxSession`."""
    assert isinstance(net, OnnxSession)
    return Adapted(net, Access.LABELS if net.gives == "labels" else Access.SCORES, net.gives, name=net.name)
