"""The short form of benchmarks/faults.py: runs are killed and disks fill up; every promise is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "faults.py"


@pytest.mark.skipif(sys.platform != "linux", reason="forks, /proc and mounts are Linux's")
def test_what_was_promised_holds(tmp_path):
    seed = int.from_bytes(os.urandom(3), "big")  # other moments each time; a failure shows which
    command = [sys.executable, str(SCRIPT), "--only", "kills", "saves", "shards", "--trials", "1",
               "--seed", str(seed), "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"--seed {seed}\n{done.stdout}{done.stderr}"
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert len(rows) == 8 + 9 + 3
    for row in rows:
        assert row["kept"] == row["tried"] and (row["tried"] or "not tried" in row["note"]), row
