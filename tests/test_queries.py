"""Query curves: against what is known of every single query, every group of samples told apart, and a report that says so."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from test_report import HOSTILE, Tags, assert_needs_nothing
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint import report
from saddlepoint.engine import Attack, Declaration, Problem, Record
from saddlepoint.errors import DataError, InputError
from saddlepoint.evaluate.queries import checkpoints
from saddlepoint.models.http_model import HttpModel, Traffic

SETTINGS: dict[str, Any] = {"title": "A try", "data_name": "made up", "config": {"eps": "0.2"}, "seed": 3}
ROOM = 0.2  # the ball
SIZES = tuple(np.random.default_rng(0).permutation(np.arange(1, 61) / 128).tolist())  # exact in float32


@dataclass(frozen=True)
class At:
    x: Tensor


@dataclass(frozen=True, kw_only=True)
class Scan(Attack):
    """Adds one size after the other to all features. ahead: what a step sets is evaluated by the next, or by the last look."""

    sizes: tuple[float, ...] = SIZES
    ahead: bool = False
    declaration = Declaration(
        summary="tries sizes", reference="none", access=sp.Access.SCORES, minimizes=True, no_oracle="a scan of one direction"
    )

    @property
    def iterations(self) -> int:
        return len(self.sizes) - self.ahead

    @property
    def looks_last(self) -> bool:
        return self.ahead

    def cost(self, classes: int) -> tuple[int, int]:
        return 1, 0

    def init(self, problem: Problem) -> At:
        return At(self._point(problem, problem.k))

    def step(self, problem: Problem, state: At) -> At:
        problem.margin(self._point(problem, problem.k))
        return At(self._point(problem, problem.k + 1))

    def _point(self, problem: Problem, k: Tensor) -> Tensor:
        size = torch.tensor(self.sizes)[k.clamp(max=len(self.sizes) - 1)]
        return problem.origin + size.view(-1, *[1] * (problem.origin.dim() - 1))


class Ramp(nn.Module):
    """Class 1 where the mean is above 0.5; NaN where it is negative."""

    rows = 0

    def forward(self, x: Tensor) -> Tensor:
        f = x.flatten(1).mean(1) - 0.5
        self.rows += len(x)
        return torch.where(f[:, None] < -0.5, torch.nan, torch.stack([-f, f], 1))


LEVELS = [0.5 - step / 64 for step in range(1, 21)]  # distances 1/64 .. 20/64


def inputs(levels: list[float] | None = None, shape: tuple[int, ...] = (1, 4, 4)) -> tuple[Tensor, Tensor]:
    """Constant inputs, all labelled 0; the last one is wrong from the start."""
    level = torch.tensor([*(LEVELS if levels is None else levels), 0.75])
    return level.view(-1, *[1] * len(shape)).expand(-1, *shape).contiguous(), torch.zeros(len(level), dtype=torch.int64)


def model() -> sp.Model:
    return sp.Model(Ramp(), bounds=(-2, 2))


def known(queries: int, room: float = math.inf) -> list[float]:
    """The distance that each attacked sample has after so many queries, the first of which is the clean one."""
    tried = SIZES[: max(queries - 1, 0)]
    return [min((size for size in tried if level + size > 0.5 and size <= room), default=math.inf) for level in LEVELS]


def smallest(attack: Attack | None = None, **settings: Any) -> tuple[sp.AttackResult, sp.Trace]:
    trace = sp.Trace()
    result = sp.attack(model(), *inputs(), attack or Scan(), sp.Minimize("linf"), callback=trace, **settings)
    return result, trace


@pytest.fixture(scope="module")
def ball() -> sp.QueryCurve:
    return sp.query_curve(sp.attack(model(), *inputs(), Scan(), sp.Linf(ROOM), budget=sp.Budget(queries=200)))


@pytest.fixture(scope="module")
def least() -> sp.QueryCurve:
    return sp.query_curve(*smallest(budget=sp.Budget(queries=200)))


# the library


@pytest.mark.parametrize("batch_size", [None, 3])
def test_success_in_a_ball_query_by_query(batch_size: int | None) -> None:
    result = sp.attack(model(), *inputs(), Scan(), sp.Linf(ROOM), batch_size=batch_size)
    curve = sp.query_curve(result)
    for queries in range(len(SIZES) + 3):
        expected = sum(math.isfinite(size) for size in known(queries, ROOM))
        assert curve.fooled(queries) == expected, queries
        assert curve.share(queries) == expected / len(LEVELS)
        exact = stats.binomtest(expected, len(LEVELS)).proportion_ci(method="exact")
        assert curve.limits(queries) == pytest.approx((exact.low, exact.high))
    assert len(curve) == len(LEVELS)
    assert 0 < curve.share(curve.reach) == result.success_rate < 1
    assert (curve.smallest, curve.attack, curve.aim) == (False, "Scan", "within Linf(0.2)")


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_distance_query_by_query(ahead: bool, batch_size: int | None) -> None:
    """Also where the last point is evaluated after the last step, of which no record tells."""
    result, trace = smallest(Scan(ahead=ahead), batch_size=batch_size)
    curve = sp.query_curve(result, trace)
    assert int(curve.spent.max()) == len(SIZES) + 1
    for queries in range(1, len(SIZES) + 2):
        assert curve.found(queries).tolist() == known(queries), queries
        middle = np.quantile(known(queries), 0.5, method="inverted_cdf")
        assert curve.quantile(queries).value == middle
    assert torch.equal(curve.found(curve.reach), result.distance[curve.attacked])
    firsts = [next((q for q in range(len(SIZES) + 2) if math.isfinite(known(q)[row])), math.inf) for row in range(len(LEVELS))]
    assert curve.first.tolist() == firsts
    assert curve.needed(0.75).value == np.quantile(firsts, 0.75, method="inverted_cdf")
    assert curve.aim == "for the smallest linf change"


def test_a_trace_survives_ctrl_c_and_the_disk(tmp_path: Path) -> None:
    whole = sp.query_curve(*smallest())

    class Stops(sp.Trace):
        def __call__(self, record: Record) -> None:
            super().__call__(record)
            if bool((record.ids >= 9).any()) and bool((record.iteration > 20).any()):
                raise KeyboardInterrupt

    trace = Stops()
    with pytest.raises(sp.Interrupted) as stopped:
        sp.attack(model(), *inputs(), Scan(), sp.Minimize("linf"), callback=trace, batch_size=4)
    part = stopped.value.result
    assert 0 < len(part) < len(LEVELS)
    kept = sp.Trace.load(trace.save(tmp_path / "trace", part))
    assert set(kept.finds()["ids"].tolist()) <= set(part.ids.tolist()) < set(trace.finds()["ids"].tolist())
    result = sp.attack(model(), *inputs(), Scan(), sp.Minimize("linf"), callback=kept, resume=part)
    curve = sp.query_curve(result, kept, at=whole.at)
    assert curve.to_dict()["points"] == whole.to_dict()["points"]
    # without what came before, a sample's find counts from its last query on
    late = sp.query_curve(result, sp.Trace(), at=(curve.reach - 1, curve.reach))
    assert late.fooled(late.at[0]) == 0
    assert torch.equal(late.found(late.reach), whole.found(whole.reach))
    (tmp_path / "trace").write_bytes(b"no trace")
    for path in ("trace", "nowhere"):
        with pytest.raises(DataError, match=path):
            sp.Trace.load(tmp_path / path)


def test_what_was_refuted_or_is_of_other_samples_does_not_count() -> None:
    result, trace = smallest()
    ids = result.ids[:3]
    for change in (ids, ids + 1000):
        columns = torch.zeros(3), torch.ones(3, dtype=torch.bool), torch.full((3,), 2), result.distance[:3] / 2
        trace(Record(change, torch.ones(3), torch.zeros(3, 1, 4, 4), *columns))
    clean = sp.query_curve(*smallest()).to_dict()
    assert sp.query_curve(result, trace).to_dict() | {"passes": None} == clean | {"passes": None}


@pytest.mark.filterwarnings("ignore::saddlepoint.SaddlepointWarning")
def test_who_is_counted() -> None:
    levels = [0.45, 0.1, -0.3]  # found, survives, NaN
    result = sp.attack(model(), *inputs(levels), Scan(), sp.Linf(ROOM))
    told = sp.query_curve(result).to_dict()
    assert told["counts"] == {"attacked": 3, "wrong": 1, "fooled": 1, "failed": 1}
    assert told["points"][-1]["share"] == pytest.approx(1 / 3)
    assert told["spent"]["most"] == int(result.queries.forward[:3].max())
    text = sp.query_curve(result).summary()
    assert "3 samples attacked; 1 were wrong from the start; the model failed on 1" in text


def test_nothing_to_attack() -> None:
    for shape in (inputs([]), (torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64))):
        curve = sp.query_curve(sp.attack(model(), *shape, Scan(), sp.Linf(ROOM)))
        assert len(curve) == 0
        assert math.isnan(curve.share(10))
        assert "0 samples attacked" in curve.summary()


def test_towards_targets() -> None:
    x, y = inputs()
    curve = sp.query_curve(sp.attack(model(), x, y, Scan(), sp.Linf(ROOM), sp.Targeted("all")))
    assert len(curve) == len(x)  # there is one other class; who is there already took one query
    assert curve.fooled(1) == 1
    assert curve.fooled(curve.reach) == 1 + sum(math.isfinite(size) for size in known(len(SIZES) + 1, ROOM))


@pytest.mark.parametrize(
    ("reach", "expected"),
    [
        (1, [1]),
        (7, [1, 2, 5, 7]),
        (100, [10, 20, 50, 100]),
        (500, [50, 100, 200, 500]),
        (1000, [100, 200, 500, 1000]),
        (1200, [100, 200, 500, 1000, 1200]),
        (20_000, [100, 200, 500, 1000, 2000, 5000, 10_000, 20_000]),
    ],
)
def test_checkpoints(reach: int, expected: list[int]) -> None:
    assert list(checkpoints(reach)) == expected


def test_the_curve_ends_at_the_budget(ball: sp.QueryCurve, least: sp.QueryCurve) -> None:
    assert ball.at == least.at == checkpoints(200)
    free = sp.query_curve(sp.attack(model(), *inputs(), Scan(), sp.Linf(ROOM)))
    assert free.reach == len(SIZES) + 1
    assert sp.query_curve(ball.result, at=range(5, 9)).at == (5, 6, 7, 8)


def test_summary_shows_the_figures(ball: sp.QueryCurve, least: sp.QueryCurve) -> None:
    for curve in (ball, least):
        told, text = json.loads(json.dumps(curve.to_dict())), curve.summary()
        lines = {line.split()[0]: line.split() for line in text.splitlines()}
        for point in told["points"]:
            assert lines[str(point["queries"])][1] == str(point["fooled"])
            if curve.smallest:
                values = [f"{each['value']:.4g}" if math.isfinite(each["value"]) else "-" for each in point["distance"]]
                assert lines[str(point["queries"])][-3:] == values
        assert curve.attack in repr(curve)


def test_errors(ball: sp.QueryCurve) -> None:
    x, y = inputs()
    last = sp.attack(model(), x, y, Scan(), sp.Linf(ROOM), keep="margin")
    result, trace = smallest()
    all_targets = sp.attack(model(), x, y, Scan(), sp.Minimize("linf"), sp.Targeted("all"), callback=sp.Trace())
    twice = replace(all_targets, ids=torch.zeros_like(all_targets.ids))
    for arguments, told in (
        ((last,), 'keep="margin"'),
        ((result,), "callback=trace"),
        ((twice, trace), "ids"),
        ((ball.result, None, ()), "ascending"),
        ((ball.result, None, (0, 5)), "ascending"),
        ((ball.result, None, (5, 5)), "ascending"),
        ((ball.result, None, (5, 7.5)), "whole"),
    ):
        with pytest.raises(InputError, match=told):
            sp.query_curve(*arguments)
    with pytest.raises(InputError, match="level"):
        ball.needed(1.0)


# the report


def written(
    curves: dict[str, sp.QueryCurve], folder: Path, x: Tensor | None = None, **more: Any
) -> tuple[Tags, dict[str, Any]]:
    x = inputs()[0] if x is None else x
    page = report.write_queries(curves, more.pop("model", model()), x, folder, **(SETTINGS | more))
    assert page == folder / "report.html"
    tags = Tags(page.read_text())
    assert_needs_nothing(tags)
    return tags, json.loads((folder / "results.json").read_text())


def test_report_says_what_was_measured(ball: sp.QueryCurve, least: sp.QueryCurve, tmp_path: Path) -> None:
    for name, curve in (("ball", ball), ("least", least)):
        victim = model()
        tags, results = written({"Scan": curve}, tmp_path / name, model=victim, model_name="ramp")
        assert victim.net.rows == victim.queries.forward == 0, "the report asks nothing"
        assert results["complete"] is True
        assert results["traffic"] is None
        (attack,) = results["attacks"]
        plain = json.loads(json.dumps(curve.to_dict()).replace("Infinity", "null"))
        assert {key: attack[key] for key in plain} == plain
        assert "Scan" in results["verdict"]
        assert f"{len(LEVELS)} samples" in results["verdict"]
        for point in attack["points"]:
            if curve.smallest and point["distance"][1]["value"] is not None:
                assert f"{point['distance'][1]['value']:.3g}" in tags.text
            if not curve.smallest:
                assert f"{100 * point['share']:.1f}%" in tags.text
        assert (tmp_path / name / "figures" / "queries.png").stat().st_size > 1000
        pictures = [attributes for tag, attributes in tags.tags if tag == "img"]
        assert len(pictures) == 3 * min(12, attack["counts"]["fooled"])
        rows = list(csv.DictReader((tmp_path / name / "queries.csv").read_text().splitlines()))
        assert [float(row["distance"]) for row in rows] == curve.result.distance.tolist()
        assert [int(row["queries"]) for row in rows] == curve.result.queries.forward.tolist()
        assert [float(row["first_fooled"]) for row in rows[:-1]] == curve.first.tolist()
        assert rows[-1]["status"] == "already_wrong"


def test_several_attacks_in_one_picture(ball: sp.QueryCurve, least: sp.QueryCurve, tmp_path: Path) -> None:
    upwards = sp.attack(model(), *inputs(), Scan(sizes=tuple(sorted(SIZES))), sp.Linf(ROOM), budget=sp.Budget(queries=200))
    few = sp.query_curve(replace(upwards, config=upwards.config | {"budget": {"passes": None, "queries": 60}}))
    tags, results = written({HOSTILE: ball, "upwards": few}, tmp_path, model_name=HOSTILE, class_names=(HOSTILE, "b"))
    assert [attack["name"] for attack in results["attacks"]] == [HOSTILE, "upwards"]
    best = HOSTILE if ball.share(60) > few.share(60) else "upwards"
    assert f"After 60 queries `{best}` fools most" in results["verdict"] or ball.share(60) == few.share(60)
    assert "–" in tags.text  # one curve ends before the other
    with pytest.raises(InputError, match="another aim"):
        written({"a": ball, "b": least}, tmp_path)


def test_a_curve_that_falls_far_is_drawn_all_the_same(tmp_path: Path) -> None:
    far = Scan(sizes=(1.5, 1.0, 0.5, 0.25, 1 / 8, 1 / 16, 1 / 32))
    trace = sp.Trace()
    result = sp.attack(model(), *inputs([0.495] * 4), far, sp.Minimize("linf"), callback=trace)
    _, results = written({"Scan": sp.query_curve(result, trace)}, tmp_path, x=inputs([0.495] * 4)[0])
    medians = [point["distance"][1]["value"] for point in results["attacks"][0]["points"]]
    assert medians[-1] == 1 / 32


@pytest.mark.parametrize("shape", [(6,), (2, 3, 4)])
def test_samples_that_are_no_images(shape: tuple[int, ...], tmp_path: Path) -> None:
    x, y = inputs(shape=shape)
    curve = sp.query_curve(sp.attack(model(), x, y, Scan(), sp.Linf(ROOM)))
    tags, _ = written({"Scan": curve}, tmp_path, x=x)
    assert ("nothing to draw" in tags.text) == (len(shape) > 1)


def test_nothing_found_and_not_complete(tmp_path: Path) -> None:
    x, y = inputs([0.1, 0.05])
    tags, results = written({"Scan": sp.query_curve(sp.attack(model(), x, y, Scan(), sp.Linf(ROOM)))}, tmp_path / "a", x=x)
    assert "0.0%" in results["verdict"]
    assert "none to show" in tags.text
    trace = sp.Trace()
    result = sp.attack(model(), x, y, Scan(sizes=(0.01,)), sp.Minimize("linf"), callback=trace)
    _, results = written({"Scan": sp.query_curve(result, trace)}, tmp_path / "b", x=x)
    assert "no adversarial input for most" in results["verdict"]
    x, y = inputs([])
    _, results = written({"Scan": sp.query_curve(sp.attack(model(), x, y, Scan(), sp.Linf(ROOM)))}, tmp_path / "c", x=x)
    assert "nothing to attack" in results["verdict"]
    part = sp.attack(model(), *inputs(), Scan(), sp.Linf(ROOM)).select(torch.arange(4))
    tags, results = written({"Scan": sp.query_curve(part)}, tmp_path / "d")
    assert results["complete"] is False
    assert "too high" in tags.text


@pytest.fixture
def remote() -> Iterator[HttpModel]:
    pytest.importorskip("httpx2")
    with HttpModel("http://localhost:9/predict", num_classes=2, bounds=(-2, 2)) as made:
        yield made


def test_traffic_of_a_model_behind_http(ball: sp.QueryCurve, remote: HttpModel, tmp_path: Path) -> None:
    remote.traffic = Traffic(answered=1234, sent=1300, requests=77, retried=5)
    tags, results = written({"Scan": ball}, tmp_path, model=remote)
    assert results["traffic"] == {"answered": 1234, "sent": 1300, "requests": 77, "retried": 5, "cached": 0}
    assert "1,234" in tags.text


def test_report_errors(ball: sp.QueryCurve, tmp_path: Path) -> None:
    for curves, more, told in (
        ({}, {}, "no query curves"),
        ({"a": ball}, {"examples": -1}, "examples"),
        ({"a": ball}, {"x": inputs()[0][:3]}, "other inputs"),
    ):
        with pytest.raises(InputError, match=told):
            written(curves, tmp_path, **more)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        written({"a": ball}, tmp_path / "file")
