"""Faults on purpose: runs are killed, disks fill up, ranks and hosts die; what was promised must hold.

    python scripts/bench_faults.py                             # everything: about half an hour of one core
    python scripts/bench_faults.py --only kills --trials 30    # kills, saves, shards, processes, ranks, hosts
    python scripts/bench_faults.py --json faults.json          # the table as JSON too

A run is a tiny model's 24 steps with a checkpoint every third. Training scripts run unchanged, each in a fork
of this process, where torch is imported already: a run takes a second, so that hundreds can be killed.
Full and read-only disks are mounted in a user namespace of our own (`unshare -rm`), hosts are network
namespaces; where the system allows neither, those rows say so and are not counted. Exit code 1: a promise
was broken.
"""

import contextlib
import json
import math
import mmap
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: threads do not survive a fork

STAGES = ("pretrain", "full_sft", "lora")
HANG = 600  # seconds after which a run that should have ended counts as hanging
CUT = {"parallel": "fsdp"}  # on two processes
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


class Bench:
    """The folder of all runs, their data, and the rows of the table so far."""

    def __init__(self, folder: Path, trials: int, seed: int):
        self.folder, self.trials, self.rng, self.rows = folder, trials, random.Random(seed), []
        self.references, self.number = {}, 0
        rng = random.Random(0)
        words = "the cat sat on a warm stone and the small owl sang 小 猫 在 河 边 睡 觉 of rivers".split()

        def phrase(shortest, longest):
            return " ".join(rng.choices(words, k=rng.randint(shortest, longest)))

        def chat():
            turns = [(r, phrase(1, 14)) for _ in range(rng.choice((1, 1, 2))) for r in ("user", "assistant")]
            return {"conversations": [{"role": role, "content": text} for role, text in turns]}

        self.texts, self.chats = folder / "texts.jsonl", folder / "chats.jsonl"
        self.texts.write_text("".join(json.dumps({"text": phrase(3, 40)}) + "\n" for _ in range(45)))
        self.chats.write_text("".join(json.dumps(chat()) + "\n" for _ in range(41)))

    def add(self, promise: str, tried: int, kept: int, note: str = "") -> None:
        self.rows.append({"promise": promise, "tried": tried, "kept": kept, "note": note})
        print(f"{'ok ' if kept == tried else 'BAD'} {promise}: {kept} of {tried}  {note}", flush=True)

    def skip(self, promise: str, reason: str) -> None:
        self.add(promise, 0, 0, f"not tried: {reason}")

    def fresh(self) -> Path:
        """A new --out_dir; the token cache of its runs lies in it too."""
        self.number += 1
        folder = self.folder / f"run{self.number}"
        folder.mkdir()
        return folder

    def flags(self, stage: str, out_dir: Path, **changes) -> list[str]:
        """A short run that logs, validates and saves often, at intervals out of step."""
        flags = {"data_path": self.texts if stage == "pretrain" else self.chats, "out_dir": out_dir,
                 "name": stage, "max_seq_len": 64, "batch_size": 4, "device": "cpu", "dtype": "float32",
                 "eval_fraction": 0.2, "max_steps": 24, "log_interval": 4, "save_interval": 3,
                 "eval_interval": 9, "learning_rate": 0.01}
        if stage == "pretrain":
            flags |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
        else:
            flags |= {"load_from": self.reference("pretrain") / "pretrain"}
        if stage == "lora":
            flags |= {"lora_rank": 4, "lora_dropout": 0.1}
        words = []
        for name, value in (flags | changes).items():
            if value is not None:
                words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return words

    def reference(self, stage: str, **changes) -> Path:
        """The --out_dir of an undisturbed run."""
        key = (stage, *changes.items())
        if key not in self.references:
            out_dir = self.fresh()
            code, text = run(stage, self.flags(stage, out_dir, **changes), out_dir)
            assert code == 0, text
            self.references[key] = out_dir
        return self.references[key]


# --- runs that can be harmed -------------------------------------------------------------------------------


def log_of(out_dir: Path, rank: int = 0) -> Path:
    """What a run said; beside the folder, which may be read-only."""
    return out_dir.with_name(f"{out_dir.name}.log{rank}")


def start(stage: str, flags: list[str], out_dir: Path, prepare=None, rank: int = 0) -> int:
    """`python trainer/train_STAGE.py FLAGS` in a fork, after `prepare()`; returns its process id."""
    script = str(ROOT / "trainer" / f"train_{stage}.py")
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(log_of(out_dir, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import dataset.lm_dataset

        dataset.lm_dataset.CACHE_DIR = out_dir / "cache"
        sys.argv = [script, *flags]
        if prepare:
            prepare()
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code or 0)


def wait(pid: int, seconds: float = HANG) -> int | None:
    """The exit code, negative for a signal; None for one that still runs after so long."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def run(stage: str, flags: list[str], out_dir: Path, prepare=None) -> tuple[int | None, str]:
    """Exit code (None: it hung and was killed) and everything it said. With fsdp on two processes."""
    if "fsdp" in flags:
        return end_together(start_ranks(stage, flags, out_dir, 2, prepare), out_dir)
    pid = start(stage, flags, out_dir, prepare)
    code = wait(pid)
    if code is None:
        kill(pid)
    return code, log_of(out_dir).read_text(encoding="utf-8", errors="replace")


def weights_file(run_dir: Path) -> Path:
    (path,) = run_dir.glob("*model.safetensors")
    return path


def contents(path: Path) -> tuple[dict, bytes]:
    """Header and numbers of a safetensors file, which has the header's metadata in no certain order."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def metrics(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what the clock decides."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_second")}
            for line in lines]


def difference(run_dir: Path, reference: Path) -> str:
    """What tells a finished run from the undisturbed one; empty where nothing does."""
    if contents(weights_file(run_dir)) != contents(weights_file(reference)):
        return "other weights"
    if metrics(run_dir) != metrics(reference):
        return "another metrics.jsonl"
    if (run_dir / "checkpoints").exists():
        return "checkpoints left behind"
    if left := [p.name for folder in (run_dir, run_dir.parent) for p in folder.glob(".*")]:
        return f"left behind: {left}"
    return ""


def damaged(run_dir: Path) -> str:
    """The first checkpoint that counts as finished and can't be loaded; empty where all can."""
    import torch

    from trainer.checkpoint import checkpoints, damage

    for folder in checkpoints(run_dir):
        if reason := damage(folder):
            return f"{folder.name}: {reason}"
        try:
            state = torch.load(folder / "state.pt", weights_only=True)
            if state["step"] != int(folder.name.removeprefix("step_")):
                return f"{folder.name} holds step {state['step']}"
        except Exception as error:
            return f"{folder.name}: {type(error).__name__}"
    return ""


def lost(run_dir: Path) -> str:
    """A checkpoint that must have been complete, by the steps that were logged, and is not there; or ''."""
    log = run_dir / "metrics.jsonl"
    steps = [int(step) for step in re.findall(r'"step": (\d+)', log.read_text())] if log.exists() else []
    due = (max(steps, default=0) - 1) // 3 * 3  # every third step is saved; after it was logged, if it is
    if due < 3 or weights_done(run_dir) or max(checkpoint_names(run_dir), default="") >= f"step_{due:08}":
        return ""
    return f"step {due}"


def resumed(bench: Bench, stage: str, out_dir: Path, **changes) -> str:
    """Checks what a fault left, resumes, compares with the undisturbed run; returns what is wrong, or ''."""
    if problem := damaged(out_dir / stage):
        return f"damaged checkpoint: {problem}"
    if problem := lost(out_dir / stage):
        return f"lost checkpoint: {problem}"
    code, text = run(stage, [*bench.flags(stage, out_dir, **changes), "--resume"], out_dir)
    if code != 0:
        return f"--resume ended with {code}: {text[-300:]}"
    if damaged_words := re.findall(r".*damaged.*", text):
        return damaged_words[0]
    return difference(out_dir / stage, bench.reference(stage, **changes) / stage)


def report(bench: Bench, promise: str, outcomes: list[str], note: str = "") -> None:
    """One row; `outcomes` are what is wrong with each trial, '' where nothing is."""
    wrong = [outcome for outcome in outcomes if outcome]
    bench.add(promise, len(outcomes), len(outcomes) - len(wrong), "; ".join([note] * bool(note) + wrong[:3]))


# --- killed at random moments ------------------------------------------------------------------------------


def kills(bench: Bench) -> None:
    variants = [(stage, {}) for stage in STAGES]
    variants.append(("pretrain", {"dtype": "float16", "optimizer": "adamw"}))  # with a GradScaler's state
    for stage, changes in variants:
        began = time.monotonic()
        out_dir = bench.fresh()
        run(stage, bench.flags(stage, out_dir, **changes), out_dir)
        duration = time.monotonic() - began
        bench.reference(stage, **changes)
        outcomes, number, early, late = [], 0, 0, 0
        while len(outcomes) < bench.trials:
            out_dir = bench.fresh()
            flags = [*bench.flags(stage, out_dir, **changes), "--resume"]  # which a first start may carry too
            for _ in range(bench.rng.choice((1, 1, 2, 3))):  # some are killed again while they go on
                pid = start(stage, flags, out_dir)
                if wait(pid, bench.rng.uniform(0, duration)) is not None:
                    break  # it was faster than we
                kill(pid)
                number += 1
                early += not (out_dir / stage / "checkpoints").is_dir()
                late += weights_done(out_dir / stage)
            else:
                outcomes.append(resumed(bench, stage, out_dir, **changes))
            shutil.rmtree(out_dir)
        name = " ".join([stage, *changes.values()])
        report(bench, f"SIGKILL at a random moment, then --resume: the same bits ({name})", outcomes,
               f"{number} kills, {early} before training began, {late} after the weights were saved")


def weights_done(run_dir: Path) -> bool:
    return any(run_dir.glob("*model.safetensors"))


# --- faults while saving -----------------------------------------------------------------------------------


def at_file_event(folder: Path, act, wanted=None):
    """For `prepare`: calls act(n) before the n-th operation on a file below `folder`, from 1 on.

    Python announces what it does to files to audit hooks, so nothing of the code under test is replaced.
    os.fsync alone is not announced. `wanted(event, path)` picks some of the events.
    """
    def prepare():
        count, folder_name, fsync = 0, str(folder), os.fsync

        def seen(event, path):
            nonlocal count
            if wanted is None or wanted(event, path):
                count += 1
                act(count)

        def hook(event, arguments):
            if event in FILE_EVENTS and isinstance(arguments[0], (str, bytes, os.PathLike)):
                path = os.fsdecode(arguments[0])
                if path.startswith(folder_name) or not os.path.isabs(path):  # relative: to a descriptor
                    seen(event, path)

        def announced_fsync(descriptor):
            seen("fsync", "")
            return fsync(descriptor)

        os.fsync = announced_fsync
        sys.addaudithook(hook)

    return prepare


def begins_save(event: str, path: str) -> bool:
    return event == "os.mkdir" and "/checkpoints/" in path


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def saves(bench: Bench) -> None:
    kill_at_file_operations(bench)
    kill_within_writes(bench)
    refuse_large_files(bench)
    fill_the_disk(bench)
    make_read_only(bench)
    slow_the_disk(bench)


def kill_at_file_operations(bench: Bench) -> None:
    for stage in ("pretrain", "lora"):
        out_dir, counter = bench.fresh(), mmap.mmap(-1, 8)  # shared with the fork
        count = at_file_event(out_dir / stage, lambda n, to=counter: struct.pack_into("q", to, 0, n))
        run(stage, bench.flags(stage, out_dir), out_dir, count)
        (operations,) = struct.unpack("q", counter)
        outcomes = []
        for moment in sorted(bench.rng.sample(range(1, operations + 1), min(operations, bench.trials))):
            out_dir = bench.fresh()
            prepare = at_file_event(out_dir / stage, lambda n, moment=moment: n == moment and die())
            code, text = run(stage, bench.flags(stage, out_dir), out_dir, prepare)
            outcomes.append(f"ended with {code}: {text[-300:]}" if code != -signal.SIGKILL
                            else resumed(bench, stage, out_dir))
            shutil.rmtree(out_dir)
        report(bench, f"SIGKILL just before a file operation ({stage})", outcomes,
               f"of the {operations} operations in its folder, drawn at random")


def kill_within_writes(bench: Bench) -> None:
    """The kernel itself kills the process (SIGXFSZ) as it writes past byte n of its checkpoint."""
    size, outcomes = checkpoint_size(bench), []
    for _ in range(math.ceil(bench.trials / 3)):
        out_dir, save, limit = bench.fresh(), bench.rng.randint(1, 8), bench.rng.randrange(size)

        def lower(n, save=save, limit=limit):
            if n == save:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores
                limit_file_size(limit)

        prepare = at_file_event(out_dir / "pretrain", lower, begins_save)
        code, text = run("pretrain", bench.flags("pretrain", out_dir), out_dir, prepare)
        outcomes.append(f"ended with {code}: {text[-300:]}" if code != -signal.SIGXFSZ
                        else resumed(bench, "pretrain", out_dir))
        shutil.rmtree(out_dir)
    report(bench, "killed by the kernel in the middle of writing a checkpoint", outcomes)


def limit_file_size(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def checkpoint_size(bench: Bench) -> int:
    """Bytes of the pretraining run's largest file in a checkpoint."""
    out_dir = bench.fresh()
    prepare = at_file_event(out_dir / "pretrain", lambda n: n == 3 and die(), begins_save)
    run("pretrain", bench.flags("pretrain", out_dir), out_dir, prepare)
    return max(p.stat().st_size for p in (out_dir / "pretrain" / "checkpoints").glob("step_*/*"))


def refused(bench: Bench, out_dir: Path, begin, end, on_full_disk: str) -> str:
    """A run from whose n-th save on (begin) its disk takes no more, until (end) it does again.

    With --on_full_disk stop: it must end with code 1 and one line, and go on from the checkpoint before. With
    continue: it must carry on and come to the same end. Returns what is wrong, or ''.
    """
    save = bench.rng.randint(1, 7)

    def act(n):
        if n == save:
            begin()
        elif n == save + 1:  # an event later: `continue` alone comes so far
            end()

    flags = [*bench.flags("pretrain", out_dir), "--on_full_disk", on_full_disk]
    prepare = at_file_event(out_dir / "pretrain", act, begins_save)
    code, text = run("pretrain", flags, out_dir, prepare)
    end()
    if "Traceback" in text or code != (0 if on_full_disk == "continue" else 1):
        return f"save {save}, {on_full_disk}: ended with {code}: {text[-300:]}"
    if code == 0:
        return difference(out_dir / "pretrain", bench.reference("pretrain") / "pretrain")
    if text.count("error:") != 1 or (save > 1 and not checkpoint_names(out_dir / "pretrain")):
        return f"save {save}: {checkpoint_names(out_dir)}, {text[-300:]}"
    return resumed(bench, "pretrain", out_dir)


def checkpoint_names(run_dir: Path) -> list[str]:
    from trainer.checkpoint import checkpoints

    return [folder.name for folder in checkpoints(run_dir)]


def refuse_large_files(bench: Bench) -> None:
    size = checkpoint_size(bench)
    for policy in ("stop", "continue"):
        outcomes = []
        for _ in range(math.ceil(bench.trials / 3)):
            out_dir, limit = bench.fresh(), bench.rng.randrange(8192, size)
            outcomes.append(refused(bench, out_dir, lambda limit=limit: limit_file_size(limit),
                                    lambda: limit_file_size(resource.RLIM_INFINITY), policy))
            shutil.rmtree(out_dir)
        report(bench, f"a file size limit (EFBIG), --on_full_disk {policy}", outcomes)


def fill_the_disk(bench: Bench) -> None:
    size = checkpoint_size(bench)
    for policy in ("stop", "continue"):
        promise = f"a full disk (ENOSPC, tmpfs), --on_full_disk {policy}"
        if reason := no_mounts():
            bench.skip(promise, reason)
            continue
        outcomes = []
        for _ in range(math.ceil(bench.trials / 3)):
            out_dir, free = bench.fresh(), bench.rng.randrange(size)
            with mounted("-t", "tmpfs", "-o", f"size={8 * size}", "tmpfs", out_dir):
                filler = out_dir / "filler"

                def fill(filler=filler, free=free):
                    disk = os.statvfs(filler.parent)
                    with open(filler, "wb") as file:
                        os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - free))

                def empty(filler=filler):
                    filler.unlink(missing_ok=True)

                outcomes.append(refused(bench, out_dir, fill, empty, policy))
            shutil.rmtree(out_dir)
        report(bench, promise, outcomes)


def make_read_only(bench: Bench) -> None:
    promise = "a disk that turns read-only (EROFS), --on_full_disk stop"
    if reason := no_mounts():
        return bench.skip(promise, reason)
    import trainer.loop

    outcomes = []
    for _ in range(math.ceil(bench.trials / 3)):
        out_dir = bench.fresh()
        # The run's open lock would keep the mount from turning read-only; a failing disk asks nobody.
        with mounted("--bind", out_dir, out_dir), mock.patch.object(trainer.loop, "hold"):

            def remount(mode, out_dir=out_dir):
                subprocess.run(["mount", "-o", f"remount,bind,{mode}", out_dir], check=True)

            outcomes.append(refused(bench, out_dir, partial(remount, "ro"), partial(remount, "rw"), "stop"))
        shutil.rmtree(out_dir)
    report(bench, promise, outcomes)


def slow_the_disk(bench: Bench) -> None:
    """Each operation on a file takes 20 ms, fsync 0.2 s: nearly all the time is spent within saves."""
    outcomes = []
    for _ in range(math.ceil(bench.trials / 3)):
        out_dir = bench.fresh()

        def prepare(out_dir=out_dir):
            at_file_event(out_dir / "pretrain", lambda n: time.sleep(0.02))()
            fsync = os.fsync
            os.fsync = lambda descriptor: (time.sleep(0.2), fsync(descriptor))[1]

        pid = start("pretrain", bench.flags("pretrain", out_dir), out_dir, prepare)
        outcome = ""
        if wait(pid, bench.rng.uniform(0.5, 5)) is None:
            kill(pid)
            outcome = resumed(bench, "pretrain", out_dir)
        outcomes.append(outcome)
        shutil.rmtree(out_dir)
    report(bench, "SIGKILL at a random moment on a slow disk", outcomes)


def no_mounts() -> str:
    """Why nothing can be mounted here; empty where it can."""
    return "" if os.environ.get("FAULTS_NAMESPACE") else "user namespaces (unshare -rm) are not permitted"


@contextlib.contextmanager
def mounted(*words):
    subprocess.run(["mount", *words], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", words[-1]], check=True)


# --- sharded checkpoints -----------------------------------------------------------------------------------


def shards(bench: Bench) -> None:
    """--parallel fsdp on two processes: one is killed, or both, before a file operation or at any moment."""
    for stage in ("pretrain", "lora")[:bench.trials]:
        out_dir, counter = bench.fresh(), mmap.mmap(-1, 16)

        def count(n, to=counter):
            struct.pack_into("q", to, 8 * int(os.environ["RANK"]), n)

        began = time.monotonic()
        run(stage, bench.flags(stage, out_dir, **CUT), out_dir, at_file_event(out_dir / stage, count))
        duration, operations = time.monotonic() - began, struct.unpack("qq", counter)
        report(bench, f"fsdp, the same command twice: the same bits ({stage})",
               [difference(out_dir / stage, bench.reference(stage, **CUT) / stage)])

        before_operations, any_time = [], []
        for _ in range(bench.trials):
            rank = bench.rng.randrange(2)
            moment = bench.rng.randint(1, operations[rank])

            def act(n, rank=rank, moment=moment):
                if n == moment and os.environ["RANK"] == str(rank):
                    die()

            before_operations.append(kill_rank(bench, stage, rank, act=act))
        for _ in range(math.ceil(bench.trials / 3)):
            rank = bench.rng.randrange(2)
            any_time.append(kill_rank(bench, stage, rank, after=bench.rng.uniform(0, duration)))
        promise = "fsdp: SIGKILL of a rank, or of both"
        report(bench, f"{promise}, just before a file operation ({stage})", before_operations,
               f"of {operations[0]} of rank 0 or {operations[1]} of rank 1")
        report(bench, f"{promise}, at a random moment ({stage})", any_time)


def kill_rank(bench: Bench, stage: str, rank: int, act=None, after: float = 0) -> str:
    """That rank is killed, by `act` or after so many seconds, and maybe the other one with it.

    Returns what is wrong after it was resumed, or ''.
    """
    out_dir, stop = bench.fresh(), bench.rng.choice((signal.SIGTERM, signal.SIGKILL))
    prepare = at_file_event(out_dir / stage, act) if act else None
    pids = start_ranks(stage, bench.flags(stage, out_dir, **CUT), out_dir, 2, prepare)
    if not act:
        time.sleep(after)
        os.kill(pids[rank], signal.SIGKILL)
    code, text = end_together(pids, out_dir, stop)
    outcome = (resumed(bench, stage, out_dir, **CUT)
               if code == -signal.SIGKILL or code == 0 and not act  # it was faster than we
               else f"ended with {code}: {text[-300:]}")
    shutil.rmtree(out_dir)
    return outcome


# --- one result --------------------------------------------------------------------------------------------


def processes(bench: Bench) -> None:
    """1, 2, 4 processes x accumulation 1, 2, 4: the loss of each of 50 steps, and the weights at the end."""
    for stage in STAGES:
        for optimizer in bench.optimizers:
            changes = {"max_steps": 50, "batch_size": 16, "log_interval": 1, "optimizer": optimizer,
                       "learning_rate": 1e-3, "lora_dropout": 0 if stage == "lora" else None,
                       "eval_interval": 0, "save_interval": 50, "eval_fraction": 0, "max_seq_len": 96,
                       "no-packing": True if stage != "pretrain" else None}
            one = run_on(bench, stage, 1, changes) / stage
            again = run_on(bench, stage, 1, changes) / stage
            report(bench, f"the same command twice: the same bits ({stage}, {optimizer})",
                   [difference(again, one)])
            losses, weights, outcomes = [], [], []
            for world_size in (1, 2, 4):
                for accumulation in (1, 2, 4):
                    micro = 16 // world_size // accumulation
                    other = run_on(bench, stage, world_size, changes | {"micro_batch_size": micro}) / stage
                    loss, weight = distance(other, one)
                    losses.append(loss)
                    weights.append(weight)
                    outcomes.append("" if max(loss, weight) < 1e-5 else
                                    f"{world_size} x {accumulation}: loss {loss:.1e}, weights {weight:.1e}")
            report(bench, f"1, 2, 4 processes x accumulation 1, 2, 4 ({stage}, {optimizer})", outcomes,
                   f"largest difference of a step's loss {max(losses):.1e}, of a weight {max(weights):.1e}")


def start_ranks(stage: str, flags: list[str], out_dir: Path, world_size: int, prepare=None) -> list[int]:
    """What torchrun does: so many processes that know of each other. Returns their ids."""
    port = free_port()

    def join(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if prepare:
            prepare()

    return [start(stage, flags, out_dir, partial(join, rank), rank) for rank in range(world_size)]


def end_together(pids: list[int], out_dir: Path, stop=signal.SIGTERM) -> tuple[int | None, str]:
    """What torchrun does: where one process fails it stops the others, and kills them after 30 seconds.

    Returns the first exit code that is not 0 (None: all hung and were killed) and everything they said.
    """
    running, failure, deadline = set(pids), 0, time.monotonic() + HANG
    while running and time.monotonic() < deadline:
        time.sleep(0.002)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                code = os.waitstatus_to_exitcode(status)
                if code and not failure:
                    failure, deadline = code, time.monotonic() + 30
                    for other in running:
                        os.kill(other, stop)
    for pid in running:
        kill(pid)
    said = [log_of(out_dir, rank).read_text(encoding="utf-8", errors="replace") for rank in range(len(pids))]
    return None if running and not failure else failure, "".join(said)


def run_on(bench: Bench, stage: str, world_size: int, changes: dict, out_dir: Path | None = None) -> Path:
    """Trains on so many processes, from the beginning or, in a given folder, on; returns the --out_dir."""
    changes = changes | ({"resume": True} if out_dir else {})
    out_dir = out_dir or bench.fresh()
    pids = start_ranks(stage, bench.flags(stage, out_dir, **changes), out_dir, world_size)
    for rank, pid in enumerate(pids):
        code = wait(pid)
        said = log_of(out_dir, rank).read_text(encoding="utf-8")
        assert code == 0, (rank, code, said)
        assert "warning" not in said.lower(), said
    return out_dir


def distance(run_dir: Path, reference: Path) -> tuple[float, float]:
    """The largest differences of a step's loss and of a weight."""
    from safetensors.torch import load_file

    ours, theirs = ([m["loss"] for m in metrics(folder) if "loss" in m] for folder in (run_dir, reference))
    assert len(ours) == len(theirs)
    loss = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    ours, theirs = load_file(weights_file(run_dir)), load_file(weights_file(reference))
    assert ours.keys() == theirs.keys()
    return loss, max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# --- ranks -------------------------------------------------------------------------------------------------

LAUNCHER = """
import os, runpy, sys, time
from datetime import timedelta
sys.path.insert(0, {root!r})
import dataset.lm_dataset, trainer.distributed
dataset.lm_dataset.CACHE_DIR = {cache!r}
if "TIMEOUT" in os.environ:  # of the collectives, in seconds
    trainer.distributed.TIMEOUT = timedelta(seconds=float(os.environ["TIMEOUT"]))
if "BUILD_SECONDS" in os.environ:  # how long a token cache takes at least
    real = dataset.lm_dataset._TokenDataset._build
    def build(*args):
        open({cache!r} + ".building", "a").close()
        time.sleep(float(os.environ["BUILD_SECONDS"]))
        real(*args)
    dataset.lm_dataset._TokenDataset._build = build
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Torchrun:
    """torchrun with two processes on a script, which can be harmed and timed."""

    def __init__(self, bench: Bench, out_dir: Path, *options: str, prefix=(), env=None, **changes):
        launcher = out_dir.with_name(f"{out_dir.name}.py")
        launcher.write_text(LAUNCHER.format(root=str(ROOT), cache=str(out_dir / "cache")), encoding="utf-8")
        self.metrics = out_dir / "pretrain" / "metrics.jsonl"
        self.said = out_dir.with_name(f"{out_dir.name}.said{bench.number}")
        bench.number += 1
        if not any("rdzv" in option for option in options):
            options = ("--nproc_per_node=2", f"--master_port={free_port()}", *options)
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "torch.distributed.run", *options, str(launcher),
                 str(ROOT / "trainer" / "train_pretrain.py"), *bench.flags("pretrain", out_dir, **changes)],
                stdout=said, stderr=subprocess.STDOUT, env=os.environ | (env or {}))

    def wait_for_lines(self, count: int) -> None:
        """Until metrics.jsonl has so many lines, or the run has ended."""
        wait_until(lambda: self.process.poll() is not None
                   or self.metrics.exists() and self.metrics.read_text().count("\n") >= count)

    def kill_rank(self, rank: int) -> None:
        agent = self.process.pid
        for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
            if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
                os.kill(int(pid), signal.SIGKILL)

    def wait(self) -> tuple[int | None, str]:
        """Exit code (None: it hung and was killed) and all that was said."""
        try:
            code = self.process.wait(HANG)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = None
        return code, self.said.read_text(encoding="utf-8", errors="replace")


def wait_until(true) -> None:
    deadline = time.monotonic() + HANG
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)


# Steps enough to be killed among, and a loss that the number of processes does not change.
LONG = {"max_steps": 60, "learning_rate": 1e-3}


def ranks(bench: Bench) -> None:
    reference = run_on(bench, "pretrain", 2, LONG) / "pretrain"
    dying_ranks(bench, {}, reference)
    dying_ranks(bench, CUT, run_on(bench, "pretrain", 2, LONG | CUT) / "pretrain")
    restarts(bench, reference)
    building_caches(bench)
    uneven_data(bench)
    other_numbers(bench)


def dying_ranks(bench: Bench, changes: dict, reference: Path) -> None:
    outcomes, seconds, changes = [], [], LONG | changes
    for number in range(max(2, bench.trials // 5)):
        out_dir, victim = bench.fresh(), number % 2
        run = Torchrun(bench, out_dir, **changes)
        run.wait_for_lines(bench.rng.randint(1, 5))
        time.sleep(bench.rng.uniform(0, 0.3))
        began = time.monotonic()
        run.kill_rank(victim)
        code, said = run.wait()
        seconds.append(time.monotonic() - began)
        if code == 1:
            left = damaged(out_dir / "pretrain") or lost(out_dir / "pretrain")
            outcomes.append(left or difference(run_on(bench, "pretrain", 2, changes, out_dir) / "pretrain",
                                               reference))
        else:
            outcomes.append(f"ended with {code}: {said[-300:]}")
    kind = changes.get("parallel", "ddp")
    report(bench, f"one of two ranks is killed ({kind}): the job ends; --resume: the same bits", outcomes,
           f"the job was down after {max(seconds):.1f} s at most")


def restarts(bench: Bench, reference: Path) -> None:
    outcomes = []
    for number in range(max(1, bench.trials // 10)):
        out_dir = bench.fresh()
        run = Torchrun(bench, out_dir, "--max-restarts=3", resume=True, **LONG)
        for lines in (2, 9):
            run.wait_for_lines(lines)
            run.kill_rank((number + lines) % 2)
        code, said = run.wait()
        outcomes.append(f"ended with {code}: {said[-300:]}" if code != 0 or "resumed at step" not in said
                        else difference(out_dir / "pretrain", reference))
    report(bench, "torchrun --max-restarts 3 with --resume, ranks killed twice: the same bits", outcomes)


def building_caches(bench: Bench) -> None:
    out_dir = bench.fresh()
    code, said = Torchrun(bench, out_dir, env={"BUILD_SECONDS": "12", "TIMEOUT": "4"}).wait()
    report(bench, "rank 0 builds the cache for three times the collective timeout: the others wait",
           ["" if code == 0 else f"ended with {code}: {said[-300:]}"])
    report(bench, "a run of two ranks ends without a warning",
           ["" if "warn" not in said.lower() and "error" not in said.lower() else said])

    out_dir = bench.fresh()
    run = Torchrun(bench, out_dir, env={"BUILD_SECONDS": "600"})
    wait_until((out_dir / "cache.building").exists)
    began = time.monotonic()
    run.kill_rank(0)
    code, said = run.wait()
    report(bench, "rank 0 is killed while it builds the cache: the job ends",
           ["" if code == 1 else f"ended with {code}: {said[-300:]}"],
           f"after {time.monotonic() - began:.1f} s")

    out_dir = bench.fresh()
    (bad := out_dir / "bad.jsonl").write_text('{"text": ""}\n')
    code, said = Torchrun(bench, out_dir, data_path=bad).wait()
    errors = re.findall("^(?:rank .: )?error:.*", said, re.MULTILINE)
    report(bench, "rank 0 finds no usable record: the job ends with one complaint",
           ["" if code == 1 and len(errors) == 1 else f"ended with {code}: {said[-300:]}"])


def uneven_data(bench: Bench) -> None:
    outcomes = []
    for rows, batch_size in ((3, 4), (5, 4), (7, 5), (1, 1)):
        data = bench.folder / f"rows{rows}.jsonl"
        data.write_text("".join(bench.texts.read_text().splitlines(keepends=True)[:rows]))
        changes = {"data_path": data, "batch_size": batch_size, "eval_fraction": 0, "no-packing": True,
                   "max_steps": 50, "log_interval": 1, "learning_rate": 1e-3}
        one, four = (run_on(bench, "pretrain", size, changes) / "pretrain" for size in (1, 4))
        far = max(distance(four, one))
        outcomes.append("" if far < 1e-5 else f"{rows} rows: {far:.1e}")
    report(bench, "3, 5, 7 and 1 rows on 4 ranks: no hang, and the result of one process", outcomes)


def other_numbers(bench: Bench) -> None:
    outcomes, furthest = [], 0.0
    changes = LONG | {"log_interval": 1, "max_steps": 50}
    one = run_on(bench, "pretrain", 1, changes) / "pretrain"
    for before, after in ((1, 2), (2, 1), (4, 2)):
        out_dir = bench.fresh()
        pids = start_ranks("pretrain", bench.flags("pretrain", out_dir, **changes), out_dir, before)
        wait_until(lambda folder=out_dir: len(list((folder / "pretrain/checkpoints").glob("step_*"))) > 1)
        for pid in pids:
            kill(pid)
        far = max(distance(run_on(bench, "pretrain", after, changes, out_dir) / "pretrain", one))
        furthest = max(far, furthest)
        outcomes.append("" if far < 1e-5 else f"{before} then {after}: {far:.1e}")
    report(bench, "killed and resumed with another number of processes", outcomes,
           f"largest difference {furthest:.1e}")


# --- hosts -------------------------------------------------------------------------------------------------


class Host:
    """A network namespace with one address, on a cable to the other one."""

    def __init__(self, number: int):
        self.address, self.cable = f"10.77.0.{number}", f"cable{number}"
        self.holder = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        us = os.readlink("/proc/self/ns/net")
        wait_until(lambda: os.readlink(f"/proc/{self.holder.pid}/ns/net") != us)
        self.inside = ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net"]

    def ip(self, *words: str) -> None:
        subprocess.run([*self.inside, "ip", *words], check=True)

    def die(self) -> None:
        """All its processes at once. (The holder keeps the namespace.)"""
        here = os.readlink(f"/proc/{self.holder.pid}/ns/net")
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if os.readlink(process / "ns/net") == here and int(process.name) != self.holder.pid:
                    os.kill(int(process.name), signal.SIGKILL)

    def train(self, bench: Bench, out_dir: Path, endpoint: str) -> Torchrun:
        return Torchrun(
            bench, out_dir, "--nnodes=2", "--nproc_per_node=1", "--max-restarts=5", "--rdzv-backend=c10d",
            f"--rdzv-endpoint={endpoint}:29400", "--rdzv-id=faults", f"--local-addr={self.address}",
            f"--rdzv-conf=is_host={int(self.address == endpoint)}",
            prefix=self.inside,
            # By default torchrun tells a host that joins later nothing of the store, and it waits in vain.
            env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": self.cable,
                 "TIMEOUT": "20"}, resume=True, **LONG)


def hosts(bench: Bench) -> None:
    promise = "two hosts (network namespaces), one killed and started again: the same bits"
    if reason := no_mounts() or ("" if shutil.which("ip") else "there is no `ip` (iproute2)"):
        return bench.skip(promise, reason)
    reference = run_on(bench, "pretrain", 2, LONG) / "pretrain"
    one, two = Host(1), Host(2)
    try:
        one.ip("link", "add", one.cable, "type", "veth", "peer", "name", two.cable, "netns",
               str(two.holder.pid))
        for host in (one, two):
            host.ip("address", "add", f"{host.address}/24", "dev", host.cable)
            for device in ("lo", host.cable):
                host.ip("link", "set", device, "up")
        outcomes = []
        for _ in range(max(1, bench.trials // 15)):
            outcomes.append(host_dies(bench, one, two, reference, unplugged=False))
        report(bench, promise, outcomes)
        report(bench, "a host falls silent (its cable is pulled), and another takes its place: the same bits",
               [host_dies(bench, one, two, reference, unplugged=True)], "after the timeout, set to 20 s here")
    finally:
        for host in (one, two):
            host.holder.kill()
            host.holder.wait()


def host_dies(bench: Bench, one: Host, two: Host, reference: Path, unplugged: bool) -> str:
    out_dir = bench.fresh()
    first, second = (host.train(bench, out_dir, one.address) for host in (one, two))
    first.wait_for_lines(4)
    if unplugged:
        two.ip("link", "set", two.cable, "down")
        time.sleep(25)  # past the timeout
    two.die()
    second.wait()
    if first.process.poll() is not None:
        return f"the other host ended too: {first.wait()[1][-300:]}"
    if unplugged:
        two.ip("link", "set", two.cable, "up")
    again = two.train(bench, out_dir, one.address)
    (code, said), (other_code, other_said) = first.wait(), again.wait()
    if code or other_code:
        return f"ended with {code} and {other_code}: {said[-300:]} {other_said[-300:]}"
    return difference(out_dir / "pretrain", reference) if "resumed at step" in said else "nothing resumed"


SECTIONS = {"kills": kills, "saves": saves, "shards": shards, "processes": processes, "ranks": ranks,
            "hosts": hosts}


def main(args):
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = Bench(Path(folder), args.trials, args.seed)
        bench.optimizers = args.optimizers
        warm_up(bench)
        for name in args.only:
            SECTIONS[name](bench)
    print()
    print("| promise | tried | kept | |\n|---|---|---|---|")
    for row in bench.rows:
        print(f"| {row['promise']} | {row['tried']} | {row['kept']} | {row['note']} |")
    if args.json:
        args.json.write_text(json.dumps(bench.rows, indent=1), encoding="utf-8")
    return int(any(row["kept"] < row["tried"] for row in bench.rows))


def warm_up(bench: Bench) -> None:
    """Trains once in this process: what is imported and initialised at first use costs no fork its time."""
    out_dir = bench.fresh()
    sys.argv = ["train_pretrain.py", *bench.flags("pretrain", out_dir)]
    with (out_dir / "log").open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        import torch.distributed.checkpoint  # noqa: F401
        import torch.distributed.fsdp  # noqa: F401

        import dataset.lm_dataset
        import model.lora  # noqa: F401
        import trainer.retention  # noqa: F401

        dataset.lm_dataset.CACHE_DIR = out_dir / "cache"
        runpy.run_path(str(ROOT / "trainer" / "train_pretrain.py"), run_name="__main__")


def parse_args(argv=None):
    from trainer.args import Parser

    parser = Parser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="PART",
                        help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--trials", type=int, default=30, metavar="N", help="of each kind")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"], metavar="NAME")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random moments")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    return parser.parse_args(argv)


def enter_namespace() -> None:
    """Starts this script again where it may mount file systems that only it sees, if the system allows it."""
    if "FAULTS_NAMESPACE" in os.environ or not shutil.which("unshare"):
        return
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0:
        os.environ["FAULTS_NAMESPACE"] = "1"
        os.execvp("unshare", ["unshare", "-rm", sys.executable, __file__, *sys.argv[1:]])


if __name__ == "__main__":
    arguments = parse_args()
    enter_namespace()
    sys.exit(main(arguments))
