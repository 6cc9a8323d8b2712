"""Score the published tasks by our backend and by lm-eval's own `hf` backend, and compare the scores.

    python benchmarks/tasks.py                                    # the quickstart's model, on made-up data
    python benchmarks/tasks.py --load_from SMOLLM2 --task_data DIR --tasks arc piqa gsm8k    # on real data

Without --task_data a few questions of each task are made up and written as the hub would hold them: the same
columns and folders, so all that lies between a data set and a score runs. Equal means: every score to the
digit. lm-eval runs in an environment of its own, above the packages of the Python that runs this file.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ALL = ["arc", "piqa", "hellaswag", "winogrande", "gsm8k", "ceval", "cmmlu", "mmlu"]
SOUNDS = [("cow", "moo"), ("dog", "woof"), ("cat", "meow"), ("frog", "ribbit"), ("duck", "quack"),
          ("owl", "hoot"), ("pig", "oink"), ("mouse", "squeak"), ("snake", "hiss"), ("sheep", "baa")]
# The subjects of the groups that are made up here; a group of all of them is not asked for.
SUBJECTS = {"ceval": "ceval-valid_logic", "cmmlu": "cmmlu_anatomy", "mmlu": "mmlu_anatomy"}


def questions(number: int) -> list[tuple[str, list[str], int]]:
    """(animal, four sounds, the index of the right one)"""
    rng, found = random.Random(0), []
    for place in range(number):
        animal, sound = SOUNDS[place % len(SOUNDS)]
        choices = rng.sample([other for _, other in SOUNDS if other != sound], 3) + [sound]
        rng.shuffle(choices)
        found.append((animal, choices, choices.index(sound)))
    return found


def make_data(folder: Path) -> None:
    asked = questions(20)
    arc = [{"id": str(place), "question": f"What sound does a {animal} make?", "answerKey": "ABCD"[right],
            "choices": {"text": choices, "label": list("ABCD")}}
           for place, (animal, choices, right) in enumerate(asked)]
    piqa = [{"goal": f"The {animal} is hungry", "sol1": "feed it", "sol2": f"let it {choices[0]}", "label": 0}
            for animal, choices, _ in asked]
    hellaswag = [{"ind": place, "activity_label": "Animals", "ctx_a": f"Here is a {animal}.", "ctx_b": "it",
                  "ctx": f"Here is a {animal}. it", "endings": [f"says {choice}." for choice in choices],
                  "source_id": "made up", "split": "val", "split_type": "indomain", "label": str(right)}
                 for place, (animal, choices, right) in enumerate(asked)]
    winogrande = [{"sentence": f"The {animal} saw the fox, and the _ said {choices[right]}.",
                   "option1": animal, "option2": "fox", "answer": "1"} for animal, choices, right in asked]
    gsm8k = [{"question": f"What is {n} plus {n + 3}?", "answer": f"{n} + {n + 3}\n#### {2 * n + 3}"}
             for n in range(12)]
    chinese = [{"id": place, "question": f"{animal} 怎么叫？", "Question": f"{animal} 怎么叫？",
                **dict(zip("ABCD", choices, strict=True)), "answer": "ABCD"[right], "Answer": "ABCD"[right],
                "explanation": ""} for place, (animal, choices, right) in enumerate(asked)]
    mmlu = [{"question": f"What sound does a {animal} make?", "subject": "anatomy", "choices": choices,
             "answer": right} for animal, choices, right in asked]
    for path, config, splits, rows in (
            ("allenai/ai2_arc", "ARC-Easy", "train validation test", arc),
            ("allenai/ai2_arc", "ARC-Challenge", "train validation test", arc),
            ("baber/piqa", "default", "train validation", piqa),
            ("Rowan/hellaswag", "default", "train validation", hellaswag),
            ("allenai/winogrande", "winogrande_xl", "train validation", winogrande),
            ("openai/gsm8k", "main", "train test", gsm8k),
            ("ceval/ceval-exam", "logic", "dev val test", chinese),
            ("haonan-li/cmmlu", "anatomy", "dev test", chinese),
            ("cais/mmlu", "anatomy", "dev test", mmlu)):
        write_dataset(folder / path, config, splits.split(), rows)


def write_dataset(folder: Path, config: str, splits: list[str], rows: list[dict]) -> None:
    """One configuration, in the hub's layout: files, and a README that lists them."""
    folder.mkdir(parents=True, exist_ok=True)
    readme = folder / "README.md"
    listed = readme.read_text(encoding="utf-8") if readme.exists() else "---\nconfigs:\n---\n"
    listed = listed.removesuffix("---\n")
    listed += f"- config_name: {config}\n  data_files:\n"
    for split in splits:
        name = f"{config}-{split}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        listed += f"  - split: {split}\n    path: {name}\n"
    readme.write_text(listed + "---\n", encoding="utf-8")


def scores(command: list, file: Path) -> dict:
    """{task: {metric: value}} as a command writes it to a file of JSON."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    ended = subprocess.run([str(word) for word in command], env=environment, capture_output=True,
                           encoding="utf-8", cwd=ROOT)
    if ended.returncode:
        sys.exit(f"{command[1]} failed:\n{ended.stderr[-2000:]}")
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    return {task: {metric: value for metric, value in found.items() if isinstance(value, float)}
            for task, found in results.items()}


def theirs(model: Path, tasks: list[str], data: Path | None, file: Path) -> None:
    """Runs lm-eval's own backend, in its environment, and writes what it finds."""
    from lm_eval import simple_evaluate

    from inference.tasks import NAMES, local_data

    wanted = [found for name in tasks for found in NAMES.get(name, [name])]
    with local_data(data):
        found = simple_evaluate("hf", {"pretrained": str(model), "dtype": "float32"}, wanted, device="cpu",
                                batch_size=8, bootstrap_iters=1000)
    file.write_text(json.dumps({"results": found["results"]}, default=str), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "out" / "quickstart" / "full_sft"
    parser.add_argument("--load_from", type=Path, default=default, metavar="DIR", help="the model")
    parser.add_argument("--task_data", type=Path, metavar="DIR", help="real data sets, as on the hub")
    parser.add_argument("--tasks", nargs="+", default=ALL, metavar="NAME")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keeps lm-eval's environment")
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)  # in the environment of lm-eval
    args = parser.parse_args()
    if args.theirs:
        return theirs(args.load_from, args.tasks, args.task_data, args.theirs)
    from benchmarks.opens_elsewhere import make_environment

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        data, tasks = args.task_data, args.tasks
        if data is None:
            data, tasks = folder / "data", [SUBJECTS.get(name, name) for name in args.tasks]
            if not data.exists():
                make_data(data)
        python = make_environment(folder / "lm-eval", ["lm_eval[api]"])
        if python is None:
            sys.exit("lm-eval can't be installed here")
        common = ["--load_from", args.load_from.resolve(), "--tasks", *tasks, "--task_data", data.resolve()]
        files = [folder / "ours.json", folder / "theirs.json"]
        found = [scores([python, ROOT / "eval_model.py", *common, "--json", files[0]], files[0]),
                 scores([python, __file__, *common, "--theirs", files[1]], files[1])]
    different = 0
    for task, metrics in found[1].items():
        for metric, value in metrics.items():
            same = found[0][task].get(metric) == value
            different += not same
            print(f"{task:24} {metric:32} theirs {value:.4f}   ours {found[0][task].get(metric):.4f}   "
                  f"{'' if same else 'DIFFERENT'}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
