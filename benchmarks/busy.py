"""How fast training is beside other programs that want the same cores.

    python benchmarks/busy.py                                # tiny and 26m beside 0, 1, 2 and 4 processes
    python benchmarks/busy.py --ways ours "OMP_WAIT_POLICY=PASSIVE" "GOMP_SPINCOUNT=1000" OMP_NUM_THREADS=1

A busy process computes nothing and never rests. Each way trains in a process of its own. "ours" is what the
training scripts do (common/threads.py); "plain" is PyTorch as it is; anything else is a variable of the
environment, which is read when PyTorch is loaded. The ways take turns. Figures are medians of the rounds, in
tokens a second, and as a share of what the same way reaches on the idle machine.
"""

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import shared
from common.cli import Parser, positive, run_script
from common.files import json_text, write_whole

# The quickstart's SFT, and pretraining: preset -> rows, tokens of a row, optimizer
STEPS = {"tiny": (16, 128, "muon"), "26m": (8, 512, "adamw")}
SETTLE = 1.5  # seconds of training before the clock starts, within which the threads notice the others


def main(args):
    if args.worker:
        work(args)
        return
    rows, found = [], []
    for preset in args.presets:
        for _ in range(args.rounds):
            found += [{"preset": preset, "way": way, "busy": count, "rate": rate}
                      for count in args.busy for way, rate in measure(preset, count, args).items()]
    import pandas as pd

    rates = pd.DataFrame(found).groupby(["preset", "way", "busy"], sort=False)["rate"].median()
    for preset in args.presets:
        for way in args.ways:
            row = {"preset": preset, "threads wait": way}
            for count in args.busy:
                rate, idle = rates[preset, way, count], rates[preset, way, args.busy[0]]
                row[f"beside {count}"] = f"{rate:,.0f} ({rate / idle:.2f})"
            rows.append(row)
    print(shared.markdown(rows))
    if args.json:
        write_whole(args.json, json_text(found))


def measure(preset: str, count: int, args) -> dict[str, float]:
    """way -> tokens a second of the training step beside `count` busy processes."""
    rates = {}
    for way in args.ways:
        name, _, value = way.partition("=")
        command = [sys.executable, __file__, "--worker", way, "--presets", preset, "--seconds", args.seconds]
        with busy(count):
            rates[way] = shared.json_of(command, **({name: value} if value else {}))["rate"]
        print(f"{preset} beside {count}, {way}: {rates[way]:,.0f} tokens/s", flush=True)
    return rates


@contextmanager
def busy(count: int):
    """Within the block that many processes never rest."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def work(args) -> None:
    """A process that trains, and says how fast."""
    import torch

    from common.device import choose_dtype, keep_freed_memory
    from common.threads import wait_as_others_allow
    from model.config import preset
    from model.transformer import CausalLM
    from trainer.optim import build_optimizers

    keep_freed_memory()
    if args.worker == "ours":
        wait_as_others_allow()
    torch.manual_seed(0)
    [name] = args.presets
    rows, length, optimizer = STEPS[name]
    model = CausalLM(preset(name)).train()
    optimizers = build_optimizers(model, optimizer, 1e-3, 0.0)
    ids = torch.randint(model.config.vocab_size, (rows, length))
    batch = {"input_ids": ids, "labels": ids}
    dtype = choose_dtype("auto", torch.device("cpu"))

    def train(seconds: float) -> float:
        steps, began = 0, time.perf_counter()
        while time.perf_counter() < began + seconds:
            shared.take_step(model, optimizers, batch, dtype)
            shared.drop_gradients(optimizers)
            steps += 1
        return steps * ids.numel() / (time.perf_counter() - began)

    train(SETTLE)
    print(json.dumps({"rate": train(args.seconds)}))


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--presets", nargs="+", choices=list(STEPS), default=list(STEPS), metavar="NAME",
                        help="shapes: " + ", ".join(STEPS))
    parser.add_argument("--ways", nargs="+", default=["plain", "ours"], metavar="WAY",
                        help="plain, ours, or a variable of the environment with its value")
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1, 2, 4], metavar="N",
                        help="how many busy processes; the first number is what the others are compared with")
    parser.add_argument("--seconds", type=positive, default=8.0, metavar="S", help="that each figure takes")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns that each way gets")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--worker", help="for this program's own processes")
    run_script(main, parser.parse_args())
