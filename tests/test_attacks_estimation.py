"""NES, SPSA, Bandits and NATTACK against loops for one sample written from the papers, and what their gradients are worth."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from contract_support import Counting, Recording, linear
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks.estimation import NES, SPSA, Bandits, NAttack
from saddlepoint.engine import Attack
from saddlepoint.rng import Keys

SEED, SHAPE = 3, (2, 5, 6)
_generator = torch.Generator().manual_seed(1)
W = torch.randn(4, math.prod(SHAPE), generator=_generator, dtype=torch.float64).numpy() / 4
X = (0.02 + 0.96 * torch.rand(2, *SHAPE, generator=_generator, dtype=torch.float64)).numpy()
EPS = {"linf": 0.05, "l2": 0.3}  # nobody is fooled


class Curved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ torch.from_numpy(W).T)


def logits(x: np.ndarray) -> np.ndarray:
    return np.tanh(W @ x.ravel())


Y = np.array([logits(x).argmax() for x in X])
FARTHEST = np.array([logits(x).argmin() for x in X])
Goal = tuple[int, int | None]  # label and target


def cross_entropy(x: np.ndarray, goal: Goal) -> float:
    z, (label, target) = logits(x), goal
    log_p = z - math.log(np.exp(z).sum())
    return float(-log_p[label] if target is None else log_p[target])


def margin(x: np.ndarray, goal: Goal) -> float:
    z, (label, target) = logits(x), goal
    one = label if target is None else target
    rest = max(z[c] for c in range(len(z)) if c != one)
    return float(rest - z[one] if target is None else z[one] - rest)


def keys(sample: int, k: int, stream: int = 0) -> Keys:
    return Keys.of(SEED, torch.tensor([sample])).absorb(k).absorb(stream)


def normal(sample: int, k: int, shape: tuple[int, ...], stream: int = 0) -> np.ndarray:
    return keys(sample, k, stream).normal(shape, torch.float64)[0].numpy()


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


def along(norm: str, g: np.ndarray, step: float) -> np.ndarray:
    return step * np.sign(g) if norm == "linf" else step * g / size(g)


# The papers, for one sample: every point that is asked about after the input


def nes(norm: str, sample: int, goal: Goal, steps: int, step_size: float, loss: Callable[..., float]) -> list[np.ndarray]:
    x, velocity, rate, history, points = X[sample], np.zeros(SHAPE), step_size, [], []
    for k in range(steps):
        points += [x] if k else []
        g, losses = np.zeros(SHAPE), []
        for u in normal(sample, k, (5, *SHAPE)):
            pair = [np.clip(x + sign * 0.001 * u, 0, 1) for sign in (1, -1)]
            points += pair
            losses += [loss(point, goal) for point in pair]
            g += (losses[-2] * u - losses[-1] * u) / (10 * 0.001)
        velocity = 0.9 * velocity + 0.1 * g
        history = [*history, np.mean(losses)][-5:]
        if len(history) == 5 and history[-1] < history[0]:
            rate, history = max(rate / 2, step_size / 200), []
        x = project(norm, x + along(norm, velocity, rate), sample)
    NES_RATES.append(rate / step_size)
    return [*points, x]


NES_RATES: list[float] = []


def spsa(norm: str, sample: int, goal: Goal, steps: int, rate: float) -> list[np.ndarray]:
    x, m, v, points = X[sample], np.zeros(SHAPE), np.zeros(SHAPE), []
    for k in range(steps):
        points += [x] if k else []
        g = np.zeros(SHAPE)
        for u in keys(sample, k).sign((4, *SHAPE), torch.float64)[0].numpy():
            pair = [np.clip(x + sign * 0.01 * u, 0, 1) for sign in (1, -1)]
            points += pair
            g += (margin(pair[0], goal) - margin(pair[1], goal)) / 0.02 * u / 4
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = project(norm, x + rate * (m / (1 - 0.9 ** (k + 1))) / (np.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-8), sample)
    return [*points, x]


def bandits(norm: str, sample: int, goal: Goal, steps: int) -> list[np.ndarray]:
    """The exponentiated gradients as in the paper, on (prior + 1) / 2."""
    linf = norm == "linf"
    exploration, eta, rate, step = (1.0, 0.1, 100.0, EPS[norm] / 5) if linf else (0.01, 0.01, 0.1, EPS[norm] / 10)
    x, points, tiles = X[sample], [], (2, 2, 3)
    prior = np.zeros(tiles)

    def up(q: np.ndarray) -> np.ndarray:
        return q[:, [0, 0, 0, 1, 1]][:, :, [0, 0, 1, 1, 2, 2]]  # nearest: floor(place * tiles / side)

    for k in range(steps):
        noise = exploration * normal(sample, k, tiles) / math.sqrt(12)
        pair = []
        for sign in (1, -1):
            q = up(prior + sign * noise)
            pair.append(np.clip(x + eta * q / size(q), 0, 1))
        points += pair
        g = (cross_entropy(pair[0], goal) - cross_entropy(pair[1], goal)) / (eta * exploration) * noise
        if linf:
            real = (prior + 1) / 2
            forth, back = real * np.exp(rate * g), (1 - real) * np.exp(-rate * g)
            prior = 2 * forth / (forth + back) - 1
        else:
            prior = prior + rate * g
        x = project(norm, x + along(norm, up(prior), step), sample)
    return [*points, x]


def enlarged(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, with the values in the middle of their pixels."""

    def weights(count: int, length: int) -> np.ndarray:
        result = np.zeros((length, count))
        for i in range(length):
            place = min(max((i + 0.5) * count / length - 0.5, 0), count - 1)
            low = min(int(place), count - 1)
            result[i, low] += 1 - (place - low)
            result[i, min(low + 1, count - 1)] += place - low
        return result

    return weights(plane.shape[1], height) @ plane @ weights(plane.shape[2], width).T


def nattack(norm: str, sample: int, goal: Goal, steps: int) -> list[np.ndarray]:
    origin, points = X[sample], []
    mu = 0.001 * normal(sample, 0, (2, 4, 4), stream=1)

    def point(z: np.ndarray) -> np.ndarray:
        x = 0.5 + 0.55 * np.tanh(np.arctanh((origin - 0.5) / 0.55) + enlarged(z, *SHAPE[1:]))
        if norm == "linf":
            return np.clip(np.clip(x, origin - EPS[norm], origin + EPS[norm]), 0, 1)
        delta = np.clip(x, 0, 1) - origin
        return origin + delta * min(1.0, EPS[norm] / size(delta))

    for k in range(steps):
        us = normal(sample, k, (8, 2, 4, 4))
        asked = [point(mu + 0.1 * u) for u in us]
        points += asked
        f = np.array([margin(x, goal) for x in asked])
        mu = mu + 0.1 / (8 * 0.1) * np.einsum("i,i...->...", (f - f.mean()) / (f.std() + 1e-7), us)
    return [*points, point(mu)]


def asked(attack: Attack, norm: str, sample: int, target: int | None) -> np.ndarray:
    net = Recording(Curved())
    model, x = sp.Model(net, access=sp.Access.SCORES), torch.from_numpy(X[sample : sample + 1])
    model.probe(x)
    net.points.clear()
    goal = None if target is None else sp.Targeted(target)
    y, ids, threat = torch.from_numpy(Y[sample : sample + 1]), torch.tensor([sample]), sp.threats.ball(norm, EPS[norm])
    result = sp.attack(model, x, y, attack, threat, goal, seed=SEED, keep="margin", ids=ids)
    assert not result.success.any()
    points = torch.cat(net.points).numpy()
    assert np.array_equal(points[0], X[sample])
    return points[1:]


def check(attack: Attack, expected: Callable[[str, int, Goal], list[np.ndarray]], norm: str, targeted: bool) -> None:
    for sample in range(len(X)):
        target = int(FARTHEST[sample]) if targeted else None
        points = asked(attack, norm, sample, target)
        np.testing.assert_allclose(points, expected(norm, sample, (int(Y[sample]), target)), rtol=0, atol=2e-6)
        assert np.abs(points[-1] - X[sample]).max() > 0.01


both_goals = pytest.mark.parametrize("targeted", [False, True])
both_norms = pytest.mark.parametrize("norm", ["linf", "l2"])


@both_goals
@both_norms
def test_equations_of_nes(norm: str, targeted: bool) -> None:
    steps, step_size = 40, EPS[norm] / 5
    attack = NES(steps=steps, samples=10)
    check(attack, lambda *case: nes(*case, steps, step_size, margin), norm, targeted)
    attack = NES(steps=steps, samples=10, step_size=2 * EPS[norm], loss="cross_entropy")
    check(attack, lambda *case: nes(*case, steps, 2 * EPS[norm], cross_entropy), norm, targeted)
    assert min(NES_RATES) < 1, "the step size was lowered"


@both_goals
@both_norms
def test_equations_of_spsa(norm: str, targeted: bool) -> None:
    rate = EPS[norm] / 3 / (1 if norm == "linf" else math.sqrt(math.prod(SHAPE)))
    check(SPSA(steps=12, samples=8), lambda *case: spsa(*case, 12, rate), norm, targeted)
    check(SPSA(steps=12, samples=8, learning_rate=0.02), lambda *case: spsa(*case, 12, 0.02), norm, targeted)


@both_goals
@both_norms
def test_equations_of_bandits(norm: str, targeted: bool) -> None:
    check(Bandits(steps=30), lambda *case: bandits(*case, 30), norm, targeted)  # longer, and the paper's form is rounded to 1


@both_goals
@both_norms
def test_equations_of_nattack(norm: str, targeted: bool) -> None:
    check(NAttack(steps=12, samples=8, grid=4), lambda *case: nattack(*case, 12), norm, targeted)


# What the gradients are worth


def first_move(attack: Attack, gradient: Tensor, count: int = 6) -> Tensor:
    """Cosines (count,) between the first l2 step and the gradient of a linear model."""
    d = len(gradient)
    net = Recording(linear(torch.stack([torch.zeros_like(gradient), gradient]), torch.tensor([9.0, 0.0], dtype=torch.float64)))
    model, x = sp.Model(net), torch.full((count, d), 0.5, dtype=torch.float64)
    model.probe(x)
    net.points.clear()
    sp.attack(model, x, torch.zeros(count, dtype=torch.int64), attack, sp.L2(0.1), keep="margin")
    step = net.points[-1] - x
    return torch.cosine_similarity(step, gradient.expand_as(step))


@pytest.mark.parametrize(
    "attack",
    [
        lambda n: NES(steps=1, samples=n, momentum=0.0),
        lambda n: SPSA(steps=1, samples=n),
        lambda n: NAttack(steps=1, samples=n),
    ],
    ids=["NES", "SPSA", "NAttack"],
)
def test_estimates_converge_to_the_gradient(attack: Callable[[int], Attack]) -> None:
    """Of n random directions in d dimensions the estimate's cosine with the gradient is about sqrt(n / (n + d))."""
    d = 24
    gradient = torch.randn(d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if isinstance(attack(2), SPSA):
        gradient = gradient.sign()  # Adam's first step is the estimate's sign
    few, many = first_move(attack(16), gradient), first_move(attack(4000), gradient)
    assert (many > 0.99).all()
    assert 0.3 < few.mean() < 0.9


def test_bandits_learn_the_gradient() -> None:
    """The guess becomes the gradient on tiles, though no step knows more than two queries."""
    tiles = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradient = tiles.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()

    class Plane(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.zeros(len(x), dtype=x.dtype), x.flatten(1) @ gradient], 1)

    net = Recording(Plane())
    model, x = sp.Model(net, bounds=None), torch.zeros(6, 6, 6, dtype=torch.float64)
    model.probe(x)
    cosines = []
    for steps in (5, 400):
        net.points.clear()
        attack = Bandits(steps=steps, step_size=0.01, loss="margin")
        y = torch.zeros(6, dtype=torch.int64)
        sp.attack(model, x, y, attack, sp.L2(100.0), sp.Untargeted(confidence=1e6), keep="margin", batch_size=6)
        cosines.append(torch.cosine_similarity(net.points[-1].flatten(1), gradient.expand(6, -1)))
    assert cosines[1].mean() > 0.9
    assert cosines[0].mean() < 0.7


# Budgets, and what else may go wrong

ATTACKS = [NES(samples=10), SPSA(samples=10), Bandits(), NAttack(samples=10)]
each_attack = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)


@each_attack
def test_budgets_hold_to_the_query(attack: Attack) -> None:
    generator = torch.Generator().manual_seed(0)
    counting = Counting(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)))
    x = torch.rand(3, 2, 4, generator=generator)
    y = sp.Model(counting.net).predict(x)
    model = sp.Model(counting, access=sp.Access.SCORES)
    model.probe(x)
    for queries in range(1, 61):
        counting.calls.clear()
        result = sp.attack(model, x, y, attack, sp.Linf(1e-6), budget=sp.Budget(queries=queries))
        assert (result.queries.forward <= queries).all()
        assert (result.queries.forward[result.having("survived")] == queries).all()
        assert result.having("survived").any()
        assert counting.forward_rows == int(result.queries.forward.sum() + result.queries.verify.sum())


def test_bandits_ask_twice_a_step(mlp: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    result = sp.attack(sp.Model(mlp), *samples, Bandits(steps=30), sp.Linf(1e-3))
    assert (result.queries.forward[result.having("survived")] == 1 + 2 * 30 + 1).all()
    fooled = sp.attack(sp.Model(mlp), *samples, Bandits(steps=300), sp.L2(1.5))
    attacked = fooled.having("fooled")
    assert attacked.sum() > 10
    assert (fooled.queries.forward[attacked] <= 1 + 2 * fooled.iterations[attacked] + 2).all(), "few looks at the iterate"


def test_a_confident_network_has_a_margin(samples: tuple[Tensor, Tensor], mlp: nn.Module) -> None:
    """Where cross-entropy is rounded to 0, only the margin tells which way to go."""

    class Loud(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1e3 * mlp(x)

    x, y = samples[0], mlp(samples[0]).argmax(1)
    rates = [
        float(sp.attack(sp.Model(Loud()), x, y, NES(steps=30, loss=loss), sp.L2(1.5)).success.float().mean())
        for loss in ("margin", "cross_entropy")
    ]
    assert rates[0] > 0.9
    assert rates[1] < 0.5


@pytest.mark.parametrize("attack", [NES(steps=20), SPSA(steps=20, delta=1e-4)], ids=repr)
def test_samples_differ_on_a_grid(attack: Attack, samples: tuple[Tensor, Tensor], mlp: nn.Module) -> None:
    """Moves of less than half a level would be rounded away, and the differences with them."""
    x, y = (samples[0] * 255).round() / 255, samples[1]
    result = sp.attack(sp.Model(mlp), x, y, attack, sp.Linf(40 / 255, grid=1 / 255))
    assert result.having("fooled").sum() > 8


@each_attack
def test_a_mask_without_bounds(attack: Attack, samples: tuple[Tensor, Tensor], mlp: nn.Module) -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:6] = True
    budget = sp.Budget(queries=300)
    result = sp.attack(sp.Model(mlp, bounds=None), *samples, attack, sp.L2(3.0, mask=mask), budget=budget)
    assert torch.equal(result.adversarial[:, ~mask], samples[0][:, ~mask])
    assert result.having("fooled").sum() > 5


@pytest.mark.parametrize("grid", [3, 32])
def test_black_and_white_inputs_can_move(grid: int, samples: tuple[Tensor, Tensor], mlp: nn.Module) -> None:
    """tanh is flat at the ends of its range, so it must be wider than that of the inputs."""
    x = (samples[0] > 0.5).float()
    y = mlp(x).argmax(1)
    result = sp.attack(sp.Model(mlp), x, y, NAttack(steps=60, grid=grid), sp.Linf(0.4), keep="margin")
    assert result.success.float().mean() > 0.8


@pytest.mark.parametrize(
    ("attack", "factor", "queries"), [(NES(), 1.1, 3000), (SPSA(), 1.1, 3000), (Bandits(), 1.5, 3000), (NAttack(), 1.5, 3000)]
)
@both_norms
def test_linear_models(attack: Attack, factor: float, queries: int, norm: str) -> None:
    """How near the closed-form distance they come in 36 dimensions, tiles of 1; below it, nothing succeeds."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(2, 36, generator=generator)
    x = 0.3 + 0.4 * torch.rand(8, 36, generator=generator)
    w, lead = weight[1] - weight[0], torch.linspace(0.1, 0.5, 8)
    x -= (lead + x @ w)[:, None] * w / w.square().sum()
    distance = (lead / w.norm(p={"linf": 1, "l2": 2}[norm])).double()
    model, y = sp.Model(linear(weight, torch.zeros(2)), access=sp.Access.SCORES), torch.zeros(8, dtype=torch.int64)
    budget = sp.Budget(queries=queries)
    result = sp.attack(model, x, y, attack, sp.threats.ball(norm, factor * distance), budget=budget)
    assert result.success.all()
    below = sp.attack(model, x, y, attack, sp.threats.ball(norm, 0.99 * distance), budget=sp.Budget(queries=300))
    assert not below.success.any()


@pytest.mark.parametrize(
    ("attack", "settings"),
    [
        (NES, {"steps": 0}),
        (NES, {"samples": 3}),
        (NES, {"sigma": 0.0}),
        (NES, {"step_size": -1.0}),
        (NES, {"momentum": 1.0}),
        (NES, {"plateau": 1}),
        (NES, {"drop": 0.5}),
        (NES, {"loss": "hinge"}),
        (SPSA, {"samples": 0}),
        (SPSA, {"delta": math.inf}),
        (SPSA, {"learning_rate": 0.0}),
        (Bandits, {"tiles": 0}),
        (Bandits, {"prior_rate": 0.0}),
        (NAttack, {"samples": 1}),
        (NAttack, {"grid": 2.5}),
        (NAttack, {"sigma": -0.1}),
    ],
)
def test_bad_hyperparameters(attack: type[Attack], settings: dict[str, object]) -> None:
    with pytest.raises((sp.errors.InputError, sp.errors.UnknownNameError)):
        attack(**settings)
