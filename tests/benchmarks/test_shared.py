"""The benchmarks run in the quickstart's environment, from any folder, and answer --help at once."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.shared import installed, markdown

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = BENCHMARKS.with_name("scripts")
ENTRIES = [path for folder in (BENCHMARKS, SCRIPTS) for path in sorted(folder.glob("*.py"))
           if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
ONLY_IN_TESTS = ["bitsandbytes", "peft", "pytest"]  # packages that requirements.txt does not name
TINY = "--preset tiny --rank 4 --batch_size 1 --seq_len 8".split()


def run_without(packages: list[str], folder: Path, path: Path, *flags: str):
    """Runs a script, from that folder, as if these packages were not installed."""
    lines = [f"sys.modules[{name!r}] = None\n" for name in packages]
    (folder / "sitecustomize.py").write_text("import sys\n" + "".join(lines), encoding="utf-8")
    return subprocess.run([sys.executable, path, *flags], cwd=folder, capture_output=True, encoding="utf-8",
                          env=os.environ | {"PYTHONPATH": str(folder)})


def first_cells(text: str) -> list[str]:
    """The first cell of each row of a printed table, without its head."""
    return [line.strip("| ").split(" | ")[0] for line in text.splitlines() if line.startswith("| ")][1:]


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_memory_without_bitsandbytes_leaves_rows_out(tmp_path):
    done = run_without(ONLY_IN_TESTS, tmp_path, BENCHMARKS / "memory.py", *TINY,
                       "--methods", "LoRA", "LoRA, 8-bit AdamW")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "left out: LoRA, 8-bit AdamW needs `pip install bitsandbytes`\n" in done.stdout
    assert first_cells(done.stdout) == ["LoRA"]


def test_speed_without_peft_leaves_rows_out(tmp_path):
    done = run_without(ONLY_IN_TESTS, tmp_path, BENCHMARKS / "speed.py", *TINY,
                       "--rounds", "1", "--jobs", "lora", "--contenders", "LoRA, q and o", "PEFT, q and o")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "left out: PEFT, q and o needs `pip install peft`\n" in done.stdout
    assert first_cells(done.stdout) == ["LoRA, q and o"]


def test_only_what_is_not_installed_is_left_out(capsys):
    assert installed({"a": None, "b": "no_such_package", "c": "json"}) == ["a", "c"]
    assert capsys.readouterr().out == "left out: b needs `pip install no_such_package`\n"


def test_a_table_in_markdown():
    rows = [{"name": "a", "MB": 1234.56, "share": 0.5}, {"name": "b", "MB": 7}]
    assert markdown(rows, {"MB": ",.1f", "share": ".0%"}).splitlines() == [
        "| name | MB | share |", "|---|---|---|", "| a | 1,234.6 | 50% |", "| b | 7.0 |  |"]


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_help_answers_at_once_from_any_folder(path, tmp_path):
    began = time.perf_counter()
    done = run_without(["torch", "pandas"], tmp_path, path, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    assert time.perf_counter() - began < 1.5


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_an_entry_file_opens_with_the_commands_that_run_it(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    command = f"    python {path.parent.name}/{path.name}"
    assert any(line.startswith(command) for line in ast.get_docstring(tree, clean=False).splitlines())
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert sum(call.startswith("sys.path.insert") for call in calls) <= 1
