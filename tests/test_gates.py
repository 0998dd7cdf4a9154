"""Gates: the check, its report for people and for machines, and the pytest plugin."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from torch import Tensor

import saddlepoint as sp
from saddlepoint.errors import DataError, InputError
from saddlepoint.gates import gate, junit

pytest_plugins = ["pytester"]
Samples = tuple[Tensor, Tensor]
THREAT = sp.Linf(0.1)


@pytest.fixture(scope="module")
def found(model: sp.Model, samples: Samples) -> sp.Evaluation:
    evaluation = sp.evaluate(model, *samples, THREAT, "quick")
    assert {-2, -1} < set(evaluation.broken_by.tolist())
    assert (evaluation.broken_by >= 0).sum() > 5
    return evaluation


# The check


def test_the_limit_itself_passes(found: sp.Evaluation) -> None:
    standing = int((found.broken_by == -1).sum())
    for number, passed in ((standing, True), (standing + 1, False)):
        checked = gate(found, number / 24)
        assert (checked.passed, checked.exit_code) == (passed, int(not passed))
        assert (checked.standing, checked.needed, checked.samples) == (standing, number, 24)
    assert checked.reached == standing / 24


@pytest.mark.parametrize(("share", "needed"), [(0.07, 7), (0.29, 29), (0.55, 55), (0.551, 56), (1.0, 100)])
def test_what_is_needed_does_not_suffer_from_rounding(share: float, needed: int, found: sp.Evaluation) -> None:
    """0.29 * 100 is 28.999999999999996 and 0.55 * 100 is 55.00000000000001."""
    hundred = replace(found, y=torch.zeros(100, dtype=torch.int64), broken_by=torch.where(torch.arange(100) < needed, -1, -2))
    assert gate(hundred, share).passed
    fewer = replace(hundred, broken_by=torch.where(torch.arange(100) < needed - 1, -1, -2))
    assert not gate(fewer, share).passed


def test_cut_short_passes_nothing(found: sp.Evaluation) -> None:
    short = gate(replace(found, complete=False), 0.01)
    assert not short.passed
    assert "cut short" in short.message
    case = ElementTree.fromstring(short.junit()).find("testsuite/testcase")
    assert [child.tag for child in case] == ["error"]
    missed = gate(replace(found, complete=False), 0.99)  # more attacks would not save it
    assert ElementTree.fromstring(missed.junit()).find("testsuite/testcase/failure") is not None


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, 60, float("nan")])
def test_shares_that_make_no_sense(share: float, found: sp.Evaluation) -> None:
    with pytest.raises(InputError, match=r"such as 0\.6 for 60 %"):
        gate(found, share)


def test_no_samples(found: sp.Evaluation) -> None:
    with pytest.raises(InputError, match="no samples"):
        gate(replace(found, y=found.y[:0]), 0.5)


def test_a_union_needs_samples_that_stand_in_all(model: sp.Model, samples: Samples) -> None:
    """Here neither threat breaks all that the other one does."""
    union = sp.evaluate(model, *samples, [sp.Linf(0.08), sp.L1(1.2)], "quick")
    first, second = union.parts
    both = gate(union, 0.99)
    assert both.standing == int((first.stands & second.stands).sum())
    assert both.standing < min(gate(part, 0.99).standing for part in union.parts)
    margins = torch.maximum(*(part.margin.masked_fill(part.broken_by < 0, -torch.inf) for part in union.parts))
    assert [each.sample for each in both.counterexamples] == margins.argsort(descending=True)[:5].tolist()
    assert {each.within for each in both.fallen} == {"linf eps 0.08", "l1 eps 1.2"}
    assert "within linf eps 0.08 and l1 eps 1.2;" in both.message
    assert f"l1 eps 1.2: {second.stages[0].name} broke {int((second.broken_by == 0).sum())} of 20" in both.message
    assert not gate(sp.WorstCase((first, replace(second, complete=False))), 0.01).passed


# What it says


@pytest.mark.parametrize("turned", [False, True])
def test_counterexamples_are_true(turned: bool, found: sp.Evaluation, model: sp.Model) -> None:
    found = found.group(torch.arange(23, -1, -1)) if turned else found  # a stage's results are not in the samples' order
    checked = gate(found, 0.99)
    assert len(checked.counterexamples) == 5
    margins = [each.margin for each in checked.counterexamples]
    assert margins == sorted(margins, reverse=True)
    assert margins[0] == float(found.margin[found.broken_by >= 0].max())
    for each in checked.counterexamples:
        point, x = found.adversarial[each.sample], found.x[each.sample]
        assert int(model.predict(point[None])) == each.predicted != each.label == int(found.y[each.sample])
        assert each.distance == float((point.double() - x.double()).abs().max()) <= THREAT.eps
        assert each.stage == found.stages[found.broken_by[each.sample]].name
        logits = model.logits(point[None])[0]
        others = logits.clone()
        others[each.label] = -torch.inf
        assert each.margin == pytest.approx(float(others.max() - logits[each.label]), rel=1e-4)


def test_message(found: sp.Evaluation) -> None:
    checked = gate(found, 0.99)
    text, standing = checked.message, checked.standing
    low, high = checked.limits
    assert f"robust accuracy {standing / 24:.1%} within linf eps 0.1; asked for at least 99.0%" in text
    assert f"{standing} of 24 samples stand, 24 are needed; 95% confidence limits {low:.1%} and {high:.1%}" in text
    assert "wrong without an attack: 4" in text
    left = 20
    for number, stage in enumerate(found.stages):
        broken = int((found.broken_by == number).sum())
        assert f"{stage.name} broke {broken} of {left} ({stage.why})" in text
        left -= broken
    table = [line.split() for line in text.splitlines() if line.split()[0].isdigit() and "broken" not in line][-5:]
    assert [row[:3] + row[5:] for row in table] == [
        [str(each.sample), str(each.label), str(each.predicted), each.stage] for each in checked.counterexamples
    ]
    assert "lies between these limits" not in text
    met = gate(found, (standing - 1) / 24).message
    assert "counterexamples" not in met
    assert "lies between these limits" in met


def test_json_and_junit_agree(found: sp.Evaluation) -> None:
    for share in (0.01, 0.99):
        checked = gate(found, share)
        values = json.loads(json.dumps(checked.to_dict(), allow_nan=False))
        assert values["passed"] is checked.passed
        assert [threat["eps"] for threat in values["threats"]] == [0.1]
        assert values["robust_accuracy"] == values["standing"] / values["samples"]
        assert values["clean_accuracy"] == 20 / 24
        assert (values["limits"]["low"], values["limits"]["high"]) == checked.limits
        assert sum(each["broken"] for each in values["attacks"]) == int((found.broken_by >= 0).sum())
        suite = ElementTree.fromstring(checked.junit()).find("testsuite")
        assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", str(int(not checked.passed)), "0")
        case = suite.find("testcase")
        assert float(case.get("time")) == pytest.approx(found.seconds, abs=1e-3)
        assert f"{share:.1%}" in case.get("name")
        assert case.find("system-out" if checked.passed else "failure").text == values["message"] == checked.message


def test_several_gates_are_one_document(found: sp.Evaluation) -> None:
    met, missed, short = gate(found, 0.01), gate(found, 0.99), gate(replace(found, complete=False), 0.01)
    root = ElementTree.fromstring(junit([("net", met), ("net", missed), ("other & more", short)]))
    (suite,) = root.findall("testsuite")
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3", "failures": "1", "errors": "1", "skipped": "0",
    }  # fmt: skip
    assert float(suite.get("time")) == pytest.approx(3 * found.seconds, abs=1e-3)
    cases = suite.findall("testcase")
    assert [child.tag for case in cases for child in case] == ["system-out", "failure", "error"]
    assert [case.get("name").split(":")[0] for case in cases] == ["net", "net", "other & more"]
    assert len({case.get("name") for case in cases}) == 3
    assert [case[0].text for case in cases] == [met.message, missed.message, short.message]
    (alone,) = ElementTree.fromstring(met.junit()).findall("testsuite/testcase")
    assert f"net: {alone.get('name')}" == cases[0].get("name")


def test_save(found: sp.Evaluation, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "gate"
    saved = gate(found, 0.99).save(folder)
    assert str(folder) in saved.message
    assert json.loads((folder / "gate.json").read_text())["message"] == saved.message
    with Image.open(folder / "counterexamples.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 200
        assert len(set(image.convert("L").get_flattened_data())) > 20
    table = replace(found, x=found.x.flatten(1), adversarial=found.adversarial.flatten(1))
    gate(table, 0.99).save(folder)
    with Image.open(folder / "counterexamples.png") as image:
        assert len(set(image.convert("RGB").get_flattened_data())) > 2
    sequence = replace(found, x=found.x.reshape(24, 4, 16), adversarial=found.adversarial.reshape(24, 4, 16))
    gate(sequence, 0.99).save(folder)
    assert [path.name for path in folder.iterdir()] == ["gate.json"]  # no picture of these, and none left of others
    with pytest.raises(DataError, match="cannot write"):
        gate(found, 0.99).save(folder / "gate.json")


# The plugin

TEST = """
    import pytest, torch, saddlepoint as sp

    data = sp.data.load("digits").test
    x, y = data.x[:24], data.y[:24]

    @pytest.fixture(scope="module")
    def model():
        weight = sp.data.load("digits").train
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        centres = torch.stack([weight.x[weight.y == c].mean(0).flatten() for c in range(10)])
        with torch.no_grad():
            net[1].weight.copy_(centres)
            net[1].bias.copy_(-(centres ** 2).sum(1) / 2)
        return sp.Model(net)

    def test_small(model, assert_robust):
        found = assert_robust(model, x, y, sp.Linf(0.001), at_least=0.5, effort="quick")
        assert found.reached >= 0.5

    @pytest.mark.parametrize("eps", [0.3])
    def test_large(model, assert_robust, eps):
        assert_robust(model, x, y, [sp.Linf(0.001), sp.L2(0.001)], at_least=0.5, effort="standard", seed=3)
        assert_robust(model, x, y, sp.Linf(eps), at_least=0.9)

    @pytest.mark.robustness
    def test_marked():
        pass

    def test_dynamic(request):
        request.getfixturevalue("assert_robust")

    def test_other():
        pass
"""


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    """Runs the tests above with the plugin."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # others, which are imported again and again
    pytester.makepyfile(TEST)
    options = ("-p", "pytest_saddlepoint", "--strict-markers")
    return lambda *more: pytester.runpytest_inprocess(*options, *more, no_reraise_ctrlc=True)


def test_skipped_unless_asked_for(inner: Callable[..., pytest.RunResult]) -> None:
    result = inner("-rs")
    result.assert_outcomes(passed=1, skipped=4)
    result.stdout.fnmatch_lines(["*robustness tests are slow: run them with pytest --saddlepoint*"])
    inner("--markers").stdout.fnmatch_lines(["*@pytest.mark.robustness: attacks a model;*"])


def test_the_fixture_carries_the_marker(inner: Callable[..., pytest.RunResult]) -> None:
    inner("--saddlepoint", "-m", "robustness", "--collect-only", "-q").stdout.fnmatch_lines(
        ["3/5 tests collected (2 deselected)*"]
    )


def test_failures_show_the_counterexamples(inner: Callable[..., pytest.RunResult], pytester: pytest.Pytester) -> None:
    result = inner("--saddlepoint", "--saddlepoint-out", "out")
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.fnmatch_lines(
        [
            ">*assert_robust(model, x, y, sp.Linf(eps), at_least=0.9)",
            "E*AssertionError: robust accuracy *% within linf eps 0.3; asked for at least 90.0%",
            "E*of 24 samples stand, 22 are needed; 95% confidence limits *% and *%",
            "E*sprint broke * of *",
            "E*counterexamples, the clearest first*",
            "E*sample  label  predicted  distance    margin  broken by",
            "E* 0.3 *sprint",
            "E*pictures and figures: *out*test_large-0.3-2",
        ]
    )
    result.stdout.no_fnmatch_line("*pytest_saddlepoint.py*")  # the plugin's own lines say nothing
    folders = sorted((pytester.path / "out").iterdir())
    assert [folder.name.split(".py-")[1] for folder in folders] == ["test_large-0.3", "test_large-0.3-2", "test_small"]
    values = [json.loads((folder / "gate.json").read_text()) for folder in folders]
    assert [value["passed"] for value in values] == [True, False, True]
    assert [threat["norm"] for threat in values[0]["threats"]] == ["linf", "l2"]
    assert "apgd-t" in values[0]["message"]
    assert "apgd-t" not in values[2]["message"]
    assert (folders[1] / "counterexamples.png").exists()


def test_a_senseless_share_fails_before_the_work(inner: Callable[..., pytest.RunResult], pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        def test_it(assert_robust):
            assert_robust(None, None, None, None, at_least=60)
    """)
    inner("--saddlepoint").stdout.fnmatch_lines(["E*InputError: at_least must lie in*such as 0.6 for 60 %; got 60"])


def test_ctrl_c_stops_pytest(inner: Callable[..., pytest.RunResult], pytester: pytest.Pytester) -> None:
    """`sp.evaluate` keeps what is finished; the tests after this one are not run all the same."""
    pytester.makepyfile("""
        import torch, saddlepoint as sp

        class Stopped(torch.nn.Linear):
            calls = 0

            def forward(self, x):
                self.calls += 1
                if self.calls == 20:
                    raise KeyboardInterrupt
                return super().forward(x)

        def test_it(assert_robust):
            model = sp.Model(Stopped(4, 3))
            x = torch.full((2, 4), 0.5)
            assert_robust(model, x, model.predict(x), sp.Linf(1e-6), at_least=0.5, effort="quick")

        def test_after():
            print("not reached")
    """)
    result = inner("--saddlepoint", "--saddlepoint-out", "out", "-s")
    assert result.ret is pytest.ExitCode.INTERRUPTED
    result.stdout.no_fnmatch_line("*not reached*")
    (values,) = (json.loads(path.read_text()) for path in (pytester.path / "out").rglob("gate.json"))
    assert (values["complete"], values["passed"]) == (False, False)


def test_long_names(pytester: pytest.Pytester, inner: Callable[..., pytest.RunResult]) -> None:
    """Two tests whose names differ at their ends do not write to the same folder, and any file system takes the names."""
    pytester.makepyfile("""
        import pytest, torch, saddlepoint as sp

        @pytest.mark.parametrize("last", ["a", "b"])
        @pytest.mark.parametrize("text", [0], ids=[300 * "x"])
        def test_it(assert_robust, text, last):
            model = sp.Model(torch.nn.Linear(4, 3))
            x = torch.full((2, 4), 0.5)
            assert_robust(model, x, model.predict(x), sp.Linf(1e-6), at_least=0.5, effort="quick")
    """)
    inner("--saddlepoint", "--saddlepoint-out", "out").assert_outcomes(passed=2)
    names = [folder.name for folder in (pytester.path / "out").iterdir()]
    assert len(names) == 2
    assert max(map(len, names)) < 120


def test_other_projects_pay_nothing(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither PyTorch nor the package is imported before the fixture is used."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile("""
        import sys

        def test_it(request):
            assert "pytest_saddlepoint" in sys.modules
            assert not {"torch", "numpy", "saddlepoint"} & set(sys.modules)

        def test_skipped(assert_robust):
            raise AssertionError
    """)
    command = [sys.executable, "-m", "pytest", "-p", "pytest_saddlepoint", "-q"]
    result = subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, check=False)
    assert "1 passed, 1 skipped" in result.stdout, result.stdout + result.stderr
