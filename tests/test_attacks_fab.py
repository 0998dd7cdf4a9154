"""FAB against its equations, with the projections on hyperplane and box solved by other means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from contract_support import Counting, Recording, linear
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks.fab import FAB

_generator = torch.Generator().manual_seed(1)
W1, B1, W2, B2 = (torch.randn(*shape, generator=_generator, dtype=torch.float64) for shape in ((9, 6), (9,), (4, 9), (4,)))
X = 0.2 + 0.6 * torch.rand(5, 6, generator=_generator, dtype=torch.float64)
NORMS = {"linf": math.inf, "l2": 2, "l1": 1}


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), (2 * W1, B1, W2, B2), strict=True):
            parameter.copy_(value)
    return net


def logits(x: np.ndarray) -> np.ndarray:
    return W2.numpy() @ np.tanh(2 * W1.numpy() @ x + B1.numpy()) + B2.numpy()


def jacobian(x: np.ndarray) -> np.ndarray:
    hidden = np.tanh(2 * W1.numpy() @ x + B1.numpy())
    return (W2.numpy() * (1 - hidden**2)) @ (2 * W1.numpy())


Y = torch.tensor([int(np.argmax(logits(x.numpy()))) for x in X])


def project(x: np.ndarray, w: np.ndarray, gain: float, norm: str) -> np.ndarray:
    """The smallest d with <w, d> = gain and x + d in [0, 1]: by bisection of the multiplier, in l1 one feature at a time."""
    if gain < 0:
        w, gain = -w, -gain
    room = np.where(w > 0, 1 - x, x)
    if norm == "l1":
        d = np.zeros_like(x)
        for i in sorted(range(len(x)), key=lambda i: -abs(w[i])):
            d[i] = np.sign(w[i]) * min(room[i], (gain - w @ d) / abs(w[i]))
        return d
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        size = np.minimum(room, middle * (np.abs(w) if norm == "l2" else 1))
        low, high = (low, middle) if np.abs(w) @ size >= gain else (middle, high)
    return np.sign(w) * np.minimum(room, high * (np.abs(w) if norm == "l2" else 1))


def by_hand(x0: np.ndarray, y: int, norm: str, steps: int, tau: float, target: int | None = None) -> np.ndarray:
    """Algorithm 1 without restarts and search: its last iterate. Boundaries are those of a margin of 2 tau."""
    order, dual = NORMS[norm], {"linf": 1, "l2": 2, "l1": math.inf}[norm]
    x = x0.copy()
    for _ in range(steps):
        z, grads = logits(x), jacobian(x)
        rivals = [c for c in range(4) if c != y] if target is None else [target]
        near = min(rivals, key=lambda c: abs(z[c] - z[y] - 2 * tau) / np.linalg.norm(grads[c] - grads[y], dual))
        w, gain = grads[near] - grads[y], 2 * tau - (z[near] - z[y])
        ahead = project(x, w, gain, norm)
        direct = project(x0, w, gain + w @ (x - x0), norm)
        a, b = np.linalg.norm(ahead, order), np.linalg.norm(direct, order)
        alpha = min(a / (a + b), 0.1)
        x = np.clip((1 - alpha) * (x + 1.05 * ahead) + alpha * (x0 + 1.05 * direct), 0, 1)
        z = logits(x)
        if max(np.delete(z, y)) - z[y] >= tau:
            x = x0 + 0.9 * (x - x0)
    return x


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_equations(norm: str, steps: int) -> None:
    model = sp.Model(network())
    result = sp.attack(model, X, Y, FAB(steps=steps, search=0), sp.Minimize(norm), keep="last")
    expected = [by_hand(x.numpy(), int(y), norm, steps, result.tau) for x, y in zip(X, Y, strict=True)]
    np.testing.assert_allclose(result.adversarial.numpy(), np.stack(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_equations_towards_the_likeliest_class(norm: str) -> None:
    model = sp.Model(network())
    result = sp.attack(model, X, Y, FAB(steps=5, search=0, targets=1), sp.Minimize(norm), keep="last")
    ranked = [np.argsort(-logits(x.numpy())) for x in X]
    expected = [
        by_hand(x.numpy(), int(y), norm, 5, result.tau, int(order[1])) for x, y, order in zip(X, Y, ranked, strict=True)
    ]
    np.testing.assert_allclose(result.adversarial.numpy(), np.stack(expected), rtol=0, atol=1e-6)


def three_classes() -> tuple[sp.Model, Tensor, Tensor, Tensor]:
    """The likeliest rival of class 0 is 1, but 2 is nearer: its boundary is steeper. With the distance (l2) of each."""
    weight = torch.tensor([[0.0, 0, 0, 0], [1.0, 1, 0, 0], [0, 0, 8.0, -4]], dtype=torch.float64)
    model = sp.Model(linear(weight, torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)), bounds=(-4, 4))
    x = torch.zeros(1, 4, dtype=torch.float64)
    return model, x, torch.tensor([0]), torch.tensor([1 / 2**0.5, 3 / 80**0.5])


def test_targets() -> None:
    model, x, y, distances = three_classes()

    def found(**settings: object) -> float:
        return float(sp.attack(model, x, y, FAB(steps=10, **settings), sp.Minimize("l2")).distance[0])

    assert found(targets=1) == pytest.approx(float(distances[0]), rel=1e-3)
    assert found(targets=2) == pytest.approx(float(distances[1]), rel=1e-3)
    assert found() == pytest.approx(float(distances[1]), rel=1e-3), "the nearest boundary, not the likeliest class"
    assert found(classes=1) == pytest.approx(float(distances[0]), rel=1e-3)
    goal = sp.Targeted(1)
    result = sp.attack(model, x, y, FAB(steps=10, targets=2), sp.Minimize("l2"), goal)
    assert float(result.distance[0]) == pytest.approx(float(distances[0]), rel=1e-3)


def test_search_leads_back_to_the_boundary() -> None:
    model, x, y, distances = three_classes()
    far = sp.attack(model, x, y, FAB(steps=1, search=0), sp.Minimize("l2")).distance[0] / distances[1]
    near = sp.attack(model, x, y, FAB(steps=1), sp.Minimize("l2")).distance[0] / distances[1]
    assert far == pytest.approx(1.05, abs=1e-3)
    assert near < 1.0005
    assert near >= 1


def test_restarts_begin_within_half_of_the_best() -> None:
    recording = Recording(network())
    model = sp.Model(recording)
    once = sp.attack(model, X[:1], Y[:1], FAB(steps=4, search=0), sp.Minimize("l2"))
    model.probe(X[:1])
    recording.points.clear()
    more = sp.attack(model, X[:1], Y[:1], FAB(steps=4, search=0, restarts=3), sp.Minimize("l2"))
    assert more.distance[0] <= once.distance[0]
    points = torch.cat(recording.points)
    away = (points - X[0]).norm(dim=1)
    starts = away[[1 + 8, 1 + 16]]  # after the clean input, two points a step
    assert (starts > 0).all()
    assert (starts <= once.distance[0] / 2 + 1e-12).all()
    assert not torch.equal(points[9], points[17])
    assert FAB(restarts=2).randomized
    assert not FAB().randomized


SET = sp.Targeted(frozenset({int(Y[0] + 1) % 4, int(Y[0] + 2) % 4}))


@pytest.mark.parametrize(
    ("attack", "goal", "backward"),
    [
        (FAB(steps=3), None, 9),
        (FAB(steps=3, classes=2), None, 6),
        (FAB(steps=3, classes=7), None, 9),  # there are three rivals
        (FAB(steps=3, targets=2, restarts=2), None, 12),
        (FAB(steps=3, targets=9), None, 9),  # no runs towards classes that the model does not have
        (FAB(steps=3, targets=9), sp.Targeted("next"), 3),
        (FAB(steps=3), SET, 6),
        (FAB(steps=3, targets=9), SET, 3),
        (FAB(steps=3, targets=9), sp.Untargeted(top_k=2), 3),
    ],
    ids=repr,
)
def test_cost(attack: FAB, goal: sp.Targeted | None, backward: int) -> None:
    counting = Counting(network()).double()
    result = sp.attack(sp.Model(counting), X[:1], Y[:1], attack, sp.Minimize("l2"), goal)
    assert result.success.all()
    assert result.queries.backward.tolist() == [backward]
    assert counting.backward_rows == backward
    assert counting.forward_rows == int(result.queries.forward + result.queries.verify) + result.queries.probe


@pytest.mark.parametrize(
    "goal",
    [
        sp.Untargeted(top_k=2),
        sp.Untargeted(groups=(frozenset({0, 1}),)),
        sp.Untargeted(confidence=0.5),
        sp.Targeted("next", top_k=2),
        sp.FalsePositive(probability=0.8),
    ],
    ids=repr,
)
@pytest.mark.parametrize("targets", [None, 3])
def test_goals(goal: object, targets: int | None) -> None:
    result = sp.attack(sp.Model(network()), X, Y, FAB(steps=20, targets=targets), sp.Minimize("linf"), goal)
    assert result.success.all()
    assert (result.margin >= result.tau).all()


def test_a_start_without_bounds() -> None:
    model = sp.Model(network(), bounds=None)
    for norm in NORMS:
        result = sp.attack(model, X, Y, FAB(steps=20, restarts=2), sp.Minimize(norm))
        assert result.success.all()
        inside = sp.attack(sp.Model(network()), X, Y, FAB(steps=20), sp.Minimize(norm))
        assert (result.distance <= 1.05 * inside.distance).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"restarts": 0},
        {"targets": 0},
        {"classes": 0},
        {"alpha_max": 2},
        {"beta": 0},
        {"eta": 0.9},
    ],
)
def test_bad_settings(settings: dict[str, float]) -> None:
    with pytest.raises(sp.InputError, match=next(iter(settings))):
        FAB(**settings)
