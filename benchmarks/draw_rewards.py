"""Runs and draws what docs/rewards.md shows of GRPO: the same small task, right and in ways that go wrong.

    bash scripts/quickstart.sh            # makes the model that all runs start from
    python benchmarks/draw_rewards.py --folder /tmp/rewards --out_dir docs       # goes on if it was stopped
    python benchmarks/draw_rewards.py --folder /tmp/rewards --ladder /tmp/ladder  # with benchmarks/ladder.py

The task: name the largest of three numbers, one skill of the built-in prompts, without old chats among them.
After each run the questions that SFT taught are asked again: the column "old" is how many points were lost.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compare_rewards import prompts_of_the_task
from benchmarks.shared import COLORS, markdown, new_figure, output_of, save_picture
from common.cli import ROOT, Parser, count, run_script
from common.files import read_json, write_whole

UPDATES = 4  # of each rollout
FLAGS = (f"--batch_size 256 --updates_per_rollout {UPDATES} --max_new_tokens 32 --learning_rate 3e-4 "
         f"--log_interval {UPDATES} --eval_interval {3 * UPDATES} --show_interval 9").split()
SHORT = ["--rewards", "answers", "length:0.2"]  # the second reward leads to the first right answers
GAMED = "def mentioned(messages, answer, record):\n    return record['answers'][0] in answer\n"
VARIANTS = {  # name: the flags that differ
    "as it should be": SHORT, "rate 10 times as high": [*SHORT, "--learning_rate", "3e-3"],
    "groups of 2": [*SHORT, "--group_size", "2"], "--kl_beta 0.1": [*SHORT, "--kl_beta", "0.1"],
    # The second reward counts next to nothing. It is there to be logged.
    "gamed": ["--reward_file", "{folder}/gamed.py:mentioned", "--rewards", "file", "answers:1e-6"],
}  # fmt: skip
SMOOTH = 2  # log lines of which the mean is drawn


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--load_from", type=Path, metavar="DIR", default=ROOT / "out/quickstart/full_sft")
    parser.add_argument("--world", type=Path, metavar="DIR", default=ROOT / "out/quickstart/world")
    parser.add_argument("--folder", type=Path, metavar="DIR", required=True, help="for the runs")
    parser.add_argument("--ladder", type=Path, metavar="DIR", help="the --folder of benchmarks/ladder.py")
    parser.add_argument("--out_dir", type=Path, metavar="DIR", default=ROOT / "docs", help="for the picture")
    parser.add_argument("--rollouts", type=count, default=24, metavar="N", help="of each run")
    parser.add_argument("--old_questions", type=count, default=420, metavar="N", help="of sft_test.jsonl")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    args.folder.mkdir(parents=True, exist_ok=True)
    write_whole(args.folder / "gamed.py", GAMED)
    prompts_of_the_task(args.folder)
    before, rows = score(args, args.load_from, "before"), []
    for number, (name, flags) in enumerate(VARIANTS.items()):
        run = train(args, f"variant{number}", flags)
        log, after = metrics(run), score(args, run, run.name)
        steps = [line for line in log if "loss" in line]
        rows.append({"": name, "reward": steps[-1]["reward"], "right": after["largest"],
                     "old": 100 * (after["old"] - before["old"]), "entropy": steps[-1]["entropy"]})
    print(markdown(rows, {"reward": ".2f", "right": ".2f", "old": "+.1f", "entropy": ".2f"}))
    draw(args)


def train(args: argparse.Namespace, name: str, flags: list[str]) -> Path:
    """The folder of a run, which is made if it is not there."""
    run = args.folder / name
    if not (run / "training.json").exists() or (run / "checkpoints").exists():
        output_of([sys.executable, ROOT / "trainer/train_grpo.py", "--data_path", args.folder / "grpo.jsonl",
                   "--eval_data_path", args.folder / "grpo_eval.jsonl", "--load_from", args.load_from,
                   "--out_dir", args.folder, "--name", name, "--max_steps", args.rollouts * UPDATES,
                   "--resume", *FLAGS,
                   *[flag.format(folder=args.folder) for flag in flags]])
    return run


def score(args: argparse.Namespace, model: Path, name: str) -> dict:
    """The share of right greedy answers to the task's test, and to what SFT taught ("old")."""
    path = args.folder / f"{name}.json"
    if not path.exists():
        output_of([sys.executable, ROOT / "eval_model.py", "--load_from", model, "--data_path",
                   args.folder / "grpo_test.jsonl", args.world / "sft_test.jsonl", "--limit",
                   args.old_questions, "--temperature", "0", "--json", path])
    answers = [answer for answer in read_json(path)["answers"] if answer["ok"] is not None]
    old = [answer["ok"] for answer in answers if answer["family"] != "largest"]
    return {"largest": read_json(path)["scores"]["largest"], "old": sum(old) / len(old)}


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def curve(log: list[dict], key: str, smooth: int = 1) -> tuple[list, list]:
    """Steps and values of a metric; each value is the mean of up to `smooth` of them."""
    points = [(line["step"], line[key]) for line in log if key in line]
    values = [value for _, value in points]
    means = [sum(some) / len(some) for some in
             (values[max(0, i - smooth + 1):i + 1] for i in range(len(values)))]
    return [step for step, _ in points], means


def draw(args: argparse.Namespace) -> None:
    figure, [axes] = new_figure(13, 3.4, columns=4)
    for number, name in enumerate(list(VARIANTS)[:4]):
        log = metrics(args.folder / f"variant{number}")
        axes[0].plot(*curve(log, "eval_reward_answers"), "o-", color=COLORS[number], label=name, markersize=3)
        axes[1].plot(*curve(log, "entropy", SMOOTH), color=COLORS[number], label=name)
    log = metrics(args.folder / f"variant{list(VARIANTS).index('gamed')}")
    axes[2].plot(*curve(log, "reward_file"), color=COLORS[1], label="reward: the number is mentioned")
    axes[2].plot(*curve(log, "eval_reward_answers"), "o-", color=COLORS[0], label="right", markersize=3)
    before = 0
    for rung in sorted(args.ladder.glob("rung*/metrics.jsonl")) if args.ladder else []:
        log = metrics(rung.parent)
        for key, style in (("reward", "-"), ("eval_reward", "o-")):
            steps, values = curve(log, key, SMOOTH if key == "reward" else 1)
            axes[3].plot([before + step for step in steps], values, style, markersize=3,
                         color=COLORS[key == "eval_reward"])
        before += log[-1]["step"]
        axes[3].axvline(before, color="0.85", zorder=0)
    for axis, title in zip(axes, ("share of held-out questions right", "entropy (nats per token)",
                                  "a reward that is gamed", "four numbers in order: the ladder"),
                           strict=True):
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
        if axis.lines and axis is not axes[3]:
            axis.legend(frameon=False, fontsize=8)
    save_picture(figure, args.out_dir / "rewards.png")
    print(f"drawn: {args.out_dir / 'rewards.png'}")


if __name__ == "__main__":
    run_script(main, parse_args())
