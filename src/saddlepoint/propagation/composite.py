"""Operators that are written in terms of others before bounds are carried through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saddlepoint.errors import ModelError
from saddlepoint.propagation.nodes import Node
from saddlepoint.propagation.relax import aligned

aten = torch.ops.aten


def decompositions() -> Any:  # Any: torch's own table type
    """What `torch.export` writes in terms of what: PyTorch's table, but with operators whole for which there are rules.

    Layer normalisation is a product with rsqrt of a mean of squares; max(a, b) = a + relu(b - a).
    """
    table: Any = torch.export.default_decompositions()
    for kept in (aten.linear, aten.matmul, aten.silu, aten.softplus, aten.square, aten.prelu, aten._prelu_kernel):
        table.pop(kept.default, None)
    table[aten.native_layer_norm.default] = _layer_norm
    table[aten.native_group_norm.default] = _group_norm
    table[aten.var.correction] = _variance
    table[aten.logsumexp.default] = _log_sum
    table[aten._log_softmax.default] = lambda x, dim, half: x - _log_sum(x, [dim], keepdim=True)
    table[aten.celu.default] = lambda x, alpha=1.0: aten.elu.default(x, alpha, 1.0, 1.0 / alpha)
    table[aten.linalg_vector_norm.default] = _norm
    table[aten.scaled_dot_product_attention.default] = _attention
    table[aten.maximum.default] = lambda a, b: a + torch.relu(b - a)
    table[aten.minimum.default] = lambda a, b: a - torch.relu(a - b)
    return table


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = tuple(range(-len(shape), 0))
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    scale = torch.rsqrt(torch.square(centred).mean(dims, keepdim=True) + eps)
    out = centred * scale
    out = out if weight is None else out * weight
    return out if bias is None else out + bias, mean, scale


def _variance(x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    dims = tuple(range(x.dim())) if dim is None else tuple(dim)
    count = 1
    for one in dims:
        count *= x.shape[one]
    total = torch.square(x - x.mean(dims, keepdim=True)).sum(dims, keepdim=keepdim)
    return total / max(0.0, count - (1 if correction is None else correction))


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, size: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, scale = _layer_norm(x.reshape(n, groups, -1), [c * size // groups], None, None, eps)
    shape = [1, c] + [1] * (x.dim() - 2)
    out = out.reshape(x.shape)
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape), mean, scale


def _log_sum(x: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    dims = tuple(dim)
    mean = x.mean(dims, keepdim=True)  # affine, unlike the largest
    return (x - mean).exp().sum(dims, keepdim=keepdim).log() + (mean if keepdim else x.mean(dims))


def _norm(
    x: Tensor, order: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:  # Any: NotImplemented leaves the operator as it is
    if order not in (1, 2):
        return NotImplemented
    dims = tuple(range(x.dim())) if dim is None else tuple(dim)
    return x.abs().sum(dims, keepdim=keepdim) if order == 1 else torch.square(x).sum(dims, keepdim=keepdim).sqrt()


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if causal or enable_gqa or (mask is not None and not mask.is_floating_point()):
        return NotImplemented
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return torch.softmax(scores if mask is None else scores + mask, -1) @ value


def products(node: Node, factors: Sequence[str]) -> list[Node]:
    """A product, quotient or matrix product of two values that both depend on the input, as elementwise ones.

    factors: the names of both, or of the divisor. Errors: `ModelError` for others, such as convolutions with such weights.
    """
    likes = dict(zip(node.inputs, node.like, strict=True))

    def made(suffix: str, op: str, inputs: Sequence[str], apply: Callable[..., Tensor]) -> Node:
        like = tuple(likes[name] for name in inputs)
        out = apply(*like)
        name = node.name + suffix
        likes[name] = torch.zeros_like(out)  # not 1 / 0
        rank = like[0].dim()
        return Node(name, op, tuple(inputs), apply, out.shape[1:], like, where=node.where, magnitude=apply, rank=rank)

    if node.op == "mul":
        first, second = factors
        if first == second:
            return [made("", "square", [first], torch.square)]
        return [made("", "product", [first, second], _multiplied)]
    if node.op == "div":
        divisor = factors[-1]
        inverse = made("_reciprocal", "reciprocal", [divisor], torch.reciprocal)
        if len(factors) == 2:
            return [inverse, made("", "product", [factors[0], inverse.name], _multiplied)]
        above = node.arguments[0]
        last = made("", "mul", [inverse.name], lambda x: above * x)
        return [inverse, replace(last, arguments=(above, inverse.name), magnitude=lambda x: abs(above) * x)]
    if node.op in ("matmul", "bmm", "mm") and min(likes[name].dim() for name in factors) > 2:
        first, second = factors
        left = made("_rows", "unsqueeze", [first], lambda x: x.unsqueeze(-1))
        right = made("_columns", "unsqueeze", [second], lambda x: x.unsqueeze(-3))
        product = made("_terms", "product", [left.name, right.name], _multiplied)
        return [left, right, product, made("", "sum", [product.name], lambda x: x.sum(-2))]
    raise ModelError(f"both factors of {node.op} (at {node.where}) depend on the network's input: no bounds are known")


def _multiplied(x: Tensor, y: Tensor) -> Tensor:
    """x y for batches, whose elements are broadcast from the last dimension on."""
    x, y = aligned(x, y)
    return x * y
