"""ALMA, PDGD and PDPGD against their equations, written out for one sample; proximal operators by search."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from contract_support import linear
from scipy.optimize import minimize
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks.lagrangian import (
    ALMA,
    PDGD,
    PDPGD,
    Proximal,
    penalty_slope,
    proximal_l0,
    proximal_l1,
    proximal_l2,
    proximal_linf,
    proximal_two_thirds,
)

_generator = torch.Generator().manual_seed(1)
W1, B1, W2, B2 = (torch.randn(*shape, generator=_generator, dtype=torch.float64) for shape in ((9, 6), (9,), (4, 9), (4,)))
X = 0.2 + 0.6 * torch.rand(4, 6, generator=_generator, dtype=torch.float64)
STEPS = 13


def logits(x: Tensor) -> Tensor:
    return W2 @ torch.tanh(2 * W1 @ x + B1) + B2


Y = torch.stack([logits(x).argmax() for x in X])
NEXT = (Y + 1) % 4


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), (2 * W1, B1, W2, B2), strict=True):
            parameter.copy_(value)
    return net


def missing(x: Tensor, y: int, t: int | None, tau: float) -> Tensor:
    """By how much the margin falls short of tau."""
    z = logits(x)
    others = [c for c in range(4) if c != (y if t is None else t)]
    return tau - (z[others].max() - z[y] if t is None else z[t] - z[others].max())


def penalty(y: Tensor, rho: float, mu: float) -> Tensor:
    return mu * y + mu * rho * y**2 + rho**2 * y**3 / 6 if y >= 0 else mu * y / (1 - rho * y)


def alma(x0: Tensor, y: int, t: int | None, order: int, tau: float) -> Tensor:
    delta, square, velocity = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64), torch.zeros(6)
    mu, rho, found, rate = 1.0, 1.0, None, math.nan
    for k in range(STEPS):
        delta = delta.detach().requires_grad_()
        z = logits(x0 + delta).sort(descending=True).values
        spread = z[0] - (z[2] if t is None else (z[2] + z[3]) / 2)
        ratio = missing(x0 + delta, y, t, tau) / spread
        value = ratio.item()
        if k == 0:
            before = value
        elif (k + 1) % 3 == 0:
            if found is None and value >= 0.95 * before:
                rho *= 1.2
            before = value
        if k:
            leaf = ratio.detach().requires_grad_()
            (slope,) = torch.autograd.grad(penalty(leaf, rho, mu), leaf)
            mu = min(max(0.5 * mu + 0.5 * float(slope), 1e-6), 1e12)
        if found is None and value <= 0:
            found = k
        loss = penalty(ratio, rho, mu) + (0 if k == 0 else delta.norm(p=order))
        (g,) = torch.autograd.grad(loss, delta)
        if k == 0:
            low, high = 0.0, 1e3
            for _ in range(200):
                rate = (low + high) / 2
                far = ((x0 - rate * g).clamp(0, 1) - x0).norm(p=order) > 0.3
                low, high = (low, rate) if far else (rate, high)
        eta = rate * 0.01 ** (0 if found is None else (k - found) / (STEPS - found))
        square = 0.5 * square + 0.5 * g**2
        velocity = 0.5 * velocity + g / (square.sqrt() + 1e-8)
        delta = (x0 + delta.detach() - eta * velocity).clamp(0, 1) - x0
    return x0 + delta


def primal_dual(x0: Tensor, y: int, t: int | None, norm: str | None, tau: float) -> Tensor:
    """PDGD without a norm, else PDPGD with its proximal operator, by search."""
    r, mean, square = (torch.zeros(6, dtype=torch.float64) for _ in range(3))
    dual = -math.log(0.01)
    weight = 1 / (1 + math.exp(-dual))
    for k in range(STEPS):
        r = r.detach().requires_grad_()
        short = missing(x0 + r, y, t, tau)
        loss = torch.log(1 + torch.exp(short))
        if norm is None:
            loss = weight * loss + (1 - weight) * (r.norm() if k else 0)
        (g,) = torch.autograd.grad(loss, r)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        scale = (square / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8
        size = 0.1 * 0.01 ** (k / STEPS)
        r = (x0 + r.detach() - size * mean / (1 - 0.9 ** (k + 1)) / scale).clamp(0, 1) - x0
        if norm is not None:
            step = (1 - weight) / weight * size / scale.max()
            z, moved = r, math.inf
            for _ in range(5):
                new = OPERATORS[norm]((z - scale / scale.max() * (z - r))[None], step[None, None])[0]
                new = (x0 + new).clamp(0, 1) - x0
                moved = float((new - z).norm() / new.norm())
                z = new
                if moved <= 0.01:
                    break
            r = z
        dual += 0.1 * ((STEPS - 1 - k) / (STEPS - 1) * 0.9 + 0.1) * short.sign().item()
        dual = min(max(dual, math.log(1e-6)), -math.log(1e-6))
        weight = 0.9 * weight + 0.1 / (1 + math.exp(-dual))
    return x0 + r


OPERATORS: dict[str, Proximal] = {
    "l1": proximal_l1,
    "l2": proximal_l2,
    "linf": proximal_linf,
    "l0": proximal_two_thirds,
    "count": proximal_l0,
}
GOALS = [None, sp.Targeted(NEXT)]


def last(attack: object, norm: str, goal: sp.Targeted | None) -> tuple[Tensor, float]:
    result = sp.attack(sp.Model(network()), X, Y, attack, sp.Minimize(norm), goal, keep="last")
    return result.adversarial, result.tau


@pytest.mark.parametrize("goal", GOALS, ids=str)
@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("l1", 1)])
def test_alma(norm: str, order: int, goal: sp.Targeted | None) -> None:
    found, tau = last(ALMA(steps=STEPS, check_steps=3, init_distance=0.3), norm, goal)
    for x, x0, y, t in zip(found, X, Y.tolist(), NEXT.tolist(), strict=True):
        torch.testing.assert_close(x, alma(x0, y, None if goal is None else t, order, tau), rtol=0, atol=1e-6)


@pytest.mark.parametrize("goal", GOALS, ids=str)
@pytest.mark.parametrize("norm", [None, "l2", "l1", "linf", "l0", "count"])
def test_primal_dual(norm: str | None, goal: sp.Targeted | None) -> None:
    attack = PDGD(steps=STEPS) if norm is None else PDPGD(steps=STEPS, sparse="l0" if norm == "count" else "l2/3")
    found, tau = last(attack, {None: "l2", "count": "l0"}.get(norm, norm), goal)
    for x, x0, y, t in zip(found, X, Y.tolist(), NEXT.tolist(), strict=True):
        torch.testing.assert_close(x, primal_dual(x0, y, None if goal is None else t, norm, tau), rtol=0, atol=1e-6)


def test_penalty_slope() -> None:
    for y in (-3.0, -0.2, 0.0, 0.1, 2.0):
        leaf = torch.tensor(y, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(penalty(leaf, 1.7, 0.6), leaf)
        ours = penalty_slope(leaf.detach(), torch.tensor(1.7), torch.tensor(0.6))
        torch.testing.assert_close(ours, slope, rtol=1e-6, atol=0, check_dtype=False)


# Proximal operators


@pytest.mark.parametrize("name", ["l1", "l0", "count"])
def test_separable_proximal_operators(name: str) -> None:
    """By trying 400,001 values of each entry."""
    power = {"l1": lambda z: z.abs(), "l0": lambda z: z.abs() ** (2 / 3), "count": lambda z: (z != 0).double()}[name]
    grid = torch.linspace(-4, 4, 400_001, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for step in (0.01, 0.3, 1.5):
        v = 2 * torch.randn(12, generator=generator, dtype=torch.float64).clamp(-1.9, 1.9)
        found = OPERATORS[name](v[None], torch.tensor([[step]], dtype=torch.float64))[0]
        assert (found == 0).any() or step < 1
        for value, ours in zip(v, found, strict=True):
            worth = (grid - value) ** 2 / 2 + step * power(grid)
            mine = (ours - value) ** 2 / 2 + step * power(ours)
            assert float(mine) <= float(worth.min()) + 1e-9


@pytest.mark.parametrize(("name", "order"), [("l2", 2), ("linf", math.inf)])
def test_joint_proximal_operators(name: str, order: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for step in (0.05, 0.6, 30.0):
        drawn = torch.randn(5, generator=generator, dtype=torch.float64)
        found, v = OPERATORS[name](drawn[None], torch.tensor([[step]], dtype=torch.float64))[0].numpy(), drawn.numpy()

        def worth(z: np.ndarray, v: np.ndarray = v, step: float = step) -> float:
            return float((z - v) @ (z - v) / 2 + step * np.linalg.norm(z, order))

        starts = [found, v, np.zeros(5)]
        best = min(
            minimize(worth, s, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}).fun
            for s in starts
        )
        assert worth(found) <= best + 1e-8
    assert (OPERATORS[name](torch.zeros(1, 3), torch.ones(1, 1)) == 0).all()


# What holds beyond the equations


def two_planes(classes: int) -> tuple[sp.Model, Tensor, Tensor, Tensor]:
    """Linear models without bounds, inputs, labels, and the weights that lead from the label to the other of two classes."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(classes, 20, generator=generator, dtype=torch.float64)
    bias = torch.zeros(classes, dtype=torch.float64)
    bias[2:] = -30
    x = torch.rand(8, 20, generator=generator, dtype=torch.float64)
    y = (x @ weight.T + bias).argmax(1)
    return sp.Model(linear(weight, bias), bounds=None), x, y, weight[1 - y] - weight[y]


@pytest.mark.parametrize(
    ("attack", "norm", "factor"),
    [
        (ALMA(), "l2", 1.01),
        (ALMA(), "l1", 1.3),
        (PDGD(), "l2", 1.05),
        (PDPGD(), "l2", 1.05),
        (PDPGD(), "l1", 1.1),
        (PDPGD(), "linf", 1.05),
    ],
    ids=repr,
)
def test_linear_models(attack: sp.attacks.ALMA, norm: str, factor: float) -> None:
    model, x, y, w = two_planes(3)
    lead = -(model.logits(x).gather(1, 1 - y[:, None]) - model.logits(x).gather(1, y[:, None]))[:, 0]
    nearest = lead / w.norm(p={"l2": 2, "l1": math.inf, "linf": 1}[norm], dim=1)
    result = sp.attack(model, x, y, attack, sp.Minimize(norm))
    assert (result.distance >= nearest).all()
    assert (result.distance <= factor * nearest).all()


class Scaled(nn.Module):
    """The network with inputs in [low, low + width] and its first classes' logits times a factor."""

    def __init__(self, low: float, width: float, factor: float, classes: int) -> None:
        super().__init__()
        self.net, self.low, self.width, self.factor, self.classes = network(), low, width, factor, classes

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.net((x - self.low) / self.width)[:, : self.classes]


@pytest.mark.parametrize(
    ("attack", "norms", "factor", "classes"),
    [
        (ALMA(steps=60), ("l2", "l1"), 50.0, 4),
        (ALMA(steps=60), ("l2", "l1"), 50.0, 2),  # no ratio of logits
        (PDGD(steps=60), ("l2",), 1.0, 4),
        (PDPGD(steps=60), ("l2", "l1", "linf", "l0"), 1.0, 4),
    ],
    ids=repr,
)
def test_units_do_not_matter(attack: sp.attacks.ALMA, norms: tuple[str, ...], factor: float, classes: int) -> None:
    plain, other = Scaled(0, 1, 1, classes), Scaled(-3, 255, factor, classes)
    y = plain(X).argmax(1)
    for norm in norms:
        first = sp.attack(sp.Model(plain), X, y, attack, sp.Minimize(norm))
        second = sp.attack(sp.Model(other, bounds=(-3, 252)), 255 * X - 3, y, attack, sp.Minimize(norm))
        assert first.success.all()
        torch.testing.assert_close((second.adversarial + 3) / 255, first.adversarial, rtol=0, atol=1e-3)


def test_sparse_points_keep_the_inputs_bits(mlp: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    x = digits[0][:8]
    y = sp.Model(mlp).predict(x)
    for norm in ("l0", "l1"):
        result = sp.attack(sp.Model(mlp), x, y, PDPGD(steps=300), sp.Minimize(norm))
        assert result.success.all()
        assert result.distances["l0"].median() <= 40  # of 64: what the operator sets to zero is no change


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (ALMA, {"steps": 0}),
        (ALMA, {"init_distance": 0}),
        (ALMA, {"alpha": 1}),
        (ALMA, {"tau": -0.1}),
        (ALMA, {"check_steps": 0}),
        (ALMA, {"gamma": math.inf}),
        (PDGD, {"primal_lr": -1}),
        (PDGD, {"dual_average": 1}),
        (PDPGD, {"least_ratio": 0}),
        (PDPGD, {"proximal_steps": 0}),
        (PDPGD, {"close": -1}),
        (PDPGD, {"sparse": "l1"}),
    ],
    ids=str,
)
def test_bad_settings(cls: type[ALMA], settings: dict[str, float]) -> None:
    with pytest.raises(sp.InputError, match=next(iter(settings))):
        cls(**settings)
