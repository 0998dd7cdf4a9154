"""Starting points for label attacks, against a loop."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

import saddlepoint as sp

starting_points = sp.attacks.starting_points


@pytest.mark.parametrize("goal", [None, sp.Targeted("next"), sp.Targeted("random"), sp.Targeted({1, 2}), sp.Targeted(4)])
def test_the_nearest_of_the_right_class(goal: sp.Targeted | None, digits: tuple[Tensor, Tensor], mlp: nn.Module) -> None:
    x, y, pool = digits[0][:9], digits[1][:9], digits[0][9:]
    oracle = sp.Model(mlp, access=sp.Access.LABELS)
    found = starting_points(oracle, x, y, pool, goal, seed=3)
    assert oracle.queries.forward == len(pool)
    said = mlp(pool).argmax(1)
    attack = sp.attacks.HopSkipJump()
    budget = sp.Budget(queries=40)
    result = sp.attack(oracle, x, y, attack, sp.Minimize("l2"), goal, start=found, seed=3, budget=budget)
    for row in range(len(x)):
        target = int(result.targets[row])
        right = said != y[row] if goal is None else said == target if target >= 0 else (said == 1) | (said == 2)
        away = (pool[right] - x[row]).flatten(1).norm(dim=1)
        expected = pool[right][away.argmin()] if len(away) else x[row]
        assert found[row].equal(expected)
        if len(away):
            assert result.success[row]


def test_bad_input(digits: tuple[Tensor, Tensor], mlp: nn.Module) -> None:
    x, y = digits
    oracle = sp.Model(mlp, access=sp.Access.LABELS)
    with pytest.raises(sp.InputError, match="pool"):
        starting_points(oracle, x, y, x.flatten(1))
    with pytest.raises(sp.InputError, match="known before"):
        starting_points(oracle, x, y, x, sp.Targeted("least_likely"))
    with pytest.raises(sp.InputError, match="y must have shape"):
        starting_points(oracle, x, y[:1], x)
    assert starting_points(oracle, x[:2], y[:2], x[:0]).equal(x[:2])
