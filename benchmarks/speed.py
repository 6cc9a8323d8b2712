"""Measures how fast everything is: against transformers and PEFT on the same shapes, and against the machine.

    python benchmarks/speed.py                                    # every job, the 26m preset; tens of minutes
    python benchmarks/speed.py --jobs pretrain lora --rounds 10
    python benchmarks/speed.py --jobs decode --preset 104m --device cuda --json speed.json --plot speed.png
    OMP_NUM_THREADS=1 python benchmarks/speed.py --clock cpu      # one core of a machine that others use

Each contender of a job waits in a process of its own, for in a shared process the first one would pay for
memory that the others use again. The contenders take turns, round after round, so that whatever else the
machine does slows all of them alike. The first round warms up and is not counted. Figures are medians over
rounds, with quartiles. A ratio compares two contenders within the same round. Training is in bfloat16 where
the device is fast at it, else in float32. The last column is the share of a ceiling that is measured first:
matrix products for training, and reading memory for decoding. For the jobs start and save the last contender
is the ceiling. Rows of PEFT need peft, those of llama.cpp llama-cpp-python.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import decoding, shared
from common.cli import ROOT, Parser, run_script
from common.files import json_text, write_whole

Q_AND_O, ALL_LINEAR = ["q_proj", "o_proj"], "all-linear"
OURS, OURS_NF4 = decoding.OURS, "Seedling, NF4"
THEIRS, THEIRS_FLOAT32 = decoding.THEIRS, "transformers, float32"

# contender: (whose code, the layers with adapters or None, the type of matrix products for choose_dtype)
TRAINING = {
    "pretrain": {OURS: (OURS, None, "auto"), THEIRS: (THEIRS, None, "auto"),
                 THEIRS_FLOAT32: (THEIRS, None, "float32")},
    "sft": {OURS: (OURS, None, "auto"), THEIRS: (THEIRS, None, "auto")},
    "lora": {"full fine-tuning": (OURS, None, "auto"),
             "LoRA, q and o": (OURS, Q_AND_O, "auto"),
             "LoRA, all linear": (OURS, ALL_LINEAR, "auto"),
             "QLoRA, all linear": (OURS_NF4, ALL_LINEAR, "auto"),
             "PEFT, q and o": (THEIRS, Q_AND_O, "auto"),
             "PEFT, all linear": (THEIRS, ALL_LINEAR, "auto")},
}
DECODING = {f"decode {batch} x {prompt}": (batch, prompt) for batch in (1, 8, 32) for prompt in (32, 512)}
JOBS = {  # what the rate counts, and the contenders: the others are compared with the first one
    "pretrain": ("tokens", list(TRAINING["pretrain"])),
    "sft": ("supervised tokens", list(TRAINING["sft"])),
    "lora": ("tokens", list(TRAINING["lora"])),
    **{job: ("new tokens", list(decoding.CONTENDERS)) for job in DECODING},
    "tokenise": ("bytes", [OURS, "transformers, one text at a time"]),
    "start": ("starts", [OURS, "import torch"]),
    "save": ("bytes", [OURS, "write and fsync"]),
}
LAST_IS_THE_CEILING = ("start", "save")


def main(args):
    if args.contender:
        work(args)
        return
    limits = ceilings(args)
    print(f"{args.preset} on {args.device}, {args.rounds} rounds, {args.clock} time; ceilings: "
          f"{limits['flops'] / 1e12:.2f} TFLOP/s in the matrix products of training, "
          f"{limits['bytes'] / 1e9:.1f} GB/s from memory", flush=True)
    report = {}
    for job in JOBS:
        if job in args.jobs or job.split()[0] in args.jobs:
            turns = measure(job, args)
            if turns:
                report[job] = summarise(job, turns, limits)
                print(f"\n{table(job, report[job])}", flush=True)
    if args.json:
        settings = {name: getattr(args, name) for name in ("preset", "device", "clock", "rounds", "rank")}
        write_whole(args.json, json_text({"settings": settings, "ceilings": limits, "jobs": report}))
    if args.plot:
        draw(report, args.plot)


# --- taking turns -------------------------------------------------------------------------------------------


def measure(job: str, args) -> list[dict]:
    """What every counted turn took: {"contender", "round", "seconds", "amount", and "flops" or "bytes"}."""
    packages = {name: package_of(job, name) for name in JOBS[job][1]
                if not args.contenders or name in args.contenders}
    workers = {name: start_worker(job, name, args) for name in shared.installed(packages)}
    answers = shared.take_turns(workers, args.rounds)
    return [{"contender": name, "round": number} | json.loads(answer) for number, name, answer in answers]


def package_of(job: str, contender: str) -> str | None:
    """The package that a contender needs beyond requirements.txt."""
    if job in DECODING:
        return decoding.PACKAGES.get(decoding.CONTENDERS[contender][0])
    code, targets, _ = TRAINING.get(job, {}).get(contender, (OURS, None, ""))
    return "peft" if code == THEIRS and targets is not None else None


def start_worker(job: str, contender: str, args) -> subprocess.Popen:
    command = [sys.executable, __file__, "--job", job, "--contender", contender]
    for flag in ("preset", "rank", "batch_size", "seq_len", "new_tokens", "steps", "device", "clock"):
        command += [f"--{flag}", str(getattr(args, flag))]
    if args.data_path:
        command += ["--data_path", *map(str, args.data_path)]
    if args.load_from:
        command += ["--load_from", str(args.load_from)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def work(args) -> None:
    """The process of one contender: for each line that it reads, it works once and answers with figures."""
    import torch

    from common.device import keep_freed_memory

    torch.manual_seed(0)
    if args.contender.startswith(("Seedling", "LoRA", "QLoRA", "full")):
        keep_freed_memory()  # as our training scripts do; a script of transformers alone does not
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    prepare = {"tokenise": tokenise, "start": start, "save": save}.get(args.job)
    if prepare is None:
        prepare = decode if args.job in DECODING else train
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is no answer
    turn = prepare(args)
    for _ in sys.stdin:
        began = clock()
        figures = turn()
        if args.device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps({"seconds": clock() - began} | figures), file=answers, flush=True)


# --- what is measured: each function prepares the work and returns a function that does one turn of it ------


def build(args):
    """The model that args.contender trains, and its optimizers."""
    import torch

    from model.config import preset
    from model.lora import apply_lora, cast_frozen, freeze_all_but_lora
    from model.quantize import quantize_model
    from model.transformer import CausalLM
    from trainer.optim import build_optimizers

    code, targets, _ = TRAINING[args.job][args.contender]
    config = preset(args.preset)
    model = shared.transformers_model(config) if code == THEIRS else CausalLM(config)
    model.to(args.device).train()
    if code == THEIRS:
        model.config.use_cache = False
    if code == OURS_NF4:
        quantize_model(model)
    if targets is not None:
        if code == THEIRS:
            import peft

            settings = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets)
            model = peft.get_peft_model(model, settings)  # its adapters are in float32, like ours
        else:
            apply_lora(model, args.rank, target_modules=targets)
            freeze_all_but_lora(model)
        cast_frozen(model, torch.bfloat16)
    return model, build_optimizers(model, "adamw", 1e-4, 0.0)


def train(args):
    """Real steps: forward, backward, clip, AdamW, zero_grad."""
    import torch

    from benchmarks.formulas import flops_per_token
    from common.device import choose_dtype
    from model.config import preset

    model, optimizers = build(args)
    code, _, dtype = TRAINING[args.job][args.contender]
    config = preset(args.preset)
    if args.job == "sft":
        batches = sft_batches(args, packed=code != THEIRS)
    else:
        ids = torch.randint(config.vocab_size, (args.batch_size, args.seq_len))
        batches = [({"input_ids": ids, "labels": ids}, ids.numel())]
    # The same number for every contender. So a LoRA step, which computes less, has a larger share.
    per_token = flops_per_token(config, args.seq_len)
    number = 0

    def turn():
        nonlocal number
        amount = flops = 0
        for _ in range(args.steps):
            batch, supervised = batches[number % len(batches)]
            number += 1
            shared.take_step(model, optimizers, batch, choose_dtype(dtype, torch.device(args.device)))
            shared.drop_gradients(optimizers)
            amount += supervised
            flops += batch["input_ids"].numel() * per_token
        return {"amount": amount} if args.job == "sft" else {"amount": amount, "flops": flops}

    return turn


def sft_batches(args, packed: bool) -> list[tuple[dict, int]]:
    """Batches of real conversations, (model inputs, supervised tokens): packed, or each padded to seq_len.

    transformers gets what most scripts feed it: one conversation in a row, padded to the maximum, and a mask.
    """
    import torch

    from dataset.lm_dataset import SFTDataset, collate
    from dataset.packing import pack_rows, single_rows
    from model.weights import load_tokenizer

    tokenizer = load_tokenizer(ROOT / "model" / "tokenizer")
    dataset = SFTDataset(chat_files(args), tokenizer, args.seq_len)
    rows = pack_rows(dataset.lengths, args.seq_len, 0) if packed else single_rows(len(dataset), 0)
    batches = []
    for first in range(0, min(len(rows), 16 * args.batch_size), args.batch_size):
        chosen = [rows[i] for i in range(first, min(len(rows), first + args.batch_size))]
        batch = collate(dataset, chosen, tokenizer.pad_token_id)
        supervised = int((batch["labels"] != -100).sum())
        if not packed:
            padding = (0, args.seq_len - batch["input_ids"].size(1))
            fill = {"input_ids": tokenizer.pad_token_id, "labels": -100}
            batch = {k: torch.nn.functional.pad(batch[k], padding, value=v) for k, v in fill.items()}
            batch["attention_mask"] = (batch["input_ids"] != tokenizer.pad_token_id).long()
        batches.append((batch, supervised))
    return batches


def chat_files(args) -> list[Path]:
    from dataset.synthetic import ensure_world

    return args.data_path or [ensure_world(ROOT / "out" / "world")["sft"]]


def decode(args):
    """Greedy decoding of new_tokens after a random prompt: benchmarks/decoding.py."""
    return decoding.prepare(args.contender, *DECODING[args.job], args)


def tokenise(args):
    """Conversations from a JSONL file to token ids and masks: into our cache, or text by text."""
    from dataset.lm_dataset import SFTDataset
    from dataset.records import read_records
    from model.weights import load_tokenizer

    files = chat_files(args)
    tokenizer = load_tokenizer(ROOT / "model" / "tokenizer")
    size = sum(path.stat().st_size for path in files)

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            SFTDataset(files, tokenizer, args.seq_len, cache_dir=folder)
        return {"amount": size}

    def theirs():
        for _, _, record in read_records(files):
            tokenizer.apply_chat_template(record["conversations"])
        return {"amount": size}

    return ours if args.contender == OURS else theirs


MAKE_BASE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from model.transformer import CausalLM, preset
from model.weights import load_tokenizer, save_model
save_model(CausalLM(preset(sys.argv[1])), sys.argv[2], load_tokenizer({str(ROOT / "model" / "tokenizer")!r}))
"""


def start(args):
    """A start of train_full_sft.py up to and with its first step. From the second turn on it finds its tokens
    in the cache."""
    folder = tempfile.TemporaryDirectory()
    base = Path(folder.name, "base")
    shared.output_of([sys.executable, "-c", MAKE_BASE, args.preset, base])
    command = [sys.executable, ROOT / "trainer" / "train_full_sft.py", "--data_path", *chat_files(args),
               "--load_from", base, "--out_dir", folder.name, "--name", "run", "--max_steps", 1000,
               "--log_interval", 1, "--batch_size", 1, "--eval_fraction", 0, "--overwrite",
               "--max_seq_len", 256, "--device", args.device]  # for a model from elsewhere it would be 1024

    def ours(folder=folder):  # a default value, which keeps the folder until the process ends
        shared.seconds_to_first_step(command)
        return {"amount": 1}

    def theirs():
        shared.output_of([sys.executable, "-c", "import torch"])
        return {"amount": 1}

    return ours if args.contender == OURS else theirs


def save(args):
    """A checkpoint of full training (weights and AdamW's two moments), against writing as many bytes."""
    import torch

    from model.config import preset
    from model.transformer import CausalLM
    from trainer.checkpoint import save_checkpoint

    folder = tempfile.TemporaryDirectory(dir=ROOT / "out")  # on the disk that runs are saved to
    parameters = {name: p.detach() for name, p in CausalLM(preset(args.preset)).named_parameters()}
    moments = {name: {"exp_avg": p.clone(), "exp_avg_sq": p.clone()} for name, p in parameters.items()}
    size = 3 * sum(p.nbytes for p in parameters.values())
    block = os.urandom(1 << 20)

    def ours():
        save_checkpoint(Path(folder.name), 1, {"parameters": parameters, "optimizers": moments}, 1)
        return {"amount": size}

    def plain():
        with open(Path(folder.name, "plain"), "wb") as file:
            for _ in range(size >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return {"amount": size}

    torch.manual_seed(0)
    return ours if args.contender == OURS else plain


# --- the ceilings, and what is printed ----------------------------------------------------------------------


def ceilings(args) -> dict[str, float]:
    """The best of several rounds: FLOP/s of matrix products as training takes them, bytes/s from memory."""
    import torch

    from common.device import choose_dtype

    n = 4096 if args.device == "cuda" else 2048
    dtype = choose_dtype("auto", torch.device(args.device))
    a, b = (torch.randn(n, n, device=args.device).to(dtype) for _ in range(2))
    big = torch.zeros((1 << 30) // 4, device=args.device)  # 1 GB: more than any cache holds

    def shortest_seconds(work) -> float:
        times = []
        for _ in range(10):
            began = time.perf_counter()
            work()
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    return {"flops": 2 * n**3 / shortest_seconds(lambda: a @ b),
            "bytes": big.nbytes / shortest_seconds(big.sum)}


def summarise(job: str, turns: list[dict], limits: dict[str, float]) -> dict[str, dict]:
    """contender: the quartiles of its rate and of its time for the same work against the first contender's
    ("ratio"), and its share of the ceiling, where there is one."""
    import pandas as pd

    frame = pd.DataFrame(turns)
    names = list(frame["contender"].unique())
    frame["rate"] = frame["amount"] / frame["seconds"]
    first_rates = frame[frame["contender"] == names[0]].set_index("round")["rate"]
    frame["ratio"] = frame["round"].map(first_rates) / frame["rate"]
    for kind, limit in limits.items():
        if kind in frame:
            frame["share"] = frame[kind] / frame["seconds"] / limit
    of_each = frame.groupby("contender")[["rate", "ratio"]].quantile([0.25, 0.5, 0.75])
    found = {name: {"rate": of_each.loc[name]["rate"].tolist(), "ratio": of_each.loc[name]["ratio"].tolist()}
             for name in names}
    if "share" in frame:
        for name, share in frame.groupby("contender")["share"].median().items():
            found[name]["share"] = share
    if job in LAST_IS_THE_CEILING:
        found[names[0]]["share"] = found[names[0]]["rate"][1] / found[names[-1]]["rate"][1]
    return found


def table(job: str, summary: dict[str, dict]) -> str:
    """The Markdown table of a job."""
    first = next(iter(summary))
    rows = []
    for name, row in summary.items():
        low, middle, high = row["rate"]
        form = ".3f" if middle < 10 else ",.0f"
        rate = f"{middle:{form}} ({low:{form}} to {high:{form}})"
        low, middle, high = row["ratio"]
        ratio = "1" if name == first else f"{middle:.2f} ({low:.2f} to {high:.2f})"
        rows.append({job: name, f"{JOBS[job][0]} a second (quartiles)": rate,
                     f"time against {first} (quartiles)": ratio, "of the ceiling": row.get("share")})
    return shared.markdown(rows, {"of the ceiling": ".0%"})


def draw(report: dict, path: Path) -> None:
    """One bar for each contender: how many times as long as the first one of its job it takes."""
    bars = [(f"{job}: {name}", row["ratio"]) for job, summary in report.items()
            for name, row in summary.items() if job not in LAST_IS_THE_CEILING]
    figure, axes = shared.new_figure(8, 0.6 + 0.26 * len(bars))
    axes = axes[0, 0]
    for place, (_, (low, middle, high)) in enumerate(bars):
        axes.barh(place, middle, color="#22a06b" if middle <= 1 else "#9aa5b1",
                  xerr=[[middle - low], [high - middle]], error_kw={"linewidth": 1})
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="time for the same work, against the first contender of the job (less is better)")
    shared.save_picture(figure, path)


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    groups = list(dict.fromkeys(job.split()[0] for job in JOBS))
    parser.add_argument("--jobs", nargs="+", default=groups, choices=[*groups, *DECODING], metavar="JOB",
                        help="what to measure: " + ", ".join(groups))
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="only these rows (default: all)")
    parser.add_argument("--preset", default="26m", help="shape of the model")
    parser.add_argument("--load_from", type=Path, metavar="DIR",
                        help="decode: a model in place of a shape with weights at random")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a training step")
    parser.add_argument("--seq_len", type=int, default=512, help="tokens of a row")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens decoded in a turn")
    parser.add_argument("--data_path", nargs="+", type=Path, metavar="FILE",
                        help="conversations for sft, tokenise and start (default: the embedded world's)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"],
                        help="cpu: time that the cores computed for us, where others use them too")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each contender gets")
    parser.add_argument("--steps", type=int, default=1, help="training steps of a turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios into this PNG")
    parser.add_argument("--job", choices=list(JOBS), help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)  # in a process of its own
    run_script(main, parser.parse_args())
