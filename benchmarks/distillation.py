"""Teaches a student of a third of the parameters in several ways: the table of docs/rewards.md, "A teacher".

    python benchmarks/distillation.py --quickstart out/quickstart    # all ways, three seeds: about 3 hours
    python benchmarks/distillation.py --ways sft forward_kl --seeds 1 --rates 5e-3 1e-2 2e-2
    python benchmarks/distillation.py --table                            # of what is there; trains nothing

Teacher and data are those of the quickstart. Each run is train_distillation.py with the flags of its way, and
then eval_model.py on the world's test, one run after the other on one thread. Finished runs stay, so a
stopped command goes on where it was.
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
from common.errors import UsageError
from common.files import write_whole

WAYS = {  # name: (what the table calls it, its flags)
    "sft": ("SFT alone: the data's own words", "--distillation_weight 0"),
    "forward_kl": ("forward KL", ""),
    "half": ("half forward KL, half the data's own words", "--distillation_weight 0.5"),
    "warm": ("forward KL, temperature 2", "--temperature 2"),
    "reverse_kl": ("reverse KL", "--divergence reverse_kl"),
    "jensen_shannon": ("Jensen-Shannon, beta 0.5", "--divergence jensen_shannon"),
    "on_policy": ("forward KL, half of the steps on-policy", "--on_policy 0.5 --max_new_tokens 64"),
    "on_policy_reverse": ("reverse KL, half of the steps on-policy",
                          "--divergence reverse_kl --on_policy 0.5 --max_new_tokens 64"),
}


def main(args):
    for folder in ("full_sft", "world"):
        if not (args.quickstart / folder).is_dir():
            raise UsageError(f"--quickstart {args.quickstart}: there is no {folder} in it; "
                             "make it first: bash scripts/quickstart.sh")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    few = args.out_dir / f"sft_{args.chats}.jsonl"
    if args.chats and not few.exists():
        write_few(args.quickstart / "world/sft.jsonl", few, args.chats)
    results = {}  # (way, rate) -> what `result` gives, one for each seed
    for seed in args.seeds:
        for way in args.ways:
            for rate in args.rates:
                found = result(args, way, seed, rate)
                if found:
                    results.setdefault((way, rate), []).append(found)
                    print(f"{way}, rate {rate:g}, seed {seed}: {found['right']:.4f} of {found['n']:,} right, "
                          f"{found['seconds']:.0f} s", flush=True)
    print(table(results))


def result(args, way: str, seed: int, rate: float) -> dict | None:
    """What a run came to. It trains and scores unless that was done before; with --table it may be None."""
    world, name = args.quickstart / "world", f"{way}_steps{args.steps}_rate{rate:g}_seed{seed}"
    start = ["--load_from", args.load_from] if args.load_from else []
    name += f"_from_{args.load_from.name}" if args.load_from else ""
    name += f"_chats{args.chats}" if args.chats else ""
    data = args.out_dir / f"sft_{args.chats}.jsonl" if args.chats else world / "sft.jsonl"
    run_dir, scores = args.out_dir / name, args.out_dir / f"{name}.json"
    if not scores.exists():
        if args.table:
            return None
        if not (run_dir / "training.json").exists():
            call(run_dir, "trainer/train_distillation.py", "--teacher", args.quickstart / "full_sft",
                 "--data_path", data, "--eval_data_path", world / "sft_eval.jsonl",
                 "--out_dir", args.out_dir, "--name", name, "--max_steps", args.steps, "--batch_size", 8,
                 "--learning_rate", rate, "--seed", seed, "--log_interval", 100, "--eval_interval", 0,
                 "--resume", *WAYS[way][1].split(), *start)
        call(scores, "eval_model.py", "--load_from", run_dir, "--data_path", world / "sft_test.jsonl",
             "--temperature", 0, "--batch_size", 64, "--json", scores)
    files = run_dir / "training.json", scores
    trained, scored = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    return {"right": scored["scores"]["all"], "n": scored["n"]["all"], "loss": scored["loss"],
            "divergence": trained["eval_divergence"], "seconds": trained["seconds"], "seed": seed,
            "hits": [answer["ok"] for answer in scored["answers"]]}


def write_few(whole: Path, part: Path, count: int) -> None:
    """Copies `count` records of a file, evenly spread over it."""
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    write_whole(part, "".join(lines[i * len(lines) // count] for i in range(count)))


def call(product: Path, script: str, *flags) -> None:
    """Runs a script of ours, whose output goes to a file beside `product`. Raises UsageError if it fails."""
    log = product.with_name(f"{product.name}.log")
    with log.open("w", encoding="utf-8") as file:
        ended = subprocess.run([sys.executable, f"{ROOT / script}", *map(str, flags)], stdout=file,
                               stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if ended.returncode:
        raise UsageError(f"{script} ended with exit code {ended.returncode}; {log} says why")


def table(results: dict) -> str:
    """A row for each way and rate: means over the seeds. Gains over SFT are paired by question."""
    rows = []
    for (way, rate), found in results.items():
        plain = {one["seed"]: one["hits"] for one in results.get(("sft", rate), [])}
        gains = [int(ours) - int(theirs) for one in found if one["seed"] in plain
                 for ours, theirs in zip(one["hits"], plain[one["seed"]], strict=True)]
        half = 1.96 * statistics.pstdev(gains) / math.sqrt(len(gains)) if gains else 0  # of the 95 % interval
        rows.append({
            "way": WAYS[way][0], "rate": f"{rate:g}",
            "right, seed by seed": " ".join(f"{one['right']:.3f}" for one in found),
            "mean": f"{mean(found, 'right'):.3f}",
            "points over SFT": f"{100 * statistics.mean(gains):+.1f} ± {100 * half:.1f}" if half else "",
            "loss on the test": f"{mean(found, 'loss'):.3f}",
            "divergence": f"{mean(found, 'divergence'):.3f}", "seconds": f"{mean(found, 'seconds'):.0f}"})
    return markdown(rows)


def mean(found: list[dict], name: str) -> float:
    return statistics.mean(one[name] for one in found)


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--quickstart", type=Path, default=ROOT / "out/quickstart", metavar="DIR", help="it made the teacher")
    add("--out_dir", type=Path, default=ROOT / "out/distillation", metavar="DIR", help="for runs and scores")
    add("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="of teaching")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="of weights and data order")
    add("--rates", type=positive, nargs="+", default=[1e-2], metavar="LR", help="learning rates")
    add("--load_from", type=Path, metavar="DIR", help="the student (default: random weights)")
    add("--chats", type=count, metavar="N", help="as many of the world's 101,800 (default: all)")
    add("--steps", type=count, default=1000, metavar="N", help="of 8 rows of 256 tokens")
    add("--table", action="store_true", help="show what is there already, and train nothing")
    run_script(main, parser.parse_args())
