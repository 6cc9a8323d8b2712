"""Everything about Seedling on one GPU, in at most 8 minutes: is it right, is it fast, does it learn?

    python benchmarks/gpu.py                                      # all parts, on CUDA
    python benchmarks/gpu.py --parts logits packing decoding      # some of them
    python benchmarks/gpu.py --device cpu --smoke                 # tiny shapes: tries the program itself

What tells most comes first. Every line is printed, and appended to out/gpu/lines.jsonl, as soon as it is
known. At the end the same lines are in out/gpu/result.json, and as a table in out/gpu/result.md. Neither a
network nor data is needed. What needs peft or bitsandbytes is left out where they are not installed, and a
line says so.

The parts run in a process of their own, one after the other. A part that fails, hangs or breaks CUDA costs
its own lines only: after it the next part begins, if necessary in a new process. The first question is
answered in gpu_checks.py and gpu_runs.py, the other two in gpu_speed.py.
"""

import argparse
import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ROOT, Parser, positive, run_script
from common.errors import RunError
from common.files import json_text, write_whole

SECONDS_TO_START = 40  # Python, torch and the first call of CUDA
PARTS = {  # name: (file, seconds that it may take); a function of the file has this name
    "machine": ("gpu_speed", 30),
    # Is it right?
    "logits": ("gpu_checks", 40),
    "packing": ("gpu_checks", 60),
    "head": ("gpu_checks", 20),
    "decoding": ("gpu_checks", 30),
    "lora": ("gpu_checks", 20),
    "qlora": ("gpu_checks", 40),
    "grpo": ("gpu_checks", 20),
    "loop": ("gpu_runs", 60),
    "resume": ("gpu_runs", 40),
    "nccl": ("gpu_runs", 30),
    "fsdp": ("gpu_runs", 40),
    # Is it fast?
    "train_1b": ("gpu_speed", 80),
    "train_104m": ("gpu_speed", 70),
    "decode": ("gpu_speed", 60),
    "lora_1b": ("gpu_speed", 40),
    "rollouts": ("gpu_speed", 30),
    "train_26m": ("gpu_speed", 30),
    "compiled": ("gpu_runs", 50),
    # Does it learn?
    "quickstart": ("gpu_speed", 170),
}
WRONG, FAILED, LEFT_OUT = "WRONG", "FAILED", "left out"  # verdicts; the good one is "right"


class Lines:
    """All lines so far. Each is on the disk before the next one is measured."""

    def __init__(self, out: Path):
        self.out, self.all = out, []
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "lines.jsonl", "")

    def add(self, part: str, what: str, verdict: str = "", figures: dict | None = None) -> None:
        line = {"part": part, "what": what, "verdict": verdict, "figures": figures or {}}
        self.all.append(line)
        with (self.out / "lines.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(" | ".join(cell for cell in cells(line) if cell), flush=True)

    def finish(self) -> None:
        """Writes the JSON and the table of all lines."""
        write_whole(self.out / "result.json", json_text(self.all))
        rows = ["| part | what | verdict | figures |", "|---|---|---|---|"]
        rows += ["| " + " | ".join(cells(line)) + " |" for line in self.all]
        write_whole(self.out / "result.md", "\n".join(rows) + "\n")
        print(f"\nwritten: {self.out / 'result.json'}, {self.out / 'result.md'}")


def cells(line: dict) -> list[str]:
    figures = ", ".join(f"{name} {number(value)}" for name, value in line["figures"].items())
    return [line["part"], line["what"], line["verdict"], figures]


def number(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# --- the process that watches -------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    if args.work:
        work(args)
        return
    lines, ends = Lines(args.out_dir), time.monotonic() + 60 * args.minutes
    left = [name for name in PARTS if name in args.parts]
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            while left and time.monotonic() < ends:
                left = watch_worker(left, args, folder, ends, lines)
        for part in left:
            lines.add(part, f"{args.minutes:g} minutes are over", LEFT_OUT)
    finally:
        lines.finish()
    bad = [line for line in lines.all if line["verdict"] in (WRONG, FAILED)]
    if bad:
        raise RunError(f"{len(bad)} of {len(lines.all)} lines are {WRONG} or {FAILED}: the first is "
                       f"{bad[0]['part']}, {bad[0]['what']}")


def watch_worker(parts: list[str], args, folder: str, ends: float, lines: Lines) -> list[str]:
    """Starts a process that works through the parts. Returns those that are left when it has ended."""
    minutes = str(max(1, ends - time.monotonic()) / 60)
    command = [sys.executable, __file__, "--work", folder, "--device", args.device, "--minutes", minutes,
               "--parts", *parts, *["--smoke"] * args.smoke]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace",
                              env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    said: queue.Queue[str | None] = queue.Queue()

    def listen():
        for text in worker.stdout:
            said.put(text)
        said.put(None)  # the worker has ended

    threading.Thread(target=listen, daemon=True).start()
    left, limit = list(parts), SECONDS_TO_START + seconds_for(parts[0], args)
    began = time.monotonic()
    try:
        while left:
            try:
                text = said.get(timeout=max(0, min(began + limit, ends) - time.monotonic()))
            except queue.Empty:
                lines.add(left.pop(0), f"stopped after {time.monotonic() - began:.0f} seconds", FAILED)
                break
            if text is None:
                lines.add(left.pop(0), f"its process ended with exit code {worker.wait()}", FAILED)
                break
            answer = json.loads(text)
            if "ended" in answer:
                left.remove(answer["ended"])
                began, limit = time.monotonic(), seconds_for(left[0], args) if left else 0
            else:
                lines.add(**answer)
    finally:
        worker.kill()
        worker.wait()
    return left


def seconds_for(part: str, args) -> float:
    return PARTS[part][1] * (3 if args.smoke else 1)  # a CPU takes longer, above all to compile


# --- the process that works ---------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    """Prints each line of each part as JSON. After an error that breaks CUDA this process ends."""
    import gc

    import torch

    from benchmarks.gpu_checks import Run, Skip
    from common.device import choose_device
    from common.files import one_line

    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is no answer

    def say(**answer):
        print(json.dumps(answer), file=answers, flush=True)

    device, ends = choose_device(args.device), time.monotonic() + 60 * args.minutes
    for part in args.parts:
        module, _ = PARTS[part]
        seconds = min(seconds_for(part, args), ends - time.monotonic())
        run = Run(device, args.smoke, Path(args.work), seconds)
        is_broken = False
        try:
            torch.manual_seed(0)
            for line in getattr(importlib.import_module(f"benchmarks.{module}"), part)(run):
                say(part=part, **line)
        except Skip as reason:
            say(part=part, what=str(reason), verdict=LEFT_OUT)
        except Exception as error:  # one failing part never stops the rest
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            say(part=part, what=f"{type(error).__name__} in {where}: {one_line(error)}", verdict=FAILED)
        gc.collect()
        if run.on_gpu:
            try:  # after some errors CUDA computes nothing any more in this process
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            except RuntimeError:
                is_broken = True
        say(ended=part)
        if is_broken:
            break


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with --smoke")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and single steps")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help="what to run: " + ", ".join(PARTS))
    parser.add_argument("--minutes", type=positive, default=8, metavar="M", help="for everything")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "gpu", metavar="DIR")
    parser.add_argument("--work", metavar="DIR", help=argparse.SUPPRESS)  # the process that works; its folder
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.smoke:
        parser.error("--device cpu needs --smoke: real shapes would take hours on a CPU")
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
