"""More of gpu.py's first question, is a GPU right: whole runs of the loop, process groups, the compiler."""

import contextlib
import copy
import io
import json
import random
import time
from dataclasses import replace

import torch

from benchmarks.gpu_checks import (
    FLOAT32,
    HALF,
    Run,
    backward,
    check,
    compare,
    documents,
    gradients,
    note,
    pair,
    plain_batch,
    step_gradients,
    tokens,
)
from benchmarks.shared import drop_gradients
from model.config import preset
from model.transformer import CausalLM
from trainer.distributed import Ranks
from trainer.losses import cross_entropy
from trainer.optim import build_optimizers

# --- whole runs of the loop ---------------------------------------------------------------------------------


def short_run(run: Run, name: str, *flags: str, device: torch.device | None = None):
    """A run of the training loop on made-up texts: (losses of its steps, the model, its last log line)."""
    from dataset.lm_dataset import PretrainDataset
    from model.tokenizer_files import OWN_TOKENIZER, load_tokenizer
    from trainer.args import parse_args, training_parser
    from trainer.loop import train
    from trainer.stage import load_data
    from trainer.tracking import read_metrics

    text = run.folder / "text.jsonl"
    if not text.exists():
        rng, words = random.Random(0), "the river old willow stood by long village name had before".split()
        lines = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(5, 60)))}) for _ in range(400)]
        text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    parser = training_parser("")
    parser.set_defaults(stage="pretrain", world="pretrain", name="pretrain")
    steps = "3" if run.smoke else "16"
    device = device or run.device
    args = parse_args(parser, ["--data_path", str(text), "--out_dir", str(run.folder), "--name", name,
                               "--device", str(device), "--max_steps", steps, "--log_interval", "1",
                               "--batch_size", "8", "--max_seq_len", "128",
                               "--learning_rate", "3e-3", *flags])
    ranks, tokenizer = Ranks(0, 1, device), load_tokenizer(OWN_TOKENIZER)
    torch.manual_seed(args.seed)
    model = CausalLM(replace(preset("micro"), vocab_size=len(tokenizer)))
    batches, _, _ = load_data(PretrainDataset, tokenizer, ranks, **vars(args))
    # SystemExit comes of --max_minutes.
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        train(model, batches, cross_entropy, None, args, ranks)
    log = [line for line in read_metrics(args.run_dir / "metrics.jsonl") if "loss" in line]
    return torch.tensor([line["loss"] for line in log]), model, log[-1]


def loop(run: Run):
    """The losses of a short run, step by step, against the same run on the CPU in float32."""
    cpu = torch.device("cpu")
    for optimizer in ("adamw", "muon"):
        flags = ("--optimizer", optimizer, "--dtype")
        right, _, _ = short_run(run, f"{optimizer}_cpu", *flags, "float32", device=cpu)
        found, _, _ = short_run(run, f"{optimizer}_float32", *flags, "float32")
        yield compare(f"{optimizer}: losses in float32", found, right, 2e-3)
        found, _, _ = short_run(run, f"{optimizer}_bfloat16", *flags, "bfloat16")
        yield compare(f"{optimizer}: losses in bfloat16", found, right, HALF)
        if run.on_gpu:
            found, _, last = short_run(run, f"{optimizer}_float16", *flags, "float16")
            yield compare(f"{optimizer}: last loss in float16, with GradScaler", found[-1:], right[-1:], 0.1,
                          skipped=last["skipped"])


def resume(run: Run):
    """A run that stops after its first step and goes on, against the run that did not stop."""
    dtype = ("--dtype", "bfloat16" if run.on_gpu else "float32", "--optimizer", "muon")
    _, once, _ = short_run(run, "once", *dtype)
    _, twice, _ = short_run(run, "twice", *dtype)
    short_run(run, "stopped", *dtype, "--max_minutes", "1e-6")
    _, resumed, last = short_run(run, "stopped", *dtype, "--resume")

    def same(a, b) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))

    is_exact = same(once, twice)  # or does the device sum in another order each time?
    yield note("two equal runs end with the same bits", same=is_exact)
    if is_exact:
        yield check("so does a run that stopped and went on", same(once, resumed), steps=last["step"])
    right, found = (dict(model.named_parameters()) for model in (once, resumed))
    yield compare("weights of the resumed run", found, right, HALF)


# --- several processes, of which there is one here ----------------------------------------------------------


def start_group(run: Run) -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if run.on_gpu else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def nccl(run: Run):
    """One process: exchanges that change nothing, and a step of DDP."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    start_group(run)
    try:
        numbers = torch.randn(1000, device=run.device)
        summed = numbers.clone()
        dist.all_reduce(summed)
        yield check(f"all_reduce by {dist.get_backend()}", torch.equal(summed, numbers))
        _, model = pair(run)
        _, right = step_gradients(model, plain_batch())
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
        batch = {name: value.to(run.device) for name, value in plain_batch().items()}
        replica(**batch).loss.backward()
        yield compare("gradients of DDP", gradients(model), right, FLOAT32)
    finally:
        dist.destroy_process_group()


def fsdp(run: Run):
    """One process with FSDP2: the gradients and the step of a model that is not cut up."""
    import torch.distributed as dist

    from trainer.distributed import full_tensor, shard

    dtype = torch.bfloat16 if run.on_gpu else torch.float32
    start_group(run)
    try:
        _, plain = pair(run)
        sharded = shard(copy.deepcopy(plain), dtype, run.ranks)
        found = []
        for model in (plain, sharded):
            optimizers = build_optimizers(model, "muon", 1e-3, 0.1, dtype=torch.float32)
            losses = backward(model, plain_batch(), dtype)
            of_model = {name: full_tensor(p.grad).clone() for name, p in model.named_parameters()}
            for optimizer in optimizers:
                optimizer.step()
            drop_gradients(optimizers)
            weights = {name: full_tensor(p.detach()) for name, p in model.named_parameters()}
            found.append((losses, of_model, weights))
        (losses, right, weights), (losses_sharded, other, weights_sharded) = found
        yield compare("losses", losses_sharded, losses, HALF)
        yield compare("gradients", other, right, 3 * HALF)
        yield compare("weights after a step of Muon and AdamW", weights_sharded, weights, HALF)
    finally:
        dist.destroy_process_group()


def compiled(run: Run):
    """--compile: losses and gradients of packed and other rows, in one graph."""
    from torch._dynamo.utils import counters

    length = 64 if run.smoke else 1024  # long enough for flex_attention
    ids = tokens(2, length)
    packed = documents(2, length, length // 5)
    for name, more in (("rows", {}), ("packed rows", {"document_ids": packed})):
        _, model = pair(run)
        batch = {"input_ids": ids, "labels": ids, **more}
        losses, right = step_gradients(model, batch, torch.bfloat16)
        counters.clear()
        model.compile()
        began = time.perf_counter()
        found, of_compiled = step_gradients(model, batch, torch.bfloat16)
        run.wait()
        breaks = sum(counters["graph_break"].values())
        figures = {"graph breaks": breaks, "seconds to compile": time.perf_counter() - began}
        yield compare(f"{name}: losses", found, losses, HALF, **figures)
        yield compare(f"{name}: gradients", of_compiled, right, 3 * HALF)
