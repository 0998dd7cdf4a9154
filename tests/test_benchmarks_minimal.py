"""The benchmark of smallest perturbations measures and compares right; how good the attacks are is not tested here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def minimal(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import minimal

    return minimal


@pytest.fixture
def case(minimal: ModuleType) -> Any:
    """Four features; class 1 from a sum of 2 on. Both inputs are of class 0: zeros, and a sum of 1."""
    net = nn.Linear(4, 2).requires_grad_(False)
    net.weight.copy_(torch.tensor([[0.0] * 4, [1.0] * 4]))
    net.bias.copy_(torch.tensor([2.0, 0.0]))
    x = torch.stack([torch.zeros(4), torch.full((4,), 0.25)])
    return minimal.Case("linear", net.eval(), x, torch.zeros(2, dtype=torch.int64), [3, 8])


def test_only_what_fools_the_bare_network_inside_the_box_counts(minimal: ModuleType, case: Any) -> None:
    fooled = torch.tensor([[1.0, 1.0, 0.5, 0.0], [1.0, 1.0, 0.25, 0.25]])
    assert minimal.distances(case, fooled, "l1") == [2.5, 1.5]
    assert minimal.distances(case, fooled, "linf") == [1.0, 0.75]
    nearly = torch.tensor([[1.0, 1.0, 1e-7, 1e-7], [1.0, 0.75, 0.25 + 1e-7, 0.25]])
    assert minimal.distances(case, nearly, "l0") == [None, 2.0]  # without what is hardly a change, the first is class 0
    outside = torch.tensor([[1.0, 1.5, 0.0, 0.0], [math.nan, 1.0, 1.0, 1.0]])
    assert minimal.distances(case, outside, "l2") == [None, None]


def test_a_run_counts_its_passes_and_finds_the_closed_form(minimal: ModuleType, case: Any) -> None:
    row = minimal.measure(case, minimal.ours("minimal", "l2"), 50, 0, 60.0)
    assert row["distance"] == pytest.approx([1.0, 0.5], rel=1e-3)  # gap / |weights|
    assert 0 < row["backward"] <= row["forward"] <= 51 - row["backward"]  # 50, and the confirmation
    stopped = minimal.measure(case, minimal.ours("minimal", "l2"), 10**6, 0, 0.05)
    assert "TooLongError" in stopped["error"]


def test_local_optimality_is_one_on_the_envelope_and_zero_without_successes(minimal: ModuleType) -> None:
    best = np.array([1.0, 2.0, 3.0])
    assert minimal.optimality(best, best) == 1.0
    assert minimal.optimality(np.full(3, math.inf), best) == 0.0
    assert minimal.optimality(np.array([2.0, 2.0, math.inf]), best) == pytest.approx(2 / 3)  # areas: 3, 7/3 and 2


def test_the_ratio_of_medians_comes_with_what_chance_makes_of_it(minimal: ModuleType) -> None:
    other = np.random.default_rng(1).lognormal(size=(1, 100))
    assert minimal.ratio(1.1 * other, other) == pytest.approx((1.1, 1.1, 1.1))  # the same samples are drawn of both
    apart = np.random.default_rng(2).lognormal(size=(1, 100))
    found, low, high = minimal.ratio(apart, other)
    assert found == pytest.approx(np.median(apart) / np.median(other))
    assert low < min(found, 1) < max(found, 1) < high
    drawn = [np.random.default_rng(seed).integers(100, size=100) for seed in range(5000)]
    ratios = np.array([np.median(apart[0, index]) / np.median(other[0, index]) for index in drawn])
    assert float((ratios < low).mean()) == pytest.approx(0.025, abs=0.008)
    assert float((ratios > high).mean()) == pytest.approx(0.025, abs=0.008)
    assert minimal.ratio(np.full((1, 9), math.inf), other[:, :9]) == (math.inf, math.inf, math.inf)
    often = np.where(np.arange(20) < 9, math.inf, other[0, :20])[None]  # of both, in some draws all in the middle
    assert all(math.isfinite(end) for end in minimal.ratio(often, often))


def test_the_table_says_who_is_ahead(minimal: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"model": "mnist_lenet_standard", "norm": "l2", "variant": "default", "passes": 200, "seed": 0, "start": 0}
    facts |= {"count": 4, "index": [0, 1, 2, 3], "outside": 0.0, "forward": 100, "backward": 99, "seconds": 1.0, "cpu": 1.0}
    runs = {
        ("saddlepoint", "minimal"): [1.0, 2.0, 3.0, 4.2],
        ("Library", "strong"): [0.6, 2.1, 3.1, 0.7],
        ("Library", "wide"): [0.5, 2.0, 3.0, 9.0],
        ("Library", "weak"): [0.7, 9.0, 9.0, None],
    }
    lines = [facts | {"who": who, "attack": attack, "distance": found} for (who, attack), found in runs.items()]
    cache = tmp_path / "cache"
    cache.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["--cache", str(cache), "--table", "--models", "mnist_lenet_standard", "--norms", "l2", "--passes", "200"]
    assert minimal.main([*asked, "--count", "4", "--short"]) == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]
    assert cells[:4] == ["mnist_lenet_standard", "l2", "2.500", "50%"]
    assert cells[4] == "75% Library wide"  # beside "minimal" and the other peers; by median it isn't the best
    assert cells[6:8] == ["2.500 minimal", "1.400 Library strong"]
    assert cells[8].startswith("1.786 (")
    assert cells[9:] == ["no", "no"]
    assert minimal.main([*asked, "--count", "4"]) == 0
    assert "| minimal | 2.500 | default settings | Library strong | 1.400 | 1.786 (" in capsys.readouterr().out
