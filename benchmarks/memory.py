"""Measures what fine-tuning holds in memory: all weights, LoRA over a bfloat16 base, QLoRA over 4 bits.

    python benchmarks/memory.py                                # the 104m preset on 4 x 256 tokens: minutes
    python benchmarks/memory.py --preset 26m --rank 8 --device cuda

Each row of the table is a process of its own that takes two real training steps (forward, backward, clip,
AdamW). State: the bytes of weights, gradients and optimizer, counted from the tensors. Peak: the most that
the process held during the steps beyond what it held after its imports (resident memory on a CPU, allocated
memory on CUDA), without and with --gradient_checkpointing. 8-bit AdamW needs bitsandbytes.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import drop_gradients, installed, json_of, markdown, take_step
from common.cli import Parser, run_script
from common.errors import UsageError

FULL = "full fine-tuning"
METHODS = {  # name: (the base weights, the optimizer)
    FULL: ("float32", "adamw"),
    "LoRA": ("bfloat16", "adamw"),
    "LoRA, 8-bit AdamW": ("bfloat16", "adamw8bit"),
    "QLoRA": ("nf4", "adamw"),
    "QLoRA, 8-bit AdamW": ("nf4", "adamw8bit"),
}


def main(args):
    if args.measure:
        print(json.dumps(measure(args)))
        return
    results = {}
    for method in installed({method: package_of(method) for method in args.methods}):
        plain, checkpointing = (measure_in_fresh_process(method, on, args) for on in (False, True))
        results[method] = plain | {"with checkpointing": checkpointing["peak"]}
    if results:
        print_table(results, args)


def package_of(method: str) -> str | None:
    """The package that a method needs beyond requirements.txt."""
    return "bitsandbytes" if METHODS[method][1] == "adamw8bit" else None


def measure_in_fresh_process(method: str, checkpointing: bool, args) -> dict:
    command = [sys.executable, __file__, "--measure", method, "--preset", args.preset, "--rank", args.rank,
               "--batch_size", args.batch_size, "--seq_len", args.seq_len, "--device", args.device]
    if checkpointing:
        command.append("--gradient_checkpointing")
    return json_of(command)


# --- one row of the table, in a process of its own ----------------------------------------------------------


def measure(args) -> dict:
    """Builds the model and takes two steps, in this process. Returns bytes by kind."""
    import torch

    from model.config import ModelConfig, preset

    torch.manual_seed(0)
    tiny = ModelConfig(hidden_size=64, num_hidden_layers=1, intermediate_size=64)
    take_two_steps(*build(tiny, args), args)  # what PyTorch loads at first use counts as imports
    before = resident("VmRSS")
    model, optimizers = build(preset(args.preset), args)
    forget_peak(args.device)
    take_two_steps(model, optimizers, args)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else resident("VmHWM") - before

    def size(tensors):
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = [p for name, p in model.named_parameters() if ".layers." in name and ".lora." not in name]
    moments = []
    for optimizer in optimizers:
        for state in optimizer.state.values():
            moments += state.values()
    return {"trained": sum(parameter.numel() for parameter in trained), "base": size(base),
            "weights": size(model.parameters()), "gradients": size(p.grad for p in trained),
            "optimizer": size(moments), "peak": peak}


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


def take_two_steps(model, optimizers: list, args) -> None:
    """The second step begins with the optimizer's state in memory. Its gradients stay, to be counted."""
    import torch

    for _ in range(2):
        drop_gradients(optimizers)
        ids = torch.randint(model.config.vocab_size, (args.batch_size, args.seq_len), device=args.device)
        take_step(model, optimizers, {"input_ids": ids, "labels": ids}, torch.bfloat16)


def resident(field: str) -> int:
    """Bytes of this process in memory, from Linux: "VmRSS" is now, "VmHWM" the most since forget_peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise UsageError("peaks on a CPU are read from /proc, which only Linux has; try --device cuda")
    kilobytes = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE)
    return int(kilobytes[1]) * 1024


def forget_peak(device: str) -> None:
    """From here on the peak is that of the steps, without the building of the model."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)  # what building the model has freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


# --- the table ----------------------------------------------------------------------------------------------


def print_table(results: dict[str, dict], args) -> None:
    import pandas as pd

    bytes_of = pd.DataFrame(results).T
    bytes_of["state"] = bytes_of[["weights", "gradients", "optimizer"]].sum(axis=1)
    table = pd.DataFrame({"": bytes_of.index}, bytes_of.index)
    table["trained"] = (bytes_of["trained"] / 1e6).map("{:.2f} M".format)
    for kind in ("weights", "gradients", "optimizer", "state", "peak", "with checkpointing"):
        table[kind] = (bytes_of[kind] / 1e6).map("{:.1f}".format)
        if kind in ("state", "peak", "with checkpointing") and FULL in results:
            change = bytes_of[kind] / bytes_of.loc[FULL, kind] - 1
            table[kind] += change.drop(FULL).map(" ({:+.1%})".format).reindex(table.index, fill_value="")
    print(f"{args.preset}, rank {args.rank} on all linear layers, {args.batch_size} x {args.seq_len} tokens, "
          f"bfloat16 autocast on {args.device}; in MB, and the difference from {FULL}\n\n{markdown(table)}")
    if "LoRA" in results and "QLoRA" in results:
        share = results["QLoRA"]["base"] / results["LoRA"]["base"]
        print(f"\nNF4 takes {share:.3f} of the bytes of bfloat16 over all blocks")


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
