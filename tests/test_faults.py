"""The short form of scripts/bench_faults.py: runs are killed and disks fill up; all is as promised."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench_faults.py"


@pytest.mark.skipif(sys.platform != "linux", reason="forks, /proc and mounts are Linux's")
@pytest.mark.parametrize("part, trials, rows", [("kills", 1, 4), ("saves", 1, 9)])
def test_what_was_promised_holds(part, trials, rows, tmp_path):
    # Another seed each time: moments are random, and each failure tells its own.
    seed = int.from_bytes(os.urandom(3), "big")
    command = [sys.executable, str(SCRIPT), "--only", part, "--trials", str(trials), "--seed", str(seed),
               "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"--seed {seed}\n{done.stdout}{done.stderr}"
    results = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert len(results) == rows and all(row["tried"] or "not tried" in row["note"] for row in results)
