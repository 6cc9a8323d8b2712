"""Measures how time and memory grow, beside the formulas for them: figures and tables of docs/scaling.md.

    python benchmarks/growth.py --plot scaling.png --json scaling.json   # all panels: minutes
    python benchmarks/growth.py --panels length processes --device cuda
    python benchmarks/growth.py --on_paper        # 1B and 7B models on 1, 8, 64 GPUs; measures nothing

Every point is a real training step (CausalLM, its loss, our optimizer, autocast) in processes of its own,
under torchrun where there are several. On a CPU each process computes with one thread, and time is the CPU
time of all processes together, the median over steps. Other users of the machine hardly change it, but it
does not show waiting, so the wall clock stands beside it. On CUDA both are the wall clock. Memory is the most
that the first process held beyond its imports; beside it stands what benchmarks/formulas.py predicts.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import COLORS, drop_gradients, json_of, markdown, new_figure, save_picture, take_step
from common.cli import ROOT, Parser, run_script
from common.files import json_text, write_whole

BASE = {"width": 128, "rows": 16, "length": 128, "processes": 1}  # 2.3 million parameters, 2,048 tokens
PANELS = {  # what grows: (the title, the points, what differs from BASE at each)
    "width": ("parameters (millions)", (64, 128, 256, 384), lambda x: {"width": x}),
    "length": ("tokens in a row, 2,048 in a step", (64, 128, 256, 512, 1024, 2048),
               lambda x: {"length": x, "rows": 2048 // x}),
    "batch": ("rows of 128 tokens in a step", (1, 4, 16, 64), lambda x: {"rows": x}),
    "processes": ("processes, 16 rows in all", (1, 2, 4), lambda x: {"processes": x}),
    "file": ("megabytes of JSONL", (1, 4, 16), None),
}
WARM_UP = 2  # steps that are not counted
MB = 1e6  # bytes


def main(args):
    if args.on_paper:
        from benchmarks.formulas import on_paper

        print(on_paper())
        return
    if args.point:
        found = measure(json.loads(args.point), args)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return
    panels = {}
    for name in args.panels:
        _, points, differs = PANELS[name]
        panels[name] = []
        for x in args.points or points:
            found = read_file(x, args) if name == "file" else in_own_process(BASE | differs(x), args)
            panels[name].append({"x": x} | found)
            print(f"{name} {x}: {json.dumps(found)}", file=sys.stderr, flush=True)
    for name, points in panels.items():
        print(f"\n{table(name, points)}")
    if args.json:
        settings = {"base": BASE, "optimizer": args.optimizer, "device": args.device, "steps": args.steps}
        write_whole(args.json, json_text({"settings": settings, "panels": panels}))
    if args.plot:
        draw(panels, args.plot)


# --- one point, in processes of its own ---------------------------------------------------------------------


def in_own_process(point: dict, args) -> dict:
    """What `measure` returns for a point, which may ask for several processes."""
    command = [sys.executable, __file__, "--point", json.dumps(point), "--device", args.device,
               "--steps", args.steps, "--optimizer", args.optimizer]
    if point["processes"] > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", point["processes"]]
    return json_of(command, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))


def measure(point: dict, args) -> dict:
    """Takes real steps as one of point["processes"] processes. Returns what they took, in seconds and bytes.
    """
    import torch

    from benchmarks import formulas
    from benchmarks.memory import forget_peak, resident
    from model.transformer import CausalLM
    from trainer.distributed import join_ranks, leave_ranks, parallelise
    from trainer.optim import build_optimizers

    ranks = join_ranks(args.device)
    device, several = ranks.device, ranks.world_size > 1
    on_gpu, config = device.type == "cuda", formulas.shape(point["width"])

    def prepare(config):
        torch.manual_seed(0)
        model = CausalLM(config).train()
        replica = parallelise(model, "ddp", torch.bfloat16, ranks)
        return replica, build_optimizers(model, args.optimizer, 1e-4, 0.0)

    def step(replica, optimizers, rows, length):
        ids = torch.randint(config.vocab_size, (rows, length), device=device)  # the same at every width
        take_step(replica, optimizers, {"input_ids": ids, "labels": ids}, torch.bfloat16)
        drop_gradients(optimizers)
        if on_gpu:
            torch.cuda.synchronize()

    step(*prepare(formulas.shape(64)), 1, 8)  # what PyTorch loads at first use counts as imports
    before = 0 if on_gpu else resident("VmRSS")
    rows, length = point["rows"] // ranks.world_size, point["length"]
    replica, optimizers = prepare(config)
    forget_peak(device.type)
    cpu_times, wall_times, traffic = [], [], []
    for _ in range(WARM_UP + args.steps):
        began, cpu_began, sent_before = time.perf_counter(), time.process_time(), loopback_bytes()
        step(replica, optimizers, rows, length)
        wall_times.append(time.perf_counter() - began)
        cpu_time, sent = time.process_time() - cpu_began, loopback_bytes() - sent_before
        cpu_times.append(ranks.sum(cpu_time)[0])
        traffic.append(sent / ranks.world_size if several else 0)
    if on_gpu:
        held, tensors = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    else:
        held = resident("VmHWM") - before
        tensors = most_allocated(lambda: step(replica, optimizers, rows, length))
        tensors += between_steps(replica, optimizers, ddp=several)
    leave_ranks(ranks)
    muon = args.optimizer == "muon"
    flops = formulas.flops_per_token(config, length) * point["rows"] * length
    if muon:
        flops += formulas.muon_flops(config)
    return {"parameters": sum(parameter.numel() for parameter in replica.parameters()),
            "seconds": median(wall_times if on_gpu else cpu_times), "wall": median(wall_times),
            "tensors": tensors, "held": held, "sent": median(traffic), "flops": flops,
            "predicted": formulas.peak(config, rows, length, args.optimizer, device.type, several),
            "predicted_sent": formulas.sent(config, ranks.world_size, "DDP", muon=muon)}


def median(of_steps: list[float]) -> float:
    """Over the steps after the warm-up."""
    return statistics.median(of_steps[WARM_UP:])


def most_allocated(step) -> int:
    """The most bytes of CPU tensors that a step holds beyond those there before it, counted by PyTorch."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def between_steps(replica, optimizers: list, ddp: bool) -> int:
    """Bytes of the tensors that stay from one step to the next. DDP keeps the memory of the gradients."""
    weights = sum(parameter.nbytes for parameter in replica.parameters())
    moments = 0
    for optimizer in optimizers:
        for state in optimizer.state.values():
            moments += sum(value.nbytes for value in state.values())
    return moments + (2 * weights if ddp else weights)


def loopback_bytes() -> int:
    """Bytes that processes of this machine have sent each other by network; 0 where Linux does not say so."""
    table = Path("/proc/net/dev")
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    return sum(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def read_file(megabytes: float, args) -> dict:
    """Two starts on a JSONL file of that size, by benchmarks/data.py: seconds to the first batch, memory."""
    from benchmarks.data import write_big
    from dataset.synthetic import ensure_world

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "texts.jsonl")
        texts = args.data_path or [ensure_world(ROOT / "out" / "world")["pretrain"]]
        write_big(path, int(megabytes * 1e6), texts)
        command = [sys.executable, ROOT / "benchmarks" / "data.py", path, "--child", "--work_dir", folder,
                   "--draw", 0]
        found = {}
        for start in ("first", "second"):
            child = json_of(command)
            found[start] = child["open"] + child["packed"]["first_batch"]
            found[f"{start}_peak"] = child["packed"]["peak"] - child["imports"]
        return found | {"tokens": child["tokens"]}


# --- what is printed and drawn ------------------------------------------------------------------------------


def table(name: str, points: list[dict]) -> str:
    """The Markdown table of a panel. The rate is that of the FLOPs that the formulas count."""
    import pandas as pd

    found = pd.DataFrame(points)

    def cells(column: str, form: str, unit: float = 1) -> pd.Series:
        return (found[column] / unit).map(f"{{:{form}}}".format)

    if name == "file":
        return markdown({
            "MB of JSONL": found["x"], "tokens": cells("tokens", ",.0f"),
            "first start (s)": cells("first", ".1f"), "second start (s)": cells("second", ".2f"),
            "MB held": cells("first_peak", ",.0f", MB), "second start": cells("second_peak", ",.0f", MB)})
    found["rate"] = found["flops"] / found["seconds"]
    found["predicted"] = found["predicted"].map(lambda parts: sum(parts.values()))
    return markdown({
        name: found["x"], "parameters": cells("parameters", ",.0f"),
        "CPU s a step": cells("seconds", ".3f"), "wall": cells("wall", ".3f"),
        "GFLOP/s": cells("rate", ",.0f", 1e9), "MB of tensors": cells("tensors", ",.1f", MB),
        "MB predicted": cells("predicted", ",.1f", MB), "MB held": cells("held", ",.0f", MB),
        "MB sent by each": cells("sent", ",.1f", MB),
        "MB sent, predicted": cells("predicted_sent", ",.1f", MB)})


def draw(panels: dict, path: Path) -> None:
    """A column for each panel: time above, memory below, both against what the formulas say."""
    figure, axes = new_figure(2.7 * len(panels), 5.2, 2, len(panels))
    for (above, below), (name, points) in zip(axes.T, panels.items(), strict=True):
        draw_file(above, below, points) if name == "file" else draw_steps(above, below, name, points)
        x = places(name, points)
        for ax, unit in ((above, "seconds" if name == "file" else "seconds a step"), (below, "MB")):
            ax.set(xscale="log", xlabel=PANELS[name][0], ylabel=unit)
            ax.set_xticks(x, [f"{round(value, 1):g}" for value in x], fontsize=7)
            ax.minorticks_off()
            ax.tick_params(axis="y", labelsize=8)
            ax.grid(alpha=0.3)
        above.set_yscale("log", base=2)
        above.margins(y=0.25)  # room for two ticks
        above.yaxis.set_major_formatter("{x:.2g}")
        below.set_ylim(bottom=0)
        above.legend(frameon=False, fontsize=8)
    parts, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(parts, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    save_picture(figure, path)


def places(name: str, points: list[dict]) -> list[float]:
    """Where the points of a panel stand on its horizontal axis."""
    return [p["parameters"] / 1e6 if name == "width" else p["x"] for p in points]


def draw_file(above, below, points: list[dict]) -> None:
    x = places("file", points)
    for start, color in zip(("first", "second"), COLORS, strict=False):
        above.plot(x, [p[start] for p in points], "o-", color=color, label=f"{start} start")
        below.plot(x, [p[f"{start}_peak"] / 1e6 for p in points], "o-", color=color)


def draw_steps(above, below, name: str, points: list[dict]) -> None:
    from benchmarks.formulas import PARTS

    x = places(name, points)
    rate = max(p["flops"] / p["seconds"] for p in points)  # the best of the panel
    above.plot(x, [p["flops"] / rate for p in points], "--", color="black", label="FLOPs")
    above.plot(x, [p["seconds"] for p in points], "o-", color=COLORS[0], label="CPU time")
    if name == "processes":
        above.plot(x, [p["wall"] for p in points], "o-", color=COLORS[1], label="wall clock")
    below.stackplot(x, *([p["predicted"][part] / 1e6 for p in points] for part in PARTS),
                    labels=PARTS, colors=("#9aa5b1", "#d55e00", "#f0e442", "#56b4e9", "#cc79a7"))
    for key, mark, label in (("tensors", "o", "tensors, counted"), ("held", "x", "process")):
        below.plot(x, [p[key] / 1e6 for p in points], mark, color="black", label=label)


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--on_paper", action="store_true", help="print the tables of docs/scaling.md and end")
    parser.add_argument("--panels", nargs="+", choices=list(PANELS), default=list(PANELS), metavar="NAME",
                        help="what grows: " + ", ".join(PANELS))
    parser.add_argument("--points", nargs="+", type=int, metavar="N", help="instead of the panel's own")
    parser.add_argument("--data_path", nargs="+", type=Path, metavar="FILE",
                        help="texts that fill the files (default: the embedded world's)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where")
    parser.add_argument("--optimizer", default="muon", choices=["muon", "adamw"], help="of the steps")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="counted at each point")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them into this PNG")
    parser.add_argument("--point", help=argparse.SUPPRESS)  # in a process of its own
    run_script(main, parser.parse_args())
