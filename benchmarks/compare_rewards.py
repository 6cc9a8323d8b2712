"""Compares the losses that learn from rewards: GRPO's, REINFORCE, CISPO, GSPO and PPO on one task.

    python benchmarks/compare_rewards.py                   # on what the quickstart left in out/full_sft
    python benchmarks/compare_rewards.py --load_from out/my_sft --out_dir ../compared --rollouts 60

The task: name the largest of three numbers, which SFT never taught. The reward is 1 for a right answer, and
up to 0.2 for a short one: without that, hardly any of the first answers would have a reward. Every run
samples the same number of answers, and all but one make several steps with each rollout. The table shows:

rollouts to 0.6    until the mean reward of a rollout reached half of what it can be
reward    mean reward of the answers that were sampled in the last rollouts
held out  part of the right greedy answers to 200 questions that were never trained
KL        how far the model has moved: KL(model || base), a mean over the tokens of answers that it samples
entropy   of the model, a mean over the tokens of the last rollouts
seconds   of a CPU's time. A run has one thread; the time in which other programs run does not count.

A run that is there already is not repeated. Readers of the code may skip this file.
"""

import json
import os
import random
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import markdown, output_of
from common.cli import ROOT, Parser, count, run_script
from common.errors import UsageError
from common.files import json_text, read_json, write_whole

FAMILY, LONGEST = "largest", 24  # of the built-in prompts; tokens of an answer at most
HALF = 0.6  # of the largest reward, 1.2
LAST_ROLLOUTS = 4  # over which reward and entropy are means
# Name -> (stage, flags, number of seeds). With one update a rollout all losses of GRPO would be the same.
METHODS = {
    "GRPO: clipped ratio": ("grpo", ["--policy_loss", "clipped"], 2),
    "GRPO, one update a rollout": ("grpo", ["--updates_per_rollout", "1"], 1),
    "REINFORCE": ("grpo", ["--policy_loss", "reinforce"], 1),
    "CISPO": ("grpo", ["--policy_loss", "cispo"], 1),
    "GSPO": ("grpo", ["--policy_loss", "gspo", "--clip_low", "0.02", "--clip_high", "0.03"], 1),
    "PPO": ("ppo", [], 1),
}


def main(args):
    if not args.load_from.is_dir():
        raise UsageError(f"--load_from {args.load_from}: no such folder; the quickstart makes one")
    prompts = prompts_of_the_task(args.out_dir)
    rows = [{"": "before", "rollouts to 0.6": None, "reward": None,
             "held out": held_out(args.load_from, prompts["grpo_test"]), "KL": 0.0}]
    for method, (_, _, seeds) in METHODS.items():
        rows += [compared(args, method, seed, prompts) for seed in range(1, seeds + 1)]
    formats = dict.fromkeys(("reward", "held out", "KL", "entropy"), ".3f")
    formats |= dict.fromkeys(("rollouts to 0.6", "seconds"), ".0f")
    print(f"\n{markdown(rows, formats)}")


def prompts_of_the_task(folder: Path) -> dict[str, Path]:
    """Files with prompts of the task: {"grpo": path, "grpo_eval": path, "grpo_test": path}."""
    from dataset.synthetic import World, split_wordings
    from dataset.world.skills import SKILL_QUESTIONS, SKILLS, make_skills

    wordings = split_wordings(random.Random(0), SKILL_QUESTIONS)
    files = make_skills(World(0), wordings, 0, {FAMILY: SKILLS[FAMILY]})
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in files}
    for name, rows in files.items():
        write_whole(paths[name], "".join(json.dumps(record, ensure_ascii=False) + "\n" for record, _ in rows))
    return paths


def compared(args, method: str, seed: int, prompts: dict[str, Path]) -> dict:
    """One row of the table. The run and its row are made unless they are there."""
    stage, flags, _ = METHODS[method]
    name = "".join(letter if letter.isalnum() else "_" for letter in f"{method} {seed}".lower())
    file = args.out_dir / f"{name}.json"
    if not file.exists():
        if "--updates_per_rollout" not in flags:
            flags = [*flags, "--updates_per_rollout", str(args.updates)]
        updates = int(flags[flags.index("--updates_per_rollout") + 1])
        before = seconds_of_children()
        output_of([
            sys.executable, ROOT / "trainer" / f"train_{stage}.py", "--load_from", args.load_from,
            "--data_path", prompts["grpo"], "--eval_fraction", 0, "--out_dir", args.out_dir, "--name", name,
            "--overwrite", "--max_steps", args.rollouts * updates, "--seed", seed,
            "--max_new_tokens", LONGEST, "--batch_size", 256, "--group_size", 16, "--rewards", "answers",
            "length:0.2", "--max_reward_tokens", 4, "--learning_rate", args.learning_rate, "--optimizer",
            "adamw", "--dtype", "float32", "--log_interval", 1, "--show_interval", 0, *flags,
        ], OMP_NUM_THREADS="1")
        seconds, run_dir = seconds_of_children() - before, args.out_dir / name
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps_of_run = [json.loads(line) for line in lines]
        reward, entropy = ([step[value] for step in steps_of_run] for value in ("reward", "entropy"))
        last, rewards = updates * LAST_ROLLOUTS, reward[::updates]
        row = {"": method + (f", seed {seed}" if seed > 1 else ""),
               "rollouts to 0.6": next((n for n, mean in enumerate(rewards, 1) if mean >= HALF), None),
               "reward": sum(reward[-last:]) / last,
               "held out": held_out(run_dir, prompts["grpo_test"]),
               "KL": divergence(run_dir, args.load_from, prompts["grpo_test"]),
               "entropy": sum(entropy[-last:]) / last, "seconds": seconds}
        write_whole(file, json_text(row | {"rewards": rewards}))
    row = read_json(file)
    print(f"{name:<32} held out {row['held out']:.3f}", flush=True)
    return {key: value for key, value in row.items() if key != "rewards"}


def seconds_of_children() -> float:
    """The CPU time of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def held_out(model: Path, prompts: Path) -> float:
    """Part of the prompts to which the greedy answer is right."""
    found = answers_of(model, prompts, temperature=0)
    return sum(prompt.test.is_right(text) for prompt, _, text in found) / len(found)


def answers_of(path: Path, prompts: Path, temperature: float) -> list[tuple]:
    """(prompt, ids of the answer, its text) for each prompt."""
    import torch

    from dataset.prompts import PromptDataset
    from model.sample_many import sample_many
    from model.weights import end_tokens, load_model, load_tokenizer

    model, tokenizer = load_model(path).eval(), load_tokenizer(path)
    dataset = PromptDataset([prompts], tokenizer, 200, needs_test=True)
    asked, end = [dataset[number] for number in range(len(dataset))], end_tokens(model, tokenizer)
    numbers = torch.rand(len(asked), LONGEST, generator=torch.Generator().manual_seed(0))
    written = sample_many(model, [prompt.ids for prompt in asked], LONGEST, end, 1, temperature, numbers)
    texts = [tokenizer.decode(ids[:-1] if ids[-1] in end else ids) for ids in written]
    return list(zip(asked, written, texts, strict=True))


def divergence(path: Path, base: Path, prompts: Path) -> float:
    """KL(model || base) in nats, a mean over the tokens of answers that the model samples."""
    import torch

    from model.weights import load_model

    model, before, total, count = load_model(path).eval(), load_model(base).eval(), 0.0, 0
    with torch.no_grad():
        for prompt, ids, _ in answers_of(path, prompts, temperature=1):
            row = torch.cat([torch.tensor(prompt.ids), ids])[None, :-1]
            now, then = (m(row).logits[0, -len(ids):].log_softmax(-1) for m in (model, before))  # (T, V)
            total += (now.exp() * (now - then)).sum().item()
            count += len(ids)
    return total / count


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    parser = Parser(description=__doc__)
    parser.add_argument("--load_from", type=Path, default=ROOT / "out" / "full_sft", metavar="DIR",
                        help="the base")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "compare_rewards", metavar="DIR",
                        help="where the runs are kept")
    parser.add_argument("--rollouts", type=count, default=40, metavar="N", help="rollouts of each run")
    parser.add_argument("--updates", type=count, default=4, metavar="N", help="steps for each rollout")
    parser.add_argument("--learning_rate", type=float, default=3e-4, metavar="LR", help="of AdamW")
    run_script(main, parser.parse_args())
