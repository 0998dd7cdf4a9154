"""Optimality: on linear models the smallest perturbation is known in closed form, and attacks must reach it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from contract_support import CASES, Case, linear
from torch import Tensor

import saddlepoint as sp

DIMENSION = 64
COUNT = 12
DUAL = {sp.Norm.LINF: 1, sp.Norm.L2: 2, sp.Norm.L1: float("inf")}
# Restarts draw from the same declaration, and are no attack of their own
ORACLE = [case for case in CASES if case.attack.declaration.linear_oracle is not None and not case.wrapped]
NOISE = [case for case in CASES if case.attack.declaration.linear_oracle is None]


def problem(classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights and bias, inputs, labels (the predicted classes), targets. Classes beyond the second are 30 logits behind.

    Many inputs lie near the ends of [0, 1], so that the box is felt.
    """
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(classes, DIMENSION, generator=generator, dtype=torch.float64)
    bias = torch.zeros(classes, dtype=torch.float64)
    bias[2:] = -30.0
    x = torch.rand(200, DIMENSION, generator=generator, dtype=torch.float64)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.5, 0.05 + 0.9 * torch.round(x), x)
    bias[0] = (x @ (weight[1] - weight[0])).median()  # both classes occur
    leads = x @ (weight[1] - weight[0]) - bias[0]
    x = x[(leads.abs() > 3) & (leads.abs() < 12)][:COUNT]
    assert len(x) == COUNT
    y = (x @ weight.T + bias).argmax(1)
    assert y.unique().tolist() == [0, 1]
    return weight, bias, x, y, 1 - y


def direction(weight: Tensor, y: Tensor) -> Tensor:
    """Gradient of the margin towards the other one of the first two classes, (N, D)."""
    return weight[1 - y] - weight[y]


def lead(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """By how much the label's logit is above the other's, (N,)."""
    logits = x @ weight.T + bias
    return (logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None]))[:, 0]


def gain_in_box(w: Tensor, x: Tensor, eps: Tensor, norm: sp.Norm) -> Tensor:
    """max <w, d> over ||d|| <= eps and x + d in [0, 1], by water-filling: (N,)."""
    room = torch.where(w > 0, 1 - x, x)
    w = w.abs()
    match norm:
        case sp.Norm.LINF:
            return (w * torch.minimum(room, eps[:, None])).sum(1)
        case sp.Norm.L2:
            low, high = torch.zeros(len(x), dtype=w.dtype), torch.full((len(x),), 1e6, dtype=w.dtype)
            for _ in range(200):
                level = (low + high) / 2
                inside = torch.minimum(room, w * level[:, None]).norm(dim=1) <= eps
                low, high = torch.where(inside, level, low), torch.where(inside, high, level)
            return (w * torch.minimum(room, w * low[:, None])).sum(1)
        case sp.Norm.L1:
            order = w.argsort(1, descending=True)
            room, w = room.gather(1, order), w.gather(1, order)
            spent = (eps[:, None] - (room.cumsum(1) - room)).clamp(min=0)
            return (w * torch.minimum(room, spent)).sum(1)
        case sp.Norm.L0:
            gains = (w * room).sort(1, descending=True).values
            return torch.where(torch.arange(DIMENSION) < eps[:, None], gains, torch.zeros_like(gains)).sum(1)


def smallest_eps(gain: Callable[[Tensor], Tensor], needed: Tensor, norm: sp.Norm) -> Tensor:
    """The smallest radius at which the gain exceeds what is needed, by bisection (l0: by counting)."""
    if norm is sp.Norm.L0:
        table = torch.stack([gain(torch.full_like(needed, k)) for k in range(DIMENSION + 1)])
        return (table <= needed).sum(0).double()
    low, high = torch.zeros_like(needed), torch.full_like(needed, float(DIMENSION))
    for _ in range(100):
        middle = (low + high) / 2
        enough = gain(middle) > needed
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high


def patient(case: Case, eps: Tensor) -> object:
    """The attack with time to converge, where it takes steps."""
    names = {f.name for f in fields(case.attack)}
    if case.attack.declaration.iterative and {"steps", "step_size"} <= names:
        # an l1 step moves few features, and the projection moves all of them back: only short steps come close
        steps, share = (160, 50) if case.norm is sp.Norm.L1 else (40, 4)
        return type(case.attack)(steps=steps, step_size=float(eps.median()) / share)
    return type(case.attack)()


def goal_of(case: Case, targets: Tensor) -> sp.Targeted | None:
    return sp.Targeted(targets) if case.targeted else None


def test_registry_has_oracles() -> None:
    assert len({type(case.attack) for case in ORACLE}) >= 8
    for cls in sp.attacks.find():
        assert (cls.declaration.linear_oracle is None) == bool(cls.declaration.no_oracle)


def with_classes() -> list[tuple[Case, int]]:
    """Cases and numbers of classes; of the searches for the smallest perturbation, which take long, each case with one."""
    cases = [case for case in ORACLE if case.norm is not sp.Norm.L0]
    fits = {True: (5,), False: (2,)}
    return [(c, n) for c in cases for n in (fits[c.targeted] if c.attack.declaration.minimizes else (2, 5))]


@pytest.mark.parametrize(("case", "classes"), with_classes(), ids=str)
def test_closed_form_without_box(case: Case, classes: int) -> None:
    weight, bias, x, y, targets = problem(classes)
    w = direction(weight, y)
    needed = lead(weight, bias, x, y)
    distance = needed / w.norm(p=DUAL[case.norm], dim=1)
    model = sp.Model(linear(weight, bias), bounds=None)
    eps = case.attack.declaration.linear_oracle * distance / 0.99
    attack = type(case.attack)()
    threat = sp.Minimize(case.norm) if attack.declaration.minimizes else case.with_eps(eps)
    result = sp.attack(model, x, y, attack, threat, goal_of(case, targets))
    assert result.status.tolist() == ["fooled"] * COUNT
    assert (result.distance <= eps).all()
    assert (result.distance >= distance).all()
    if attack.declaration.minimizes:
        return
    below = sp.attack(model, x, y, type(case.attack)(), case.with_eps(0.99 * distance), goal_of(case, targets), keep="margin")
    assert below.status.tolist() == ["survived"] * COUNT


@pytest.mark.parametrize("case", [c for c in ORACLE if c.goal is None], ids=str)
def test_water_filling_in_the_box(case: Case) -> None:
    weight, bias, x, y, targets = problem(3)
    w = direction(weight, y)
    needed = lead(weight, bias, x, y)
    distance = smallest_eps(lambda eps: gain_in_box(w, x, eps, case.norm), needed, case.norm)
    if case.norm is not sp.Norm.L0:
        assert (distance > 1.01 * needed / w.norm(p=DUAL[case.norm], dim=1)).sum() >= (1 if case.norm is sp.Norm.L2 else 3), (
            "the box is felt"
        )
    model, goal, exact = sp.Model(linear(weight, bias)), goal_of(case, targets), case.norm is sp.Norm.L0
    oracle = case.attack.declaration.linear_oracle
    enough = (oracle * distance).ceil() if exact else oracle * distance / 0.99
    if case.attack.declaration.iterative or case.norm is not sp.Norm.L2:  # a clipped single l2 step is shorter than eps
        minimizes = case.attack.declaration.minimizes
        attack = type(case.attack)() if minimizes else patient(case, enough)
        result = sp.attack(model, x, y, attack, sp.Minimize(case.norm) if minimizes else case.with_eps(enough), goal)
        assert result.status.tolist() == ["fooled"] * COUNT
        assert (result.distance <= enough).all()
        if minimizes:
            assert (result.distance > (distance - 1 if exact else 0.99 * distance)).all()
            return
    less = distance - 1 if exact else 0.99 * distance
    below = sp.attack(model, x, y, type(case.attack)(), case.with_eps(less), goal, keep="margin")
    assert below.status.tolist() == ["survived"] * COUNT


@pytest.mark.parametrize("case", [c for c in NOISE if c.norm is not sp.Norm.L0], ids=str)
def test_nothing_succeeds_below_the_distance(case: Case) -> None:
    weight, bias, x, y, targets = problem(2)
    w = direction(weight, y)
    needed = lead(weight, bias, x, y)
    distance = needed / w.norm(p=DUAL[case.norm], dim=1)
    bounds = (-100.0, 100.0) if isinstance(case.attack, sp.attacks.RayS) else None  # from whose corners it begins
    model = sp.Model(linear(weight, bias), bounds=bounds)
    result = sp.attack(model, x, y, case.attack, case.with_eps(0.99 * distance), goal_of(case, targets), keep="margin")
    assert result.status.tolist() == ["survived"] * COUNT


def test_one_logit_form() -> None:
    """With one logit f and labels +-1 FGSM is x - eps * y * sign(w), as in section 5 of Goodfellow et al. 2015."""
    w = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    model = sp.Model(linear(w, torch.tensor([-0.1])), bounds=None)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    y = model.predict(x)
    result = sp.attack(model, x, y, sp.attacks.FGSM(), sp.Linf(0.25), keep="last")
    expected = x - 0.25 * (2 * y[:, None] - 1) * w.sign()
    torch.testing.assert_close(result.adversarial, expected)
