"""A network as a list of operators, each affine in what it is given or a nonlinearity with known relaxations."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from saddlepoint.errors import ModelError
from saddlepoint.models.base import Classifier
from saddlepoint.propagation.composite import decompositions, products
from saddlepoint.propagation.nodes import AFFINE
from saddlepoint.propagation.nodes import Graph as Graph
from saddlepoint.propagation.nodes import Node as Node
from saddlepoint.propagation.relax import rule

_FACTORS = {"linear": 2, "mm": 2, "bmm": 2, "matmul": 2, "convolution": 2, "mul": 2, "div": 2, "addmm": 3}
_CONSTANT = ("full_like", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full", "empty_like", "sym_size")


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

    def graph(
        self, *, gradients: bool = False, dtype: torch.dtype | None = None, replaced: Mapping[str, Tensor] | None = None
    ) -> Graph:
        """The graph. gradients: with respect to the parameters, and follow them; else constants are evaluated once.

        dtype: of the constants, instead of the model's own. replaced: other values for some parameters or buffers, by name,
        such as "networks.0.1.running_mean". Errors: `ModelError`, which names operators without known bounds.
        """
        with torch.set_grad_enabled(gradients):
            return _Reader(self, gradients, dtype, replaced or {}).graph()


def export(model: Classifier, x: Tensor) -> Exported:
    """A model for inputs like x (1, ...), in evaluation mode.

    Errors: `ModelError` for networks that can't be exported, and for weights that are not finite.
    """
    for net in model.networks():
        for name, value in (*net.named_parameters(), *net.named_buffers()):
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ModelError(f"nothing can be said of the network: {name} holds NaN or infinite values")
    with model.frozen(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.export about itself
        with torch.no_grad():
            model.forward(x[:1])  # what models keep for later calls must not be the tracer's
        try:
            program = torch.export.export(_Whole(model), (x[:1],), strict=False).run_decompositions(decompositions())
        except Exception as error:  # export raises whatever its tracer stumbles over
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"the network can't be read by torch.export: {reason}") from error
    return Exported(program, x.shape[1:])


def read(model: Classifier, x: Tensor) -> Graph:
    """The graph of a model, as it is now, for inputs like x (1, ...); see `export`."""
    return export(model, x).graph()


class _Reader:
    """Turns an exported program into nodes."""

    def __init__(self, source: Exported, gradients: bool, dtype: torch.dtype | None, replaced: Mapping[str, Tensor]) -> None:
        self.source, self.dtype = source, dtype
        self.known: dict[str, Any] = {}  # what doesn't depend on the input
        self.zeros: dict[str, Tensor] = {}  # what does: a batch of one of zeros
        self.bare: set[str] = set()  # values whose first dimension isn't the batch
        self.nodes: list[Node] = []
        for spec in source.program.graph_signature.input_specs:
            if spec.kind.name in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR") and spec.target is not None:
                program = source.program
                value = (program.state_dict if spec.target in program.state_dict else program.constants)[spec.target]
                value = replaced.get(spec.target, value)
                self.known[spec.arg.name] = self._cast(value if gradients else value.detach())

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and self.dtype is not None:
            return value.to(self.dtype)
        return self.dtype if isinstance(value, torch.dtype) and value.is_floating_point and self.dtype is not None else value

    def graph(self) -> Graph:
        program = self.source.program
        (entry,) = (spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT")
        output = ""
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name == entry:
                self._value(node.name, node.meta["val"])
            elif node.op == "call_function":
                self._read(node)
            elif node.op == "output":
                output = node.args[0][0].name
        if output not in self.zeros:
            raise ModelError("the network's output does not depend on its input")
        return Graph(tuple(self.nodes), entry, output, self.source.shape, lambda dtype: self.source.graph(dtype=dtype))

    def _value(self, name: str, meta: Tensor) -> torch.Size:
        """Notes a value that depends on the input; its shape without the batch."""
        bare = meta.dim() == 0 or meta.shape[0] != 1
        if bare:
            self.bare.add(name)
        if not meta.dtype.is_floating_point:
            raise ModelError(f"the value {name} depends on the network's input and is of dtype {meta.dtype}, not floating")
        shape = torch.Size(meta.shape if bare else meta.shape[1:])
        self.zeros[name] = torch.zeros((), dtype=self.dtype or meta.dtype, device=meta.device).expand(1, *shape)
        return shape

    def _read(self, node: fx.Node) -> None:
        op = _name(node.target)
        ours = [one.name for one in _mentioned((node.args, dict(node.kwargs))) if one.name in self.zeros]
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and source.name not in self.known:
            self._emit(node, source, int(node.args[1]))  # type: ignore[arg-type]
        elif not ours or op in _CONSTANT:
            table = self.known | {one: self.zeros[one] for one in ours}
            self.known[node.name] = node.target(*self._filled(node.args, table), **self._filled(dict(node.kwargs), table))  # type: ignore[operator]
        elif isinstance(node.meta["val"], Tensor):
            self._emit(node, node, None)

    def _filled(self, argument: Any, table: Mapping[str, Any]) -> Any:  # Any: arguments of any operator
        if isinstance(argument, fx.Node):
            return table[argument.name]
        if isinstance(argument, tuple | list):
            return type(argument)(self._filled(item, table) for item in argument)
        if isinstance(argument, dict):
            return {key: self._filled(item, table) for key, item in argument.items()}
        return self._cast(argument)

    def _emit(self, node: fx.Node, call: fx.Node, part: int | None) -> None:
        """One node. call: whose operator runs; part: which of its outputs is meant."""
        target, op = call.target, _name(call.target)
        everything = (call.args, dict(call.kwargs))
        factors = [one.name for one in _mentioned(call.args[: _FACTORS.get(op, 0)]) if one.name in self.zeros]
        inputs = tuple(dict.fromkeys(one.name for one in _mentioned(everything) if one.name in self.zeros))
        bare = self.bare.copy()
        shape = self._value(node.name, node.meta["val"])
        table = {one.name: self.known[one.name] for one in _mentioned(everything) if one.name in self.known}
        names = table | {name: name for name in inputs}
        arguments, settings = self._filled(everything, names)
        where = str(list((call.meta.get("nn_module_stack") or {"": ("",)}).values())[-1][0])

        def applied(fixed: Mapping[str, Any]) -> Callable[..., Tensor]:
            def apply(*values: Tensor) -> Any:
                given = {name: value[0] if name in bare else value for name, value in zip(inputs, values, strict=True)}
                args, kwargs = self._filled(everything, {**fixed, **given})
                found = target(*args, **kwargs)  # type: ignore[operator]
                found = found if part is None else found[part]
                return found[None] if node.name in self.bare else found

            return apply

        apply = applied(table)
        magnitude = applied(
            {
                key: value.abs() if isinstance(value, Tensor) and value.is_floating_point() else value
                for key, value in table.items()
            }
        )
        if op == "_native_batch_norm_legit_no_training":
            apply = magnitude = _scaling(arguments)
        elif op in ("max_pool2d_with_indices", "max_pool3d_with_indices", "max", "min") and part not in (None, 0):
            raise ModelError(f"the indices of {op} (at {node.name}) depend on the network's input: no bounds are known")
        like = tuple(self.zeros[name] for name in inputs)
        rank = (like[0].dim() - 1 if inputs[0] in bare else like[0].dim()) if inputs else 0
        made = Node(node.name, op, inputs, apply, shape, like, arguments, settings, magnitude, where or node.name, rank)
        nonlinear = len(factors) > 1 or (op == "div" and bool(factors) and factors[0] != _first_name(call.args[0]))
        for one in products(made, factors) if nonlinear else [made]:
            self.nodes.append(one if one.op in AFFINE else replace(one, rule=rule(one)))


def _name(target: Any) -> str:
    return target._schema.name.partition("::")[2] if hasattr(target, "_schema") else getattr(target, "__name__", str(target))


def _mentioned(argument: Any) -> list[fx.Node]:
    if isinstance(argument, fx.Node):
        return [argument]
    if isinstance(argument, dict):
        argument = list(argument.values())
    return [one for item in argument for one in _mentioned(item)] if isinstance(argument, tuple | list) else []


def _first_name(argument: Any) -> str | None:
    return argument.name if isinstance(argument, fx.Node) else None


def _scaling(arguments: Sequence[Any]) -> Callable[..., Tensor]:
    """Batch normalisation with stored statistics is a factor and a summand for each channel."""
    _, weight, bias, mean, variance, _, eps = arguments
    factor = (variance + eps).rsqrt() * (1 if weight is None else weight)
    summand = (0 if bias is None else bias) - mean * factor
    return lambda x: x * factor.view(-1, *([1] * (x.dim() - 2))) + summand.view(-1, *([1] * (x.dim() - 2)))
