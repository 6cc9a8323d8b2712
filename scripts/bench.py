"""How fast everything is: against transformers and PEFT on the same shapes, and against the machine's limits.

    python scripts/bench.py                                    # every job, the 26m preset; tens of minutes
    python scripts/bench.py --jobs pretrain lora --rounds 10
    python scripts/bench.py --jobs decode --preset 104m --device cuda --json bench.json --plot bench.png
    OMP_NUM_THREADS=1 python scripts/bench.py --clock cpu      # one core of a machine that others use

Each contender of a job waits in a process of its own (the first in a shared one would pay for the memory that
the others reuse) and works when it is its turn. They take turns, round after round, so that whatever else the
machine does falls on all of them alike; the first round warms up and is not counted. Figures are medians over
rounds, with quartiles; a ratio compares two contenders within the same round. The last column is the share of
a ceiling that is measured first: bfloat16 matrix products for training, reading memory for decoding, and for
the other jobs what is named in the table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.args import ROOT, HelpFormatter, run_script

SOME, ALL = ["q_proj", "o_proj"], "all-linear"
OURS, THEIRS, THEIRS_FLOAT32 = "Seedling", "transformers", "transformers, float32"

TRAINING = {  # contender: (whose code, the layers with adapters or None, autocast to bfloat16)
    "pretrain": {OURS: (OURS, None, True), THEIRS: (THEIRS, None, True),
                 THEIRS_FLOAT32: (THEIRS, None, False)},
    "sft": {OURS: (OURS, None, True), THEIRS: (THEIRS, None, True)},
    "lora": {"full fine-tuning": (OURS, None, True), "LoRA, q and o": (OURS, SOME, True),
             "LoRA, all linear": (OURS, ALL, True), "QLoRA, all linear": ("Seedling, NF4", ALL, True),
             "PEFT, q and o": (THEIRS, SOME, True), "PEFT, all linear": (THEIRS, ALL, True)},
}
DECODING = {f"decode {batch} x {prompt}": (batch, prompt) for batch in (1, 8, 32) for prompt in (32, 512)}
JOBS = {  # what the rate counts, and the contenders: the first is what the others are compared with
    "pretrain": ("tokens", list(TRAINING["pretrain"])),
    "sft": ("supervised tokens", list(TRAINING["sft"])),
    "lora": ("tokens", list(TRAINING["lora"])),
    **{job: ("new tokens", [OURS, "Seedling, int8", THEIRS]) for job in DECODING},
    "tokenise": ("bytes", [OURS, "transformers, one text at a time"]),
    "start": ("starts", [OURS, "import torch"]),
    "save": ("bytes", [OURS, "write and fsync"]),
}


def main(args):
    if args.contender:
        return work(args)
    chosen = [job for job in JOBS if any(job == name or job.startswith(f"{name} ") for name in args.jobs)]
    limits = ceilings(args)
    print(f"{args.preset} on {args.device}, {args.rounds} rounds, {args.clock} time; ceilings: "
          f"{limits['flops'] / 1e12:.2f} TFLOP/s in bfloat16 matrix products, "
          f"{limits['bytes'] / 1e9:.1f} GB/s from memory", flush=True)
    results = {job: measure(job, args) for job in chosen}
    report = {job: rows(job, result, limits) for job, result in results.items()}
    print_tables(report)
    if args.json:
        settings = {name: getattr(args, name) for name in ("preset", "device", "clock", "rounds", "rank")}
        text = json.dumps({"settings": settings, "ceilings": limits, "jobs": report}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    if args.plot:
        draw(report, args.plot)


# ---------------------------------------------------------------- taking turns


def measure(job: str, args) -> dict[str, list[dict]]:
    """For each contender what every counted turn took: {"seconds", "amount", and "flops" or "bytes"}."""
    contenders = [name for name in JOBS[job][1] if not args.contenders or name in args.contenders]
    workers = {name: start_worker(job, name, args) for name in contenders}
    try:
        turns = {name: [] for name in workers}
        for done in range(args.rounds + 1):
            for name, worker in workers.items():
                worker.stdin.write("\n")
                worker.stdin.flush()
                answer = worker.stdout.readline()
                if not answer:
                    raise SystemExit(f"error: {job}, {name} ended early; what it printed is above")
                if done:  # the first round warms up
                    turns[name].append(json.loads(answer))
    finally:
        for worker in workers.values():
            worker.stdin.close()  # which ends it
            worker.wait()
    return turns


def start_worker(job: str, contender: str, args) -> subprocess.Popen:
    flags = ("preset", "rank", "batch_size", "seq_len", "new_tokens", "steps", "device", "clock")
    command = [sys.executable, __file__, "--job", job, "--contender", contender]
    for flag in flags:
        command += [f"--{flag}", str(getattr(args, flag))]
    if args.data_path:
        command += ["--data_path", *map(str, args.data_path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def work(args) -> None:
    """One contender's process: for each line that comes in it does its work once and answers with figures."""
    import torch

    from trainer.distributed import keep_freed_memory

    torch.manual_seed(0)
    if args.contender.startswith(("Seedling", "LoRA", "QLoRA", "full")):
        keep_freed_memory()  # as the training scripts do; who uses transformers alone does not
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    prepare = {"tokenise": tokenise, "start": start, "save": save}.get(args.job)
    prepare = prepare or (decode if args.job in DECODING else train)
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    turn = prepare(args)
    for _ in sys.stdin:
        began = clock()
        figures = turn()
        if args.device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps({"seconds": clock() - began} | figures), file=answers, flush=True)


# ---------------------------------------------------------------- what is measured: each returns one turn


def transformers_model(config):
    """transformers' own class in the shape of our config, its weights at random."""
    import transformers

    from model.weights import config_to_dict

    raw = config_to_dict(config)
    family = raw["architectures"][0].removesuffix("ForCausalLM")
    theirs = getattr(transformers, f"{family}Config")(**raw)
    return getattr(transformers, f"{family}ForCausalLM")(theirs)


def build(args):
    """The model that args.contender trains, and its optimizers."""
    import torch

    from model.lora import apply_lora, cast_frozen, freeze_all_but_lora
    from model.quantize import quantize_model
    from model.transformer import CausalLM, preset
    from trainer.optim import build_optimizers

    code, targets, _ = TRAINING[args.job][args.contender]
    config = preset(args.preset)
    model = transformers_model(config) if code == THEIRS else CausalLM(config)
    model.to(args.device).train()
    if code == THEIRS:
        model.config.use_cache = False
    if "NF4" in code:
        quantize_model(model)
    if targets is not None and code == THEIRS:
        import peft

        settings = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets)
        model = peft.get_peft_model(model, settings)  # adapters in float32, as ours
    elif targets is not None:
        apply_lora(model, args.rank, target_modules=targets)
        freeze_all_but_lora(model)
    if targets is not None:
        cast_frozen(model, torch.bfloat16)
    return model, build_optimizers(model, "adamw", 1e-4, 0.0)


def train(args):
    """Real steps: forward, backward, clip, AdamW, zero_grad."""
    import torch

    from model.transformer import preset
    from scripts.bench_scaling import flops_per_token

    model, optimizers = build(args)
    code, _, half = TRAINING[args.job][args.contender]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = preset(args.preset)
    if args.job == "sft":
        batches = sft_batches(args, packed=code != THEIRS)
    else:
        ids = torch.randint(config.vocab_size, (args.batch_size, args.seq_len))
        batches = [({"input_ids": ids, "labels": ids}, ids.numel())]
    # The same for everyone, adapters included: a LoRA step that computes less has a larger share.
    per_token = flops_per_token(config, args.seq_len)
    number = 0

    def turn():
        nonlocal number
        amount = flops = 0
        for _ in range(args.steps):
            batch, supervised = batches[number % len(batches)]
            number += 1
            with torch.autocast(args.device, torch.bfloat16, enabled=half):
                loss = model(**{k: v if v is None else v.to(args.device) for k, v in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            amount += supervised
            flops += batch["input_ids"].numel() * per_token
        return {"amount": amount} if args.job == "sft" else {"amount": amount, "flops": flops}

    return turn


def sft_batches(args, packed: bool) -> list[tuple[dict, int]]:
    """Batches of real conversations, (model inputs, supervised tokens): packed, or each padded to seq_len.

    transformers gets what most scripts feed it: a conversation a row, padded to the maximum, with its mask.
    """
    import torch

    from dataset.lm_dataset import SFTDataset, collate
    from dataset.packing import pack_rows, single_rows
    from model.weights import load_tokenizer

    tokenizer = load_tokenizer(ROOT / "model" / "tokenizer")
    dataset = SFTDataset(chat_files(args), tokenizer, args.seq_len)
    rows = pack_rows(dataset.lengths, args.seq_len, 0) if packed else single_rows(len(dataset), 0)
    batches = []
    for start in range(0, min(len(rows), 16 * args.batch_size), args.batch_size):
        chosen = [rows[i] for i in range(start, min(len(rows), start + args.batch_size))]
        batch = collate(dataset, chosen, tokenizer.pad_token_id)
        supervised = int((batch["labels"] != -100).sum())
        if not packed:
            width = args.seq_len - batch["input_ids"].size(1)
            fill = {"input_ids": tokenizer.pad_token_id, "labels": -100}
            batch = {k: torch.nn.functional.pad(batch[k], (0, width), value=v) for k, v in fill.items()}
            batch["attention_mask"] = (batch["input_ids"] != tokenizer.pad_token_id).long()
        batches.append((batch, supervised))
    return batches


def chat_files(args) -> list[Path]:
    from dataset.synthetic import ensure_world

    return args.data_path or [ensure_world(ROOT / "out" / "world")["sft"]]


def decode(args):
    """Greedy decoding of new_tokens after a random prompt, in float32 or int8. Its least work: every weight
    read once for each step."""
    import torch

    from model.generate import generate
    from model.one_token import prepare_to_decode
    from model.quantize import quantize_int8
    from model.transformer import CausalLM, preset

    config = preset(args.preset)
    batch_size, prompt = DECODING[args.job]
    ids = torch.randint(config.vocab_size, (batch_size, prompt), device=args.device)
    ours = args.contender != THEIRS
    model = (CausalLM(config) if ours else transformers_model(config)).to(args.device).eval()
    if ours:
        if args.contender != OURS:
            quantize_int8(model)
        prepare_to_decode(model)
    size = sum(p.nbytes for p in model.parameters())
    if "int8" in args.contender:  # its head is a copy, and of the embedding one row is read
        size -= model.model.embed_tokens.weight.nbytes

    @torch.no_grad()
    def turn():
        if ours:
            for _ in generate(model, ids, args.new_tokens, temperature=0):
                pass
        else:
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                           min_new_tokens=args.new_tokens, max_new_tokens=args.new_tokens)
        return {"amount": batch_size * args.new_tokens, "bytes": size * args.new_tokens}

    return turn


def tokenise(args):
    """Conversations from a JSONL file to token ids and masks: into our cache, or text by text."""
    from dataset.jsonl import read_records
    from dataset.lm_dataset import SFTDataset
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


def start(args):
    """A second start of train_full_sft.py, the tokens being in the cache: up to and with its first step."""
    folder = tempfile.TemporaryDirectory()
    subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                    "from pathlib import Path\nfrom model.transformer import CausalLM, preset\n"
                    "from model.weights import save_model, load_tokenizer\n"
                    f"save_model(CausalLM(preset({args.preset!r})), Path({folder.name!r}) / 'base', "
                    f"load_tokenizer(Path({str(ROOT)!r}) / 'model' / 'tokenizer'))"], check=True)
    command = [sys.executable, ROOT / "trainer" / "train_full_sft.py", "--data_path", *chat_files(args),
               "--load_from", Path(folder.name, "base"), "--out_dir", folder.name, "--name", "run",
               "--max_steps", 1000, "--log_interval", 1, "--batch_size", 1, "--eval_fraction", 0,
               "--overwrite", "--device", args.device]
    if args.contender != OURS:
        command = [sys.executable, "-c", "import torch"]

    def turn(folder=folder):  # which keeps the folder until the process ends
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True,
                                   env=os.environ | {"PYTHONUNBUFFERED": "1"})
        first_step = next((line for line in process.stdout if line.startswith("step")), None)
        process.kill()
        process.communicate()
        assert args.contender != OURS or first_step
        return {"amount": 1}

    return turn


def save(args):
    """A checkpoint of full training (weights and AdamW's two moments), against writing as many bytes."""
    import torch

    from model.transformer import CausalLM, preset
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


# ---------------------------------------------------------------- the ceilings, and what is printed


def ceilings(args) -> dict[str, float]:
    """The best of several rounds: FLOP/s of bfloat16 matrix products, bytes/s read from memory."""
    import torch

    n = 4096 if args.device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=args.device).bfloat16() for _ in range(2))
    big = torch.zeros((1 << 30) // 4, device=args.device)  # 1 GB: no cache holds it

    def best(work) -> float:
        times = []
        for _ in range(10):
            began = time.perf_counter()
            work()
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    return {"flops": 2 * n**3 / best(lambda: a @ b), "bytes": big.nbytes / best(big.sum)}


def rows(job: str, turns: dict[str, list[dict]], limits: dict[str, float]) -> dict[str, dict]:
    """contender: its rate, the time for the same work against the first contender's, share of the ceiling."""
    table = {}
    first = next(iter(turns.values()))
    for name, its in turns.items():
        rates = [turn["amount"] / turn["seconds"] for turn in its]
        reference = [turn["amount"] / turn["seconds"] for turn in first]
        row = {"rate": quartiles(rates),
               "ratio": quartiles([b / a for a, b in zip(rates, reference, strict=True)])}
        for kind in ("flops", "bytes"):
            if kind in its[0]:
                row["share"] = statistics.median(turn[kind] / turn["seconds"] for turn in its) / limits[kind]
        table[name] = row
    last = list(table.values())[-1]
    if job in ("start", "save"):  # whose last contender is the ceiling
        table[next(iter(table))]["share"] = table[next(iter(table))]["rate"][1] / last["rate"][1]
    return table


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def print_tables(report: dict) -> None:
    for job, table in report.items():
        names = list(table)
        print(f"\n| {job} | {JOBS[job][0]} a second (quartiles) | time against {names[0]} (quartiles) "
              f"| of the ceiling |\n|---|---|---|---|")
        for name in names:
            row = table[name]
            low, middle, high = row["rate"]
            form = ".3f" if middle < 10 else ",.0f"
            rate = f"{middle:{form}} ({low:{form}} to {high:{form}})"
            low, middle, high = row["ratio"]
            ratio = "1" if name == names[0] else f"{middle:.2f} ({low:.2f} to {high:.2f})"
            print(f"| {name} | {rate} | {ratio} | {row['share']:.0%} |" if "share" in row
                  else f"| {name} | {rate} | {ratio} | |")


def draw(report: dict, path: Path) -> None:
    """A bar a contender: how many times as long as the first one of its job it takes for the same work."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = [(f"{job}: {name}", row["ratio"]) for job, table in report.items() for name, row in table.items()
            if job not in ("start", "save")]
    figure = Figure(figsize=(8, 0.6 + 0.26 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (_, (low, middle, high)) in enumerate(bars):
        axes.barh(place, middle, color="#22a06b" if middle <= 1 else "#9aa5b1",
                  xerr=[[middle - low], [high - middle]], error_kw={"linewidth": 1})
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="time for the same work, against the first contender of the job (less is better)")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    groups = list(dict.fromkeys(job.split()[0] for job in JOBS))
    parser.add_argument("--jobs", nargs="+", default=groups, choices=[*groups, *DECODING], metavar="JOB",
                        help="what to measure: " + ", ".join(groups))
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="only these rows (default: all)")
    parser.add_argument("--preset", default="26m", help="shape of the model")
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
