"""Makes four healthy runs and twelve sick ones, and shows which symptoms scripts/report.py names in each.

    python benchmarks/symptoms.py                     # about ten minutes of a busy core
    python benchmarks/symptoms.py --only overfitting  # one of them again
    python benchmarks/symptoms.py --table             # of what is there; trains nothing

All runs are small real trainings of the micro preset on the built-in world. Each sick run has one planted
fault, which is a flag, the data, a signal, or (for gradients that are not finite) a patched loss. The healthy
runs have the flags that a stage has here. The thresholds are those of trainer/symptoms.py.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import markdown
from common.cli import ROOT, Parser, run_script, seed
from common.errors import UsageError
from common.files import write_whole

ROWS = "--batch_size 8 --max_seq_len 128 --device cpu --dtype float32"
PRETRAIN = f"pretrain --preset micro {ROWS} --log_interval 5 --eval_interval 50"
CHATS = f"--load_from OUT/healthy_pretrain {ROWS} --log_interval 5 --eval_interval 50"
OVER_SFT = "--load_from OUT/healthy_sft --device cpu --dtype float32"
GRPO = (f"grpo {OVER_SFT} --data_path WORLD/grpo.jsonl --eval_fraction 0 --max_seq_len 128 --batch_size 64 "
        "--group_size 4 --log_interval 1 --show_interval 0")
HEALTHY = {  # name: the stage and its flags; OUT and WORLD become folders
    "healthy_pretrain": f"{PRETRAIN} --max_steps 200",
    "healthy_sft": f"full_sft {CHATS} --learning_rate 7e-3 --max_steps 300",
    "healthy_lora": f"lora {OVER_SFT} --batch_size 8 --max_seq_len 128 --log_interval 5 --eval_interval 50 "
                    "--max_steps 150",
    "healthy_dpo": f"dpo {OVER_SFT} --data_path OUT/pairs.jsonl --eval_fraction 0.1 --batch_size 16 "
                   "--max_seq_len 128 --log_interval 5 --learning_rate 5e-4 --max_steps 80",
}
PLANTED = {  # the symptom that is planted: the stage and its flags
    "loss is flat": f"{PRETRAIN} --learning_rate 1e-7 --max_steps 60",
    "learning rate too high": f"{PRETRAIN} --optimizer adamw --learning_rate 1 --warmup_ratio 0.3 "
                              "--max_steps 100",
    "learning rate too high (SFT)": f"full_sft {CHATS} --learning_rate 0.5 --max_steps 100",
    "spikes": f"pretrain --preset micro {ROWS} --log_interval 1 --eval_interval 0 --max_steps 150",
    "overfitting": f"full_sft {CHATS} --data_path OUT/few.jsonl --eval_data_path WORLD/sft_eval.jsonl "
                   "--eval_interval 20 --learning_rate 7e-3 --max_steps 160",
    "adapter learnt nothing": f"lora {OVER_SFT} --batch_size 8 --max_seq_len 128 --log_interval 5 "
                              "--learning_rate 1e-7 --max_steps 40",
    "skipped batches": f"{PRETRAIN} --max_steps 60",
    "unfinished": f"{PRETRAIN} --save_interval 20 --max_steps 5000",
    "preferences not learnt": f"dpo {OVER_SFT} --batch_size 16 --max_seq_len 128 --log_interval 5 "
                              "--learning_rate 1e-8 --max_steps 40",
    "rewards without signal": f"{GRPO} --rewards answers --max_new_tokens 24 --max_steps 8",
    "answers cut off": f"{GRPO} --reward_file OUT/reward.py:score --max_new_tokens 2 --max_steps 8",
    "slower and slower": f"{PRETRAIN} --max_steps 250",
}
# Two faults are in the loss of a training script: of every 12th batch it is infinite; of every 60th batch the
# labels are in reverse, so that a sound model finds them very unlikely.
FAULTS = {"skipped batches": 12, "spikes": 60}
PATCH = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import trainer.losses
sound, calls = trainer.losses.cross_entropy, [0]
fault, every = sys.argv[1], int(sys.argv[2])
def cross_entropy(model, batch):
    calls[0] += model.training
    is_faulty = model.training and calls[0] % every == 0
    if is_faulty and fault == "spikes":
        batch = batch | {{"labels": batch["labels"].flip(1)}}
    loss, sums = sound(model, batch)
    return (loss * float("inf") if is_faulty and fault == "skipped batches" else loss), sums
trainer.losses.cross_entropy = cross_entropy
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main(args):
    from dataset.synthetic import ensure_world

    world = args.out_dir / "world"
    ensure_world(world)
    write_data(args.out_dir, world)
    rows = []
    for name, flags in (HEALTHY | PLANTED).items():
        folder = args.out_dir / re.sub(r"\W+", "_", name)
        wanted = not args.only or name in args.only
        if wanted and not args.table and (args.only or not (folder / "done").exists()):
            train(name, f"{flags} --seed {args.seed}", folder, world)
        if (folder / "done").exists():
            rows.append(row_of(name, folder))
            print(f"{rows[-1]['as it should be']:3} {name}: {rows[-1]['named']}", flush=True)
    print("\n" + markdown(rows))
    sick, healthy = ([row["as it should be"] == "yes" for row in rows if row["run"] in kind]
                     for kind in (PLANTED, HEALTHY))
    print(f"\nthe symptom is named in {sum(sick)} of {len(sick)} sick runs; "
          f"none is named in {sum(healthy)} of {len(healthy)} healthy runs")


def write_data(out: Path, world: Path) -> None:
    """A few chats; pairs of a right answer and the answer to another question; a reward."""
    lines = (world / "sft.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:2000]
    write_whole(out / "few.jsonl", "".join(lines[:40]))
    turns = [json.loads(line)["conversations"] for line in lines]
    asked = [(chat[-2]["content"], chat[-1]["content"]) for chat in turns if len(chat) == 2]
    pairs = [{"prompt": question, "chosen": answer, "rejected": other}
             for (question, answer), (_, other) in zip(asked, asked[1:], strict=False) if answer != other]
    write_whole(out / "pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    write_whole(out / "reward.py", "def score(messages, answer, record):\n    return answer.count('e')\n")


def train(name: str, flags: str, folder: Path, world: Path) -> None:
    """One run, from its start. Its output is FOLDER.log."""
    stage, *words = flags.replace("OUT", str(folder.parent)).replace("WORLD", str(world)).split()
    has_data = "--data_path" in words
    source = {"full_sft": "sft", "lora": "lora_clinic"}.get(stage, stage)
    words += [] if has_data else ["--data_path", f"{world / source}.jsonl"]
    if not has_data and stage != "lora":
        words += ["--eval_data_path", f"{world / source}_eval.jsonl"]
    command = [sys.executable, str(ROOT / "trainer" / f"train_{stage}.py"), *words, "--overwrite",
               "--out_dir", str(folder.parent), "--name", folder.name]
    if name in FAULTS:
        command[1:1] = ["-c", PATCH, name, str(FAULTS[name])]
    (folder / "done").unlink(missing_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    with log.open("w", encoding="utf-8") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    harm = HARM.get(name)
    if harm:
        harm(process, folder)
    if process.wait() and name != "unfinished":
        raise UsageError(f"{name} ended with exit code {process.returncode}; {log} says why")
    write_whole(folder / "done", "")


def last_line(folder: Path) -> dict:
    try:
        return json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return {}


def kill_it(process: subprocess.Popen, folder: Path) -> None:
    while process.poll() is None and last_line(folder).get("step", 0) < 50:
        time.sleep(0.05)
    process.kill()


def slow_it(process: subprocess.Popen, folder: Path) -> None:
    """Holds the process for a growing part of each tenth of a second, as a machine does that gets hot."""
    while process.poll() is None:
        line = last_line(folder)
        share = 0.95 * line.get("step", 0) / line.get("max_steps", math.inf)
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.1 * share)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.1 * (1 - share))


HARM: dict[str, Callable] = {"unfinished": kill_it, "slower and slower": slow_it}


def row_of(name: str, folder: Path) -> dict:
    from trainer.runs import read_run
    from trainer.symptoms import find

    found = find(read_run(folder))
    names = [symptom.name for symptom in found]
    planted = name.partition(" (")[0]
    good = planted in names if name in PLANTED else not names
    seen = next((symptom.seen for symptom in found if symptom.name == planted), "")
    return {"run": name, "named": ", ".join(names) or "nothing", "as it should be": "yes" if good else "NO",
            "seen": seen}


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "symptoms", metavar="DIR",
                        help="for data and runs")
    parser.add_argument("--only", nargs="+", choices=(*HEALTHY, *PLANTED), metavar="NAME", help="these anew")
    parser.add_argument("--seed", type=seed, default=1, metavar="N", help="of weights and data order")
    parser.add_argument("--table", action="store_true", help="show what is there already, and train nothing")
    run_script(main, parser.parse_args())
