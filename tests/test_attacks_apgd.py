"""Auto-PGD against a loop for one sample written from the papers, and what its schedule, starts and targets must be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from contract_support import Counting, Recording, linear
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks.apgd import APGD, APGDT
from saddlepoint.rng import Keys

SEED, FEATURES, CLASSES = 3, 12, 5
_generator = torch.Generator().manual_seed(1)
W1, B1, W2, B2 = (
    torch.randn(*shape, generator=_generator, dtype=torch.float64).numpy()
    for shape in ((9, FEATURES), (9,), (CLASSES, 9), (CLASSES,))
)
W1 *= 1.5
X = (0.1 + 0.8 * torch.rand(4, FEATURES, generator=_generator, dtype=torch.float64)).numpy()


def logits(x: np.ndarray) -> np.ndarray:
    return W2 @ np.tanh(W1 @ x + B1) + B2


Y = np.array([logits(x).argmax() for x in X])


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(FEATURES, 9), nn.Tanh(), nn.Linear(9, CLASSES)).double()
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), (W1, B1, W2, B2), strict=True):
            parameter.copy_(torch.from_numpy(value))
    return net


# The papers, for one sample


def pulled_back(x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
    return W1.T @ ((1 - np.tanh(W1 @ x + B1) ** 2) * (W2.T @ cotangent))


def cross_entropy(x: np.ndarray, y: int) -> tuple[float, np.ndarray]:
    z = logits(x)
    p = np.exp(z - z.max())
    p /= p.sum()
    return -math.log(p[y]), pulled_back(x, p - np.eye(CLASSES)[y])


def dlr(x: np.ndarray, y: int) -> tuple[float, np.ndarray]:
    """Eq. 6: -(z_y - max_{i != y} z_i) / (z_(1) - z_(3))."""
    z = logits(x)
    order = np.argsort(-z)
    rival = order[0] if order[0] != y else order[1]
    top, bottom, below = -(z[y] - z[rival]), z[order[0]] - z[order[2]], np.eye(CLASSES)
    slope = (below[rival] - below[y]) / bottom - top / bottom**2 * (below[order[0]] - below[order[2]])
    return top / bottom, pulled_back(x, slope)


def targeted_dlr(x: np.ndarray, y: int, t: int) -> tuple[float, np.ndarray]:
    """Eq. 7: -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)."""
    z = logits(x)
    order, unit = np.argsort(-z), np.eye(CLASSES)
    top, bottom = z[t] - z[y], z[order[0]] - (z[order[2]] + z[order[3]]) / 2
    lower = unit[order[0]] - (unit[order[2]] + unit[order[3]]) / 2
    return top / bottom, pulled_back(x, (unit[t] - unit[y]) / bottom - top / bottom**2 * lower)


def project(norm: str, x: np.ndarray, origin: np.ndarray, eps: float) -> np.ndarray:
    """On ball and [0, 1] together, by bisection on the multiplier."""
    if norm == "linf":
        return np.clip(np.clip(x, origin - eps, origin + eps), 0, 1)
    order = {"l2": 2, "l1": 1}[norm]

    def at(multiplier: float) -> np.ndarray:
        d = x - origin
        d = d / (1 + multiplier) if norm == "l2" else np.sign(d) * np.maximum(np.abs(d) - multiplier, 0)
        return np.clip(origin + d, 0, 1) - origin

    if np.linalg.norm(at(0.0), order) <= eps:
        return origin + at(0.0)
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(at(middle), order) > eps else (low, middle)
    return origin + at(high)


def checkpoints(steps: int) -> list[int]:
    p = [0.0, 0.22]
    while p[-1] <= 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    return sorted({math.ceil(round(share * steps, 9)) for share in p[1:] if share <= 1})


def auto_pgd(norm: str, f: object, origin: np.ndarray, start: np.ndarray, eps: float, steps: int) -> tuple[list, int]:
    """Algorithm 1 (2020): every point that is evaluated, and how often it went back to the best one."""
    x, previous, eta, backs = start, start, 2 * eps, 0
    points, values, best, best_value = [], [], None, -math.inf
    where, halved, at_last_check, since = [0, *checkpoints(steps)], True, -math.inf, 0
    for k in range(steps):
        points.append(x)
        value, gradient = f(x)
        since += bool(values and value > values[-1])
        values.append(value)
        if value > best_value:
            best, best_gradient, best_value = x, gradient, value
        if k in where[1:]:
            window = k - where[where.index(k) - 1]
            first = since < 0.75 * window
            second = not halved and at_last_check >= best_value
            halved, at_last_check, since = first or second, best_value, 0
            if halved:
                backs, eta, x, gradient = backs + 1, eta / 2, best, best_gradient
                values[-1] = best_value
        direction = np.sign(gradient) if norm == "linf" else gradient / np.linalg.norm(gradient)
        z = project(norm, x + eta * direction, origin, eps)
        after = z if k == 0 else project(norm, x + 0.75 * (z - x) + 0.25 * (x - previous), origin, eps)
        x, previous = after, x
    return [*points, x], backs


def l1_auto_pgd(
    f: object, origin: np.ndarray, start: np.ndarray, eps: float, phases: list[tuple[float, int]], largest: float | None
) -> tuple[list, int]:
    """Algorithm 1 (2021), over balls of the given radii: every point that is evaluated, and how often it went back."""
    points, x, backs = [], start, 0
    for number, (factor, steps) in enumerate(phases):
        radius = factor * eps
        x = project("l1", x, origin, radius)
        changed, spread = np.count_nonzero(x != origin), np.count_nonzero(x != origin) / 1.5
        if largest is not None:
            changed, spread = FEATURES, largest * FEATURES
        eta, best_value = radius, -math.inf
        for k in range(steps):
            points.append(x)
            value, gradient = f(x)
            if value > best_value:
                best, best_gradient, best_value = x, gradient, value
            if k and k % max(int(0.04 * (steps + (number == len(phases) - 1))), 1) == 0:
                now = np.count_nonzero(best != origin)
                if now < 0.95 * changed:
                    eta, x, gradient, backs = radius, best, best_gradient, backs + 1
                else:
                    eta = max(eta / 1.5, radius / 10)
                changed, spread = now, now / 1.5
            top = np.argsort(-np.abs(gradient))[: max(math.floor(spread), 1)]
            step = np.zeros(FEATURES)
            step[top] = np.sign(gradient[top]) / len(top)
            x = project("l1", x + eta * step, origin, radius)
        if number + 1 < len(phases):
            x = best
    return [*points, x], backs


def numbers(sample: int, *, restart: int | None = None) -> Keys:
    keys = Keys.of(SEED, torch.tensor([sample]))
    return (keys if restart is None else keys.absorb(restart)).absorb(0).absorb(0)


def start(norm: str, sample: int, eps: float, restart: int | None = None) -> np.ndarray:
    keys, origin = numbers(sample, restart=restart), X[sample]
    if norm == "linf":
        noise = 2 * keys.uniform((FEATURES,), torch.float64)[0].numpy() - 1
        return project(norm, origin + eps * noise / np.abs(noise).max(), origin, eps)
    noise = keys.normal((FEATURES,), torch.float64)[0].numpy()
    if norm == "l2":
        noise *= eps / np.linalg.norm(noise)
    return project(norm, origin + noise, origin, eps)


def evaluated(attack: object, threat: sp.threats.Threat, sample: int) -> np.ndarray:
    """What the network was asked about, after the clean prediction."""
    net = Recording(network())
    model = sp.Model(net)
    x = torch.from_numpy(X[sample : sample + 1])
    model.probe(x)
    net.points.clear()
    y = torch.tensor([int(Y[sample])])
    result = sp.attack(model, x, y, attack, threat, seed=SEED, keep="margin", ids=torch.tensor([sample]))
    points = torch.cat(net.points[: len(net.points) - int(result.success.sum())]).numpy()
    assert np.array_equal(points[0], X[sample])
    return points[1:]


@pytest.mark.parametrize("loss", ["cross_entropy", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_equations(norm: str, loss: str) -> None:
    eps, steps, backs = {"linf": 0.15, "l2": 0.5}[norm], 40, 0
    if loss == "dlr":  # beyond the third class's logit it is constant: only small steps say something
        eps /= 5
    for sample in range(len(X)):
        f = {"cross_entropy": cross_entropy, "dlr": dlr}[loss]
        y = int(Y[sample])
        expected, back = auto_pgd(norm, lambda x, f=f, y=y: f(x, y), X[sample], start(norm, sample, eps), eps, steps)
        found = evaluated(APGD(steps=steps, loss=loss), sp.threats.ball(norm, eps), sample)
        np.testing.assert_allclose(found, expected, atol=2e-4)  # near the top the best point is a matter of rounding
        backs += back
    assert backs > 4, "the step size was halved"


@pytest.mark.parametrize("multi_eps", [True, False])
def test_equations_l1(multi_eps: bool) -> None:
    eps, steps, backs = 0.8, 40, 0
    for sample in range(len(X)):
        phases = [(3.0, 12), (2.0, 12), (1.0, 16)] if multi_eps else [(1.0, steps)]
        begin, y = start("l1", sample, phases[0][0] * eps), int(Y[sample])
        share = None if multi_eps else 0.2
        expected, back = l1_auto_pgd(lambda x, y=y: cross_entropy(x, y), X[sample], begin, eps, phases, share)
        found = evaluated(APGD(steps=steps, multi_eps=multi_eps), sp.L1(eps), sample)
        np.testing.assert_allclose(found, expected, atol=2e-4)
        backs += back
    assert backs > 4, "sparser points were gone back to"


def test_equations_towards_targets() -> None:
    eps, steps, targets = 0.1, 10, 3
    for sample in range(len(X)):
        y = int(Y[sample])
        order = [c for c in np.argsort(-logits(X[sample])) if c != y]
        expected: list[np.ndarray] = []
        for turn in range(targets):
            begin = start("linf", sample, eps, restart=turn)
            f = lambda x, y=y, t=order[turn]: targeted_dlr(x, y, t)  # noqa: E731  # as in the paper
            expected += auto_pgd("linf", f, X[sample], begin, eps, steps)[0]
        found = evaluated(APGDT(steps=steps, targets=targets), sp.Linf(eps), sample)
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_checkpoints() -> None:
    """Those of the paper's 100 iterations, and that short runs have none twice."""
    windows = APGD(steps=100)._windows()
    assert windows.nonzero()[:, 0].tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
    for steps in (1, 2, 3, 7, 50, 1000):
        windows = APGD(steps=steps)._windows()
        assert windows.nonzero()[:, 0].tolist() == checkpoints(steps)
        assert int(windows.sum()) == checkpoints(steps)[-1]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 33, 100])
def test_l1_phases_take_all_steps(steps: int) -> None:
    radius, begins, check = APGD(steps=steps)._phases()
    assert len(radius) == len(begins) == len(check) == steps + 1
    assert radius[-1] == 1, "the last point is in the ball"
    assert radius.tolist() == sorted(radius.tolist(), reverse=True)
    assert not (begins & check).any()


@pytest.mark.parametrize("attack", [APGD(steps=8), APGDT(steps=8, targets=4), APGDT(steps=8, order="linear")])
def test_cost(attack: APGD | APGDT, mlp: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    counting = Counting(mlp)
    result = sp.attack(sp.Model(counting), *samples, attack, sp.Linf(1e-4), batch_size=5)
    survived, runs = result.having("survived"), getattr(attack, "targets", 1)
    assert survived.sum() > 10
    assert (result.queries.forward[survived] == 1 + runs * (8 + 1)).all(), "the clean prediction, and steps + 1 a run"
    ranking = 9 if getattr(attack, "order", "") == "linear" else 0
    assert (result.queries.backward[survived] == runs * 8 + ranking).all()
    assert counting.forward_rows == int(result.queries.forward.sum() + result.queries.verify.sum()) + result.queries.probe
    assert counting.backward_rows == int(result.queries.backward.sum())


def test_restarts_of_the_targeted_run(mlp: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    attack = sp.attacks.Restarts(APGDT(steps=3, targets=2), 2)
    result = sp.attack(sp.Model(mlp), *samples, attack, sp.Linf(1e-4))
    survived = result.having("survived")
    assert (result.queries.forward[survived] == 2 * (1 + 2 * (3 + 1))).all()


@pytest.mark.parametrize(
    ("goal", "classes", "runs"),
    [
        (None, 10, 9),
        (None, 3, 2),
        (None, 2, 1),
        (sp.Targeted("next"), 10, 1),
        (sp.Targeted({1, 2}), 10, 2),
        (sp.Untargeted(groups=(frozenset(range(7)),)), 10, 3),  # the labels are all in the group
    ],
)
def test_number_of_targets(goal: sp.Targeted | None, classes: int, runs: int) -> None:
    """As many runs as classes are wanted, but 9 at most; the constant model is never fooled."""
    net = linear(torch.zeros(classes, 6), torch.linspace(3, 0, classes))
    x, y = torch.full((4, 6), 0.5), torch.zeros(4, dtype=torch.int64)
    result = sp.attack(sp.Model(net), x, y, APGDT(steps=3), sp.L2(0.5), goal)
    assert result.status.tolist() == ["survived"] * 4
    assert result.queries.forward.tolist() == [1 + runs * 4] * 4


def test_it_finds_the_class_that_is_not_the_second_likeliest() -> None:
    """The likeliest other class is out of reach; only a run towards another one succeeds."""
    weight = torch.zeros(4, 8)
    weight[2] = 4.0
    net = linear(weight, torch.tensor([2.0, 1.9, 0.0, -1.0]) - torch.tensor([0.0, 0.0, 16.0, 0.0]))
    x, y = torch.full((3, 8), 0.5), torch.zeros(3, dtype=torch.int64)
    found = sp.attack(sp.Model(net), x, y, APGDT(steps=5), sp.Linf(0.1))
    assert found.status.tolist() == ["fooled"] * 3
    assert found.predicted.tolist() == [2] * 3
    only_one = sp.attack(sp.Model(net), x, y, APGDT(steps=5, targets=1), sp.Linf(0.1), keep="margin")
    forward, backward = only_one.queries.forward, only_one.queries.backward
    assert (forward[only_one.having("survived")] == 1 + 6).all()
    assert (backward[only_one.having("survived")] == 5).all()
    for norm, eps in (("linf", 0.1), ("l2", 0.3), ("l1", 0.6)):
        threat = sp.threats.ball(norm, eps)
        nearest = sp.attack(sp.Model(net), x, y, APGDT(steps=20, targets=1, order="linear"), threat)
        assert nearest.predicted.tolist() == [2] * 3
        assert (nearest.queries.backward >= 3).all()  # one for each other class
    with pytest.raises(sp.InputError, match="linear"):
        APGDT(order="likely")  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_start_is_on_the_surface(norm: str, mlp: nn.Module) -> None:
    """In the paper, and unlike in PGD, the start is scaled to the sphere."""
    net = Recording(mlp)
    x = torch.full((5, 1, 8, 8), 0.5)
    threat = sp.threats.ball(norm, 0.2)
    sp.attack(sp.Model(net), x, torch.zeros(5, dtype=torch.int64), APGD(steps=1), threat, keep="margin", goal=sp.Targeted(3))
    distance = threat.distance(net.points[-2], x[: len(net.points[-2])])
    np.testing.assert_allclose(distance.numpy(), 0.2, rtol=1e-5)


def test_masked_features_take_no_part(mlp: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    """In l1 a masked feature with a large gradient must not be counted among those that a step moves."""
    weight = torch.zeros(2, 10)
    weight[1, :5], weight[1, 5:] = 100.0, torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6])
    net = linear(weight, torch.tensor([252.6, 0.0]))  # x = 1/2 lies 0.6 below
    mask = torch.arange(10) >= 5
    x, y = torch.full((1, 10), 0.5), torch.zeros(1, dtype=torch.int64)
    result = sp.attack(sp.Model(net), x, y, APGD(steps=60, loss="margin"), sp.L1(0.7, mask=mask), keep="margin")
    assert result.success.all()
    torch.testing.assert_close(result.margin, torch.tensor([0.5 + 0.2 * 0.9 - 0.6], dtype=torch.float64), atol=0.02, rtol=0)


def test_other_ranges_of_inputs() -> None:
    """Inputs in [0, 255] are attacked as those in [0, 1] are: nothing in it has a scale."""
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    wide = nn.Sequential(_Divide(255.0), network())
    for norm, eps in (("linf", 0.1), ("l2", 0.4), ("l1", 0.8)):
        unit = sp.attack(sp.Model(network()), x, y, APGD(steps=20), sp.threats.ball(norm, eps), keep="margin")
        scaled = sp.Model(wide, bounds=(0, 255))
        same = sp.attack(scaled, 255 * x, y, APGD(steps=20), sp.threats.ball(norm, 255 * eps), keep="margin")
        torch.testing.assert_close(same.adversarial / 255, unit.adversarial, atol=1e-4, rtol=0)


class _Divide(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x / self.by


def test_perturb(mlp: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples[0], mlp(samples[0]).argmax(1)
    for attack in (APGD(steps=10), APGDT(steps=5, targets=2)):
        adversarial = sp.perturb(mlp, x, y, attack, sp.Linf(0.2))
        assert sp.Linf(0.2).contains(adversarial, x).all()
        assert (mlp(adversarial).argmax(1) != y).float().mean() > 0.7


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"steps": 1.5}, {"rho": -0.1}, {"rho": 2}, {"loss": "hinge"}, {"targets": 0}], ids=str
)
def test_bad_hyperparameters(settings: dict[str, object]) -> None:
    with pytest.raises((sp.errors.InputError, sp.errors.UnknownNameError)):
        APGDT(**settings)
