"""The cascade on the command line, and the commands that read what it kept. Every error is one line, with status 2."""

from __future__ import annotations

import csv
import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from test_cli import call

import saddlepoint as sp
from saddlepoint.cli import inputs
from saddlepoint.evaluate import cascade
from saddlepoint.report.words import percent

NET = """
import torch
import saddlepoint as sp

def near(seed):
    split = sp.data.load("digits").train
    centres = torch.stack([split.x[split.y == c].mean(0).flatten() for c in range(10)])
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with torch.no_grad():
        net[1].weight.copy_(centres + 0.02 * torch.randn(10, 64, generator=torch.Generator().manual_seed(seed)))
        net[1].bias.copy_(-(centres ** 2).sum(1) / 2)
    return net

net, other = near(0), near(1)
table = sp.Model(torch.nn.Linear(5, 2))
"""
ASK = ["evaluate", "--model", "net.py:net", "--eps", "0.1", "--samples", "40", "--effort", "quick", "--out", "out"]
FOLDER = Path("out") / "net-linf-0.1"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


@pytest.fixture
def kept(here: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A campaign."""
    assert call(capsys, *ASK)[0] == 0
    return FOLDER


def found(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    status, out, err = call(capsys, *words)
    assert (status, err) == (0, "")
    return out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    status, _, err = call(capsys, *words)
    assert status == 2
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    return err


def model(name: str = "net") -> sp.Model:
    return sp.Model(inputs.network(f"net.py:{name}", sp.data.load("digits"))[1])  # type: ignore[arg-type]  # a network


# evaluate --effort


def test_figures_of_all_models_and_sizes_in_one_file_each(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*ASK, "--model", "net.py:other", "--eps", "0.03,0.3", "--json", "new/all.json", "--junit", "new/gate.xml"]
    assert call(capsys, *words, "--at-least", "0.3")[0] == 1
    every = json.loads(Path("new/all.json").read_text())["evaluations"]
    assert [(one["model"], one["threat"]["eps"]) for one in every] == [
        ("net", 0.03),
        ("net", 0.3),
        ("other", 0.03),
        ("other", 0.3),
    ]
    digits = sp.data.load("digits").test.take(40)
    alone = sp.evaluate(model("other"), digits.x, digits.y, sp.Linf(0.03), "quick")
    assert every[2]["robust_accuracy"] == alone.robust_accuracy
    assert Path(every[2]["campaign"]) == Path("out") / "other-linf-0.03"
    (suite,) = ElementTree.parse("new/gate.xml").getroot()
    assert suite.get("tests") == "4"
    assert [case[0].tag for case in suite] == ["failure" if one["robust_accuracy"] < 0.3 else "system-out" for one in every]
    assert {"failure", "system-out"} == {case[0].tag for case in suite}
    assert sorted(os.listdir("new")) == ["all.json", "gate.xml"]


def test_an_old_junit_file_does_not_speak_for_a_run_that_fails(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("gate.xml").write_text("passed")
    (kept / "manifest.json").write_text("{")
    refused(capsys, *ASK, "--at-least", "0.1", "--junit", "gate.xml")
    assert not Path("gate.xml").exists()


def test_a_complete_campaign_is_said_to_be_read(
    kept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cascade, "run_attack", None)
    assert "complete before: these figures were read from it, and nothing was attacked" in found(capsys, *ASK)


def test_a_campaign_that_was_begun_is_not_said_to_be_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing was attacked" not in found(capsys, *ASK)


def test_curve_and_sources_reach_the_evaluation(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = found(capsys, *ASK, "--curve", "--source", "net.py:other", "--source", "net.py:net", "--json", "all.json")
    assert "nearest" in out
    (one,) = json.loads(Path("all.json").read_text())["evaluations"]
    assert one["curve"][-1][0] == pytest.approx(0.2)
    settings = sp.Campaign(FOLDER).manifest["configuration"]
    assert settings["curve"] is True
    assert len(settings["sources"]) == 2
    config = tomllib.loads((FOLDER / "config.toml").read_text())["evaluate"]
    assert config["source"] == ["net.py:other", "net.py:net"]
    assert "nothing was attacked" in found(capsys, "evaluate", "--config", str(FOLDER / "config.toml"))


def test_dry_run_attacks_nothing_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cascade, "run_attack", None)
    Path("gate.xml").write_text("of another run")
    words = [*ASK, "--dry-run", "--at-least", "0.5", "--junit", "gate.xml", "--eps", "0.03,0.1"]
    out = found(capsys, *words)
    assert out.count("passes a sample  1 to ") == 2
    assert "within linf eps 0.1, quick: Estimate for 40 samples" in out
    assert "nothing was attacked" in out
    assert sorted(os.listdir()) == ["gate.xml", "net.py"]
    assert Path("gate.xml").read_text() == "of another run"
    longer = found(capsys, *words, "--curve", "--source", "net.py:other", "--json", "all.json")
    first, second = json.loads(Path("all.json").read_text())["estimates"]
    assert (first["model"], first["samples"], first["batch"], second["threat"]["eps"]) == ("net", 40, 40, 0.1)
    assert f"1 to {first['most']:,} (" in longer
    assert f"1 to {first['most']:,} (" not in out


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_export_writes_the_broken_samples(kind: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = found(capsys, *ASK, "--export", kind)
    digits = sp.data.load("digits").test.take(40)
    evaluation = sp.evaluate(model(), digits.x, digits.y, sp.Linf(0.1), "quick", campaign=FOLDER)
    folder = FOLDER / f"adversarial-set-{kind}"
    written, clean = sp.AdversarialSet(folder), sp.AdversarialSet(folder, original=True)
    rows = evaluation.broken.nonzero()[:, 0]
    assert 5 < len(rows) < 40
    assert written.samples == tuple(rows.tolist())
    assert written.labels == tuple(digits.y[rows].tolist())
    for number, row in enumerate(rows):
        away = 0.51 / 255 if kind == "png" else 0
        assert float((written[number][0] - evaluation.adversarial[row]).abs().max()) <= away
        assert float((clean[number][0] - digits.x[row]).abs().max()) <= away
    assert ("left the ball" in out) == (kind == "png")
    assert f"adversarial set: {len(rows)} samples in" in out
    assert "in place of the older one" in found(capsys, *ASK, "--export", kind)
    assert sp.AdversarialSet(folder).samples == written.samples
    (folder / "manifest.json").unlink()
    assert "export() wrote" in refused(capsys, *ASK, "--export", kind)  # whatever is there now, it isn't ours
    assert folder.exists()


def test_no_set_where_nothing_was_broken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = found(capsys, *ASK, "--eps", "0", "--export", "png")
    assert "no sample was broken" in out
    assert not (Path("out") / "net-linf-0" / "adversarial-set-png").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--effort quick --attack pgd", "leave out one of them"),
        ("--effort quick --passes 10", "--passes"),
        ("--curve", "--curve only with"),
        ("--source net.py:net --json a.json", "--source and --json only with"),
        ("--export png", "--export only with"),
        ("--dry-run", "--dry-run only with"),
        ("--groups groups.csv", "--groups only with"),
        ("--effort quick --source net.py:nothing", "nothing"),
        ("--effort quick --at-least 60", "such as 0.6"),
        ("--effort quick --out file", "cannot write file"),
        ("--effort quick --out file/below", "cannot write file/below"),
        ("--effort quick --json file/below", "cannot write file/below"),
        ("--effort quick --json folder", "cannot write folder"),
        ("--effort quick --at-least 0.5 --junit folder", "cannot write folder"),
        ("--effort quick --at-least 0.5 --junit file/below.xml", "cannot write file/below.xml"),
        ("--effort quick --dry-run --json folder", "cannot write folder"),
    ],
)
def test_errors(words: str, told: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    Path("folder").mkdir()
    assert told in refused(capsys, "evaluate", "--model", "net.py:net", "--samples", "5", "--eps", "0.01", *words.split())


def metadata() -> dict[str, list[str]]:
    """Of all test samples of the digits, by column."""
    y = sp.data.load("digits").test.y.tolist()
    return {
        "number": [str(row) for row in range(len(y))],
        "hospital": [f"ward {label % 3}, east" for label in y],
        "sex": ["" if row % 5 == 0 else "f" if row % 2 else "m" for row in range(len(y))],
    }


def write_table(path: str, columns: dict[str, list[str]], encoding: str = "utf-8") -> None:
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])


def test_groups_by_the_columns_of_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = metadata()
    write_table("groups.csv", columns, "utf-8-sig")
    words = [*ASK, "--model", "net.py:other", "--groups", "groups.csv", "--json", "all.json"]
    out = found(capsys, *words)
    assert "note: --groups leaves a column out, since 'number' has" in out
    digits = sp.data.load("digits").test.take(40)
    every = json.loads(Path("all.json").read_text())["evaluations"]
    for one, name in zip(every, ("net", "other"), strict=True):
        evaluation = sp.evaluate(model(name), digits.x, digits.y, sp.Linf(0.1), "quick")
        assert list(one["groups"]) == ["hospital", "sex"]
        for column, groups in one["groups"].items():
            expected = evaluation.groups([value or inputs.EMPTY for value in columns[column][:40]])
            figures = {value: (len(group), group.clean_accuracy, group.interval.high) for value, group in expected.items()}
            assert figures == {v: (g["samples"], g["clean_accuracy"], g["interval"]["high"]) for v, g in groups.items()}
            shares = [group["robust_accuracy"] for group in groups.values()]
            assert shares == sorted(group.robust_accuracy for group in expected.values())
    tables = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    rows = [(value, group) for one in every for groups in one["groups"].values() for value, group in groups.items()]
    for cells, (value, group) in zip(tables, rows, strict=True):
        shares = [percent(group[f"{which}_accuracy"]) for which in ("clean", "robust")]
        limits = f"{percent(group['interval']['low'])} to {percent(group['interval']['high'])}"
        assert [cell.strip() for cell in cells] == [value, str(group["samples"]), *shares, limits]
    document = json.loads(Path("out/results.json").read_text())
    assert [one["groups"] for one in document["evaluations"]] == [one["groups"] for one in every]
    again = found(capsys, "evaluate", "--config", str(FOLDER / "config.toml"))
    assert "nothing was attacked" in again
    assert "subgroups by hospital" in again


def test_without_groups_there_are_none(kept: Path) -> None:
    assert json.loads(Path("out/results.json").read_text())["evaluations"][0]["groups"] == {}


def test_cells_of_a_table_may_hold_anything(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = len(sp.data.load("digits").test)
    write_table("groups.csv", {"a [bold]": ["[/red]", "two\nlines\x1b[31m"] * (rows // 2) + [" x "] * (rows % 2)})
    out = found(capsys, *ASK, "--groups", "groups.csv")
    assert "subgroups by a [bold]" in out
    assert "[/red]" in out
    assert "\x1b" not in out
    with open("groups.csv", "a") as file:
        file.write("\n\n")
    found(capsys, *ASK, "--groups", "groups.csv", "--dry-run")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda lines: [], "groups.csv, line 1: a header is needed"),
        (lambda lines: ["", *lines], "groups.csv, line 1: a header is needed"),
        (lambda lines: ["site,", *lines[1:]], "line 1: the header has no name for column 2"),
        (lambda lines: ["site, site", *lines[1:]], "line 1: the header has 'site' twice"),
        (lambda lines: [*lines[:3], "a", *lines[4:]], "line 4: the row has 1 cells, the header 2"),
        (lambda lines: [lines[0], '"a\nb",m', *lines[2:5], "a,b,c", *lines[5:]], "line 7: the row has 3 cells, the header 2"),
        (lambda lines: [*lines[:3], "", *lines[4:]], "line 4: the row has 0 cells, the header 2"),
        (lambda lines: [*lines[:3], 'a,"b', *lines[4:]], "line 4: "),
        (lambda lines: lines[:-1], "test samples: it needs one for each"),
        (lambda lines: lines[:41], "groups.csv has 40 rows below its header"),
        (lambda lines: [*lines, "a,b"], "also for those that --samples leaves out"),
        (lambda lines: [lines[0], *(f"{n},{n / 7}" for n, _ in enumerate(lines[1:]))], "no column of subgroups: 'site' has"),
        (lambda lines: ["site,s\xe9x", *lines[1:]], "is not UTF-8 text"),
    ],
)
def test_tables_that_are_refused(
    change: Callable[[list[str]], list[str]], told: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["site,sex", *(f"{'ab'[row % 2]},m" for row in range(len(sp.data.load("digits").test)))]
    Path("groups.csv").write_text("\n".join(change(lines)), encoding="latin-1")
    assert told in refused(capsys, *ASK, "--groups", "groups.csv")
    assert not Path("out").exists()


def test_a_table_that_cannot_be_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--groups: cannot read nowhere.csv: No such file" in refused(capsys, *ASK, "--groups", "nowhere.csv")
    Path("folder").mkdir()
    assert "cannot read folder" in refused(capsys, *ASK, "--groups", "folder")


def test_what_cannot_be_written_after_the_attacks_is_one_line(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kept / "config.toml").unlink()
    (kept / "config.toml").mkdir()
    assert f"cannot write {kept}" in refused(capsys, *ASK)


def test_ctrl_c_ends_the_whole_command(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(run: cascade._Cascade) -> list[str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cascade._Cascade, "signs", stops)
        words = [*ASK, "--model", "net.py:other", "--at-least", "0.01", "--junit", "gate.xml", "--json", "all.json"]
        assert call(capsys, *words)[0] == 130
    assert [one.parent.name for one in Path("out").glob("*/manifest.json")] == [FOLDER.name]
    assert "was stopped" in Path("out/report.html").read_text() or "interrupted" in Path("out/report.html").read_text()
    assert ElementTree.parse("gate.xml").find("testsuite/testcase/error") is not None
    assert json.loads(Path("all.json").read_text())["evaluations"][0]["complete"] is False
    assert call(capsys, *words)[0] == 0  # it goes on


def test_default_attacks_are_in_the_configuration(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found(capsys, "evaluate", "--model", "net.py:net", "--samples", "5", "--eps", "0.1", "--out", "out")
    config = tomllib.loads(Path("out/config.toml").read_text())["evaluate"]
    assert config["attack"] == ["uniformnoise", "fgm", "pgd"]
    ran = json.loads(Path("out/results.json").read_text())["models"][0]["cells"]
    assert len(ran) == 3


# compare and replay


def test_compare(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found(capsys, *ASK, "--model", "net.py:other")
    other = Path("out") / "other-linf-0.1"
    out = found(capsys, "compare", str(kept), str(other), "--level", "0.9", "--json", "new/pair.json")
    paired = sp.compare_campaigns(kept, other, level=0.9)
    assert paired.summary() in out
    assert "the model's weights or layers differ" in out
    assert json.loads(Path("new/pair.json").read_text()) == paired.to_dict()


def test_replay(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = found(capsys, "replay", str(kept), "7", "--json", "case.json")
    case = sp.replay(kept, 7)
    assert case.summary() in out
    document = json.loads(Path("case.json").read_text())
    assert (document["sample"], document["verdict"]) == (7, str(case.verdict))
    assert [one["stage"] for one in document["attempts"]] == [attempt.stage for attempt in case.attempts]
    assert document["attempts"][0]["passes"] == int(case.attempts[0].result.queries.total[0])


def test_replay_of_what_was_found_nowhere_is_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the search for the smallest perturbation fails, its distance is infinite, which JSON can't say."""
    Path("flat.py").write_text(
        "import torch\nclass Flat(torch.nn.Module):\n    def forward(self, x):\n"
        "        return torch.eye(10)[0] + 1e-9 * x.flatten(1).sum(1, keepdim=True)\nnet = Flat()\n"
    )
    label = sp.data.load("digits").test.y[:40].tolist().index(0)
    found(capsys, *ASK, "--curve", "--model", "flat.py:net")
    found(capsys, "replay", "out/net-2-linf-0.1", str(label), "--json", "case.json")
    assert json.loads(Path("case.json").read_text())["attempts"][-1]["distance"] is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("compare nowhere {kept}", "nowhere is no campaign"),
        ("compare {kept} out", "out is no campaign"),
        ("compare {kept} net.py", "net.py"),
        ("compare {kept} {kept} --level 95", "level"),
        ("compare {kept} {kept} --json out", "cannot write out"),
        ("replay nowhere 3", "nowhere is no campaign"),
        ("replay {kept} 40", "ids from 0 to 39"),
        ("replay {kept} 3 --json net.py/a", "cannot write net.py/a"),
    ],
)
def test_compare_and_replay_refuse(words: str, told: str, kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in refused(capsys, *words.format(kept=kept).split())


# recheck


@pytest.fixture
def written(here: Path) -> Path:
    digits = sp.data.load("digits").test.take(40)
    result = sp.attack(model(), digits.x, digits.y, sp.attacks.PGD(steps=10), sp.Linf(0.2))
    broken = result.having(sp.Status.FOOLED)
    sp.export(digits.x[broken], result.adversarial[broken], digits.y[broken], "set", "npz")
    return Path("set")


def test_recheck_tries_a_set_on_other_models(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recheck", str(written), "--model", "net.py:net", "--model", "net.py:other", "--batch-size", "7"]
    out = found(capsys, *words, "--json", "again.json")
    document = json.loads(Path("again.json").read_text())
    first, second = document["models"]
    assert (first["model"], first["originals"], first["adversarial"], first["kept"]) == ("net", 1, 0, 0)
    x, y = (torch.stack([torch.as_tensor(pair[part]) for pair in sp.AdversarialSet(written)]) for part in (0, 1))
    assert second["adversarial"] == pytest.approx(float((model("other").predict(x) == y).double().mean()))
    assert document["samples"] == len(y)
    assert "100.0%" in out
    found(capsys, "recheck", str(written), "--model", "net.py:net", "--mean", "0.5", "--std", "0.1", "--json", "other.json")
    (normalised,) = json.loads(Path("other.json").read_text())["models"]
    assert normalised != first


def test_recheck_knows_how_many_classes_a_reference_network_needs(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sp.zoo.save_weights(sp.zoo.build("mlp", num_classes=12, in_shape=(1, 8, 8)), "mlp.safetensors")
    assert "error" in refused(capsys, "recheck", str(written), "--model", "zoo:mlp+mlp.safetensors")
    assert "mlp" in found(capsys, "recheck", str(written), "--model", "zoo:mlp+mlp.safetensors", "--classes", "12")


def test_recheck_refuses(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refused(capsys, "recheck", "nowhere", "--model", "net.py:net")
    assert "fails on inputs" in refused(capsys, "recheck", str(written), "--model", "net.py:table")
    sp.export(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), "empty", "npz")
    assert "no samples" in refused(capsys, "recheck", "empty", "--model", "net.py:net")
    sp.export(torch.full((2, 4), 3.0), torch.zeros(2, 4), torch.tensor([0, 1]), "far", "npz")
    assert "bounds" in refused(capsys, "recheck", "far", "--model", "net.py:net")
