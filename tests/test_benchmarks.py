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
