"""What the documents show runs."""

import doctest
import importlib
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch

import saddlepoint
import saddlepoint as sp
from saddlepoint.propagation.methods import Method
from saddlepoint.verify.certify import STAGES

ROOT = Path(__file__).parent.parent


def blocks(name: str, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    return [text for found, text in fences if found == language]


def modules() -> list[str]:
    found = pkgutil.walk_packages(saddlepoint.__path__, "saddlepoint.")
    return ["saddlepoint", *(m.name for m in found if not m.name.endswith("__main__"))]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    torch.manual_seed(0)  # whatever ran before
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_some_docstrings_have_examples():
    finder = doctest.DocTestFinder()
    examples = sum(len(t.examples) for name in modules() for t in finder.find(importlib.import_module(name)))
    assert examples >= 15


def test_readme_example_runs_and_shows_what_it_says(capsys):
    first, figure, gate, second, black, defended, detected, proofs = blocks("README.md", "python")
    names: dict[str, object] = {}
    exec(compile(first, "README.md", "exec"), names)  # the README's own example
    printed = capsys.readouterr().out
    assert "robust accuracy" in printed
    assert float(printed.splitlines()[-1]) > names["result"].robust_accuracy + 0.2
    exec(compile(figure, "README.md", "exec"), names)
    assert names["evaluation"].robust_accuracy <= float(printed.splitlines()[-1])
    assert "Diagnosis" in capsys.readouterr().out
    exec(compile(gate, "README.md", "exec"), names)
    asked: list[dict[str, object]] = []
    names["test_release"](lambda *_, **settings: asked.append(settings))
    assert asked == [{"at_least": 0.6}]
    exec(compile(second, "README.md", "exec"), names)
    smallest = names["smallest"]
    assert smallest.success.all()
    assert bool((smallest.queries.total <= 200).all())
    exec(compile(black, "README.md", "exec"), names)
    assert int(names["near"].queries.forward.max()) <= 500
    assert names["near"].success.all()
    assert "success" in capsys.readouterr().out
    exec(compile(defended, "README.md", "exec"), names)
    assert isinstance(names["hardened"], sp.Model)
    printed = capsys.readouterr().out
    assert "naive" in printed
    assert "adaptive" in printed
    exec(compile(detected, "README.md", "exec"), names)
    assert isinstance(names["guarded"], sp.Guarded)
    assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1
    exec(compile(proofs, "README.md", "exec"), names)
    assert names["proved"].certified_accuracy > 0.3
    assert "(proved)" in capsys.readouterr().out


def test_attacks_page_example(capsys):
    (code,) = blocks("docs/attacks.md", "python")
    names: dict[str, object] = {}
    exec(compile(code, "docs/attacks.md", "exec"), names)  # the page's own example
    within, smallest = names["within"], names["smallest"]
    assert smallest.success.all()
    assert bool((smallest.distance[within.success] <= 0.5).float().mean() > 0.9)
    assert bool((within.distance[within.success] <= 0.5).all())


def test_attacks_page_says_what_the_attacks_declare(capsys):
    script = runpy.run_path(str(ROOT / "scripts" / "attack_table.py"))
    assert script["main"](["--check"]) == 0, capsys.readouterr().err
    page = (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")
    for change, message in (
        (page.replace("| `FAB` | l1,", "| `FAB` | l0,"), "run python scripts/attack_table.py"),
        (page.replace("- **FAB**:", "- FAB:"), "**FAB**"),
        (page.replace("- **FAB**:", "- **FABB**:"), "FABB is no attack"),
        (page.replace("- **FAB**:", "- **DDN**:"), "DDN has 2 lines"),
        (page.replace("<!-- table: smallest -->", ""), "<!-- table: smallest -->"),
    ):
        assert any(message in line for line in script["differences"](change)), message
    assert script["differences"](page) == []
    assert script["written"](page.replace("| `FAB` | l1,", "| `FAB` | l0,")) == page


@pytest.mark.parametrize("count", [lambda c: 3, lambda c: c, lambda c: c - 1, lambda c: min(c - 1, 9)])
def test_numbers_of_passes_are_what_they_say(count):
    text = runpy.run_path(str(ROOT / "scripts" / "attack_table.py"))["of_classes"](count)
    for classes in (2, 7, 10, 11, 100):
        assert eval(text, {"C": classes, "min": min}) == count(classes)


def test_readme_commands_are_known(capsys):
    from saddlepoint.cli import main

    lines = [line for block in blocks("README.md", "") for line in block.splitlines() if line.startswith("saddlepoint ")]
    assert len(lines) >= 6
    for line in lines:
        words = line.split()[1:]
        command = words[:2] if words[0] in ("list", "data") else words[:1]
        assert main([*command, "--help"]) == 0
        shown = capsys.readouterr().out
        for option in (word for word in words if word.startswith("--")):
            assert option in shown, f"{line}: {option}"


def test_contributing_example_is_a_whole_attack(monkeypatch):
    from saddlepoint.attacks import registry

    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    code = blocks("CONTRIBUTING.md", "python")[0]
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff:  # it comes with the development tools
        checked = subprocess.run(
            [ruff, "check", "--stdin-filename", "src/x.py", "-"], input=code, text=True, cwd=ROOT, capture_output=True
        )
        assert checked.returncode == 0, checked.stdout
    names: dict[str, object] = {"__name__": "greedy"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)  # the guide's own example
    torch.manual_seed(0)
    model = sp.Model(torch.nn.Linear(5, 3, bias=False), bounds=(-1, 1))
    x = 2 * torch.rand(40, 5) - 1
    y = model.predict(x)
    result = sp.attack(model, x, y, sp.attacks.get("greedysearch")(steps=30), sp.Linf(0.2))
    baseline = sp.attack(model, x, y, sp.attacks.UniformNoise(), sp.Linf(0.2))
    assert int(result.success.sum()) > int(baseline.success.sum())
    assert int(result.queries.backward.sum()) == 0
    assert bool((result.distance <= 0.2).all())


def test_plain_pytorch_example():
    assert runpy.run_path(str(ROOT / "examples" / "plain_pytorch.py"))["main"](epochs=4) > 0.3


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightning_example():
    pytest.importorskip("lightning")
    assert runpy.run_path(str(ROOT / "examples" / "lightning_module.py"))["main"](epochs=4) > 0.3


def test_changelog_and_licence_are_there():
    assert "Unreleased" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_defenses_page_names_every_defense() -> None:
    page = (ROOT / "docs" / "defenses.md").read_text()
    purification = sp.defenses.purification
    purifiers = {
        cls.__name__
        for cls in map(purification.__dict__.get, purification.__all__)
        if isinstance(cls, type) and issubclass(cls, purification.Purifier) and cls is not purification.Purifier
    }
    transforms = {cls.__name__ for cls in vars(sp.transforms).values() if isinstance(cls, type) and is_dataclass(cls)}
    names = {f"`{name}`" for name in sp.defenses.RECIPES} | {f"`{name}" for name in purifiers | transforms - {"Transform"}}
    assert not {name for name in names if name not in page}


def test_defenses_page_examples(capsys, tmp_path, monkeypatch):
    own, several, thermometer = blocks("docs/defenses.md", "python")
    exec(compile(own, "docs/defenses.md", "exec"), {"__name__": "defenses_page"})
    assert "halves: BPDA, identity" in capsys.readouterr().out
    names: dict[str, object] = {}
    exec(compile(thermometer, "docs/defenses.md", "exec"), names)
    assert sp.train(names["net"], sp.data.load("digits").train.take(600), epochs=3).epochs[-1].loss < 2
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("accelerate")
    exec(compile(several, "docs/defenses.md", "exec"), {"__name__": "defenses_page"})
    assert Path("hardened.safetensors").exists()


def test_verification_page_examples(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, votes = blocks("docs/verification.md", "python")
    names: dict[str, object] = {"__name__": "verification_page"}
    exec(compile(first, "docs/verification.md", "exec"), names)
    exec(compile(votes, "docs/verification.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "Verification of 20 samples" in printed
    assert "Interval(certified=0." in printed


def test_verification_page_names_every_method_and_stage() -> None:
    page = (ROOT / "docs" / "verification.md").read_text()
    assert not {name for name in get_args(Method) if f"`{name}" not in page}
    assert not {name for name in STAGES if name != "none" and name not in page}


def test_detection_page_names_every_detector() -> None:
    page = (ROOT / "docs" / "detection.md").read_text()
    assert not {name for name in sp.detectors.DETECTORS if f"`{name}`" not in page}


@pytest.mark.parametrize("number", [0, 1])
def test_detection_page_examples(number, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sp.detectors.base, "DETECTORS", dict(sp.detectors.DETECTORS))
    code = blocks("docs/detection.md", "python")[number]
    exec(compile(code, "docs/detection.md", "exec"), {"__name__": "detection_page"})
    assert len(capsys.readouterr().out.splitlines()) > (0 if number else 10)
