"""A network as a list of operators, each affine in what it is given or a nonlinearity with known relaxations."""

from __future__ import annotations

import io
import logging
import operator
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
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
_SCALED = ("mul", "div", "addmm")  # whose numbers are all factors
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
    with model.frozen():
        with torch.no_grad():
            model.forward(x[:1])  # what models keep for later calls must not be the tracer's
        try:
            with _quiet():
                program = torch.export.export(_Whole(model), (x[:1],), strict=False).run_decompositions(decompositions())
        except Exception as error:  # export raises whatever its tracer stumbles over
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if "data-dependent" in reason:
                reason = "what it computes depends on values of the input, as by `if x.sum() > 0`"
            raise ModelError(f"the network can't be read by torch.export: {reason}") from error
    return Exported(program, x.shape[1:])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.export logs and prints where it fails, which is an error of ours in one line."""
    log, said = logging.getLogger("torch.fx.experimental.symbolic_shapes"), io.StringIO()
    level = log.level
    with warnings.catch_warnings(), redirect_stderr(said):
        warnings.simplefilter("ignore", FutureWarning)  # of torch.export about itself
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)
    sys.stderr.write(said.getvalue())  # of the network's own, where it was read


def read(model: Classifier, x: Tensor) -> Graph:
    """The graph of a model, as it is now, for inputs like x (1, ...); see `export`."""
    return export(model, x).graph()


class _Reader:
    """Turns an exported program into nodes."""

    def __init__(self, source: Exported, gradients: bool, dtype: torch.dtype | None, replaced: Mapping[str, Tensor]) -> None:
        self.source = source
        (self.entry,) = (one.arg.name for one in source.program.graph_signature.input_specs if one.kind.name == "USER_INPUT")
        (meta,) = (one.meta["val"] for one in source.program.graph.nodes if one.name == self.entry)
        self.least, self.dtype = meta.dtype, dtype or meta.dtype
        self.known: dict[str, Any] = {}  # what doesn't depend on the input
        self.zeros: dict[str, Tensor] = {}  # what does: a batch of one of zeros
        self.bare: dict[str, torch.Size] = {}  # shapes of values whose first dimension isn't the batch, or that have no other
        self.nodes: list[Node] = []
        for spec in source.program.graph_signature.input_specs:
            if spec.kind.name in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR") and spec.target is not None:
                program = source.program
                value = (program.state_dict if spec.target in program.state_dict else program.constants)[spec.target]
                value = replaced.get(spec.target, value)
                self.known[spec.arg.name] = self._cast(value if gradients else value.detach())

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        return self.dtype if isinstance(value, torch.dtype) and value.is_floating_point else value

    def graph(self) -> Graph:
        program, entry = self.source.program, self.entry
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name == entry:
                self._value(node.name, node.meta["val"], "the input")
            elif node.op == "call_function":
                self._read(node)
        output = str(program.graph_signature.user_outputs[0])  # before it come the buffers that the network changes
        if output not in self.zeros:
            raise ModelError("the network's output does not depend on its input")
        whole = Graph(tuple(self.nodes), entry, output, self.source.shape, lambda dtype: self.source.graph(dtype=dtype))
        used = whole.before(output)  # not what goes into buffers alone
        return replace(whole, nodes=tuple(node for node in whole.nodes if node.name in used))

    def _value(self, name: str, meta: Tensor, what: str) -> torch.Size:
        """Notes a value that depends on the input; its shape without the batch. what: for messages, what gives it.

        Values of higher precision than the input's are taken in that of the graph.
        """
        bare = meta.dim() < 2 or meta.shape[0] != 1
        if bare:
            self.bare[name] = meta.shape
        if not meta.dtype.is_floating_point:
            raise ModelError(f"{what} depends on the network's input and is of dtype {meta.dtype}, not floating")
        if torch.finfo(meta.dtype).eps > torch.finfo(self.least).eps:
            raise ModelError(f"{what} is of dtype {meta.dtype}, coarser than the input's {self.least}: no bounds are known")
        shape = torch.Size((meta.shape or (1,)) if bare else meta.shape[1:])
        self.zeros[name] = torch.zeros((), dtype=self.dtype, device=meta.device).expand(1, *shape)
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
        elif isinstance(found := node.meta.get("val"), Tensor):
            self._emit(node, node, None)
        elif found is not None and not isinstance(found, tuple | list):
            raise ModelError(f"{op} (at {_where(node)}) makes a number of what depends on the input: no bounds are known")

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
        factors = [one.name for one in _mentioned(call.args[op == "addmm" : _FACTORS.get(op, 0)]) if one.name in self.zeros]
        inputs = tuple(dict.fromkeys(one.name for one in _mentioned(everything) if one.name in self.zeros))
        bare = self.bare.copy()
        where = _where(call)
        shape = self._value(node.name, node.meta["val"], f"{op} (at {where})")
        table = {one.name: self.known[one.name] for one in _mentioned(everything) if one.name in self.known}
        names = table | {name: name for name in inputs}
        arguments, settings = self._filled(everything, names)
        if op == "convolution" and any(isinstance(one, str) for one in arguments[1:3]):
            raise ModelError(f"the weights of {op} (at {where}) depend on the network's input: no bounds are known")
        if mode := settings.get("rounding_mode"):
            raise ModelError(f"{op} (at {where}) has rounding_mode {mode}: no bounds are known")

        def applied(everything: Any, fixed: Mapping[str, Any]) -> Callable[..., Tensor]:
            def apply(*values: Tensor) -> Any:
                pairs = zip(inputs, values, strict=True)
                given = {name: value.reshape(bare[name]) if name in bare else value for name, value in pairs}
                args, kwargs = self._filled(everything, {**fixed, **given})
                found = target(*args, **kwargs)  # type: ignore[operator]
                found = found if part is None else found[part]
                return found.reshape(1, *shape) if node.name in self.bare else found

            return apply

        apply = applied(everything, table)
        magnitude = applied(_sizes(everything) if op in _SCALED else everything, _sizes(table))
        if op == "_native_batch_norm_legit_no_training":
            apply = magnitude = _scaling(arguments, call.args[0].meta["val"].dim())  # type: ignore[union-attr]
        elif op in ("max_pool2d_with_indices", "max_pool3d_with_indices", "max", "min") and part not in (None, 0):
            raise ModelError(f"the indices of {op} (at {node.name}) depend on the network's input: no bounds are known")
        like = tuple(self.zeros[name] for name in inputs)
        rank = (like[0].dim() - 1 if inputs[0] in bare else like[0].dim()) if inputs else 0
        single = not bare.keys().isdisjoint(inputs) or node.name in self.bare
        single = single or (op == "linear" and not isinstance(arguments[0], str))
        made = Node(node.name, op, inputs, apply, shape, like, arguments, settings, magnitude, where, rank, single)
        nonlinear = len(factors) > 1 or (op == "div" and bool(factors) and factors[0] != _first_name(call.args[0]))
        found = products(made, factors) if nonlinear else [made]
        if found[-1].shape != shape:
            raise ModelError(
                f"the factors of {op} (at {where}) have shapes that can't be paired by sample: no bounds are known"
            )
        for one in found:
            self.nodes.append(one if one.op in AFFINE else replace(one, rule=rule(one)))


def _name(target: Any) -> str:
    return target._schema.name.partition("::")[2] if hasattr(target, "_schema") else getattr(target, "__name__", str(target))


def _where(node: fx.Node) -> str:
    return str(list((node.meta.get("nn_module_stack") or {"": ("",)}).values())[-1][0]) or node.name


def _sizes(value: Any) -> Any:  # Any: arguments of any operator
    """Numbers and tensors by their absolute values."""
    if isinstance(value, dict):
        return {key: _sizes(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_sizes(item) for item in value)
    whole = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    return abs(value) if isinstance(value, int | float | Tensor) and not whole else value


def _mentioned(argument: Any) -> list[fx.Node]:
    if isinstance(argument, fx.Node):
        return [argument]
    if isinstance(argument, dict):
        argument = list(argument.values())
    return [one for item in argument for one in _mentioned(item)] if isinstance(argument, tuple | list) else []


def _first_name(argument: Any) -> str | None:
    return argument.name if isinstance(argument, fx.Node) else None


def _scaling(arguments: Sequence[Any], rank: int) -> Callable[..., Tensor]:
    """Batch normalisation with stored statistics is a factor and a summand for each channel. rank: of its input."""
    _, weight, bias, mean, variance, _, eps = arguments
    factor = (variance + eps).rsqrt() * (1 if weight is None else weight)
    summand = (0 if bias is None else bias) - mean * factor
    return lambda x: x * factor.view(-1, *([1] * (rank - 2))) + summand.view(-1, *([1] * (rank - 2)))
