"""Tiny training runs that can be harmed, and how they are compared with runs that nobody disturbed.

benchmarks/faults.py and faulty_ranks.py do the harm. Training scripts run unchanged, each in a fork of this
process, where torch is imported already: so a run takes a second, and hundreds can be killed. Readers of the
code may skip this file.
"""

import contextlib
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from common.cli import ROOT

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: threads do not survive a fork

STAGES = ("pretrain", "full_sft", "lora", "dpo", "grpo", "ppo", "distillation")
ROLLOUT_STAGES = ("grpo", "ppo")
MAX_SECONDS = 600  # a run that has not ended by then counts as hanging
SECONDS_TO_STOP = 30  # torchrun kills processes that have not obeyed SIGTERM by then
SAVE_INTERVAL = 3  # steps
SHOWN_CHARACTERS = 300  # of what a run said, at the end of a complaint
FSDP = {"parallel": "fsdp"}  # changes of the flags; such a run has two processes
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


class Bench:
    """The folder of all runs, their data, and the rows of the table so far."""

    def __init__(self, folder: Path, trials: int, seed: int, optimizers: list[str], stages: Sequence[str]):
        self.folder, self.trials, self.rng, self.rows = folder, trials, random.Random(seed), []
        self.few_trials = math.ceil(trials / 3)
        self.optimizers, self.stages, self.number = optimizers, stages, 0
        self.references, self.seconds = {}, {}
        rng = random.Random(0)
        words = "the cat sat on a warm stone and the small owl sang 小 猫 在 河 边 睡 觉 of rivers".split()

        def phrase(shortest, longest):
            return " ".join(rng.choices(words, k=rng.randint(shortest, longest)))

        def chat():
            turns = [(r, phrase(1, 14)) for _ in range(rng.choice((1, 1, 2))) for r in ("user", "assistant")]
            return {"conversations": [{"role": role, "content": text} for role, text in turns]}

        self.reward = folder / "reward.py"
        self.reward.write_text("def score(messages, answer, record):\n    return answer.count('a')\n")
        self.texts, self.chats = folder / "texts.jsonl", folder / "chats.jsonl"
        self.pairs = folder / "pairs.jsonl"
        self.texts.write_text("".join(json.dumps({"text": phrase(3, 40)}) + "\n" for _ in range(45)))
        self.chats.write_text("".join(json.dumps(chat()) + "\n" for _ in range(41)))
        pairs = ({"prompt": phrase(1, 9), "chosen": phrase(1, 12), "rejected": phrase(13, 16)}
                 for _ in range(41))
        self.pairs.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def report(self, promise: str, problems: list[str], note: str = "") -> None:
        """Adds a row to the table. problems: what is wrong with each trial, '' where nothing is wrong."""
        wrong = [problem for problem in problems if problem]
        notes = [note] if note else []
        self.add_row(promise, len(problems), len(problems) - len(wrong), "; ".join(notes + wrong[:3]))

    def skip(self, promise: str, reason: str) -> None:
        self.add_row(promise, 0, 0, f"not tried: {reason}")

    def add_row(self, promise: str, tried: int, kept: int, note: str) -> None:
        self.rows.append({"promise": promise, "tried": tried, "kept": kept, "note": note})
        print(f"{'ok ' if kept == tried else 'BAD'} {promise}: {kept} of {tried}  {note}", flush=True)

    def fresh(self) -> Path:
        """A new --out_dir. The token cache of its runs lies in it, too."""
        self.number += 1
        folder = self.folder / f"run{self.number}"
        folder.mkdir()
        return folder

    @contextlib.contextmanager
    def trial(self) -> Iterator[Path]:
        """A new --out_dir, which is removed after the block."""
        out_dir = self.fresh()
        yield out_dir
        shutil.rmtree(out_dir)

    def flags(self, stage: str, out_dir: Path, **changes) -> list[str]:
        """A short run that logs, validates and saves often, each at another interval."""
        data = {"pretrain": self.texts, "dpo": self.pairs}.get(stage, self.chats)
        flags = {"data_path": data, "out_dir": out_dir,
                 "name": stage, "max_seq_len": 64, "batch_size": 4, "device": "cpu", "dtype": "float32",
                 "eval_fraction": 0.2, "max_steps": 24, "log_interval": 4, "save_interval": SAVE_INTERVAL,
                 "eval_interval": 9, "learning_rate": 0.01}
        if stage == "pretrain":
            flags |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
        else:
            flags |= {"load_from": self.reference("pretrain") / "pretrain"}
        if stage == "lora":
            flags |= {"lora_rank": 4, "lora_dropout": 0.1}
        if stage in ROLLOUT_STAGES:
            # Many states are saved between two updates of one rollout. The base has learnt for longer. A base
            # that knows nothing finds thousands of tokens equally likely. Then often a random number
            # lies so near to the border between two of them that rounding decides what is sampled.
            base = self.reference("pretrain", max_steps=300, save_interval=300)
            flags |= {"load_from": base / "pretrain", "reward_file": f"{self.reward}:score", "batch_size": 8,
                      "group_size": 4, "kl_beta": 0.05, "max_new_tokens": 8, "updates_per_rollout": 2,
                      "show_interval": 0}
        if stage == "distillation":  # in half of the steps the student writes the answers itself
            teacher = self.reference("full_sft") / "full_sft"
            flags |= {"teacher": teacher, "on_policy": 0.5, "max_new_tokens": 8}
        words = []
        for name, value in (flags | changes).items():
            if value is True:
                words.append(f"--{name}")
            elif value is not None:
                words += [f"--{name}", str(value)]
        return words

    def reference(self, stage: str, **changes) -> Path:
        """The --out_dir of an undisturbed run. self.seconds has how long it took."""
        key = (stage, *changes.items())
        if key not in self.references:
            out_dir = self.fresh()
            flags, began = self.flags(stage, out_dir, **changes), time.monotonic()
            code, text = run(stage, flags, out_dir)
            assert code == 0, text
            self.references[key], self.seconds[key] = out_dir, time.monotonic() - began
        return self.references[key]


def why_no_mounts() -> str:
    """Why nothing can be mounted here, and no network be made; '' where both can."""
    return "" if os.environ.get("FAULTS_NAMESPACE") else "user namespaces (unshare -rm) are not permitted"


# --- processes ----------------------------------------------------------------------------------------------


def log_of(out_dir: Path, rank: int = 0) -> Path:
    """Where a run's output goes: beside its folder, which may be read-only."""
    return out_dir.with_name(f"{out_dir.name}.log{rank}")


def said(out_dir: Path, processes: int = 1) -> str:
    """The output of a run."""
    logs = [log_of(out_dir, rank) for rank in range(processes)]
    return "".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)


def ended_badly(code: int | None, text: str) -> str:
    """The complaint about a run that ended in another way than it should have."""
    return f"ended with {code}: {text[-SHOWN_CHARACTERS:]}"


def start(stage: str, flags: list[str], out_dir: Path, prepare=None, rank: int = 0) -> int:
    """`python trainer/train_STAGE.py FLAGS` in a fork, after `prepare()`. Returns its process id."""
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
        import dataset.token_cache

        dataset.token_cache.CACHE_DIR = out_dir / "cache"
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


def wait(pid: int, seconds: float = MAX_SECONDS) -> int | None:
    """The exit code, negative for a signal. None for a process that still runs after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + MAX_SECONDS
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(stage: str, flags: list[str], out_dir: Path, prepare=None) -> tuple[int | None, str]:
    """Exit code (None: the run hung and was killed) and output. With fsdp there are two processes."""
    if "fsdp" in flags:
        return end_together(start_ranks(stage, flags, out_dir, 2, prepare), out_dir)
    pid = start(stage, flags, out_dir, prepare)
    code = wait(pid)
    if code is None:
        kill(pid)
    return code, said(out_dir)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_ranks(stage: str, flags: list[str], out_dir: Path, world_size: int, prepare=None) -> list[int]:
    """Does what torchrun does: starts so many processes that know of each other. Returns their ids."""
    port = free_port()

    def join(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if prepare:
            prepare()

    return [start(stage, flags, out_dir, partial(join, rank), rank) for rank in range(world_size)]


def end_together(pids: list[int], out_dir: Path, stop=signal.SIGTERM) -> tuple[int | None, str]:
    """Does what torchrun does: when one process fails, the others are stopped, and killed after 30 seconds.

    Returns the first exit code that is not 0 (None: all hung and were killed) and the output of all.
    """
    running, failure, deadline = set(pids), 0, time.monotonic() + MAX_SECONDS
    while running and time.monotonic() < deadline:
        time.sleep(0.002)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            running.remove(pid)
            code = os.waitstatus_to_exitcode(status)
            if code and not failure:
                failure, deadline = code, time.monotonic() + SECONDS_TO_STOP
                for other in running:
                    os.kill(other, stop)
    for pid in running:
        kill(pid)
    code = None if running and not failure else failure
    return code, said(out_dir, len(pids))


def run_on(bench: Bench, stage: str, world_size: int, changes: dict, out_dir: Path | None = None) -> Path:
    """Trains on so many processes and returns the run's folder. With an out_dir the run there is resumed."""
    if out_dir:
        changes = changes | {"resume": True}
    out_dir = out_dir or bench.fresh()
    pids = start_ranks(stage, bench.flags(stage, out_dir, **changes), out_dir, world_size)
    codes = [wait(pid) for pid in pids]
    text = said(out_dir, world_size)
    assert codes == [0] * world_size, (codes, text)
    assert "warning" not in text.lower(), text
    return out_dir / stage


def at_file_event(folder: Path, act: Callable[[int], None], wanted=None) -> Callable[[], None]:
    """For `prepare`: calls act(n) before the n-th operation on a file below `folder`, from 1 on.

    Python announces operations on files to audit hooks, so no part of the code under test is replaced.
    os.fsync alone is not announced. `wanted(event, path)` chooses some of the events.
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


# --- what a run left, and what it should have left ----------------------------------------------------------


def has_weights(run_dir: Path) -> bool:
    """Whether the final weights are there."""
    return any(run_dir.glob("*model.safetensors"))


def weights_file(run_dir: Path) -> Path:
    (path,) = run_dir.glob("*model.safetensors")
    return path


def contents(path: Path) -> tuple[dict, bytes]:
    """The header and the numbers of a safetensors file. The order within its header may differ."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def metrics(run_dir: Path) -> list[dict]:
    """metrics.jsonl without the values that the clock decides."""
    from trainer.tracking import read_metrics

    return [{name: value for name, value in line.items() if name not in ("seconds", "tokens_per_second")}
            for line in read_metrics(run_dir / "metrics.jsonl")]


def difference(run_dir: Path, reference: Path) -> str:
    """In what a finished run differs from the undisturbed one; '' where the two are equal."""
    if contents(weights_file(run_dir)) != contents(weights_file(reference)):
        return "other weights"
    if metrics(run_dir) != metrics(reference):
        return "another metrics.jsonl"
    if (run_dir / "checkpoints").exists():
        return "checkpoints left behind"
    left = [path.name for folder in (run_dir, run_dir.parent) for path in folder.glob(".*")]
    return f"left behind: {left}" if left else ""


def distance(run_dir: Path, reference: Path) -> tuple[float, float]:
    """The largest difference of a step's loss, and of a weight."""
    from safetensors.torch import load_file

    ours, theirs = ([m["loss"] for m in metrics(folder) if "loss" in m] for folder in (run_dir, reference))
    loss = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    ours, theirs = load_file(weights_file(run_dir)), load_file(weights_file(reference))
    assert ours.keys() == theirs.keys()
    return loss, max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def checkpoint_names(run_dir: Path) -> list[str]:
    from trainer.checkpoint import checkpoints

    return [folder.name for folder in checkpoints(run_dir)]


def damaged(run_dir: Path) -> str:
    """The first checkpoint that counts as finished and cannot be loaded; '' where all can."""
    import torch

    from trainer.checkpoint import checkpoints, damage

    for folder in checkpoints(run_dir):
        if reason := damage(folder):
            return f"damaged checkpoint: {folder.name}: {reason}"
        try:
            state = torch.load(folder / "state.pt", weights_only=True)
            if state["step"] != int(folder.name.removeprefix("step_")):
                return f"damaged checkpoint: {folder.name} holds step {state['step']}"
        except Exception as error:
            return f"damaged checkpoint: {folder.name}: {type(error).__name__}"
    return ""


def lost(run_dir: Path) -> str:
    """A checkpoint that must be there, according to the steps that were logged, and is not; or ''."""
    log = run_dir / "metrics.jsonl"
    if not log.exists() or has_weights(run_dir):
        return ""
    steps = [int(step) for step in re.findall(r'"step": (\d+)', log.read_text())]
    # A step is logged first and saved then, so the step that was logged last may not be saved yet.
    due = (max(steps, default=0) - 1) // SAVE_INTERVAL * SAVE_INTERVAL
    if due < SAVE_INTERVAL or max(checkpoint_names(run_dir), default="") >= f"step_{due:08}":
        return ""
    return f"lost checkpoint: step {due}"


def problem_after_resume(bench: Bench, stage: str, out_dir: Path, **changes) -> str:
    """Checks what a fault left, resumes, and compares with the undisturbed run: what is wrong, or ''."""
    problem = damaged(out_dir / stage) or lost(out_dir / stage)
    if problem:
        return problem
    code, text = run(stage, [*bench.flags(stage, out_dir, **changes), "--resume"], out_dir)
    if code != 0:
        return f"--resume {ended_badly(code, text)}"
    complaints = re.findall(r".*damaged.*", text)
    if complaints:
        return complaints[0]
    return difference(out_dir / stage, bench.reference(stage, **changes) / stage)
