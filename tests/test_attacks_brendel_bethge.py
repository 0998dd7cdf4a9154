"""Brendel & Bethge: each step against SciPy and brute force, the walk against its equations, the search for a start."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from contract_support import Counting, Recording
from scipy.optimize import minimize
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks.brendel_bethge import BrendelBethge, best_move
from saddlepoint.threats import Region, Threat, ball

D = 6
NORMS = ("linf", "l2", "l1")


def step_problem(seed: int, threat: Threat) -> tuple[Region, Tensor, Tensor, Tensor]:
    """Inputs, points, gradients and gains of twelve samples; some points and inputs lie on the ends of the range."""
    generator = torch.Generator().manual_seed(seed)
    origin, x = (torch.rand(12, D, generator=generator, dtype=torch.float64) * 1.4 - 0.2 for _ in range(2))
    normal = torch.randn(12, D, generator=generator, dtype=torch.float64)
    gain = 0.3 * torch.randn(12, generator=generator, dtype=torch.float64)
    return threat.around(origin.clamp(0, 1)), x.clamp(0, 1), normal, gain


def shortest(x: np.ndarray, b: np.ndarray, c: float, free: np.ndarray, fixed: np.ndarray) -> np.ndarray | None:
    """The shortest d with <b, d> = c inside [0, 1], where the features that are not free move by `fixed`. None: none does."""
    low, high = -1e6, 1e6

    def move(t: float) -> np.ndarray:
        return np.where(free, np.clip(t * b, -x, 1 - x), fixed)

    if not b @ move(low) <= c + 1e-12 <= b @ move(high) + 2e-12:
        return None
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if b @ move(middle) < c else (low, middle)
    return move(high)


def by_scipy(x: np.ndarray, x0: np.ndarray, b: np.ndarray, c: float, r: float, norm: str, start: np.ndarray) -> float:
    """The smallest norm of x + d - x0 by SLSQP, from a feasible d; l1 and linf with bounds on |d - home| as variables e."""
    home = x0 - x
    count = {"l2": 0, "linf": 1, "l1": D}[norm]
    spread = np.ones((D, 1)) if norm == "linf" else np.eye(D)[:, :count]
    pad, ends = np.zeros(count), [(float(-a), float(1 - a)) for a in x] + [(0, None)] * count
    constraints = [
        {"type": "eq", "fun": lambda v: b @ v[:D] - c, "jac": lambda v: np.concatenate([b, pad])},
        {"type": "ineq", "fun": lambda v: r**2 - v[:D] @ v[:D], "jac": lambda v: np.concatenate([-2 * v[:D], pad])},
    ]
    for side in (1, -1) if count else ():  # e +- (d - home) >= 0
        rows = np.hstack([side * np.eye(D), spread])
        constraints.append({"type": "ineq", "fun": lambda v, m=rows: m @ v - m[:, :D] @ home, "jac": lambda v, m=rows: m})
    best = math.inf
    for d in (start, 0.9 * start + 0.05 * home):
        away = np.abs(d - home)
        found = minimize(
            (lambda v: v[D:].sum()) if count else (lambda v: (v - home) @ (v - home)),
            np.concatenate([d, {"l2": away[:0], "linf": away.max(keepdims=True), "l1": away}[norm]]),
            jac=(lambda v: np.concatenate([np.zeros(D), np.ones(count)])) if count else (lambda v: 2 * (v - home)),
            bounds=ends, constraints=constraints, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
        ).x[:D]  # fmt: skip
        if abs(b @ found - c) < 1e-7 and found @ found <= r**2 + 1e-8:
            best = min(best, float(np.linalg.norm(found - home, {"linf": math.inf, "l2": 2, "l1": 1}[norm])))
    return best


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("share", [0.05, 0.4, 5.0])
def test_moves_are_the_best(norm: str, share: float) -> None:
    """share: where the radius lies between the shortest possible move (0) and the one without a trust region (1)."""
    region, x, b, c = step_problem(3, ball(norm, math.inf))
    free = best_move(region, x, b, c, torch.full_like(c, 1e3))
    least = [shortest(*(t.numpy() for t in (x[i], b[i])), float(c[i]), np.ones(D, bool), np.zeros(D)) for i in range(len(x))]
    possible = [i for i, move in enumerate(least) if move is not None]
    assert len(possible) >= 8
    near = torch.tensor([0.0 if move is None else float(np.linalg.norm(move)) for move in least])
    radius = near + share * (free.norm(dim=1) - near).clamp(min=0.01)
    moves = best_move(region, x, b, c, radius)
    for i in possible:
        d, start = moves[i].numpy(), least[i]
        assert start is not None
        assert abs(float(b[i] @ moves[i]) - float(c[i])) < 1e-5
        assert np.linalg.norm(d) <= float(radius[i]) * (1 + 1e-9)
        assert ((x[i] + moves[i] >= -1e-12) & (x[i] + moves[i] <= 1 + 1e-12)).all()
        ours = float(region.threat.distance(x[i : i + 1] + moves[i : i + 1], region.origin[i : i + 1]))
        theirs = by_scipy(*(t[i].numpy() for t in (x, region.origin, b)), float(c[i]), float(radius[i]), norm, start)
        assert math.isfinite(theirs)
        assert ours <= theirs * (1 + 2e-3) + 1e-6
        assert ours >= theirs * (1 - 2e-3) - 1e-6


def fewest(x: np.ndarray, x0: np.ndarray, b: np.ndarray, c: float, r: float) -> int:
    """The smallest number of features that must differ from the input, by trying all sets."""
    for count in range(D + 1):
        for chosen in itertools.combinations(range(D), count):
            free = np.isin(np.arange(D), chosen)
            move = shortest(x, b, c, free, x0 - x) if count else x0 - x
            if move is not None and abs(b @ move - c) < 1e-6 and np.linalg.norm(move) <= r * (1 + 1e-9):
                return count
    raise AssertionError("no set does it")


@pytest.mark.parametrize("share", [0.3, 0.7, 5.0])
def test_moves_in_l0(share: float) -> None:
    """Without a trust region the count is the best; with one it is a relaxation's, at most two more, and mostly the best."""
    more = total = 0
    for seed in range(3):
        region, x, b, c = step_problem(seed, ball("l0", math.inf))
        free = best_move(region, x, b, c, torch.full_like(c, 1e3))
        least = [shortest(x[i].numpy(), b[i].numpy(), float(c[i]), np.ones(D, bool), np.zeros(D)) for i in range(len(x))]
        near = torch.tensor([0.0 if move is None else float(np.linalg.norm(move)) for move in least])
        radius = near + share * (free.norm(dim=1) - near).clamp(min=0.01)
        moves = best_move(region, x, b, c, radius)
        for i in (i for i, move in enumerate(least) if move is not None):
            assert abs(float(b[i] @ moves[i]) - float(c[i])) < 1e-5
            assert float(moves[i].norm()) <= float(radius[i]) * (1 + 1e-9)
            ours = int((moves[i] != region.origin[i] - x[i]).sum())
            best = fewest(*(t[i].numpy() for t in (x, region.origin, b)), float(c[i]), float(radius[i]))
            assert best <= ours <= best + (2 if share < 1 else 0)
            more, total = more + (ours > best), total + 1
    assert total >= 30
    assert more <= total / 3


@pytest.mark.parametrize("norm", [*NORMS, "l0"])
def test_moves_where_the_boundary_is_out_of_reach(norm: str) -> None:
    """Then as far towards it as the ball and the box allow: the shortest move of the gain that they do allow."""
    region, x, b, c = step_problem(5, ball(norm, math.inf))
    gain = 50 * c.sign()
    radius = torch.full_like(c, 0.2)
    moves = best_move(region, x, b, gain, radius)
    for i in range(len(x)):
        reached = float(b[i] @ moves[i])
        assert reached * float(gain[i]) > 0
        assert float(moves[i].norm()) <= 0.2 + 1e-9
        least = shortest(x[i].numpy(), b[i].numpy(), reached, np.ones(D, bool), np.zeros(D))
        np.testing.assert_allclose(moves[i].numpy(), least, atol=1e-6)
        full = torch.where(b[i] * gain[i] > 0, 1 - x[i], -x[i])
        assert float(moves[i].norm()) > 0.2 - 1e-6 or torch.allclose(moves[i], full)


def test_moves_without_gradient_or_bounds() -> None:
    region, x, b, c = step_problem(6, ball("l2", math.inf))
    radius = torch.full_like(c, 0.5)
    assert (best_move(region, x, torch.zeros_like(b), c, radius) == 0).all()
    open_region = ball("l2", math.inf).around(region.origin, None)
    moves = best_move(open_region, x, b, c, torch.full_like(c, 1e6))
    home = region.origin - x
    expected = home + b * ((c - (b * home).sum(1)) / (b**2).sum(1))[:, None]
    torch.testing.assert_close(moves, expected)


def test_pixels_move_together() -> None:
    generator = torch.Generator().manual_seed(0)
    origin, x, b = (torch.rand(4, 2, 3, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    c = 0.5 * (b * (origin - x)).flatten(1).sum(1)
    region = sp.L0(math.inf, per="pixel").around(origin)
    moves = best_move(region, x, b - 0.5, c, torch.full_like(c, 0.8)).view_as(x)
    moved = (moves - (origin - x)).abs() > 0
    assert (moved.any(1).flatten(1).sum(1) >= moved.flatten(1).sum(1) / 2).all()
    assert (moves.flatten(1).norm(dim=1) <= 0.8 + 1e-9).all()


# The walk

_generator = torch.Generator().manual_seed(1)
W1, B1, W2, B2 = (torch.randn(*shape, generator=_generator, dtype=torch.float64) for shape in ((9, D), (9,), (4, 9), (4,)))
X = 0.2 + 0.6 * torch.rand(5, D, generator=_generator, dtype=torch.float64)


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), (2 * W1, B1, W2, B2), strict=True):
            parameter.copy_(value)
    return net


def margin(x: np.ndarray, y: int) -> tuple[float, np.ndarray]:
    hidden = np.tanh(2 * W1.numpy() @ x + B1.numpy())
    z = W2.numpy() @ hidden + B2.numpy()
    rival = int(np.argmax(np.where(np.arange(4) == y, -np.inf, z)))
    return z[rival] - z[y], ((W2[rival] - W2[y]).numpy() * (1 - hidden**2)) @ (2 * W1.numpy())


with torch.no_grad():
    Y = network()(X).argmax(1)


def test_the_walk() -> None:
    """Bisection from the start, then steps with the averaged normal, the overshoot and the shrinking radius (l2, no box)."""
    steps, settings = 9, {"decays": 3, "lr": 0.004, "bisections": 5}
    recording = Recording(network())
    model = sp.Model(recording, bounds=None)
    model.probe(X)
    for i in range(len(X)):
        recording.points.clear()
        result = sp.attack(model, X[i : i + 1], Y[i : i + 1], BrendelBethge(steps=steps, **settings), sp.Minimize("l2"))
        points = [p[0].numpy() for p in recording.points[:-1]]  # without the confirmation
        x0, y = X[i].numpy(), int(Y[i])
        start = next(p for p in points if margin(p, y)[0] >= result.tau)
        first = next(n for n, p in enumerate(points) if p is start) + 1
        low, high = 0.0, 1.0
        for n in range(5):
            middle = (low + high) / 2
            np.testing.assert_allclose(points[first + n], x0 + middle * (start - x0), atol=1e-12)
            low, high = (low, middle) if margin(points[first + n], y)[0] >= result.tau else (middle, high)
        x, normal = x0 + high * (start - x0), None
        for n in range(steps + 1):
            np.testing.assert_allclose(points[first + 5 + n], x, atol=2e-3 * np.linalg.norm(x - x0))
            x = points[first + 5 + n]
            value, gradient = margin(x, y)
            normal = gradient if normal is None else 0.2 * gradient + 0.8 * normal
            missing = 2 * result.tau - value
            c = missing * (1.1 if missing > 0 else 0.9)
            r = 0.004 * 0.5 ** ((n + 2) // 3) * D
            home, b = x0 - x, normal
            d = home + b * (c - b @ home) / (b @ b)
            if np.linalg.norm(d) > r:  # along the boundary from the shortest move, as far as the radius allows
                least = b * c / (b @ b)
                if np.linalg.norm(least) > r:
                    d = b * np.sign(c) * r / np.linalg.norm(b)
                else:
                    along = d - least
                    d = least + along * np.sqrt((r**2 - least @ least) / (along @ along))
            x = x + d


@pytest.mark.parametrize("norm", [*NORMS, "l0"])
@pytest.mark.parametrize("goal", [None, sp.Targeted("next")], ids=str)
def test_finds_small_perturbations(norm: str, goal: sp.Targeted | None, mlp: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """As near as FMN."""
    model, x = sp.Model(mlp), digits[0][:12]
    y = model.predict(x)
    walked = sp.attack(model, x, y, BrendelBethge(steps=60), sp.Minimize(norm), goal)
    other = sp.attack(model, x, y, sp.attacks.FMN(steps=60), sp.Minimize(norm), goal)
    assert walked.success.all()
    assert (walked.distance / other.distance).median() <= 1.01


@pytest.mark.parametrize("norm", NORMS)
def test_walks_from_afar(norm: str, mlp: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """From uniform noise, which is about eight times as far away as the boundary."""
    model, x = sp.Model(mlp), digits[0][:12]
    y = model.predict(x)
    near, far = (
        sp.attack(model, x, y, BrendelBethge(steps=60, start=start), sp.Minimize(norm)) for start in ("gradient", "noise")
    )
    assert far.success.all()
    assert (far.queries.backward[far.success] <= 61).sum() >= 6, "noise is tried before gradients"
    assert (far.distance / near.distance).median() <= 2
    assert BrendelBethge(start="noise").randomized
    assert not BrendelBethge().randomized


def test_start_of_a_sequence(mlp: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """It goes on from what was found, without a search of its own."""
    counting = Counting(mlp)
    x = digits[0][:6]
    y = sp.Model(mlp).predict(x)
    first = sp.attacks.FAB(steps=3, search=0)
    alone = sp.attack(sp.Model(mlp), x, y, first, sp.Minimize("l1"))
    attack = sp.attacks.Sequence(first, BrendelBethge(steps=10, bisections=3))
    result = sp.attack(sp.Model(counting), x, y, attack, sp.Minimize("l1"))
    assert alone.success.all()
    assert (result.queries.backward == 3 * 9 + 10).all()
    assert (result.distance <= alone.distance).all()
    assert (result.distance < 0.999 * alone.distance).any()


class Walled(nn.Module):
    """No gradient near the inputs; class 1 where the mean is above 0.4. Sample-independent; some classes never win."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        first = torch.where(mean < 0.3, 0 * mean, mean - 0.4)
        return torch.stack([0 * mean + 0.01, first, 0 * mean - 5], 1)


def test_noise_finds_what_gradients_do_not() -> None:
    x = torch.full((3, 16), 0.1)
    y = torch.zeros(3, dtype=torch.int64)
    result = sp.attack(sp.Model(Walled()), x, y, BrendelBethge(steps=20), sp.Minimize("l2"))
    assert result.success.all()
    assert (result.distance <= 1.3 * 0.31 * 4).all()
    # a target that nothing reaches fails those samples only, after the tries
    goal = sp.Targeted(torch.tensor([1, 2, 1]))
    result = sp.attack(sp.Model(Walled()), x, y, BrendelBethge(steps=20, starts=30), sp.Minimize("l2"), goal)
    assert result.status.tolist() == ["fooled", "survived", "fooled"]
    assert result.iterations[1] == 30


def test_l0_needs_bounds() -> None:
    with pytest.raises(sp.CapabilityError, match="bounds"):
        sp.attack(sp.Model(network(), bounds=None), X, Y, BrendelBethge(), sp.Minimize("l0"))


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"decays": 0},
        {"bisections": -1},
        {"starts": 0},
        {"start": "data"},
        {"lr": 0},
        {"lr_decay": 2},
        {"momentum": 1},
        {"overshoot": 2},
    ],
)
def test_bad_settings(settings: dict[str, float]) -> None:
    with pytest.raises(sp.InputError, match=next(iter(settings))):
        BrendelBethge(**settings)
