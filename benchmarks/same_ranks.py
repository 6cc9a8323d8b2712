"""Prove that stages after SFT train the same on any number of processes, and sample the same answers.

    python benchmarks/same_ranks.py --load_from out/quickstart/full_sft
    python benchmarks/same_ranks.py --stages grpo ppo --seed 7 --json ranks.json

benchmarks/faults.py --only processes compares tiny models of every stage, in more ways. Here a model that has
learnt something trains on the built-in data, and torchrun starts the processes.

Each stage takes a few steps in float32: on one process with the whole batch in one forward pass, on one that
accumulates, and on two and four processes, with and without accumulation. A line compares such a run with the
first one. The losses of all steps and the final weights must differ by less than 1e-5, and the exit code is 1
where they do not.

In grpo, ppo and on_policy the model itself samples what it learns from. Rounding may then choose another
token, and from there on a run learns from another answer. Such a flip counts as right only where the random
number lay within 1e-5 of the border between the two tokens, and all steps before it are equal.
"""

import hashlib
import json
import math
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ROOT, Parser, count, run_script, seed
from common.errors import UsageError
from common.files import json_text, write_whole

TOLERANCE = 1e-5
# AdamW moves a weight whose gradient is nearly 0 by up to the learning rate, and rounding decides whereto. So
# the rate of rollouts is that of benchmarks/faulty_ranks.py, and not the recipes' 3e-4.
ROLLOUT = ("--batch_size 64 --max_new_tokens 32 --updates_per_rollout 2 --kl_beta 0.02 --show_interval 0 "
           "--learning_rate 1e-4")
# Stage -> (script, its flags, the rows of an accumulated forward pass, steps that learn from one rollout)
STAGES = {
    "dpo": ("dpo", "--batch_size 16", 3, 0),
    "grpo": ("grpo", f"{ROLLOUT} --group_size 8", 5, 2),
    "ppo": ("ppo", ROLLOUT, 5, 2),
    "distillation": ("distillation", "--batch_size 16 --distillation_weight 0.7 --optimizer adamw "
                     "--learning_rate 3e-4", 3, 0),
    # The student begins as its own teacher. In every other step it learns from the data, too, and moves away.
    "on_policy": ("distillation", "--batch_size 16 --distillation_weight 0.5 --on_policy 0.5 --optimizer "
                  "adamw --max_new_tokens 32 --learning_rate 1e-4", 3, 2),
}
PROCESSES = (1, 2, 4)


def main(args) -> None:
    if args.record:
        work(args)
        return
    if not args.load_from.is_dir():
        raise UsageError(f"--load_from {args.load_from}: there is no such folder; scripts/quickstart.sh and "
                         "trainer/train_full_sft.py make one")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in args.stages:
            first = None
            for processes in PROCESSES:
                for accumulates in (False, True):
                    found = run_once(stage, processes, accumulates, Path(folder), args)
                    first = first or found
                    if found is not first:
                        row = {"stage": stage, "processes": processes, "accumulates": accumulates}
                        rows.append(row | compared(first, found, STAGES[stage][3]))
                        print(line_of(rows[-1]), flush=True)
    if args.json:
        write_whole(args.json, json_text(rows))
    if not all(row["right"] for row in rows):
        raise SystemExit(1)


def run_once(stage: str, processes: int, accumulates: bool, folder: Path, args) -> dict:
    """{"losses": of each step, "weights": {name: tensor}, "answers": as work() writes them} of one run."""
    from safetensors.torch import load_file

    stage_script, flags, rows, _ = STAGES[stage]
    script = ROOT / "trainer" / f"train_{stage_script}.py"
    name = f"{stage}_{processes}_{'accumulated' if accumulates else 'whole'}"
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    command += [__file__, "--record", folder / f"{name}_answers", "--", script, *flags.split(), "--out_dir",
                folder, "--name", name, "--max_steps", args.steps, "--seed", args.seed, "--device", "cpu",
                "--dtype", "float32", "--log_interval", 1, "--eval_fraction", 0]
    command += ["--teacher", args.load_from.resolve()] if stage_script == "distillation" else []
    command += ["--load_from", args.load_from.resolve()] if stage != "distillation" else []  # a new student
    command += ["--micro_batch_size", rows] if accumulates else []
    done = subprocess.run([str(word) for word in command], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise UsageError(f"{name} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [metrics["loss"] for metrics in map(json.loads, lines) if "loss" in metrics]
    weights = next((folder / name).glob("*.safetensors"))
    answers = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{name}_answers_*"))]
    return {"losses": losses, "weights": load_file(weights),
            "answers": {key: answer for of_process in answers for key, answer in of_process.items()}}


# --- what was sampled ---------------------------------------------------------------------------------------


def work(args) -> None:
    """A process of a run: the training script, with a note of every answer that it samples.

    {key of the random numbers: {"call": which call of sample_many it was, "ids": [...], "borders": [...]}}
    """
    import trainer.rollouts
    import trainer.teacher
    from model.sample_many import sample_many

    notes, num_calls = {}, 0

    def noting(model, prompts, max_new_tokens, end_tokens, group_size=1, temperature=1.0, numbers=None):
        nonlocal num_calls
        answers = sample_many(model, prompts, max_new_tokens, end_tokens, group_size, temperature, numbers)
        if numbers is not None:
            for row, answer in enumerate(answers):
                prompt = prompts[row // group_size]
                key = hashlib.sha256(numbers[row].numpy().tobytes() + str(prompt).encode()).hexdigest()[:16]
                notes[key] = {"call": num_calls, "ids": answer.tolist(),
                              "borders": distances(model, prompt, answer, numbers[row], temperature)}
            num_calls += 1
        return answers

    trainer.rollouts.sample_many = trainer.teacher.sample_many = noting
    sys.argv = args.command
    runpy.run_path(args.command[0], run_name="__main__")
    write_whole(Path(f"{args.record}_{os.environ.get('RANK', 0)}"), json.dumps(notes))


def distances(model, prompt: list[int], answer, numbers, temperature: float) -> list[float]:
    """How far the random number of each token of the answer lay from the nearest border of its interval.

    `draw` in model/generate.py explains the intervals. The smaller the distance, the smaller a rounding error
    that chooses another token.
    """
    import torch

    with torch.no_grad():
        ids = torch.tensor([prompt + answer.tolist()])
        logits = model(ids).logits[0, len(prompt) - 1:-1].float() / temperature  # (T, V): before each token
    borders = logits.softmax(dim=-1).cumsum(dim=-1)  # (T, V): token v ends at borders[:, v]
    number = numbers[:len(answer), None] * borders[:, -1:]
    outside = torch.full_like(number, math.inf)  # below the first token and above the last there is none
    borders = torch.cat([-outside, borders[:, :-1], outside], dim=1)  # token v begins at borders[:, v]
    own = torch.stack([answer, answer + 1], dim=1)  # (T, 2)
    return (borders.gather(1, own) - number).abs().amin(dim=1).tolist()


# --- comparing two runs -------------------------------------------------------------------------------------


def compared(first: dict, other: dict, steps_of_rollout: int) -> dict:
    """A row of the table; "right" says whether `other` is the same run, apart from rounding and from ties."""
    differences = [abs(a - b) for a, b in zip(first["losses"], other["losses"], strict=True)]
    if any(first[name].keys() != other[name].keys() for name in ("weights", "answers")):
        raise UsageError("the runs have other weights, or were asked for other answers")
    row = {"loss": max(differences), "answers": len(first["answers"]),
           "weights": max((tensor - other["weights"][name]).abs().max().item()
                          for name, tensor in first["weights"].items()),
           "beyond": sum(((tensor - other["weights"][name]).abs() >= TOLERANCE).sum().item()
                         for name, tensor in first["weights"].items())}
    flips = flipped(first["answers"], other["answers"])
    row |= {"flips": len(flips), "tie": max((distance for _, distance in flips), default=None)}
    if flips:  # the steps that learn from them, and all after these, learn from something else
        row["steps"] = flips[0][0] * steps_of_rollout
        differences = differences[:row["steps"]]
        equal = row["tie"] < TOLERANCE
    else:
        equal = row["weights"] < TOLERANCE
    return row | {"right": equal and max(differences, default=0.0) < TOLERANCE}


def flipped(first: dict, other: dict) -> list[tuple[int, float]]:
    """(call, distance of the random number from the border) of each flip in the first call that has one.

    A flip is the first token in which two answers differ. Later calls sample with other weights, so nothing
    can be asked of them.
    """
    flips = []
    for key, answer in first.items():
        pairs = zip(answer["ids"], other[key]["ids"], strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if place is not None:
            flips.append((answer["call"], max(answer["borders"][place], other[key]["borders"][place])))
    return [flip for flip in flips if flip[0] == min(flips)[0]]


def line_of(row: dict) -> str:
    flips = (f"flips: {row['flips']} after {row['steps']} equal steps, up to {row['tie']:.1e} from a tie"
             if row["flips"] else "all equal")
    sampled = f", {row['answers']:,} sampled answers, {flips}" if row["answers"] else ""
    beyond = row["beyond"]
    way = f"{row['processes']} process{'es' if row['processes'] > 1 else ''}"
    way += ", accumulated" if row["accumulates"] else ""
    return (f"{row['stage']:13}{way:26}losses {row['loss']:.1e}   weights {row['weights']:.1e}{sampled}"
            f"{'' if row['right'] else f'   NOT EQUAL ({beyond:,} weights)'}")


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--load_from", type=Path, default=ROOT / "out" / "full_sft", metavar="DIR",
        help="the chat model that all stages start from, and the teacher")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what is trained")
    add("--steps", type=count, default=10, metavar="N", help="of each run")
    add("--seed", type=seed, default=42, metavar="N", help="of each run")
    add("--json", type=Path, metavar="FILE", help="write the table here, too (default: none)")
    add("--record", type=Path, metavar="FILE", help="for the processes of a run")
    add("command", nargs="*", metavar="WORD", help="for the processes of a run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse_args())
