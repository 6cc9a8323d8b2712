"""Measures how well LoRA learns: held-out loss at each rank, against full fine-tuning at its best rate.

    python benchmarks/lora_ranks.py          # the plant doctor, on what the quickstart left
    python benchmarks/lora_ranks.py --lora_plus_ratio 16 --lora_rates 1e-3 1.5e-3 2e-3    # LoRA+
    python benchmarks/lora_ranks.py --load_from out/my_sft --data_path my_chats.jsonl --max_steps 300

Runs train_full_sft.py and train_lora.py (AdamW, all linear layers, alpha = rank) for the same steps on the
same batches. Learning rates are tried for full fine-tuning and for rank 16, and the best one of rank 16
serves all ranks. The loss is that of --eval_data_path, or of a tenth of the data. A run that is there already
is not repeated. Readers of the code may skip this file.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import markdown, output_of
from common.cli import ROOT, Parser, run_script
from common.errors import UsageError
from common.files import read_json

TUNED_RANK = 16  # the rank for which learning rates are tried


def main(args):
    if not args.load_from.is_dir():
        raise UsageError(f"--load_from {args.load_from}: no such folder; the quickstart makes one")
    full_losses = {rate: full(args, rate) for rate in args.full_rates}
    lora_losses = {rate: lora(args, TUNED_RANK, rate) for rate in args.lora_rates}
    full_rate = min(full_losses, key=full_losses.get)
    lora_rate = min(lora_losses, key=lora_losses.get)
    full_loss = full_losses[full_rate]
    rows = [{"": "full fine-tuning", "learning rate": full_rate, "held-out loss": full_loss}]
    for rank in args.ranks:
        loss = lora_losses[lora_rate] if rank == TUNED_RANK else lora(args, rank, lora_rate)
        rows.append({"": f"rank {rank}", "learning rate": lora_rate, "held-out loss": loss,
                     "against full fine-tuning": loss / full_loss - 1})
    formats = {"learning rate": "g", "held-out loss": ".4f", "against full fine-tuning": "+.1%"}
    print(f"\n{markdown(rows, formats)}")
    tried = [("full fine-tuning", full_losses, full_rate), ("LoRA", lora_losses, lora_rate)]
    for name, losses, best in tried:
        if best in (min(losses), max(losses)):
            print(f"The best rate of {name} is the last one tried on its side: a better one may lie beyond.")


def full(args, rate: float) -> float:
    return held_out_loss(args, "train_full_sft.py", f"full_{rate:g}", "--learning_rate", f"{rate:g}")


def lora(args, rank: int, rate: float) -> float:
    ratio = args.lora_plus_ratio
    name = f"rank{rank}_{rate:g}"
    if ratio != 1:
        name += f"_plus{ratio:g}"
    return held_out_loss(args, "train_lora.py", name, "--learning_rate", f"{rate:g}", "--lora_rank",
                         f"{rank}", "--lora_alpha", f"{rank}", "--lora_plus_ratio", f"{ratio:g}")


def held_out_loss(args, script: str, name: str, *flags: str) -> float:
    """Trains, unless that was done before. Returns the validation loss at the end, in nats per token."""
    validation = ["--eval_fraction", 0.1]
    if args.eval_data_path:
        validation = ["--eval_data_path", *args.eval_data_path]
    output_of([
        sys.executable, ROOT / "trainer" / script, "--data_path", *args.data_path, *validation,
        "--load_from", args.load_from, "--out_dir", args.out_dir, "--name", name, "--resume",
        "--max_steps", args.max_steps, "--batch_size", args.batch_size, "--max_seq_len", args.max_seq_len,
        "--micro_batch_size", args.batch_size, "--optimizer", "adamw", "--warmup_ratio", 0.02,
        "--weight_decay", 0, "--eval_interval", 0, *flags])  # all is typed, so that no base changes it
    loss = read_json(args.out_dir / name / "training.json")["eval_loss"]
    print(f"{name:<16} {loss:.4f}", flush=True)
    return loss


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    quickstart = ROOT / "out" / "quickstart"
    parser.add_argument("--load_from", type=Path, default=quickstart / "full_sft", metavar="DIR",
                        help="the base")
    parser.add_argument("--data_path", nargs="+", type=Path, metavar="FILE", help="what is learnt",
                        default=[quickstart / "world" / "lora_clinic.jsonl"])
    parser.add_argument("--eval_data_path", nargs="+", type=Path, metavar="FILE",
                        help="what the loss is measured on")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "lora_ranks", metavar="DIR",
                        help="where the runs are kept")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64], metavar="R",
                        help="ranks in the table")
    parser.add_argument("--full_rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3],
                        metavar="LR", help="learning rates tried for full fine-tuning")
    parser.add_argument("--lora_rates", nargs="+", type=float, default=[3e-3, 5e-3, 1e-2, 2e-2], metavar="LR",
                        help=f"learning rates tried for LoRA, at rank {TUNED_RANK}")
    parser.add_argument("--lora_plus_ratio", type=float, default=1.0, metavar="R",
                        help="the rate of B over that of A (LoRA+)")
    parser.add_argument("--max_steps", type=int, default=300, metavar="N", help="steps of each run")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="rows of a step")
    parser.add_argument("--max_seq_len", type=int, default=128, metavar="T", help="tokens of a row")
    run_script(main, parser.parse_args())
