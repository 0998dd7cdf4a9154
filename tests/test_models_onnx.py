"""ONNX files: every operator gives what onnxruntime gives, for any batch, differentiably; damaged files are refused clearly."""

from __future__ import annotations

import copy
import gzip
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.models.onnx_graph import OnnxNetwork, read_graph
from saddlepoint.models.onnx_model import OnnxSession
from saddlepoint.models.onnx_operators import OPERATORS

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

Array = Any  # what numpy makes an array of
RNG = np.random.default_rng(0)
NEWEST = 20


def normal(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


def model_of(
    nodes: Sequence[Any], shape: Sequence[Any], constants: dict[str, Array], opset: int = NEWEST, kind: int = TensorProto.FLOAT
) -> Any:
    """A graph from `x` (N, *shape) to `y`."""
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_empty_tensor_value_info("y")],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    return proto


def saved(folder: Path, proto: Any, name: str = "net.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def by_onnxruntime(path: Path, x: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


Case = tuple[str, Sequence[Array | None], dict[str, Any], Sequence[int]]  # operator, inputs after x, attributes, x's shape

SAME = (3, 4)
IMAGE = (2, 3, 7, 6)
CASES: list[Case] = [
    *[(op, [], {}, SAME) for op in ("Abs", "Atan", "Ceil", "Cos", "Erf", "Exp", "Floor", "HardSwish", "Identity", "Mish")],
    *[
        (op, [], {}, SAME)
        for op in ("Neg", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Tanh")
    ],
    *[(op, [normal(4)], {}, SAME) for op in ("Add", "Div", "Max", "Min", "Mul", "PRelu", "Sub", "Sum")],
    ("Max", [normal(4), normal(3, 1)], {}, SAME),
    ("Pow", [np.float32(3)], {}, SAME),
    ("Pow", [np.int64(2)], {}, SAME),
    ("Clip", [np.float32(-0.5), np.float32(0.5)], {}, SAME),
    ("Clip", [None, np.float32(0.5)], {}, SAME),
    ("Elu", [], {"alpha": 0.7}, SAME),
    ("Celu", [], {"alpha": 0.7}, SAME),
    ("Selu", [], {}, SAME),
    ("Selu", [], {"alpha": 1.5, "gamma": 1.2}, SAME),
    ("Gelu", [], {}, SAME),
    ("Gelu", [], {"approximate": "tanh"}, SAME),
    ("HardSigmoid", [], {}, SAME),
    ("HardSigmoid", [], {"alpha": 0.4, "beta": 0.1}, SAME),
    ("LeakyRelu", [], {}, SAME),
    ("LeakyRelu", [], {"alpha": 0.3}, SAME),
    ("ThresholdedRelu", [], {"alpha": 0.5}, SAME),
    ("Softmax", [], {}, (2, 3, 4)),
    ("Softmax", [], {"axis": 1}, (2, 3, 4)),
    ("LogSoftmax", [], {"axis": 1}, (2, 3, 4)),
    ("MatMul", [normal(4, 5)], {}, SAME),
    ("MatMul", [normal(3, 4, 5)], {}, (2, 3, 2, 4)),
    ("Gemm", [normal(4, 5), normal(5)], {}, SAME),
    ("Gemm", [normal(5, 4), normal(5)], {"transB": 1}, SAME),
    ("Gemm", [normal(4, 5)], {"alpha": 0.5}, SAME),
    ("Gemm", [normal(3, 5), normal(3, 5)], {"transA": 1, "beta": 2.0}, (3, 3)),
    ("Einsum", [normal(4, 5)], {"equation": "nd, dc -> nc"}, SAME),
    ("Conv", [normal(5, 3, 3, 2), normal(5)], {}, IMAGE),
    ("Conv", [normal(5, 3, 3, 3)], {"pads": [1, 2, 1, 2], "strides": [2, 1]}, IMAGE),
    ("Conv", [normal(5, 3, 3, 2)], {"pads": [0, 1, 2, 0], "dilations": [2, 1]}, IMAGE),
    ("Conv", [normal(6, 1, 3, 3)], {"group": 3, "auto_pad": "SAME_UPPER", "strides": [2, 2]}, IMAGE),
    ("Conv", [normal(6, 3, 2, 3)], {"auto_pad": "SAME_LOWER"}, IMAGE),
    ("Conv", [normal(6, 3, 2, 3)], {"auto_pad": "VALID"}, IMAGE),
    ("Conv", [normal(5, 3, 4), normal(5)], {"pads": [1, 2], "strides": [3]}, (2, 3, 11)),
    ("Conv", [normal(2, 3, 2, 2, 2)], {"pads": [1] * 6}, (2, 3, 4, 3, 4)),
    ("ConvTranspose", [normal(3, 4, 3, 3), normal(4)], {}, IMAGE),
    ("ConvTranspose", [normal(3, 4, 3, 3)], {"strides": [2, 3], "pads": [1, 0, 1, 2], "output_padding": [1, 2]}, IMAGE),
    ("ConvTranspose", [normal(3, 2, 3, 3)], {"group": 3, "dilations": [2, 1], "strides": [2, 2]}, IMAGE),
    ("ConvTranspose", [normal(3, 4, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}, IMAGE),
    ("ConvTranspose", [normal(3, 4, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_LOWER"}, IMAGE),
    ("ConvTranspose", [normal(3, 4, 3, 3)], {"strides": [2, 2], "output_shape": [14, 12]}, IMAGE),
    ("ConvTranspose", [normal(3, 4, 3)], {"strides": [2], "pads": [1, 1]}, (2, 3, 7)),
    ("MaxPool", [], {"kernel_shape": [3, 2]}, IMAGE),
    ("MaxPool", [], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}, IMAGE),
    ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}, IMAGE),
    ("MaxPool", [], {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}, IMAGE),
    ("MaxPool", [], {"kernel_shape": [2, 2], "dilations": [2, 3]}, IMAGE),
    ("MaxPool", [], {"kernel_shape": [3], "strides": [2]}, (2, 3, 11)),
    ("AveragePool", [], {"kernel_shape": [3, 2]}, IMAGE),
    ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, IMAGE),
    ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}, IMAGE),
    ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [0, 1, 1, 0], "strides": [2, 2]}, IMAGE),
    ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [0, 1, 1, 0], "count_include_pad": 1}, IMAGE),
    ("AveragePool", [], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, IMAGE),
    ("AveragePool", [], {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}, IMAGE),
    ("GlobalAveragePool", [], {}, IMAGE),
    ("GlobalMaxPool", [], {}, IMAGE),
    ("BatchNormalization", [normal(3), normal(3), normal(3), normal(3) ** 2 + 0.1], {"epsilon": 1e-3}, IMAGE),
    ("BatchNormalization", [normal(4), normal(4), normal(4), normal(4) ** 2 + 0.1], {}, SAME),
    ("InstanceNormalization", [normal(3), normal(3)], {}, IMAGE),
    ("LayerNormalization", [normal(6), normal(6)], {}, IMAGE),
    ("LayerNormalization", [normal(7, 6)], {"axis": 2, "epsilon": 1e-2}, IMAGE),
    ("LRN", [], {"size": 3}, (2, 6, 4, 4)),
    ("LRN", [], {"size": 5, "alpha": 0.3, "beta": 0.5, "bias": 2.0}, (2, 6, 4, 4)),
    *[(op, [np.array([1, -1])], {}, IMAGE) for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1")],
    *[(op, [np.array([2])], {"keepdims": 0}, IMAGE) for op in ("ReduceMean", "ReduceMax", "ReduceL2", "ReduceLogSumExp")],
    ("ReduceSumSquare", [], {}, IMAGE),
    ("ReduceSum", [], {"noop_with_empty_axes": 1}, IMAGE),
    ("Flatten", [], {}, IMAGE),
    ("Flatten", [], {"axis": 2}, IMAGE),
    ("Flatten", [], {"axis": 0}, IMAGE),
    ("Flatten", [], {"axis": -1}, IMAGE),
    ("Reshape", [np.array([0, -1])], {}, IMAGE),
    ("Reshape", [np.array([2, 21, 6])], {}, IMAGE),
    ("Transpose", [], {"perm": [0, 2, 3, 1]}, IMAGE),
    ("Transpose", [], {}, IMAGE),
    ("Squeeze", [np.array([1, -1])], {}, (2, 1, 3, 1)),
    ("Squeeze", [], {}, (2, 1, 3, 1)),
    ("Unsqueeze", [np.array([1, -1])], {}, SAME),
    ("Concat", [normal(3, 2)], {"axis": 1}, SAME),
    ("Concat", [normal(3, 2)], {"axis": -1}, SAME),
    ("Slice", [np.array([1]), np.array([3])], {}, (5, 4)),
    ("Slice", [np.array([1, -2]), np.array([2**40, -1]), np.array([0, 1]), np.array([2, 1])], {}, (5, 4)),
    ("Slice", [np.array([-1]), np.array([-(2**40)]), np.array([1]), np.array([-2])], {}, (5, 6)),
    ("Slice", [np.array([9]), np.array([12]), np.array([1])], {}, (5, 6)),
    ("Gather", [np.array([[2, -1], [0, 0]])], {"axis": 1}, (5, 4)),
    ("Gather", [np.array(1)], {"axis": 1}, (5, 4, 2)),
    ("Expand", [np.array([2, 3, 4])], {}, SAME),
    ("Expand", [np.array([3, 1, 1])], {}, (2, 1, 3, 1)),
    ("Tile", [np.array([1, 2])], {}, SAME),
    ("Pad", [np.array([0, 1, 2, 0, 0, 0, 1, 3])], {}, IMAGE),
    ("Pad", [np.array([0, 1, 0, 2]), np.float32(1.5)], {}, SAME),
    ("Pad", [np.array([0, -1, 0, 2])], {}, SAME),
    ("Pad", [np.array([1, 2]), None, np.array([-1])], {}, SAME),
    ("Pad", [np.array([0, 0, 2, 1, 0, 0, 3, 2])], {"mode": "reflect"}, IMAGE),
    ("Pad", [np.array([0, 1, 2, 1, 0, 0, 3, 2])], {"mode": "edge"}, IMAGE),
    ("Pad", [np.array([0, 0, 2, 1, 0, 0, 3, 2])], {"mode": "wrap"}, IMAGE),
    ("ArgMax", [], {"axis": 1}, SAME),
    ("ArgMax", [], {"axis": -1, "keepdims": 0}, SAME),
    ("ArgMin", [], {"axis": 1}, SAME),
    ("Dropout", [], {}, SAME),
    ("Cast", [], {"to": TensorProto.INT64}, SAME),
    ("Cast", [], {"to": TensorProto.BOOL}, SAME),
    *[(op, [normal(4)], {}, SAME) for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")],
    ("Shape", [], {}, IMAGE),
    ("Shape", [], {"start": 1, "end": -1}, IMAGE),
    ("Size", [], {}, IMAGE),
    *[
        (
            "Resize",
            [None, np.array([1, 1, *scales], np.float32)],
            {"mode": mode, "coordinate_transformation_mode": where},
            IMAGE,
        )
        for mode in ("nearest", "linear")
        for where in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
        for scales in ((2, 2), (1.7, 0.6), (0.5, 3))
    ],
    *[
        ("Resize", [None, np.array([1, 1, 1.5, 0.7], np.float32)], {"nearest_mode": rounding}, IMAGE)
        for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    ],
    ("Resize", [None, None, np.array([2, 3, 10, 4])], {"mode": "linear"}, IMAGE),
    ("Resize", [None, None, np.array([10, 4])], {"axes": [2, 3]}, IMAGE),
]
OLDER: list[tuple[int, Case]] = [  # where an earlier operator set says it in another way
    (9, ("Softmax", [], {}, (2, 3, 4))),
    (9, ("Softmax", [], {"axis": 2}, (2, 3, 4))),
    (9, ("LogSoftmax", [], {"axis": -1}, (2, 3, 4))),
    (9, ("Clip", [], {"min": -0.5, "max": 0.5}, SAME)),
    (9, ("Clip", [], {"max": 0.5}, SAME)),
    (9, ("Squeeze", [], {"axes": [1]}, (2, 1, 3, 1))),
    (9, ("Unsqueeze", [], {"axes": [0, 3]}, SAME)),
    (9, ("ReduceMean", [], {"axes": [1], "keepdims": 0}, IMAGE)),
    (9, ("ReduceSum", [], {"axes": [-1]}, IMAGE)),
    (13, ("ReduceMax", [], {"axes": [2, 3]}, IMAGE)),
    (9, ("Slice", [], {"starts": [1, -3], "ends": [100, -1], "axes": [0, 1]}, (5, 4))),
    (9, ("Slice", [], {"starts": [1], "ends": [2]}, (5, 4))),
    (9, ("Pad", [], {"pads": [0, 1, 0, 2], "value": 0.5}, SAME)),
    (9, ("Pad", [], {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "mode": "reflect"}, IMAGE)),
    (9, ("Dropout", [], {"ratio": 0.4}, SAME)),
    (9, ("Upsample", [np.array([1, 1, 2, 3], np.float32)], {"mode": "nearest"}, IMAGE)),
    (9, ("Upsample", [np.array([1, 1, 2, 3], np.float32)], {"mode": "linear"}, IMAGE)),
    (7, ("Upsample", [], {"mode": "nearest", "scales": [1.0, 1.0, 2.0, 2.0]}, IMAGE)),
    (10, ("Resize", [np.array([1, 1, 2, 3], np.float32)], {"mode": "nearest"}, IMAGE)),
    (10, ("Resize", [np.array([1, 1, 0.6, 0.4], np.float32)], {"mode": "nearest"}, IMAGE)),
    (10, ("Resize", [np.array([1, 1, 0.5, 3], np.float32)], {"mode": "linear"}, IMAGE)),
    (13, ("Resize", [None, np.array([1, 1, 2, 3], np.float32)], {"mode": "linear"}, IMAGE)),
    (13, ("BatchNormalization", [normal(3), normal(3), normal(3), normal(3) ** 2 + 0.1], {}, IMAGE)),
    (10, ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}, IMAGE)),
]


Composed = tuple[list[Any], dict[str, Array]]
make = helper.make_node
BRANCHES = {
    "then_branch": helper.make_graph([make("Add", ["x", "w"], ["p"])], "then", [], [helper.make_empty_tensor_value_info("p")]),
    "else_branch": helper.make_graph(
        [make("Constant", [], ["c"], value_float=2.0), make("Mul", ["x", "c"], ["q"]), make("Relu", ["q"], ["r"])],
        "else",
        [],
        [helper.make_empty_tensor_value_info("r")],
    ),
}
COMPOSED: dict[str, Composed] = {  # of x (4, 3), for operators that take or give no float
    "Sqrt": ([make("Abs", ["x"], ["a"]), make("Sqrt", ["a"], ["y"])], {}),
    "Log": ([make("Abs", ["x"], ["a"]), make("Log", ["a"], ["y"])], {}),
    "IsNaN": ([make("Log", ["x"], ["a"]), make("IsNaN", ["a"], ["y"])], {}),
    **{
        op: (
            [make("Less", ["x", "l"], ["a"]), make("Less", ["x", "r"], ["b"]), make(op, ["a", "b"], ["y"])],
            {"l": normal(3), "r": normal(3)},
        )
        for op in ("And", "Or", "Xor")
    },
    "Not": ([make("Less", ["x", "l"], ["a"]), make("Not", ["a"], ["y"])], {"l": normal(3)}),
    "Where": ([make("Less", ["x", "l"], ["a"]), make("Where", ["a", "x", "r"], ["y"])], {"l": normal(3), "r": normal(4, 1)}),
    "Split": ([make("Split", ["x", "s"], ["a", "b"], axis=1), make("Mul", ["a", "b"], ["y"])], {"s": np.array([1, 2])}),
    "Split into equal parts": ([make("Split", ["x"], ["a", "b"], num_outputs=2), make("Sub", ["a", "b"], ["y"])], {}),
    "ConstantOfShape": ([make("Shape", ["x"], ["a"]), make("ConstantOfShape", ["a"], ["y"])], {}),
    "ConstantOfShape with a value": (
        [
            make("Shape", ["x"], ["a"]),
            make("ConstantOfShape", ["a"], ["b"], value=numpy_helper.from_array(np.array([2.5], np.float32))),
            make("Mul", ["b", "x"], ["y"]),
        ],
        {},
    ),
    "Range": (
        [make("Shape", ["x"], ["a"], end=1), make("Squeeze", ["a"], ["b"]), make("Range", ["zero", "b", "two"], ["y"])],
        {"zero": np.array(0), "two": np.array(2)},
    ),
    "Shape arithmetic": (
        [
            make("Shape", ["x"], ["a"], end=1),
            make("Div", ["a", "three"], ["b"]),  # rounds down
            make("Concat", ["b", "rest"], ["c"], axis=0),
            make("Reshape", ["x", "c"], ["y"]),
        ],
        {"three": np.array([3]), "rest": np.array([-1])},
    ),
    "GroupNormalization": (
        [make("Reshape", ["x", "s"], ["a"]), make("GroupNormalization", ["a", "w", "b"], ["y"], num_groups=2)],
        {"s": np.array([1, 4, 3]), "w": normal(2), "b": normal(2)},
    ),
    **{
        f"If the batch is {count}": (
            [make("Shape", ["x"], ["a"], end=1), make("Equal", ["a", "count"], ["b"]), make("If", ["b"], ["y"], **BRANCHES)],
            {"count": np.array([count]), "w": normal(3)},
        )
        for count in (4, 5)
    },
    "Constant": ([make("Constant", [], ["a"], value_float=0.5), make("Mul", ["x", "a"], ["y"])], {}),
    "Constants of integers": ([make("Constant", [], ["a"], value_ints=[2, 6]), make("Reshape", ["x", "a"], ["y"])], {}),
    "An operator that isn't needed": ([make("Relu", ["x"], ["y"]), make("NonZero", ["x"], ["a"])], {}),
}


def single(case: Case, opset: int) -> tuple[Any, Any]:
    """A graph of one node, and an input. The batch dimension is fixed, for these are no classifiers."""
    op, inputs, attributes, shape = case
    constants = {f"c{i}": value for i, value in enumerate(inputs) if value is not None}
    names = ["x", *(f"c{i}" if value is not None else "" for i, value in enumerate(inputs))]
    node = helper.make_node(op, names, ["y"], **attributes)
    return model_of([node], [f"d{i}" for i in range(len(shape))], constants, opset), normal(*shape)


def agrees(path: Path, x: Any) -> OnnxNetwork:
    network, expected = read_graph(path), by_onnxruntime(path, x)
    found = network(torch.tensor(x))
    assert found.shape == expected.shape
    assert str(found.dtype) == f"torch.{expected.dtype}"
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    return network


@pytest.mark.parametrize(
    ("opset", "case"),
    [*((NEWEST, case) for case in CASES), *OLDER],
    ids=lambda v: str(v) if isinstance(v, int) else v[0],
)
def test_every_operator_gives_what_onnxruntime_gives(opset: int, case: Case, tmp_path: Path) -> None:
    proto, x = single(case, opset)
    agrees(saved(tmp_path, proto), x)


@pytest.mark.parametrize("name", COMPOSED)
def test_operators_on_shapes_and_conditions_too(name: str, tmp_path: Path) -> None:
    nodes, constants = COMPOSED[name]
    agrees(saved(tmp_path, model_of(nodes, ["n", "m"], constants)), normal(4, 3))


@pytest.mark.parametrize("name", ["Shape arithmetic", "Constants of integers", "ConstantOfShape with a value"])
def test_what_follows_from_the_shape_is_known_to_tracers_after_a_first_pass(name: str, tmp_path: Path) -> None:
    nodes, constants = COMPOSED[name]
    x = normal(4, 3)
    network = agrees(saved(tmp_path, model_of(nodes, ["n", "m"], constants)), x)
    other = torch.tensor(normal(4, 3))
    traced = torch.export.export(network, (torch.tensor(x),), strict=False).module()
    torch.testing.assert_close(traced(other), network(other))


def test_no_operator_is_left_out() -> None:
    composed = {node.op_type for nodes, _ in COMPOSED.values() for node in nodes}
    assert {case[0] for case in CASES} | {case[0] for _, case in OLDER} | composed >= OPERATORS.keys()


DIFFERENTIABLE = [case for case in CASES if case[0] not in ("ArgMax", "ArgMin", "Cast", "Equal", "Shape", "Size")]
DIFFERENTIABLE = [case for case in DIFFERENTIABLE if not case[0].startswith(("Greater", "Less"))]


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case[0])
def test_gradients_are_those_of_finite_differences(case: Case, tmp_path: Path) -> None:
    proto, x = single(case, NEWEST)
    network = read_graph(saved(tmp_path, proto)).double()
    point = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(network, point, fast_mode=True)


# Whole networks, as PyTorch writes them


class Attention(nn.Module):
    """A vision transformer of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 10)
        self.first, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(x), -1, -1), tokens], 1) + self.positions
        query, key, value = (f(self.norm(tokens)) for f in (self.query, self.key, self.value))
        tokens = tokens + (query @ key.transpose(1, 2) / 8**0.5).softmax(2) @ value
        return self.head(nn.functional.gelu(tokens[:, 0]))


class Resampled(nn.Module):
    """What else classifiers do between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm(self.first(x)))
        x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
        x = nn.functional.pad(nn.functional.hardtanh(x), (1, 1, 1, 1), mode="reflect")[:, :, ::2, 1:]
        left, right = x.chunk(2, 1)
        x = torch.cat([left * torch.sigmoid(right), right.abs().clamp(min=0.1).sqrt()], 1).reshape(len(x), 8, -1)
        return self.head(torch.where(x > 0, x, x.exp()).amax(2))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding="same", groups=4),
        nn.LeakyReLU(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 10),
    )  # fmt: skip


def rarer_layers() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), nn.PReLU(4), nn.AvgPool2d(3, 2, 1), nn.Hardswish(), nn.LocalResponseNorm(3),
        nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.Linear(256, 4), nn.ELU(), nn.Softplus(), nn.Linear(4, 10),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": convolutions, "rarer layers": rarer_layers, "attention": Attention, "resampled": Resampled,
}  # fmt: skip


def exported(net: nn.Module, path: Path, opset: int = 17, dynamic: bool = True, size: int = 8) -> Path:
    """By PyTorch's own exporter, the one that needs no further package; it warns of its age."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: "n"}, "y": {0: "n"}} if dynamic else None
        example = torch.rand(1, 3, size, size)
        torch.onnx.export(
            net.eval(), (example,), str(path), dynamo=False, opset_version=opset, input_names=["x"], output_names=["y"],
            dynamic_axes=axes,
        )  # fmt: skip
    return path


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("opset", [11, 13, 17, 20])
@pytest.mark.parametrize("name", NETWORKS)
def test_exported_networks_and_their_gradients_are_the_same(name: str, opset: int, dynamic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    read = read_graph(exported(net, tmp_path / "net.onnx", opset, dynamic))
    x = torch.rand(5, 3, 8, 8, requires_grad=True)
    torch.testing.assert_close(read(x), net(x), rtol=1e-5, atol=1e-5)
    expected, found = (torch.autograd.grad(f(x)[:, 3].sum(), x)[0] for f in (net, read))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_stay_on_the_cpu_when_weights_are_elsewhere(name: str, tmp_path: Path) -> None:
    read = read_graph(exported(NETWORKS[name](), tmp_path / "net.onnx")).to("meta")  # a device that computes shapes alone
    found = read(torch.empty(5, 3, 8, 8, device="meta"))
    assert found.shape == (5, 10)
    assert found.device.type == "meta"


def test_a_model_from_a_file_is_attacked_like_the_network_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(convolutions(), nn.Softmax(1))
    path = exported(net, tmp_path / "net.onnx")
    x = torch.rand(6, 3, 8, 8)
    ours, theirs = sp.Model(path), sp.Model(net[0])
    y = theirs.predict(x)
    results = [sp.attack(model, x, y, sp.attacks.PGD(steps=5), sp.Linf(0.1)) for model in (ours, theirs)]
    assert results[0].success.equal(results[1].success)
    torch.testing.assert_close(results[0].adversarial, results[1].adversarial)
    assert ours.access is sp.Access.PARAMETERS
    assert json.loads(json.dumps(ours.describe()))["name"] == "net.onnx"


def test_inner_features_are_named_as_in_the_file(tmp_path: Path) -> None:
    net = convolutions().eval()
    model = sp.Model(exported(net, tmp_path / "net.onnx"))
    names = [name for name, module in dict(model.networks()[0].named_modules()).items() if getattr(module, "op", "") == "Relu"]
    x = torch.rand(2, 3, 8, 8)
    assert len(names) == 1
    torch.testing.assert_close(model.features(x, names[0]), net[:3](x))


def test_what_was_read_can_be_trained_copied_and_stored(tmp_path: Path) -> None:
    read = read_graph(exported(convolutions(), tmp_path / "net.onnx"))
    x = torch.rand(4, 3, 8, 8)
    before, copied = read(x).detach(), copy.deepcopy(read)
    assert len(list(read.parameters())) >= 6
    optimiser = torch.optim.SGD(read.parameters(), lr=0.1)
    read(x).square().sum().backward()
    optimiser.step()
    assert not torch.equal(read(x), before)
    assert torch.equal(copied(x), before)
    read.load_state_dict(copied.state_dict())
    assert torch.equal(read(x), before)


# Batches


def each_alone(path: Path, x: Any) -> Any:
    return np.concatenate([by_onnxruntime(path, one[None]).reshape(1, -1) for one in x])


LINEAR = make("MatMul", ["a", "w"], ["y"])
BATCH_OF_ONE: dict[str, tuple[bool, Composed]] = {  # of x (1, 2, 6): whether it must be mapped over the samples
    "Reshape to 1 and 12": (False, ([make("Reshape", ["x", "s"], ["a"]), LINEAR], {"s": [1, 12], "w": normal(12, 4)})),
    "Reshape to 1 and the rest": (False, ([make("Reshape", ["x", "s"], ["a"]), LINEAR], {"s": [1, -1], "w": normal(12, 4)})),
    "Flatten of everything": (True, ([make("Flatten", ["x"], ["a"], axis=0), LINEAR], {"w": normal(12, 4)})),
    "Squeeze of everything": (
        True,
        ([make("MatMul", ["x", "w"], ["a"]), make("Squeeze", ["a"], ["y"])], {"w": normal(6, 1)}),
    ),
    "Concat with a constant": (
        True,
        (
            [make("Concat", ["x", "c"], ["a"], axis=1), make("ReduceMax", ["a", "axis"], ["y"], keepdims=0)],
            {"c": normal(1, 1, 6), "axis": [2]},
        ),
    ),
    "batch in the middle": (
        True,
        (
            [
                make("Transpose", ["x"], ["a"], perm=[1, 0, 2]),
                make("Reshape", ["a", "s"], ["b"]),
                make("MatMul", ["b", "w"], ["c"]),
                make("Reshape", ["c", "t"], ["y"]),
            ],
            {"s": [2, 6], "w": normal(6, 2), "t": [1, 4]},
        ),
    ),
}


@pytest.mark.parametrize("name", BATCH_OF_ONE)
def test_graphs_for_a_batch_of_one_take_any_batch(name: str, tmp_path: Path) -> None:
    mapped, (nodes, constants) = BATCH_OF_ONE[name]
    path = saved(tmp_path, model_of(nodes, [1, 2, 6], constants))
    network = read_graph(path)
    assert network.one_by_one == mapped
    for count in (1, 2, 7):
        x = normal(count, 2, 6)
        point = torch.tensor(x, requires_grad=True)
        found = network(point)
        np.testing.assert_allclose(found.detach().numpy(), each_alone(path, x), rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(found[:, 0].sum(), point)
        single = [torch.autograd.grad(network(one[None])[:, 0].sum(), one)[0] for one in point.detach().requires_grad_()]
        torch.testing.assert_close(gradient, torch.stack(single))


def test_a_graph_that_holds_for_no_single_input_is_refused(tmp_path: Path) -> None:
    nodes = [make("Reshape", ["x", "s"], ["a"]), make("MatMul", ["a", "w"], ["y"])]
    path = saved(tmp_path, model_of(nodes, [4, 2, 6], {"s": [4, 12], "w": normal(12, 3)}))
    with pytest.raises(sp.ModelError, match=r"fails on one input of shape \(2, 6\).*Reshape\(x, s\)"):
        read_graph(path)


# Which output


LAST = {"Softmax": {"axis": -1}, "Sigmoid": {}, "ArgMax": {"axis": 1}}


@pytest.mark.parametrize("last", LAST)
def test_logits_precede_the_last_operator(last: str, tmp_path: Path) -> None:
    weight = normal(5, 3)
    nodes = [make("MatMul", ["x", "w"], ["a"]), make(last, ["a"], ["b"], **LAST[last]), make("Identity", ["b"], ["y"])]
    path = saved(tmp_path, model_of(nodes, ["n", 5], {"w": weight}))
    x = normal(4, 5)
    np.testing.assert_allclose(sp.Model(path, bounds=None).logits(torch.tensor(x)).numpy(), x @ weight, rtol=1e-5, atol=1e-6)
    agrees(path, x)
    inner = read_graph(path, output="a")
    np.testing.assert_allclose(inner(torch.tensor(x)).detach().numpy(), x @ weight, rtol=1e-5, atol=1e-6)


def test_a_softmax_over_another_axis_stays(tmp_path: Path) -> None:
    nodes = [make("MatMul", ["x", "w"], ["a"]), make("Softmax", ["a"], ["y"], axis=2)]
    path = saved(tmp_path, model_of(nodes, ["n", 2, 5], {"w": normal(5, 3)}))
    assert len(read_graph(path, logits=True).nodes) == 2


# onnxruntime itself


def test_a_session_grants_scores_and_says_what_it_gives(tmp_path: Path) -> None:
    x = torch.tensor(normal(5, 6))
    weight = normal(6, 3)
    for last, gives in (("Softmax", "probabilities"), ("Identity", "logits"), ("ArgMax", "labels")):
        nodes = [make("MatMul", ["x", "w"], ["a"]), make(last, ["a"], ["y"], **LAST.get(last, {}))]
        path = saved(tmp_path, model_of(nodes, [2, 6], {"w": weight}, opset=13))  # so it takes two at a time
        session = OnnxSession(path, threads=1)
        model = sp.Model(session, bounds=None, num_classes=3)
        assert session.gives == gives
        assert model.access is (sp.Access.LABELS if last == "ArgMax" else sp.Access.SCORES)
        assert model.predict(x).tolist() == (x.numpy() @ weight).argmax(1).tolist()
        with pytest.raises(sp.CapabilityError, match="gradients"):
            sp.attack(model, x, model.predict(x), "pgd", sp.Linf(0.1))


def test_a_session_reads_compressed_files_and_refuses_what_it_cannot_run(tmp_path: Path) -> None:
    proto = model_of([make("Neg", ["x"], ["y"])], ["n", 6], {})
    packed = tmp_path / "net.onnx.gz"
    packed.write_bytes(gzip.compress(proto.SerializeToString()))
    assert OnnxSession(packed)(torch.ones(1, 6)).tolist() == [[-1.0] * 6]
    with pytest.raises(sp.UnknownNameError, match="output 'z'"):
        OnnxSession(packed, output="z")
    unknown = saved(tmp_path, model_of([make("Magic", ["x"], ["y"])], ["n", 6], {}))
    with pytest.raises(sp.DataError, match="onnxruntime"):
        OnnxSession(unknown)
    integers = saved(tmp_path, model_of([make("Relu", ["x"], ["y"])], ["n", 6], {}, kind=TensorProto.INT32))
    with pytest.raises(sp.DataError, match="one floating input"):
        OnnxSession(integers)


# Files that are not what they should be


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path, model_of([make("MatMul", ["x", "w"], ["y"])], ["n", 50], {"w": normal(50, 40)}))
    data = whole.read_bytes()
    for name, content in {
        "empty.onnx": b"",
        "half.onnx": data[: len(data) // 2],
        "text.onnx": b"this is no model",
        "packed.onnx.gz": gzip.compress(data)[:-20],
        "noise.onnx": RNG.bytes(400),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(sp.DataError, match=name):
            read_graph(tmp_path / name)
    text = data.replace(b"\x01w", b"\x01\xff")  # a name that is no text
    (tmp_path / "name.onnx").write_bytes(text)
    with pytest.raises(sp.DataError, match=r"name\.onnx"):
        read_graph(tmp_path / "name.onnx")
    with pytest.raises(sp.DataError, match=r"absent\.onnx"):
        read_graph(tmp_path / "absent.onnx")
    with pytest.raises(sp.DataError, match=r"\.onnx file"):
        sp.Model(tmp_path / "weights.pt")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, *arguments: Any, **options: Any) -> None:
        path = saved(tmp_path, model_of(*arguments, **options))
        with pytest.raises(error, match=match):
            read_graph(path)

    refused(sp.ModelError, "node 'third' is a NonZero", [make("NonZero", ["x"], ["y"], name="third")], ["n", 3], {})
    refused(sp.ModelError, r"is a custom\.Relu", [make("Relu", ["x"], ["y"], domain="custom")], ["n", 3], {})
    refused(sp.DataError, "needs 'w'", [make("MatMul", ["x", "w"], ["y"])], ["n", 3], {})
    refused(sp.DataError, "first output", [make("MaxPool", ["x"], ["a", "y"], kernel_shape=[2])], ["n", 3, 4], {})
    refused(sp.DataError, "two constants", [make("Constant", [], ["a"], value_int=i) for i in (1, 2)], ["n", 3], {})
    refused(sp.DataError, "doesn't depend on the input", [make("Relu", ["w"], ["y"])], ["n", 3], {"w": normal(3)})
    refused(sp.DataError, "operator set is 6", [make("Relu", ["x"], ["y"])], ["n", 3], {}, opset=6)
    refused(sp.DataError, "not floating", [make("Relu", ["x"], ["y"])], ["n", 3], {}, kind=TensorProto.INT64)
    refused(sp.ModelError, r"MatMul\(x, w\)", [make("MatMul", ["x", "w"], ["y"])], ["n", 3], {"w": normal(4, 2)})
    refused(sp.ModelError, "a constant can't be", [make("Reshape", ["w", "s"], ["y"])], ["n", 3], {"w": normal(3), "s": [2, 2]})
    twice = {"s": np.float32([1, 1, 2, 2])}
    refused(sp.ModelError, "mode=cubic", [make("Resize", ["x", "", "s"], ["y"], mode="cubic")], ["n", 3, 4, 4], twice)
    refused(sp.DataError, "element type 8", [make("Relu", ["x"], ["y"])], ["n", 3], {"w": np.array(["a"])})


def test_one_input_and_a_named_output(tmp_path: Path) -> None:
    proto = model_of([make("Relu", ["x"], ["a"]), make("Neg", ["a"], ["y"])], ["n", 3], {})
    proto.graph.output.append(helper.make_empty_tensor_value_info("a"))
    path = saved(tmp_path, proto)
    with pytest.raises(sp.DataError, match=r"several outputs, \['y', 'a'\]"):
        read_graph(path)
    with pytest.raises(sp.UnknownNameError, match="output 'b'"):
        read_graph(path, output="b")
    assert read_graph(path, output="a")(torch.tensor([[-1.0, 2.0, 0.0]])).tolist() == [[0.0, 2.0, 0.0]]
    proto.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))
    with pytest.raises(sp.DataError, match=r"one input, this graph 2: \['x', 'z'\]"):
        read_graph(saved(tmp_path, proto), output="y")


def test_weights_in_files_of_their_own(tmp_path: Path) -> None:
    weight = normal(50, 40)
    path = tmp_path / "net.onnx"
    proto = model_of([make("MatMul", ["x", "w"], ["y"])], ["n", 50], {"w": weight})
    onnx.save_model(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    agrees(path, normal(2, 50))
    (tmp_path / "weights.bin").rename(tmp_path / "elsewhere.bin")
    with pytest.raises(sp.DataError, match="beside it"):
        read_graph(path)


def test_names_that_pytorch_does_not_allow(tmp_path: Path) -> None:
    names = ["a.b", "a/b", "forward", "weight", "training", "_parameters"]
    nodes = [make("Add", [names[i - 1] if i else "x", f"{name}.c"], [name], name=name) for i, name in enumerate(names)]
    nodes.append(make("Identity", [names[-1]], ["y"], name="keys"))
    agrees(saved(tmp_path, model_of(nodes, ["n", 4], {f"{name}.c": normal(4) for name in names})), normal(3, 4))


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, model_of([make("Relu", ["x"], ["y"])], ["n", 3], {}))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(sp.MissingExtraError, match=r"saddlepoint\[onnx\]"):
        OnnxSession(path)
    for name in [name for name in sys.modules if name.split(".")[0] == "onnx"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(sp.MissingExtraError, match=r"saddlepoint\[onnx\]"):
        read_graph(path)


# The networks of the verification competitions


REAL = os.environ.get("SADDLEPOINT_DATA")
PUBLISHED = sorted(Path(REAL).glob("verification/*/onnx/*.onnx.gz")) if REAL else []


@pytest.mark.skipif(not PUBLISHED, reason="SADDLEPOINT_DATA is not set, or has no verification/")
def test_published_networks_give_what_onnxruntime_gives() -> None:
    for path in PUBLISHED:
        network, session = read_graph(path), OnnxSession(path, threads=1)
        assert network.shape is not None
        x = torch.tensor(RNG.random((3, *network.shape), dtype=np.float32))
        expected = session(x)
        found = network(x).detach().reshape(expected.shape)
        tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=tolerance, msg=lambda text, path=path: f"{path}: {text}")
        assert not network.one_by_one
