"""ONNX files read into PyTorch: `read_graph` for whoever needs the graph, `adapted` for `Model`."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from saddlepoint.errors import DataError, MissingExtraError, ModelError, SaddlepointError, UnknownNameError
from saddlepoint.models.adapt import Adapted
from saddlepoint.models.onnx_operators import OPERATORS, SEVERAL_OUTPUTS, Node
from saddlepoint.taxonomy import Access

if TYPE_CHECKING:
    import onnx

_OLDEST = 7  # operator sets before it broadcast in another way
_AGREEMENT = 1e-3  # differences between batch sizes above this part of the largest output are no rounding
_DTYPES = {  # by ONNX's numbers
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
}


@dataclass(frozen=True)
class _Sizes:
    """What follows from the shape of the input alone, as values and as lists of numbers, and constant lists of numbers.

    Kept from a first pass, as tracers such as torch.export's can't follow numbers through tensors.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, list[Any]] = field(default_factory=dict)

    def keep(self, found: Mapping[str, Tensor]) -> None:
        """What isn't floating, unless it is a tracer's."""
        for name, value in found.items():
            if name not in self.numbers and type(value) is Tensor and not value.is_floating_point():
                self.values[name], self.numbers[name] = value, value.reshape(-1).tolist()


@final
class OnnxNetwork(nn.Module):
    """The graph of an ONNX file, (N, ...) -> (N, C), differentiable by autograd.

    nodes: the operators in the order in which they run, as modules; what depends on constants alone is a constant already.
    weights: floating constants that enter computations, as parameters, or as buffers if they are single numbers or statistics
    of a batch normalisation. fixed: the other constants, such as shapes and axes. All by the names in nodes' `inputs`, which
    are ONNX's with "/" for ".". input, output: names of what goes in and comes out. shape: of one input, if the file states
    it. one_by_one: the graph holds for a batch of one only, so that `forward` maps it over the samples. cut: something that
    the file computes after `output` is left out.

    >>> nodes = [Node("Relu", "first", ["x"], ["y"], {}, opset=20), Node("Mul", "second", ["y", "two"], ["z"], {}, opset=20)]
    >>> network = OnnxNetwork(nodes, {"two": torch.tensor(2.0)}, input="x", output="z", shape=(2,))
    >>> network(torch.tensor([[1.0, -1.0]]))
    tensor([[2., 0.]])
    >>> [node.op for node in network.nodes.values()]
    ['Relu', 'Mul']
    """

    def __init__(
        self, nodes: Iterable[Node], constants: Mapping[str, Tensor], input: str, output: str, shape: tuple[int, ...] | None
    ) -> None:
        super().__init__()
        self.input, self.output, self.shape, self.one_by_one, self.cut = input, output, shape, False, False
        self.nodes = nn.ModuleDict()
        self.weights = nn.Module()
        self.fixed: dict[str, Tensor] = {}
        self._spent: dict[str, list[str]] = {}  # the values that nobody needs after a node
        self._sizes: dict[torch.Size, _Sizes] = {}  # by the input's shape
        self._size_nodes: set[str] = set()  # depend on the input's shape alone
        last_use: dict[str, str] = {}
        computed_with: set[str] = set()
        statistics: set[str] = set()
        from_sizes: set[str] = set()
        for node in nodes:
            key = _free(self.nodes, node.name)
            self.nodes[key] = node
            self._spent[key] = []
            last_use |= {name: key for name in node.inputs if name}
            computed_with |= {name for i, name in enumerate(node.inputs) if i not in OPERATORS[node.op].static}
            statistics |= set(node.inputs[3:5]) if node.op == "BatchNormalization" else set()
            others = {name for name in node.inputs if name and name not in constants}
            if node.op in ("Shape", "Size") or (others and others <= from_sizes):
                from_sizes |= set(node.outputs)
                self._size_nodes.add(key)
        for name, key in last_use.items():
            self._spent[key].append(name)
            value = constants.get(name)
            if value is None:
                continue
            if not value.is_floating_point() or name not in computed_with:
                self.fixed[name] = value
            elif value.numel() > 1 and name not in statistics:
                self.weights.register_parameter(name, nn.Parameter(value))
            else:
                self.weights.register_buffer(name, value)

    def fix(self, constants: dict[str, Tensor]) -> None:
        """Take other constants, such as shapes and axes."""
        self.fixed = constants
        self._sizes.clear()

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self._single)(x) if self.one_by_one else self._run(x)

    def _single(self, sample: Tensor) -> Tensor:
        found = self._run(sample[None])
        return found[0] if found.dim() > 1 else found

    def _run(self, x: Tensor) -> Tensor:
        sizes = self._sizes.setdefault(x.shape, _Sizes())
        if type(x) is Tensor and not sizes.numbers:
            sizes.keep(self.fixed)
        values: dict[str, Any] = {
            **self.weights._parameters,
            **self.weights._buffers,
            **self.fixed,
            **sizes.values,
            self.input: x,
        }
        for key, node in self.nodes.items():
            assert isinstance(node, Node)
            if not all(name in sizes.values for name in node.outputs):
                node.join(values, sizes.numbers)
            if key in self._size_nodes:
                sizes.keep({name: values[name] for name in node.outputs})
            for name in self._spent[key]:
                del values[name]
        result: Tensor = values[self.output]
        return result


def _free(module: nn.Module, name: str) -> str:
    """`name` as one that `module` can give to a tensor or module of its own."""
    name = name.replace(".", "/")
    while hasattr(module, name):
        name += "_"
    return name


class _Names(dict[str, str]):
    """ONNX's names of values as names that modules accept. "" stands for no value, and stays."""

    def __init__(self) -> None:
        super().__init__({"": ""})
        self.taken = nn.Module()

    def __missing__(self, name: str) -> str:
        self[name] = free = _free(self.taken, name)
        setattr(self.taken, free, None)
        return free


def read_graph(path: str | os.PathLike[str], output: str | None = None, *, logits: bool = False) -> OnnxNetwork:
    """Read an ONNX file (.onnx, or .onnx.gz) into PyTorch; nothing in it is run as code.

    output: the name of the value to return, inner ones too; needed where a file has several outputs.
    logits: return what precedes a final Softmax, Sigmoid or ArgMax, which leave the class as it is.

    The batch may be of any size, also where the file fixes it to 1: what was read is tried with one and with two random
    inputs, and where those disagree it is mapped over the samples. Where the file leaves sizes of an input open there is
    nothing to try. Weights are parameters, so the network can be trained; batch normalisation and dropout are as in inference.

    Errors: `DataError` for files that are missing, damaged or not what a classifier needs; `ModelError` for operators that
    aren't known, and graphs that fail; `MissingExtraError` without the package onnx.
    """
    path = Path(path)
    model = load_file(path)
    try:
        network, dtype = _network(model, path, output, logits)
    except SaddlepointError:
        raise
    except Exception as error:  # names that are no text, nodes without inputs, ...
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if network.shape is not None:
        x = torch.rand(2, *network.shape, generator=torch.Generator().manual_seed(0))
        _settle_batches(network, x.to(dtype), path)
    return network


def adapted(path: object) -> Adapted:
    """What `Model` needs of the network in an .onnx file: its logits, also where the file goes on to a Softmax."""
    if not isinstance(path, str | os.PathLike) or not str(path).endswith((".onnx", ".onnx.gz")):
        raise DataError(f"a model's file is an .onnx file; got {path!r}")
    return Adapted(read_graph(path, logits=True), Access.PARAMETERS, name=Path(path).name)


# The file


def load_file(path: Path) -> onnx.ModelProto:
    """The parsed file with its external weights. Errors: `DataError`, `MissingExtraError`."""
    try:
        import onnx.inliner
    except ImportError:
        raise MissingExtraError("reading an ONNX file", "onnx", "onnx") from None
    try:
        data = path.read_bytes()
        model = onnx.load_model_from_string(gzip.decompress(data) if path.suffix == ".gz" else data)
    except Exception as error:  # the file system's, gzip's or protobuf's
        raise DataError(f"{path} can't be read as an ONNX file: {error}") from error
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise DataError(f"{path}: its weights lie in other files, which must be beside it: {error}") from error
    if not model.graph.node or not model.graph.output:
        raise DataError(f"{path} holds no graph of operators: is it an ONNX file?")
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def _opset(model: onnx.ModelProto, path: Path) -> int:
    versions: list[int] = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions or versions[0] < _OLDEST:
        raise DataError(
            f"{path}: its operator set is {versions[0] if versions else 'not stated'}, {_OLDEST} or later is needed: export it "
            "anew, or use onnx.version_converter.convert_version(onnx.load(path), 13)"
        )
    return versions[0]


class _Reader:
    """Turns a parsed file into nodes and constants, with names that modules accept."""

    def __init__(self, path: Path, opset: int) -> None:
        self.path, self.opset, self.names = path, opset, _Names()
        self.constants: dict[str, Tensor] = {}

    def nodes(self, graph: onnx.GraphProto) -> list[Node]:
        """The operators; constants, also those of branches, join `self.constants`."""
        for tensor in graph.initializer:
            self.keep(self.names[tensor.name], self.tensor(tensor))
        found = (self.node(proto, i) for i, proto in enumerate(graph.node))
        return [node for node in found if node is not None]

    def node(self, proto: onnx.NodeProto, i: int) -> Node | None:
        op = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}"
        attributes = {a.name: self.attribute(a) for a in proto.attribute if a.type != a.GRAPH}
        inputs, outputs = ([self.names[name] for name in ends] for ends in (proto.input, proto.output))
        value = next(iter(attributes.values()), None)
        if op == "Constant" and isinstance(value, Tensor | float | int | list):
            self.keep(outputs[0], torch.as_tensor(value))
            return None
        branches = {}
        for attribute in proto.attribute:
            if op == "If" and attribute.type == attribute.GRAPH:
                inner = self.nodes(attribute.g)
                own = {name for node in inner for name in node.outputs}
                ends = [self.names[value.name] for value in attribute.g.output]
                inputs += [
                    name for name in dict.fromkeys([*(n for node in inner for n in node.inputs), *ends]) if name not in own
                ]
                branches[attribute.name] = inner, ends
        inputs = list(dict.fromkeys(inputs)) if branches else inputs
        return Node(op, proto.name or f"{op}_{i}", inputs, outputs, attributes, self.opset, branches)

    def keep(self, name: str, value: Tensor) -> None:
        if name in self.constants:
            raise DataError(f"{self.path}: there are two constants of the name {name!r}")
        self.constants[name] = value

    def dtype(self, number: int, what: str) -> torch.dtype:
        if number not in _DTYPES:
            raise DataError(f"{self.path}: {what} has ONNX's element type {number}, which PyTorch can't compute with")
        return _DTYPES[number]

    def tensor(self, tensor: onnx.TensorProto) -> Tensor:
        from onnx import numpy_helper

        what = f"constant {tensor.name!r}"
        dtype = self.dtype(tensor.data_type, what)
        try:
            return torch.tensor(numpy_helper.to_array(tensor), dtype=dtype)
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.path}: {what} is damaged: {error}") from error

    def attribute(self, attribute: onnx.AttributeProto) -> Any:  # Any: a number, a string, a tensor or a list
        from onnx import helper

        value = helper.get_attribute_value(attribute)
        if attribute.name == "to":
            return self.dtype(value, "a Cast's target")
        if attribute.type == attribute.TENSOR:
            return self.tensor(value)
        return value.decode() if isinstance(value, bytes) else value

    def entrance(self, graph: onnx.GraphProto) -> onnx.ValueInfoProto:
        """The graph's only input."""
        constants = {tensor.name for tensor in graph.initializer}  # old files list them among the inputs too
        found: list[onnx.ValueInfoProto] = [value for value in graph.input if value.name not in constants]
        if len(found) != 1:
            names = [value.name for value in found]
            raise DataError(f"{self.path}: a classifier has one input, this graph {len(found)}: {names}")
        number = found[0].type.tensor_type.elem_type
        if not (number in _DTYPES and _DTYPES[number].is_floating_point):
            raise DataError(
                f"{self.path}: its input {found[0].name!r} is not floating, so there is nothing to perturb gradually"
            )
        return found[0]

    def wanted(self, graph: onnx.GraphProto, output: str | None) -> str:
        """The name of the value to return."""
        if output is None:
            if len(graph.output) > 1:
                found = [value.name for value in graph.output]
                raise DataError(f"{self.path} has several outputs, {found}: name one, sp.Model(read_graph(path, output=...))")
            return self.names[graph.output[0].name]
        known = [name for node in graph.node for name in node.output if name]
        if output not in known:
            raise UnknownNameError("output", output, known)
        return self.names[output]


# The graph


def _network(model: onnx.ModelProto, path: Path, output: str | None, logits: bool) -> tuple[OnnxNetwork, torch.dtype]:
    """The network, and the dtype of its input."""
    reader = _Reader(path, _opset(model, path))
    nodes = reader.nodes(model.graph)
    entrance, wanted = reader.entrance(model.graph), reader.wanted(model.graph, output)
    last = wanted
    if logits:
        wanted = _before_the_last(nodes, wanted)
    nodes = _needed(nodes, wanted)
    _check(nodes, {"", reader.names[entrance.name], *reader.constants}, [wanted], path)
    nodes = _folded(nodes, reader.constants, path)
    if not nodes:
        raise DataError(f"{path}: output {wanted!r} doesn't depend on the input")
    kind = entrance.type.tensor_type
    sizes = tuple(size.dim_value for size in kind.shape.dim)[1:]
    shape = sizes if sizes and all(sizes) else None
    network = OnnxNetwork(nodes, reader.constants, reader.names[entrance.name], wanted, shape)
    network.cut = wanted != last
    return network, _DTYPES[kind.elem_type]


def _before_the_last(nodes: list[Node], output: str) -> str:
    """What a final Softmax, Sigmoid or ArgMax is taken of."""
    origin = {name: node for node in nodes for name in node.outputs}
    along_classes = {"Softmax": 1, "ArgMax": 0, "Sigmoid": 1, "Identity": 1}  # the axis where none is stated
    while (node := origin.get(output)) is not None and node.op in along_classes and node.inputs[0] in origin:
        if node.get("axis", along_classes[node.op]) not in (1, -1):
            break
        output = node.inputs[0]
    return output


def _needed(nodes: list[Node], output: str) -> list[Node]:
    """Those on which `output` depends, in their order."""
    values, kept = {output}, []
    for node in reversed(nodes):
        if values & set(node.outputs):
            values |= set(node.inputs) - {""}
            kept.append(node)
    return kept[::-1]


def _check(nodes: list[Node], known: set[str], outputs: list[str], path: Path) -> None:
    """Every operator is known, and every value is there when it is needed."""
    for node in nodes:
        where = f"{path}: node {node.name!r}"
        if node.op not in OPERATORS:
            raise ModelError(
                f"{where} is a {node.op}, which can't be read into PyTorch: export the network without it, or attack its "
                "scores alone, sp.Model(sp.models.OnnxSession(path))"
            )
        _defined(node.inputs, known, f"{where} ({node.op})")
        for inner, ends in node.branches.values():
            _check(inner, set(known), ends, path)
        known |= set(node.outputs if node.op in SEVERAL_OUTPUTS else node.outputs[:1])
    _defined(outputs, known, str(path))


def _defined(names: Iterable[str], known: set[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise DataError(
                f"{where} needs {name!r}, which is no node's first output before it: the file is damaged, or uses outputs that "
                "aren't computed here"
            )


@torch.no_grad()
def _folded(nodes: list[Node], constants: dict[str, Tensor], path: Path) -> list[Node]:
    """The nodes that depend on the input; what the others give joins `constants`."""
    left = []
    for node in nodes:
        if any(name and name not in constants for name in node.inputs):
            left.append(node)
            continue
        try:
            node.join(constants)
        except Exception as error:
            raise _failed(path, "a constant can't be computed", error) from error
    return left


def _failed(path: Path, what: str, error: Exception) -> ModelError:
    return ModelError("; ".join((f"{path}: {what}: {error}", *getattr(error, "__notes__", ()))))


@torch.no_grad()
def _settle_batches(network: OnnxNetwork, x: Tensor, path: Path) -> None:
    """Find the way to run two inputs `x` at once that gives what each of them gives alone."""
    try:
        alone = torch.stack([network._single(sample) for sample in x])
    except Exception as error:
        raise _failed(path, f"the graph fails on one input of shape {network.shape}", error) from error
    alone = alone.double().reshape(len(x), -1)
    finite = alone[torch.isfinite(alone)].abs()
    tolerance = _AGREEMENT * float(finite.max()) if len(finite) else 0.0

    def holds() -> bool:
        try:
            found = [network(x), network(x[:1])]
        except Exception:  # whatever a batch size that is written into the graph leads to
            return False
        return all(
            y.shape[:1] == expected.shape[:1]
            and y.numel() == expected.numel()
            and torch.allclose(y.double().reshape(expected.shape), expected, rtol=0, atol=tolerance, equal_nan=True)
            for y, expected in zip(found, (alone, alone[:1]), strict=True)
        )

    if holds():
        return
    stated = network.fixed
    network.fix(dict(stated))
    for node in network.nodes.values():
        assert isinstance(node, Node)
        target = stated.get(node.inputs[1]) if node.op == "Reshape" else None
        if target is not None and target.tolist()[:1] == [1]:
            network.fixed[node.inputs[1]] = torch.cat([torch.zeros_like(target[:1]), target[1:]])
            node.attributes["allowzero"] = 0  # 0 stands for the size that there was before, so for the batch
    if holds():
        return
    network.fix(stated)
    network.one_by_one = True
    if not holds():
        raise ModelError(
            f"{path}: the graph gives other outputs, or none, for several inputs at once: export it with a dynamic batch size"
        )
