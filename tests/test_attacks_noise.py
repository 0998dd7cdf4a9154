"""Random perturbations as baselines: as large as they may be, and no larger."""

from __future__ import annotations

import torch
from torch import nn

import saddlepoint as sp


def test_salt_and_pepper_fills_its_ball() -> None:
    x = torch.rand(4, 1, 6, 6)
    x[0] = 1.0  # where only one end is left
    oracle = sp.Model(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), access=sp.Access.LABELS)
    y = oracle.predict(x)
    result = sp.attack(oracle, x, y, "saltandpeppernoise", sp.L0(7), keep="last")
    changed = result.adversarial != x
    assert changed.flatten(1).sum(1).tolist() == [7] * 4
    assert set(result.adversarial[changed].tolist()) == {0.0, 1.0}
    assert result.adversarial[0][changed[0]].tolist() == [0.0] * 7
    more = sp.attack(oracle, x, y, sp.attacks.SaltAndPepperNoise(), sp.L0(7), keep="last", seed=1)
    assert not torch.equal(more.adversarial, result.adversarial)
