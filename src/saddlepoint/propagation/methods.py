"""Bounds of a network's outputs by name of a method: `bounds`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from saddlepoint.errors import CapabilityError, InputError, SaddlepointError, UnknownNameError
from saddlepoint.models.base import Classifier
from saddlepoint.precision import full_precision
from saddlepoint.propagation.bounds import MEMORY, Bounded
from saddlepoint.propagation.forward import forwards, size, zonotopes
from saddlepoint.propagation.graph import read
from saddlepoint.propagation.joint import jointly
from saddlepoint.propagation.nodes import Graph
from saddlepoint.propagation.sets import Box

Method = Literal["ibp", "forward", "deepz", "crown-ibp", "crown", "alpha-crown", "alpha-crown-joint", "best"]
_STEPS = 20
_FEW = 64  # inputs that forward bounds are cheap for
_TRIED, _ROUNDING = 8, 1e-5  # inputs that are run twice; differences above this part of the largest output are random


@dataclass(frozen=True)
class OutputBounds:
    """Lower and upper bounds (N, C) of a network's outputs."""

    lower: Tensor
    upper: Tensor


@overload
def bounds(
    model: Classifier | Graph, lower: Tensor | Box, upper: Tensor | None = None, specification: None = None,
    method: Method = "crown", *, steps: int = _STEPS, memory: int = MEMORY, rigorous: bool = False,
) -> OutputBounds: ...  # fmt: skip


@overload
def bounds(
    model: Classifier | Graph, lower: Tensor | Box, upper: Tensor | None, specification: Tensor,
    method: Method = "crown", *, steps: int = _STEPS, memory: int = MEMORY, rigorous: bool = False,
) -> Tensor: ...  # fmt: skip


def bounds(
    model: Classifier | Graph, lower: Tensor | Box, upper: Tensor | None = None, specification: Tensor | None = None,
    method: Method = "crown", *, steps: int = _STEPS, memory: int = MEMORY, rigorous: bool = False,
) -> Tensor | OutputBounds:  # fmt: skip
    """Lower bounds (N, R) of specification (N, R, C) times the outputs, over inputs between lower and upper (N, ...).

    Without a specification, both ends of the outputs. Instead of lower and upper a set of inputs can be given, such as
    `Ball.of(x, eps, "l2")`. Without `rigorous` they hold up to the rounding of the computation.

    method:

    - ibp: intervals, joined with the specification in the last affine operators (Gowal et al. 2018, arXiv:1810.12715);
    - forward: linear bounds from the inputs on, for few inputs (Xu et al. 2020, arXiv:2002.12920);
    - deepz: zonotopes (Singh et al. 2018, "Fast and effective robustness certification", NeurIPS);
    - crown-ibp: linear bounds backwards, with intervals inside (Zhang et al. 2020, arXiv:1906.06316);
    - crown: linear bounds everywhere (Zhang et al. 2018, arXiv:1811.00866);
    - alpha-crown: with lower slopes that `steps` of Adam find, for each bound its own, layer by layer (Xu et al. 2021,
      arXiv:2011.13824);
    - alpha-crown-joint: after it, as many steps on the slopes of all layers together (`joint.Joint`);
    - best: the best of ibp, forward where there are at most 64 inputs, crown and alpha-crown, each within those before.

    memory: bytes for coefficients. rigorous: for ibp and the four by CROWN, in float64 with what rounding can
    add taken off, so that they hold for the network in real arithmetic.

    Errors: `InputError`, `CapabilityError` for random models, and `ModelError` for operators without known bounds.

    >>> import saddlepoint as sp
    >>> model = sp.Model(sp.zoo.build("digits-cnn"))
    >>> x = torch.full((2, 1, 8, 8), 0.5)
    >>> found = bounds(model, x - 0.01, x + 0.01)
    >>> bool((found.lower <= model.logits(x)).all() and (model.logits(x) <= found.upper).all())
    True
    """
    if method not in get_args(Method):
        raise UnknownNameError("method", str(method), get_args(Method))
    if steps < 0 or memory < 1:
        raise InputError(f"steps must be at least 0 and memory at least 1; got {steps} and {memory}")
    if not isinstance(model, Classifier | Graph):
        raise InputError(f"model must be a Saddlepoint model: sp.Model(net, ...); got {type(model).__name__}")
    if isinstance(lower, Box) and upper is not None:
        raise InputError("upper is for bounds that begin with lower; a set of inputs has both")
    first = lower.lower if isinstance(lower, Box) else lower
    wanted = (model.dtype if isinstance(model, Classifier) else None) or getattr(first, "dtype", None)
    for name, value in (("lower", first), ("upper", first if upper is None else upper)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{name} must be a floating tensor (N, ...); got {found}")
        if value.dtype != wanted:
            raise InputError(f"{name} is {value.dtype}; the model's parameters, lower and upper must be of one dtype")
    if first.dim() < 2 or not len(first):
        raise InputError(f"bounds need a batch (N, ...) of at least one input; its shape is {tuple(first.shape)}")
    if not isinstance(model, Graph):
        check_model(model, first)
    with torch.no_grad(), full_precision(first.device.type):
        graph = model if isinstance(model, Graph) else read(model, first)
        if rigorous and method in ("forward", "deepz", "best"):
            raise InputError(f"method {method!r} has no rigorous form; ibp and those by CROWN have one")
        if rigorous:
            graph = graph.double
            lower = lower.to(torch.float64)
            upper = None if upper is None else upper.double()
        bounded = Bounded.of(graph, lower, upper, memory, outward=rigorous)
        out = bounded.boxes[graph.output].lower
        if out.dim() != 2:
            raise InputError(f"the outputs have shape {tuple(out.shape)}; bounds are those of (N, C)")
        if specification is None:
            eye = torch.eye(out.shape[1]).to(out)
            rows = torch.cat([eye, -eye]).expand(len(out), -1, -1)
        else:
            rows = _rows(specification, out)
        low = _lowest(bounded, rows, method, steps)
    if specification is not None:
        return low
    return OutputBounds(low[:, : out.shape[1]], -low[:, out.shape[1] :])


def check_model(model: Classifier, x: Tensor) -> int:
    """The number of its outputs. Errors: `InputError` where it doesn't take inputs like x (N, ...), `CapabilityError` where it
    is random.
    """
    few = x[:_TRIED].to(model.device)
    try:
        with model.frozen(), torch.no_grad():
            first, again = model.forward(few), model.forward(few)
    except SaddlepointError:
        raise
    except Exception as error:  # whatever the network raises
        raise InputError(f"the network fails on inputs of shape {tuple(x.shape)}: {type(error).__name__}: {error}") from error
    model.queries.forward += 2 * len(few)
    if bool((first - again).abs().max() > _ROUNDING * first.abs().max()):
        raise CapabilityError("the model is random: no bound holds for it; sp.defenses.Smoothed certifies by votes")
    return first.shape[-1]


def _rows(specification: Tensor, out: Tensor) -> Tensor:
    if not isinstance(specification, Tensor):
        raise InputError(f"specification must be a tensor (N, R, C), and a method is named, method=...; got {specification!r}")
    if specification.dim() != 3 or specification.shape[2] != out.shape[1] or len(specification) not in (1, len(out)):
        wanted = (len(out), "R", out.shape[1])
        raise InputError(f"specification must have shape {wanted}; got {tuple(specification.shape)}".replace("'R'", "R"))
    if not bool(specification.isfinite().all()):
        raise InputError("specification must be finite")
    return specification.to(out).expand(len(out), -1, -1)


def _lowest(bounded: Bounded, rows: Tensor, method: Method, steps: int) -> Tensor:
    output = bounded.graph.output
    if method == "ibp":
        return bounded.by_intervals(rows)
    if method in ("forward", "deepz"):
        return forwards(bounded, rows) if method == "forward" else zonotopes(bounded, rows)
    if method == "best":
        best = bounded.by_intervals(rows)
        count = bounded.graph.shape.numel()
        if count <= _FEW and size(bounded, count) <= bounded.memory:
            best = torch.maximum(best, forwards(bounded, rows))
        for ascent in dict.fromkeys((0, steps)):
            bounded.refine(ascent)
            best = torch.maximum(best, bounded.lowest(output, rows, ascent))
        return best
    steps = steps if method in ("alpha-crown", "alpha-crown-joint") else 0
    if method != "crown-ibp":
        bounded.refine(steps)
    low = bounded.lowest(output, rows, steps)
    return torch.maximum(low, jointly(bounded, rows, steps)) if method == "alpha-crown-joint" else low
