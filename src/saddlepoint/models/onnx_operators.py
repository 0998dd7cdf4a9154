"""The operators of ONNX as functions of tensors, as its specification states them for operator sets 7 and later."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from saddlepoint.errors import ModelError

SEVERAL_OUTPUTS = ("Split", "If")  # of the others only the first output is computed
Pads = list[tuple[int, int]]  # before and after, for each axis
_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSE = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
_MAX_POOL = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVG_POOL: dict[int, Callable[..., Tensor]] = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


class Node(nn.Module):
    """One operator of a graph.

    op: ONNX's name of the operator. name: its own. inputs, outputs: names of values, "" for an input that is left out.
    attributes: as the file states them, tensors and dtypes as torch's. opset: the operator set that gives it its meaning.
    branches: of an If, by the attribute that holds each: the nodes, and which of their values are its outputs. What they use
    of the graph around them is among the If's inputs.
    """

    value: Tensor | None  # what the attribute `value` holds, if anything
    like: Tensor | None  # empty, of the dtype that a Cast is for: so it follows when the network is moved to another dtype

    def __init__(
        self,
        op: str,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attributes: dict[str, Any],
        opset: int,
        branches: Mapping[str, tuple[list[Node], list[str]]] | None = None,
    ) -> None:
        super().__init__()
        self.op, self.name, self.attributes, self.opset = op, name, attributes, opset
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        value, dtype = attributes.get("value"), attributes.get("to")
        self.register_buffer("value", value if isinstance(value, Tensor) else None, persistent=False)
        self.register_buffer("like", None if dtype is None else torch.empty(0, dtype=dtype), persistent=False)
        self.branches = dict(branches or {})
        for branch, (nodes, _) in self.branches.items():
            self.add_module(branch, nn.ModuleList(nodes))

    def get(self, name: str, default: Any = None) -> Any:  # Any: an attribute is a number, a string, a list or a tensor
        """An attribute, or what holds where it is not stated."""
        return self.attributes.get(name, default)

    def extra_repr(self) -> str:
        return f"{self.name}: {self.op}({', '.join(self.inputs)}) -> {', '.join(self.outputs)}"

    def forward(self, *values: Tensor | list[Any] | None) -> Tensor | tuple[Tensor, ...]:
        operator = OPERATORS[self.op]
        devices = {v.device for i, v in enumerate(values) if isinstance(v, Tensor) and i not in operator.static}
        if len(devices) > 1 and not self.branches:  # integers, such as shapes, are on the CPU until they meet what is elsewhere
            target = next(device for device in devices if device.type != "cpu")
            values = tuple(
                v.to(target) if isinstance(v, Tensor) and i not in operator.static else v for i, v in enumerate(values)
            )
        arguments = [
            v.reshape(-1).tolist() if isinstance(v, Tensor) and i in operator.static else v for i, v in enumerate(values)
        ]
        return operator.function(self, *arguments)

    def join(self, values: dict[str, Any], numbers: Mapping[str, list[Any]] | None = None) -> None:
        """Add the outputs to `values`, where the inputs are. numbers: what is known of them as lists already."""
        static, numbers = OPERATORS[self.op].static, numbers or {}
        try:
            found = self(*(
                None if not name else numbers[name] if i in static and name in numbers else values[name]
                for i, name in enumerate(self.inputs)
            ))  # fmt: skip
        except Exception as error:
            error.add_note(f"in the ONNX graph's node {self.extra_repr()}")
            raise
        values.update(zip(self.outputs, found if isinstance(found, tuple) else (found,), strict=False))


@dataclass(frozen=True)
class Operator:
    """function: (node, *inputs) -> output or outputs. static: which inputs it takes as lists of numbers, not as tensors."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    static: tuple[int, ...] = ()


def _elementwise(function: Callable[..., Tensor]) -> Operator:
    return Operator(lambda node, *tensors: function(*tensors))


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return Operator(lambda node, *tensors: reduce(function, tensors))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    """Slopes may be broadcast in any way; one slope has bounds of its own, several are taken by ReLUs."""
    return functional.prelu(x, slope.flatten()) if slope.numel() == 1 else torch.relu(x) - slope * torch.relu(-x)


OPERATORS: dict[str, Operator] = {
    "Abs": _elementwise(torch.abs),
    "Add": _elementwise(torch.add),
    "And": _elementwise(torch.logical_and),
    "Atan": _elementwise(torch.atan),
    "Ceil": _elementwise(torch.ceil),
    "Cos": _elementwise(torch.cos),
    "Div": _elementwise(_divide),
    "Equal": _elementwise(torch.eq),
    "Erf": _elementwise(torch.erf),
    "Exp": _elementwise(torch.exp),
    "Floor": _elementwise(torch.floor),
    "Greater": _elementwise(torch.gt),
    "GreaterOrEqual": _elementwise(torch.ge),
    "HardSwish": _elementwise(functional.hardswish),
    "Identity": _elementwise(lambda x: x),
    "IsNaN": _elementwise(torch.isnan),
    "Less": _elementwise(torch.lt),
    "LessOrEqual": _elementwise(torch.le),
    "Log": _elementwise(torch.log),
    "MatMul": _elementwise(torch.matmul),
    "Max": _folded(torch.maximum),
    "Min": _folded(torch.minimum),
    "Mish": _elementwise(functional.mish),
    "Mul": _elementwise(torch.mul),
    "Neg": _elementwise(torch.neg),
    "Not": _elementwise(torch.logical_not),
    "Or": _elementwise(torch.logical_or),
    "PRelu": _elementwise(_prelu),
    "Pow": _elementwise(lambda base, exponent: torch.pow(base, exponent).to(base.dtype)),
    "Reciprocal": _elementwise(torch.reciprocal),
    "Relu": _elementwise(torch.relu),
    "Round": _elementwise(torch.round),
    "Sigmoid": _elementwise(torch.sigmoid),
    "Sign": _elementwise(torch.sign),
    "Sin": _elementwise(torch.sin),
    "Softplus": _elementwise(functional.softplus),
    "Softsign": _elementwise(functional.softsign),
    "Sqrt": _elementwise(torch.sqrt),
    "Sub": _elementwise(torch.sub),
    "Sum": _folded(torch.add),
    "Tanh": _elementwise(torch.tanh),
    "Where": _elementwise(torch.where),
    "Xor": _elementwise(torch.logical_xor),
}


def _operator(*names: str, static: tuple[int, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS.update(dict.fromkeys(names, Operator(function, static)))
        return function

    return register


def _refuse(node: Node, what: str) -> ModelError:
    return ModelError(
        f"{node.op} with {what} is not supported: export the network without it, or use sp.models.OnnxSession(path)"
    )


# Activations


@_operator("Clip")
def _clip(node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    for end, limit in (("min", low), ("max", high)):
        limit = node.get(end) if limit is None else limit
        x = x if limit is None else torch.clamp(x, **{end: limit})
    return x


@_operator("Elu", "Celu")
def _elu(node: Node, x: Tensor) -> Tensor:
    alpha: float = node.get("alpha", 1.0)
    return functional.elu(x, alpha) if node.op == "Elu" else functional.celu(x, alpha)


@_operator("Gelu")
def _gelu(node: Node, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=node.get("approximate", "none"))


@_operator("HardSigmoid")
def _hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    alpha: float = node.get("alpha", 0.2)
    beta: float = node.get("beta", 0.5)
    return (alpha * x + beta).clamp(0, 1)


@_operator("LeakyRelu")
def _leaky_relu(node: Node, x: Tensor) -> Tensor:
    return functional.leaky_relu(x, node.get("alpha", 0.01))


@_operator("Selu")
def _selu(node: Node, x: Tensor) -> Tensor:
    scale: float = node.get("gamma", 1.0507010221481323)
    return scale * functional.elu(x, node.get("alpha", 1.6732631921768188))


@_operator("Softmax", "LogSoftmax")
def _softmax(node: Node, x: Tensor) -> Tensor:
    function = torch.softmax if node.op == "Softmax" else torch.log_softmax
    if node.opset >= 13:
        return function(x, node.get("axis", -1))
    return function(x.reshape(*x.shape[: node.get("axis", 1)], -1), -1).reshape(x.shape)  # over all axes from this one on


@_operator("ThresholdedRelu")
def _thresholded_relu(node: Node, x: Tensor) -> Tensor:
    alpha: float = node.get("alpha", 1.0)
    return x * (x > alpha)


# Linear maps


@_operator("Gemm")
def _gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha: float = node.get("alpha", 1.0)
    beta: float = node.get("beta", 1.0)
    a, b = a.T if node.get("transA", 0) else a, b if node.get("transB", 0) else b.T
    if alpha == beta == 1 and (c is None or c.dim() == 1):
        return functional.linear(a, b, c)
    product = alpha * functional.linear(a, b)
    return product if c is None else product + beta * c


@_operator("Einsum")
def _einsum(node: Node, *tensors: Tensor) -> Tensor:
    return torch.einsum(node.get("equation").replace(" ", ""), *tensors)


def _pads(node: Node, x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Pads:
    """How much a window operator pads each spatial axis."""
    automatic = node.get("auto_pad", "NOTSET")
    if automatic in ("NOTSET", "VALID"):
        pads = node.get("pads", [0] * 2 * len(kernel)) if automatic == "NOTSET" else [0] * 2 * len(kernel)
        return list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
    found = []
    for size, width, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = max((math.ceil(size / stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        found.append(_halved(total, upper=automatic == "SAME_UPPER"))
    return found


def _halved(total: int, *, upper: bool) -> tuple[int, int]:
    """The odd one goes to the end if `upper`."""
    less, more = total // 2, total - total // 2
    return (less, more) if upper else (more, less)


def _padded(x: Tensor, pads: Pads, value: float = 0.0) -> Tensor:
    """With `value` around the last axes."""
    return functional.pad(x, [size for pair in reversed(pads) for size in pair], value=value) if any(map(any, pads)) else x


def _symmetric(pads: Pads) -> bool:
    return all(before == after >= 0 for before, after in pads)


@_operator("Conv")
def _conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    ones = [1] * (weight.dim() - 2)
    strides, dilations, groups = node.get("strides", ones), node.get("dilations", ones), node.get("group", 1)
    pads = _pads(node, x, weight.shape[2:], strides, dilations)
    if _symmetric(pads):
        return _CONV[len(ones)](x, weight, bias, strides, [before for before, _ in pads], dilations, groups)
    return _CONV[len(ones)](_padded(x, pads), weight, bias, strides, 0, dilations, groups)


@_operator("ConvTranspose")
def _conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    ones = [1] * (weight.dim() - 2)
    strides, dilations, groups = node.get("strides", ones), node.get("dilations", ones), node.get("group", 1)
    extra = node.get("output_padding", [0] * len(ones))
    whole = _CONV_TRANSPOSE[len(ones)](x, weight, bias, strides, 0, extra, groups, dilations)
    automatic, wanted = node.get("auto_pad", "NOTSET"), node.get("output_shape")
    if wanted is None and automatic.startswith("SAME"):
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if wanted is None:
        pads = _pads(node, x, weight.shape[2:], strides, dilations)
    else:
        excess = [size - target for size, target in zip(whole.shape[2:], wanted[-len(ones) :], strict=True)]
        pads = [_halved(total, upper=automatic == "SAME_UPPER") for total in excess]
    return _padded(whole, [(-before, -after) for before, after in pads])


# Pooling


@_operator("MaxPool")
def _max_pool(node: Node, x: Tensor) -> Tensor:
    kernel = node.get("kernel_shape")
    ones, ceil = [1] * len(kernel), bool(node.get("ceil_mode", 0))
    strides, dilations = node.get("strides", ones), node.get("dilations", ones)
    pads = _pads(node, x, kernel, strides, dilations)
    if _symmetric(pads) and all(2 * before <= width for (before, _), width in zip(pads, kernel, strict=True)):
        return _MAX_POOL[len(kernel)](x, kernel, strides, [before for before, _ in pads], dilations, ceil)
    return _MAX_POOL[len(kernel)](_padded(x, pads, -math.inf), kernel, strides, 0, dilations, ceil)


@_operator("AveragePool")
def _average_pool(node: Node, x: Tensor) -> Tensor:
    kernel = node.get("kernel_shape")
    ones, ceil, pool = [1] * len(kernel), bool(node.get("ceil_mode", 0)), _AVG_POOL[len(kernel)]
    if any(d != 1 for d in node.get("dilations", ones)):
        raise _refuse(node, "dilations")
    strides = node.get("strides", ones)
    pads = _pads(node, x, kernel, strides, ones)
    whole = pool(_padded(x, pads), kernel, strides, 0, ceil)
    if node.get("count_include_pad", 0) or not any(map(any, pads)):
        return whole
    return whole / pool(_padded(torch.ones_like(x[:1, :1]), pads), kernel, strides, 0, ceil)


@_operator("GlobalAveragePool")
def _global_average_pool(node: Node, x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


@_operator("GlobalMaxPool")
def _global_max_pool(node: Node, x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


# Normalisation


@_operator("BatchNormalization")
def _batch_normalization(node: Node, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if node.get("training_mode", 0) or not node.get("spatial", 1):
        raise _refuse(node, "training_mode=1 or spatial=0")
    return functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=node.get("epsilon", 1e-5))


@_operator("InstanceNormalization")
def _instance_normalization(node: Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.instance_norm(x, weight=weight, bias=bias, eps=node.get("epsilon", 1e-5))


@_operator("LayerNormalization")
def _layer_normalization(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.layer_norm(x, x.shape[node.get("axis", -1) :], weight, bias, node.get("epsilon", 1e-5))


@_operator("GroupNormalization")
def _group_normalization(node: Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    groups = node.get("num_groups")
    if node.opset < 21:  # one weight for each group
        weight, bias = (t.repeat_interleave(x.shape[1] // groups) for t in (weight, bias))
    return functional.group_norm(x, groups, weight, bias, node.get("epsilon", 1e-5))


@_operator("LRN")
def _lrn(node: Node, x: Tensor) -> Tensor:
    size: int = node.get("size")
    squares = _padded(x * x, [_halved(size - 1, upper=True), *[(0, 0)] * (x.dim() - 2)])
    around = torch.stack([squares.narrow(1, i, x.shape[1]) for i in range(size)]).sum(0)
    alpha: float = node.get("alpha", 1e-4)
    bias: float = node.get("bias", 1.0)
    beta: float = node.get("beta", 0.75)
    return x / (bias + alpha / size * around).pow(beta)


# Reductions


def _reducing(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def run(node: Node, x: Tensor, axes: list[int] | None = None) -> Tensor:
        axes = axes or node.get("axes")
        if not axes and node.get("noop_with_empty_axes", 0):
            return x
        return function(x, axes or list(range(x.dim())), bool(node.get("keepdims", 1)))

    return Operator(run, static=(1,))


OPERATORS |= {
    "ReduceL1": _reducing(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": _reducing(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    "ReduceLogSumExp": _reducing(torch.logsumexp),
    "ReduceMax": _reducing(torch.amax),
    "ReduceMean": _reducing(torch.mean),
    "ReduceMin": _reducing(torch.amin),
    "ReduceSum": _reducing(torch.sum),
    "ReduceSumSquare": _reducing(lambda x, axes, keep: x.square().sum(axes, keep)),
}


@_operator("ArgMax", "ArgMin")
def _arg(node: Node, x: Tensor) -> Tensor:
    if node.get("select_last_index", 0):
        raise _refuse(node, "select_last_index")
    axis, keep = int(node.get("axis", 0)), bool(node.get("keepdims", 1))
    return x.argmax(axis, keep) if node.op == "ArgMax" else x.argmin(axis, keep)


# Shapes


@_operator("Shape")
def _shape(node: Node, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[node.get("start", 0) : node.get("end")])


@_operator("Size")
def _size(node: Node, x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


@_operator("Flatten")
def _flatten(node: Node, x: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@_operator("Reshape", static=(1,))
def _reshape(node: Node, x: Tensor, shape: list[int]) -> Tensor:
    if not node.get("allowzero", 0):
        shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return x.reshape(shape)


@_operator("Transpose")
def _transpose(node: Node, x: Tensor) -> Tensor:
    return x.permute(node.get("perm", list(reversed(range(x.dim())))))


@_operator("Squeeze", static=(1,))
def _squeeze(node: Node, x: Tensor, axes: list[int] | None = None) -> Tensor:
    axes = axes or node.get("axes")
    return x.squeeze(tuple(axes)) if axes else x.squeeze()


@_operator("Unsqueeze", static=(1,))
def _unsqueeze(node: Node, x: Tensor, axes: list[int] | None = None) -> Tensor:
    axes = axes or node.get("axes")
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):  # positions in the output
        x = x.unsqueeze(axis)
    return x


@_operator("Concat")
def _concat(node: Node, *tensors: Tensor) -> Tensor:
    return torch.cat(tensors, node.get("axis"))


@_operator("Split", static=(1,))
def _split(node: Node, x: Tensor, sizes: list[int] | None = None) -> tuple[Tensor, ...]:
    axis = node.get("axis", 0)
    return torch.split(x, sizes or node.get("split") or math.ceil(x.shape[axis] / len(node.outputs)), axis)


@_operator("Slice", static=(1, 2, 3, 4))
def _slice(
    node: Node,
    x: Tensor,
    starts: list[int] | None = None,
    ends: list[int] | None = None,
    axes: list[int] | None = None,
    steps: list[int] | None = None,
) -> Tensor:
    starts, ends = starts or node.get("starts"), ends or node.get("ends")
    axes = axes or node.get("axes", range(len(starts)))
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(starts), strict=True):
        where = range(*slice(start, end, step).indices(x.shape[axis]))
        if step == 1:
            x = x.narrow(axis, min(where.start, x.shape[axis]), len(where))
        else:
            x = x.index_select(axis, torch.tensor(where, dtype=torch.int64, device=x.device))
    return x


@_operator("Gather")
def _gather(node: Node, x: Tensor, index: Tensor) -> Tensor:
    axis = node.get("axis", 0) % x.dim()
    index = torch.where(index < 0, index + x.shape[axis], index)
    return x.index_select(axis, index.reshape(-1)).reshape(x.shape[:axis] + index.shape + x.shape[axis + 1 :])


@_operator("Expand", static=(1,))
def _expand(node: Node, x: Tensor, shape: list[int]) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape)))  # type: ignore[no-untyped-call]  # untyped in torch


@_operator("Tile", static=(1,))
def _tile(node: Node, x: Tensor, repeats: list[int]) -> Tensor:
    return x.repeat(repeats)


@_operator("Range", static=(0, 1, 2))
def _range(node: Node, start: list[float], limit: list[float], delta: list[float]) -> Tensor:
    return torch.arange(start[0], limit[0], delta[0])


@_operator("ConstantOfShape", static=(0,))
def _constant_of_shape(node: Node, shape: list[int]) -> Tensor:
    return torch.zeros(shape) if node.value is None else node.value.reshape(()).expand(shape)


@_operator("Cast")
def _cast(node: Node, x: Tensor) -> Tensor:
    assert node.like is not None
    return x.to(node.like.dtype)


@_operator("Dropout")
def _dropout(node: Node, x: Tensor, *unused: Tensor) -> Tensor:
    return x


@_operator("If")
def _if(node: Node, condition: Tensor, *around: Tensor) -> tuple[Tensor, ...]:
    nodes, outputs = node.branches["then_branch" if bool(condition) else "else_branch"]
    values = dict(zip(node.inputs, (condition, *around), strict=True))
    for inner in nodes:
        inner.join(values)
    return tuple(values[name] for name in outputs)


# Padding and resampling


@_operator("Pad", static=(1, 2, 3))
def _pad(
    node: Node,
    x: Tensor,
    pads: list[int] | None = None,
    value: list[float] | None = None,
    axes: list[int] | None = None,
) -> Tensor:
    pads, mode = pads or node.get("pads"), node.get("mode", "constant")
    axes = axes or list(range(x.dim()))
    pairs = [(0, 0)] * x.dim()
    for i, axis in enumerate(axes):
        pairs[axis] = (pads[i], pads[len(axes) + i])
    if mode == "constant":
        return _padded(x, pairs, value[0] if value else node.get("value", 0.0))
    for axis, (before, after) in enumerate(pairs):
        size = x.shape[axis]
        at = torch.arange(-before, size + after, device=x.device)
        if mode == "edge":
            at = at.clamp(0, size - 1)
        elif mode == "wrap":
            at = at.remainder(size)
        else:
            at = at.abs().remainder(max(2 * size - 2, 1))
            at = torch.minimum(at, 2 * size - 2 - at)
        x = x.index_select(axis, at) if before or after else x
    return x


@_operator("Resize", "Upsample", static=(1, 2, 3))
def _resize(
    node: Node,
    x: Tensor,
    roi: list[float] | None = None,
    scales: list[float] | None = None,
    sizes: list[int] | None = None,
) -> Tensor:
    old = node.op == "Upsample" or node.opset < 11
    scales = roi or node.get("scales") if old else scales
    coordinates = "asymmetric" if old else node.get("coordinate_transformation_mode", "half_pixel")
    if node.get("antialias", 0) or node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise _refuse(node, "antialias or keep_aspect_ratio_policy")
    for i, axis in enumerate(node.get("axes") or range(x.dim())):
        length = x.shape[axis]
        size = sizes[i] if sizes else math.floor(length * scales[i]) if scales else length
        scale = size / length if sizes or not scales else scales[i]
        if scale != 1:
            rounding = ("ceil" if scale < 1 else "floor") if old else node.get("nearest_mode", "round_prefer_floor")
            at = _coordinates(node, length, size, scale, coordinates)
            matrix = _interpolation(node, at, length, rounding).to(x.device, x.dtype)
            x = (x.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    return x


def _coordinates(node: Node, length: int, size: int, scale: float, mode: str) -> Tensor:
    """Where each of `size` outputs lies among `length` inputs, (size,)."""
    i = torch.arange(size, dtype=torch.float32)  # as onnxruntime, so that halves are rounded alike
    match mode:
        case "half_pixel":
            return (i + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            return (i + 0.5) / scale - 0.5 if size > 1 else 0 * i
        case "align_corners":
            return i * (length - 1) / max(size - 1, 1)
        case "asymmetric":
            return i / scale
    raise _refuse(node, f"coordinate_transformation_mode={mode}")


def _interpolation(node: Node, at: Tensor, length: int, rounding: str) -> Tensor:
    """The matrix (size, length) that resamples an axis at these coordinates."""
    at = at.clamp(0, length - 1)[:, None]
    match node.get("mode", "nearest"), rounding:
        case "linear", _:
            pass
        case "nearest", "round_prefer_floor":
            at = (at - 0.5).ceil()
        case "nearest", "round_prefer_ceil":
            at = (at + 0.5).floor()
        case "nearest", "floor":
            at = at.floor()
        case "nearest", "ceil":
            at = at.ceil()
        case mode, _:
            raise _refuse(node, f"mode={mode}")
    return (1 - (at - torch.arange(length)).abs()).clamp(min=0)  # the hat function
