"""Measures whether runs keep their promises: they are killed, disks fill up, processes and hosts die.

    python benchmarks/faults.py                             # everything: about half an hour of one core
    python benchmarks/faults.py --only kills --trials 30    # kills, saves, shards, processes, ranks, hosts
    python benchmarks/faults.py --json faults.json          # the table as JSON too

A run is a tiny model's 24 steps with a checkpoint every third step. Full and read-only disks are mounted in a
user namespace of our own (`unshare -rm`), and hosts are network namespaces. Where the system allows neither,
those rows say so and are not counted. Exit code 1: a promise was broken. Linux only. Readers of the code may
skip this file.
"""

import contextlib
import mmap
import os
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import faulty_ranks
from benchmarks import faulty_runs as runs
from benchmarks.faulty_runs import Bench, at_file_event
from benchmarks.shared import markdown
from common.cli import ROOT, Parser
from common.files import json_text, write_whole

MIN_BYTES_OF_FILE = 8192  # below this limit not even the log could be written
SAVES = 8  # checkpoints of a run


# --- killed at random moments -------------------------------------------------------------------------------


def kills(bench: Bench) -> None:
    variants = [(stage, {}) for stage in bench.stages]
    if "pretrain" in bench.stages:
        variants.append(("pretrain", {"dtype": "float16", "optimizer": "adamw"}))  # with a GradScaler's state
    for stage, changes in variants:
        bench.reference(stage, **changes)
        duration = bench.seconds[stage, *changes.items()]
        problems, moments = [], []
        while len(problems) < bench.trials:
            with bench.trial() as out_dir:
                if kill_at_random(bench, stage, changes, out_dir, duration, moments):
                    problems.append(runs.problem_after_resume(bench, stage, out_dir, **changes))
        name = " ".join([stage, *changes.values()])
        bench.report(f"SIGKILL at a random moment, then --resume: the same bits ({name})", problems,
                     f"{len(moments)} kills, {moments.count('early')} before training began, "
                     f"{moments.count('late')} after the weights were saved")


def kill_at_random(bench: Bench, stage: str, changes: dict, out_dir: Path, duration: float,
                   moments: list[str]) -> bool:
    """Starts a run and kills it; some runs are resumed and killed again, up to three times.

    Notes in `moments` how far the run was at each kill. Returns False where the run ended before its kill.
    """
    flags = [*bench.flags(stage, out_dir, **changes), "--resume"]  # which the first start may carry, too
    for _ in range(bench.rng.choice((1, 1, 2, 3))):
        pid = runs.start(stage, flags, out_dir)
        if runs.wait(pid, bench.rng.uniform(0, duration)) is not None:
            return False
        runs.kill(pid)
        if runs.has_weights(out_dir / stage):
            moments.append("late")
        else:
            moments.append("middle" if (out_dir / stage / "checkpoints").is_dir() else "early")
    return True


# --- faults while saving ------------------------------------------------------------------------------------


def saves(bench: Bench) -> None:
    kill_at_file_operations(bench)
    kill_within_writes(bench)
    refuse_large_files(bench)
    fill_the_disk(bench)
    make_read_only(bench)
    slow_the_disk(bench)


def begins_save(event: str, path: str) -> bool:
    return event == "os.mkdir" and "/checkpoints/" in path


def count_file_operations(bench: Bench, stage: str, processes: int, **changes) -> tuple[list[int], Path]:
    """How many operations an undisturbed run does in its folder, by process; and the run's folder."""
    out_dir, counters = bench.fresh(), mmap.mmap(-1, 8 * processes)  # shared with the forks

    def count(number):
        struct.pack_into("q", counters, 8 * int(os.environ.get("RANK", 0)), number)

    prepare = at_file_event(out_dir / stage, count)
    runs.run(stage, bench.flags(stage, out_dir, **changes), out_dir, prepare)
    return list(struct.unpack("q" * processes, counters)), out_dir / stage


def die_at(moment: int, rank: int = 0):
    """For at_file_event: kills the process of that rank before its operation number `moment`."""
    def act(number):
        if number == moment and int(os.environ.get("RANK", 0)) == rank:
            runs.die()

    return act


def kill_at_file_operations(bench: Bench) -> None:
    for stage in ("pretrain", "lora"):
        [operations], _ = count_file_operations(bench, stage, processes=1)
        problems = []
        for moment in sorted(bench.rng.sample(range(1, operations + 1), min(operations, bench.trials))):
            with bench.trial() as out_dir:
                prepare = at_file_event(out_dir / stage, die_at(moment))
                problems.append(problem_after_kill(bench, stage, out_dir, prepare, signal.SIGKILL))
        bench.report(f"SIGKILL just before a file operation ({stage})", problems,
                     f"of the {operations} operations in its folder, drawn at random")


def problem_after_kill(bench: Bench, stage: str, out_dir: Path, prepare, number: int) -> str:
    """Runs until the signal `number` ends the run, and resumes it. Returns what is wrong, or ''."""
    code, text = runs.run(stage, bench.flags(stage, out_dir), out_dir, prepare)
    if code != -number:
        return runs.ended_badly(code, text)
    return runs.problem_after_resume(bench, stage, out_dir)


def kill_within_writes(bench: Bench) -> None:
    """The kernel itself kills the process (SIGXFSZ) as it writes past byte n of its checkpoint."""
    size, problems = checkpoint_size(bench), []
    for _ in range(bench.few_trials):
        save, limit = bench.rng.randint(1, SAVES), bench.rng.randrange(size)

        def lower(number, save=save, limit=limit):
            if number == save:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores this signal
                limit_file_size(limit)

        with bench.trial() as out_dir:
            prepare = at_file_event(out_dir / "pretrain", lower, begins_save)
            problems.append(problem_after_kill(bench, "pretrain", out_dir, prepare, signal.SIGXFSZ))
    bench.report("killed by the kernel in the middle of writing a checkpoint", problems)


def limit_file_size(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def checkpoint_size(bench: Bench) -> int:
    """Bytes of the largest file in a checkpoint of the pretraining run."""
    out_dir = bench.fresh()
    prepare = at_file_event(out_dir / "pretrain", die_at(3), begins_save)
    runs.run("pretrain", bench.flags("pretrain", out_dir), out_dir, prepare)
    return max(p.stat().st_size for p in (out_dir / "pretrain" / "checkpoints").glob("step_*/*"))


def problem_on_full_disk(bench: Bench, out_dir: Path, begin, end, on_full_disk: str) -> str:
    """Runs with a disk that takes no more from the n-th save on (begin), until it does again (end).

    With --on_full_disk stop the run must end with code 1 and one line, and go on from the checkpoint before.
    With continue it must carry on and come to the same end. Returns what is wrong, or ''.
    """
    save = bench.rng.randint(1, SAVES - 1)

    def act(number):
        if number == save:
            begin()
        elif number == save + 1:  # only --on_full_disk continue comes so far
            end()

    flags = [*bench.flags("pretrain", out_dir), "--on_full_disk", on_full_disk]
    code, text = runs.run("pretrain", flags, out_dir, at_file_event(out_dir / "pretrain", act, begins_save))
    end()
    if "Traceback" in text or code != (0 if on_full_disk == "continue" else 1):
        return f"save {save}, {on_full_disk}: {runs.ended_badly(code, text)}"
    if code == 0:
        return runs.difference(out_dir / "pretrain", bench.reference("pretrain") / "pretrain")
    kept = runs.checkpoint_names(out_dir / "pretrain")
    if text.count("error:") != 1 or (save > 1 and not kept):
        return f"save {save}, then {kept}: {runs.ended_badly(code, text)}"
    return runs.problem_after_resume(bench, "pretrain", out_dir)


def refuse_large_files(bench: Bench) -> None:
    size = checkpoint_size(bench)
    for policy in ("stop", "continue"):
        problems = []
        for _ in range(bench.few_trials):
            begin = partial(limit_file_size, bench.rng.randrange(MIN_BYTES_OF_FILE, size))
            end = partial(limit_file_size, resource.RLIM_INFINITY)
            with bench.trial() as out_dir:
                problems.append(problem_on_full_disk(bench, out_dir, begin, end, policy))
        bench.report(f"a file size limit (EFBIG), --on_full_disk {policy}", problems)


def fill_the_disk(bench: Bench) -> None:
    size = checkpoint_size(bench)
    for policy in ("stop", "continue"):
        promise = f"a full disk (ENOSPC, tmpfs), --on_full_disk {policy}"
        if reason := runs.why_no_mounts():
            bench.skip(promise, reason)
            continue
        problems = []
        for _ in range(bench.few_trials):
            free = bench.rng.randrange(size)
            with bench.trial() as out_dir, mounted("-t", "tmpfs", "-o", f"size={8 * size}", "tmpfs", out_dir):
                filler = out_dir / "filler"
                begin, end = partial(fill, filler, free), partial(filler.unlink, missing_ok=True)
                problems.append(problem_on_full_disk(bench, out_dir, begin, end, policy))
        bench.report(promise, problems)


def fill(filler: Path, free: int) -> None:
    """Makes a file that leaves so many bytes free on its disk."""
    disk = os.statvfs(filler.parent)
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - free))


def make_read_only(bench: Bench) -> None:
    promise = "a disk that turns read-only (EROFS), --on_full_disk stop"
    if reason := runs.why_no_mounts():
        bench.skip(promise, reason)
        return
    problems = []
    for _ in range(bench.few_trials):
        with bench.trial() as out_dir, mounted("--bind", out_dir, out_dir), without_lock():
            begin, end = (partial(remount, out_dir, mode) for mode in ("ro", "rw"))
            problems.append(problem_on_full_disk(bench, out_dir, begin, end, "stop"))
    bench.report(promise, problems)


@contextlib.contextmanager
def without_lock():
    """Within the block runs do not lock their folder. No mount turns read-only while a file in it is open for
    writing, but a failing disk does."""
    import trainer.loop

    lock_folder = trainer.loop.lock_folder
    trainer.loop.lock_folder = lambda run_dir: None
    try:
        yield
    finally:
        trainer.loop.lock_folder = lock_folder


def remount(folder: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,bind,{mode}", folder], check=True)


def slow_the_disk(bench: Bench) -> None:
    """Each operation on a file takes 20 ms, fsync 0.2 s: nearly all the time is spent within saves."""
    problems = []
    for _ in range(bench.few_trials):
        with bench.trial() as out_dir:
            prepare = partial(be_slow, out_dir / "pretrain")
            pid = runs.start("pretrain", bench.flags("pretrain", out_dir), out_dir, prepare)
            if runs.wait(pid, bench.rng.uniform(0.5, 5)) is None:
                runs.kill(pid)
                problems.append(runs.problem_after_resume(bench, "pretrain", out_dir))
            else:  # the run was faster
                problems.append("")
    bench.report("SIGKILL at a random moment on a slow disk", problems)


def be_slow(folder: Path) -> None:
    at_file_event(folder, lambda number: time.sleep(0.02))()
    fsync = os.fsync

    def slow_fsync(descriptor):
        time.sleep(0.2)
        fsync(descriptor)

    os.fsync = slow_fsync


@contextlib.contextmanager
def mounted(*words):
    subprocess.run(["mount", *words], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", words[-1]], check=True)


# --- sharded checkpoints ------------------------------------------------------------------------------------


def shards(bench: Bench) -> None:
    """--parallel fsdp on two processes: one is killed, or both, before a file operation or at any moment."""
    for stage in ("pretrain", "lora")[:bench.trials]:
        began = time.monotonic()
        operations, run_dir = count_file_operations(bench, stage, processes=2, **runs.FSDP)
        duration = time.monotonic() - began
        bench.report(f"fsdp, the same command twice: the same bits ({stage})",
                     [runs.difference(run_dir, bench.reference(stage, **runs.FSDP) / stage)])
        before_operations, any_time = [], []
        for _ in range(bench.trials):
            rank = bench.rng.randrange(2)
            moment = bench.rng.randint(1, operations[rank])
            before_operations.append(kill_rank(bench, stage, rank, act=die_at(moment, rank)))
        for _ in range(bench.few_trials):
            rank = bench.rng.randrange(2)
            any_time.append(kill_rank(bench, stage, rank, after=bench.rng.uniform(0, duration)))
        promise = "fsdp: SIGKILL of a rank, or of both"
        bench.report(f"{promise}, just before a file operation ({stage})", before_operations,
                     f"of {operations[0]} of rank 0 or {operations[1]} of rank 1")
        bench.report(f"{promise}, at a random moment ({stage})", any_time)


def kill_rank(bench: Bench, stage: str, rank: int, act=None, after: float = 0) -> str:
    """That rank is killed, by `act` or after so many seconds, and perhaps the other one with it.

    Returns what is wrong after the run was resumed, or ''.
    """
    stop = bench.rng.choice((signal.SIGTERM, signal.SIGKILL))
    with bench.trial() as out_dir:
        prepare = at_file_event(out_dir / stage, act) if act else None
        pids = runs.start_ranks(stage, bench.flags(stage, out_dir, **runs.FSDP), out_dir, 2, prepare)
        if not act:
            time.sleep(after)
            os.kill(pids[rank], signal.SIGKILL)
        code, text = runs.end_together(pids, out_dir, stop)
        ended_before_kill = code == 0 and not act
        if code != -signal.SIGKILL and not ended_before_kill:
            return runs.ended_badly(code, text)
        return runs.problem_after_resume(bench, stage, out_dir, **runs.FSDP)


# --- the command line ---------------------------------------------------------------------------------------

SECTIONS = {"kills": kills, "saves": saves, "shards": shards, "processes": faulty_ranks.processes,
            "ranks": faulty_ranks.ranks, "hosts": faulty_ranks.hosts}


def main(args) -> int:
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = Bench(Path(folder), args.trials, args.seed, args.optimizers, args.stages)
        warm_up(bench)
        for name in args.only:
            SECTIONS[name](bench)
    print(f"\n{markdown(bench.rows)}")
    if args.json:
        write_whole(args.json, json_text(bench.rows))
    return 1 if any(row["kept"] < row["tried"] for row in bench.rows) else 0


def warm_up(bench: Bench) -> None:
    """Trains once in this process, so that no fork spends time on imports and first uses."""
    out_dir = bench.fresh()
    sys.argv = ["train_pretrain.py", *bench.flags("pretrain", out_dir)]
    with (out_dir / "log").open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        import torch.distributed.checkpoint  # noqa: F401
        import torch.distributed.fsdp  # noqa: F401

        import dataset.token_cache
        import model.lora  # noqa: F401
        import trainer.retention  # noqa: F401

        dataset.token_cache.CACHE_DIR = out_dir / "cache"
        runpy.run_path(str(ROOT / "trainer" / "train_pretrain.py"), run_name="__main__")


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="PART",
                        help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--stages", nargs="+", choices=runs.STAGES, default=runs.STAGES, metavar="STAGE",
                        help="those that the parts `kills` and `processes` train")
    parser.add_argument("--trials", type=int, default=30, metavar="N", help="of each kind")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"], metavar="NAME",
                        help="those that the part `processes` compares")
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
