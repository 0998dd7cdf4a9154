"""The square attack against a loop for one sample written from the papers, its windows, and how near the optimum it comes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from contract_support import Counting, Recording, linear
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks.square import Square, _pyramids, _schedule, _Window, published
from saddlepoint.rng import Keys

SEED, CHANNELS, SIDE = 3, 2, 11
_generator = torch.Generator().manual_seed(1)
W = torch.randn(4, CHANNELS * SIDE * SIDE, generator=_generator, dtype=torch.float64).numpy() / 4
X = (0.05 + 0.9 * torch.rand(3, CHANNELS, SIDE, SIDE, generator=_generator, dtype=torch.float64)).numpy()
EPS = {"linf": 0.03, "l2": 0.3, "l1": 2.0}  # nobody is fooled


class Curved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ torch.from_numpy(W).T)


def logits(x: np.ndarray) -> np.ndarray:
    return np.tanh(W @ x.ravel())


Y = np.array([logits(x).argmax() for x in X])


# The papers, for one sample


def gain(x: np.ndarray, y: int, target: int | None) -> float:
    """Minus the paper's loss."""
    z = logits(x)
    if target is None:
        return float(max(z[c] for c in range(len(z)) if c != y) - z[y])
    return float(z[target] - math.log(np.exp(z).sum()))


def share(k: int, steps: int) -> float:
    """Of the paper's 10,000 queries, scaled."""
    return 0.8 / 2 ** sum(int(k / steps * 10000) > point for point in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))


def rings(height: int, width: int, power: int) -> np.ndarray:
    """Squares that grow around the middle, each weighing less."""
    values = np.zeros((height, width))
    for n in range(max(height // 2, width // 2) + 1):
        top, left = height // 2 - n, width // 2 - n
        values[max(top, 0) : max(top + 2 * n + 1, 0), max(left, 0) : max(left + 2 * n + 1, 0)] += 1 / (n + 1) ** power
    return unit(values, power)


def unit(values: np.ndarray, power: int) -> np.ndarray:
    length = np.abs(values).sum() if power == 4 else math.sqrt((values**2).sum())
    return values / length if length else values


def pair(side: int, turned: bool, power: int) -> np.ndarray:
    values = unit(np.concatenate([rings(side // 2, side, power), -rings(side - side // 2, side, power)]), power)
    return values.T if turned else values


def project(norm: str, x: np.ndarray, origin: np.ndarray, eps: float) -> np.ndarray:
    """On ball and [0, 1] together, by bisection on the multiplier."""

    def at(multiplier: float) -> np.ndarray:
        d = x - origin
        d = d / (1 + multiplier) if norm == "l2" else np.sign(d) * np.maximum(np.abs(d) - multiplier, 0)
        return np.clip(origin + d, 0, 1) - origin

    low, high = 0.0, 1e3
    if size(norm, at(0.0)) <= eps:
        return origin + at(0.0)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if size(norm, at(middle)) > eps else (low, middle)
    return origin + at(high)


def size(norm: str, d: np.ndarray) -> float:
    return float(np.abs(d).sum() if norm == "l1" else math.sqrt((d**2).sum()))


def keys(sample: int, k: int, stream: int) -> Keys:
    return Keys.of(SEED, torch.tensor([sample])).absorb(k).absorb(stream)


def corner(sample: int, k: int, stream: int, side: int) -> tuple[int, int]:
    """Uniform over all windows that lie in the plane."""
    row, column = (keys(sample, k, stream).uniform((2,), torch.float64)[0] * (SIDE - side + 1)).long().tolist()
    return row, column


def signs(sample: int, k: int, stream: int, *shape: int) -> np.ndarray:
    return keys(sample, k, stream).sign(shape, torch.float64)[0].numpy()


def first_point(norm: str, sample: int, eps: float) -> np.ndarray:
    origin = X[sample]
    if norm == "linf":
        return np.clip(origin + eps * signs(sample, 0, 5, CHANNELS, 1, SIDE), 0, 1)
    power, side = {"l2": 2, "l1": 4}[norm], SIDE // 5
    count, begin = SIDE // side, (SIDE - SIDE // side * side) // 2
    turned = (keys(sample, 0, 5).uniform((count * count,))[0] > 0.5).tolist()
    sign, delta = signs(sample, 0, 6, CHANNELS, count * count), np.zeros_like(origin)
    for tile in range(count * count):
        i, j = begin + tile // count * side, begin + tile % count * side
        delta[:, i : i + side, j : j + side] = sign[:, tile, None, None] * pair(side, turned[tile], power)
    assert norm == "l2" or size(norm, delta) > eps
    return project(norm, origin + (delta * eps / size(norm, delta) if norm == "l2" else delta), origin, eps)


def proposal(norm: str, sample: int, k: int, steps: int, best: np.ndarray, eps: float) -> np.ndarray:
    origin = X[sample]
    side = round(math.sqrt(share(k, steps) * SIDE * SIDE))
    if norm == "linf":
        side = max(side, 1)
        i, j = corner(sample, k, 1, side)
        delta = np.zeros_like(origin)
        delta[:, i : i + side, j : j + side] = 2 * eps * signs(sample, k, 2, CHANNELS, 1, 1)
        return np.clip(np.clip(best + delta, origin - eps, origin + eps), 0, 1)
    power, p, side = {"l2": 2, "l1": 4}[norm], {"l2": 2, "l1": 1}[norm], max(side, 3)
    side += side % 2 == 0
    (i, j), (m, n) = corner(sample, k, 1, side), corner(sample, k, 2, side)
    one, two = np.zeros((SIDE, SIDE), bool), np.zeros((SIDE, SIDE), bool)
    one[i : i + side, j : j + side] = two[m : m + side, n : n + side] = True
    bump = pair(side, bool(keys(sample, k, 3).uniform()[0] > 0.5), power)
    sign, nu = signs(sample, k, 4, CHANNELS), best - origin
    unused, after = max(eps**p - size(norm, nu) ** p, 0) / CHANNELS, nu.copy()
    for channel in range(CHANNELS):
        old = nu[channel, i : i + side, j : j + side]
        fresh = sign[channel] * bump + unit(old, power)
        available = unused + size(norm, nu[channel][one | two]) ** p
        if norm == "l1":
            available *= CHANNELS
        after[channel, m : m + side, n : n + side] = 0
        after[channel, i : i + side, j : j + side] = unit(fresh, power) * available ** (1 / p)
    return project(norm, origin + after, origin, eps)


def search(norm: str, sample: int, steps: int, target: int | None) -> tuple[list[np.ndarray], int]:
    """Every point that is asked about, and how often one was kept."""
    x, best, most, kept, points = first_point(norm, sample, EPS[norm]), None, -math.inf, 0, []
    for k in range(steps):
        points.append(x)
        if gain(x, int(Y[sample]), target) > most:
            best, most, kept = x, gain(x, int(Y[sample]), target), kept + 1
        x = proposal(norm, sample, k, steps, best, EPS[norm])
    return [*points, x], kept


def asked(attack: Square, threat: sp.threats.Threat, sample: int, goal: sp.Targeted | None) -> np.ndarray:
    net = Recording(Curved())
    model, x = sp.Model(net, access=sp.Access.SCORES), torch.from_numpy(X[sample : sample + 1])
    model.probe(x)
    net.points.clear()
    y = torch.from_numpy(Y[sample : sample + 1])
    result = sp.attack(model, x, y, attack, threat, goal, seed=SEED, keep="margin", ids=torch.tensor([sample]))
    assert result.queries.backward.item() == 0
    points = torch.cat(net.points[: len(net.points) - int(result.success.sum())]).numpy()
    assert np.array_equal(points[0], X[sample])
    return points[1:]


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_equations(norm: str, targeted: bool) -> None:
    steps, kept = 60, 0
    for sample in range(len(X)):
        target = int(np.argsort(logits(X[sample]))[0]) if targeted else None
        expected, improved = search(norm, sample, steps, target)
        goal = sp.Targeted(target) if targeted else None
        found = asked(Square(steps=steps, p_init=0.8), sp.threats.ball(norm, EPS[norm]), sample, goal)
        np.testing.assert_allclose(found, expected, atol=5e-4)  # a window's faint rest is scaled up, its roundings too
        kept += improved
    assert 3 * steps > kept > 20


def test_schedule() -> None:
    """Sides on a 32 x 32 plane at p = 0.8, and where the paper halves p, for its own number of queries and for fewer."""
    for steps in (10000, 5000, 1000):
        sizes = _schedule(steps, 0.8, 32, 32, 0).sizes
        for k in (0, 1, 5, 6, 25, 26, 100, 101, 999, steps // 10 + 1, steps // 5 + 1, steps * 6 // 10 + 1, steps - 1):
            side = max(round(32 * math.sqrt(share(min(k, steps - 1), steps))), 1)
            assert sizes[min(k, steps - 1)].tolist() == [side, side]
    assert sizes[0].tolist() == [29, 29]
    assert sizes[-1].tolist() == [1, 1]
    assert (_schedule(1000, 0.8, 32, 32, 2).sizes % 2 == 1).all()
    assert _schedule(1000, 0.8, 32, 32, 2).sizes.amin() == 3


@pytest.mark.parametrize("plane", [(1, 64), (4, 16), (8, 8), (16, 4), (2, 2), (1, 1), (3, 5)])
def test_windows_of_any_plane(plane: tuple[int, int]) -> None:
    """They fit, and cover the share that is asked for as nearly as whole numbers allow."""
    height, width = plane
    for power in (0, 2, 4):
        sizes = _schedule(100, 0.8, height, width, power).sizes
        assert (sizes >= 1).all()
        assert (sizes <= torch.tensor(plane)).all()
        areas = sizes.prod(1)
        assert (areas.diff() <= 0).all()
        if not power and height * width >= 8:
            assert 0.6 * height * width <= areas[0] <= height * width
            assert areas[-1] == 1


@pytest.mark.parametrize(("power", "order"), [(2, 2), (4, 1)])
def test_pyramids(power: int, order: int) -> None:
    """Norm 1, one half positive and the other negative, the second table entry turned, the highest point near the middle."""
    table = _pyramids([(3, 3), (9, 9), (1, 7), (7, 1)], power)
    assert table.shape == (8, 9, 9)
    torch.testing.assert_close(table.flatten(1).norm(p=order, dim=1), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(table[3], table[2].T)
    assert torch.equal(table[4], table[5]), "a line is halved in one way"
    assert (table[2][:4] > 0).all()
    assert (table[2][4:] < 0).all()
    np.testing.assert_allclose(table[2].numpy(), pair(9, False, power), atol=1e-12)
    assert (table[2].abs()[:, 4] == table[2].abs().amax(1)).all()


@pytest.mark.parametrize("shape", [(48,), (6, 8), (3, 4, 4), (2, 3, 4, 4)])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_windows_run_through_all_channels(norm: str, shape: tuple[int, ...]) -> None:
    """A model that never cares keeps the first point: every later one differs from it in one window (l2, l1: in two)."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 3)).double()
    nn.init.zeros_(flat[1].weight)
    net, steps = Recording(flat), 40
    x, y = torch.full((1, *shape), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        flat[1].bias.copy_(torch.tensor([3.0, 1.0, 0.0]))
    model = sp.Model(net)
    model.probe(x[:1])
    net.points.clear()
    sp.attack(model, x, y, Square(steps=steps, p_init=0.8), sp.threats.ball(norm, 0.1), seed=SEED)
    _, first, *later = (point[0].reshape(-1, shape[-2] if len(shape) > 1 else 1, shape[-1]) for point in net.points)
    assert len(later) == steps
    height, width = first.shape[1:]
    power = {"linf": 0, "l2": 2, "l1": 4}[norm]
    for k, point in enumerate(later):
        i, j = ((point - first).abs().amax(0) > 1e-12).nonzero().T
        rows, columns = _schedule(steps, 0.8, height, width, power).sizes[k].tolist()
        extent = [int(at.max() - at.min()) + 1 if len(at) else 0 for at in (i, j)]
        if norm == "linf":
            assert extent[0] <= rows
            assert extent[1] <= columns
            signs = (point - first).flatten(1).sign()
            assert all(len(set(row.tolist()) - {0.0}) <= 1 for row in signs), "one sign a channel"
        elif norm == "l2":  # the l1 projection may touch the others
            assert len(i) <= 2 * rows * columns


def test_all_places_are_equally_likely() -> None:
    """Every 3 x 2 window of a 5 x 6 plane, those at the lower and the right edge too."""
    count = 3000
    window = _Window.drawn(Keys.of(0, torch.arange(count)), torch.tensor([[3, 2]]).expand(count, 2), 5, 6)
    inside = window.inside()
    assert (inside.flatten(1).sum(1) == 6).all()
    first = inside.flatten(1).to(torch.uint8).argmax(1)
    corners, times = first.unique(return_counts=True)
    assert corners.tolist() == [6 * i + j for i in range(3) for j in range(5)]
    assert (times - count / 15).abs().max() < 4.5 * math.sqrt(count / 15)


def test_published_losses() -> None:
    z = torch.tensor([[1.0, 3.0, 2.0, 0.5]])
    y = torch.tensor([1])
    untargeted = sp.Untargeted().aim(y, y, 4)
    targeted = sp.Targeted(3).aim(y, torch.tensor([3]), 4)
    assert published(z, untargeted).item() == -1.0
    assert published(z, targeted).item() == pytest.approx(0.5 - math.log(np.exp(z.numpy()).sum()))


@pytest.mark.parametrize(("norm", "factor"), [("linf", 1.1), ("l2", 2.0), ("l1", 4.0)])
def test_linear_models(norm: str, factor: float) -> None:
    """How near the closed-form distance 1,000 queries come in 36 dimensions; below it, nothing succeeds.

    Pyramids of 3 x 3 at least cannot follow a gradient that changes from feature to feature.
    """
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(2, 36, generator=generator)
    x = 0.3 + 0.4 * torch.rand(8, 1, 6, 6, generator=generator)
    w = weight[1] - weight[0]
    lead = torch.linspace(0.1, 0.5, 8)
    x -= (lead + x.flatten(1) @ w).view(-1, 1, 1, 1) * (w / w.square().sum()).view(1, 6, 6)
    distance = (lead / w.norm(p={"linf": 1, "l2": 2, "l1": torch.inf}[norm])).double()
    assert (distance < 0.2).all(), "the input range is far"
    model, y = sp.Model(linear(weight, torch.zeros(2)), access=sp.Access.SCORES), torch.zeros(8, dtype=torch.int64)
    result = sp.attack(model, x, y, Square(steps=1000), sp.threats.ball(norm, factor * distance))
    assert result.success.all()
    below = sp.attack(model, x, y, Square(steps=100), sp.threats.ball(norm, 0.99 * distance))
    assert not below.success.any()


def test_cost(mlp: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    counting = Counting(mlp)
    result = sp.attack(sp.Model(counting), *samples, Square(steps=30), sp.Linf(0.001), batch_size=7)
    survived = result.having("survived")
    assert survived.sum() > 10
    assert (result.queries.forward[survived] == 1 + 30 + 1).all(), "the clean prediction, the start and a query a step"
    assert counting.forward_rows == int(result.queries.forward.sum() + result.queries.verify.sum()) + result.queries.probe
    assert counting.backward_rows == 0


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"steps": 2.5}, {"p_init": 0.0}, {"p_init": 1.5}, {"loss": "hinge"}], ids=str
)
def test_bad_hyperparameters(settings: dict[str, object]) -> None:
    with pytest.raises((sp.errors.InputError, sp.errors.UnknownNameError)):
        Square(**settings)


@pytest.mark.parametrize(("norm", "share"), [("linf", 0.3), ("l2", 0.8), ("l1", 0.8)])
def test_the_first_share_depends_on_the_norm(norm: str, share: float, samples: tuple[Tensor, Tensor], mlp: nn.Module) -> None:
    x, y = samples[0][:4], samples[1][:4]
    default, stated, other = (
        sp.attack(sp.Model(mlp), x, y, Square(steps=300, p_init=p), sp.threats.ball(norm, 0.05), keep="last").adversarial
        for p in (None, share, 0.05)
    )
    assert torch.equal(default, stated)
    assert not torch.equal(default, other)
