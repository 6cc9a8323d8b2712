"""How time and memory grow, measured and on paper: the figures and tables of docs/scaling.md.

    python scripts/bench_scaling.py --plot scaling.png --json scaling.json   # all panels: minutes
    python scripts/bench_scaling.py --panels length processes --device cuda
    python scripts/bench_scaling.py --on_paper        # 1B and 7B models on 1, 8, 64 GPUs; measures nothing

Every point is a real training step (CausalLM, its loss, our optimizer, autocast) in processes of its own,
under torchrun where there are several. On a CPU each process computes with one thread, and time is the CPU
time of all processes together, the median over steps: other users of the machine hardly move it, but it does
not show waiting, so the wall clock is told as well. On CUDA both are the wall clock. Memory is the most that
the first process held beyond its imports; beside it stands what the formulas below predict.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.transformer import BLOCK, LONGEST_BLOCKED, LOSS_CHUNK, CausalLM, ModelConfig
from trainer.args import ROOT, Parser, run_script
from trainer.optim import AT_ONCE

BASE = {"width": 128, "rows": 16, "length": 128, "processes": 1}  # 2.3 million parameters, 2,048 tokens
PANELS = {  # what grows: (the title, the points, what differs from BASE at each)
    "width": ("parameters (millions)", (64, 128, 256, 384), lambda x: {"width": x}),
    "length": ("tokens in a row, 2,048 in a step", (64, 128, 256, 512, 1024, 2048),
               lambda x: {"length": x, "rows": 2048 // x}),
    "batch": ("rows of 128 tokens in a step", (1, 4, 16, 64), lambda x: {"rows": x}),
    "processes": ("processes, 16 rows in all", (1, 2, 4), lambda x: {"processes": x}),
    "file": ("megabytes of JSONL", (1, 4, 16), None),
}
STATE, GRADIENTS, COPIES, ACTIVATIONS, WORK = PARTS = (
    "weights, optimizer", "gradients", "bf16 copies of weights", "activations", "work space")


def shape(width: int) -> ModelConfig:
    """The 26m preset, wider or narrower: heads of 64, a quarter as many key/value heads."""
    return ModelConfig(hidden_size=width, num_attention_heads=width // 64,
                       num_key_value_heads=max(1, width // 256), intermediate_size=width * 11 // 4)


# ---------------------------------------------------------------- formulas: numbers, FLOPs, bytes


def count(config: ModelConfig) -> dict[str, int]:
    """Parameters by kind: matrices of the blocks, vectors (gains, biases), embedding, head unless tied."""
    c, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    matrices = 2 * c * q + 2 * c * kv + 3 * c * f  # q and o; k and v; gate, up and down
    vectors = 2 * c + 2 * d * config.qk_norm + (q + 2 * kv) * config.attention_bias
    return {"matrices": config.num_hidden_layers * matrices,
            "vectors": config.num_hidden_layers * vectors + c,
            "embedding": config.vocab_size * c,
            "head": 0 if config.tie_word_embeddings else config.vocab_size * c}


def multiplied(config: ModelConfig) -> int:
    """Weights that each token is multiplied by: the matrices of the blocks, and the head, tied or not."""
    return count(config)["matrices"] + config.vocab_size * config.hidden_size


def flops_per_token(config: ModelConfig, length: int) -> int:
    """Of a training step: 2 FLOPs a weight forward, 4 backward; and causal attention, of T / 2 keys each."""
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return 6 * (multiplied(config) + attention)


def muon_flops(config: ModelConfig) -> int:
    """Of one optimizer step, whatever the batch: five times X X^T, its square, and their product with X."""
    c, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes = [(q, c), (c, q), (kv, c), (kv, c), (f, c), (f, c), (c, f)]
    return layers * sum(5 * 2 * (2 * min(m) ** 2 * max(m) + min(m) ** 3) for m in shapes)


def state(config: ModelConfig, method: str) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer between two steps. LoRA: rank 16 on all linear layers."""
    kinds = count(config)
    total, matrices, vectors = sum(kinds.values()), kinds["matrices"], kinds["vectors"]
    if method in ("lora", "qlora"):
        c, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        adapters = layers * 16 * (2 * (c + q) + 2 * (c + kv) + 3 * (c + f))  # A and B: in + out, times rank
        # NF4: half a byte, a byte of scale for 64 weights, and 4 bytes for 256 scales.
        frozen = matrices * (2 if method == "lora" else 1 / 2 + 1 / 64 + 4 / 64 / 256)
        return {"weights": frozen + 2 * (total - matrices - vectors) + 4 * vectors + 4 * adapters,
                "gradients": 4 * adapters, "optimizer": 8 * adapters}
    optimizer = {"adamw": 8 * total,  # two moments in float32
                 "muon": 4 * matrices + 8 * (total - matrices),  # one for the matrices
                 # bytes, and for 256 of them a float32 scale; what is small stays float32
                 "adamw8bit": (2 + 8 / 256) * (total - vectors) + 8 * vectors}[method]
    return {"weights": 4 * total, "gradients": 4 * total, "optimizer": optimizer}


def block_activations(config: ModelConfig, length: int, device: str) -> int:
    """Bytes a token that one block keeps for its backward pass under bfloat16 autocast."""
    c, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    q, kv = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    norms = 2 * (4 * c + 4 + 2 * c)  # each keeps its result in float32 and hands on a bfloat16 copy
    norms += (4 * (q + kv) + 4 * (heads + config.num_key_value_heads)) * config.qk_norm
    attention = 2 * (2 * q + 2 * kv)  # q, k, v and the output in bfloat16
    # On a CPU blocks of queries keep a probability for each key that they may see: half of the row, and
    # half a block. Fused attention, which long rows and GPUs take, keeps one float32 for each query instead.
    blocked = device == "cpu" and length <= LONGEST_BLOCKED
    attention += 2 * heads * (length + min(length, BLOCK)) // 2 if blocked else 4 * heads
    return norms + attention + 2 * 4 * f  # gate, silu(gate), up and their product


def activations(config: ModelConfig, rows: int, length: int, device: str, checkpointing=False) -> int:
    """Bytes that a forward pass keeps. Checkpointing: each block's input, all of one block at a time, and no
    block while the head's are there."""
    c, layers, block = config.hidden_size, config.num_hidden_layers, block_activations(config, length, device)
    head = 6 * c + 4 + 4 * config.vocab_size  # the last norm, and log-probabilities in float32
    kept = layers * 4 * c + max(block, head) if checkpointing else layers * block + head
    return rows * length * kept


def peak(config: ModelConfig, rows: int, length: int, optimizer: str, device: str, ddp: bool) -> dict:
    """Predicted bytes by part, at whichever of two moments takes more: when the loss is known, activations
    being there and no gradient yet (DDP keeps their memory), or in the optimizer step, when it is the other
    way round."""
    sizes = state(config, optimizer)
    fixed = sizes["weights"] + sizes["optimizer"]
    loss = {STATE: fixed, GRADIENTS: sizes["gradients"] * ddp, COPIES: 2 * multiplied(config),
            ACTIVATIONS: activations(config, rows, length, device),
            WORK: 8 * config.vocab_size * min(rows * length, LOSS_CHUNK)}  # two gradients in float32
    step = {STATE: fixed, GRADIENTS: sizes["gradients"]}
    if optimizer == "muon":  # of all gates and ups at once: gradients looked ahead, stacked, in bfloat16
        gates_and_ups = 2 * config.num_hidden_layers * config.hidden_size * config.intermediate_size
        step[WORK] = (4 + 4 + 2) * min(gates_and_ups, AT_ONCE)
    larger = max(loss, step, key=lambda parts: sum(parts.values()))
    return {part: larger.get(part, 0) for part in PARTS}


def sent(config: ModelConfig, ranks: int, engine: str, micro_batches: int = 1, muon: bool = False) -> float:
    """Bytes that each rank sends in a step, in rings, as NCCL and gloo do: of all but its own part.

    DDP all-reduces float32 gradients, which go round twice, 4 + 4. FSDP2 gathers a block's bfloat16 weights
    before its forward and its backward pass (those of embedding and head once, in float32) and reduces and
    scatters float32 gradients, 2 + 2 + 4: for each micro-batch anew. With Muon the ranks exchange bfloat16
    updates of the matrices, 2; and before that, where they are cut up, what is to be orthogonalised, 4.
    """
    total = 8 * sum(count(config).values()) * (1 if engine == "DDP" else micro_batches)
    total += muon * (2 if engine == "DDP" else 6) * count(config)["matrices"]
    return (ranks - 1) / ranks * total


# ---------------------------------------------------------------- one point, in processes of its own


def measure(point: dict, args) -> dict:
    """Takes real steps as one rank of point["processes"]; returns what they took, in seconds and bytes."""
    import torch

    from scripts.bench_memory import forget_peak, resident
    from trainer.distributed import autocast, join_ranks, leave_ranks, parallelise
    from trainer.optim import build_optimizers

    ranks = join_ranks(args.device)
    device, on_gpu, several = ranks.device, ranks.device.type == "cuda", ranks.world_size > 1

    def prepare(config):
        torch.manual_seed(0)
        model = CausalLM(config).train()
        replica = parallelise(model, "ddp", torch.bfloat16, ranks)
        return replica, build_optimizers(model, args.optimizer, 1e-4, 0.0)

    def step(replica, optimizers, rows, length):
        ids = torch.randint(6400, (rows, length), device=device)
        with autocast(device, torch.bfloat16):
            loss = replica(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(replica.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()

    step(*prepare(shape(64)), 1, 8)  # what PyTorch loads when it is first used counts as imports
    before = 0 if on_gpu else resident("VmRSS")
    config = shape(point["width"])
    work = *prepare(config), point["rows"] // ranks.world_size, point["length"]
    forget_peak(device.type)
    used = []
    for _ in range(args.steps + 2):
        began = time.process_time(), time.perf_counter(), loopback()
        step(*work)
        ended = time.process_time(), time.perf_counter(), loopback()
        cpu, wall, traffic = (b - a for a, b in zip(began, ended, strict=True))
        used.append((wall if on_gpu else ranks.sum(cpu)[0], wall, several * traffic / ranks.world_size))
    seconds, wall, traffic = map(statistics.median, zip(*used[2:], strict=True))  # the first two warm up
    held = torch.cuda.max_memory_reserved() if on_gpu else resident("VmHWM") - before
    tensors = torch.cuda.max_memory_allocated() if on_gpu else most_allocated(lambda: step(*work))
    if not on_gpu:  # and what was there before the step: DDP keeps the gradients' memory between steps
        states = [state for optimizer in work[1] for state in optimizer.state.values()]
        there = [*work[0].parameters(), *(value for state in states for value in state.values())]
        tensors += sum(tensor.nbytes for tensor in there)
        tensors += several * sum(parameter.nbytes for parameter in work[0].parameters())
    leave_ranks(ranks)
    tokens = point["rows"] * point["length"]
    muon = args.optimizer == "muon"
    return {"parameters": sum(parameter.numel() for parameter in work[0].parameters()),
            "seconds": seconds, "wall": wall, "tensors": tensors, "held": held, "sent": traffic,
            "flops": flops_per_token(config, point["length"]) * tokens + muon * muon_flops(config),
            "predicted": peak(config, *work[2:], args.optimizer, device.type, several),
            "predicted_sent": sent(config, ranks.world_size, "DDP", muon=muon)}


def most_allocated(step) -> int:
    """The most bytes of CPU tensors that a step holds beyond those there before it, counted by PyTorch."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = sorted((e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"),
                    key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def loopback() -> int:
    """Bytes that processes of this machine sent each other by network so far; 0 where Linux can't tell."""
    table = Path("/proc/net/dev")
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    return sum(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def in_own_process(point: dict, args) -> dict:
    """What `measure` returns for a point, which may ask for several processes."""
    command = [sys.executable, __file__]
    if point["processes"] > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                        str(point["processes"])]
    command += ["--point", json.dumps(point), "--device", args.device, "--steps", str(args.steps),
                "--optimizer", args.optimizer]
    return answer(command)


def answer(command: list) -> dict:
    """The JSON on the last line that a command prints. Raises UsageError where it fails."""
    from trainer.args import UsageError

    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    ended = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True,
                           env=environment)
    if ended.returncode:
        raise UsageError("a measurement failed; what it printed is above")
    return json.loads(ended.stdout.splitlines()[-1])


def read_file(megabytes: float, args) -> dict:
    """Two starts on a JSONL file of that size, by bench_data.py: seconds to the first batch, memory."""
    from dataset.synthetic import ensure_world
    from scripts.bench_data import write_big

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "texts.jsonl")
        texts = args.data_path or [ensure_world(ROOT / "out" / "world")["pretrain"]]
        write_big(path, int(megabytes * 1e6), texts)
        # Through a shell: a process begins with the peak of the one that starts it, and ours has torch.
        command = ["sh", "-c", '"$@" || exit 1', "sh", sys.executable, ROOT / "scripts" / "bench_data.py",
                   path, "--child", "--work_dir", folder, "--draw", 0]
        found = {}
        for start in ("first", "second"):
            it = answer(command)
            found[start] = it["open"] + it["packed"]["first_batch"]
            found[f"{start}_peak"] = it["packed"]["peak"] - it["imports"]
        return found | {"tokens": it["tokens"]}


# ---------------------------------------------------------------- what is printed and drawn


def main(args):
    if args.on_paper:
        return print(on_paper())
    if args.point:
        found = measure(json.loads(args.point), args)
        return print(json.dumps(found)) if os.environ.get("RANK", "0") == "0" else None
    panels = {}
    for name in args.panels:
        _, points, differs = PANELS[name]
        panels[name] = []
        for x in args.points or points:
            found = in_own_process(BASE | differs(x), args) if differs else read_file(x, args)
            panels[name].append({"x": x} | found)
            print(f"{name} {x}: {json.dumps(found)}", file=sys.stderr, flush=True)
    for name, points in panels.items():
        print(f"\n{table(name, points)}")
    if args.json:
        settings = {"base": BASE, "optimizer": args.optimizer, "device": args.device, "steps": args.steps}
        text = json.dumps({"settings": settings, "panels": panels}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    if args.plot:
        draw(panels, args.plot)


def markdown(head: str, rows: list[str]) -> str:
    return "\n".join([f"| {head} |", "|" + "---|" * (head.count("|") + 1), *(f"| {row} |" for row in rows)])


def table(name: str, points: list[dict]) -> str:
    """Markdown. The rate is that of the FLOPs that the formulas count."""
    if name == "file":
        return markdown("MB of JSONL | tokens | first start (s) | second start (s) | MB held | second start",
                        [f"{p['x']} | {p['tokens']:,} | {p['first']:.1f} | {p['second']:.2f} | "
                         f"{p['first_peak'] / 1e6:,.0f} | {p['second_peak'] / 1e6:,.0f}" for p in points])
    return markdown(f"{name} | parameters | CPU s a step | wall | GFLOP/s | MB of tensors | predicted "
                    "| MB held | MB sent by each | predicted",
                    [f"{p['x']} | {p['parameters']:,} | {p['seconds']:.3f} | {p['wall']:.3f} | "
                     f"{p['flops'] / p['seconds'] / 1e9:,.0f} | {p['tensors'] / 1e6:,.1f} | "
                     f"{sum(p['predicted'].values()) / 1e6:,.1f} | {p['held'] / 1e6:,.0f} | "
                     f"{p['sent'] / 1e6:,.1f} | {p['predicted_sent'] / 1e6:,.1f}" for p in points])


def draw(panels: dict, path: Path) -> None:
    """A column for each panel: time above, memory below, both against what the formulas say."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from scripts.draw_lora import COLORS, save

    figure = Figure(figsize=(2.7 * len(panels), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    columns = figure.subplots(2, len(panels), squeeze=False).T
    for (above, below), (name, points) in zip(columns, panels.items(), strict=True):
        x = [p["parameters"] / 1e6 if name == "width" else p["x"] for p in points]
        if name == "file":
            for start, color in zip(("first", "second"), COLORS, strict=False):
                above.plot(x, [p[start] for p in points], "o-", color=color, label=f"{start} start")
                below.plot(x, [p[f"{start}_peak"] / 1e6 for p in points], "o-", color=color)
        else:
            # A straight line of the formula: its FLOPs at the best rate of the panel.
            rate = max(p["flops"] / p["seconds"] for p in points)
            above.plot(x, [p["flops"] / rate for p in points], "--", color="black", label="FLOPs")
            above.plot(x, [p["seconds"] for p in points], "o-", color=COLORS[0], label="CPU time")
            if name == "processes":
                above.plot(x, [p["wall"] for p in points], "o-", color=COLORS[1], label="wall clock")
            below.stackplot(x, *([p["predicted"][part] / 1e6 for p in points] for part in PARTS),
                            labels=PARTS, colors=("#9aa5b1", "#d55e00", "#f0e442", "#56b4e9", "#cc79a7"))
            for key, mark, label in (("tensors", "o", "tensors, counted"), ("held", "x", "process")):
                below.plot(x, [p[key] / 1e6 for p in points], mark, color="black", label=label)
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
    parts, labels = columns[0][1].get_legend_handles_labels()
    figure.legend(parts, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    save(figure, path)


# ---------------------------------------------------------------- on paper


LLAMA = {"vocab_size": 32000, "tie_word_embeddings": False, "rope_theta": 1e4}
MODELS = {  # public shapes, so that what others measured can be held against the formulas
    "1B": ModelConfig(2048, 22, 32, 4, 5632, **LLAMA),  # TinyLlama
    "7B": ModelConfig(4096, 32, 32, 32, 11008, **LLAMA),  # Llama 2
}
LLAMA3 = ModelConfig(4096, 32, 32, 8, 14336, vocab_size=128256, tie_word_embeddings=False)  # 8B
PEAK, REACHED = 989e12, 0.4  # FLOP/s of an H100 SXM in dense bfloat16, and the share that training gets
MEMORY, USABLE = 80e9, 0.9  # bytes of an H100; the rest is CUDA's, NCCL's and lost between tensors
NVLINK, INFINIBAND = 450e9, 8 * 50e9  # bytes/s one way: of a GPU in its node, of a node's eight cards
NETWORK = 0.8  # the share of it that rings get
LENGTH, ROWS = 4096, 4  # tokens of a row, rows of a GPU in a step
PUBLISHED = [  # model, its shape, tokens of a row, tokens/s of one GPU, that GPU's FLOP/s, who says so
    ("TinyLlama 1.1B, 16 A100", MODELS["1B"], 2048, 24_000, 312e12, "its README"),
    ("Llama 2 7B, A100s", MODELS["7B"], 4096, 2e12 / (184_320 * 3600), 312e12, "arXiv:2307.09288, table 2"),
    ("Llama 3.1 8B, 8 H100, FSDP2", LLAMA3, 8192, 5_762, 989e12, "torchtitan, benchmarks/"),
]


def per_gpu(config: ModelConfig, gpus: int, engine: str, rows: int, checkpointing: bool) -> dict[str, float]:
    """Bytes that training with AdamW holds on each GPU: weights, gradients and optimizer, and all at most.

    DDP holds all of the state on every GPU. FSDP2 shards it, and gathers what it computes with: of two blocks
    (one in use, one on its way) bfloat16 weights, their gradients, and these in float32 to be reduced; of
    embedding and head float32 weights, their gradients, and autocast's copy of the head.
    """
    sizes, kinds = state(config, "adamw"), count(config)
    shards = gpus if engine == "FSDP2" else 1
    total = sum(sizes.values()) / shards
    within = 2 * multiplied(config)  # autocast's copies
    if engine == "FSDP2":
        within = (2 + 2 + 4) * 2 * kinds["matrices"] / config.num_hidden_layers
        within += (4 + 4) * (kinds["embedding"] + kinds["head"]) + 2 * config.vocab_size * config.hidden_size
    within += activations(config, rows, LENGTH, "cuda", checkpointing)
    within += 6 * config.vocab_size * min(rows * LENGTH, LOSS_CHUNK)
    if gpus == 1 or engine == "FSDP2":  # gradients come when activations go; DDP keeps their memory
        within -= sizes["gradients"] / shards
    return {"state": total, "peak": total + max(0, within)}


def cost(config: ModelConfig, gpus: int, engine: str) -> dict[str, float] | None:
    """Of a step of ROWS x LENGTH tokens on each GPU, in the fastest way that fits; None: none does.

    Network and computing overlap: the longer one counts.
    """
    for checkpointing, rows in [(False, 4), (False, 2), (False, 1), (True, 4), (True, 2), (True, 1)]:
        sizes = per_gpu(config, gpus, engine, rows, checkpointing)
        if sizes["peak"] <= USABLE * MEMORY:
            break
    else:
        return None
    tokens = ROWS * LENGTH
    flops = flops_per_token(config, LENGTH) * tokens
    compute = flops * (4 / 3 if checkpointing else 1) / (PEAK * REACHED)  # one more forward pass
    traffic = sent(config, gpus, engine, ROWS // rows)
    network = traffic / (NETWORK * (NVLINK if gpus <= 8 else INFINIBAND))
    seconds = max(compute, network)
    return sizes | {"rows": rows, "checkpointing": checkpointing, "sent": traffic, "compute": compute,
                    "network": network, "tokens/s": gpus * tokens / seconds,
                    "mfu": flops / seconds / PEAK}


def about(x: float) -> str:
    """Two digits: paper is no more exact."""
    return f"{float(f'{x:.2g}'):,.{1 if x < 10 else 0}f}"


def on_paper() -> str:
    """The tables of docs/scaling.md, in Markdown."""
    methods = {"AdamW": "adamw", "Muon": "muon", "8-bit AdamW": "adamw8bit", "LoRA, rank 16": "lora",
               "QLoRA, rank 16": "qlora"}
    states = []
    for name, method in methods.items():
        totals = {model: sum(state(config, method).values()) for model, config in MODELS.items()}
        each = totals["7B"] / sum(count(MODELS["7B"]).values())
        states.append(f"{name} | {each:.2f} | {totals['1B'] / 1e9:.1f} | {totals['7B'] / 1e9:.1f}")
    memory, times = [], []
    for name, config in MODELS.items():
        parameters = sum(count(config).values())
        for gpus in (1, 8, 64):
            for engine in ("DDP", "FSDP2") if gpus > 1 else ("DDP",):
                row = f"{name} | {gpus} | {engine if gpus > 1 else 'none'} | "
                it = cost(config, gpus, engine)
                least = per_gpu(config, gpus, engine, 1, True)
                if it is None:
                    memory.append(row + f"{least['state'] / 1e9:.1f} | {least['peak'] / 1e9:.1f} | no")
                    continue
                how = f"{it['rows']} rows at once" + ", checkpointing" * it["checkpointing"]
                memory.append(row + f"{it['state'] / 1e9:.1f} | {it['peak'] / 1e9:.1f} | yes: {how}")
                days = [tokens / it["tokens/s"] / 86400 for tokens in (20 * parameters, 1e12)]
                times.append(row + f"{it['sent'] / 1e9:.1f} | {it['network']:.2f} | {it['compute']:.2f} | "
                             f"{about(it['tokens/s'])} | {it['mfu']:.0%} | "
                             + " | ".join(f"{about(d)} | {about(24 * gpus * d)}" for d in days))
    published = [f"{name} | {rate:,.0f} | {rate * flops_per_token(config, length) / flops:.0%} | {source}"
                 for name, config, length, rate, flops, source in PUBLISHED]
    return "\n\n".join([
        markdown("state held by | bytes a parameter (7B) | 1B (GB) | 7B (GB)", states),
        markdown("model | GPUs | engine | GB of state | GB at most | fits in 80 GB", memory),
        markdown("model | GPUs | engine | GB sent by each | s of network | s of computing | tokens/s | MFU "
                 "| 20 tokens/parameter: days | GPU-hours | 1e12 tokens: days | GPU-hours", times),
        markdown("run | tokens/s of a GPU, published | MFU by our formula | source", published)])


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
