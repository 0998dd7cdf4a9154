"""Distances to the boundary: against closed forms, with every group of samples told apart, and a report that says so."""

from __future__ import annotations

import csv
import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from test_report import HOSTILE, Tags, assert_needs_nothing
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint import report
from saddlepoint.errors import CapabilityError, DataError, InputError
from saddlepoint.evaluate import distances as module
from saddlepoint.report import folder as report_folder
from saddlepoint.report.distances import _verdict

SETTINGS: dict[str, Any] = {"title": "A try", "data_name": "made up", "config": {"norm": "l2"}, "seed": 3}
W = torch.tensor([[3.0, -4.0, 0.0, 1.0], [1.0, 1.0, 2.0, -1.0]])


def linear() -> sp.Model:
    net = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(W)
    return sp.Model(net, bounds=(-50, 50))


def inputs(count: int = 30) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Ramp(nn.Module):
    """Class 1 where the mean is above 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        f = x.flatten(1).mean(1) - 0.5
        return torch.stack([-f, f], 1)


class Deaf(nn.Module):
    """Gives class 0 for everything."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([0 * x.flatten(1).mean(1) + 2, 0 * x.flatten(1).mean(1) + 1], 1)


def ramp_samples(shape: tuple[int, ...] = (1, 4, 4)) -> tuple[Tensor, Tensor]:
    """Constant inputs at levels 0.30, 0.32, ... 0.48 (class 0) and 0.60 (labelled 0: wrong from the start)."""
    level = torch.tensor([0.30 + 0.02 * i for i in range(10)] + [0.60])
    return level.view(-1, *[1] * len(shape)).expand(-1, *shape).contiguous(), torch.zeros(11, dtype=torch.int64)


@pytest.fixture(scope="module")
def ramp() -> sp.Distances:
    return sp.distance(sp.Model(Ramp()), *ramp_samples(), "linf", budget=sp.Budget(passes=60))


@pytest.fixture(scope="module")
def deaf() -> sp.Distances:
    return sp.distance(sp.Model(Deaf()), *ramp_samples(), "linf", budget=sp.Budget(passes=10))


# the library


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2.0), ("linf", 1.0), ("l1", math.inf)])
def test_linear_model_in_closed_form(norm: str, dual: float) -> None:
    """|w.x| / ||w|| in the dual norm, for the difference w of the classes' weights; rho is the mean of it over ||x||."""
    model, x = linear(), inputs()
    found = sp.distance(model, x, None, norm)
    w = (W[1] - W[0]).double()
    exact = (x @ w).abs() / torch.linalg.vector_norm(w, ord=dual)
    assert bool((found.values >= exact * (1 - 1e-6)).all()), "an upper bound"
    torch.testing.assert_close(found.values, exact, rtol=0.02, atol=0)
    size = torch.linalg.vector_norm(x, ord={"l2": 2.0, "linf": math.inf, "l1": 1.0}[norm], dim=1)
    torch.testing.assert_close(found.sizes, size)
    assert found.rho == pytest.approx(float((exact / size).mean()), rel=0.02)
    assert found.mean == pytest.approx(float(found.values.mean()))
    ratios = found.values / size
    low, high = found.rho_interval
    assert (low + high) / 2 == pytest.approx(found.rho)
    assert high - low == pytest.approx(2 * 1.96 * float(ratios.std()) / math.sqrt(30), rel=1e-4)


def test_it_is_the_attack_on_the_smallest_perturbation() -> None:
    model, x = linear(), inputs(6)
    y = model.predict(x)
    ours = sp.distance(model, x, y, "l2", seed=4)
    direct = sp.attack(model, x, y, "minimal", sp.Minimize("l2"), budget=sp.Budget(passes=200), seed=4)
    assert torch.equal(ours.values, direct.distance)
    assert torch.equal(ours.result.adversarial, direct.adversarial)
    assert int(ours.result.queries.total.max()) <= 200
    assert ours.attack_name.startswith(f"minimal: {type(sp.attacks.minimal('l2', 200)).__name__}")
    ddn = sp.distance(model, x, y, "l2", sp.attacks.DDN(steps=5), seed=4)
    assert ddn.result.config["budget"]["passes"] is None, "an attack with a length of its own is not cut"
    assert ddn.attack_name == "DDN"
    assert sp.distance(model, x, y, "l2", sp.attacks.Bisect("pgd", 1)).attack_name == "Bisect(PGD)"
    assert torch.equal(sp.distance(model, x, y, "l2", "ddn").values, sp.distance(model, x, y, "l2", sp.attacks.DDN()).values)


def test_every_sample_is_in_one_group(ramp: sp.Distances, deaf: sp.Distances) -> None:
    for distances in (ramp, deaf):
        groups = torch.stack([distances.wrong, distances.found, distances.missing, distances.failed])
        assert bool((groups.sum(0) == 1).all())
    assert ramp.wrong.nonzero()[:, 0].tolist() == [10]
    assert float(ramp.values[10]) == 0
    torch.testing.assert_close(ramp.values[:10], torch.linspace(0.20, 0.02, 10, dtype=torch.float64), atol=2e-3, rtol=0.02)
    assert ramp.success_rate == 1
    assert bool(deaf.missing.all())
    assert bool(deaf.values.isinf().all())
    assert deaf.success_rate == 0


def test_wrong_samples_count_in_the_curve_only(ramp: sp.Distances) -> None:
    assert ramp.robust_accuracy(0) == pytest.approx(10 / 11), "the clean accuracy"
    assert ramp.robust_accuracy(0.11) == pytest.approx(5 / 11)  # 0.12, 0.14, ... 0.20 are left
    assert ramp.robust_accuracy(1) == 0
    radii = [0.0, *ramp.values.tolist(), 0.05, 1.0]
    counted = [float(((ramp.values > eps) & ~ramp.wrong).double().mean()) for eps in radii]
    assert ramp.curve(radii) == pytest.approx(counted)
    assert ramp.mean == pytest.approx(float(ramp.values[:10].mean())), "without the zero"
    assert ramp.median == sorted(ramp.values[:10].tolist())[4]
    without = sp.distance(sp.Model(Ramp()), ramp_samples()[0][:10], ramp_samples()[1][:10], "linf", budget=sp.Budget(passes=60))
    assert ramp.rho == pytest.approx(without.rho)


def test_own_decision_is_the_definition_of_average_robustness(ramp: sp.Distances) -> None:
    x, _ = ramp_samples()
    own = sp.distance(sp.Model(Ramp()), x, None, "linf", budget=sp.Budget(passes=60))
    assert own.own_decision
    assert not bool(own.wrong.any())
    assert float(own.values[10]) == pytest.approx(0.1, rel=0.02), "back over the boundary"
    assert torch.equal(own.values[:10], ramp.values[:10])
    assert own.rho == pytest.approx(float((own.values / x.flatten(1).amax(1)).mean()))


def test_samples_without_a_success_are_farther_than_all(ramp: sp.Distances, deaf: sp.Distances) -> None:
    assert deaf.median == math.inf
    assert math.isnan(deaf.rho)
    assert math.isnan(deaf.mean)
    assert deaf.robust_accuracy(100) == 1
    # seven of the ten that were attacked were not found
    codes = ramp.result.codes.clone()
    codes[:7] = deaf.result.codes[0]
    values = ramp.values.clone()
    values[:7] = math.inf
    mixed = replace(ramp, result=replace(ramp.result, codes=codes, distance=values))
    assert int(mixed.missing.sum()) == 7
    assert mixed.quantile(0.3).value == pytest.approx(0.06, rel=0.05)
    assert mixed.quantile(0.31).value == math.inf
    assert mixed.quantile(0.3).high == math.inf
    assert mixed.mean == pytest.approx(0.04, rel=0.05)
    assert mixed.robust_accuracy(100) == pytest.approx(7 / 11)
    assert mixed.closest(9).tolist() == [9, 8, 7]
    assert mixed.farthest(2).tolist() == [7, 8]


@pytest.mark.parametrize("level", [0.05, 0.5, 0.9])
def test_quantile_intervals_against_scipy(level: float) -> None:
    """The ranks are the narrowest with 2.5% at most on either side, for a binomial number of samples below the quantile."""
    for count in (1, 4, 10, 37, 200, 1000):
        first, last = module._ranks(count, level)
        below = stats.binom(count, level)
        assert first == 0 or below.cdf(first - 1) <= 0.025
        assert below.cdf(first) > 0.025
        assert last == count + 1 or below.sf(last - 1) <= 0.025
        assert below.sf(last - 2) > 0.025


def test_quantiles_need_samples(ramp: sp.Distances) -> None:
    for level in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(InputError, match="between 0 and 1"):
            ramp.quantile(level)
    few = ramp.quantile(0.95)
    assert few.high == math.inf, "ten samples say nothing of what lies above"
    x, _ = ramp_samples()
    none = sp.distance(sp.Model(Ramp()), x[10:], torch.zeros(1, dtype=torch.int64), "linf")
    assert math.isnan(none.median)
    assert all(math.isnan(bound) for bound in none.rho_interval)
    assert "nan" in none.summary()


def test_l0_and_empty_inputs() -> None:
    x, y = ramp_samples()
    x[0] = 0
    found = sp.distance(sp.Model(Ramp()), x[:10], y[:10], "l0")
    assert found.sizes.tolist() == [0.0] + [16.0] * 9
    assert math.isnan(float(found.relative[0]))
    assert found.rho == pytest.approx(float((found.values[1:] / 16).mean())), "an input that is zero has no relative distance"
    # k features go from 0.48 to 1: 0.52 k / 16 > 0.02 from k = 1 on
    assert float(found.values[9]) == 1
    assert float(found.values[0]) == 9  # of nothing to more than half


def test_targets() -> None:
    x, y = ramp_samples()
    found = sp.distance(sp.Model(Ramp()), x, y, "linf", goal=sp.Targeted(1), budget=sp.Budget(passes=60))
    assert not bool(found.wrong.any())
    assert float(found.values[10]) == 0, "it is at the target already"
    assert found.robust_accuracy(0) == pytest.approx(10 / 11)
    with pytest.raises(InputError, match="one target"):
        sp.distance(sp.Model(Ramp()), x, y, "linf", goal=sp.Targeted("all"))


def test_errors_name_what_would_do() -> None:
    x, y = ramp_samples()
    model = sp.Model(Ramp())
    with pytest.raises(CapabilityError, match=r"PGD searches a ball.*l0.*minimal.*SigmaZero.*Bisect"):
        sp.distance(model, x, y, "l0", "pgd")
    with pytest.raises(CapabilityError, match="DDN works in l2"):
        sp.distance(model, x, y, "linf", "ddn")
    with pytest.raises(InputError, match="'linf'"):
        sp.distance(model, x, y, "lin")
    with pytest.raises(InputError, match="one tensor"):
        sp.distance(model, [(x, y)], None, "l2")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="bounds"):
        sp.distance(model, x + 1, None, "l2")
    with pytest.raises(InputError, match=r"sp\.Model"):
        sp.distance(Ramp(), x, None, "l2")  # type: ignore[arg-type]
    assert sp.distance(model, x, y, "linf", sp.attacks.Bisect(sp.attacks.PGD(steps=5), 8)).median == pytest.approx(0.1, rel=0.1)


def test_save_load_and_pandas(ramp: sp.Distances, tmp_path: Path) -> None:
    path = ramp.save(tmp_path / "new" / "ramp")
    again = sp.Distances.load(path)
    assert torch.equal(again.x, ramp.x)
    assert again.summary() == ramp.summary()
    assert (again.own_decision, again.complete) == (False, True)
    with pytest.raises(InputError, match="exists"):
        ramp.save(path)
    frame = ramp.to_pandas()
    assert frame["relative"].tolist() == pytest.approx(ramp.relative.tolist())
    assert (frame["status"] == "already_wrong").sum() == 1
    assert not list((tmp_path / "new").glob(".*"))
    (path / "distances.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        sp.Distances.load(path)
    with pytest.raises(DataError):
        sp.Distances.load(tmp_path / "nothing")


class Stops(nn.Module):
    """A `Ramp` during which Ctrl-C is pressed."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return Ramp()(x)  # type: ignore[no-any-return]


def test_ctrl_c_keeps_what_is_finished(ramp: sp.Distances) -> None:
    x, y = ramp_samples()
    part = sp.distance(sp.Model(Stops(80)), x, y, "linf", budget=sp.Budget(passes=60), batch_size=4)
    assert not part.complete
    assert 0 < len(part) < 11
    assert torch.equal(part.x, x[part.result.index])
    assert part.values.tolist() == pytest.approx(ramp.values[part.result.index].tolist())


# the report


def written(found: dict[str, sp.Distances], folder: Path, **more: Any) -> tuple[Tags, dict[str, Any]]:
    models = {name: sp.Model(Ramp()) for name in found}
    page = report.write_distances(found, models, folder, **(SETTINGS | more))
    assert page == folder / "report.html"
    return Tags(page.read_text()), json.loads((folder / "results.json").read_text())


def test_report_says_what_was_measured(ramp: sp.Distances, tmp_path: Path) -> None:
    tags, document = written({"ramp": ramp}, tmp_path, class_names=["low", "high"], examples=3)
    assert_needs_nothing(tags)
    text = " ".join(tags.text.split())
    (model,) = document["models"]
    assert model["counts"] == {"wrong": 1, "found": 10, "missing": 0, "failed": 0}
    assert model["rho"] == ramp.rho
    assert model["clean_accuracy"] == pytest.approx(10 / 11)
    assert [q["value"] for q in model["quantiles"]] == [ramp.quantile(q["level"]).value for q in model["quantiles"]]
    assert model["quantiles"][-1]["high"] is None
    assert model["curve"][0] == [0.0, 10 / 11]
    assert model["curve"][-1] == [pytest.approx(0.2, rel=0.02), 0.0]
    assert sp.AttackResult.load(tmp_path / model["folder"]).distance.tolist() == ramp.values.tolist()
    assert f"half (median) {ramp.median:.3g}" in text
    assert f"ramp {ramp.rho:#.3g}" in text
    assert "10 (low, taken for high)" in text, "wrong from the start, listed apart"
    assert "upper bound" in text
    assert ramp.attack_name in text
    numbers = [int(n) for n in re.findall(r"sample (\d+), class", text)]
    assert numbers == [9, 8, 7, 0, 1, 2], "nearest first, then farthest first"
    assert len([tag for tag, _ in tags.tags if tag == "img"]) == 6 * 3
    assert (tmp_path / "figures" / "distances.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "distances.csv").read_text().splitlines()))
    assert [float(row["distance"]) for row in rows] == ramp.values.tolist()
    assert rows[10]["status"] == "already_wrong"


def test_no_sample_is_shown_as_near_and_far(ramp: sp.Distances, tmp_path: Path) -> None:
    tags, _ = written({"ramp": ramp}, tmp_path, examples=8)
    numbers = re.findall(r"sample (\d+), class", tags.text)
    assert len(numbers) == len(set(numbers)) == 10


def test_failures_are_shown_as_not_found(ramp: sp.Distances, deaf: sp.Distances, tmp_path: Path) -> None:
    tags, document = written({"ramp": ramp, "deaf": deaf}, tmp_path)
    text = " ".join(tags.text.split())
    assert "For 11 samples of deaf the attack found nothing. That is a failure of the attack, not a proof" in text
    assert "For most of the 11 samples that `deaf` gets right no change was found" in document["verdict"]
    deaf_model = document["models"][1]
    assert deaf_model["rho"] is None
    assert all(q["value"] is None for q in deaf_model["quantiles"])
    assert "none found" in text
    assert "deaf has none to show" in text


def test_two_models_are_compared_sample_by_sample(ramp: sp.Distances) -> None:
    farther = replace(ramp, result=replace(ramp.result, distance=ramp.values * 2))
    assert "`b` is farther from the boundary than `a` on 100.0% of the 10 samples" in _verdict({"a": ramp, "b": farther})
    assert "`b` is nearer to the boundary than `a` on 100.0%" in _verdict({"a": farther, "b": ramp})
    assert "neither nearer" in _verdict({"a": ramp, "b": ramp})


def test_schema_is_documented(ramp: sp.Distances, tmp_path: Path) -> None:
    _, document = written({"ramp": ramp}, tmp_path)
    documented = report.distance_results.__doc__ or ""
    (model,) = document["models"]
    for key in [*document, *model, *model["counts"], *model["attack"], *model["quantiles"][0]]:
        assert re.search(rf"\b{key}\b", documented), key
    assert document["schema"] == 1


def test_hostile_names(ramp: sp.Distances, tmp_path: Path) -> None:
    noted = replace(ramp, result=replace(ramp.result, notes=(HOSTILE,)))
    tags, document = written(
        {HOSTILE: noted, "<b>two</b>": noted}, tmp_path / "out", title=HOSTILE, data_name=HOSTILE, command=HOSTILE,
        class_names=[HOSTILE, "</style>"], config={HOSTILE: HOSTILE},
    )  # fmt: skip
    assert_needs_nothing(tags)
    assert not any(tag == "b" for tag, _ in tags.tags)
    assert html.escape("<script src=http://evil/x.js>", quote=False) in (tmp_path / "out/report.html").read_text()
    assert [path for path in tmp_path.rglob("*") if (tmp_path / "out") not in (path, *path.parents)] == []
    assert len({model["folder"] for model in document["models"]}) == 2


@pytest.mark.parametrize(("shape", "drawn"), [((3, 4, 4), 6), ((5,), 2), ((2, 4, 4), 0), ((300,), 0)])
def test_inputs_of_every_kind(shape: tuple[int, ...], drawn: int, tmp_path: Path) -> None:
    found = sp.distance(sp.Model(Ramp()), *ramp_samples(shape), "l2", "ddn")
    tags, _ = written({"ramp": found}, tmp_path, examples=1)
    assert len([1 for tag, attributes in tags.tags if tag == "img" or attributes.get("class") == "bars"]) == drawn
    assert ("nothing to draw" in tags.text) == (drawn == 0)


def test_a_model_that_gets_nothing_right_has_no_distances(tmp_path: Path) -> None:
    x, y = ramp_samples()
    tags, document = written({"ramp": sp.distance(sp.Model(Ramp()), x, 1 - y, "linf", "fmn")}, tmp_path)
    assert document["verdict"].startswith("On half of the 1 samples")  # the last is of class 1
    tags, document = written({"ramp": sp.distance(sp.Model(Ramp()), x[:10], 1 - y[:10], "linf", "fmn")}, tmp_path)
    assert document["verdict"] == "`ramp` gets none of its 10 samples right, so there is no distance to measure."
    assert "none found" not in tags.text


def test_report_of_targets_and_own_decisions(tmp_path: Path) -> None:
    x, y = ramp_samples()
    budget = sp.Budget(passes=30)
    own = sp.distance(sp.Model(Ramp()), x, None, "linf", budget=budget)
    tags, document = written({"ramp": own}, tmp_path / "own")
    assert document["own_decision"] is True
    assert document["models"][0]["clean_accuracy"] is None
    assert "wrong from the start" not in tags.text
    assert "turn the answer of `ramp`" in document["verdict"]
    aimed = sp.distance(sp.Model(Ramp()), x, y, "linf", goal=sp.Targeted(1), budget=budget)
    tags, document = written({"ramp": aimed}, tmp_path / "aimed")
    assert "lead `ramp` to the target" in document["verdict"]
    assert "None was wrong" not in tags.text


def test_an_interrupted_run_says_so(ramp: sp.Distances, tmp_path: Path) -> None:
    x, y = ramp_samples()
    part = sp.distance(sp.Model(Stops(80)), x, y, "linf", budget=sp.Budget(passes=60), batch_size=4)
    tags, document = written({"ramp": ramp, "part": part}, tmp_path)
    assert document["complete"] is False
    assert document["data"]["samples"] == 11
    assert "Not complete" in tags.text


def test_a_full_disk_leaves_the_old_report(ramp: sp.Distances, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written({"ramp": ramp}, tmp_path)
    old = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(report_folder.os, "replace", _full)
    with pytest.raises(DataError, match="No space left"):
        written({"ramp": ramp}, tmp_path, title="Second")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == old


def _full(*args: object) -> None:
    raise OSError(28, "No space left on device")


def test_bad_arguments(ramp: sp.Distances, deaf: sp.Distances, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no distances"):
        written({}, tmp_path)
    with pytest.raises(InputError, match="examples"):
        written({"ramp": ramp}, tmp_path, examples=-1)
    with pytest.raises(InputError, match="'ramp'"):
        report.write_distances({"ramp": ramp}, {"other": sp.Model(Ramp())}, tmp_path, **SETTINGS)
    x, y = ramp_samples()
    other_norm = sp.distance(sp.Model(Ramp()), x, y, "l2", "ddn")
    with pytest.raises(InputError, match="another kind"):
        written({"ramp": ramp, "l2": other_norm}, tmp_path)
    with pytest.raises(InputError, match="other samples"):
        written({"ramp": ramp, "moved": replace(ramp, x=x + 0.01)}, tmp_path)
