"""benchmarks/gpu.py, tried on a CPU: its parts are right there, and one bad part never stops the rest."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_checks
from benchmarks.gpu_checks import Run, Skip, compare, documents
from common.errors import RunError

SCRIPT = Path(gpu.__file__)


def read(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "lines.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == json.loads((out / "result.json").read_text(encoding="utf-8"))
    table = (out / "result.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == len(lines) + 2 and {row.count("|") for row in table} == {5}
    return lines


def test_every_part_has_a_function_and_all_fit_into_the_time():
    import importlib

    for name, (module, seconds) in gpu.PARTS.items():
        assert callable(getattr(importlib.import_module(f"benchmarks.{module}"), name)) and seconds > 0


def test_some_parts_on_a_cpu(tmp_path):
    """As a person calls it. (All parts take minutes: python benchmarks/gpu.py --device cpu --smoke.)"""
    parts = ["machine", "packing", "head", "grpo", "fsdp", "lora_1b"]
    command = [sys.executable, SCRIPT, "--device", "cpu", "--smoke", "--out_dir", tmp_path, "--parts", *parts]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = read(tmp_path)
    assert list(dict.fromkeys(line["part"] for line in lines)) == [p for p in gpu.PARTS if p in parts]
    assert {line["verdict"] for line in lines} <= {"right", "left out", ""}
    assert sum(line["verdict"] == "right" for line in lines) >= 9
    ours = next(line for line in lines if line["what"] == "Seedling, LoRA")
    assert ours["figures"]["tokens/s"] > 0 and ours["figures"]["loss is finite"] is True


def test_a_cpu_is_refused_for_real_shapes(refused):
    refused(gpu, ["--device", "cpu"], "needs --smoke")


# --- a part that fails, hangs or ends its process -----------------------------------------------------------


@pytest.fixture
def fake_parts(monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {name: ("fake", 0.5) for name in ("good", "bad", "better")})
    monkeypatch.setattr(gpu, "SECONDS_TO_START", 20)

    def args(out, **changes):
        return SimpleNamespace(**{"parts": list(gpu.PARTS), "device": "cpu", "smoke": False, "minutes": 1,
                                  "out_dir": out, "work": None} | changes)

    return args


@pytest.mark.parametrize("bad_does, said", [("time.sleep(60)", "stopped after"), ("os._exit(3)", "code 3")])
def test_the_rest_goes_on(fake_parts, monkeypatch, tmp_path, bad_does, said):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, sys, time\n"
        "for part in sys.argv[sys.argv.index('--parts') + 1:]:\n"
        f"    if part == 'bad': {bad_does}\n"
        "    print(json.dumps({'part': part, 'what': 'a line', 'verdict': 'right'}), flush=True)\n"
        "    print(json.dumps({'ended': part}), flush=True)\n", encoding="utf-8")
    monkeypatch.setattr(gpu, "__file__", str(worker))
    began = time.monotonic()
    with pytest.raises(RunError, match="1 of 3 lines are WRONG or FAILED: the first is bad"):
        gpu.main(fake_parts(tmp_path / "out"))
    assert time.monotonic() - began < 30
    good, bad, better = read(tmp_path / "out")
    assert good["verdict"] == better["verdict"] == "right"
    assert bad["verdict"] == "FAILED" and said in bad["what"]


def test_parts_without_time_are_named(fake_parts, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "watch_worker", lambda *rest: pytest.fail("there is no time to start anything"))
    gpu.main(fake_parts(tmp_path, minutes=-1))
    assert [line["verdict"] for line in read(tmp_path)] == ["left out"] * 3


def test_an_error_is_a_line_and_the_next_part_begins(fake_parts, monkeypatch, capsys, tmp_path):
    def good(run):
        yield gpu_checks.check("a sum", True)
        raise ValueError("no\nsuch thing")

    def bad(run):
        raise Skip("there is no GPU")

    def better(run):
        yield compare("a tensor", torch.ones(2), torch.ones(2), 0.0)

    fake = SimpleNamespace(good=good, bad=bad, better=better)
    monkeypatch.setitem(sys.modules, "benchmarks.fake", fake)
    gpu.work(fake_parts(tmp_path, work=str(tmp_path)))
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("ended") for line in said] == [None, None, "good", None, "bad", None, "better"]
    assert said[1]["verdict"] == "FAILED" and said[1]["what"].startswith("ValueError in test_gpu.py:")
    assert said[1]["what"].endswith(": no") and said[3] == {"part": "bad", "what": "there is no GPU",
                                                            "verdict": "left out"}
    assert said[5]["verdict"] == "right"


# --- what the verdicts mean --------------------------------------------------------------------------------


def test_a_difference_is_seen():
    right = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([0.5])}
    near = {"a": torch.tensor([1.0, -4.002]), "b": torch.tensor([0.5])}
    assert compare("", near, right, 1e-3)["verdict"] == "right"
    assert compare("", near, right, 1e-4)["verdict"] == "WRONG"
    assert compare("", near, right, 1e-4)["figures"]["difference"] == pytest.approx(5e-4, rel=1e-3)
    assert compare("", {"a": right["a"]}, right, 1.0)["verdict"] == "WRONG"  # a gradient is missing
    lost = {"a": torch.tensor([math.nan, -4.0]), "b": right["b"]}
    assert compare("", lost, right, 1e9)["verdict"] == "WRONG"


def test_documents_fill_their_rows():
    found = documents(3, 100, mean=20)
    assert found.shape == (3, 100) and (found.diff(dim=1) >= 0).all() and found[:, 0].eq(0).all()
    sizes = torch.cat([row.bincount()[:-1] for row in found])  # the last one is cut off
    assert sizes.min() >= 10 and sizes.max() <= 30


def test_seconds_are_those_of_the_work_alone():
    run = Run(torch.device("cpu"), False, Path(), 60)
    assert 9 < run.milliseconds(lambda: time.sleep(0.01), 3) < 40
    assert 55 < run.seconds_left <= 60
