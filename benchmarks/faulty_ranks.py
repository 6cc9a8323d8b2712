"""The part of benchmarks/faults.py that has several processes, or hosts, and lets some of them die.

In every row a job must end, and a resumed job must come to the same result. Readers of the code may skip this
file.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import faulty_runs as runs
from benchmarks.faulty_runs import Bench, difference, distance, ended_badly, run_on, wait_until
from common.cli import ROOT

MAX_DISTANCE = 1e-5  # of a loss or a weight from that of one process: what rounding may do in 50 steps
# The loss of DPO sums over the tokens of an answer, so a difference of the weights counts many times.
RATES = {"dpo": 1e-4, "grpo": 1e-4, "ppo": 1e-4}  # 1e-3 in the other stages
TIMEOUT = 20  # seconds of the collectives, where a host falls silent
# Steps enough to be killed among, and a learning rate at which other numbers of processes give the same loss.
LONG_RUN = {"max_steps": 60, "learning_rate": 1e-3}


# --- one result for any number of processes -----------------------------------------------------------------


def processes(bench: Bench) -> None:
    """1, 2, 4 processes x accumulation 1, 2, 4: the loss of each of 50 steps, and the weights at the end.

    Where answers are sampled there are 10 steps at a lower rate: what is sampled depends on what was learnt
    before, so a difference of rounding grows.
    """
    for stage in bench.stages:
        for optimizer in bench.optimizers:
            changes = {"max_steps": 10 if stage in runs.ROLLOUT_STAGES else 50, "batch_size": 16,
                       "log_interval": 1, "optimizer": optimizer, "learning_rate": RATES.get(stage, 1e-3),
                       "lora_dropout": 0 if stage == "lora" else None, "eval_interval": 0,
                       "save_interval": 50, "eval_fraction": 0, "max_seq_len": 96,
                       "no-packing": True if stage != "pretrain" else None}
            one, again = (run_on(bench, stage, 1, changes) for _ in range(2))
            bench.report(f"the same command twice: the same bits ({stage}, {optimizer})",
                         [difference(again, one)])
            losses, weights, problems = [], [], []
            for world_size in (1, 2, 4):
                for accumulation in (1, 2, 4):
                    rows = 16 // world_size // accumulation
                    other = run_on(bench, stage, world_size, changes | {"micro_batch_size": rows})
                    loss, weight = distance(other, one)
                    losses.append(loss)
                    weights.append(weight)
                    problems.append("" if max(loss, weight) < MAX_DISTANCE else
                                    f"{world_size} x {accumulation}: loss {loss:.1e}, weights {weight:.1e}")
            note = f"largest difference of a step's loss {max(losses):.1e}, of a weight {max(weights):.1e}"
            bench.report(f"1, 2, 4 processes x accumulation 1, 2, 4 ({stage}, {optimizer})", problems, note)


# --- ranks that die -----------------------------------------------------------------------------------------

# Runs the script that is its first argument, with its token caches in another folder.
LAUNCHER = """
import os, runpy, sys, time
from datetime import timedelta
from pathlib import Path
sys.path.insert(0, {root!r})
import dataset.token_cache, trainer.distributed
dataset.token_cache.CACHE_DIR = {cache!r}
if "TIMEOUT" in os.environ:  # seconds of the collectives
    trainer.distributed.TIMEOUT = timedelta(seconds=float(os.environ["TIMEOUT"]))
if "BUILD_SECONDS" in os.environ:  # how long a token cache takes at least
    class SlowWriter(dataset.token_cache.CacheWriter):
        def __enter__(self):
            Path({cache!r} + ".building").touch()
            time.sleep(float(os.environ["BUILD_SECONDS"]))
            return super().__enter__()
    dataset.token_cache.CacheWriter = SlowWriter
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Torchrun:
    """torchrun with two processes on a script, which can be harmed and timed."""

    def __init__(self, bench: Bench, out_dir: Path, *options: str, prefix=(), env=None, **changes):
        launcher = out_dir.with_name(f"{out_dir.name}.py")
        launcher.write_text(LAUNCHER.format(root=str(ROOT), cache=str(out_dir / "cache")), encoding="utf-8")
        self.metrics = out_dir / "pretrain" / "metrics.jsonl"
        self.log = out_dir.with_name(f"{out_dir.name}.log{bench.number}")
        bench.number += 1
        if not any("rdzv" in option for option in options):
            options = ("--nproc_per_node=2", f"--master_port={runs.free_port()}", *options)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "torch.distributed.run", *options, str(launcher),
                 str(ROOT / "trainer" / "train_pretrain.py"), *bench.flags("pretrain", out_dir, **changes)],
                stdout=log, stderr=subprocess.STDOUT, env=os.environ | (env or {}))

    def wait_for_lines(self, count: int) -> None:
        """Until metrics.jsonl has so many lines, or the run has ended."""
        def lines():
            return self.metrics.read_text().count("\n") if self.metrics.exists() else 0

        wait_until(lambda: self.process.poll() is not None or lines() >= count)

    def kill_rank(self, rank: int) -> None:
        agent = self.process.pid
        for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
            if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
                os.kill(int(pid), signal.SIGKILL)

    def wait(self) -> tuple[int | None, str]:
        """Exit code (None: the job hung and was killed) and output."""
        try:
            code = self.process.wait(runs.MAX_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = None
        return code, self.log.read_text(encoding="utf-8", errors="replace")


def ranks(bench: Bench) -> None:
    reference = run_on(bench, "pretrain", 2, LONG_RUN)
    dying_ranks(bench, LONG_RUN, reference)
    dying_ranks(bench, LONG_RUN | runs.FSDP, run_on(bench, "pretrain", 2, LONG_RUN | runs.FSDP))
    restarts(bench, reference)
    building_caches(bench)
    uneven_data(bench)
    other_numbers(bench)


def dying_ranks(bench: Bench, changes: dict, reference: Path) -> None:
    problems, seconds = [], []
    for number in range(max(2, bench.trials // 5)):
        out_dir, victim = bench.fresh(), number % 2
        job = Torchrun(bench, out_dir, **changes)
        job.wait_for_lines(bench.rng.randint(1, 5))
        time.sleep(bench.rng.uniform(0, 0.3))
        began = time.monotonic()
        job.kill_rank(victim)
        code, text = job.wait()
        seconds.append(time.monotonic() - began)
        problem = runs.damaged(out_dir / "pretrain") or runs.lost(out_dir / "pretrain")
        if code != 1:
            problem = ended_badly(code, text)
        problems.append(problem or difference(run_on(bench, "pretrain", 2, changes, out_dir), reference))
    kind = changes.get("parallel", "ddp")
    bench.report(f"one of two ranks is killed ({kind}): the job ends; --resume: the same bits", problems,
                 f"the job was down after {max(seconds):.1f} s at most")


def restarts(bench: Bench, reference: Path) -> None:
    problems = []
    for number in range(max(1, bench.trials // 10)):
        out_dir = bench.fresh()
        job = Torchrun(bench, out_dir, "--max-restarts=3", resume=True, **LONG_RUN)
        for lines in (2, 9):
            job.wait_for_lines(lines)
            job.kill_rank((number + lines) % 2)
        code, text = job.wait()
        restarted = code == 0 and "resumed at step" in text
        problems.append(difference(out_dir / "pretrain", reference) if restarted else ended_badly(code, text))
    bench.report("torchrun --max-restarts 3 with --resume, ranks killed twice: the same bits", problems)


def building_caches(bench: Bench) -> None:
    code, text = Torchrun(bench, bench.fresh(), env={"BUILD_SECONDS": "12", "TIMEOUT": "4"}).wait()
    bench.report("rank 0 builds the cache for three times the collective timeout: the others wait",
                 ["" if code == 0 else ended_badly(code, text)])
    bench.report("a run of two ranks ends without a warning",
                 [text if re.search("warn|error", text.lower()) else ""])

    out_dir = bench.fresh()
    job = Torchrun(bench, out_dir, env={"BUILD_SECONDS": "600"})
    wait_until((out_dir / "cache.building").exists)
    began = time.monotonic()
    job.kill_rank(0)
    code, text = job.wait()
    bench.report("rank 0 is killed while it builds the cache: the job ends",
                 ["" if code == 1 else ended_badly(code, text)], f"after {time.monotonic() - began:.1f} s")

    out_dir = bench.fresh()
    bad = out_dir / "bad.jsonl"
    bad.write_text('{"text": ""}\n')
    code, text = Torchrun(bench, out_dir, data_path=bad).wait()
    errors = re.findall("^(?:rank .: )?error:.*", text, re.MULTILINE)
    bench.report("rank 0 finds no usable record: the job ends with one complaint",
                 ["" if code == 1 and len(errors) == 1 else ended_badly(code, text)])


def uneven_data(bench: Bench) -> None:
    problems = []
    for rows, batch_size in ((3, 4), (5, 4), (7, 5), (1, 1)):
        data = bench.folder / f"rows{rows}.jsonl"
        data.write_text("".join(bench.texts.read_text().splitlines(keepends=True)[:rows]))
        changes = {"data_path": data, "batch_size": batch_size, "eval_fraction": 0, "no-packing": True,
                   "max_steps": 50, "log_interval": 1, "learning_rate": 1e-3}
        one, four = (run_on(bench, "pretrain", size, changes) for size in (1, 4))
        far = max(distance(four, one))
        problems.append("" if far < MAX_DISTANCE else f"{rows} rows: {far:.1e}")
    bench.report("3, 5, 7 and 1 rows on 4 ranks: no hang, and the result of one process", problems)


def other_numbers(bench: Bench) -> None:
    problems, distances = [], []
    changes = LONG_RUN | {"log_interval": 1, "max_steps": 50}
    one = run_on(bench, "pretrain", 1, changes)
    for before, after in ((1, 2), (2, 1), (4, 2)):
        out_dir = bench.fresh()
        checkpoints = out_dir / "pretrain" / "checkpoints"
        pids = runs.start_ranks("pretrain", bench.flags("pretrain", out_dir, **changes), out_dir, before)
        wait_until(lambda folder=checkpoints: len(list(folder.glob("step_*"))) > 1)
        for pid in pids:
            runs.kill(pid)
        far = max(distance(run_on(bench, "pretrain", after, changes, out_dir), one))
        distances.append(far)
        problems.append("" if far < MAX_DISTANCE else f"{before} then {after}: {far:.1e}")
    bench.report("killed and resumed with another number of processes", problems,
                 f"largest difference {max(distances):.1e}")


# --- hosts --------------------------------------------------------------------------------------------------


class Host:
    """A network namespace with one address, on a cable to the other one."""

    def __init__(self, number: int):
        self.address, self.cable = f"10.77.0.{number}", f"cable{number}"
        self.holder = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        ours = os.readlink("/proc/self/ns/net")
        wait_until(lambda: self.namespace() != ours)
        self.inside = ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net"]

    def namespace(self) -> str:
        return os.readlink(f"/proc/{self.holder.pid}/ns/net")

    def ip(self, *words: str) -> None:
        subprocess.run([*self.inside, "ip", *words], check=True)

    def die(self) -> None:
        """Kills all its processes at once, but for the holder, which keeps the namespace."""
        here = self.namespace()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # the process has ended meanwhile
                if os.readlink(process / "ns/net") == here and int(process.name) != self.holder.pid:
                    os.kill(int(process.name), signal.SIGKILL)

    def train(self, bench: Bench, out_dir: Path, endpoint: str) -> Torchrun:
        return Torchrun(
            bench, out_dir, "--nnodes=2", "--nproc_per_node=1", "--max-restarts=5", "--rdzv-backend=c10d",
            f"--rdzv-endpoint={endpoint}:29400", "--rdzv-id=faults", f"--local-addr={self.address}",
            f"--rdzv-conf=is_host={int(self.address == endpoint)}",
            prefix=self.inside,
            # By default torchrun does not tell a host that joins later about the store, and that host waits
            # in vain.
            env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": self.cable,
                 "TIMEOUT": str(TIMEOUT)}, resume=True, **LONG_RUN)


def hosts(bench: Bench) -> None:
    promise = "two hosts (network namespaces), one killed and started again: the same bits"
    reason = runs.why_no_mounts()
    if not reason and not shutil.which("ip"):
        reason = "there is no `ip` (iproute2)"
    if reason:
        bench.skip(promise, reason)
        return
    reference = run_on(bench, "pretrain", 2, LONG_RUN)
    one, two = Host(1), Host(2)
    try:
        one.ip("link", "add", one.cable, "type", "veth", "peer", "name", two.cable, "netns",
               str(two.holder.pid))
        for host in (one, two):
            host.ip("address", "add", f"{host.address}/24", "dev", host.cable)
            for device in ("lo", host.cable):
                host.ip("link", "set", device, "up")
        problems = [host_dies(bench, one, two, reference, unplugged=False)
                    for _ in range(max(1, bench.trials // 15))]
        bench.report(promise, problems)
        bench.report("a host falls silent (its cable is pulled), and another takes its place: the same bits",
                     [host_dies(bench, one, two, reference, unplugged=True)],
                     f"after the timeout, set to {TIMEOUT} s here")
    finally:
        for host in (one, two):
            host.holder.kill()
            host.holder.wait()


def host_dies(bench: Bench, one: Host, two: Host, reference: Path, unplugged: bool) -> str:
    """The second host dies while both train, and comes back. Returns what is wrong at the end, or ''."""
    out_dir = bench.fresh()
    first, second = (host.train(bench, out_dir, one.address) for host in (one, two))
    first.wait_for_lines(4)
    if unplugged:
        two.ip("link", "set", two.cable, "down")
        time.sleep(TIMEOUT + 5)
    two.die()
    second.wait()
    if first.process.poll() is not None:
        return f"the other host ended, too: {ended_badly(*first.wait())}"
    if unplugged:
        two.ip("link", "set", two.cable, "up")
    again = two.train(bench, out_dir, one.address)
    ends = [job.wait() for job in (first, again)]
    for code, text in ends:
        if code:
            return ended_badly(code, text)
    if "resumed at step" not in ends[0][1]:
        return "nothing was resumed"
    return difference(out_dir / "pretrain", reference)
