"""How fast a LoRA step is: against full fine-tuning, and against PEFT over transformers on the same shapes.

    python scripts/bench_lora.py                                    # the 26m preset on 4 x 256 tokens
    python scripts/bench_lora.py --preset 104m --rounds 20 --device cuda
    OMP_NUM_THREADS=1 python scripts/bench_lora.py --clock cpu      # one core of a machine that others use

Each method waits in a process of its own and takes a few real training steps when it is its turn: forward,
backward, clip, AdamW, zero_grad; bfloat16 autocast, the frozen base in bfloat16. They take turns, round after
round, so that whatever else the machine does falls on all of them alike. Times are medians over steps; ratios
are medians over rounds, a method's time divided by the other's in the same round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.args import HelpFormatter, run_script

SOME, ALL = ["q_proj", "o_proj"], "all-linear"
METHODS = {  # whose code, which layers have adapters
    "full fine-tuning": ("ours", None),
    "LoRA, q and o": ("ours", SOME),
    "LoRA, all linear": ("ours", ALL),
    "PEFT, q and o": ("PEFT", SOME),
    "PEFT, all linear": ("PEFT", ALL),
    "QLoRA, all linear": ("ours, NF4", ALL),
}


def main(args):
    if args.method:
        return work(args)
    command = [sys.executable, __file__, "--preset", args.preset, "--rank", str(args.rank), "--batch_size",
               str(args.batch_size), "--seq_len", str(args.seq_len), "--device", args.device,
               "--clock", args.clock, "--method"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {name: subprocess.Popen([*command, name], **pipes) for name in args.methods}
    try:
        seconds = {name: [] for name in workers}  # per round, per step
        for done in range(args.rounds + 1):
            for name, worker in workers.items():
                worker.stdin.write(f"{args.steps}\n")
                worker.stdin.flush()
                times = json.loads(worker.stdout.readline())
                if done:  # the first round warms up
                    seconds[name].append(times)
    finally:
        for worker in workers.values():
            worker.stdin.close()  # which ends it
            worker.wait()
    print_table(seconds, args)


def work(args) -> None:
    """The process of one method: reads how many steps to take, answers with the seconds of each."""
    import torch

    clock = time.perf_counter if args.clock == "wall" else time.process_time
    torch.manual_seed(0)
    model, optimizers, vocab_size = build(args)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.randint(vocab_size, (args.batch_size, args.seq_len), device=args.device)

    def step():
        with torch.autocast(args.device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if args.device == "cuda":
            torch.cuda.synchronize()

    for line in sys.stdin:
        times = [clock()]
        for _ in range(int(line)):
            step()
            times.append(clock())
        print(json.dumps([b - a for a, b in zip(times, times[1:], strict=False)]), flush=True)


def build(args):
    """The model of args.method, its optimizers and the size of its vocabulary."""
    import torch

    from model.lora import apply_lora, cast_frozen, freeze_all_but_lora
    from model.quantize import quantize_model
    from model.transformer import CausalLM, preset
    from model.weights import config_to_dict
    from trainer.optim import build_optimizers

    code, targets = METHODS[args.method]
    config = preset(args.preset)
    if code == "PEFT":
        import peft
        import transformers

        raw = config_to_dict(config)
        family = raw["architectures"][0].removesuffix("ForCausalLM")
        theirs = getattr(transformers, f"{family}Config")(**raw | {"use_cache": False})
        model = getattr(transformers, f"{family}ForCausalLM")(theirs)
    else:
        model = CausalLM(config)
    model.to(args.device).train()
    if "NF4" in code:
        quantize_model(model)
    if code == "PEFT":
        settings = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets)
        model = peft.get_peft_model(model, settings)  # adapters in float32, as ours
    elif targets is not None:
        apply_lora(model, args.rank, target_modules=targets)
        freeze_all_but_lora(model)
    if targets is not None:
        cast_frozen(model, torch.bfloat16)
    return model, build_optimizers(model, "adamw", 1e-4, 0.0), config.vocab_size


def print_table(seconds: dict, args) -> None:
    print(f"{args.preset}, rank {args.rank}, {args.batch_size} x {args.seq_len} tokens on {args.device}, "
          f"{args.rounds} rounds of {args.steps} steps, {args.clock} time\n")
    print("| | ms a step (quartiles) | of full fine-tuning (quartiles) | of PEFT |\n|---|---|---|---|")
    sums = {name: [sum(times) for times in rounds] for name, rounds in seconds.items()}
    for name, rounds in seconds.items():
        steps = [1000 * second for times in rounds for second in times]
        cells = [spread(steps, ".0f")]
        for other in ("full fine-tuning", name.replace("QLoRA", "PEFT").replace("LoRA", "PEFT")):
            ratios = [a / b for a, b in zip(sums[name], sums.get(other, sums[name]), strict=True)]
            cells.append("" if other == name or other not in sums else spread(ratios, ".2f"))
        print(f"| {name} | " + " | ".join(cells) + " |")


def spread(values: list[float], form: str) -> str:
    """Median (lower to upper quartile)."""
    if len(values) < 2:
        return format(values[0], form)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--preset", default="26m", help="shape of the model")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences")
    parser.add_argument("--seq_len", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"],
                        help="cpu: time that the cores computed for us, where others use them too")
    parser.add_argument("--rounds", type=int, default=8, help="turns that each method gets")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME",
                        help="rows of the table: " + "; ".join(METHODS))
    parser.add_argument("--method", choices=list(METHODS), help=argparse.SUPPRESS)  # in a process of its own
    run_script(main, parser.parse_args())
