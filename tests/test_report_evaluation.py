"""The report of evaluations: its figures are the evaluation's, its words follow from them, and it is written whole or not."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from matplotlib.colors import to_rgba
from test_report import HOSTILE, Tags, assert_needs_nothing, samples, threshold
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint import report
from saddlepoint.errors import DataError, InputError
from saddlepoint.evaluate import Diagnosis, Effort, Evaluation, Finding, WorstCase
from saddlepoint.evaluate.cascade import borrowing, escalation
from saddlepoint.evaluate.evaluation import FAILED, SIGNS, STANDS, WRONG, binomial_limits
from saddlepoint.report import evaluations as module
from saddlepoint.report import figures
from saddlepoint.report import folder as report_folder
from saddlepoint.report.words import distinct, percent, visible
from saddlepoint.taxonomy import Access, Norm

SETTINGS: dict[str, Any] = {"title": "A try", "data_name": "made up", "config": {"eps": [0.1]}, "seed": 3}
DIGITS = 60


def model() -> sp.Model:
    return sp.Model(threshold(0))


def evaluate(eps: float = 0.05, shape: tuple[int, ...] = (1, 4, 4), **more: Any) -> Evaluation:
    """Of 16 samples at distances 0.02, 0.04, ... 0.16, two at each."""
    return sp.evaluate(model(), *samples(shape), sp.Linf(eps), **more)


@pytest.fixture(scope="module")
def found() -> Evaluation:
    return evaluate()


@pytest.fixture(scope="module")
def digit(mlp: nn.Module) -> Evaluation:
    """With samples that are wrong from the start, and stages that break some."""
    split = sp.data.load("digits").test.take(DIGITS)
    y = split.y.clone()
    y[::10] = (y[::10] + 3) % 10
    return sp.evaluate(sp.Model(mlp), split.x, y, sp.Linf(0.05), curve=True)


def written(
    found: Sequence[tuple[str, Evaluation]], folder: Path, models: dict[str, sp.Model] | None = None, **more: Any
) -> tuple[Tags, dict[str, Any]]:
    page = report.write_evaluations(found, models or {name: model() for name, _ in found}, folder, **(SETTINGS | more))
    assert page == folder / "report.html"
    return Tags(page.read_text()), json.loads((folder / "results.json").read_text())


def words(tags: Tags) -> str:
    return " ".join(tags.text.split())


def verdict(found: Evaluation) -> str:
    return module._sentences(module._Entry("m", found, Access.GRADIENTS))


def interrupted_after(forwards: int) -> Evaluation:
    class Stops(nn.Module):
        """Ctrl-C is pressed during one of the passes."""

        left = forwards

        def forward(self, x: Tensor) -> Tensor:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return threshold(0)(x)  # type: ignore[no-any-return]

    return sp.evaluate(sp.Model(Stops()), *samples((1, 4, 4)), sp.Linf(0.05), batch_size=4)


def test_it_says_what_was_measured(found: Evaluation, tmp_path: Path) -> None:
    tags, document = written([("net", found)], tmp_path, class_names=["low", "high"], examples=3)
    assert_needs_nothing(tags)
    text = words(tags)
    (figures_of,) = document["evaluations"]
    assert figures_of["counts"] == {"wrong": 0, "failed": 0, "broken": 4, "stands": 12, "proven": 0}
    assert figures_of["samples"] == 16
    assert figures_of["unreached"] == 0
    for key, value in json.loads(json.dumps(found.to_dict())).items():
        assert figures_of[key] == value if key != "stages" else [s["after"] for s in value], key
    high = binomial_limits(12, 16)[1]
    assert document["verdict"] == (
        "Within linf eps 0.05, the robust accuracy of `net` is at most 75.0%. Without an attack it gets 16 of 16 samples right "
        f"(100.0%); attacks broke 4 of those. Nothing was proved, so that for these samples the truth lies between 0.0% and "
        f"75.0%; for all such inputs it is at most {percent(high)} (97.5% sure). No sign of masked gradients was seen."
    )
    assert f"net linf eps 0.05 100.0% 75.0% nothing {percent(high)} no sign of masking" in text
    spent = sum(int(stage.result.queries.total.sum()) for stage in found.stages)
    assert sum(stage["passes"] for stage in figures_of["stages"]) == spent
    total = int(found.queries.total.sum())
    assert figures_of["totals"]["forward"] + figures_of["totals"]["backward"] == total
    looked = int(found.looked.sum())
    assert looked > 0
    assert figures_of["totals"]["looked"] == total - spent == 2 * looked
    assert f"look at gradients for signs of masking; no attack {looked} – 2 {2 * looked} " in text
    assert f"all together 4 {total:,}" in text
    for number, stage in enumerate(figures_of["stages"], 1):
        assert f"{number} {stage['name']}" in text
        assert stage["why"] in text
    margins = re.findall(r"margin −([\d.e+-]+)sample (\d+), class", tags.text)
    assert [int(number) for _, number in margins] == found.closest(3).tolist()
    assert len([tag for tag, _ in tags.tags if tag == "img"]) == 2 * 3 * 3
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "intervals.png", "cascade-net-linf_eps_0.05.png", "classes-net-linf_eps_0.05.png",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "figures").iterdir())
    assert "Other sizes" not in text


def test_the_steps_add_up(digit: Evaluation) -> None:
    entry = module._Entry("m", digit, Access.GRADIENTS)
    standing = right = int((digit.broken_by != WRONG).sum())
    assert right < DIGITS
    for number, (step, stage) in enumerate(zip(entry.steps, digit.stages, strict=True)):
        before = (digit.broken_by == STANDS) | (digit.broken_by >= number)
        attacked = torch.zeros_like(before)
        attacked[stage.rows] = True
        assert step.fell + step.held == int((before & attacked).sum())
        standing -= step.fell
        assert step.stand == standing
    assert standing == int(digit.stands.sum())
    assert sum(step.fell for step in entry.steps) == int(digit.broken.sum()) > 0
    assert entry.last == int(digit.broken_by.max())
    assert entry.steps[-1].name == "nearest"
    assert len(digit.stages[-1].broke) > entry.steps[-1].fell, "it attacks again what fell before"


def test_shown_inputs_are_what_they_are_said_to_be(digit: Evaluation, mlp: nn.Module) -> None:
    entry = module._Entry("m", digit, Access.GRADIENTS)
    known = digit.stands | digit.broken
    assert torch.equal(entry.predicted[known], sp.Model(mlp).predict(digit.adversarial)[known])
    (stands, near, titles), (broken, fell, stages) = module._albums(entry, sp.Model(mlp), 4, 0)
    assert (stands, broken) == ("stands", "broken")
    assert [example.index for example in near.examples] == digit.closest(4).tolist() == list(titles)
    assert all(example.shots[0].predicted == example.label for example in near.examples)
    assert all(example.shots[0].predicted != example.label for example in fell.examples)
    assert stages == {n: digit.stages[int(digit.broken_by[n])].name for n in stages}
    assert len({example.label for example in fell.examples}) == 4, "classes take turns"


def test_the_curve_and_the_search_for_it(digit: Evaluation, mlp: nn.Module, tmp_path: Path) -> None:
    tags, document = written([("net", digit)], tmp_path, {"net": sp.Model(mlp)})
    assert "Other sizes" in tags.text
    assert (tmp_path / "figures/curve-net-linf_eps_0.05.png").exists()
    assert document["evaluations"][0]["curve"] == [list(point) for point in digit.curve()]
    assert f"it broke {len(digit.stages[-1].broke)} of those that it was run on" in words(tags)
    each = replace(digit, threat=sp.Linf([0.05] * DIGITS))
    assert "Other sizes" not in written([("net", replace(each, nearest=None))], tmp_path, {"net": sp.Model(mlp)})[0].text


def test_several_models_and_threats(tmp_path: Path) -> None:
    small, large = evaluate(0.05), evaluate(0.11)
    tags, document = written([("one", small), ("one", large), ("two", small)], tmp_path)
    assert_needs_nothing(tags)
    one, two = document["models"]
    assert one["worst"]["robust_accuracy"] == WorstCase((small, large)).robust_accuracy == 6 / 16
    assert two["worst"] is None
    assert "worst case 37.5%" in words(tags)
    assert (
        "`one` gets 100.0% of the samples right, and under attack at most 75.0% within linf eps 0.05 and 37.5% within linf eps "
        "0.11; in the worst case over them 37.5%. `two`"
    ) in document["verdict"]
    identifiers = [attributes["id"] for _, attributes in tags.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    links = [attributes["href"] for tag, attributes in tags.tags if tag == "a"]
    assert len(links) == 3
    assert {link[1:] for link in links if link} <= set(identifiers)
    assert len(list((tmp_path / "figures").glob("cascade-*"))) == 3


def finding(name: str, found: bool, **more: Any) -> Finding:
    return Finding(name, found, more.pop("measured", {"figure": 1.0}), more.pop("says", f"what {name} says"), **more)


FINDINGS = (
    finding("piecewise-constant", True, next="what to do next"),
    finding("one-step", False),
    finding("randomness", False, measured={}, says="not measured: reasons"),
)


def test_the_diagnosis_in_words(found: Evaluation, tmp_path: Path) -> None:
    masked = replace(found, diagnosis=Diagnosis(FINDINGS, 16, 15, 10.0, 5.0, 1.5), notes=("half of the gradients vanished",))
    tags, document = written([("net", masked)], tmp_path)
    text = words(tags)
    assert "Signs of masked gradients were found" in document["verdict"]
    assert "piecewise-constant. What piecewise-constant says.What follows: What to do next." in text
    assert text.count(f"What follows: {masked.advice}") == 1
    assert "1 check found nothing one-step: what one-step says" in text
    assert "1 check could not be made randomness: not measured: reasons" in text
    assert "Half of the gradients vanished." in text
    assert "signs of masking" in text
    assert document["evaluations"][0]["totals"]["diagnosis"] == 15 * 16
    tags, document = written([("net", masked), ("other", found)], tmp_path)
    assert "found in `net` within linf eps 0.05: the truth may be far lower" in document["verdict"]
    checked = replace(masked, diagnosis=Diagnosis(FINDINGS[1:], 16, 15, 10.0, 5.0, 1.5))
    _, document = written([("net", checked), ("other", found)], tmp_path)
    assert document["verdict"].endswith(module._TRUST["checked"])
    _, document = written([("net", found), ("other", found)], tmp_path)
    assert document["verdict"].endswith(module._TRUST["quiet"])


@pytest.mark.parametrize(
    ("change", "access", "trust"),
    [
        ({}, Access.GRADIENTS, "quiet"),
        ({"complete": False}, Access.GRADIENTS, "unknown"),
        ({"notes": ("odd",)}, Access.GRADIENTS, "noted"),
        ({"notes": ("odd",)}, Access.SCORES, "scores"),
        ({"diagnosis": Diagnosis(FINDINGS, 16, 15, 1.0, 1.0, 1.0)}, Access.GRADIENTS, "masked"),
        ({"diagnosis": Diagnosis(FINDINGS[1:], 16, 15, 1.0, 1.0, 1.0)}, Access.GRADIENTS, "checked"),
    ],
)
def test_what_is_said_of_gradients(
    change: dict[str, Any], access: Access, trust: str, found: Evaluation, tmp_path: Path
) -> None:
    net = sp.Model(threshold(0), access=access)
    tags, document = written([("net", replace(found, **change))], tmp_path, {"net": net})
    assert document["evaluations"][0]["trust"] == trust
    assert module._TRUST[trust] in words(tags)
    documented = report.evaluation_results.__doc__ or ""
    assert re.search(rf"\b{trust}\b", documented)


def test_extremes_in_words(found: Evaluation) -> None:
    count, every = len(found), torch.ones(len(found), dtype=torch.int64)
    assert "is 0.0%. Without an attack it gets 16 of 16 samples right (100.0%); attacks broke all" in verdict(
        replace(found, broken_by=0 * every)
    )
    assert "at most 100.0%. Without an attack it gets 16 of 16 samples right (100.0%); attacks broke none" in verdict(
        replace(found, broken_by=STANDS * every)
    )
    assert verdict(replace(found, broken_by=WRONG * every)) == (
        "Without an attack, `m` gets 0 of 16 samples right (0.0%), so there was nothing to break."
    )
    proven = replace(found, certified=found.stands & (torch.arange(count) > count // 2))
    between = proven.interval
    assert between.certified > 0
    assert (
        f"truth lies between {percent(between.certified)} and 75.0%; for all such inputs between {percent(between.low)} and "
        f"{percent(between.high)}"
    ) in verdict(proven)
    assert "Nothing was proved" not in verdict(proven)


@pytest.mark.parametrize("code", [0, STANDS, WRONG, FAILED])
def test_extremes_can_be_written(code: int, found: Evaluation, tmp_path: Path) -> None:
    extreme = replace(found, broken_by=torch.full_like(found.broken_by, code), notes=("odd",))
    tags, document = written([("net", extreme)], tmp_path, examples=2)
    assert sum(document["evaluations"][0]["counts"].values()) == 16
    assert "There are none to show." in tags.text
    assert ("wrong or failed" in tags.text) == (code == FAILED)


def test_the_course_in_words(found: Evaluation) -> None:
    def course(broken_by: Tensor, heavy: Sequence[int], reached: int = 16) -> str:
        whole = found.stages[0]
        part = replace(whole, rows=whole.rows[:reached], result=whole.result.select(torch.arange(reached)))
        stages = tuple(replace(part if n in heavy else whole, name=f"s{n}", heavy=n in heavy) for n in range(4))
        changed = replace(found, stages=stages, broken_by=broken_by)
        return " ".join(module._course(module._Entry("m", changed, Access.GRADIENTS)))

    fell = torch.tensor([0, 0, 0, 1, *[STANDS] * 12])
    assert course(fell, (2, 3)) == (
        "The stages meant for all samples broke all 4 samples that fell, for 50.0% of the passes; the heavy ones none, for "
        "50.0%. The furthest down to break anything is s1 (number 2 of 4), with 1. Those below it broke nothing, for 50.0% of "
        "the passes. Each heavy stage was tried on all 12 that stand."
    )
    assert "Each heavy stage was tried on 4 of the 12 that stand." in course(fell, (2, 3), 8)
    fell[4:6] = 3
    assert course(fell, (2, 3)).startswith("The stages meant for all samples broke 4 of the 6 samples that fell, for 50.0%")
    assert "s3 (number 4 of 4), with 2. So the search had not run dry" in course(fell, ())
    assert "run dry" in course(fell, (2, 3))
    assert "run dry" not in course(fell, (2, 3), 8), "a ladder ends with a rung that breaks nothing"
    stand = torch.full((16,), STANDS)
    assert course(stand, ()) == "No attack broke anything."
    assert course(stand, (2, 3), 8).startswith("No attack broke anything. Each heavy stage was tried on 8 of the 16")
    assert course(torch.full((16,), WRONG), ()) == ""


def test_the_weakest_class_in_words(found: Evaluation) -> None:
    def said(y: Tensor, stands: Tensor) -> str:
        broken_by = torch.where(stands, STANDS, 0)
        changed = replace(found, x=found.x[:1].expand(len(y), 1, 4, 4), y=y, broken_by=broken_by, stages=())
        entry = module._Entry("m", changed, Access.GRADIENTS)
        entry.__dict__["found"] = changed
        return " ".join(module._extremes(entry.classes, ["a", "b"], changed.robust_accuracy, "class"))

    y = torch.arange(400) % 2
    far = said(y, (y == 1) | (torch.arange(400) < 100))
    assert far.startswith(
        "The weakest class is a: 50 of its 200 samples stand (25.0%; without an attack 100.0% are right). That is"
    )
    assert far.endswith("The strongest is b, with 100.0%.")
    assert "may well be chance" in said(y[:6], torch.tensor([False, True, True, True, True, True]))
    assert said(y, y >= 0) == "All are equally robust: 100.0%."
    assert said(0 * y, y >= 0) == "There is one class only."


def test_subgroups_of_each_evaluation(tmp_path: Path) -> None:
    small, large = evaluate(0.05), evaluate(0.11)
    metadata = {"site": ["east"] * 6 + ["west"] * 10, "<i>sex</i>": ["f", "m"] * 8}
    tags, document = written([("one", small), ("one", large), ("two", small)], tmp_path, groups=metadata)
    assert_needs_nothing(tags)
    assert not any(tag == "i" for tag, _ in tags.tags)
    for figures_of, found in zip(document["evaluations"], (small, large, small), strict=True):
        assert list(figures_of["groups"]) == list(metadata)
        for field, values in metadata.items():
            groups = found.groups(values)
            assert figures_of["groups"][field].keys() == groups.keys()
            for value, group in groups.items():
                own = json.loads(json.dumps(group.to_dict()))
                keys = ("samples", "clean_accuracy", "robust_accuracy", "interval")
                assert figures_of["groups"][field][value] == {key: own[key] for key in keys}
            shares = [one["robust_accuracy"] for one in figures_of["groups"][field].values()]
            assert shares == sorted(shares)
    text = words(tags)
    assert text.count("Subgroups by site") == text.count("Subgroups by <i>sex</i>") == 3
    weak, strong = document["evaluations"][1]["groups"]["site"].items()
    assert strong[1]["robust_accuracy"] > weak[1]["robust_accuracy"]
    standing = round(weak[1]["robust_accuracy"] * weak[1]["samples"])
    assert f"The weakest group is {weak[0]}: {standing} of its {weak[1]['samples']} samples stand" in text
    shown = (percent(one) for one in (1.0, weak[1]["robust_accuracy"], weak[1]["interval"]["high"]))
    assert f"{weak[0]} {weak[1]['samples']} {' '.join(shown)} {strong[0]}" in text
    assert len(list((tmp_path / "figures").glob("groups-*"))) == 6
    assert "Subgroups" not in written([("one", small)], tmp_path / "none")[0].text
    proven = replace(small, certified=small.stands)
    tags, document = written([("one", proven)], tmp_path / "proven", groups=metadata)
    (figures_of,) = document["evaluations"]
    assert f"{percent(figures_of['groups']['site']['west']['interval']['low'])}" in words(tags).split("Subgroups by site")[1]


def test_subgroups_of_what_was_seen(tmp_path: Path) -> None:
    part = interrupted_after(36)
    values = [f"group {number % 3}" for number in range(16)]
    _, document = written([("net", part)], tmp_path, groups={"field": values})
    rows = module._Entry("net", part, Access.GRADIENTS).rows
    assert 0 < len(rows) < 16
    for value, group in document["evaluations"][0]["groups"]["field"].items():
        mine = torch.tensor([row for row in rows.tolist() if values[row] == value])
        assert group["samples"] == len(mine)
        assert group["robust_accuracy"] == part.group(mine).robust_accuracy
    _, document = written([("net", interrupted_after(16))], tmp_path / "none", groups={"field": values})
    assert document["evaluations"][0]["groups"] == {"field": {}}


def test_one_group_only(found: Evaluation, tmp_path: Path) -> None:
    tags, _ = written([("net", found)], tmp_path, groups={"field": ["all"] * 16})
    assert "There is one group only." in tags.text


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    part = interrupted_after(36)
    seen = sum(len(stage.rows) for stage in part.stages)
    assert not part.complete
    assert 0 < seen < 16
    tags, document = written([("net", part)], tmp_path)
    (figures_of,) = document["evaluations"]
    assert document["complete"] is False
    assert (figures_of["samples"], figures_of["unreached"]) == (seen, 16 - seen)
    assert figures_of["verdict"].startswith(
        f"This evaluation was interrupted: attacks are missing, and {16 - seen} of 16 samples were not reached and are left "
        "out. The figures"
    )
    assert "Not complete" in tags.text
    wrong = int((part.stages[0].result.clean_predicted != part.stages[0].result.labels).sum())
    assert figures_of["clean_accuracy"] == 1 - wrong / seen
    entry = module._Entry("net", part, Access.GRADIENTS)
    assert [row for row, *_ in figures_of["closest"]] == entry.rows[entry.found.closest(len(part))][:10].tolist()


def test_without_figures(found: Evaluation, tmp_path: Path) -> None:
    none = interrupted_after(16)
    assert none.stages == ()
    tags, document = written([("net", none)], tmp_path / "none")
    assert "stopped before the first attack had finished, so there are no figures" in document["verdict"]
    assert not (tmp_path / "none/figures").exists()
    assert "What exactly was run" in tags.text
    x, y = samples((1, 4, 4))
    empty = sp.evaluate(model(), x[:0], y[:0], sp.Linf(0.05))
    _, document = written([("net", empty)], tmp_path / "empty")
    assert document["verdict"] == "There were no samples to evaluate `net` on."
    assert document["evaluations"][0]["robust_accuracy"] is None
    tags, document = written([("net", found), ("net", none)], tmp_path / "both")
    assert "no figures" in words(tags)
    assert document["models"][0]["worst"] is None
    assert document["verdict"].startswith("Not everything was finished")


@pytest.mark.parametrize(("shape", "drawn"), [((3, 4, 4), 6), ((5,), 2), ((2, 4, 4), 0), ((300,), 0)])
def test_inputs_of_every_kind(shape: tuple[int, ...], drawn: int, tmp_path: Path) -> None:
    tags, _ = written([("net", evaluate(shape=shape, effort="quick"))], tmp_path, examples=1)
    assert len([1 for tag, attributes in tags.tags if tag == "img" or attributes.get("class") == "bars"]) == drawn
    assert ("nothing to draw" in tags.text) == (drawn == 0)
    assert ("By number, with the margin" in tags.text) == (drawn == 0)


def test_schema_is_documented(digit: Evaluation, mlp: nn.Module, tmp_path: Path) -> None:
    noted = replace(digit, diagnosis=Diagnosis(FINDINGS, 16, 15, 1.0, 1.0, 1.0))
    groups = {"half": ["first", "second"] * (DIGITS // 2)}
    _, document = written([("net", noted)], tmp_path, {"net": sp.Model(mlp)}, groups=groups)
    documented = report.evaluation_results.__doc__ or ""
    (figures_of,) = document["evaluations"]
    nested = [figures_of[key] for key in ("counts", "passes", "totals", "interval", "diagnosis")]
    nested.append(figures_of["groups"]["half"]["first"])
    for keys in (document, document["models"][0], figures_of, figures_of["stages"][0], *nested):
        for key in keys:
            assert re.search(rf"\b{key}\b", documented), key
    assert document["schema"] == 1


def test_each_advice_is_given_once(found: Evaluation, tmp_path: Path) -> None:
    findings = (
        finding("one", True, next="so many fell: run `evaluate`"),
        finding("two", True, next="take another loss"),
        finding("three", True, next="so many fell: run `evaluate`"),
        finding("four", True, next="run `evaluate`"),
        finding("five", True, next="so many fell: mend the derivative"),
    )
    doubtful = replace(found, diagnosis=Diagnosis(findings, 16, 15, 1.0, 1.0, 1.0))
    tags, document = written([("net", doubtful)], tmp_path)
    text = words(tags)
    assert "four. What four says.What follows: So many fell: run evaluate. two. What" in text
    assert text.count("run evaluate") == text.count("o many fell") == 1
    assert "What follows: Mend the derivative." in text
    assert "`" not in tags.text
    assert [each["next"] for each in document["evaluations"][0]["diagnosis"]["findings"]] == [each.next for each in findings]


def test_what_follows_from_doubts(found: Evaluation) -> None:
    def advice(findings: tuple[Finding, ...] = (), **change: Any) -> str:
        diagnosis = Diagnosis(findings, 16, 15, 1.0, 1.0, 1.0) if findings else None
        changed = replace(found, **({"notes": ("odd",), "diagnosis": diagnosis} | change))
        assert changed.summary().endswith(f"What follows: {changed.advice}")
        return changed.advice

    assert found.advice == ""
    assert "What follows" not in found.summary()
    assert "No diagnosis was made" in advice()
    assert "do as the diagnosis advises" in advice(FINDINGS)
    assert "look closer; the diagnosis of 16 samples found no masked gradients" in advice(FINDINGS[1:])
    more = (*found.stages, replace(found.stages[0], name="more", why="signs of masking: more"))
    late = torch.where(found.broken_by >= 0, len(found.stages), found.broken_by)
    assert "try 1 more attack, which broke nothing;" in advice(FINDINGS[1:], stages=more)
    assert "try 2 more attacks, which broke 4;" in advice(FINDINGS[1:], stages=(*more, more[-1]), broken_by=late)
    everywhere = tuple(replace(found.stages[0], heavy=True) for _ in found.stages)
    assert "thorough" in advice(FINDINGS[1:])
    assert "thorough" not in advice(FINDINGS[1:], stages=everywhere), "nothing is left to be attacked"
    assert advice(broken_by=0 * found.broken_by) == "Nothing stands, so the figure can't be too high."


@pytest.mark.parametrize("effort", get_args(Effort))
@pytest.mark.parametrize("norm", [Norm.LINF, Norm.L2, Norm.L1])
def test_signs_of_masking_are_known_by_their_words(norm: Norm, effort: Effort) -> None:
    added = [*escalation(norm, effort), *borrowing(model(), [model()], norm)]
    assert len(added) > 1
    assert all(plan.why.startswith(SIGNS) for plan in added)


def test_the_summary_says_what_was_tried(digit: Evaluation) -> None:
    lines = digit.summary().splitlines()
    heavy = [int(digit.stands[stage.rows].sum()) for stage in digit.stages if stage.heavy]
    standing = int(digit.stands.sum())
    assert 0 < min(heavy) < standing
    assert f"  heavy attacks    each tried on {digit.reached}" in lines

    def reached(*counts: int) -> str:
        whole = digit.stands.nonzero()[:, 0]
        stages = tuple(replace(digit.stages[0], rows=whole[:count], heavy=True) for count in counts)
        return replace(digit, stages=(digit.stages[0], *stages)).reached

    assert reached(3, 5, 4) == f"3 to 5 of the {standing} that stand"
    assert reached(3, 3) == f"3 of the {standing} that stand"
    assert reached(standing) == f"all {standing} that stand"
    assert reached() == replace(digit, broken_by=0 * digit.broken_by).reached == ""
    (look,) = [line for line in lines if "look at gradients" in line]
    spent = sum(int(stage.result.queries.total.sum()) for stage in digit.stages)
    assert int(look.split()[3]) * float(look.split()[-1]) == int(digit.queries.total.sum()) - spent > 0
    (curve,) = [line for line in lines if "curve: at most" in line]
    for eps, share in digit.curve([0.025, 0.1]):
        assert f"{share:.2%} at {eps:g}" in curve
    assert any("nearest: the smallest perturbations" in line for line in lines)
    assert "at most" not in replace(digit, nearest=None).summary().split("passes a sample")[1]


def test_the_full_green_is_for_proofs(digit: Evaluation) -> None:
    entry = module._Entry("m", digit, Access.GRADIENTS)
    drawn = (
        figures.cascade(entry.steps, int(digit.right.sum()), 0),
        figures.classes(entry.classes, digit.robust_accuracy),
        figures.intervals([("m", digit)]),
    )
    proven = to_rgba(figures.SERIES[2])
    for figure in drawn:
        bars = [bar for axes in figure.axes for bar in axes.patches if bar.get_width() > 0]
        assert len(bars) > 2
        assert proven not in [bar.get_facecolor() for bar in bars]
    certified = figures.intervals([("m", replace(digit, certified=digit.stands))])
    assert proven in [bar.get_facecolor() for bar in certified.axes[0].patches if bar.get_width() > 0]


def test_the_keys_of_the_dictionary_are_documented(digit: Evaluation) -> None:
    document, documented = digit.to_dict(), Evaluation.to_dict.__doc__ or ""
    for key in (*document, *document["stages"][0], *document["interval"], *document["passes"]):
        assert re.search(rf"\b{key}\b", documented), key


def test_hostile_names(found: Evaluation, tmp_path: Path) -> None:
    bad = Diagnosis((finding(HOSTILE, True, says=HOSTILE, next=HOSTILE), finding(HOSTILE, False)), 16, 15, 1.0, 1.0, 1.0)
    stages = tuple(replace(stage, name=HOSTILE, why=HOSTILE) for stage in found.stages)
    evil = replace(found, stages=stages, notes=(HOSTILE,), diagnosis=bad)
    tags, _ = written(
        [(HOSTILE, evil), ("<b>two</b>", evil)], tmp_path / "out", title=HOSTILE, data_name=HOSTILE, command=HOSTILE,
        class_names=[HOSTILE, "</style>"], config={HOSTILE: HOSTILE}, groups={HOSTILE: [HOSTILE, "<b>two</b>"] * 8},
    )  # fmt: skip
    assert_needs_nothing(tags)
    assert not any(tag == "b" for tag, _ in tags.tags)
    assert html.escape("<script src=http://evil/x.js>", quote=False) in (tmp_path / "out/report.html").read_text()
    assert [path for path in tmp_path.rglob("*") if (tmp_path / "out") not in (path, *path.parents)] == []


def test_colours_follow_the_page(digit: Evaluation, mlp: nn.Module, tmp_path: Path) -> None:
    written([("net", digit)], tmp_path, {"net": sp.Model(mlp)})
    drawn = re.findall(r"<svg.*?</svg>", (tmp_path / "report.html").read_text(), re.DOTALL)
    assert len([svg for svg in drawn if "viewBox" in svg]) == 4
    for svg in drawn:
        fixed = set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r">[^<]*<", "><", svg)))
        assert not fixed
        assert "var(--" in svg


def test_many_classes_and_stages_keep_their_places() -> None:
    rows = [module.ByClass(label, 10, 1.0, label / 43) for label in range(43)]
    drawn = figures.classes(rows, 0.5, ["a class with quite a long name for once"] * 43)
    left, right = drawn.axes
    assert len(left.get_yticklabels()) + len(right.get_yticklabels()) == 43
    steps = [module.Step(f"a stage with a name that goes on and on {n}", 9, 1, 8, 20 - n, 40, True) for n in range(12)]
    axes = figures.cascade(steps, 21, 2).axes[0]
    assert len({label.get_text() for label in axes.get_yticklabels()}) == 14
    png = figures.to_png(drawn)
    assert png.startswith(b"\x89PNG")


def test_names() -> None:
    assert visible("abcdefghij", 9) == "abcde…hij"
    assert visible("abcdefghi", 9) == "abcdefghi"
    assert distinct(["a", "A", "b", "a"]) == ["a", "A-2", "b", "a-3"]


def test_a_full_disk_leaves_the_old_report(found: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    written([("net", found)], tmp_path)
    old = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(report_folder.os, "replace", full)
    with pytest.raises(DataError, match="No space left"):
        written([("net", found)], tmp_path, title="Second")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == old


def test_bad_arguments(found: Evaluation, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no evaluations"):
        written([], tmp_path)
    with pytest.raises(InputError, match="examples"):
        written([("net", found)], tmp_path, examples=-1)
    with pytest.raises(InputError, match="'net'"):
        written([("net", found)], tmp_path, {"other": model()})
    with pytest.raises(InputError, match="other samples"):
        written([("net", found), ("net", replace(found, x=found.x + 0.01))], tmp_path)
    with pytest.raises(InputError, match="16 samples; 'site' has 3"):
        written([("net", found)], tmp_path, groups={"site": ["a", "b", "a"]})
    with pytest.raises(InputError, match="part by part"):
        written([("net", WorstCase((found,)))], tmp_path)  # type: ignore[list-item]
