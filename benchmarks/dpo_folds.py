"""How often a model trained by DPO prefers the right answer of pairs that it has not seen: k folds.

    python benchmarks/dpo_folds.py --load_from MODEL --data_path my_pairs.jsonl
    python benchmarks/dpo_folds.py --load_from MODEL --data_path my_pairs.jsonl --folds 0 1 -- --lora_rank 8

Each fold holds out a part of the pairs, and train_dpo.py learns from the others (LoRA; flags after `--` go
to it). A pair counts as right where its margin is above 0: the chosen answer has gained on the rejected one,
in log-probability. Held-out pairs are measured in rows of --eval_seq_len tokens, so that even long ones
count. A fold that is there already is not repeated, and a stopped one goes on. Beside this stands what needs
no training: how often the base itself gives the chosen answer more probability, and more per token.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import markdown, output_of
from common.cli import ROOT, Parser, count, run_script
from common.files import read_json, write_whole


def main(args):
    from dataset.packing import Order

    lines = [line for path in args.data_path for line in path.read_text(encoding="utf-8").splitlines()]
    order = Order(len(lines), args.seed)
    for fold in args.folds if args.folds else range(args.k):
        held_out = set(order[fold::args.k])
        folder = args.out_dir / f"fold_{fold}"
        for name, kept in (("train", False), ("test", True)):
            text = "".join(line + "\n" for i, line in enumerate(lines) if (i in held_out) == kept)
            path = folder / f"{name}.jsonl"
            if not path.exists():  # --resume and the token cache look at the time of a file
                write_whole(path, text)
        if not (folder / "pairs.json").exists():
            train(args, folder)
            write_whole(folder / "pairs.json", json.dumps(measure(args, folder)))
        found = read_json(folder / "pairs.json")["pairs"]
        print(f"fold {fold}: {sum(pair['margin'] > 0 for pair in found)} of {len(found)} right", flush=True)
    report(args)


def train(args, folder: Path) -> None:
    output_of([sys.executable, ROOT / "trainer" / "train_dpo.py", "--data_path", folder / "train.jsonl",
               "--eval_fraction", 0, "--load_from", args.load_from, "--out_dir", folder, "--name", "adapter",
               "--max_seq_len", args.max_seq_len, "--lora_rank", 16, "--epochs", 1, "--save_interval", 5,
               "--log_interval", 5, "--resume", *args.flags])


def measure(args, folder: Path) -> dict:
    """{"pairs": [{margin, by_sum, by_mean}, ...]}: log-probabilities of chosen less rejected, in nats."""
    import torch

    from common.device import choose_device, choose_dtype
    from dataset.preference import PreferenceDataset
    from model.adapters import set_lora
    from model.lora import load_lora
    from model.weights import load_model, load_tokenizer
    from trainer.distributed import Ranks
    from trainer.reference import side_log_probs

    ranks = Ranks(0, 1, choose_device("auto"))
    dtype, model = choose_dtype("auto", ranks.device), load_model(args.load_from)
    load_lora(model, folder / "adapter")
    pairs = PreferenceDataset(folder / "test.jsonl", load_tokenizer(args.load_from), args.eval_seq_len)
    trained = torch.tensor(side_log_probs(model, pairs, dtype, ranks)).view(-1, 2)
    set_lora(model, False)
    base = torch.tensor(side_log_probs(model, pairs, dtype, ranks)).view(-1, 2)
    means = base / torch.tensor(pairs.sides.num_targets).view(-1, 2)
    margin = (trained - base) @ torch.tensor([1.0, -1.0])
    rows = zip(margin.tolist(), (base[:, 0] - base[:, 1]).tolist(), (means[:, 0] - means[:, 1]).tolist(),
               strict=True)
    return {"pairs": [dict(zip(("margin", "by_sum", "by_mean"), row, strict=True)) for row in rows]}


def report(args) -> None:
    """Prints the table of all folds that are there."""
    from inference.scoring import wilson

    done = sorted(args.out_dir.glob("fold_*/pairs.json"))
    pairs = [pair for path in done for pair in read_json(path)["pairs"]]
    rows = []
    for name, key in (("DPO: has the chosen answer gained on the rejected one?", "margin"),
                      ("base: is the chosen answer likelier?", "by_sum"),
                      ("base: is it likelier per token?", "by_mean")):
        hits = sum((pair[key] > 0) + 0.5 * (pair[key] == 0) for pair in pairs)
        low, high = wilson(hits, len(pairs))
        rows.append({"": name, "pairs": len(pairs), "accuracy": hits / len(pairs),
                     "95 % interval": f"{low:.3f} to {high:.3f}", "holds 0.5": low <= 0.5 <= high})
    print(f"\n{len(done)} of {args.k} folds\n{markdown(rows, {'accuracy': '.3f'})}")


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--load_from", type=Path, required=True, metavar="DIR", help="the model")
    parser.add_argument("--data_path", nargs="+", type=Path, required=True, metavar="FILE", help="the pairs")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "dpo_folds", metavar="DIR",
                        help="where the folds are kept")
    parser.add_argument("--k", type=count, default=5, metavar="K", help="folds")
    parser.add_argument("--folds", nargs="+", type=int, metavar="I", help="only these (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the split into folds")
    parser.add_argument("--max_seq_len", type=count, default=512, metavar="T",
                        help="tokens of a side in training")
    parser.add_argument("--eval_seq_len", type=count, default=4608, metavar="T",
                        help="tokens of a side where it is measured")
    parser.add_argument("flags", nargs="*", help="after `--`: more flags for train_dpo.py")
    run_script(main, parser.parse_args())
