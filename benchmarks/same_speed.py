"""Measures whether a change of the code costs time: two checkouts run the same commands in turns.

    python benchmarks/same_speed.py --old ../old               # about ten minutes; best on an idle machine
    python benchmarks/same_speed.py --old ../old --rounds 1    # a quick look

Each row is the ratio new / old of seconds: the median over the rounds, and the lowest and highest of them.
Every command is a process of its own. The runs write into a temporary folder only.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import markdown, seconds_to_first_step
from common.cli import ROOT, Parser, count, run_script
from common.errors import UsageError

ROWS = ["--log_interval", "5", "--max_steps", "15", "--eval_interval", "0", "--eval_fraction", "0"]
STEPS = {  # name: the script and flags of a training run, of which the last log line is measured
    "pretraining step, 26m": ["train_pretrain.py", "--preset", "26m", "--batch_size", "8",
                              "--max_seq_len", "512"],
    "pretraining step, tiny": ["train_pretrain.py", "--batch_size", "16", "--max_seq_len", "128",
                               "--log_interval", "50", "--max_steps", "150"],
    "LoRA step, 26m": ["train_lora.py", "--load_from", "{base}", "--batch_size", "8", "--max_seq_len", "512"],
    "QLoRA step, 26m": ["train_lora.py", "--load_from", "{base}", "--batch_size", "8", "--max_seq_len", "512",
                        "--quantize", "nf4"],
}
DECODING = {"decoding, 26m, 1 row": ["--batch_size", "1"], "decoding, 26m, 8 rows": ["--batch_size", "8"],
            "decoding, 26m, int8, 1 row": ["--batch_size", "1", "--quantize", "int8"]}


def run(repo: Path, *words: str) -> str:
    """What a command of a checkout prints. Raises UsageError where it fails."""
    command = [sys.executable, str(repo / words[0]), *words[1:]]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8")
    if ended.returncode:
        raise UsageError(f"{' '.join(command)} ended with {ended.returncode}: {ended.stderr[-500:]}")
    return ended.stdout + ended.stderr


def training_flags(name: str, out: Path) -> list[str]:
    script, *flags = STEPS[name]
    flags = [flag.format(base=out / "base") for flag in flags]
    return [f"trainer/{script}", *ROWS, *flags, "--out_dir", str(out), "--name", "run", "--overwrite"]


def seconds_of_a_token(repo: Path, name: str, out: Path) -> float:
    """Of training, from the last log line of a run, which begins after the first steps."""
    run(repo, *training_flags(name, out))
    lines = (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [json.loads(line).get("tokens_per_second") for line in lines]
    return 1 / [speed for speed in speeds if speed][-1]


def seconds_of_a_new_token(repo: Path, name: str, out: Path) -> float:
    """Of decoding, as eval_model.py reports its speed."""
    printed = run(repo, "eval_model.py", "--load_from", str(out / "base"), "--plain", *DECODING[name],
                  "--data_path", str(out / "asked.jsonl"), "--max_new_tokens", "200")
    return 1 / float(re.search(r"([\d,]+) tokens/s generated", printed)[1].replace(",", ""))


def seconds_of_help(repo: Path, name: str, out: Path) -> float:
    began = time.perf_counter()
    run(repo, "trainer/train_lora.py", "--help")
    return time.perf_counter() - began


def seconds_of_a_start(repo: Path, name: str, out: Path) -> float:
    script, *flags = training_flags("pretraining step, tiny", out)
    return seconds_to_first_step([sys.executable, repo / script, *flags, "--log_interval", "1"])


def main(args) -> None:
    measures = dict.fromkeys(STEPS, seconds_of_a_token) | dict.fromkeys(DECODING, seconds_of_a_new_token)
    measures |= {"--help": seconds_of_help, "start to the first step": seconds_of_a_start}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        run(args.old, "trainer/train_pretrain.py", "--preset", "26m", "--max_steps", "1", "--batch_size", "2",
            "--out_dir", str(out), "--name", "base")
        asked = json.dumps({"prompt": "Once upon a time"}) + "\n"
        (out / "asked.jsonl").write_text(asked * 8, encoding="utf-8")
        rows = []
        for name, measure in measures.items():
            ratios = []
            for _ in range(args.rounds):
                old = measure(args.old, name, out)
                ratios.append(measure(ROOT, name, out) / old)
            ratios.sort()
            rows.append({"seconds, new / old": name, "median": ratios[len(ratios) // 2], "lowest": ratios[0],
                         "highest": ratios[-1]})
            print(f"{name}: {rows[-1]['median']:.3f}", flush=True)
    print(markdown(rows, dict.fromkeys(("median", "lowest", "highest"), ".3f")))


def parse_args():
    parser = Parser(description=__doc__)
    parser.add_argument("--old", type=Path, required=True, metavar="DIR", help="the checkout to compare with")
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="pairs of runs for each row")
    args = parser.parse_args()
    args.old = args.old.resolve()
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
