"""Label attacks that estimate the boundary's normal: starts, halving, the estimate, and each attack's way along it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from contract_support import Counting, Recording, linear
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks.frequencies import cosines, from_frequencies, to_frequencies
from saddlepoint.attacks.normals import CGBA, QEBA, GeoDA, HopSkipJump, SignOPT
from saddlepoint.engine import Attack, Record

ALL = [HopSkipJump(), QEBA(), GeoDA(), CGBA(), SignOPT()]
LABELS = sp.Access.LABELS


def plane(features: int, offset: float = 0.35, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """f(x) = <n, x - 1/2> - offset with a unit normal n: the distance of the middle of the box is the offset."""
    n = torch.randn(features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    n /= n.norm()
    return linear(torch.stack([-n, n]) / 2, torch.tensor([float(n.sum() / 2 + offset), -float(n.sum() / 2 + offset)]) / 2), n


def middle(features: int, count: int = 4) -> Tensor:
    return torch.full((count, features), 0.5, dtype=torch.float64)


@pytest.mark.parametrize("attack", ALL, ids=lambda attack: type(attack).__name__)
def test_on_a_plane_the_distance_is_reached(attack: Attack) -> None:
    net, _ = plane(12)
    x = middle(12)
    oracle = sp.Model(net, bounds=(-2, 3), access=LABELS)
    result = sp.attack(oracle, x, torch.zeros(4, dtype=torch.int64), attack, sp.Minimize("l2"), budget=sp.Budget(queries=3000))
    assert bool(result.success.all())
    assert bool((result.distance >= 0.35).all())
    assert float(result.distance.max()) < 0.35 * 1.05


@pytest.mark.parametrize("attack", [HopSkipJump(), GeoDA()], ids=lambda attack: type(attack).__name__)
def test_in_l_infinity_too(attack: Attack) -> None:
    net, n = plane(8)
    x = middle(8)
    oracle = sp.Model(net, bounds=(-2, 3), access=LABELS)
    result = sp.attack(
        oracle, x, torch.zeros(4, dtype=torch.int64), attack, sp.Minimize("linf"), budget=sp.Budget(queries=4000)
    )
    exact = 0.35 / float(n.abs().sum())
    assert bool((result.distance >= exact).all())
    assert float(result.distance.max()) < exact * 1.25


def test_the_estimate_is_the_normal() -> None:
    """By the law of large numbers: 4000 directions in 10 dimensions leave an angle of a few degrees."""
    net, n = plane(10)
    directions: list[Tensor] = []

    @dataclass(frozen=True, kw_only=True)
    class Spy(HopSkipJump.__mro__[1]):  # type: ignore[misc]  # HopSkipJump without its own directions
        queries: int = 4000
        reach: float | None = 0.1
        precision: float = 1e-4
        starts: int = 100
        round_size: int = 500
        steps: int = 1

        def directions(self, problem: Any, keys: Any, n: Tensor) -> Tensor:
            return keys.normal((self.round_size, 10), torch.float64)

        def move(self, problem: Any, state: Any) -> Any:
            directions.append(state.own.estimate.normal)
            return super().move(problem, state)

    Spy.declaration = HopSkipJump.declaration
    oracle = sp.Model(net, bounds=(-2, 3), access=LABELS)
    sp.attack(oracle, middle(10), torch.zeros(4, dtype=torch.int64), Spy(), sp.Minimize("l2"))
    cosine = (directions[0] @ n) / directions[0].norm(dim=1)
    assert bool((cosine > 0.99).all())


@pytest.mark.parametrize("attack", ALL, ids=lambda attack: type(attack).__name__)
@pytest.mark.parametrize("queries", [1, 2, 13, 57, 200])
def test_budgets_hold_to_the_query(attack: Attack, queries: int) -> None:
    net, _ = plane(12)
    counting = Counting(net)
    oracle = sp.Model(counting, bounds=(-2, 3), access=LABELS)
    y = torch.zeros(4, dtype=torch.int64)
    result = sp.attack(oracle, middle(12), y, attack, sp.Minimize("l2"), budget=sp.Budget(queries=queries))
    assert result.queries.forward.tolist() == [queries] * 4
    assert counting.forward_rows == int(result.queries.forward.sum() + result.queries.verify.sum()) + result.queries.probe


@pytest.mark.parametrize("attack", ALL, ids=lambda attack: type(attack).__name__)
def test_distances_never_grow(attack: Attack) -> None:
    net, _ = plane(12)
    seen: list[Tensor] = []
    oracle = sp.Model(net, bounds=(-2, 3), access=LABELS)

    def watch(record: Record) -> None:
        if len(record.ids) == 4:
            seen.append(record.distance)

    y = torch.zeros(4, dtype=torch.int64)
    sp.attack(oracle, middle(12), y, attack, sp.Minimize("l2"), budget=sp.Budget(queries=400), callback=watch)
    for earlier, later in itertools.pairwise(seen):
        assert bool((later <= earlier).all())
    assert float(seen[-1].max()) < float(seen[20].min())


def test_a_start_is_used_and_targets_are_reached(digits: tuple[Tensor, Tensor], mlp: nn.Module) -> None:
    x, y = digits[0][:6], mlp(digits[0][:6]).argmax(1)
    other = torch.stack([digits[0][(mlp(digits[0]).argmax(1) == (c + 1) % 10).nonzero()[0, 0]] for c in y.tolist()])
    recording = Recording(mlp)
    oracle = sp.Model(recording, access=LABELS)
    goal, budget = sp.Targeted("next"), sp.Budget(queries=300)
    result = sp.attack(oracle, x, y, CGBA(), sp.Minimize("l2"), goal, start=other, budget=budget)
    assert bool(result.success.all())
    assert result.predicted.tolist() == ((y + 1) % 10).tolist()
    assert bool((result.distance < (other - x).flatten(1).norm(dim=1)).all())
    asked = torch.cat(recording.points)
    assert all(bool((asked == point).flatten(1).all(1).any()) for point in other)


def test_no_start_fails_that_sample_only() -> None:
    """A model that says 1 for points whose first feature is large; where a mask fixes that feature, nothing is found."""
    net = linear(torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64), torch.tensor([0.6, 0.0], dtype=torch.float64))
    x = torch.full((2, 2), 0.2, dtype=torch.float64)
    mask = torch.tensor([[False, True], [True, True]])
    oracle = sp.Model(net, access=LABELS)
    y, attack = torch.zeros(2, dtype=torch.int64), HopSkipJump(starts=20)
    result = sp.attack(oracle, x, y, attack, sp.Minimize("l2", mask=mask), budget=sp.Budget(queries=200))
    assert result.status.tolist() == ["survived", "fooled"]
    assert result.queries.forward[0] == 21  # the input, and twenty tries
    assert float(result.distance[1]) < 0.41


def test_labels_are_all_it_takes(digits: tuple[Tensor, Tensor], mlp: nn.Module) -> None:
    """A model of scores and one of labels are attacked alike."""
    x, y = digits[0][:8], digits[1][:8]
    results = [
        sp.attack(sp.Model(mlp, access=access), x, y, CGBA(), sp.Minimize("l2"), budget=sp.Budget(queries=150))
        for access in (LABELS, sp.Access.SCORES)
    ]
    assert results[0].status.tolist() == results[1].status.tolist()
    close = torch.isclose(results[0].distance, results[1].distance, rtol=1e-3) | torch.isinf(results[0].distance)
    assert int((~close).sum()) <= 1  # within the margin that a success needs, the two may part


def test_subspaces() -> None:
    """QEBA's and GeoDA's directions hold no high frequencies."""
    x = torch.rand(2, 3, 16, 12)
    problem = sp.L2(1.0).around(x)

    class Given:
        origin, region, eps = x, problem, problem.eps

    keys = sp.attacks.normals.Keys.of(0, torch.arange(2))
    n = torch.zeros(2, dtype=torch.int64)
    for attack, height, width in ((QEBA(reduction=4), 4, 3), (GeoDA(share=0.25), 4, 3)):
        there = to_frequencies(attack.directions(Given(), keys, n))  # type: ignore[arg-type]
        assert there.shape == (2, 25, 3, 16, 12)
        assert float(there[..., height:, :].abs().max()) < 1e-5 > float(there[..., :, width:].abs().max())
        assert float(there[..., :height, :width].abs().min()) > 0
    smooth = QEBA(subspace="space").directions(Given(), keys, n)  # type: ignore[arg-type]
    neighbours = (smooth[..., 1:] - smooth[..., :-1]).abs().mean()
    assert float(neighbours) < 0.5 * float(smooth.abs().mean())


def test_cosines_against_scipy() -> None:
    from scipy.fft import dctn

    x = np.random.default_rng(0).standard_normal((2, 7, 10))
    theirs = dctn(x, axes=(1, 2), norm="ortho")
    torch.testing.assert_close(to_frequencies(torch.from_numpy(x)), torch.from_numpy(theirs))
    torch.testing.assert_close(from_frequencies(to_frequencies(torch.from_numpy(x))), torch.from_numpy(x))
    torch.testing.assert_close(cosines(9) @ cosines(9).T, torch.eye(9, dtype=torch.float64))


def test_the_circle_of_cgba() -> None:
    """Thales: each point asked about on the way of a step is at a right angle between the input and where it began."""
    net, _ = plane(6)
    recording = Recording(net)
    x, y = middle(6, 1), torch.zeros(1, dtype=torch.int64)
    oracle = sp.Model(recording, bounds=(-9, 9), access=LABELS)
    attack = CGBA(queries=5, round_size=5, steps=1, precision=0.01)
    sp.attack(oracle, x, y, attack, sp.Minimize("l2"), budget=sp.Budget(queries=500))
    sizes = [len(points) for points in recording.points]
    ask = max(i for i, size in enumerate(sizes) if size == 5)
    arc = torch.cat(recording.points[ask + 1 : -1])
    begun = min((p for p in recording.points[4:ask] if len(p) == 1 and bool(net(p).argmax(1))), key=lambda p: (p - x).norm())
    cosine = ((arc - x) * (arc - begun)).sum(1) / ((arc - x).norm(dim=1) * (arc - begun).norm(dim=1))
    assert len(arc) > 3
    assert float(cosine.abs().max()) < 1e-6


def test_signs_of_changes_of_the_distance() -> None:
    """Sign-OPT asks on the sphere around the input through its boundary point."""
    net, _ = plane(6)
    recording = Recording(net)
    x, y = middle(6, 1), torch.zeros(1, dtype=torch.int64)
    oracle = sp.Model(recording, bounds=(-9, 9), access=LABELS)
    attack = SignOPT(queries=10, round_size=10, steps=1, reach=0.3)
    sp.attack(oracle, x, y, attack, sp.Minimize("l2"), budget=sp.Budget(queries=500))
    asked = next(points for points in recording.points if len(points) == 10)
    away = (asked - x).norm(dim=1)
    assert float(away.max() - away.min()) < 1e-12
    assert float((asked[1:] - asked[0]).norm(dim=1).min()) > 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HopSkipJump(steps=0), "steps"),
        (lambda: HopSkipJump(precision=0.0), "precision"),
        (lambda: HopSkipJump(starts=0), "starts"),
        (lambda: HopSkipJump(reach=-1.0), "reach"),
        (lambda: QEBA(subspace="wavelet"), "subspace"),
        (lambda: QEBA(reduction=0), "reduction"),
        (lambda: GeoDA(share=0.0), "share"),
        (lambda: CGBA(memory=1.0), "memory"),
        (lambda: SignOPT(alpha=0.0), "alpha"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(sp.InputError, match=message):
        make()


def test_goals_that_labels_cannot_tell(digits: tuple[Tensor, Tensor], mlp: nn.Module) -> None:
    oracle = sp.Model(mlp, access=LABELS)
    for goal in (sp.Untargeted(confidence=1.0), sp.FalsePositive()):
        with pytest.raises(sp.CapabilityError, match="scores"):
            sp.attack(oracle, digits[0][:2], digits[1][:2], HopSkipJump(), sp.Minimize("l2"), goal)


def test_counts_grow_as_published() -> None:
    assert [HopSkipJump(queries=100).count(n) for n in range(4)] == [100, 142, 174, 200]
    assert [GeoDA(queries=100).count(n) / 100 for n in range(3)] == pytest.approx(
        [1, 0.6 ** (-2 / 3), 0.6 ** (-4 / 3)], abs=0.02
    )
    assert CGBA(queries=30).count(8) == math.ceil(30 * 3)
