"""Attacks of other libraries, and functions of one's own, under the contracts of this one."""

from __future__ import annotations

import importlib
import inspect
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from saddlepoint.engine import Attack, Declaration, Problem
from saddlepoint.errors import CapabilityError, InputError
from saddlepoint.models.adapt import one_hot
from saddlepoint.models.freeze import global_random_state_kept
from saddlepoint.taxonomy import Access
from saddlepoint.trees import put, rows

_RADIUS = ("eps", "epsilon", "ε")  # what libraries call it
_UNIT_RANGE = ("torchattacks", "adv_lib")  # they take inputs in [0, 1] for granted
Foreign = Any  # an object of another library: there is no type in common


@dataclass(frozen=True)
class Handed:
    """What came back (B, ...)."""

    x: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class External(Attack):
    """Somebody else's attack: this engine judges its points, counts its passes, and projects and confirms its result.

    attack: one of
        - a function (net, x, y) -> x_adv, as those of adversarial-library; what else it needs is bound with functools.partial;
        - a function net -> attack, such as `lambda net: torchattacks.PGD(net, eps=8 / 255)`; that is called with (x, y);
        - an attack of Foolbox, `foolbox.attacks.LinfPGD(steps=40)`.
      A parameter `eps` that has no default gets the threat's, and so do Foolbox's attacks that need one. Samples of different
      eps are then run one eps after another.
    title: what reports call it; default a description. access: what it is given: gradients, logits, or one-hot predictions.

    Every point that it evaluates counts, not only what it returns: with keep="first" the first success inside the ball is the
    result. Targeted goals need a single target; they are passed on as the parameter `targeted=True` of a function, by
    torchattacks' `set_mode_targeted_by_label`, or as Foolbox's `TargetedMisclassification`. The library is not told of masks,
    grids and groups of classes: what breaks them does not count.

    All of it is one step of this engine. So no sample leaves while others are at work, `Budget(seconds=)` does not interrupt
    it, and its random numbers depend on the batch; the global random states are seeded by the run, and come back as they
    were. A batch of as many rows as there are samples is taken to be these in order; of any other, each row counts for the
    sample whose input is nearest. The library is stopped when the first sample has spent its budget.

    >>> import torch, saddlepoint as sp
    >>> def jump(net, x, y, eps):
    ...     x = x.clone().requires_grad_()
    ...     torch.nn.functional.cross_entropy(net(x), y).backward()
    ...     return x + eps * x.grad.sign()
    >>> model = sp.Model(torch.nn.Linear(4, 3), bounds=(0, 1))
    >>> result = sp.attack(model, torch.rand(2, 4), torch.tensor([0, 1]), sp.attacks.External(jump), sp.Linf(0.1))
    >>> bool((result.distance <= 0.1).all())
    True
    """

    attack: Foreign
    title: str
    access: Access = Access.GRADIENTS

    declaration: ClassVar[Declaration] = Declaration(
        summary="an attack of another library",
        reference="the library's",
        minimizes=True,
        no_oracle="it is as good as what it is given",
    )

    def __init__(self, attack: Foreign, *, title: str | None = None, access: Access = Access.GRADIENTS) -> None:
        peer = _recognised(attack)
        object.__setattr__(self, "attack", attack)
        object.__setattr__(self, "title", title if title is not None else _described(attack))
        object.__setattr__(self, "access", Access(access))
        able = replace(
            type(self).declaration, summary=self.title, access=self.access, targeted=peer.targeted, minimizes=not peer.radius
        )
        object.__setattr__(self, "declaration", able)

    @property
    def iterations(self) -> int:
        return 1

    @property
    def randomized(self) -> bool:
        return True

    def cost(self, classes: int) -> tuple[int, int]:
        return (1, 0)  # how many more there are, the library alone knows: it is stopped when the budget is spent

    def settings(self) -> dict[str, object]:
        return {"name": type(self).__name__, "attack": self.title, "access": self.access.name.lower()}

    def __repr__(self) -> str:
        return f"External({self.title})"

    def init(self, problem: Problem) -> Handed:
        # no query: training loops, which have none, are told so
        problem.evaluator.pullback(problem.origin[:0], problem.labels[:0])
        return Handed(problem.origin)

    def step(self, problem: Problem, state: Handed) -> Handed:
        peer = _recognised(self.attack)
        if not peer.radius:
            return self._handed(peer, problem, None)
        for eps in sorted(set(problem.eps.tolist())):
            index = (problem.eps == eps).nonzero()[:, 0]
            state = put(state, index, self._handed(peer, problem.only(index), eps))
        return state

    def _handed(self, peer: _Peer, problem: Problem, eps: float | None) -> Handed:
        x, labels, wanted = problem.origin, problem.labels, problem.aim.wanted
        targeted = problem.aim.goal.targeted
        if targeted and bool((wanted.sum(1) != 1).any()):
            raise CapabilityError(f"{self.title} can be given one target for each sample; the goal is {problem.aim.goal}")
        with global_random_state_kept(), torch.enable_grad():
            _seed(problem)
            try:
                y = wanted.to(torch.uint8).argmax(1) if targeted else labels.clone()
                found = peer.run(_Order(_Net(problem, self.access).eval(), x.clone(), y, targeted, eps, *_range(problem)))
            except _BudgetSpent:
                found = problem.best.points
        if not isinstance(found, Tensor) or found.shape != x.shape:
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"{self.title} must return a tensor of the inputs' shape {tuple(x.shape)}; it returned {given}")
        found = found.detach().to(x)
        sound = torch.isfinite(found).flatten(1).all(1)
        return Handed(problem.project(torch.where(rows(sound, found), found, x)))


# What the library sees


class _BudgetSpent(Exception):  # noqa: N818  # no error: it ends the library's loop
    pass


def _pay(problem: Problem, owner: Tensor | None, *, backward: bool = False) -> None:
    owner = torch.arange(len(problem.k), device=problem.origin.device) if owner is None else owner
    if not bool(problem.allow(owner, backward=backward).all()):
        raise _BudgetSpent


class _Through(torch.autograd.Function):
    """Logits whose gradient goes to the points alone, and is counted when it is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, problem: Problem, owner: Tensor | None) -> Tensor:  # Any: torch's context
        ctx.problem, ctx.owner = problem, owner
        logits, ctx.pull = problem.pullback(x, owner)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangents: Tensor) -> tuple[Tensor, None, None]:
        _pay(ctx.problem, ctx.owner, backward=True)
        return ctx.pull(cotangents), None, None


class _Net(nn.Module):
    """The problem as the network that a library expects."""

    def __init__(self, problem: Problem, access: Access) -> None:
        super().__init__()
        self.problem, self.access = problem, access
        # libraries ask the first parameter where the network is
        self.place = nn.Parameter(problem.origin.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.problem.origin)
        owner = self._owner(x.detach())
        _pay(self.problem, owner)
        if self.access >= Access.GRADIENTS and torch.is_grad_enabled() and x.requires_grad:
            through: Callable[..., Tensor] = _Through.apply
            return through(x, self.problem, owner)
        if self.access >= Access.SCORES:
            return self.problem.logits(x.detach(), owner)
        return one_hot(self.problem.predictions(x.detach(), owner), self.problem.aim.wanted.shape[1], x.dtype)

    def _owner(self, x: Tensor) -> Tensor | None:
        """To which sample each row belongs; None for all samples in order."""
        origin = self.problem.origin
        return None if len(x) == len(origin) else torch.cdist(x.flatten(1).float(), origin.flatten(1).float()).argmin(1)


def _seed(problem: Problem) -> None:
    """Seed what libraries draw from, alike for every order of the batch."""
    keys = problem.random()
    seed = int((keys.first.long() ^ keys.second.long()).sum() & 0x7FFFFFFF)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # libraries use the global state
    random.seed(seed)


def _range(problem: Problem) -> tuple[float, float]:
    """A range of values that holds all feasible points."""
    return float(problem.region.lower.amin()), float(problem.region.upper.amax())


# How each library is called


@dataclass(frozen=True)
class _Order:
    """What a library is to do: y are labels, or targets if `targeted`; eps None where it takes none."""

    net: nn.Module
    x: Tensor
    y: Tensor
    targeted: bool
    eps: float | None
    low: float
    high: float


@dataclass(frozen=True)
class _Peer:
    """How to run what was given. radius: whether it takes the threat's eps. targeted: whether it can be given targets."""

    run: Callable[[_Order], Foreign]
    radius: bool
    targeted: bool


def _recognised(attack: Foreign) -> _Peer:
    """Errors: `InputError` for what is no attack."""
    if _comes_from(attack, "foolbox"):
        fixed = any(base.__name__ == "FixedEpsilonAttack" for base in type(_unrepeated(attack)).__mro__)
        return _Peer(partial(_run_foolbox, attack, fixed), fixed, True)
    if _comes_from(attack, "torchattacks"):
        call = f"torchattacks.{type(attack).__name__}(net, ...)"
        raise InputError(f"an attack of torchattacks holds a network of its own: give External(lambda net: {call})")
    if not callable(attack):
        raise InputError(f"attack must be a function (net, x, y), a function net -> attack or one of Foolbox's; got {attack!r}")
    needed, known = _parameters(attack)
    radius = next((name for name in _RADIUS if name in needed), None)
    needed = [name for name in needed if name != radius]
    match len(needed):
        case 3:
            return _Peer(partial(_run_function, attack, radius), radius is not None, "targeted" in known)
        case 1:
            return _Peer(partial(_run_made, attack, radius), radius is not None, True)
    raise InputError(
        f"{_described(attack)} needs {', '.join(needed) or 'nothing'}: an attack is called with (net, x, y), what makes one "
        "with (net); bind the rest with functools.partial"
    )


def _run_function(attack: Foreign, radius: str | None, order: _Order) -> Foreign:
    _check_range(attack, order)
    told = ({radius: order.eps} if radius else {}) | ({"targeted": True} if order.targeted else {})
    return attack(order.net, order.x, order.y, **told)


def _run_made(factory: Foreign, radius: str | None, order: _Order) -> Foreign:
    attack = factory(order.net, **({radius: order.eps} if radius else {}))
    _check_range(attack, order)
    if order.targeted:
        try:
            attack.set_mode_targeted_by_label(quiet=True)
        except (AttributeError, ValueError) as error:
            raise CapabilityError(f"{_described(attack)} cannot be given targets: {error}") from error
    return attack(order.x, order.y)


def _run_foolbox(attack: Foreign, fixed: bool, order: _Order) -> Foreign:
    foolbox: Foreign = importlib.import_module("foolbox")
    if not (math.isfinite(order.low) and math.isfinite(order.high)):
        raise CapabilityError("Foolbox needs the range of the inputs: give the model bounds")
    model = foolbox.PyTorchModel(order.net, bounds=(order.low, order.high), device=order.x.device)
    criteria = foolbox.criteria
    criterion = (criteria.TargetedMisclassification if order.targeted else criteria.Misclassification)(order.y)
    if attack is not _unrepeated(attack):
        return attack(model, order.x, criterion, epsilons=order.eps)[1]
    return attack.run(model, order.x, criterion, **({"epsilon": order.eps} if fixed else {}))  # a call would check once more


def _unrepeated(attack: Foreign) -> Foreign:
    """What is inside Foolbox's `attack.repeat(times)`."""
    return _unrepeated(attack.attack) if type(attack).__name__ == "Repeated" else attack


def _comes_from(thing: Foreign, library: str) -> bool:
    return any(base.__module__.partition(".")[0] == library for base in type(thing).__mro__)


def _check_range(attack: Foreign, order: _Order) -> None:
    if order.low >= 0 and order.high <= 1:
        return
    function = attack.func if isinstance(attack, partial) else attack
    home = str(getattr(function, "__module__", "")).partition(".")[0]
    if home in _UNIT_RANGE or any(_comes_from(attack, library) for library in _UNIT_RANGE):
        raise CapabilityError(f"{_described(attack)} takes inputs in [0, 1] for granted; the model's range is another")


def _parameters(attack: Foreign) -> tuple[list[str], set[str]]:
    """Names of the parameters that must be given, and of all."""
    try:
        named = inspect.signature(attack).parameters.values()
    except (TypeError, ValueError):
        return ["net", "x", "y"], set()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in named if p.default is inspect.Parameter.empty and p.kind not in variable]
    return needed, {p.name for p in named}


def _described(attack: Foreign) -> str:
    """A name that is the same in every process."""
    if isinstance(attack, partial):
        bound = [_described(value) for value in attack.args]
        bound += [f"{name}={_described(value)}" for name, value in attack.keywords.items()]
        return f"{_described(attack.func)}({', '.join(bound)})"
    if hasattr(attack, "__qualname__"):
        return f"{attack.__module__}.{attack.__qualname__}"
    text = repr(attack)
    return type(attack).__name__ if " at 0x" in text else text
