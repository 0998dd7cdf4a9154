"""What the contract tests share: cases made from the registry, and networks that count, record or fail."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.engine import Attack
from saddlepoint.threats import Threat, ball

EPS = {sp.Norm.LINF: 0.15, sp.Norm.L2: 1.0, sp.Norm.L1: 4.0, sp.Norm.L0: 8.0}  # break some of the digits, not all


@dataclass(frozen=True)
class Case:
    """An attack in one of its norms, with one kind of goal (None: the attack's own)."""

    attack: Attack
    norm: sp.Norm
    goal: sp.Targeted | None

    @property
    def threat(self) -> Threat:
        return ball(self.norm, EPS[self.norm])

    def with_eps(self, eps: float) -> Threat:
        return ball(self.norm, eps)

    @property
    def targeted(self) -> bool:
        return (self.goal or self.attack.default_goal()).targeted

    @property
    def looks_back(self) -> bool:
        """Whether a step in which a run ends also looks at where it ended, after the point of its success."""
        return self.wrapped or isinstance(self.attack, sp.attacks.AutoAttack)

    @property
    def wrapped(self) -> bool:
        return isinstance(self.attack, sp.attacks.Restarts)

    @property
    def asks_for_labels(self) -> bool:
        """Whether it is a search by verdicts: slow, and a verdict that rounding turns leads elsewhere."""
        can = self.attack.declaration
        return can.access is sp.Access.LABELS and can.minimizes

    @property
    def inner(self) -> Attack:
        return self.attack.attack if self.wrapped else self.attack

    @property
    def costs_vary(self) -> bool:
        """Whether a survivor may cost less than stated: it ends when it has converged, or its steps are not all alike."""
        cls = type(self.inner)
        return any(getattr(cls, name) is not getattr(Attack, name) for name in ("done", "opening", "cost"))

    def __str__(self) -> str:
        name = f"Restarts-{type(self.attack.attack).__name__}" if self.wrapped else type(self.attack).__name__
        return f"{name}-{self.norm.value}" + ("-targeted" if self.goal else "")


SMALL = {"steps": 4, "queries": 8, "samples": 8, "population": 6, "searches": 2}


def small(cls: type[Attack], **settings: Any) -> Attack:
    """The attack with few steps and few questions a step, where it has them."""
    names = {f.name for f in fields(cls)}
    return cls(**{name: value for name, value in (SMALL | settings).items() if name in names})


def cases() -> list[Case]:
    found = []
    for cls in sp.attacks.find():
        for norm in sorted(cls.declaration.norms):
            if cls.declaration.untargeted or isinstance(cls().default_goal(), sp.Targeted):
                found.append(Case(small(cls), norm, None))
            if cls.declaration.targeted and cls.declaration.untargeted:
                found.append(Case(small(cls), norm, sp.Targeted("next")))
        attack = small(cls)
        searches_by_labels = cls.declaration.access is sp.Access.LABELS and cls.declaration.minimizes
        if attack.randomized and (not searches_by_labels or cls is sp.attacks.HopSkipJump):  # slow: one stands for all
            found.append(Case(sp.attacks.Restarts(attack, 3), min(cls.declaration.norms), None))
    return found


CASES = cases()
ONE_EACH = [case for case in CASES if case.goal is None and case.norm == min(case.attack.declaration.norms)]


class _CountBackward(torch.autograd.Function):
    """The identity, which sees what comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counting: Counting) -> Tensor:
        ctx.counting = counting
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.counting.backward_rows += len(gradient)
        return gradient, None


class Counting(nn.Module):
    """Counts the rows that pass forward and, in an autograd function of its own, backward."""

    def __init__(self, net: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net = net
        self.calls: list[int] = []
        self.backward_rows = 0

    @property
    def forward_rows(self) -> int:
        return sum(self.calls)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.net(_CountBackward.apply(x, self) if x.requires_grad else x)


class Recording(nn.Module):
    """Keeps every point that it is asked about."""

    def __init__(self, net: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net = net
        self.points: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.points.append(x.detach().clone())
        return self.net(x)


class Failing(nn.Module):
    """Raises at one of its calls."""

    def __init__(self, net: nn.Module, error: BaseException, after: int) -> None:
        super().__init__()
        self.net, self.error, self.after, self.calls = net, error, after, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.after:
            raise self.error
        return self.net(x)


def linear(weight: Tensor, bias: Tensor) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], weight.shape[0])).to(weight.dtype)
    with torch.no_grad():
        net[1].weight.copy_(weight)
        net[1].bias.copy_(bias)
    return net


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int = 60) -> nn.Module:
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    net.train()
    for _ in range(epochs):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    optimiser.zero_grad()
    return net.eval()


def random_states() -> tuple[object, ...]:
    numpy = np.random.get_state()  # noqa: NPY002  # the global state is what is checked
    return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2], random.getstate()


def snapshot(net: nn.Module) -> dict[str, object]:
    """All that a run could leave behind in a network."""
    modules = dict(net.named_modules())
    return {
        "training": {name: module.training for name, module in modules.items()},
        "requires_grad": {name: p.requires_grad for name, p in net.named_parameters()},
        "grad": {name: None if p.grad is None else p.grad.tolist() for name, p in net.named_parameters()},
        "state": {name: (id(t), t.tolist()) for name, t in net.state_dict(keep_vars=True).items()},
        "hooks": {
            name: (len(m._forward_hooks), len(m._backward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()
        },
        "keys": {name: sorted(vars(m)) for name, m in modules.items()},
    }


def same(first: sp.AttackResult, second: sp.AttackResult, *, exact: bool = True, rtol: float = 1e-4) -> None:
    """Assert that two runs found the same."""
    assert first.status.tolist() == second.status.tolist()
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": rtol, "atol": rtol}
    torch.testing.assert_close(first.distance, second.distance, **tolerance)
    for name in first.distances:
        if name != "l0" or exact:  # a feature that moves by a rounding error counts in l0
            torch.testing.assert_close(first.distances[name], second.distances[name], **tolerance)
    if exact:
        for name in ("adversarial", "predicted", "clean_predicted", "targets", "iterations", "labels", "ids"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name


def rows_of(result: sp.AttackResult, index: Tensor) -> sp.AttackResult:
    """Some rows of a result, as a result."""
    columns = {f.name: getattr(result, f.name)[index] for f in fields(result) if f.type == "Tensor"}
    queries = replace(result.queries, **{n: getattr(result.queries, n)[index] for n in ("forward", "backward", "verify")})
    return replace(result, **columns, distances={n: d[index] for n, d in result.distances.items()}, queries=queries)
