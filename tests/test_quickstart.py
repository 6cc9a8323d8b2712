"""scripts/quickstart.py from nothing to its report, stopped and killed on the way, with very few steps."""

import html
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["pretrain", "full_sft", "grpo", "lora_identity", "lora_clinic"]

spec = importlib.util.spec_from_file_location("quickstart", ROOT / "scripts" / "quickstart.py")
quickstart = importlib.util.module_from_spec(spec)
sys.modules["quickstart"] = quickstart
spec.loader.exec_module(quickstart)


def start(folder, *flags):
    """The quickstart as a process, its outputs going to files beside the folder."""
    with (folder.parent / "stdout").open("w") as out, (folder.parent / "stderr").open("w") as err:
        command = [sys.executable, str(ROOT / "scripts" / "quickstart.py"), "--out_dir", str(folder), *flags]
        return subprocess.Popen(command, cwd=folder.parent, stdout=out, stderr=err)


def finish(process, folder):
    """(exit code, stdout, stderr)."""
    code = process.wait(timeout=180)
    return code, *((folder.parent / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))


def wait_for(condition, process, seconds=150):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, "did not come to it"
        time.sleep(0.02)


def running(folder):
    """Command lines of processes that still train into the folder (Linux)."""
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(process.read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            pass
    return [line for line in lines if str(folder) in line and "trainer" in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that meets Ctrl-C while it pretrains and a kill during SFT, and is rerun to the end."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    story = {"folder": folder}
    process = start(folder, "--minutes", "0.1")
    if os.name == "posix":
        wait_for(lambda: "step" in read(folder / "logs" / "pretrain.log"), process)
        process.send_signal(signal.SIGINT)
        story["stopped"] = finish(process, folder)
        story["checkpoints"] = list((folder / "pretrain").glob("checkpoints/step_*"))
        process = start(folder)
        wait_for(lambda: "step" in read(folder / "logs" / "full_sft.log"), process)
        process.kill()
        story["killed"] = finish(process, folder)
        if Path("/proc").exists():
            end = time.monotonic() + 20
            while running(folder) and time.monotonic() < end:
                time.sleep(0.1)
            story["orphans"] = running(folder)
        process = start(folder)
    story["done"] = finish(process, folder)
    return story


def read(path):
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def test_it_ends_with_scores_samples_and_the_chat_command(finished):
    code, out, err = finished["done"]
    assert code == 0, out + err
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if re.search(r"\d\.\d\d *$", line)}
    assert len(rows["all"]) == 5 and "addition" in rows and "clinic" in rows
    assert out.count("\n> ") == 3
    folder = finished["folder"]
    assert f"eval_model.py --load_from {folder.name}/full_sft --lora {folder.name}/lora_identity" in out
    for name in ("loss.png", "report.html", "report.json"):
        assert (folder / name).stat().st_size > 100 and name in out + "report.json"


def test_report_json_has_the_promised_shape(finished):
    report = json.loads(read(finished["folder"] / "report.json"))
    assert list(report) == ["seconds", "parameters", "scores", "samples"]
    assert list(report["seconds"]) == list(report["scores"]) == STAGES
    assert all(seconds > 0 for seconds in report["seconds"].values())
    config = json.loads(read(finished["folder"] / "full_sft" / "config.json"))
    assert report["parameters"] > config["vocab_size"] * config["hidden_size"]
    base = report["scores"]["full_sft"].keys()
    for stage, scores in report["scores"].items():
        assert all(0 <= share <= 1 for share in scores.values()) and "all" in scores
        own = {stage.removeprefix("lora_")} if stage.startswith("lora_") else set()
        own |= {"largest", "fact"} if stage == "grpo" else set()
        assert scores.keys() == base | own, stage
    assert len(report["samples"]) == 3
    assert all(list(sample["answers"]) == STAGES for sample in report["samples"])


def test_report_html_is_one_file_with_everything(finished):
    page = read(finished["folder"] / "report.html")
    assert page.count("<svg") >= len(STAGES) and "prefers-color-scheme: dark" in page
    assert not re.search(r'(src|href)="', page)
    report = json.loads(read(finished["folder"] / "report.json"))
    assert all(html.escape(sample["prompt"]) in page for sample in report["samples"])
    assert "train_lora.py" in page and f"{report['parameters']:,}" in page


def test_the_commands_are_printed_and_resumed(finished):
    out = finished["done"][1]
    commands = [line for line in out.splitlines() if line.startswith("$ ")]
    assert "full_sft" in commands[0]  # pretraining was finished before the kill
    assert sum("train_lora.py" in command for command in commands) == 2
    if os.name == "posix":
        assert commands[0].endswith("--resume") and not commands[-1].endswith("--resume")
    metrics = [
        json.loads(line) for line in read(finished["folder"] / "pretrain" / "metrics.jsonl").splitlines()
    ]
    steps = [m["step"] for m in metrics if "loss" in m]
    assert steps == sorted(set(steps)) and steps[-1] == metrics[-1]["step"]


@pytest.mark.skipif(os.name != "posix", reason="signals as on Linux and macOS")
def test_ctrl_c_saves_and_says_how_to_go_on(finished):
    code, out, err = finished["stopped"]
    assert code == 130 and "Traceback" not in out + err
    assert "To go on: " in err and "quickstart.py" in err
    assert finished["checkpoints"]
    assert not finished.get("orphans")


def test_a_finished_run_says_so_and_other_minutes_need_fresh(finished):
    folder = finished["folder"]
    before = (folder / "full_sft" / "model.safetensors").stat().st_mtime_ns
    began = time.monotonic()
    code, out, err = finish(start(folder), folder)
    assert code == 0 and "finished" in out and "report.html" in out and "$ " not in out
    assert time.monotonic() - began < 5
    code, out, err = finish(start(folder, "--minutes", "3"), folder)
    assert code == 1 and err.count("\n") == 1 and "--fresh" in err
    assert (folder / "full_sft" / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    folder = tmp_path / "mine"
    (folder / "pretrain").mkdir(parents=True)
    (folder / "pretrain" / "work.txt").write_text("mine", encoding="utf-8")
    code, _, err = finish(start(folder, "--minutes", "0.1"), folder)
    assert code == 1 and "other things" in err and err.count("\n") == 1
    assert [p.name for p in folder.rglob("*")] == ["pretrain", "work.txt"]


def test_a_run_of_other_commands_is_left_alone(tmp_path, monkeypatch):
    """A finished model is not thrown away because the recipe has changed, or the folder has moved."""
    state = quickstart.State(tmp_path)
    state.data |= {"minutes": quickstart.DEFAULT_MINUTES, "started": {"world": "python another_recipe.py"}}
    state.save()
    made = tmp_path / "world" / "lora_clinic_test.jsonl"
    made.parent.mkdir()
    made.write_text("mine", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--out_dir", str(tmp_path)])
    with pytest.raises(RunError, match="holds a run of other commands.*--fresh"):
        quickstart.main(quickstart.parse_args())
    assert read(made) == "mine"


def test_a_file_for_a_folder_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--out_dir", str(tmp_path / "mine")])
    with pytest.raises(RunError, match="is no folder"):
        quickstart.main(quickstart.parse_args())


def test_a_step_that_fails_shows_its_log(tmp_path, capfd):
    state = quickstart.State(tmp_path)
    script = tmp_path / "bad.py"
    script.write_text("print('what went wrong')\nraise SystemExit(3)", encoding="utf-8")
    task = quickstart.Task("bad", "pretrain", [str(script)], tmp_path / "nothing", 1)
    with pytest.raises(RunError, match="exit code 3"):
        quickstart.run(task, state, quickstart.Progress([task], state), tmp_path)
    assert "what went wrong" in capfd.readouterr().err
    assert not quickstart.State(tmp_path).finished(task)


def test_minutes_scale_the_steps_alone(tmp_path):
    def steps(minutes):
        commands = [
            task.command for task in quickstart.plan(tmp_path, minutes) if "--max_steps" in task.command
        ]
        return [int(command[command.index("--max_steps") + 1]) for command in commands]

    assert steps(quickstart.DEFAULT_MINUTES) == [steps for _, steps, _, _ in quickstart.STAGES.values()]
    assert steps(2 * quickstart.DEFAULT_MINUTES) == [2 * n for n in steps(quickstart.DEFAULT_MINUTES)]


def test_help_is_quick():
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "quickstart.py"), "--help"], capture_output=True
    )
    assert time.perf_counter() - began < 1.5 and b"--fresh" in done.stdout
