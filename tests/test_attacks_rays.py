"""RayS against a loop for one sample, and where it must end."""

from __future__ import annotations

import math

import pytest
import torch
from contract_support import Counting, linear
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks.rays import RayS

LABELS = sp.Access.LABELS


def loop(net: nn.Module, x: Tensor, queries: int, precision: float) -> float:
    """The search for one sample of class 0 in [0, 1], as the paper tells it; the smallest radius that was adversarial."""
    features = x.numel()
    signs, best, level, block, left = torch.ones(features, dtype=x.dtype), 1.0, -1, 0, queries
    smallest = math.inf

    def fools(direction: Tensor, radius: float) -> bool:
        nonlocal left, smallest
        left -= 1
        fooled = bool(net((x + radius * direction).clamp(0, 1)[None]).argmax(1) != 0)
        smallest = min(smallest, radius) if fooled else smallest
        return fooled

    while left > 0:
        flipped, size = signs.clone(), math.ceil(features / 2 ** max(level, 0))
        if level >= 0:
            flipped[block * size : (block + 1) * size] *= -1
        high, low, gap = (1 - precision) * best if level >= 0 else best, 0.0, 4 * precision * best
        if fools(flipped, high):
            while left > 0 and not (low > 0 and high - low <= precision * high):
                middle = (low + high) / 2 if low else max(high - gap, high / 2)
                low, high = (low, middle) if fools(flipped, middle) else (middle, high)
                gap *= 2
            if low > 0 and high - low <= precision * high:
                signs, best = flipped, high
        block += 1
        if level < 0 or block * size >= features:
            level, block = level + 1, 0
    return smallest


def curved(seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


@pytest.mark.parametrize("queries", [7, 40, 173])
def test_against_a_loop(queries: int) -> None:
    found = 0
    for seed in range(6):
        net, x = curved(seed), torch.full((1, 10), 0.5, dtype=torch.float64)
        y = net(x).argmax(1)
        order = torch.tensor([int(y), *({0, 1, 2} - {int(y)})])
        reordered = nn.Sequential(net, Reorder(order))
        budget = sp.Budget(queries=queries + 1)
        model = sp.Model(reordered, access=LABELS)
        result = sp.attack(model, x, torch.zeros(1, dtype=torch.int64), RayS(), sp.Minimize("linf"), budget=budget)
        expected = loop(reordered, x[0], queries, RayS().precision)
        if not bool(result.success):
            assert expected == math.inf
            continue
        found += 1
        assert float(result.distance) == pytest.approx(min(expected, 0.5), abs=1e-12)  # the range ends half a unit away
    assert found >= 3


class Reorder(nn.Module):
    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.order = order

    def forward(self, z: Tensor) -> Tensor:
        return z[:, self.order]


def test_the_corner_of_a_linear_model() -> None:
    """The exact distance is |f| / ||w||_1, at the corner that RayS finds feature by feature."""
    w = torch.tensor([3.0, -1.0, 0.5, -2.0, 1.0, 0.25, -0.75, 1.5], dtype=torch.float64)
    net = linear(
        torch.stack([-w, w]) / 2, torch.tensor([0.5, -0.5], dtype=torch.float64) + torch.tensor([1.0, -1.0]) * w.sum() / 4
    )
    x = torch.full((3, 8), 0.5, dtype=torch.float64)
    counting = Counting(net)
    model = sp.Model(counting, access=LABELS)
    result = sp.attack(model, x, torch.zeros(3, dtype=torch.int64), RayS(steps=300), sp.Minimize("linf"))
    z = net(x)[0].detach()
    exact = float((z[0] - z[1]) / w.abs().sum())
    assert result.queries.forward.tolist() == [301] * 3
    assert bool((result.distance >= exact).all())
    assert float(result.distance.max()) <= exact * 1.003


def test_bounds_and_settings() -> None:
    model = sp.Model(nn.Linear(4, 3), bounds=None, access=LABELS)
    with pytest.raises(sp.CapabilityError, match="bounds"):
        sp.attack(model, torch.rand(2, 4), torch.zeros(2, dtype=torch.int64), RayS(), sp.Minimize("linf"))
    for settings in ({"steps": 0}, {"precision": 1.0}):
        with pytest.raises(sp.InputError, match=next(iter(settings))):
            RayS(**settings)
