"""The training benchmark runs and counts what it should; how fast is not tested here."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "training.py"


def test_quick(tmp_path):
    written = tmp_path / "figures.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(written)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    tables = json.loads(written.read_text())["tables"]
    (row,) = tables["loop"]
    assert row["passes_by_hand"] == [2 * 8 * 4, 2 * 8 * 4]  # two batches of 8: three steps of PGD and the training step
    assert row["passes_ours"] == [row["passes_by_hand"][0] + 3 * 8, row["passes_by_hand"][1]]  # and the probe of 8 inputs
    assert row["ratio"] > 0
    clean, fast = tables["recipes"]
    assert (clean["backward"], fast["backward"]) == (1, 2 + 5 / 2)  # the check for collapse: PGD-5 on one batch of the two
    assert clean["factor"] == 1
