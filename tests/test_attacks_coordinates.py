"""SimBA and ZOO against loops for one sample written from the papers, the cosine basis against SciPy, and their options."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.fft
import torch
from contract_support import Counting, Recording, linear
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks.coordinates import ZOO, SimBA, hats, low_frequencies_first
from saddlepoint.engine import Attack
from saddlepoint.rng import Keys

SEED, SHAPE = 3, (2, 5, 6)
_generator = torch.Generator().manual_seed(1)
W = torch.randn(4, math.prod(SHAPE), generator=_generator, dtype=torch.float64).numpy() / 4
X = (0.02 + 0.96 * torch.rand(2, *SHAPE, generator=_generator, dtype=torch.float64)).numpy()
ENDS = X.copy()
ENDS[0, 0, :2] = np.array([0.0, 1.0])[:, None]  # of the range
EPS = {"linf": 0.05, "l2": 0.3}  # nobody is fooled


class Curved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ torch.from_numpy(W).T)


def logits(x: np.ndarray) -> np.ndarray:
    return np.tanh(W @ x.ravel())


Y = np.array([logits(x).argmax() for x in X])
FARTHEST = np.array([logits(x).argmin() for x in X])


def margin(x: np.ndarray, label: int, target: int | None) -> float:
    z, one = logits(x), label if target is None else target
    rest = max(z[c] for c in range(len(z)) if c != one)
    return float(rest - z[one] if target is None else z[one] - rest)


def keys(sample: int, k: int) -> Keys:
    return Keys.of(SEED, torch.tensor([sample])).absorb(k).absorb(0)


def size(d: np.ndarray) -> float:
    return math.sqrt(float((d**2).sum()))


def project(norm: str, x: np.ndarray, sample: int) -> np.ndarray:
    """On ball and [0, 1] together, by bisection on the multiplier."""
    origin, eps = X[sample], EPS[norm]
    if norm == "linf":
        return np.clip(np.clip(x, origin - eps, origin + eps), 0, 1)

    def at(multiplier: float) -> np.ndarray:
        return np.clip(origin + (x - origin) / (1 + multiplier), 0, 1) - origin

    low, high = 0.0, 1e3
    if size(at(0.0)) <= eps:
        return origin + at(0.0)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if size(at(middle)) > eps else (low, middle)
    return origin + at(high)


# SimBA, for one sample: every point that is asked about


def turns(sample: int, basis: str, share: float) -> list[tuple[int, int, int]]:
    """The order of the directions (channel, row, column)."""
    chance = keys(sample, 0).uniform((math.prod(SHAPE),), torch.float64)[0].numpy().reshape(SHAPE)
    first = [max(round(share * side), 1) for side in SHAPE[1:]]

    def ring(i: int, j: int) -> int:
        if basis == "pixel" or (i < first[0] and j < first[1]):
            return 0
        return 1 + max(i - first[0], j - first[1]) // max(max(first) // 4, 1)

    return sorted(itertools.product(*map(range, SHAPE)), key=lambda at: chance[at] + ring(*at[1:]))


def simba(norm: str, sample: int, target: int | None, steps: int, basis: str, share: float) -> list[np.ndarray]:
    label, order = int(Y[sample]), turns(sample, basis, share)
    best, delta = X[sample], np.zeros(SHAPE)
    most, points, made = margin(best, label, target), [best], 1
    for at in itertools.cycle(order):
        q = np.zeros(SHAPE)
        q[at] = 1
        if basis == "dct":
            q[at[0]] = scipy.fft.idctn(q[at[0]], norm="ortho")
        q *= EPS["linf"] / np.abs(q).max() if norm == "linf" else 0.3 * EPS["l2"]
        for step in (q, -q):
            trial = project(norm, X[sample] + delta + step, sample)
            if made == steps:
                return [*points, trial]  # the last look
            made += 1
            if np.allclose(trial, best, rtol=0, atol=1e-12):  # nothing to ask
                continue
            points.append(trial)
            if margin(trial, label, target) > most:
                best, delta, most = trial, delta + step, margin(trial, label, target)
                break
    raise AssertionError


def asked(attack: Attack, threat: sp.threats.Threat, inputs: np.ndarray, sample: int, target: int | None) -> np.ndarray:
    net = Recording(Curved())
    model, x = sp.Model(net, access=sp.Access.SCORES), torch.from_numpy(inputs[sample : sample + 1])
    model.probe(x)
    net.points.clear()
    goal = None if target is None else sp.Targeted(target)
    y = torch.from_numpy(Y[sample : sample + 1])
    keep = "smallest" if threat.minimizes else "margin"
    result = sp.attack(model, x, y, attack, threat, goal, seed=SEED, ids=torch.tensor([sample]), keep=keep)
    points = torch.cat(net.points[: len(net.points) - int(result.success.sum())]).numpy()
    assert np.array_equal(points[0], inputs[sample])
    return points


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("basis", ["dct", "pixel"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_equations_of_simba(norm: str, basis: str, targeted: bool) -> None:
    for sample in range(len(X)):
        target = int(FARTHEST[sample]) if targeted else None
        steps = 130  # more than once through all directions
        attack = SimBA(steps=steps, basis=basis, share=0.4)
        points = asked(attack, sp.threats.ball(norm, EPS[norm]), X, sample, target)
        expected = simba(norm, sample, target, steps, basis, 0.4)
        assert len(points) == len(expected)
        np.testing.assert_allclose(points, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 9), (4, 4), (5, 8)])
def test_directions_are_the_cosine_transform(height: int, width: int) -> None:
    """The points of a model that never cares are the rows of SciPy's transform, forwards and backwards."""
    shape = (2, height, width)
    net = Recording(linear(torch.zeros(2, math.prod(shape), dtype=torch.float64), torch.tensor([2.0, 0.0]).double()))
    model, x = sp.Model(net, bounds=None), torch.zeros(1, *shape, dtype=torch.float64)
    model.probe(x)
    net.points.clear()
    sp.attack(model, x, torch.zeros(1, dtype=torch.int64), SimBA(share=1.0), sp.L2(10.0), keep="margin")
    moves = torch.cat(net.points[1 : 1 + 2 * math.prod(shape)]).numpy() / 3.0
    np.testing.assert_allclose(moves[::2], -moves[1::2])
    frequencies = scipy.fft.dctn(moves[::2], axes=(2, 3), norm="ortho").reshape(-1, math.prod(shape))
    np.testing.assert_allclose(np.sort(frequencies, 1)[:, -1], 1)
    np.testing.assert_allclose(frequencies.sum(0), 1, err_msg="each of them once")
    np.testing.assert_allclose(np.abs(frequencies).sum(1), 1, atol=1e-12)


def test_low_frequencies_first() -> None:
    ring = low_frequencies_first(16, 32, 0.25)
    assert ((ring == 0).nonzero().amax(0) == torch.tensor([3, 7])).all()
    assert (ring == 0).sum() == 4 * 8
    assert ring[4, 0] == ring[5, 0] == ring[0, 8] == ring[0, 9] == 1
    assert ring[6, 0] == ring[0, 10] == 2
    assert (ring.diff(dim=0) >= 0).all()
    assert (ring.diff(dim=1) >= 0).all()
    assert (low_frequencies_first(4, 4, 1.0) == 0).all()


def test_simba_ends_when_nothing_helps(mlp: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    """A step is a query at most, and a sample is done after all directions have failed both ways."""
    x, y = torch.rand(4, 3, 5), torch.zeros(4, dtype=torch.int64)
    still = linear(torch.zeros(2, 15), torch.tensor([2.0, 0.0]))
    for basis in ("dct", "pixel"):
        result = sp.attack(sp.Model(still), x, y, SimBA(basis=basis), sp.L2(1.0), keep="margin")
        assert (result.iterations <= 2 * 15 + 1).all()
        assert (result.queries.forward >= 15).all()
        masked = sp.L2(1.0, mask=torch.arange(15).view(3, 5) < 2)
        few = sp.attack(sp.Model(still), x, y, SimBA(basis="pixel"), masked)
        assert (few.iterations <= 2 * 2 + 1).all(), "features that cannot move are not tried"
    result = sp.attack(sp.Model(mlp), *samples, SimBA(steps=40), sp.Linf(0.05))
    assert (result.queries.forward <= 41).all()


# ZOO, for one sample


def tents(count: int, length: int) -> np.ndarray:
    """Bilinear interpolation with the values in the middle of their pixels, (count, length)."""
    result = np.zeros((count, length))
    for i in range(length):
        place = min(max((i + 0.5) * count / length - 0.5, 0), count - 1)
        low = min(int(place), count - 1)
        result[low, i] += 1 - (place - low)
        result[min(low + 1, count - 1), i] += place - low
    return result


def zoo(sample: int, target: int | None, attack: ZOO, tau: float) -> tuple[list[np.ndarray], int]:
    """Every point that is asked about after the input, and how many runs began."""
    label, origin, h = int(Y[sample]), ENDS[sample], attack.h
    channels, height, width = SHAPE
    grids = [(min(g, height), min(g, width)) for g in attack.grids] or [(height, width)]
    finest, c, low, high, points, runs, k = grids[-1], attack.initial_c, 0.0, math.inf, [], 0, 0

    def hinge(x: np.ndarray) -> float:
        return c * max(-(margin(x, label, target) - tau), 0)

    while runs < attack.searches:
        runs += 1
        y = np.zeros((channels, *finest))
        m, v, t, found = np.zeros_like(y), np.zeros_like(y), np.zeros(y.shape, int), False
        for step in range(attack.steps):
            level = sum(step >= g for g in attack.grow)
            rows, columns = grids[level]
            down, across = tents(rows, height), tents(columns, width)

            def point(y: np.ndarray, down: np.ndarray = down, across: np.ndarray = across) -> np.ndarray:
                return np.clip(origin + down.T @ y[:, : len(down), : len(across)] @ across, 0, 1)

            x = point(y)
            points.append(x)
            if margin(x, label, target) >= tau and not found:
                found, m, v, t = True, np.zeros_like(y), np.zeros_like(y), np.zeros(y.shape, int)
            for at, plus, minus in chosen(sample, k, attack, y, (rows, columns)):
                hat = np.zeros(SHAPE)
                hat[at[0]] = np.outer(down[at[1]], across[at[2]])
                ends = [np.clip(x + sign * h * hat, 0, 1) for sign in (1, -1)]
                plus.append(ends[0]), minus.append(ends[1])
                points.extend(ends)
                gaps = [float(((end - x) * hat).sum() / (hat**2).sum()) for end in ends]
                f = [hinge(end) for end in (*ends, x)]
                g = (f[0] - f[1]) / (gaps[0] - gaps[1]) + 2 * float((hat * (x - origin)).sum())
                if attack.solver == "newton":
                    bend = 2 * ((f[0] - f[2]) / gaps[0] - (f[1] - f[2]) / gaps[1]) / (gaps[0] - gaps[1]) if all(gaps) else 0
                    bend += 2 * float((hat**2).sum())
                    y[at] -= attack.learning_rate * g / (1 if bend < 0 else max(bend, 0.1))
                else:
                    t[at] += 1
                    m[at], v[at] = 0.9 * m[at] + 0.1 * g, 0.999 * v[at] + 0.001 * g * g
                    mean, square = m[at] / (1 - 0.9 ** t[at]), v[at] / (1 - 0.999 ** t[at])
                    y[at] -= attack.learning_rate * mean / (math.sqrt(square) + 1e-8)
            if not attack.grids:
                y = np.clip(y, -origin, 1 - origin)
            if sum(step + 1 >= g for g in attack.grow) > level:
                finer = [tents(old, new) for old, new in zip((rows, columns), grids[level + 1], strict=True)]
                y, old = np.zeros_like(y), y
                y[:, : grids[level + 1][0], : grids[level + 1][1]] = finer[0].T @ old[:, :rows, :columns] @ finer[1]
                m, v, t = np.zeros_like(y), np.zeros_like(y), np.zeros(y.shape, int)
            k += 1
        if found:
            high = min(high, c)
        else:
            low = max(low, c)
        last, c = y, 10 * c if math.isinf(high) else (low + high) / 2
    return [*points, point(last)], runs


def chosen(
    sample: int, k: int, attack: ZOO, y: np.ndarray, sides: tuple[int, int]
) -> list[tuple[tuple[int, int, int], list[np.ndarray], list[np.ndarray]]]:
    """The coordinates of a step: those with the largest log(u) / weight."""
    chance = keys(sample, k).uniform((y.size,), torch.float64)[0].numpy().reshape(y.shape)
    weight = np.ones_like(y)
    if attack.importance:
        side = max(min(attack.grids or (y.shape[1],)) // 8, 1)
        for c, i, j in itertools.product(*map(range, y.shape)):
            region = (slice(i // side * side, i // side * side + side), slice(j // side * side, j // side * side + side))
            weight[c, i, j] = np.abs(y[c][region]).max()
        weight = np.maximum(weight, 0.1 * weight.mean()) if weight.any() else np.ones_like(y)
    places = [at for at in itertools.product(*map(range, y.shape)) if at[1] < sides[0] and at[2] < sides[1]]
    places.sort(key=lambda at: -math.log(chance[at]) / weight[at])
    return [(at, [], []) for at in places[: attack.samples]]


@pytest.mark.parametrize(
    "attack",
    [
        ZOO(steps=12, searches=4, initial_c=0.3, samples=20, learning_rate=0.05),
        ZOO(steps=12, searches=2, initial_c=3.0, samples=20, solver="newton", learning_rate=0.3, h=1e-3),
        ZOO(steps=12, searches=2, initial_c=3.0, samples=6, grids=(2, 4, 16), grow=(3, 8), learning_rate=0.05),
        ZOO(steps=12, searches=2, initial_c=3.0, samples=6, importance=True, learning_rate=0.05),
        ZOO(steps=6, searches=2, initial_c=3.0, samples=100, learning_rate=0.05),
    ],
    ids=["adam", "newton", "grids", "importance", "all coordinates"],
)
@pytest.mark.parametrize("targeted", [False, True])
def test_equations_of_zoo(attack: ZOO, targeted: bool) -> None:
    for sample in range(len(X)):
        target = int(FARTHEST[sample]) if targeted else None
        tau = sp.Model(Curved()).probe(torch.from_numpy(ENDS[sample : sample + 1])).tau
        points = asked(attack, sp.Minimize("l2"), ENDS, sample, target)[1:]
        expected, runs = zoo(sample, target, attack, tau)
        assert runs == attack.searches
        assert len(points) == len(expected)
        np.testing.assert_allclose(points, expected, rtol=0, atol=2e-6)
        reached = [margin(x, int(Y[sample]), target) >= tau for x in points]
        assert targeted or attack.samples < 20 or any(reached), "there are runs that succeed"


def test_hats() -> None:
    torch.testing.assert_close(hats(7, 7), torch.eye(7, dtype=torch.float64), rtol=0, atol=0)
    for count, length in ((1, 5), (3, 8), (4, 8), (32, 50)):
        np.testing.assert_allclose(hats(count, length).numpy(), tents(count, length), atol=1e-12)
        torch.testing.assert_close(hats(count, length).sum(0), torch.ones(length, dtype=torch.float64))


def test_zoo_finds_what_gradients_find(mlp: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    """With queries in plenty it comes to the distances of Carlini & Wagner's attack, whose objective it minimises."""
    x, y = samples[0][:6], samples[1][:6]
    attack = ZOO(steps=100, searches=3, initial_c=1.0, samples=24, learning_rate=0.02)
    found = sp.attack(sp.Model(mlp, access=sp.Access.SCORES), x, y, attack, sp.Minimize("l2"))
    exact = sp.attacks.CarliniWagnerL2(steps=300, searches=5, initial_c=0.1)
    reference = sp.attack(sp.Model(mlp), x, y, exact, sp.Minimize("l2"))
    assert found.success.all()
    assert (found.distance <= 1.1 * reference.distance).sum() >= 5, "one may end in another minimum"


def test_zoo_draws_where_much_has_changed(samples: tuple[Tensor, Tensor]) -> None:
    """Only one corner matters to the model, so importance sampling asks about it more often."""
    weight = torch.zeros(2, 256, dtype=torch.float64)
    weight.view(2, 16, 16)[1, :4, :4] = 1.0
    x, y = torch.full((1, 1, 16, 16), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    shares = []
    for importance in (False, True):
        net = Recording(linear(weight, torch.tensor([60.0, 0.0], dtype=torch.float64)))
        model = sp.Model(net)
        model.probe(x)
        net.points.clear()
        attack = ZOO(steps=60, searches=1, initial_c=1.0, samples=8, importance=importance)
        sp.attack(model, x, y, attack, sp.Minimize("l2"))
        points = torch.cat(net.points[1:-1]).view(60, 17, 16, 16)[30:]
        changed = (points[:, 1:] - points[:, :1]).abs() > 1e-6
        shares.append(float(changed[:, :, :4, :4].sum() / changed.sum()))
    assert shares[0] < 0.15
    assert shares[1] > 0.3


ATTACKS = [SimBA(), SimBA(basis="pixel"), ZOO(samples=5)]
each_attack = pytest.mark.parametrize("attack", ATTACKS, ids=["SimBA-dct", "SimBA-pixel", "ZOO"])


@each_attack
def test_budgets_hold_to_the_query(attack: Attack) -> None:
    generator = torch.Generator().manual_seed(0)
    counting = Counting(nn.Sequential(nn.Flatten(), nn.Linear(40, 3)))
    x = torch.rand(3, 5, 8, generator=generator)
    y = sp.Model(counting.net).predict(x)
    model = sp.Model(counting, access=sp.Access.SCORES)
    model.probe(x)
    for queries in range(1, 61):
        counting.calls.clear()
        result = sp.attack(model, x, y, attack, sp.L2(1e-3), budget=sp.Budget(queries=queries))
        assert (result.queries.forward <= queries).all()
        assert (result.queries.forward[result.having("survived")] == queries).all()
        assert result.having("survived").any()
        assert counting.forward_rows == int(result.queries.forward.sum() + result.queries.verify.sum())


@pytest.mark.parametrize("grids", [(), (4,)])
def test_zoo_with_a_mask(grids: tuple[int, ...], mlp: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:6] = True
    attack = ZOO(steps=60, searches=2, initial_c=3.0, samples=40, learning_rate=0.05, grids=grids)
    for bounds in ((0, 1), None):
        result = sp.attack(sp.Model(mlp, bounds=bounds), *samples, attack, sp.Minimize("l2", mask=mask))
        assert torch.equal(result.adversarial[:, ~mask], samples[0][:, ~mask])
        assert result.having("fooled").sum() > 8
    if not grids:
        assert (result.queries.forward <= 1 + 120 * (1 + 2 * 32) + 1).all(), "nobody is asked about features that stay"


@pytest.mark.parametrize(
    ("attack", "settings"),
    [
        (SimBA, {"steps": 0}),
        (SimBA, {"basis": "wavelet"}),
        (SimBA, {"share": 0.0}),
        (SimBA, {"step_size": math.inf}),
        (SimBA, {"loss": "hinge"}),
        (ZOO, {"steps": 0}),
        (ZOO, {"samples": 0}),
        (ZOO, {"h": 0.0}),
        (ZOO, {"initial_c": -1.0}),
        (ZOO, {"solver": "sgd"}),
        (ZOO, {"grids": (32, 64)}),
        (ZOO, {"grids": (64, 32), "grow": (10,)}),
        (ZOO, {"grow": (10,)}),
        (ZOO, {"grids": (8.5,)}),
    ],
)
def test_bad_hyperparameters(attack: type[Attack], settings: dict[str, object]) -> None:
    with pytest.raises((sp.errors.InputError, sp.errors.UnknownNameError)):
        attack(**settings)
