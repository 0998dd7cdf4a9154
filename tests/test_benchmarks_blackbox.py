"""The benchmark of black-box attacks counts right; how good the attacks are is not tested here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saddlepoint as sp

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def blackbox(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import blackbox

    return blackbox


def first(data: tuple[Tensor, Tensor], net: nn.Module) -> tuple[Tensor, Tensor]:
    """The first sample that the network gets right."""
    x, y = data
    right = (net.eval()(x).argmax(1) == y).nonzero()[0]
    return x[right], y[right]


def test_watching_counts_rows_and_stops(blackbox: ModuleType) -> None:
    """The network's logits are (0, x1): what has x1 > 0 is adversarial for class 0."""
    net = nn.Linear(2, 2, bias=False).requires_grad_(False)
    net.weight.copy_(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    x, y = torch.tensor([[0.5, 0.0]]), torch.tensor([0])
    points = torch.tensor([[0.5, 0.0], [0.5, 0.4], [0.5, 0.8], [0.5, 1.5], [0.5, 0.3], [0.4, 0.1]])
    watching = blackbox.Watching(net, x, y, "linf", 5, None)
    assert watching(points[:3]).shape == (3, 2)
    with pytest.raises(blackbox.Enough):
        watching(points[3:])  # one row more than there is left
    assert watching.asked == 5
    assert [query for query, _ in watching.curve] == [2, 5]  # neither the farther one nor the one outside of the range
    assert [distance for _, distance in watching.curve] == pytest.approx([0.4, 0.3])

    watching = blackbox.Watching(net, x, y, "l2", 100, 0.35)
    with pytest.raises(blackbox.Enough):
        watching(points)
    assert watching.asked == 5  # the first within the ball
    assert watching.curve == [(5, pytest.approx(0.3))]


def test_both_ways_to_trace_agree(blackbox: ModuleType, digits: tuple[Tensor, Tensor], mlp: nn.Module) -> None:
    """What the engine tells after each round is what a network that sees every row has seen by then."""
    x, y = first(digits, mlp)
    watching = blackbox.Watching(mlp, x, y, "l2", 10**6, None).eval()
    model = sp.Model(watching, access=sp.Access.LABELS)
    model.probe(x)
    watching.asked, watching.curve = 0, []
    told = blackbox.Curves()
    budget = sp.Budget(queries=400)
    result = sp.attack(model, x, y, "hopskipjump", sp.Minimize("l2"), budget=budget, callback=told)
    (curve,) = told.found.values()
    assert len(curve) > 3
    for queries, distance in curve:
        assert blackbox.at(watching.curve, queries) == pytest.approx(distance, rel=1e-5)
    assert blackbox.at(watching.curve, 400) == pytest.approx(float(result.distance), rel=1e-5)
    assert watching.asked == int(result.queries.forward) + int(result.queries.verify)

    case = blackbox.Case("mlp", mlp, x, y, [0])
    (row,) = blackbox.ours(blackbox.Task(case, "l2", 1.0, 400, 0, 0), "hopskipjump", [0])
    assert row["asked"] == int(result.queries.forward)
    assert row["curve"][-1][1] == pytest.approx(float(result.distance))
    assert 0 < row["network"] < row["seconds"]


def runs(blackbox: ModuleType, who: str, attack: str, curves: list[list[list[float]]], seconds: float) -> list[dict[str, Any]]:
    eps = blackbox.BALLS["mnist_lenet_standard"]["linf"]
    same = {
        "model": "mnist_lenet_standard", "norm": "linf", "eps": eps, "limit": 100, "seed": 0, "offset": 0, "who": who,
        "attack": attack, "access": "scores", "minimizes": False, "asked": 100, "seconds": seconds, "network": 0.1, "batch": 1,
    }  # fmt: skip
    return [same | {"image": image, "curve": curve} for image, curve in enumerate(curves)]


def test_tables_compare_on_the_same_images(blackbox: ModuleType, tmp_path: Path) -> None:
    """Made-up runs: ours has a third image, which the peer doesn't; on the first two it is behind after 10 queries."""
    rows = runs(blackbox, "saddlepoint", "square", [[[20, 0.1]], [[30, 0.1]], [[5, 0.1]]], 0.12)
    rows += runs(blackbox, "torchattacks", "Square", [[[10, 0.1]], []], 0.3) + runs(blackbox, "ART", "Square", [[], []], 0.72)
    cache, written = tmp_path / "runs.jsonl", tmp_path / "tables.json"
    cache.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(FOLDER / "blackbox.py"), "--cache", str(cache), "--table", "--queries", "10", "100"]
    command += ["--networks", "mnist_lenet_standard", "--norms", "linf", "--json", str(written), "--plot", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "| Square | 3 | 33% | 100% | 100 | 100 |" in done.stdout
    assert "| Square (torchattacks) | 2 | **50%** | **50%** |" in done.stdout
    assert "after 100 queries" in done.stdout
    assert "| Square | 1 | 1.200 | 1.000 | 1.20 | 6.0 |" in done.stdout
    assert "| mnist_lenet_standard | linf | scores | fooled | 2 | ours | 0% | 100% Square |" in done.stdout  # of two, not three
    assert "|  |  |  |  |  | peers | 50% Square (torchattacks) | 50% Square (torchattacks) |" in done.stdout
    assert "- mnist_lenet_standard: 1.2 (1.20 to 1.2); square 6.0" in done.stdout
    report = json.loads(written.read_text())
    assert report["tables"][0]["best_no_worse"] == [100]
    assert len(report["curves"]) == len(rows)
    assert (tmp_path / "mnist_lenet_standard.png").stat().st_size > 0


@pytest.mark.parametrize("arguments", [["--images", "0"], ["--attacks", "nosuch"], ["--square", "nosuch"]])
def test_bad_arguments_are_one_clear_line(
    blackbox: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        blackbox.main(["--table", *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err
