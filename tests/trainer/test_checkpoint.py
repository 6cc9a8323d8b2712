"""Killed at any moment and resumed, a run ends as if nothing had happened; nothing is ever half-written."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch

import forks
import pytest
import torch
from safetensors.torch import load_file, save_file

import common.files
import trainer.checkpoint
import trainer.loop
import trainer.stage
from common.cli import ROOT
from common.errors import UsageError
from trainer.checkpoint import (
    VERSION,
    Progress,
    begin_anew,
    checkpoints,
    load_checkpoint,
    lock_folder,
    restore,
    save_checkpoint,
)
from trainer.distributed import Ranks
from trainer.optim import learning_rate_factor
from trainer.tracking import Tracker, read_metrics

ALONE = Ranks(0, 1, torch.device("cpu"))

STAGES = ("pretrain", "full_sft", "lora")


def start(workshop, stage, *flags, **options):
    """The script in a process of its own, which can be killed."""
    return subprocess.Popen([sys.executable, *workshop.command(stage, *flags)], encoding="utf-8",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def wait_for_lines(process, path, count):
    """Returns once metrics.jsonl has so many lines."""
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_text(encoding="utf-8").count("\n") < count:
        if process.poll() is not None or time.monotonic() > deadline:
            break
        time.sleep(0.002)


def tensors(run_dir):
    (path,) = run_dir.glob("*model.safetensors")
    return load_file(path)


def assert_same_run(run_dir, reference, read_log):
    ours, theirs = tensors(run_dir), tensors(reference)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert read_log(run_dir) == read_log(reference)
    assert not (run_dir / "checkpoints").exists()
    leftovers = {path.name for path in run_dir.parent.iterdir()} - set(STAGES)
    assert not leftovers, "a temporary folder was left behind"
    result, expected = (json.loads((folder / "training.json").read_text(encoding="utf-8"))
                        for folder in (run_dir, reference))
    for name in ("steps", "tokens", "loss", "eval_loss", "bits_per_byte"):
        assert result.get(name) == expected.get(name), name


# --- killed from outside -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def killed(workshop):
    """The three stages, each killed (SIGKILL) at a random moment: stage -> its folder, as it was left."""
    out_dir, rng = workshop.folder / "killed", random.Random()
    running = {stage: start(workshop, stage, *workshop.flags(stage, out_dir)) for stage in STAGES}
    for stage, process in running.items():
        wait_for_lines(process, out_dir / stage / "metrics.jsonl", rng.randint(0, 6))
        time.sleep(rng.random() * 0.03)
        process.kill()
        process.communicate()
    return {stage: out_dir / stage for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_sigkill_and_resume_is_the_uninterrupted_run(stage, workshop, finished, killed, read_log):
    left = sorted(p.name for p in (killed[stage] / "checkpoints").glob("*"))
    ended = workshop.run(stage, *workshop.flags(stage, killed[stage].parent), "--resume")
    assert ended.code == 0, (left, ended)
    assert_same_run(killed[stage], finished[stage][0], read_log)


@pytest.fixture(scope="session")
def interrupted_by_hand(workshop):
    """Two runs, without and with a worker, stopped by Ctrl-C: workers -> (folder, code, stdout, stderr)."""
    running = {}
    for workers in (0, 1):
        out_dir = workshop.folder / f"by_hand_{workers}"
        flags = workshop.flags("full_sft", out_dir, max_steps=3000, log_interval=1, save_interval=3000)
        flags += ["--num_workers", str(workers)]
        running[workers] = out_dir / "full_sft", start(workshop, "full_sft", *flags, start_new_session=True)
    ended = {}
    for workers, (run_dir, process) in running.items():
        wait_for_lines(process, run_dir / "metrics.jsonl", 6)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to its workers too
        out, err = process.communicate(timeout=60)
        ended[workers] = run_dir, process.returncode, out, err
    return ended


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_saves_and_says_how_to_go_on(workers, interrupted_by_hand, read_log):
    run_dir, code, out, err = interrupted_by_hand[workers]
    assert code == 130 and "Traceback" not in out + err, out + err
    (line,) = [line for line in out.splitlines() if "--resume" in line]
    (checkpoint,) = checkpoints(run_dir)
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert f"stopped at step {state['step']};" in line and checkpoint.name == f"step_{state['step']:08}"
    assert read_log(run_dir)[-1]["step"] == state["step"]


def test_stopped_twice_and_resumed(workshop, finished, read_log, tmp_path, monkeypatch):
    for stop in (6, 15):  # between log lines, between validations

        def factor(step, *rest, stop=stop):
            if step == stop:
                signal.raise_signal(signal.SIGINT)
            return learning_rate_factor(step, *rest)

        monkeypatch.setattr(trainer.loop, "learning_rate_factor", factor)
        ended = workshop.run("lora", *workshop.flags("lora", tmp_path), "--resume")
        assert ended.code == 130 and f"stopped at step {stop + 1};" in ended.out
    monkeypatch.undo()
    assert workshop.run("lora", *workshop.flags("lora", tmp_path), "--resume").code == 0
    assert_same_run(tmp_path / "lora", finished["lora"][0], read_log)


# --- killed at the worst moments ---------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing in our code catches it."""


def die_on(monkeypatch, owner, name, number=1, after=False, when=lambda *args: True):
    """The number-th call of owner.name for which `when` holds kills, before or after it did its work."""
    real, calls = getattr(owner, name), iter(range(1, 10**6))

    def deadly(*args, **kwargs):
        last = when(*args) and next(calls) == number
        if last and not after:
            raise Killed
        result = real(*args, **kwargs)
        if last:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, deadly)


MOMENTS = {
    "before its first byte is safe": lambda m: die_on(m, common.files, "sync", 2, when=named("state.pt", 0)),
    "between a checkpoint and its checksum":
        lambda m: die_on(m, common.files, "sync", 2, when=named("*.sha256", 0)),
    "before the rename": lambda m: die_on(m, os, "rename", 2, when=named("step_*", 1)),
    "after the rename": lambda m: die_on(m, os, "rename", 3, after=True, when=named("step_*", 1)),
    "while an old one is dropped": lambda m: die_on(m, shutil, "rmtree", 2, when=named(".step_*.dropped", 0)),
    "before the first checkpoint": lambda m: die_on(m, trainer.checkpoint, "save_checkpoint"),
    "after the last checkpoint": lambda m: die_on(m, trainer.loop.Tracker, "finish"),
    "before the weights are saved": lambda m: die_on(m, __import__("model.weights").weights, "save_model"),
    "before the checkpoints are dropped": lambda m: die_on(m, trainer.stage, "drop_checkpoints"),
}


def named(pattern, place):
    """Whether the path at that place of a call's arguments has such a name."""
    return lambda *args: fnmatch(os.path.basename(args[place]), pattern)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_the_worst_moment(moment, workshop, finished, read_log, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        MOMENTS[moment](patch)
        workshop.run("pretrain", *workshop.flags("pretrain", tmp_path))
    ended = workshop.run("pretrain", *workshop.flags("pretrain", tmp_path), "--resume")
    assert ended.code == 0
    assert_same_run(tmp_path / "pretrain", finished["pretrain"][0], read_log)


def test_training_anew_forgets_the_run_before(workshop, finished, read_log, tmp_path):
    """Another seed, killed late; then anew with ours, killed early: nothing of the first may come back."""
    for changes, number in (({"seed": 7}, 4), ({"overwrite": True}, 1)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            die_on(patch, trainer.checkpoint, "save_checkpoint", number)
            workshop.run("pretrain", *workshop.flags("pretrain", tmp_path, **changes))
    ended = workshop.run("pretrain", *workshop.flags("pretrain", tmp_path), "--resume")
    assert ended.code == 0 and "resumed" not in ended.out
    assert_same_run(tmp_path / "pretrain", finished["pretrain"][0], read_log)


def test_a_finished_run_stays_until_the_new_one_is_done(workshop, finished, tmp_path):
    shutil.copytree(finished["pretrain"][0], tmp_path / "pretrain")
    before = (tmp_path / "pretrain" / "model.safetensors").read_bytes()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_on(patch, trainer.checkpoint, "save_checkpoint", 1)
        workshop.run("pretrain", *workshop.flags("pretrain", tmp_path, seed=7))
    assert (tmp_path / "pretrain" / "model.safetensors").read_bytes() == before
    ended = workshop.run("pretrain", *workshop.flags("pretrain", tmp_path, seed=7), "--resume")
    assert ended.code == 0 and "finished already" not in ended.out  # the folder holds an older, finished run
    assert (tmp_path / "pretrain" / "model.safetensors").read_bytes() != before


def test_resuming_a_finished_run_leaves_it_alone(workshop, finished):
    folder, _ = finished["full_sft"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    ended = workshop.run("full_sft", *workshop.flags("full_sft", folder.parent), "--resume")
    assert ended.code == 0 and "finished already" in ended.out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_float16_run_resumes_with_its_scaler(workshop, read_log, tmp_path):
    # 2^27: the first batches overflow, so that more batches are drawn than steps are taken
    real = torch.amp.GradScaler
    flags = {"dtype": "float16", "max_steps": 5, "save_interval": 2, "eval_fraction": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp, "GradScaler", lambda *a, **k: real(*a, **k, init_scale=2.0**27))
        whole = workshop.run("pretrain", *workshop.flags("pretrain", tmp_path / "whole", **flags))
        assert whole.code == 0
        die_on(patch, trainer.checkpoint, "save_checkpoint", 2)
        with pytest.raises(Killed):
            workshop.run("pretrain", *workshop.flags("pretrain", tmp_path / "cut", **flags))
    state = torch.load(checkpoints(tmp_path / "cut" / "pretrain")[-1] / "state.pt", weights_only=True)
    assert state["batch"] > state["step"] == 2
    ended = workshop.run("pretrain", *workshop.flags("pretrain", tmp_path / "cut", **flags), "--resume")
    assert ended.code == 0 and "resumed at step 2" in ended.out
    assert_same_run(tmp_path / "cut" / "pretrain", tmp_path / "whole" / "pretrain", read_log)


# --- what a resumed run is told ----------------------------------------------------------------------------


@pytest.mark.parametrize("changes, named", [({"seed": 7}, "--seed 42, not 7"),
                                            ({"batch_size": 8}, "--batch_size 4, not 8"),
                                            ({"max_steps": 25}, "--max_steps 24, not 25")])
def test_resume_with_another_result_is_refused(changes, named, workshop, interrupted):
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    ended = workshop.run("pretrain", *workshop.flags("pretrain", interrupted.parent, **changes), "--resume")
    assert ended.code == 2 and named in ended.error
    assert {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()} == before


def test_resume_with_other_habits_is_fine(workshop, finished, interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path / "pretrain")
    changes = {"log_interval": 3, "save_interval": 50, "keep_last": 1, "num_workers": 1, "max_minutes": 60}
    ended = workshop.run("pretrain", *workshop.flags("pretrain", tmp_path, **changes), "--resume")
    assert ended.code == 0 and "resumed at step 10" in ended.out
    ours, theirs = tensors(tmp_path / "pretrain"), tensors(finished["pretrain"][0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def interrupted(workshop):
    """A pretraining run cut off when it was to write its third checkpoint."""
    out_dir = workshop.folder / "interrupted"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_on(patch, trainer.checkpoint, "save_checkpoint", 3)
        workshop.run("pretrain", *workshop.flags("pretrain", out_dir))
    return out_dir / "pretrain"


def test_resume_on_other_data_or_weights_is_refused_and_names_them(workshop, tmp_path):
    data, base = tmp_path / "chats.jsonl", tmp_path / "base"
    shutil.copy(workshop.chats, data)
    shutil.copytree(workshop.base, base)
    changes = {"data_path": data, "load_from": base, "max_steps": 4, "save_interval": 2}
    flags = workshop.flags("lora", tmp_path / "out", **changes)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_on(patch, trainer.checkpoint, "save_checkpoint", 2)
        workshop.run("lora", *flags)
    text = data.read_text(encoding="utf-8")
    data.write_text(text.replace("owl", "cat", 1), encoding="utf-8")  # as many samples and tokens as before
    line = workshop.run("lora", *flags, "--resume").error
    assert "this run began with training data of 41 samples of" in line and "sha256" in line
    data.write_text(text.split("\n", 1)[1], encoding="utf-8")
    assert ", not 40 samples of" in workshop.run("lora", *flags, "--resume").error
    data.write_text(text, encoding="utf-8")  # another time, but the same words
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][5] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert "began with weights in --load_from of sha256" in workshop.run("lora", *flags, "--resume").error
    weights["model.norm.weight"][5] = 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    ended = workshop.run("lora", *flags, "--resume")
    assert ended.code == 0 and "resumed at step 2" in ended.out


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not in this build")
def test_resume_on_two_processes_goes_on_with_the_same_batches(workshop, read_log, tmp_path):
    flags = {"optimizer": "adamw", "learning_rate": 1e-3, "max_steps": 12, "log_interval": 1}
    assert workshop.run("full_sft", *workshop.flags("full_sft", tmp_path / "one", **flags)).code == 0
    words = workshop.flags("full_sft", tmp_path / "two", **flags)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_on(patch, trainer.checkpoint, "save_checkpoint", 2)
        workshop.run("full_sft", *words)
    process = forks.start(workshop.command("full_sft", *words, "--resume"), processes=2)
    out, err = process.communicate()
    assert process.returncode == 0 and "cpu x 2, resumed at step 5" in out, err
    one, two = tmp_path / "one" / "full_sft", tmp_path / "two" / "full_sft"
    for ours, theirs in zip(read_log(two), read_log(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for name, tensor in tensors(one).items():
        torch.testing.assert_close(tensors(two)[name], tensor, atol=1e-5, rtol=0, msg=name)


def test_a_run_that_was_moved_goes_on(workshop, finished, interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path / "renamed")
    data = tmp_path / "moved.jsonl"
    shutil.copy(workshop.texts, data)
    flags = workshop.flags("pretrain", tmp_path, name="renamed", data_path=data)
    ended = workshop.run("pretrain", *flags, "--resume")
    assert ended.code == 0 and "resumed at step 10" in ended.out
    ours, theirs = tensors(tmp_path / "renamed"), tensors(finished["pretrain"][0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_places_may_change_but_not_whether_there_are_any(tmp_path):
    now = {"--data_path": "['a']", "--eval_data_path": "None"}
    save_checkpoint(tmp_path, 1, {"version": VERSION, "settings": now}, keep_last=1)
    assert load_checkpoint(tmp_path, now | {"--data_path": "['b']"})
    with pytest.raises(UsageError, match="began with --eval_data_path None, not"):
        load_checkpoint(tmp_path, now | {"--eval_data_path": "['a']"})


@pytest.mark.parametrize("state", [{"step": 1, "settings": {}}, {"step": 1}, [1, 2]])
def test_a_checkpoint_of_another_version_is_refused(state, tmp_path):
    save_checkpoint(tmp_path, 1, state, keep_last=1)
    with pytest.raises(UsageError, match="another version of this code wrote the checkpoint"):
        restore(load_checkpoint(tmp_path, {}), torch.nn.Linear(1, 1), [], None, tmp_path, None)


def test_an_unfinished_run_is_not_dropped_by_mistake(workshop, interrupted):
    before = {path: path.stat().st_mtime_ns for path in interrupted.rglob("*")}
    line = workshop.run("pretrain", *workshop.flags("pretrain", interrupted.parent)).error
    assert "holds an unfinished run (step_00000010)" in line and "--resume" in line and "--overwrite" in line
    assert {path: path.stat().st_mtime_ns for path in interrupted.rglob("*")} == before


# --- damaged files and full disks --------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_passed_over(workshop, finished, interrupted, read_log, tmp_path):
    shutil.copytree(interrupted, tmp_path / "pretrain")
    old, new = checkpoints(tmp_path / "pretrain")
    flip(new / "state.pt")
    ended = workshop.run("pretrain", *workshop.flags("pretrain", tmp_path), "--resume")
    assert ended.code == 0 and "resumed at step 5" in ended.out
    (line,) = [line for line in ended.err.splitlines() if "damaged" in line]
    assert line.startswith(f"warning: {new} is damaged (its checksum")
    assert_same_run(tmp_path / "pretrain", finished["pretrain"][0], read_log)  # step 10 was saved over it


def test_any_damage_is_noticed(tmp_path, capsys):
    def state(step):
        return {"step": step, "version": VERSION, "settings": {}, "parameters": {"w": torch.arange(64.0)}}

    def cut(path):
        path.write_bytes(path.read_bytes()[:-1])

    def other_digits(path):
        path.write_text("0" * 64 + "  state.pt\n", encoding="ascii")

    ways = [(other_digits, "state.pt.sha256"), (cut, "state.pt"), (os.unlink, "state.pt"),
            (os.unlink, "state.pt.sha256"), *[(flip, "state.pt")] * 30]
    save_checkpoint(tmp_path, 1, state(1), keep_last=9)
    for way, name in ways:
        newest = save_checkpoint(tmp_path, 2, state(2), keep_last=9)  # over the damaged one, too
        assert load_checkpoint(tmp_path, {})["step"] == 2 and capsys.readouterr().err == ""
        way(newest / name)
        assert load_checkpoint(tmp_path, {})["step"] == 1
        assert capsys.readouterr().err.count(str(newest)) == 1
    flip(tmp_path / "checkpoints" / "step_00000001" / "state.pt")
    with pytest.raises(UsageError, match="every checkpoint is damaged: .*step_00000001, .*step_00000002; "):
        load_checkpoint(tmp_path, {})


def test_sha256sum_reads_the_checksum(tmp_path):
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum here")
    folder = save_checkpoint(tmp_path, 1, {"step": 1}, keep_last=1)
    said = subprocess.run(["sha256sum", "-c", "state.pt.sha256"], cwd=folder, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout == "state.pt: OK\n"


def test_a_whole_checkpoint_is_never_taken_away_for_its_like(tmp_path):
    save_checkpoint(tmp_path, 1, {"version": VERSION, "step": 1, "settings": {}}, keep_last=1)
    inode = (tmp_path / "checkpoints" / "step_00000001" / "state.pt").stat().st_ino
    save_checkpoint(tmp_path, 1, {"version": VERSION, "step": 1, "settings": {}}, keep_last=1)
    assert (tmp_path / "checkpoints" / "step_00000001" / "state.pt").stat().st_ino == inode
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000001"]


@pytest.fixture
def file_limit():
    """`file_limit(size)`: from here on no file can grow beyond that, as on a full disk; None: no limit."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)


def limited(monkeypatch, owner, name, file_limit, size, number=1):
    """From the number-th call of owner.name on the disk is full."""
    real, calls = getattr(owner, name), iter(range(1, 10**6))

    def call(*args, **kwargs):
        if next(calls) == number:
            file_limit(size)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


# The state of the pretraining run takes 2 MB, its model 1 MB.
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk(policy, workshop, finished, read_log, tmp_path, file_limit):
    flags = workshop.flags("pretrain", tmp_path, on_full_disk=policy)
    with pytest.MonkeyPatch.context() as patch:
        limited(patch, trainer.checkpoint, "save_checkpoint", file_limit, 1_200_000, number=3)
        ended = workshop.run("pretrain", *flags)
        file_limit(None)
    last = tmp_path / "pretrain" / "checkpoints" / "step_00000010"
    says = "the checkpoint of step 15 can't be written (File too large): it takes "
    assert says in ended.out and f"MB are free; the last good checkpoint is {last}" in ended.out
    if policy == "stop":
        assert ended.code == 1 and says in ended.error and ended.error.endswith("--resume")
        left = set(os.listdir(last.parent)) - {".lock"}
        assert left == {"step_00000005", "step_00000010"}  # no temporary one
        assert workshop.run("pretrain", *flags, "--resume").code == 0
    assert ended.code == (policy == "stop")
    assert_same_run(tmp_path / "pretrain", finished["pretrain"][0], read_log)


@pytest.mark.parametrize("stage, size", [("pretrain", 500_000), ("lora", 4_000)])
def test_a_disk_too_full_for_the_result(stage, size, workshop, finished, read_log, tmp_path, file_limit):
    with pytest.MonkeyPatch.context() as patch:
        limited(patch, trainer.loop.Tracker, "finish", file_limit, size)
        ended = workshop.run(stage, *workshop.flags(stage, tmp_path))
        file_limit(None)
    assert ended.code == 1 and "the result can't be written" in ended.error
    assert ended.error.endswith("--resume")
    assert steps(tmp_path / stage) == [20, 24]
    ended = workshop.run(stage, *workshop.flags(stage, tmp_path), "--resume")
    assert ended.code == 0 and "resumed at step 24" in ended.out
    assert_same_run(tmp_path / stage, finished[stage][0], read_log)


def test_a_disk_too_full_for_the_token_cache(workshop, tmp_path, file_limit):
    flags = workshop.flags("pretrain", tmp_path, max_seq_len=61)  # what no other test has put into the cache
    file_limit(100)
    ended = workshop.run("pretrain", *flags)
    file_limit(None)
    assert ended.code == 1 and "cannot write the token cache" in ended.error
    assert "File too large" in ended.error


def test_a_disk_too_full_for_the_log(tmp_path, file_limit, capsys):
    tracker = Tracker(tmp_path, ALONE, Progress(), 8)
    tracker.log({"step": 1, "loss": 2.0})
    file_limit((tmp_path / "metrics.jsonl").stat().st_size + 9)
    tracker.log({"step": 2, "loss": 1.0})
    tracker.log({"step": 3, "loss": 0.5})
    tracker.finish()
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1]  # and no half line
    file_limit(None)
    assert "metrics.jsonl can't be written (File too large)" in capsys.readouterr().err
    tracker.log({"step": 4, "loss": 0.4})
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_log_that_somebody_removed_or_wrote_into(tmp_path, capsys):
    tracker = Tracker(tmp_path / "run", ALONE, Progress(), 8)
    tracker.path.unlink()
    tracker.sync()
    tracker.log({"step": 1})
    assert read_metrics(tracker.path) == [{"step": 1}]
    with tracker.path.open("ab") as file:
        file.write(b'[1]\n{"note": 1}\n"step"\n\xff\x00\n')
    tracker.log({"step": 2})
    assert read_metrics(tracker.path) == [{"step": 1}, {"step": 2}]
    shutil.rmtree(tmp_path / "run")
    tracker.log({"step": 3})
    assert "metrics.jsonl can't be written" in capsys.readouterr().err


def test_a_terminal_that_went_away_ends_no_run(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", open(writing, "w", encoding="utf-8"))
    Tracker(tmp_path, ALONE, Progress(), 8).say("who hears?")
    print("and who this?", flush=True)


def test_a_resumed_log_is_never_half_there(tmp_path, monkeypatch):
    lines = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 9))
    (tmp_path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    die_on(monkeypatch, os, "replace")
    with pytest.raises(Killed):
        Tracker(tmp_path, ALONE, Progress(step=4), 8)
    monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == lines
    Tracker(tmp_path, ALONE, Progress(step=4), 8)
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


# --- the folder of checkpoints -----------------------------------------------------------------------------


def steps(run_dir):
    return [int(path.name.removeprefix("step_")) for path in checkpoints(run_dir)]


def test_keep_last_and_order(tmp_path):
    for step in (5, 99, 100, 123456789, 1000):
        save_checkpoint(tmp_path, step, {"version": VERSION, "step": step, "settings": {}}, keep_last=10)
    assert load_checkpoint(tmp_path, {})["step"] == 123456789
    begin_anew(tmp_path)
    assert load_checkpoint(tmp_path, {}) is None
    for step in range(1, 8):
        save_checkpoint(tmp_path, step, {"version": VERSION, "step": step, "settings": {}}, keep_last=3)
        assert steps(tmp_path) == list(range(max(1, step - 2), step + 1))


@pytest.mark.skipif(os.name != "posix", reason="nothing is locked on Windows")
def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    code = "import sys; from trainer.checkpoint import Path, lock_folder; lock_folder(Path(sys.argv[1]))"

    def other():
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    lock = lock_folder(tmp_path)
    begin_anew(tmp_path)  # the lock outlives what it drops
    assert "another process trains there" in other().stderr
    lock.close()
    assert other().returncode == 0


def test_half_written_checkpoints_are_ignored_and_then_overwritten(tmp_path):
    save_checkpoint(tmp_path, 5, {"version": VERSION, "step": 5, "settings": {}}, keep_last=2)
    for name in (".step_00000006.writing", "step_00000007.writing", "step_"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "state.pt").write_bytes(b"half a")
    assert steps(tmp_path) == [5]
    assert load_checkpoint(tmp_path, {})["step"] == 5
    save_checkpoint(tmp_path, 6, {"version": VERSION, "step": 6, "settings": {}}, keep_last=2)
    assert load_checkpoint(tmp_path, {})["step"] == 6
    assert not (tmp_path / "checkpoints" / ".step_00000006.writing").exists()


def test_lora_checkpoint_holds_the_adapters_alone(workshop, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_on(patch, trainer.checkpoint, "save_checkpoint", 2)
        workshop.run("lora", *workshop.flags("lora", tmp_path))
    (checkpoint,) = checkpoints(tmp_path / "lora")
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert state["parameters"] and all(".lora." in name for name in state["parameters"])
    assert all(tensor.dtype == torch.float32 for tensor in state["parameters"].values())
    (optimizer,) = state["optimizers"]
    assert len(optimizer["state"]) == len(state["parameters"])
    shapes = sorted(tuple(moments["exp_avg"].shape) for moments in optimizer["state"].values())
    assert shapes == sorted(tuple(tensor.shape) for tensor in state["parameters"].values())


@pytest.mark.parametrize(("chosen", "expected", "says"), [(None, 3, ""), ("1", 1, "the last bits")])
def test_a_run_goes_on_with_its_number_of_threads(chosen, expected, says, monkeypatch, capsys):
    now = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    try:
        torch.set_num_threads(1)
        trainer.checkpoint.keep_number_of_threads(3, ALONE)
        assert torch.get_num_threads() == expected
        assert (says in capsys.readouterr().out) if says else not capsys.readouterr().out
    finally:
        torch.set_num_threads(now)
