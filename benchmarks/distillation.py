"""Teaches a student of a third of the parameters in several ways: the table of "A teacher" in docs/rewards.md.

    python benchmarks/distillation.py                            # teacher and world of out/quickstart; hours
    python benchmarks/distillation.py --ways sft forward --seeds 1 2 3 --steps 2000
    python benchmarks/distillation.py --table                    # what is there so far; trains nothing

Each run is train_distillation.py with the flags of its way, then eval_model.py on the world's test. One runs
at a time. Runs that are finished already stay, so a stopped command goes on with the next run.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import markdown
from common.cli import ROOT, Parser, count, positive, run_script

WAYS = {  # name -> (what the table calls it, flags); sft: the data's own words alone
    "sft": ("SFT alone", "--distillation_weight 0"),
    "forward": ("forward KL", ""),
    "half": ("half forward KL, half SFT", "--distillation_weight 0.5"),
    "warm": ("forward KL, temperature 2", "--temperature 2"),
    "reverse": ("reverse KL", "--divergence reverse_kl"),
    "js": ("Jensen-Shannon, beta 0.5", "--divergence jensen_shannon --beta 0.5"),
    "own_quarter": ("forward KL, a quarter on-policy", "--on_policy 0.25"),
    "own_half": ("forward KL, half on-policy", "--on_policy 0.5"),
    "own_reverse": ("reverse KL, half on-policy", "--divergence reverse_kl --on_policy 0.5"),
}


def main(args):
    args.out_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in args.seeds:
        for way in args.ways:
            for rate in args.rates:
                result = one_run(args, way, seed, rate)
                if result:
                    results.append(result)
                    print("{way} seed {seed} rate {rate}: {right:.4f} of {n}, {seconds:.0f} s".format(**result), flush=True)
    print_table(results)


def one_run(args, way: str, seed: int, rate: float) -> dict | None:
    """Trains and scores, unless that was done before. None: not done, and --table asks for nothing new."""
    name = f"{way}_{args.steps}_{rate:g}_{seed}" + (f"_{args.preset}" if args.preset else "")
    scores, world = args.out_dir / f"{name}.json", args.quickstart / "world"
    if not scores.exists():
        if args.table:
            return None
        flags = ["--data_path", f"{world / 'sft.jsonl'}", "--eval_data_path", f"{world / 'sft_eval.jsonl'}",
                 "--teacher", f"{args.quickstart / 'full_sft'}", "--out_dir", f"{args.out_dir}", "--name", name,
                 "--max_steps", f"{args.steps}", "--batch_size", "8", "--seed", f"{seed}",
                 "--learning_rate", f"{rate}", "--eval_interval", "0", "--log_interval", "100"]
        flags += ["--preset", args.preset] if args.preset else []
        if not (args.out_dir / name / "training.json").exists():
            run("trainer/train_distillation.py", *flags, *WAYS[way][1].split(), "--resume", log=args.out_dir / f"{name}.log")
        run("eval_model.py", "--load_from", f"{args.out_dir / name}", "--data_path", f"{world / 'sft_test.jsonl'}",
            "--temperature", "0", "--json", f"{scores}", log=args.out_dir / f"{name}.scores.log")
    training = json.loads((args.out_dir / name / "training.json").read_text(encoding="utf-8"))
    scored = json.loads(scores.read_text(encoding="utf-8"))
    return {"way": way, "seed": seed, "rate": rate, "right": scored["scores"]["all"], "n": scored["n"]["all"],
            "seconds": training["seconds"], "loss": scored["loss"], "divergence": training["eval_divergence"],
            "answers": [answer["ok"] for answer in scored["answers"]]}


def run(script: str, *flags: str, log: Path) -> None:
    with log.open("w", encoding="utf-8") as file:
        subprocess.run([sys.executable, f"{ROOT / script}", *flags], check=True, stdout=file,
                       stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def print_table(results: list[dict]) -> None:
    """A row for each way and rate: means over the seeds, and the difference from SFT with its interval."""
    ...


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--quickstart", type=Path, default=ROOT / "out/quickstart", metavar="DIR", help="with full_sft and world")
    add("--out_dir", type=Path, default=ROOT / "out/distillation", metavar="DIR", help="for runs and scores")
    add("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="of teaching")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    add("--rates", type=positive, nargs="+", default=[1e-2], metavar="LR", help="learning rates")
    add("--steps", type=count, default=2000, metavar="N", help="of 8 rows of 256 tokens")
    add("--preset", metavar="NAME", help="of the student (default: that of train_distillation.py)")
    add("--table", action="store_true", help="only what is there already")
    run_script(main, parser.parse_args())
