"""Two campaigns side by side: closed forms of the test and the interval, refusals, words; and one sample replayed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_campaign import MANIFEST, found

import saddlepoint as sp
from saddlepoint.errors import DataError, InputError
from saddlepoint.evaluate.campaign import Campaign
from saddlepoint.evaluate.paired import compare_campaigns, replay

STATUS = {"w": "already_wrong", "f": "fooled", "e": "error", ".": "survived"}


def campaign(path: Path, *stages: str, manifest: dict[str, Any] = MANIFEST, finish: bool = True) -> Campaign:
    """Stages "one", "two", ...: a letter of `STATUS` for each sample, a space where the stage did not attack it."""
    with Campaign(path) as made:
        made.open(manifest)
        for name, letters in zip(("one", "two", "three"), stages, strict=False):
            for letter, status in STATUS.items():  # not in the order of the samples
                rows = torch.tensor([row for row, each in enumerate(letters) if each == letter], dtype=torch.int64)
                if len(rows):
                    made.add(name, found(rows, status), rows)
        if finish:
            made.finish()
    return made


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Campaign, Campaign]:
    """In a: 8 stand, in b: 5, of which 4 stand in both."""
    quick = {**MANIFEST, "configuration": {**MANIFEST["configuration"], "effort": "quick"}}
    a = campaign(tmp_path / "a", "wf........", "  f.......", manifest=quick)
    a_less = campaign(tmp_path / "b", "wf.....f.e", "  ..ff.   ", "  ..  .")
    return a, a_less


def test_verdicts(pair: tuple[Campaign, Campaign]) -> None:
    paired = compare_campaigns(*pair)
    assert [str(v) for v in paired.a] == ["wrong from the start", "broken by one", "broken by two"] + ["stands"] * 7
    assert [str(v) for v in paired.b] == [
        "wrong from the start", "broken by one", "stands", "stands", "broken by two", "broken by two", "stands",
        "broken by one", "stands", "NaN in one",
    ]  # fmt: skip
    assert [v.sample for v in paired.a] == [v.sample for v in paired.b] == list(range(100, 110))
    assert paired.table == ((3, 4), (1, 2))
    assert paired.robust_accuracy == (0.7, 0.4)
    assert paired.difference == pytest.approx(-0.3)
    assert [(one.sample, one.robust, other.robust) for one, other in paired.changed] == [
        (102, False, True), (104, True, False), (105, True, False), (107, True, False), (109, True, False),
    ]  # fmt: skip


def test_summary(pair: tuple[Campaign, Campaign]) -> None:
    text = compare_campaigns(pair[0].path, str(pair[1].path)).summary()
    for part in (
        f"a = {pair[0].path}, b = {pair[1].path}: 10 samples",
        'from a to b: configuration.effort: "quick" before, "standard" now',
        "stand in both 3, in a only 4, in b only 1, in neither 2",
        "robust accuracy 70.00% in a, 40.00% in b: -30.00 points (95% interval ",
        "4 to 1 among the samples with another verdict may be chance (McNemar's exact test, p = 0.38)",
        "sample 102 (class 2): broken by two in a, stands in b",
        "sample 109 (class 9): stands in a, NaN in one in b",
        "! the two were not run alike (configuration), which alone can change verdicts",
    ):
        assert part in text
    assert "not come to its end" not in text


def test_what_is_more_than_chance_is_called_so(tmp_path: Path) -> None:
    a, b = campaign(tmp_path / "a", "." * 20), campaign(tmp_path / "b", "f" * 12 + "." * 8)
    paired = compare_campaigns(a, b)
    assert paired.p_value == pytest.approx(2 * 0.5**12)
    assert "12 to 0 among the samples with another verdict is more than chance would explain" in paired.summary()
    assert "and 2 more with another verdict" in paired.summary()
    assert paired.interval[1] < 0
    assert "may be chance" in compare_campaigns(a, b, level=0.9999).summary()


def test_the_same_twice(tmp_path: Path) -> None:
    a, b = campaign(tmp_path / "a", "..f"), campaign(tmp_path / "b", "..f")
    paired = compare_campaigns(a, b)
    assert (paired.difference, paired.p_value, paired.interval, paired.changed) == (0, 1, (0, 0), ())
    assert "no sample has another verdict" in paired.summary()
    assert "from a to b" not in paired.summary()
    assert "not run alike" not in paired.summary()


@pytest.mark.parametrize(("lost", "gained"), [(0, 1), (1, 1), (2, 7), (9, 4), (0, 6)])
def test_mcnemar_in_closed_form(lost: int, gained: int, tmp_path: Path) -> None:
    a = campaign(tmp_path / "a", "." * lost + "f" * gained + "..f")
    b = campaign(tmp_path / "b", "f" * lost + "." * gained + "..f")
    tail = sum(math.comb(lost + gained, k) for k in range(min(lost, gained) + 1)) / 2 ** (lost + gained)
    assert compare_campaigns(a, b).p_value == pytest.approx(min(1, 2 * tail))
    assert compare_campaigns(b, a).p_value == pytest.approx(min(1, 2 * tail))


def test_bootstrap_is_that_of_pairs(tmp_path: Path) -> None:
    """Against resampling the pairs themselves, one by one."""
    a, b = campaign(tmp_path / "a", "." * 30 + "f" * 10), campaign(tmp_path / "b", "f" * 7 + "." * 26 + "f" * 7)
    paired = compare_campaigns(a, b, level=0.9, seed=3)
    change = np.array([y.robust - x.robust for x, y in zip(paired.a, paired.b, strict=True)], dtype=float)
    generator = np.random.default_rng(0)
    means = change[generator.integers(0, 40, (20_000, 40))].mean(1)
    low, high = np.quantile(means, [0.05, 0.95])
    assert paired.interval == pytest.approx((low, high), abs=1.01 / 40)  # a step of the difference
    assert paired.interval[0] < paired.difference < paired.interval[1]
    assert compare_campaigns(a, b, level=0.9, seed=3).interval == paired.interval
    assert compare_campaigns(a, b, level=0.5).interval[1] < paired.interval[1]


def test_to_dict(pair: tuple[Campaign, Campaign]) -> None:
    paired = compare_campaigns(*pair)
    document = json.loads(json.dumps(paired.to_dict(), allow_nan=False))
    assert document["table"] == [[3, 4], [1, 2]]
    assert document["changed"][0] == {"sample": 102, "label": 2, "a": "broken by two", "b": "stands"}
    assert document["differences"] == [{"key": "configuration.effort", "before": "quick", "now": "standard"}]


def test_other_samples_are_refused(tmp_path: Path) -> None:
    a = campaign(tmp_path / "a", "....")
    other = campaign(tmp_path / "other", "....", manifest={**MANIFEST, "data": {"fingerprint": "e"}})
    with pytest.raises(InputError, match=r"are on different data \(the samples or labels differ\)"):
        compare_campaigns(a, other)
    with pytest.raises(InputError, match=r"1 samples are in only one .*\(4 samples\).*\(3\), the first with id 103"):
        compare_campaigns(a, campaign(tmp_path / "short", "..."))
    with pytest.raises(InputError, match="no finished samples"):
        compare_campaigns(campaign(tmp_path / "empty"), campaign(tmp_path / "empty too"))
    with pytest.raises(DataError, match="is no campaign"):
        compare_campaigns(a, tmp_path)
    with pytest.raises(InputError, match="level"):
        compare_campaigns(a, a, level=95)


def test_incomplete_campaigns_are_pointed_out(tmp_path: Path) -> None:
    a, b = campaign(tmp_path / "a", "...", finish=False), campaign(tmp_path / "b", "...")
    paired = compare_campaigns(a, b)
    assert paired.complete == (False, True)
    assert f"! {a.path} has not come to its end" in paired.summary()
    assert f"! {b.path} has" not in paired.summary()


def test_replay(pair: tuple[Campaign, Campaign]) -> None:
    case = replay(pair[1].path, 104)
    assert (case.sample, case.row, case.label, case.clean_predicted) == (104, 4, 4, 4)
    assert [(a.stage, a.status) for a in case.attempts] == [("one", "survived"), ("two", "fooled")]
    wanted = found(torch.tensor([4]), "fooled")
    assert torch.equal(case.attempts[1].result.adversarial, wanted.adversarial)
    lines = case.summary().splitlines()
    assert lines[0] == "sample 104: class 4, predicted 4 before any attack; broken by two"
    assert lines[1].split() == ["stage", "attack", "outcome", "class", "margin", "distance", "passes"]
    margin, distance = f"{float(wanted.margin):.4g}", f"{float(wanted.distance):.4g}"
    assert lines[2].split() == ["one", "PGD", "survived", "5", margin, distance, "linf", "11"]
    assert lines[3].split() == ["two", "PGD", "fooled", "5", margin, distance, "linf", "11"]
    assert str(replay(pair[1], 106).verdict) == "stands"
    assert str(replay(pair[1], 100).verdict) == "wrong from the start"


def test_replay_refuses(tmp_path: Path, pair: tuple[Campaign, Campaign]) -> None:
    with pytest.raises(InputError, match=r"id 4; it has 10 samples with ids from 100 to 109"):
        replay(pair[0], 4)
    with pytest.raises(InputError, match="no finished samples yet"):
        replay(campaign(tmp_path / "empty"), 4)
    with pytest.raises(DataError, match="is no campaign"):
        replay(tmp_path, 4)


def test_verdicts_agree_with_the_results(
    mlp: torch.nn.Module, samples: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    x, y = samples
    result = sp.attack(sp.Model(mlp), x, y, sp.attacks.PGD(steps=5), sp.Linf(0.1))
    with Campaign(tmp_path) as made:
        made.open(MANIFEST)
        made.add("pgd", result, torch.arange(len(x)))
    paired = compare_campaigns(made, made)
    assert [verdict.robust for verdict in paired.a] == result.robust.tolist()
    assert paired.robust_accuracy == (result.robust_accuracy, result.robust_accuracy)


def test_what_was_found_beyond_the_ball_breaks_nothing(
    mlp: torch.nn.Module, samples: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    """The search for the smallest perturbations, with `curve=True`, finds them at any distance."""
    x, y = samples
    evaluation = sp.evaluate(sp.Model(mlp), x, y, sp.Linf(0.05), "quick", curve=True, campaign=tmp_path)
    assert bool(evaluation.stands.any())
    paired = compare_campaigns(tmp_path, tmp_path)
    assert [verdict.robust for verdict in paired.a] == evaluation.stands.tolist()
    standing = int(evaluation.stands.nonzero()[0, 0])
    case = replay(tmp_path, standing)
    assert case.verdict.robust
    assert "only beyond the ball" in case.summary()
    fallen = int(evaluation.broken.nonzero()[0, 0])
    assert str(replay(tmp_path, fallen).verdict) == f"broken by {evaluation.stages[evaluation.broken_by[fallen]].name}"
