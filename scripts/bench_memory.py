"""What fine-tuning holds in memory: all weights, LoRA over a bfloat16 base, QLoRA over a 4-bit one.

    python scripts/bench_memory.py                                # the 104m preset on 4 x 256 tokens: minutes
    python scripts/bench_memory.py --preset 26m --rank 8 --device cuda

Each row is a process of its own that takes two real training steps (forward, backward, clip, AdamW). State:
the bytes of weights, gradients and optimizer, counted from the tensors. Peak: the most that the process held
during the steps beyond what it held after its imports (resident set on CPU, allocated on CUDA), without
and with --gradient_checkpointing.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.args import Parser, run_script

METHODS = {  # the base weights, the optimizer
    "full fine-tuning": ("float32", "adamw"),
    "LoRA": ("bfloat16", "adamw"),
    "LoRA, 8-bit AdamW": ("bfloat16", "adamw8bit"),
    "QLoRA": ("nf4", "adamw"),
    "QLoRA, 8-bit AdamW": ("nf4", "adamw8bit"),
}


def main(args):
    if args.measure:
        return print(json.dumps(measure(args)))
    results = {}
    for method in args.methods:
        rows = [measure_in_fresh_process(method, checkpointing, args) for checkpointing in (False, True)]
        results[method] = rows[0] | {"peak_checkpointing": rows[1]["peak"]}
    print_table(results, args)


def measure_in_fresh_process(method: str, checkpointing: bool, args) -> dict:
    command = [sys.executable, __file__, "--measure", method, "--preset", args.preset,
               "--rank", str(args.rank), "--batch_size", str(args.batch_size),
               "--seq_len", str(args.seq_len), "--device", args.device]
    done = subprocess.run(command + ["--gradient_checkpointing"] * checkpointing, stdout=subprocess.PIPE,
                          text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(args) -> dict:
    """Builds the model and takes two steps, in this process; returns bytes by kind."""
    import torch

    from model.transformer import ModelConfig, preset

    torch.manual_seed(0)
    tiny = ModelConfig(hidden_size=64, num_hidden_layers=1, intermediate_size=64)
    train_two_steps(*build(tiny, args), args)  # what PyTorch loads only when it is used counts as imports
    before = resident("VmRSS")
    model, optimizers = build(preset(args.preset), args)
    forget_peak(args.device)
    train_two_steps(model, optimizers, args)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else resident("VmHWM") - before

    def size(tensors):
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = [p for name, p in model.named_parameters() if ".layers." in name and ".lora." not in name]
    state = [value for o in optimizers for values in o.state.values() for value in values.values()]
    return {"trained": sum(parameter.numel() for parameter in trained), "base": size(base),
            "weights": size(model.parameters()), "gradients": size(p.grad for p in trained),
            "optimizer": size(state), "peak": peak}


def build(config, args):
    """The model and its optimizers as --measure names them."""
    import torch

    from model.lora import apply_lora, cast_frozen, freeze_all_but_lora
    from model.quantize import quantize_model
    from model.transformer import CausalLM
    from trainer.optim import build_optimizers

    base, optimizer = METHODS[args.measure]
    model = CausalLM(config).to(args.device).train()
    if base == "nf4":
        quantize_model(model)
    if base != "float32":
        apply_lora(model, args.rank)
        freeze_all_but_lora(model)
        cast_frozen(model, torch.bfloat16)
    model.gradient_checkpointing = args.gradient_checkpointing
    return model, build_optimizers(model, optimizer, 1e-4, 0.0)


def train_two_steps(model, optimizers, args) -> None:
    """The second step starts with the optimizer's state in memory. The gradients stay, to be counted."""
    import torch

    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        ids = torch.randint(model.config.vocab_size, (args.batch_size, args.seq_len), device=args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for optimizer in optimizers:
            optimizer.step()


def resident(field: str) -> int:
    """Bytes of this process in memory, from Linux: VmRSS now, VmHWM the most since forget_peak."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit("error: peaks on a CPU are read from /proc, which only Linux has; try --device cuda")


def forget_peak(device: str) -> None:
    """From here on only what the steps need counts, not the building of the model."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)  # what building the model freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def print_table(results: dict, args) -> None:
    full = results.get("full fine-tuning")
    print(f"{args.preset}, rank {args.rank} on all linear layers, {args.batch_size} x {args.seq_len} tokens, "
          f"bfloat16 autocast on {args.device}; MB, and in % what is saved of full fine-tuning\n")
    columns = ["trained", "weights", "gradients", "optimizer", "state", "peak", "with checkpointing"]
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for method, row in results.items():
        row["state"] = row["weights"] + row["gradients"] + row["optimizer"]

        def cell(key, row=row):
            saved = f" (-{100 * (1 - row[key] / full[key]):.1f} %)" if full and row is not full else ""
            return f"{row[key] / 1e6:.1f}{saved if key in ('state', 'peak', 'peak_checkpointing') else ''}"

        keys = ("weights", "gradients", "optimizer", "state", "peak", "peak_checkpointing")
        print(f"| {method} | {row['trained'] / 1e6:.2f} M | " + " | ".join(map(cell, keys)) + " |")
    if "LoRA" in results and "QLoRA" in results:
        share = results["QLoRA"]["base"] / results["LoRA"]["base"]
        print(f"\nNF4: {share:.3f} of bfloat16's bytes over all blocks")


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--preset", default="104m", help="shape of the model")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences")
    parser.add_argument("--seq_len", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME",
                        help="rows of the table: " + "; ".join(METHODS))
    parser.add_argument("--measure", choices=list(METHODS), help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--gradient_checkpointing", action="store_true", help=argparse.SUPPRESS)
    run_script(main, parser.parse_args())
