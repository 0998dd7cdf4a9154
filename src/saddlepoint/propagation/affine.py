"""Affine operators: what they do to intervals, to coefficients carried backwards, and to terms carried forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from saddlepoint.propagation.nodes import SHAPES, WEIGHTED, Node

_POINTWISE = ("neg", "alias", "add", "sub", "mul", "div", "avg_pool2d", "convolution", "linear", "upsample_nearest2d",
              "_native_batch_norm_legit_no_training", "constant_pad_nd")  # fmt: skip


def batched(node: Node, apply: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """apply, which works on a batch of one, for batches (N, ...)."""
    if node.op in SHAPES:
        return values[0].reshape(len(values[0]), *node.shape)
    if node.op in _POINTWISE and not node.single and node.rank == len(node.shape) + 1 == values[0].dim() and _aligned(node):
        return apply(*values)
    if node.op in ("mm", "matmul") and (matrix := _right(node)) is not None and apply is node.apply:
        return values[0] @ matrix
    mapped: Callable[..., Tensor] = torch.vmap(lambda *ones: apply(*(one[None] for one in ones))[0])
    return mapped(*values)


def _aligned(node: Node) -> bool:
    """Whether all inputs have as many dimensions, so that the batch is the first one of each."""
    return all(one.dim() == node.rank for one in node.like)


def spread(node: Node, radii: Sequence[Tensor]) -> Tensor:
    """sum_i |W_i| radius_i, for an operator that is sum_i W_i x_i + b: how far the output can be from its middle.

    Linear in the radii, which may have either sign.
    """
    if node.op in SHAPES:
        return batched(node, node.apply, *radii)
    if node.op == "convolution" and len(node.inputs) == 1:
        _, weight, _, *settings = node.arguments
        found: Tensor = torch.ops.aten.convolution(radii[0], weight.abs(), None, *settings)
        return found
    if (matrix := _right(node)) is not None:
        return radii[0] @ matrix.abs()
    if node.op == "_native_batch_norm_legit_no_training":
        factor = node.apply(*(torch.ones_like(one) for one in node.like)) - node.apply(*node.like)
        return radii[0] * factor.abs()
    total: Tensor | None = None
    weighted = node.op in WEIGHTED or node.op in ("mul", "div")
    apply = node.magnitude if weighted and node.magnitude is not None else node.apply
    zero = apply(*node.like)
    for place, radius in enumerate(radii):
        alone = [radius if other == place else torch.zeros_like(one) for other, one in enumerate(radii)]
        moved = batched(node, apply, *alone) - zero
        if not weighted:  # weights of one sign for each element of the output, which that of ones has
            ones = [torch.ones_like(one) if other == place else one for other, one in enumerate(node.like)]
            moved = moved * (apply(*ones) - zero).sign()
        total = moved if total is None else total + moved
    assert total is not None
    return total


def linear_part(node: Node, values: Sequence[Tensor]) -> Tensor:
    """sum_i W_i x_i for values (N, ...)."""
    found = batched(node, node.apply, *values)
    return found if node.constant is None else found - node.constant


def _right(node: Node) -> Tensor | None:
    """The matrix that rows are multiplied with from the right, if the operator does just that."""
    if node.settings or sum(isinstance(one, str) for one in node.arguments) > 1:
        return None
    if node.op not in ("addmm", "linear", "mm", "matmul"):
        return None
    place = 1 if node.op == "addmm" else 0
    matrix = node.arguments[place + 1]
    if not isinstance(matrix, Tensor) or isinstance(node.arguments[place], Tensor) or matrix.dim() != 2:
        return None
    return matrix.T if node.op == "linear" else matrix


def pulled(node: Node, a: Tensor) -> list[Tensor]:
    """Coefficients (N, R, ...) of the output as such of the inputs: the operator's own vector-Jacobian product."""
    count, rows = a.shape[0], a.shape[1]
    shapes = [one.shape[1:] for one in node.like]
    if node.op in SHAPES:
        return [a.reshape(count, rows, *shapes[0])]
    if node.op in ("add", "sub") and not node.settings and len(node.arguments) == 2 and all(s == node.shape for s in shapes):
        first, second = node.arguments
        signs = [(first == name) * 1 + (second == name) * (1 if node.op == "add" else -1) if _named(first, second) else 1
                 for name in node.inputs]  # fmt: skip
        if not _named(first, second):
            signs = [-1 if node.op == "sub" and isinstance(second, str) else 1]
        return [a if sign == 1 else sign * a for sign in signs]
    if (matrix := _right(node)) is not None:
        return [a @ matrix.T]
    if node.op == "convolution" and len(node.inputs) == 1 and isinstance(node.arguments[1], Tensor):
        return [_convolved_back(node, a.flatten(0, 1)).reshape(count, rows, *shapes[0])]
    pull = torch.func.vjp(node.apply, *node.like)[1]
    parts = torch.vmap(pull)(a.reshape(count * rows, 1, *a.shape[2:]))
    return [part.reshape(count, rows, *shape) for part, shape in zip(parts, shapes, strict=True)]


def absolute(node: Node) -> Node:
    """The operator with the absolute values of its weights; only to pull coefficients of one sign."""
    if (node.op not in WEIGHTED and node.op not in ("mul", "div")) or node.magnitude is None:
        return node
    return replace(node, op="magnitude", apply=node.magnitude)


def _named(*arguments: object) -> bool:
    return all(isinstance(one, str) for one in arguments)


def _convolved_back(node: Node, a: Tensor) -> Tensor:
    """Coefficients (M, ...) through a convolution: the transposed one, which gives back its input's size."""
    _, weight, _, stride, padding, dilation, transposed, _, groups = node.arguments
    size = node.like[0].shape[2:]
    if transposed:
        found: Tensor = torch.ops.aten.convolution(a, weight, None, stride, padding, dilation, False, [0] * len(size), groups)
        return found[(slice(None), slice(None), *(slice(0, one) for one in size))]
    axes = range(len(size))
    stride, padding, dilation = ([one[0] if len(one) == 1 else one[i] for i in axes] for one in (stride, padding, dilation))
    even = len(size) == 2 and max(stride) > 1 and stride[0] == stride[1] and max(dilation) == 1 and groups == 1
    if even and a.device.type == "cpu":
        found = _ByPhases.apply(a, weight, stride[0], padding, size)  # type: ignore[no-untyped-call]
        return found
    return _transposed(a, weight, stride, padding, dilation, size, groups)


def _transposed(
    a: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], size: Sequence[int],
    groups: int,
) -> Tensor:  # fmt: skip
    reach = [(a.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1
             for i in range(len(size))]  # fmt: skip
    rest = [one - other for one, other in zip(size, reach, strict=True)]
    out: Tensor = torch.ops.aten.convolution(a, weight, None, stride, padding, dilation, True, rest, groups)
    return out


class _ByPhases(torch.autograd.Function):
    """A transposed convolution with a stride as one without, whose channels are the places between: twice as fast on a CPU.

    The place s i + t of the output gets a_i w_t, so the places s m + r get the a_(m - q) w_(s q + r). Backwards it is the
    convolution itself.
    """

    @staticmethod
    def forward(
        context: Any, a: Tensor, weight: Tensor, stride: int, padding: Sequence[int], size: Sequence[int]
    ) -> Tensor:  # fmt: skip
        """Coefficients (M, C, *size) of those a (M, ...) of the convolution's output."""
        context.save_for_backward(a if context.needs_input_grad[1] else None, weight)
        context.settings = (stride, tuple(padding))
        taps, channels = [-(-length // stride) for length in weight.shape[2:]], weight.shape[1]
        full = [0 if axis else stride * taps[place] - weight.shape[2 + place] for place in (1, 0) for axis in (1, 0)]
        wide = functional.pad(weight, full).reshape(*weight.shape[:2], taps[0], stride, taps[1], stride).flip(2, 4)
        kernel = wide.permute(3, 5, 1, 0, 2, 4).flatten(0, 2)
        phases = functional.conv2d(a, kernel, padding=[tap - 1 for tap in taps])
        out = a.new_zeros(len(a), channels, *size)
        for number, part in enumerate(torch.split(phases, channels, 1)):
            across = [slice(None), slice(None)]
            for axis, r in enumerate(divmod(number, stride)):
                skipped = max(0, -((r - padding[axis]) // stride))  # places before the output's first
                first = stride * skipped + r - padding[axis]
                count = min(part.shape[2 + axis] - skipped, len(range(first, size[axis], stride)))
                part = part.narrow(2 + axis, skipped, count)
                across.append(slice(first, first + stride * count, stride))
            out[tuple(across)] = part
        return out

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of a and the weight."""
        (a, weight), (stride, padding), (gradient,) = context.saved_tensors, context.settings, gradients
        of_a = functional.conv2d(gradient, weight, None, stride, padding) if context.needs_input_grad[0] else None
        if not context.needs_input_grad[1]:
            return of_a, None, None, None, None
        of_weight = conv2d_weight(gradient, weight.shape, a, stride, padding)  # type: ignore[no-untyped-call]
        return of_a, of_weight, None, None, None
