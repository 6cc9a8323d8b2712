"""The other questions of gpu.py: is a GPU fast, in shares of what it can do and beside others; does it learn?

All contenders of a part run in the same process, one after the other. A line tells tokens a second, the
memory that PyTorch held at most, and the share of what the machine itself reached: with matrix products for
training, with copying memory for decoding.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

import torch

from benchmarks.formulas import MODELS, flops_per_token
from benchmarks.gpu_checks import Run, Skip, documents, left_out, note
from benchmarks.shared import drop_gradients, take_step, transformers_model
from common.cli import ROOT
from common.device import autocast, to_device
from model.config import ModelConfig, preset
from model.transformer import CausalLM
from trainer.optim import build_optimizers

SECONDS_TO_COMPILE = 35  # a contender that is compiled is left out if the part has less time than this
SECONDS_MEASURED = 2  # of each contender in training
RANK = 16  # of adapters


@dataclass
class Contender:
    """A way to take the same training step."""

    name: str
    is_ours: bool = True
    packed: bool = False  # rows of documents of about 300 tokens
    compiled: bool = False
    waits: bool = True  # as the training loop does, which reads the norm of the gradients in each step
    lora: bool = False
    in_4_bits: bool = False


OURS = Contender("Seedling")
THEIRS = Contender("transformers", is_ours=False)
PACKED = Contender("Seedling, packed rows", packed=True)
COMPILED = Contender("Seedling, compiled", compiled=True)
NO_WAIT = Contender("Seedling, without a wait in each step", waits=False)
ADAPTERS = [OURS, Contender("Seedling, LoRA", lora=True),
            Contender("transformers and PEFT, LoRA", is_ours=False, lora=True),
            Contender("Seedling, QLoRA", lora=True, in_4_bits=True)]


# --- what the machine can do --------------------------------------------------------------------------------


def machine(run: Run):
    """The machine and its packages; how fast it multiplies matrices and copies memory."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"Python": sys.version.split()[0], "cores": os.cpu_count()}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "triton", "numpy"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if run.on_gpu:
        properties = torch.cuda.get_device_properties(run.device)
        found |= {"GPU": properties.name, "GB": properties.total_memory / 1e9, "CUDA": torch.version.cuda,
                  "capability": f"{properties.major}.{properties.minor}"}
    yield note("machine", **found)
    limits = ceilings(run)
    yield note("what it reaches", **{"TFLOP/s of matrix products in bfloat16": limits["flops"] / 1e12,
                                     "GB/s of copying": limits["bytes"] / 1e9})


def ceilings(run: Run) -> dict[str, float]:
    """FLOP/s of bfloat16 matrix products, bytes/s read and written by a copy. Measured once in a run."""
    path = run.folder / "ceilings.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    n, size = (256, 2**20) if run.smoke else (8192, 2**30)
    a, b = (torch.randn(n, n, device=run.device).bfloat16() for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    found = {"flops": 2 * n**3 / (run.milliseconds(lambda: a @ b, 20) / 1000),
             "bytes": 2 * size / (run.milliseconds(lambda: target.copy_(source), 20) / 1000)}
    path.write_text(json.dumps(found), encoding="utf-8")
    return found


# --- training -----------------------------------------------------------------------------------------------


def train_26m(run: Run):
    yield from training(run, preset("26m"), 16, [OURS, THEIRS, NO_WAIT])


def train_104m(run: Run):
    yield from training(run, preset("104m"), 16, [OURS, THEIRS, PACKED, COMPILED])


def train_1b(run: Run):
    yield from training(run, MODELS["1B"], 8, [OURS, THEIRS, PACKED, COMPILED])


def lora_1b(run: Run):
    yield from training(run, MODELS["1B"], 8, ADAPTERS)


def training(run: Run, config: ModelConfig, rows: int, contenders: list[Contender]):
    """Steps with rows of 2,048 tokens in bfloat16, AdamW."""
    length = 2048
    if run.smoke:
        config, rows, length = preset("micro"), 2, 64
    rates = {}
    for contender in contenders:
        if contender.lora and not contender.is_ours and not importlib.util.find_spec("peft"):
            yield left_out(f"{contender.name}: peft is not installed")
        elif contender.compiled and (run.smoke or run.seconds_left < SECONDS_TO_COMPILE):
            yield left_out(f"{contender.name}: no time to compile")
        else:
            try:
                figures = steps(run, config, rows, length, contender)
                rates[contender.name] = figures["tokens/s"]
                yield note(contender.name, **figures)
            except torch.OutOfMemoryError:
                yield left_out(f"{contender.name}: {rows} rows of {length} do not fit into this GPU")
        if run.on_gpu:
            torch.cuda.empty_cache()
    first, *others = rates
    yield note(f"{first} is so many times as fast", **{name: rates[first] / rates[name] for name in others})


def steps(run: Run, config: ModelConfig, rows: int, length: int, contender: Contender) -> dict:
    """Takes steps for some seconds, after three that warm up."""
    model, optimizers = build(run, config, contender)
    batch, tokens_in_sight = batch_of(run, config, rows, length, contender)
    norm = None
    if run.on_gpu:
        torch.cuda.reset_peak_memory_stats(run.device)

    def step():
        nonlocal norm
        norm = take_step(model, optimizers, batch, torch.bfloat16, contender.waits)
        drop_gradients(optimizers)

    for _ in range(1 if run.smoke else 3):
        step()
    run.wait()
    began, count = time.perf_counter(), 0
    while count == 0 or (not run.smoke and time.perf_counter() - began < SECONDS_MEASURED):
        for _ in range(1 if run.smoke else 4):
            step()
            count += 1
        run.wait()
    seconds = (time.perf_counter() - began) / count
    # The same formula for every contender: a step of LoRA, which computes less, has a larger share.
    flops = flops_per_token(config, tokens_in_sight) * rows * length
    found = {"tokens/s": rows * length / seconds, "ms a step": 1000 * seconds,
             "of the peak": flops / seconds / ceilings(run)["flops"], "loss is finite": bool(norm.isfinite())}
    if run.on_gpu:
        found["GB"] = torch.cuda.max_memory_allocated(run.device) / 1e9
    return found


def build(run: Run, config: ModelConfig, contender: Contender):
    """The model in training mode, and its optimizers."""
    from model.lora import apply_lora, cast_frozen, freeze_all_but_lora
    from model.quantize import quantize_model

    torch.manual_seed(0)
    with run.device:  # random numbers for 1.1 billion weights take long on a CPU
        model = (CausalLM(config) if contender.is_ours else transformers_model(config)).train()
    if not contender.is_ours:
        model.config.use_cache = False
    if contender.in_4_bits:
        quantize_model(model)
    if contender.lora:
        if contender.is_ours:
            apply_lora(model, RANK)
            freeze_all_but_lora(model)
        else:
            import peft

            settings = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
            model = peft.get_peft_model(model, settings)
        cast_frozen(model, torch.bfloat16)
    if contender.compiled:
        model.compile()
    return model, build_optimizers(model, "adamw", 1e-4, 0.0)


def batch_of(run: Run, config: ModelConfig, rows: int, length: int, contender: Contender):
    """Random tokens as inputs of the model; and the length of the document of a token, on average."""
    ids = torch.randint(config.vocab_size, (rows, length), device=run.device)
    batch = {"input_ids": ids, "labels": ids}
    if not contender.packed:
        return batch, length
    found = documents(rows, length, mean=max(2, min(300, length // 4)))
    sizes = torch.cat([row.bincount() for row in found]).double()
    batch["document_ids"] = found
    return to_device(batch, run.device), (sizes.square().sum() / sizes.sum()).item()


# --- decoding -----------------------------------------------------------------------------------------------


def decode(run: Run):
    """Greedy tokens after a prompt of 32, weights in bfloat16, for one row and for 64."""
    from model.cuda_graph import record_decoding
    from model.generate import generate

    prompt, new = (4, 3) if run.smoke else (32, 64)
    shapes = {"micro": preset("micro")} if run.smoke else {"104m": preset("104m"), "1B": MODELS["1B"]}
    for shape, config in shapes.items():
        with run.device:
            ours = CausalLM(config).to(torch.bfloat16).eval()
            theirs = transformers_model(config).to(torch.bfloat16).eval()
        weights = sum(parameter.nbytes for parameter in ours.parameters())
        for rows in (1, 2 if run.smoke else 64):
            ids = torch.randint(config.vocab_size, (rows, prompt), device=run.device)
            # In each step all weights are read, and the keys and values of all tokens so far.
            stored = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * rows
            least = new * (weights + stored * (prompt + new / 2)) / ceilings(run)["bytes"]

            def of_ours(ids=ids, ours=ours):
                for _ in generate(ours, ids, new, temperature=0):
                    pass

            @torch.no_grad()
            def of_theirs(ids=ids, theirs=theirs):
                theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                                min_new_tokens=new, max_new_tokens=new)

            for name, work in (("Seedling", of_ours), ("Seedling, CUDA graph", of_ours),
                               ("transformers", of_theirs)):
                if "graph" in name:
                    record_decoding(ours)
                seconds = run.milliseconds(work, 1) / 1000
                ours.one_token = None
                yield note(f"{shape}, {rows} rows: {name}",
                           **{"tokens/s": rows * new / seconds, "of the bandwidth": least / seconds})


def rollouts(run: Run):
    """16 answers to each of 16 prompts, up to 64 tokens, sampled at temperature 1: what GRPO does."""
    from model.sample_many import sample_many

    config = preset("micro" if run.smoke else "26m")
    prompts, group, new = (2, 2, 3) if run.smoke else (16, 16, 64)
    ids = torch.randint(config.vocab_size, (prompts, 24), device=run.device)
    with run.device:
        ours, theirs = CausalLM(config).eval(), transformers_model(config).to(torch.bfloat16).eval()
    numbers = torch.rand(prompts * group, new)

    def of_ours():
        with autocast(run.device, torch.bfloat16):
            sample_many(ours, ids.tolist(), new, [5], group, 1.0, numbers)

    @torch.no_grad()
    def of_theirs():
        theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, temperature=1.0,
                        num_return_sequences=group, max_new_tokens=new, pad_token_id=0, eos_token_id=5)

    for name, work in (("Seedling", of_ours), ("transformers", of_theirs)):
        yield note(name, **{"answers/s": 1000 * prompts * group / run.milliseconds(work, 2)})


# --- learning -----------------------------------------------------------------------------------------------


def quickstart(run: Run):
    """The quickstart's stages, with fewer steps: how long each takes, and what it answers exactly."""
    if run.seconds_left < 60:
        raise Skip(f"only {run.seconds_left:.0f} seconds are left")
    out, minutes = run.folder / "quickstart", "0.02" if run.smoke else "2"
    environment = os.environ | ({} if run.on_gpu else {"CUDA_VISIBLE_DEVICES": ""})
    script = ROOT / "scripts" / "quickstart.py"
    process = subprocess.Popen([sys.executable, script, "--minutes", minutes, "--out_dir", out],
                               env=environment, stdout=subprocess.DEVNULL)
    try:
        code = process.wait(timeout=max(1, run.seconds_left - 15))
        if code:
            yield {"what": f"the quickstart ended with exit code {code}", "verdict": "FAILED"}
    except subprocess.TimeoutExpired:
        process.terminate()  # it asks its stage to stop, and ends
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        process.kill()
        yield left_out(f"the rest of the quickstart: {run.seconds:.0f} seconds are over")
    state = json.loads((out / "state.json").read_text(encoding="utf-8"))
    yield note(f"seconds of each step, --minutes {minutes}", **state["seconds"])
    for log in sorted(out.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime):
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        last = [line for line in lines if "tokens_per_second" in line][-1:]
        for line in last:
            kept = ("step", "loss", "reward", "tokens_per_second", "skipped")
            yield note(log.parent.name, **{name: line[name] for name in kept if name in line})
    if (out / "report.json").exists():
        scores = json.loads((out / "report.json").read_text(encoding="utf-8"))["scores"]
        shares = {stage: of["all"] for stage, of in scores.items()}
        yield note("held-out questions answered exactly", **shares)
