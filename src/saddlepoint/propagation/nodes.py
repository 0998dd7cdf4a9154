"""A network as a list of operators, each affine in what it is given or a nonlinearity with known relaxations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from saddlepoint.errors import ModelError
from saddlepoint.propagation.relax import Rule

WEIGHTED: frozenset[str] = frozenset({"linear", "addmm", "mm", "bmm", "matmul", "convolution"})
"""Operators that add with weights of either sign; at most one factor may depend on the network's input."""
SHAPES: frozenset[str] = frozenset({
    "view", "reshape", "_unsafe_view", "flatten", "unsqueeze", "squeeze", "clone", "alias", "detach", "_to_copy",
})  # fmt: skip
"""Operators that keep every element, in order."""
MONOMIAL: frozenset[str] = SHAPES | {
    "permute", "transpose", "t", "add", "sub", "rsub", "neg", "mul", "div", "_native_batch_norm_legit_no_training", "flip",
    "constant_pad_nd", "expand", "slice", "select",
}  # fmt: skip
"""Operators that give each element from one element of an input."""
AFFINE: frozenset[str] = WEIGHTED | SHAPES | {
    "permute", "transpose", "t", "add", "sub", "rsub", "neg", "mul", "div", "mean", "sum", "cat", "stack", "slice", "select",
    "expand", "repeat", "constant_pad_nd", "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "flip", "roll",
    "upsample_nearest2d", "pixel_shuffle", "_native_batch_norm_legit_no_training", "split", "split_with_sizes", "chunk",
    "unbind", "index", "index_select", "cumsum", "where",
}  # fmt: skip
"""Operators of ATen that are affine in what depends on the network's input. Those not in `WEIGHTED` scale each element, move
it, or add elements with weights of one sign."""


@dataclass(frozen=True)
class Node:
    """One operator. inputs: names of the values that depend on the network's input; apply gives the output from them.

    op: ATen's name without overload, such as "relu". apply works on a batch of one (1, ...); shape is that of its output,
    without the batch. like: a batch of one for each input. arguments and settings: the operator's own, positional and by
    name, with constants filled in and names for what depends on the input. magnitude: apply with the constants' absolute
    values. where: the layer that it comes from. rank: how many dimensions the operator sees in its first input. single:
    whether apply takes one sample at a time only, as some value's first dimension isn't the batch. rule: of a nonlinearity.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    apply: Callable[..., Tensor]
    shape: torch.Size
    like: tuple[Tensor, ...]
    arguments: tuple[Any, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    magnitude: Callable[..., Tensor] | None = None
    where: str = ""
    rank: int = 0
    single: bool = False
    rule: Rule | None = None

    @property
    def affine(self) -> bool:
        """Whether it is affine in its inputs."""
        return self.rule is None

    @cached_property
    def constant(self) -> Tensor | None:
        """What an affine node gives for zeros, (1, ...): its constant part; None where that is 0."""
        if self.op in SHAPES or (self.op == "convolution" and self.arguments[2] is None):
            return None
        return self.apply(*self.like)


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they run; input and output are names. convert: gives it in another dtype."""

    nodes: tuple[Node, ...]
    input: str
    output: str
    shape: torch.Size
    convert: Callable[[torch.dtype], Graph] | None = None

    @cached_property
    def double(self) -> Graph:
        """The same network in float64: what is proved for it isn't subject to the rounding of the one in float32."""
        if self.convert is None:
            raise ModelError("a graph that wasn't read from a model can't be converted to float64")
        return self.convert(torch.float64)

    def before(self, name: str) -> frozenset[str]:
        """The values that `name` depends on, and itself."""
        found = {name}
        for node in reversed(self.nodes):
            if node.name in found:
                found.update(node.inputs)
        return frozenset(found)

    def outputs(self, x: Tensor) -> Tensor:
        """The network's outputs (N, ...) for inputs (N, ...)."""
        return torch.vmap(lambda one: self.values(one[None])[self.output][0])(x)

    def values(self, x: Tensor) -> dict[str, Tensor]:
        """What every node gives for one input (1, ...)."""
        found = {self.input: x}
        for node in self.nodes:
            found[node.name] = node.apply(*(found[name] for name in node.inputs))
        return found
