"""L-BFGS, EAD and the attacks of Carlini & Wagner: the papers' equations, SciPy, closed forms, and the known traps."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks.carlini_wagner import CarliniWagnerL0, CarliniWagnerL2, CarliniWagnerLinf, Seen, worth_keeping
from saddlepoint.attacks.penalty import EAD, LBFGS, MEMORY, Descent, Penalised, Search, newton
from saddlepoint.threats import Threat

# A network with one hidden layer, its logits and their derivative written out in NumPy
_generator = torch.Generator().manual_seed(1)
W1, B1, W2, B2 = (torch.randn(*s, generator=_generator, dtype=torch.float64) for s in ((12, 8), (12,), (4, 12), (4,)))
W1 *= 1.5
X = torch.rand(6, 8, generator=_generator, dtype=torch.float64)
X[:, 0], X[:, 1] = 0.0, 1.0  # at the ends of the range
NET = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()
with torch.no_grad():
    for parameter, values in zip(NET.parameters(), (W1, B1, W2, B2), strict=True):
        parameter.copy_(values)
Y = NET(X).argmax(1)
TARGETS = NET(X).topk(2, dim=1).indices[:, 1]
A1, C1, A2, C2 = (t.numpy() for t in (W1, B1, W2, B2))
Array = np.ndarray


def forward(x: Array) -> tuple[Array, Array]:
    """Logits and their derivative (4, 8)."""
    hidden = np.tanh(A1 @ x + C1)
    return A2 @ hidden + C2, (A2 * (1 - hidden**2)) @ A1


def margin(x: Array, label: int, target: int | None) -> tuple[float, Array]:
    """By how much the goal is reached, and its derivative."""
    z, jacobian = forward(x)
    others = [c for c in range(4) if c != (label if target is None else target)]
    rival = max(others, key=lambda c: z[c])
    up, down = (rival, label) if target is None else (target, rival)
    return z[up] - z[down], jacobian[up] - jacobian[down]


def path(attack: Penalised, threat: Threat, i: int, target: int | None, confidence: float = 0.0) -> tuple[Array, float]:
    """The iterates of the sample i, one a step, and the margin that a success needs."""
    points: list[Tensor] = []
    goal = sp.Untargeted(confidence=confidence) if target is None else sp.Targeted(target, confidence=confidence)
    result = sp.attack(
        sp.Model(NET), X[i : i + 1], Y[i : i + 1], attack, threat, goal, callback=lambda record: points.append(record.points)
    )
    return torch.cat(points).numpy(), result.tau + confidence


class Adam:
    """Kingma & Ba 2015, algorithm 1."""

    def __init__(self, rate: float) -> None:
        self.rate, self.t, self.m, self.v = rate, 0, 0.0, 0.0

    def __call__(self, g: Array) -> Array:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g * g
        return -self.rate * (self.m / (1 - 0.9**self.t)) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)


END = math.atanh(1 / 1.1)  # the range of x(w) is a tenth wider than [0, 1]


def x_of(w: Array) -> Array:
    return np.clip(0.5 + 0.55 * np.tanh(w), 0, 1)


def w_of(x: Array) -> Array:
    return np.arctanh((x - 0.5) / 0.55)


def next_w(w: Array, gradient: Array, adam: Adam) -> Array:
    return np.clip(w + adam(gradient * 0.55 * (1 - np.tanh(w) ** 2)), -END, END)


def carlini_wagner_l2(i: int, target: int | None, needed: float, steps: int, searches: int, c: float, rate: float) -> Array:
    x0, label, iterates = X[i].numpy(), int(Y[i]), []
    low, high = 0.0, math.inf
    for search in range(searches):
        w, adam, found = w_of(x0), Adam(rate), False
        for _ in range(steps):
            x = x_of(w)
            f, g = margin(x, label, target)
            found = found or f >= needed
            w = next_w(w, 2 * (x - x0) - (c * g if f < needed else 0.0), adam)
            iterates.append(x_of(w))
        if search + 1 < searches:
            iterates[-1] = x0  # the next run starts there
        if found:
            high = min(high, c)
        else:
            low = max(low, c)
        c = (low + high) / 2 if high < math.inf else 10 * c
    return np.stack(iterates)


@pytest.mark.parametrize(("targeted", "confidence"), [(False, 0.0), (False, 0.5), (True, 0.0)])
def test_carlini_wagner_l2_equations(targeted: bool, confidence: float) -> None:
    attack = CarliniWagnerL2(steps=30, searches=4, initial_c=0.02, learning_rate=0.05, abort_early=False)
    won = 0
    for i in range(2):
        target = int(TARGETS[i]) if targeted else None
        got, needed = path(attack, sp.Minimize("l2"), i, target, confidence)
        expected = carlini_wagner_l2(i, target, needed, 30, 4, 0.02, 0.05)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)
        won += any(margin(x, int(Y[i]), target)[0] >= needed for x in expected)
    assert won == 2, "both branches of the search are taken"


def carlini_wagner_linf(i: int, needed: float, steps: int, searches: int, c: float, largest: float, rate: float) -> Array:
    x0, label, iterates = X[i].numpy(), int(Y[i]), []
    tau, w, adam, k = 1.0, w_of(x0), Adam(rate), 0
    while searches and c <= largest:
        x = x_of(w)
        f, g = margin(x, label, None)
        excess = np.maximum(np.abs(x - x0) - tau, 0)
        k += 1
        if f >= needed and excess.sum() + c * max(needed - f, 0.0) < 1e-4 * c:
            tau, adam, k, searches = 0.9 * min(tau, np.abs(x - x0).max()), Adam(rate), 0, searches - 1
        elif k == steps:
            c, adam, k, searches = 2 * c, Adam(rate), 0, searches - 1
        slope = np.sign(x - x0) * (np.abs(x - x0) > tau)
        w = next_w(w, slope - (c * g if f < needed else 0.0), adam)
        iterates.append(x_of(w))
    return np.stack(iterates)


def test_carlini_wagner_linf_equations() -> None:
    attack = CarliniWagnerLinf(steps=9, searches=40, initial_c=0.05, learning_rate=0.02, largest=1.0)  # too short to stall
    for i in range(2):
        got, needed = path(attack, sp.Minimize("linf"), i, None)
        expected = carlini_wagner_linf(i, needed, 9, 40, 0.05, 1.0, 0.02)
        assert len(expected) > 40
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


def carlini_wagner_l0(i: int, needed: float, steps: int, searches: int, c: float, largest: float, rate: float) -> list[Array]:
    x0, label, iterates = X[i].numpy(), int(Y[i]), []
    w, adam, k, free = w_of(x0), Adam(rate), 0, np.ones(8, dtype=bool)
    while searches and c <= largest and free.any():
        x = np.where(free, x_of(w), x0)
        f, g = margin(x, label, None)
        k += 1
        if f >= needed:
            changed = [e for e in range(8) if x[e] != x0[e]]
            for rank, e in enumerate(sorted(changed, key=lambda e: g[e] * (x - x0)[e])):
                free[e] = False
                if g[e] * (x - x0)[e] > 0.01 or rank + 1 >= 0.3 * len(changed) ** 0.5:
                    break
            free &= x != x0
            w, adam, k, searches = np.where(free, w, w_of(x0)), Adam(rate), 0, searches - 1
        else:
            if k == steps:
                c, adam, k, searches = 2 * c, Adam(rate), 0, searches - 1
            w = np.where(free, next_w(w, (2 * (x - x0) - c * g) * free, adam), w)
        iterates.append(np.where(free, x_of(w), x0))
    return iterates


def test_carlini_wagner_l0_equations() -> None:
    attack = CarliniWagnerL0(steps=9, searches=60, initial_c=0.1, learning_rate=0.1, largest=50.0)
    for i in range(2):
        got, needed = path(attack, sp.Minimize("l0"), i, None)
        expected = np.stack(carlini_wagner_l0(i, needed, 9, 60, 0.1, 50.0, 0.1))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)
        features = (expected != X[i].numpy()).sum(1)
        assert features.max() - features[-1] >= 3, "features were given up"


def ead(i: int, needed: float, steps: int, searches: int, c: float, rate: float, beta: float, momentum: bool) -> Array:
    x0, label, iterates = X[i].numpy(), int(Y[i]), []
    low, high = 0.0, math.inf
    for search in range(searches):
        x = y = x0
        found = False
        for k in range(steps):
            f, g = margin(y, label, None)
            if not momentum:
                found = found or f >= needed
            z = y - rate * math.sqrt(1 - k / steps) * (2 * (y - x0) - (c * g if f < needed else 0.0))
            shrunk = np.where(z - x0 > beta, np.minimum(z - beta, 1), np.where(z - x0 < -beta, np.maximum(z + beta, 0), x0))
            before, x = x, shrunk
            stuck = (y == x0).all() and (x == x0).all()
            y = x + k / (k + 3) * (x - before) if momentum else x
            if momentum:
                found = found or margin(x, label, None)[0] >= needed
            iterates.append(x)
            if stuck:
                break  # all further steps are shorter
        if search + 1 < searches:
            iterates[-1] = x0
        if found:
            high = min(high, c)
        else:
            low = max(low, c)
        c = (low + high) / 2 if high < math.inf else 10 * c
    return np.stack(iterates)


@pytest.mark.parametrize("momentum", [True, False])
def test_ead_equations(momentum: bool) -> None:
    attack = EAD(steps=30, searches=5, initial_c=0.01, learning_rate=0.05, beta=0.02, momentum=momentum)
    for i in range(2):
        got, needed = path(attack, sp.Minimize("l1"), i, None)
        expected = ead(i, needed, 30, 5, 0.01, 0.05, 0.02, momentum)
        assert 30 < len(expected) < 150, "the first run got stuck, the others did not"
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


# The search over c, and L-BFGS against SciPy


def bisection(succeeds: Callable[[float], bool], c: float, searches: int, geometric: bool) -> list[float]:
    """The weights that are tried, one sample at a time."""
    low, high, tried = 0.0, math.inf, []
    for _ in range(searches):
        tried.append(c)
        if succeeds(c):
            high = min(high, c)
        else:
            low = max(low, c)
        if high == math.inf:
            c *= 10
        elif geometric:
            c = math.sqrt(low * high) if low > 0 else c / 10
        else:
            c = (low + high) / 2
    return tried


@pytest.mark.parametrize("geometric", [False, True])
def test_search_over_c(geometric: bool) -> None:
    """Samples at different runs and steps in one batch; each needs another c, one none that is found."""
    needs = torch.tensor([1e-5, 0.03, 0.7, 42.0, math.inf], dtype=torch.float64)
    search, steps = Search.start(needs, 0.1), 3
    tried: list[list[float]] = [[] for _ in needs]
    for tick in range(3 * 9):
        for i in range(5):
            if search.k[i] == 0:
                tried[i].append(float(search.c[i]))
        success = (search.c >= needs) & (search.k == 1)
        search, over = search.stepped(success, steps)
        over = over | torch.tensor([tick % 3 == i for i in range(5)])  # some end early, wherever they are
        if bool((over & (search.k == 1)).any()):  # before their only success: as if it had come
            search = Search(**{**vars(search), "found": search.found | (over & (search.c >= needs))})
        search = search.narrowed(over, geometric=geometric)
    for i, need in enumerate(needs.tolist()):
        count = len(tried[i])
        assert count >= 9
        np.testing.assert_allclose(tried[i], bisection(lambda c, need=need: c >= need, 0.1, count, geometric), rtol=1e-12)


def objective(x0: Array, i: int, target: int | None, c: float) -> Callable[[Array], tuple[float, Array]]:
    """||r||^2 - c log p(wanted), and its derivative."""

    def at(x: Array) -> tuple[float, Array]:
        z, jacobian = forward(x)
        p = np.exp(z - z.max())
        p /= p.sum()
        wanted = np.arange(4) != int(Y[i]) if target is None else np.arange(4) == target
        inside = p * wanted / p[wanted].sum()
        return float(((x - x0) ** 2).sum() - c * np.log(p[wanted].sum())), 2 * (x - x0) - c * (inside - p) @ jacobian

    return at


def scipy_minimiser(i: int, target: int | None, c: float) -> tuple[Array, float]:
    x0 = X[i].numpy()
    found = minimize(objective(x0, i, target, c), x0, jac=True, method="L-BFGS-B", bounds=[(0, 1)] * 8)
    return found.x, float(found.fun)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("c", [0.03, 0.3, 3.0])
def test_lbfgs_minimises_as_well_as_scipy(c: float, targeted: bool) -> None:
    held = 0
    for i in range(6):
        target = int(TARGETS[i]) if targeted else None
        got, _ = path(LBFGS(steps=80, searches=1, initial_c=c), sp.Minimize("l2"), i, target)
        reached = min(objective(X[i].numpy(), i, target, c)(x)[0] for x in got)
        x, best = scipy_minimiser(i, target, c)
        assert reached <= best + 0.02 * abs(best)
        held += int(((x == 0) | (x == 1)).sum())
    assert held > 6 or c < 0.3, "the box is felt"


def test_lbfgs_finds_what_a_search_with_scipy_finds() -> None:
    for i in range(3):
        target, smallest = int(TARGETS[i]), math.inf

        def succeeds(c: float, i: int = i, target: int = target) -> bool:
            nonlocal smallest
            x, _ = scipy_minimiser(i, target, c)
            won = margin(x, int(Y[i]), target)[0] > 0
            if won:
                smallest = min(smallest, float(np.linalg.norm(x - X[i].numpy())))
            return won

        bisection(succeeds, 0.01, 10, geometric=True)
        result = sp.attack(sp.Model(NET), X[i : i + 1], Y[i : i + 1], LBFGS(), sp.Minimize("l2"), sp.Targeted(target))
        assert result.success.all()
        assert float(result.distance[0]) <= 1.02 * smallest


def test_two_loop_recursion_is_the_bfgs_update() -> None:
    """H_(j+1) = (I - r s y') H_j (I - r y s') + r s s', from H_0 = scale * I, for as many pairs as there are."""
    generator = torch.Generator().manual_seed(2)
    batch, size = 4, 6
    hessian = torch.randn(batch, size, size, generator=generator, dtype=torch.float64)
    hessian = hessian @ hessian.mT + torch.eye(size, dtype=torch.float64)
    moves = torch.randn(batch, MEMORY, size, generator=generator, dtype=torch.float64)
    turns = moves @ hessian
    rates = 1 / (moves * turns).sum(2)
    for i in range(batch):
        rates[i, : MEMORY - i - 1] = 0.0  # sample i remembers i + 1 pairs
    scale = torch.rand(batch, generator=generator, dtype=torch.float64) + 0.5
    slope = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    nothing = torch.zeros(batch)
    search = Search.start(scale, 1.0)
    state = Descent(nothing, slope, scale, slope, nothing > 0, slope, scale, moves, turns, rates, scale, search)
    for i in range(batch):
        h, eye = scale[i] * torch.eye(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
        for j in range(MEMORY):
            if rates[i, j] > 0:
                s, y, r = moves[i, j], turns[i, j], rates[i, j]
                h = (eye - r * torch.outer(s, y)) @ h @ (eye - r * torch.outer(y, s)) + r * torch.outer(s, s)
        torch.testing.assert_close(newton(state, slope)[i], -h @ slope[i])


# Closed forms on a linear model: f = w x + b, far from the box


def linear(weight: Tensor, bias: float) -> nn.Module:
    net = nn.Linear(len(weight), 2, dtype=torch.float64)
    with torch.no_grad():
        net.weight.copy_(torch.stack([torch.zeros_like(weight), weight]))
        net.bias.copy_(torch.tensor([0.0, bias]))
    return net


WEIGHT = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
POINTS = torch.tensor([[0.5, 0.5, 0.5, 0.4], [0.6, 0.4, 0.5, 0.5]], dtype=torch.float64)
LEAD = POINTS @ WEIGHT - 0.85  # of class 1


@pytest.mark.parametrize(
    ("attack", "norm", "dual"),
    [
        (EAD(steps=60, searches=8, initial_c=0.1, beta=0.02), "l1", math.inf),  # a large beta leaves one feature
        (EAD(steps=60, searches=8, initial_c=0.1, beta=0.0), "l2", 2),
        (LBFGS(), "l2", 2),
        (CarliniWagnerL2(steps=100, searches=8, initial_c=0.1), "l2", 2),
        (CarliniWagnerLinf(steps=40, initial_c=0.01, largest=1.0), "linf", 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_closed_form(attack: Penalised, norm: str, dual: float) -> None:
    net, y = linear(WEIGHT, -0.85), torch.ones(2, dtype=torch.int64)
    expected = LEAD / torch.linalg.vector_norm(WEIGHT, dual)
    result = sp.attack(sp.Model(net), POINTS, y, attack, sp.Minimize(norm))
    torch.testing.assert_close(result.distance, expected, rtol=0.03 if norm != "linf" else 0.1, atol=0)
    assert (result.distance >= expected).all()


def test_beta_trades_l2_for_l1() -> None:
    """What EAD finds has less l1 and more l2 distance as beta grows."""
    away = [
        sp.attack(sp.Model(NET), X, Y, EAD(steps=50, searches=4, initial_c=1.0, beta=beta), sp.Minimize("l1")).distances
        for beta in (0.0, 0.01)
    ]
    assert away[1]["l1"].mean() < 0.9 * away[0]["l1"].mean()
    assert away[1]["l2"].mean() > away[0]["l2"].mean()


# The known traps, and the promises of the docstrings

EVERY = [
    (LBFGS(), "l2"),
    (EAD(steps=40, searches=4, initial_c=1.0, learning_rate=0.03), "l1"),
    (CarliniWagnerL2(steps=40, searches=4, initial_c=1.0, learning_rate=0.05), "l2"),
    (CarliniWagnerLinf(steps=20, initial_c=0.1, learning_rate=0.02, largest=2.0), "linf"),
    (CarliniWagnerL0(steps=20, initial_c=1.0, learning_rate=0.1, largest=100.0), "l0"),
]
each = pytest.mark.parametrize(
    ("attack", "norm"), EVERY, ids=lambda value: type(value).__name__ if value in dict(EVERY) else ""
)


class Rescaled(nn.Module):
    def __init__(self, low: float, width: float) -> None:
        super().__init__()
        self.low, self.width = low, width

    def forward(self, x: Tensor) -> Tensor:
        return NET((x - self.low) / self.width)


@each
def test_units_do_not_matter(attack: Penalised, norm: str) -> None:
    """Inputs in [-32, 224] give the same points as in [0, 1]; powers of two, so that they are the same to the bit or nearly."""
    unit = sp.attack(sp.Model(NET), X, Y, attack, sp.Minimize(norm))
    other = sp.attack(sp.Model(Rescaled(-32.0, 256.0), bounds=(-32, 224)), X * 256 - 32, Y, attack, sp.Minimize(norm))
    assert unit.success.all()
    torch.testing.assert_close((other.adversarial + 32) / 256, unit.adversarial, rtol=0, atol=2e-3)


@each
def test_black_and_white_inputs_are_not_frozen(attack: Penalised, norm: str) -> None:
    """With pixels at exactly 0 and 1 only, tanh is as flat as it gets."""
    x = (X > 0.5).double()
    y = NET(x).argmax(1)
    result = sp.attack(sp.Model(NET), x, y, attack, sp.Minimize(norm))
    assert result.success.all()
    if norm == "l2":
        reference = sp.attack(sp.Model(NET), x, y, sp.attacks.Bisect(sp.attacks.PGD(steps=20)), sp.Minimize("l2"))
        assert (result.distance <= 1.2 * reference.distance).all()


@each
def test_masked_features_stay_and_unbounded_inputs_work(attack: Penalised, norm: str) -> None:
    mask = torch.tensor([True] * 6 + [False] * 2)
    result = sp.attack(sp.Model(NET), X, Y, attack, sp.Minimize(norm, mask=mask))
    assert torch.equal(result.adversarial[:, ~mask], X[:, ~mask])
    assert result.success.any()
    nothing = sp.attack(sp.Model(NET), X, Y, attack, sp.Minimize(norm, mask=~mask & mask))
    assert not nothing.success.any()
    if norm != "l0":
        free = sp.attack(sp.Model(NET, bounds=None), X, Y, attack, sp.Minimize(norm))
        assert free.success.all()
        assert torch.isfinite(free.adversarial).all()


@each
def test_confidence(attack: Penalised, norm: str) -> None:
    result = sp.attack(sp.Model(NET), X, Y, attack, sp.Minimize(norm), sp.Untargeted(confidence=1.0))
    logits = NET(result.adversarial).detach()
    own = logits.gather(1, Y[:, None])[:, 0]
    lead = logits.masked_fill(nn.functional.one_hot(Y, 4).bool(), -math.inf).amax(1) - own
    assert result.success.sum() >= 4
    assert (lead[result.success] >= 1.0).all()


def test_without_a_gradient_lbfgs_and_ead_end_at_once() -> None:
    """Every run of L-BFGS is one evaluation, every run of EAD one step: nothing that follows could change anything."""
    model = sp.Model(linear(torch.zeros(4, dtype=torch.float64), 2.0))
    y = torch.ones(2, dtype=torch.int64)
    result = sp.attack(model, POINTS, y, LBFGS(), sp.Minimize("l2"))
    assert (result.iterations == LBFGS().searches).all()
    result = sp.attack(model, POINTS, y, EAD(), sp.Minimize("l1"))
    assert (result.iterations == EAD().searches).all()


def test_abort_early_saves_steps_and_hardly_costs_distance() -> None:
    runs = [
        sp.attack(
            sp.Model(NET), X, Y, CarliniWagnerL2(steps=800, searches=1, initial_c=0.5, abort_early=abort), sp.Minimize("l2")
        )
        for abort in (True, False)
    ]
    assert (runs[1].iterations == 800).all()
    assert runs[0].iterations.double().mean() < 700
    assert (runs[0].distance <= 1.02 * runs[1].distance).all()


def test_whole_pixels() -> None:
    """With per="pixel" the channels of a pixel are put back together, those of the pixel that brought least first."""
    gradient = torch.tensor([[[[1.0, 1.0, 1.0, 1.0]], [[1.0, -2.0, 1.0, 1.0]]]])  # two channels, four pixels
    delta = torch.tensor([[[[0.3, 0.5, 0.0, 0.0]], [[0.3, 0.1, 0.0, 0.2]]]])
    nothing = torch.zeros(1)
    seen = Seen(delta, gradient, nothing, nothing)
    assert worth_keeping(seen, whole_pixels=True).tolist() == [[[[True, True, False, False]], [[True, True, False, False]]]]
    assert worth_keeping(seen, whole_pixels=False).tolist() == [[[[True, True, False, False]], [[True, False, False, True]]]]
    net = nn.Sequential(nn.Flatten(), NET)
    x = X.view(6, 2, 2, 2)
    result = sp.attack(sp.Model(net), x, Y, EVERY[-1][0], sp.Minimize("l0", per="pixel"))
    assert result.success.all()
    assert (result.distance < 4).any()


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (LBFGS, {"steps": 0}),
        (LBFGS, {"initial_c": 0.0}),
        (EAD, {"searches": 2.5}),
        (EAD, {"beta": -1.0}),
        (CarliniWagnerL2, {"learning_rate": math.inf}),
        (CarliniWagnerLinf, {"decrease": 1.0}),
        (CarliniWagnerL0, {"largest": 0}),
    ],
)
def test_bad_settings(cls: type[Penalised], settings: dict[str, float]) -> None:
    with pytest.raises(sp.InputError, match=next(iter(settings))):
        cls(**settings)
