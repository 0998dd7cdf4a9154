"""The boundary attack and SurFree: where they ask, what they keep, and how near they come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_support import Counting, Recording, linear
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.attacks.walks import BoundaryAttack, SurFree
from saddlepoint.engine import Attack

LABELS = sp.Access.LABELS
BOTH = [BoundaryAttack(), SurFree()]


def plane(features: int, offset: float = 0.35) -> nn.Module:
    """A plane at this distance from the middle of the range."""
    n = torch.randn(features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    n /= n.norm()
    shift = float(n.sum() / 2 + offset)
    return linear(torch.stack([-n, n]) / 2, torch.tensor([shift, -shift]) / 2)


def run(net: nn.Module, attack: Attack, queries: int, count: int = 4) -> sp.AttackResult:
    x = torch.full((count, 8), 0.5, dtype=torch.float64)
    y = torch.zeros(count, dtype=torch.int64)
    model = sp.Model(net, bounds=(-2, 3), access=LABELS)
    return sp.attack(model, x, y, attack, sp.Minimize("l2"), budget=sp.Budget(queries=queries))


@pytest.mark.parametrize("attack", BOTH, ids=lambda attack: type(attack).__name__)
def test_on_a_plane_the_distance_is_reached(attack: Attack) -> None:
    early, late = run(plane(8), attack, 60), run(plane(8), attack, 3000)
    assert bool((late.distance >= 0.35).all())
    assert float(late.distance.max()) < 0.35 * 1.05
    assert bool((late.distance < early.distance).all())


@pytest.mark.parametrize("attack", BOTH, ids=lambda attack: type(attack).__name__)
@pytest.mark.parametrize("queries", [1, 2, 17, 101])
def test_budgets_hold_to_the_query(attack: Attack, queries: int) -> None:
    counting = Counting(plane(8))
    result = run(counting, attack, queries)
    assert result.queries.forward.tolist() == [queries] * 4
    assert counting.forward_rows == int(result.queries.forward.sum() + result.queries.verify.sum()) + result.queries.probe


def asked(attack: Attack, queries: int) -> tuple[nn.Module, list[Tensor]]:
    recording = Recording(plane(8))
    run(recording, attack, queries, count=1)
    return recording.net, recording.points[3:]  # after the probe


def test_the_boundary_attack_steps_on_a_sphere_and_then_inwards() -> None:
    """With check=1 each question is a pair: the candidate, and the point on the sphere that it was made from."""
    net, points = asked(BoundaryAttack(check=1, source_step=0.1, memory=(10**6, 10**6)), 80)
    middle = torch.full((8,), 0.5, dtype=torch.float64)
    pairs = [pair for pair in points if len(pair) == 2]
    assert len(pairs) > 20
    nearest = None
    for candidate, around in pairs:
        near, far = (candidate - middle).norm(), (around - middle).norm()
        torch.testing.assert_close(near / far, torch.tensor(0.9, dtype=torch.float64))
        torch.testing.assert_close((candidate - middle) / near, (around - middle) / far)
        if nearest is not None:
            torch.testing.assert_close(far, nearest)  # of the last point that was kept
        fooled = bool(net(candidate[None]).argmax(1))
        nearest = near if fooled else far


def test_surfree_stays_on_the_circle_to_the_input() -> None:
    """Thales: between the input and x_t every point of the circle sees a right angle."""
    net, middle = plane(8), torch.full((1, 8), 0.5, dtype=torch.float64)
    corner = next(p for p in (middle + 1.4, middle - 1.4) if bool(net(p).argmax(1)))
    recording = Recording(net)
    model, y = sp.Model(recording, bounds=(-2, 3), access=LABELS), torch.zeros(1, dtype=torch.int64)
    sp.attack(model, middle, y, SurFree(steps=1), sp.Minimize("l2"), start=corner)
    points = torch.cat(recording.points[4:-1])  # after the probe and the clean prediction, before the confirmation
    straight = torch.cosine_similarity(points - middle, corner - middle, dim=1) > 1 - 1e-12
    way, arc = points[straight], points[~straight]
    fooled = way[net(way).argmax(1) == 1]
    begun = fooled[(fooled - middle).norm(dim=1).argmin()]
    cosine = torch.cosine_similarity(arc - middle, arc - begun, dim=1)
    assert len(arc) >= 2
    assert float(cosine.abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BoundaryAttack(steps=0), "steps"),
        (lambda: BoundaryAttack(source_step=1.0), "source_step"),
        (lambda: SurFree(theta_max=90.0), "theta_max"),
        (lambda: SurFree(rho=0.0), "rho"),
        (lambda: SurFree(gamma=1.0), "gamma"),
        (lambda: SurFree(num_directions=0), "num_directions"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(sp.InputError, match=message):
        make()
