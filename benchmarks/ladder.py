"""Four numbers in order, by reward alone: a skill that never succeeds at first, reached through easier ones.

    python benchmarks/ladder.py --folder /tmp/ladder            # goes on if it was stopped
    python benchmarks/ladder.py --folder /tmp/ladder --rungs 1  # the first rung alone

The quickstart's model sorts three numbers. Asked to sort four it always says three, so no answer is ever
right and no reward comes. But it can count to four, and so "count up: 3, 1, 4, 2" is sometimes right. Each
rung is a run of train_grpo.py that starts from the one before. Its prompts have wider numbers, and half of
them ask to sort. In its metrics.jsonl eval_reward is the share of right greedy answers to held-out questions
of the last kind: "sort", four numbers from 1 to 99.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ROOT, Parser, count, run_script, seed

COUNT = ["count up: {list}", "count in order: {list}", "count {list}", "数数{list}", "按顺序数{list}",
         "从小到大数：{list}"]
SORT = ["sort {list}", "sort these: {list}", "put {list} from low to high.", "从小到大排：{list}",
        "把{list}从小到大排列。", "order these numbers from small to large: {list}"]
# The largest number of a list, and rollouts of 16 prompts
RUNGS = [((4, 5, 6), 60), ((6, 9, 12), 80), ((9, 15, 20, 30), 120), ((30, 60, 99), 200), ((99,), 200),
         ((99,), 300)]
UPDATES = 3
FLAGS = (f"--updates_per_rollout {UPDATES} --advantage group_std --learning_rate 3e-4 "
         "--lr_schedule wsd --max_new_tokens 24 --eval_interval 75 --log_interval 15 --show_interval 50 "
         "--save_interval 75").split()


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--load_from", type=Path, metavar="DIR",
                        default=ROOT / "out/quickstart/full_sft")
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="for data and runs")
    parser.add_argument("--rungs", type=count, default=len(RUNGS), metavar="N", help="only the first N")
    parser.add_argument("--seed", type=seed, default=42, metavar="N", help="of all runs; the questions stay")
    return parser.parse_args()


def record(rng: random.Random, largest: int, wordings: list[str], held_out: bool) -> dict:
    """A question. Lists whose sum is a multiple of 7 are held out if their numbers go beyond 30."""
    while True:
        four = rng.sample(range(1, largest + 1), 4)
        if held_out == (max(four) > 30 and sum(four) % 7 == 0):
            break
    question = rng.choice(wordings).format(list=", ".join(map(str, four)))
    answer = ", ".join(map(str, sorted(four)))
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": turns, "family": "sort_four"}


def write(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")
    return path


def main(args: argparse.Namespace) -> None:
    rng, model = random.Random(0), args.load_from
    asked = write(args.folder / "eval.jsonl", [record(rng, 99, SORT, True) for _ in range(200)])
    for number, (largest, rollouts) in enumerate(RUNGS[:args.rungs], 1):
        data = write(args.folder / f"rung{number}.jsonl",
                     [record(rng, rng.choice(largest), rng.choice([COUNT, SORT]), False)
                      for _ in range(16 * rollouts)])
        out = args.folder / f"rung{number}"
        if not (out / "training.json").exists() or (out / "checkpoints").exists():
            command = [sys.executable, str(ROOT / "trainer/train_grpo.py"), "--data_path", str(data),
                       "--eval_data_path", str(asked), "--load_from", str(model), "--resume",
                       "--out_dir", str(args.folder), "--name", out.name,
                       "--max_steps", str(rollouts * UPDATES), "--seed", str(args.seed), *FLAGS]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
        model = out


if __name__ == "__main__":
    run_script(main, parse_args())
