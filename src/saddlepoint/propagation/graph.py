"""A network as a list of operators, each affine in what it is given or a nonlinearity with known relaxations."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from saddlepoint.errors import ModelError
from saddlepoint.models.base import Classifier

aten = torch.ops.aten

AFFINE: frozenset[str] = frozenset({
    "linear", "addmm", "mm", "bmm", "matmul", "convolution", "conv1d", "conv2d", "view", "reshape", "_unsafe_view", "permute",
    "transpose", "t", "add", "sub", "rsub", "neg", "mul", "div", "mean", "sum", "cat", "slice", "select", "unsqueeze",
    "squeeze", "expand", "constant_pad_nd", "avg_pool2d", "_adaptive_avg_pool2d", "clone", "alias", "_to_copy", "flip",
    "upsample_nearest2d", "_native_batch_norm_legit_no_training", "detach",
})  # fmt: skip
"""Operators of ATen that are affine in each input that depends on the network's; products in one at a time."""


@dataclass(frozen=True)
class Node:
    """One operator. inputs: names of the values that depend on the network's input; apply gives the output from them.

    op: ATen's name without overload, such as "relu". apply works on a batch of one (1, ...); shape is that of its output,
    without the batch.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    apply: Callable[..., Tensor]
    shape: torch.Size
    arguments: tuple[Any, ...]

    @property
    def affine(self) -> bool:
        """Whether it is affine in its inputs."""
        if self.op in ("mul", "matmul", "bmm", "mm") and len(self.inputs) > 1:
            return False
        return self.op in AFFINE


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they run; input and output are names."""

    nodes: tuple[Node, ...]
    input: str
    output: str
    shape: torch.Size

    def values(self, x: Tensor) -> dict[str, Tensor]:
        """What every node gives for one input (1, ...)."""
        found = {self.input: x}
        for node in self.nodes:
            found[node.name] = node.apply(*(found[name] for name in node.inputs))
        return found


class _Whole(nn.Module):
    """A classifier's forward pass, with its normalisation, as one module."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.networks = nn.ModuleList(model.networks())
        self.model = (model,)

    def forward(self, x: Tensor) -> Tensor:
        return self.model[0].forward(x)


@dataclass(frozen=True)
class Exported:
    """What `torch.export` gives for a model and inputs of one shape; its parameters are the model's own.

    So a graph of it is one of the weights as they are now, and training needs to export only once.
    """

    program: torch.export.ExportedProgram
    shape: torch.Size

    def graph(self, *, gradients: bool = False, replaced: Mapping[str, Tensor] | None = None) -> Graph:
        """The graph. gradients: with respect to the parameters, and follow them; else constants are evaluated once.

        replaced: other values for some parameters or buffers, by name, such as "networks.0.1.running_mean".
        """
        program = self.program
        nodes: list[Node] = []
        known = _constants(program, gradients, replaced or {})  # what doesn't depend on the input
        depends: set[str] = set()
        (entry,) = (spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT")
        output = ""
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name == entry:
                depends.add(node.name)
            elif node.op == "call_function":
                ours = [argument.name for argument in node.all_input_nodes if argument.name in depends]
                if not ours:
                    with torch.set_grad_enabled(gradients):
                        known[node.name] = _call(node, known)
                    continue
                depends.add(node.name)
                if node.target is operator.getitem:  # of operators with several outputs, the first is meant
                    nodes.append(Node(node.name, "alias", tuple(ours), _first, node.meta["val"].shape[1:], ()))
                    continue
                nodes.append(_node(node, tuple(dict.fromkeys(ours)), known))
            elif node.op == "output":
                output = node.args[0][0].name
        if output not in depends:
            raise ModelError("the network's output does not depend on its input")
        return Graph(tuple(nodes), entry, output, self.shape)


def export(model: Classifier, x: Tensor) -> Exported:
    """A model for inputs like x (1, ...), in evaluation mode. Errors: `ModelError` for networks that can't be exported."""
    with model.frozen(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.export about itself
        with torch.no_grad():
            model.forward(x[:1])  # what models keep for later calls must not be the tracer's
        try:
            program = torch.export.export(_Whole(model), (x[:1],), strict=False).run_decompositions()
        except Exception as error:  # export raises whatever its tracer stumbles over
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"the network can't be read by torch.export: {reason}") from error
    return Exported(program, x.shape[1:])


def read(model: Classifier, x: Tensor) -> Graph:
    """The graph of a model, as it is now, for inputs like x (1, ...); see `export`."""
    return export(model, x).graph()


def _constants(program: torch.export.ExportedProgram, gradients: bool, replaced: Mapping[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind.name in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR") and spec.target is not None:
            table = program.state_dict if spec.target in program.state_dict else program.constants
            value = replaced.get(spec.target, table[spec.target])
            found[spec.arg.name] = value.detach() if isinstance(value, Tensor) and not gradients else value
    return found


def _call(node: fx.Node, known: Mapping[str, Any]) -> Any:
    return node.target(*_filled(node.args, known), **_filled(dict(node.kwargs), known))  # type: ignore[operator]


def _filled(argument: Any, known: Mapping[str, Any]) -> Any:  # Any: arguments of any operator
    if isinstance(argument, fx.Node):
        return known[argument.name]
    if isinstance(argument, tuple | list):
        return type(argument)(_filled(item, known) for item in argument)
    if isinstance(argument, dict):
        return {key: _filled(item, known) for key, item in argument.items()}
    return argument


def _first(value: Any) -> Tensor:
    found: Tensor = value[0] if isinstance(value, tuple | list) else value
    return found


def _node(node: fx.Node, inputs: tuple[str, ...], known: Mapping[str, Any]) -> Node:
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    fixed = {name: known[name] for name in (a.name for a in node.all_input_nodes) if name in known}

    def apply(*values: Tensor) -> Tensor:
        table = fixed | dict(zip(inputs, values, strict=True))
        found = target(*_filled(args, table), **_filled(kwargs, table))  # type: ignore[operator]
        return _first(found)

    if "batch_norm" in str(target):
        apply = _scaling(args, known)
    value = node.meta["val"]
    shape = (value[0] if isinstance(value, tuple | list) else value).shape
    name = target._schema.name.partition("::")[2] if hasattr(target, "_schema") else str(target)
    filled = tuple(known.get(a.name, a.name) if isinstance(a, fx.Node) else a for a in args)
    return Node(node.name, name, inputs, apply, shape[1:], filled)


def _scaling(arguments: Sequence[Any], known: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Batch normalisation with stored statistics is a factor and a summand for each channel."""
    _, weight, bias, mean, variance, _, eps = (
        known[a.name] if isinstance(a, fx.Node) and a.name in known else a for a in arguments
    )
    factor = (variance + eps).rsqrt() * (1 if weight is None else weight)
    summand = (0 if bias is None else bias) - mean * factor
    return lambda x: x * factor.view(-1, *([1] * (x.dim() - 2))) + summand.view(-1, *([1] * (x.dim() - 2)))
