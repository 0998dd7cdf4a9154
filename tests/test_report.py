"""The report: what it says is what was measured, it needs nothing but itself, and it is written whole or not at all."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint import report
from saddlepoint.cli import main
from saddlepoint.errors import DataError, InputError
from saddlepoint.evaluate import Comparison, compare
from saddlepoint.report import folder as report_folder
from saddlepoint.report import words
from saddlepoint.report.gallery import gallery
from saddlepoint.report.verdict import headline, observations, verdict
from saddlepoint.taxonomy import Norm, Status
from saddlepoint.threats import Threat, size

HOSTILE = "<script src=http://evil/x.js>\"'&$x^$ ../../`q`\x07"
SETTINGS: dict[str, Any] = {"title": "A try", "data_name": "made up", "config": {"eps": [0.1]}, "seed": 3}


@dataclass(frozen=True)
class Epoch:
    epoch: int
    loss: float
    clean_accuracy: float | None
    robust_accuracy: float | None
    learning_rate: float = 0.1
    seconds: float = 1.0


@dataclass(frozen=True)
class Training:
    epochs: list[Epoch]


def threshold(shift: float, weight: float = 1.0) -> nn.Module:
    """Class 1 where the mean of the features is above 0.5 + shift; flipped by changes that bring it over."""

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            f = weight * (x.flatten(1).mean(1) - 0.5 - shift)
            return torch.stack([-f, f], 1)

    return Net()


def samples(shape: tuple[int, ...], count: int = 16) -> tuple[Tensor, Tensor]:
    """Constant inputs at distances 0.02, 0.04, ... from the threshold 0.5, on both sides."""
    level = torch.tensor([0.5 + (0.02 * (i // 2) + 0.02) * (1 if i % 2 else -1) for i in range(count)])
    x = level.view(-1, *[1] * len(shape)).expand(count, *shape).contiguous()
    return x, (level > 0.5).long()


def comparison(
    shape: tuple[int, ...] = (1, 4, 4),
    models: tuple[str, ...] = ("standard", "hardened"),
    threats: tuple[Threat, ...] = (sp.Linf(0.05), sp.Linf(0.11)),
) -> Comparison:
    x, y = samples(shape)
    nets = {name: sp.Model(threshold(0.005 * i)) for i, name in enumerate(models)}
    attacks = (sp.attacks.FGSM(), sp.attacks.PGD(steps=3), sp.attacks.UniformNoise())
    return compare(nets, x, y, [a for a in attacks if threats[0].norm in a.declaration.norms], threats)


@pytest.fixture(scope="module")
def pair() -> Comparison:
    return comparison()


class Tags(HTMLParser):
    """Collects tags with attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " " * (tag in ("td", "th"))

    def handle_data(self, data: str) -> None:
        self.text += data


def written(result: Comparison, folder: Path, **more: Any) -> tuple[Tags, dict[str, Any]]:
    page = report.write(result, folder, **(SETTINGS | more))
    assert page == folder / "report.html"
    return Tags(page.read_text()), json.loads((folder / "results.json").read_text())


def assert_needs_nothing(tags: Tags) -> None:
    for tag, attributes in tags.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value is not None
                assert value.startswith(("data:image/png;base64,", "#")), (tag, value)
            for target in re.findall(r"url\(([^)]*)", value or ""):
                assert target.startswith("#"), (tag, target)


def test_files_and_offline(pair: Comparison, tmp_path: Path) -> None:
    history = Training([Epoch(1, 2.0, 0.5, None), Epoch(2, 1.0, 0.75, 0.25)])
    tags, _ = written(pair, tmp_path / "new" / "folder", histories={"hardened": history}, class_names=["low", "high"])
    assert_needs_nothing(tags)
    page = (tmp_path / "new" / "folder" / "report.html").read_text()
    assert "@import" not in page
    assert not re.findall(r"https?://", page)
    assert {t for t, _ in tags.tags} >= {"svg", "img", "table", "details"}
    identifiers = [attributes["id"] for _, attributes in tags.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert "The training" in tags.text
    for name in ("security_curve.png", "examples.png"):
        assert (tmp_path / "new/folder/figures" / name).read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in (tmp_path / "new/folder/adversarial").iterdir()}
    assert "standard-PGD-linf-0.05" in names
    assert len(names) == len(pair.cells)
    loaded = sp.AttackResult.load(tmp_path / "new/folder/adversarial/standard-PGD-linf-0.11")
    cell = next(c for c in pair.cells if c.attack == sp.attacks.PGD(steps=3) and c.eps == 0.11)
    assert torch.equal(loaded.adversarial, cell.result.adversarial)


def test_figures_are_the_measured_ones(pair: Comparison, tmp_path: Path) -> None:
    # by construction: of 16 samples at distances 0.02 ... 0.16, two each, within 0.05 four fall, within 0.11 ten
    assert pair.robust_accuracy("standard", "linf", 0.05) == 12 / 16
    tags, document = written(pair, tmp_path)
    text = " ".join(tags.text.split())
    standard = document["models"][0]
    assert standard["name"] == "standard"
    assert standard["curves"] == {"linf": [[0.0, 1.0], [0.05, 0.75], [0.11, 0.375]]}
    assert "standard 100.0% 75.0% 37.5%" in text
    for model in document["models"]:
        assert model["clean_accuracy"] == pair.clean_accuracy(model["name"])
        for row in model["cells"]:
            assert sum(row["counts"].values()) == 16
    for cell, row in zip(pair.cells, [row for model in document["models"] for row in model["cells"]], strict=True):
        result = cell.result
        assert (row["eps"], row["norm"]) == (cell.eps, "linf")
        assert row["robust_accuracy"] == result.robust_accuracy
        assert row["success_rate"] == result.success_rate
        assert row["counts"]["fooled"] == int(result.having(Status.FOOLED).sum())
        assert row["passes"]["forward"] == int(result.queries.forward.sum())
        assert f"{row['attack']} {words.percent(result.robust_accuracy)} {words.percent(result.success_rate)}" in text
        assert row["settings"]["attack"] == cell.attack.settings()
        assert sp.AttackResult.load(tmp_path / row["folder"]).robust_accuracy == result.robust_accuracy
    assert document["seed"] == 3
    assert document["config"] == {"eps": [0.1]}


def test_schema_keys(pair: Comparison, tmp_path: Path) -> None:
    _, document = written(pair, tmp_path, histories={"standard": Training([Epoch(1, float("nan"), None, None)])})
    assert document["schema"] == 1
    assert set(document) == {
        "schema", "title", "created", "complete", "command", "seed", "data", "versions", "config", "verdict", "observations",
        "models",
    }  # fmt: skip
    assert set(document["data"]) == {"name", "fingerprint", "samples", "shape", "class_names"}
    assert set(document["versions"]) == {"saddlepoint", "torch", "python", "platform"}
    model = document["models"][0]
    assert set(model) == {"name", "settings", "clean_accuracy", "curves", "cells", "history"}
    assert model["history"] == [
        {"epoch": 1, "loss": None, "clean_accuracy": None, "robust_accuracy": None, "learning_rate": 0.1, "seconds": 1.0}
    ]
    assert set(model["cells"][0]) == {
        "attack", "threat", "norm", "eps", "settings", "counts", "clean_accuracy", "robust_accuracy", "success_rate",
        "median_distance", "median_distances", "passes", "passes_per_sample", "seconds", "notes", "folder",
    }  # fmt: skip
    assert set(model["cells"][0]["counts"]) == {status.value for status in Status}
    assert set(model["cells"][0]["median_distances"]) == {norm.value for norm in Norm}
    assert set(model["cells"][0]["settings"]) == {"attack", "threat", "goal", "keep", "seed", "budget"}
    documented = report.results.__doc__ or ""
    for key in [*document, *model, *model["cells"][0]]:
        assert re.search(rf"\b{key}\b", documented), key


def test_hostile_names(tmp_path: Path) -> None:
    hostile = comparison(models=(HOSTILE, "<b>second</b>"), threats=(sp.Linf(0.11),))
    hostile.cells[0].result.config["note"] = HOSTILE
    tags, document = written(
        hostile, tmp_path / "out", title=HOSTILE, data_name=HOSTILE, class_names=[HOSTILE, "</style>"], command=HOSTILE,
        config={HOSTILE: HOSTILE}, histories={HOSTILE: Training([Epoch(1, 1.0, 0.5, 0.5)])},
    )  # fmt: skip
    assert_needs_nothing(tags)
    assert not any(tag == "b" for tag, _ in tags.tags)
    assert document["title"] == HOSTILE
    raw = (tmp_path / "out/report.html").read_text()
    assert html.escape("<script src=http://evil/x.js>", quote=False) in raw
    outside = [path for path in tmp_path.rglob("*") if (tmp_path / "out") not in (path, *path.parents)]
    assert outside == []
    assert len(list((tmp_path / "out/adversarial").iterdir())) == len(hostile.cells)


def test_interrupted(pair: Comparison, tmp_path: Path) -> None:
    partial = replace(pair, cells=pair.cells[:2], complete=False)
    tags, document = written(partial, tmp_path / "partial")
    assert document["complete"] is False
    assert document["models"][1]["clean_accuracy"] is None
    assert document["models"][1]["cells"] == []
    assert "Not complete" in tags.text
    uneven = replace(pair, cells=pair.cells[:10], complete=False)
    assert gallery(uneven, 3).models == ("standard", "hardened")
    nothing = replace(pair, cells=(), complete=False)
    tags, document = written(nothing, tmp_path / "nothing")
    assert "there are no figures" in document["verdict"]
    assert not (tmp_path / "nothing/figures").exists()


def test_one_model(tmp_path: Path) -> None:
    tags, document = written(comparison(models=("alone",)), tmp_path)
    assert document["verdict"].startswith(
        "Of 16 clean inputs, the network `alone` gets 100.0% right. Within linf eps 0.11 the attacks leave `alone` 37.5%."
    )
    assert "alone" in tags.text


@pytest.mark.parametrize(
    ("shape", "kind", "count"),
    [((1, 4, 4), "images", 3), ((3, 4, 4), "images", 3), ((5,), "features", 3), ((2, 4, 4), "none", 0), ((300,), "none", 0)],
)
def test_inputs_of_every_kind(shape: tuple[int, ...], kind: str, count: int, tmp_path: Path) -> None:
    result = comparison(shape, threats=(sp.Linf(0.11),))
    shown = gallery(result, 3)
    assert (shown.kind, len(shown.examples)) == (kind, count)
    tags, _ = written(result, tmp_path, examples=3)
    drawn = [tag for tag, attributes in tags.tags if tag == "img" or attributes.get("class") == "bars"]
    assert len(drawn) == {"images": 3 * 2 * 3, "features": 3 * 2, "none": 0}[kind]
    assert ("nothing to draw" in tags.text) == (kind == "none")


def test_examples_are_the_same_samples_with_true_confidences(pair: Comparison) -> None:
    shown = gallery(pair, 4)
    assert shown.models == ("standard", "hardened")
    assert [example.label for example in shown.examples] == [0, 1, 0, 1]
    for example in shown.examples:
        assert torch.equal(example.original, pair.x[example.index])
        for shot in example.shots:
            sure = pair.models[shot.model].logits(shot.adversarial[None]).softmax(1)[0, shot.predicted]
            assert shot.confidence == pytest.approx(float(sure), abs=1e-6)
            assert torch.allclose(shot.adversarial - example.original, shot.delta)
            assert shot.smallest == (
                0.05 if abs(float(example.original.mean()) - 0.5 - 0.005 * (shot.model == "hardened")) < 0.05 else 0.11
            )
    assert shown.examples[0].shots[0].status is Status.FOOLED
    assert shown.factor == pytest.approx(0.5 / 0.11, rel=0.05)


def test_wrong_from_the_start_comes_last_and_was_fooled_by_nothing() -> None:
    x, y = samples((1, 4, 4), 4)  # distances 0.02, 0.02, 0.04, 0.04
    models = {"standard": sp.Model(threshold(0.0))}
    shown = gallery(compare(models, x, y ^ torch.tensor([1, 0, 0, 0]), [sp.attacks.FGSM()], [sp.Linf(0.03)]), 4)
    assert [example.index for example in shown.examples] == [1, 2, 3, 0]
    last = shown.examples[-1].shots[0]
    assert (last.status, last.smallest, float(last.delta.abs().max())) == (Status.ALREADY_WRONG, None, 0.0)


def test_labels_only_models_have_no_confidence() -> None:
    x, y = samples((4,))
    model = sp.Model(threshold(0.0), access=sp.Access.LABELS)
    result = compare({"closed": model}, x, y, [sp.attacks.UniformNoise()], [sp.Linf(0.1)])
    assert {shot.confidence for example in gallery(result, 4).examples for shot in example.shots} == {None}


def test_verdict_is_honest(pair: Comparison) -> None:
    assert headline(pair, Norm.LINF) == 0.11  # the smallest that costs the first model half
    assert "no difference that this number of samples could show" in verdict(pair)
    x, y = samples((4,), 24)
    shy = {"standard": sp.Model(threshold(0.0)), "hardened": sp.Model(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))}
    with torch.no_grad():  # the second one says 1 for everything: half right, never moved
        shy["hardened"].networks()[0][1].weight.zero_()
        shy["hardened"].networks()[0][1].bias.copy_(torch.tensor([-1.0, 2.0]))
    kept = compare(shy, x, y, [sp.attacks.PGD(steps=3)], [sp.Linf(0.25), sp.L2(0.01)])
    assert "`hardened` keeps 50.0%, at the price of 50.0 points of clean accuracy." in verdict(kept)
    assert "Even within l2 eps 0.01, the largest size tried, the attacks leave `standard` 100.0%." in verdict(kept)
    assert "`hardened` is left with 50.0%: it is less robust than `standard`." in verdict(kept)
    turned = replace(kept, models=dict(reversed(shy.items())), cells=kept.cells[2:] + kept.cells[:2])
    assert "`standard` is left with 0.0%: it is less robust than `hardened`." in verdict(turned)


def test_contradictions_are_noticed(pair: Comparison) -> None:
    assert observations(pair) == []
    fgsm, pgd, noise = pair.cells[3:6]
    swapped = replace(pair, cells=(replace(pgd, result=noise.result), replace(noise, result=fgsm.result)))
    assert ["PGD" in text and "weaker UniformNoise" in text for text in observations(swapped)] == [True]
    backwards = replace(
        pair, cells=(pair.cells[1], replace(pgd, result=replace(pgd.result, codes=torch.full_like(pgd.result.codes, 2))))
    )
    assert ["search stopped short" in text for text in observations(backwards)] == [True]


def test_a_second_report_replaces_the_first(pair: Comparison, tmp_path: Path) -> None:
    written(pair, tmp_path)
    other = comparison(models=("standard",))
    before = sorted(path.name for path in (tmp_path / "adversarial").iterdir())
    _, document = written(replace(other, cells=other.cells[:1]), tmp_path, title="Second")
    assert document["title"] == "Second"
    assert sorted(path.name for path in (tmp_path / "adversarial").iterdir()) == before
    assert not list(tmp_path.rglob(".*"))


def test_a_full_disk_leaves_the_old_report(pair: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(pair, tmp_path)
    old = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_folder.os, "replace", full)
    with pytest.raises(DataError, match="No space left"):
        report.write(pair, tmp_path, **(SETTINGS | {"title": "Second"}))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == old


def test_unwritable_folder(pair: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write the report"):
        report.write(pair, tmp_path / "file", **SETTINGS)


def test_bad_arguments(pair: Comparison, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="examples"):
        report.write(pair, tmp_path, **(SETTINGS | {"examples": -1}))
    with pytest.raises(InputError, match="'other'"):
        report.write(pair, tmp_path, **(SETTINGS | {"histories": {"other": Training([])}}))
    assert os.listdir(tmp_path) == []


def test_smallest_perturbations(tmp_path: Path) -> None:
    """Cells of `Minimize`, made by hand: their eps is no number, so it is null in JSON and "any" in the table."""
    pgd = comparison(models=("standard",), threats=(sp.L2(0.2),)).cells[0]
    distance = torch.where(pgd.result.having(Status.FOOLED), pgd.result.distance, torch.inf)
    result = replace(pgd.result, distance=distance)
    x, y = samples((1, 4, 4))
    whole = Comparison(x, y, {"standard": sp.Model(threshold(0.0))}, (replace(pgd, threat=sp.Minimize("l2"), result=result),))
    tags, document = written(whole, tmp_path)
    assert document["models"][0]["cells"][0]["eps"] is None
    assert "The smallest perturbation found for `standard` has a median l2 size" in document["verdict"]
    assert "any size" in tags.text


def test_words() -> None:
    assert [size(v) for v in (0.1, 8 / 255, 0.2, 3.0, float("inf"))] == ["0.1", "8/255", "0.2", "3", "–"]
    assert words.length(0.20000000298) == "0.2"
    assert words.percent(float("nan")) == "–"
    assert words.file_name("../..", "a b") == "_-a_b"
    pgd = sp.attacks.PGD
    labels = words.attack_labels([pgd(steps=3), pgd(steps=5), sp.attacks.FGSM(), sp.attacks.Restarts(pgd(), 2)])
    assert list(labels.values()) == ["PGD steps=3", "PGD steps=5", "FGSM", "Restarts(PGD)"]


@pytest.mark.parametrize("cascade", [True, False])
def test_the_command_line_is_in_the_report(cascade: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a net.py").write_text("import torch\nnet = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n")
    words = ["evaluate", "--model", "a net.py:net", "--eps", "0.01", "--samples", "6", "--out", "out"]
    words += ["--effort", "quick"] if cascade else ["--attack", "fgsm"]
    assert main(words) == 0
    command = json.loads(Path("out/results.json").read_text())["command"]
    assert shlex.split(command) == ["saddlepoint", *words]
    assert f"<pre>{html.escape(command)}</pre>".replace("&#x27;", "&#39;") in Path("out/report.html").read_text()
