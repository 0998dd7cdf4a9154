"""The benchmarks run; how fast is not tested here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "overhead.py"


def overhead(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


def test_quick(tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    done = overhead("--quick", "--no-peers", "--json", str(written))
    assert done.returncode == 0, done.stderr
    report = json.loads(written.read_text())
    assert set(report["tables"]) == {"attack", "stopping", "training", "occupancy"}
    assert report["machine"]["threads"] == 1

    attacks = {row["who"]: row for row in report["tables"]["attack"]}
    assert not any("error" in row for row in attacks.values())
    bare, textbook = attacks["bare loop, same passes"], attacks["bare loop, K + K passes"]
    assert bare["ratio"] == 1
    assert (textbook["forward"], textbook["backward"]) == (3, 3)
    for keep in ("margin", "last"):
        row = attacks[f'ours, keep="{keep}"']
        # clean and final; a success is looked at once more
        assert 5 <= row["forward"] <= 6
        assert row["backward"] == bare["backward"] == 3
        assert row["outside"] <= 0
        assert row["ratio"] > 0

    (occupancy,) = report["tables"]["occupancy"]
    assert occupancy["rows"] == occupancy["sum_of_costs"]
    assert 0 < occupancy["occupancy"] <= 1
    stopping = {row["who"]: row for row in report["tables"]["stopping"]}
    assert stopping['ours, keep="first"']["robust_worst"] <= stopping["bare loop"]["robust_worst"]


def test_bad_arguments_are_one_clear_line() -> None:
    done = overhead("--repeats", "0")
    assert done.returncode == 2
    assert "--repeats" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_table_of_evaluations(tmp_path: Path) -> None:
    """Made-up runs: the verdicts are compared image by image, the prices as a ratio."""
    runs = [
        {"row": "cifar10_cnnA_adv", "who": who, "count": 4, "stands": stands, "forward": forward, "backward": 10.0}
        for who, stands, forward in (("AutoAttack", [0, 1, 2], 990.0), ("sp.evaluate", [1, 3], 15.0))
    ]
    runs.append(runs[1] | {"batch": 32, "seconds": 2.0, "kib": 3072})
    cache = tmp_path / "runs.jsonl"
    cache.write_text("".join(json.dumps(run) + "\n" for run in runs))
    command = [sys.executable, str(SCRIPT.with_name("evaluation.py")), "--cache", str(cache), "--table"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "| 4 | 75.00% | 1000 | 50.00% | 25 | 40 | 40 | 2 | 1 |" in done.stdout
    assert "| 4 | 32 | sp.evaluate | 25 | 2.0 | 3 |" in done.stdout


def test_the_costs_of_detectors(tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT.with_name("detection.py")), "--quick", "--json", str(written)]
    environment = {name: value for name, value in os.environ.items() if name != "SADDLEPOINT_DATA"}
    names = [
        "max-probability",
        "mahalanobis",
        "tail-variance",
        "dropout-uncertainty:passes=3",
        "local-intrinsic-dimensionality",
    ]
    done = subprocess.run([*command, *names], capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["detector"].partition(":")[0]: row for row in json.loads(written.read_text())["table"]}
    assert [row["score_forward"] for row in rows.values()] == [1, 1, 0, 3, 1]
    assert rows["dropout-uncertainty"]["network"] == "smallcnn"
    assert rows["local-intrinsic-dimensionality"]["fit_forward"] > 1  # and the examples
    assert all(row["score"] > 0 for row in rows.values())


def test_robust_mnist_in_small(tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT.with_name("robust_mnist.py")), "--quick", "--effort", "quick", "--json", str(written)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(written.read_text())
    assert (report["epochs"], report["samples"]) == (1, 8)
    assert report["robust_accuracy"] <= report["clean_accuracy"]
    assert min(report["cpu_minutes"], report["pgd40_cpu_minutes"], report["factor"]) > 0
