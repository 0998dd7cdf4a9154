"""The verification benchmark decides what is decided, and goes on where it was; how fast is not tested here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "verification.py"
DATA = Path(os.environ.get("SADDLEPOINT_DATA", "nowhere")) / "verification"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs SADDLEPOINT_DATA/verification")


def run(*words: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_search_keeps_what_is_done(tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    first = run("search", "mnist_fc", "--only", "0,2", "--seconds", "20", "--out", str(kept))
    assert "mnist_fc: 1 unsat, 1 sat, 0 open of 2" in first
    again = run("search", "mnist_fc", "--only", "0,2", "--seconds", "20", "--out", str(kept))
    assert again.splitlines()[0] == first.splitlines()[2]  # nothing was done again
    found = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(row["truth"], row["verdict"], row["stage"]) for row in found] == [
        ("unsat", "robust", "crown"), ("sat", "falsified", "corners"),
    ]  # fmt: skip


def test_bounds_stand_beside_the_peers(tmp_path: Path) -> None:
    written = tmp_path / "bounds.json"
    run("bounds", "verivital", "--json", str(written))
    found = json.loads(written.read_text())
    assert {row["method"] for row in found} >= {"ibp", "crown_ibp", "crown"}
    for row in found:
        if row["method"] in ("ibp", "crown_ibp", "crown"):
            assert row["ours"] == pytest.approx(row["theirs"], rel=1e-4)
