"""Properties of networks of any kind, as VNNLIB files state them: `decide`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from saddlepoint.engine.budget import Budget
from saddlepoint.errors import CapabilityError, InputError, ModelError
from saddlepoint.models.base import Classifier
from saddlepoint.models.onnx_graph import OnnxNetwork, read_graph
from saddlepoint.models.torch_model import Model
from saddlepoint.propagation.graph import read
from saddlepoint.taxonomy import Access
from saddlepoint.verify.certify import check_precision, seconds_of
from saddlepoint.verify.prove import Proof, prove
from saddlepoint.verify.vnnlib import Property, read_vnnlib


def decide(
    model: Classifier | str | Path, property_: Property | str | Path, budget: Budget | None = None, *,
    shape: Sequence[int] | None = None, rigorous: bool = False, clock: Callable[[], float] = time.perf_counter,
) -> Proof:  # fmt: skip
    """Whether a network has a property: "robust" if no case of it can occur, "falsified" with an input where one does.

    model: an .onnx file (or .onnx.gz), or a model. The property is about what the network itself gives, also where that isn't
    logits; of defended models it is about their logits. property_: from `read_vnnlib`, or the file. budget:
    `Budget(seconds=...)`, default 60. shape: of one input, where the model doesn't know it (ONNX files do); default a flat one.
    rigorous: allow for rounding, see `prove`; needed for networks in float16 and bfloat16. clock: what `seconds` means. A
    counterexample is replayed by the network itself, in the dtype that it runs in.

    Errors: `DataError` for a damaged file, or another number of inputs; `InputError` for another number of outputs, and for
    `sp.Model(file)` where it leaves out a final Softmax: give the file; `CapabilityError` for random networks; `ModelError` for
    operators without known bounds, and networks that don't take the shape.

    >>> import torch, saddlepoint as sp
    >>> relu = sp.Model(torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU()), bounds=None)
    >>> lines = ["(declare-const X_0 Real)", "(declare-const Y_0 Real)", "(declare-const Y_1 Real)"]
    >>> lines += ["(assert (>= X_0 0))", "(assert (<= X_0 1))", "(assert (<= Y_0 -1))"]
    >>> sp.verify.decide(relu, sp.verify.parse_vnnlib("\\n".join(lines))).verdict
    'robust'
    """
    known = property_ if isinstance(property_, Property) else read_vnnlib(property_)
    model = _Whole(Model(read_graph(model), bounds=None) if isinstance(model, str | Path) else model)
    if shape is None:
        sizes = [net.shape for net in model.networks() if isinstance(net, OnnxNetwork) and net.shape is not None]
        shape = sizes[0] if sizes else (known.inputs,)
    dtype = model.dtype or torch.float32
    like = torch.zeros(1, *shape, dtype=dtype, device=model.device)
    seconds, exact = seconds_of(budget), torch.zeros(1, dtype=torch.float64)
    check_precision(model, rigorous)
    started = clock()
    with model.frozen():
        stated = known.to_cases(shape, exact)
        cases = known.to_cases(shape, exact.to(like.device) if rigorous else like[:, 0])
        try:
            with torch.no_grad():
                outputs = model.forward(like)
        except RuntimeError as error:  # whatever the network raises
            raise ModelError(f"the network fails on inputs of shape {tuple(shape)}; give shape=...: {error}") from error
        if outputs.shape != (1, known.outputs):
            raise InputError(f"the property is about {known.outputs} outputs; the network gives {tuple(outputs.shape[1:])}")

        if model.probe(like).stochastic:
            raise CapabilityError("the network is random: no property of it holds for sure")

        def replay(point: Tensor, case: int) -> bool:
            with torch.no_grad():
                found = model.forward(point[None].to(like)).cpu().double()
            return bool(stated.take(torch.tensor([case])).margin(found)[0] <= 0)

        left = max(seconds - (clock() - started), 0.0)
        proof = prove(read(model, like), cases, replay, seconds=left, clock=clock, rigorous=rigorous)
        return proof if proof.counterexample is None else replace(proof, counterexample=proof.counterexample.to(dtype))


@final
class _Whole(Classifier):
    """A model that gives what its network does, (N, C) with C from 1 on, whatever that means."""

    def __init__(self, model: Classifier) -> None:
        if not isinstance(model, Classifier):
            raise InputError(f"model must be a Saddlepoint model, sp.Model(net, ...), or a file; got {type(model).__name__}")
        model.require(Access.PARAMETERS, "decide")
        if any(isinstance(net, OnnxNetwork) and net.cut for net in model.networks()):
            raise InputError("the model leaves out the end of its file, such as a Softmax: give decide the file itself")
        super().__init__(model.bounds, Access.LABELS, None, device=model.device)  # what it gives needn't look like scores
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found = self.model.raw(x) if isinstance(self.model, Model) else self.model.forward(x)
        return found[:, None] if found.dim() == 1 else found

    def networks(self) -> tuple[nn.Module, ...]:
        return self.model.networks()

    def features(self, x: Tensor, layer: str) -> Tensor:
        return self.model.features(x, layer)

    def describe(self) -> dict[str, object]:
        return self.model.describe()
