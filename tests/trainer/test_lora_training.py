"""LoRA through the whole of training: what its base is held in, its optimizers, and all flags at once."""

import shutil

import numpy as np
import pytest
import torch
from build import TokenSamples, make_batches
from safetensors.torch import load_file

import trainer.loop
from common.errors import UsageError
from model.lora import apply_lora, freeze_all_but_lora, load_lora
from model.quantize import quantize_model
from model.weights import load_model, save_model
from trainer.args import lora_parser, parse_args
from trainer.distributed import Ranks
from trainer.loop import train
from trainer.losses import cross_entropy
from trainer.optim import build_optimizers, learning_rate_factor
from trainer.stage import add_lora

ALONE = Ranks(0, 1, torch.device("cpu"))
VOCABULARY = 50


class Samples(TokenSamples):
    """Samples of 6 to 20 tokens in memory, all but the first two supervised."""

    identity = "samples in memory"

    def __init__(self, count: int):
        generator = torch.Generator().manual_seed(0)
        self.lengths = torch.randint(6, 20, (count,), generator=generator).numpy()
        self.num_targets, self.num_bytes = self.lengths - 2, self.lengths * 3
        ids = [torch.randint(4, VOCABULARY, (int(n),), generator=generator) for n in self.lengths]
        self.samples = [(i, torch.where(torch.arange(len(i)) >= 2, i, -100)) for i in ids]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


@pytest.fixture
def flags(tmp_path):
    def parse(**changes):
        values = {"name": "run", "out_dir": tmp_path, "device": "cpu", "dtype": "float32", "log_interval": 1,
                  "warmup_ratio": 0, "eval_interval": 0, "batch_size": 4, "lora_rank": 4, "max_steps": 4,
                  "weight_decay": 0, "learning_rate": 1e-2} | changes
        words = [w for k, v in values.items() for w in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]
        return parse_args(lora_parser("a test"), [*words, "--no-packing"])

    return parse


@pytest.fixture
def go(make_model, flags, read_log):
    """`go(lora_rank=8) -> (model, losses)`: a tiny model through add_lora and train."""

    def run(model=None, samples=None, prepare=lambda model: None, **changes):
        args, model, samples = flags(**changes), model or make_model(VOCABULARY), samples or Samples(10)
        add_lora(model, ALONE, **vars(args))
        prepare(model)
        batches = make_batches(samples, np.arange(len(samples)), args, 3, ALONE)
        train(model, batches, cross_entropy, None, args, ALONE)
        return model, [line["loss"] for line in read_log(args.run_dir)]

    return run


def base_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora." not in n}


# --- what the base is held in ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_base_is_held_in_the_compute_dtype_and_stays_to_the_bit(go, dtype, quantize):
    before = {}
    model, losses = go(samples=Samples(4), prepare=lambda m: before.update(base_of(m)), dtype=dtype,
                       quantize=quantize, learning_rate=0.05, max_steps=20)  # one batch, learnt by heart
    assert np.mean(losses[-3:]) < losses[0] - 0.2
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            assert parameter.dtype == torch.float32 and parameter.requires_grad
        else:
            assert torch.equal(parameter, before[name]) and parameter.grad is None, name
            if parameter.ndim == 2:
                assert parameter.dtype == getattr(torch, dtype), name
            elif "norm" in name:
                assert parameter.dtype == torch.float32, name
    assert model.lm_head.weight is model.model.embed_tokens.weight  # still one matrix
    assert any(p.dtype == torch.uint8 for p in model.parameters()) == (quantize == "nf4")


def test_half_precision_base_trains_as_the_float32_base_does_under_autocast(go, make_model, monkeypatch):
    """Autocast rounds each weight of a product anyway; only the embedding's rounding is new."""
    rounded = make_model(VOCABULARY)
    with torch.no_grad():
        weight = rounded.model.embed_tokens.weight
        weight.copy_(weight.bfloat16())
    half, losses = go(dtype="bfloat16")
    monkeypatch.setattr("trainer.stage.choose_dtype", lambda *_: torch.float32)  # holds the base in float32
    whole, expected = go(model=rounded, dtype="bfloat16")
    assert whole.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_residual_stream_is_float32(make_model):
    model, seen = make_model(VOCABULARY), []
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data = weight.data.bfloat16()
    for block in model.model.layers:
        block.register_forward_hook(lambda module, x, y: seen.extend([x[0].dtype, y.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.arange(8)[None])
    assert seen == [torch.float32] * 4


@pytest.fixture(scope="module")
def total(workshop):
    return sum(tensor.numel() for tensor in load_file(workshop.base / "model.safetensors").values())


@pytest.mark.parametrize("changes", [
    {"dtype": "bfloat16"}, {"dtype": "float16", "quantize": "nf4"},
    {"lora_init": "pissa", "lora_rslora": True},
    {"dtype": "bfloat16", "quantize": "nf4", "lora_init": "pissa", "gradient_checkpointing": True}])
def test_adapter_fits_the_model_it_was_trained_on(changes, workshop, total, tmp_path):
    before = (workshop.base / "model.safetensors").read_bytes()
    ended = workshop.run("lora", *workshop.flags("lora", tmp_path, max_steps=6, **changes))
    assert ended.code == 0, ended.err
    assert (workshop.base / "model.safetensors").read_bytes() == before
    (counted,) = [line for line in ended.out.splitlines() if "parameters in all" in line]
    lora = int(counted.split()[4].replace(",", ""))
    percent = f"{100 * lora / (total + lora):.2f} %"
    assert counted.startswith(f"{total + lora:,} parameters in all, {lora:,} LoRA, {percent}")
    assert ("bits each" in ended.out) == ("quantize" in changes)
    model = load_model(workshop.base)
    ids = torch.arange(16, 40)[None]
    with torch.no_grad():
        plain = model(ids).logits
        assert load_lora(model, tmp_path / "lora").matched == 14  # seven layers in each of two blocks
        moved = (model(ids).logits - plain).abs().max()
    assert 1e-3 < moved < 5  # it changes something, and is no other scale's adapter


@pytest.mark.parametrize("changes, says", [
    ({"lora_rank": 33, "lora_init": "pissa"}, "rank 33 is above the width"),
    ({"lora_init": "zero"}, "--lora_init"), ({"quantize": "int3"}, "--quantize")])
def test_what_lora_refuses(changes, says, workshop, tmp_path):
    ended = workshop.run("lora", *workshop.flags("lora", tmp_path, **changes))
    assert ended.code == 2 and says in ended.error and not list(tmp_path.iterdir())


def test_full_fine_tuning_over_a_4_bit_base_is_refused(workshop, tokenizer, tmp_path):
    save_model(quantize_model(load_model(workshop.base)), tmp_path / "nf4", tokenizer)
    changes = {"load_from": tmp_path / "nf4", "max_steps": 2}
    ended = workshop.run("full_sft", *workshop.flags("full_sft", tmp_path / "out", **changes))
    assert ended.code == 2 and "train adapters over them" in ended.error
    ended = workshop.run("lora", *workshop.flags("lora", tmp_path / "out", **changes))
    assert ended.code == 0, ended.err


# --- optimizers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon", "adamw8bit"])
def test_lora_plus_gives_b_its_own_rate(name, make_model):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    model = make_model(VOCABULARY)
    apply_lora(model, rank=4)
    freeze_all_but_lora(model)
    optimizers = build_optimizers(model, name, 1e-3, 0.0, 16.0)
    names = {p: n for n, p in model.named_parameters()}
    groups = [g for o in optimizers for g in o.param_groups]
    trained = sorted(names[p] for g in groups for p in g["params"])
    assert trained == sorted(n for n in names.values() if ".lora." in n)
    for group in groups:
        kinds = {".lora.B." in names[p] for p in group["params"]}
        assert len(kinds) == 1 and group["ratio"] == (16.0 if True in kinds else 1.0)
        assert group["lr"] == pytest.approx(1e-3 * group["ratio"])


def test_schedule_moves_both_rates(go, monkeypatch):
    seen, real = [], trainer.loop.build_optimizers

    def build(*arguments):
        optimizers = real(*arguments)
        (optimizer,) = optimizers
        optimizer.register_step_pre_hook(lambda o, *_: seen.append([g["lr"] for g in o.param_groups]))
        return optimizers

    monkeypatch.setattr(trainer.loop, "build_optimizers", build)
    go(lora_plus_ratio=8, learning_rate=1e-3, max_steps=4)
    for step, rates in enumerate(seen):
        peak = 1e-3 * learning_rate_factor(step, 4, 0)
        assert sorted(rates) == pytest.approx([peak, 8 * peak])
    assert len(seen) == 4


def test_lora_plus_moves_b_as_a_higher_rate_would(go):
    """Adam's first step moves each weight by its rate: B eight times as far, A, without a gradient, not."""
    plain, _ = go(max_steps=1, learning_rate=1e-4)
    plus, _ = go(max_steps=1, learning_rate=1e-4, lora_plus_ratio=8)
    a, b = (dict(m.named_parameters()) for m in (plain, plus))
    for name in a:
        if ".lora.B." in name:
            torch.testing.assert_close(b[name], 8 * a[name], rtol=1e-4, atol=1e-9)
        elif ".lora.A." in name:
            assert torch.equal(a[name], b[name])


def test_8bit_adamw_is_bitsandbytes_and_resumes_from_a_file(make_model, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start, gradients = torch.randn(64, 128), torch.randn(6, 64, 128)  # 8,192 values: enough to be quantized

    def fresh():
        layer = torch.nn.Linear(128, 64, bias=False)
        layer.weight.data.copy_(start)
        (optimizer,) = build_optimizers(layer, "adamw8bit", 1e-2, 0.1)
        return layer.weight, optimizer

    theirs = torch.nn.Parameter(start.clone())
    reference = bnb.optim.AdamW8bit([theirs], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    ours, optimizer = fresh()
    for step, gradient in enumerate(gradients):
        if step == 3:  # killed, and resumed from what lies on disk
            torch.save(optimizer.state_dict(), tmp_path / "state.pt")
            value = ours.detach().clone()
            ours, optimizer = fresh()
            ours.data.copy_(value)
            optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for p, o in ((theirs, reference), (ours, optimizer)):
            p.grad = gradient.clone()
            o.step()
    assert torch.equal(ours, theirs)
    assert optimizer.state[ours]["state1"].dtype == torch.uint8


def test_8bit_run_resumes_to_the_bit(workshop, tmp_path):
    pytest.importorskip("bitsandbytes")
    flags = {"optimizer": "adamw8bit", "max_steps": 6, "save_interval": 3, "eval_fraction": 0}
    assert workshop.run("lora", *workshop.flags("lora", tmp_path / "whole", **flags)).code == 0

    def stop(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.loop.Tracker, "finish", stop)
        assert workshop.run("lora", *workshop.flags("lora", tmp_path / "cut", **flags)).code == 130
    shutil.rmtree(tmp_path / "cut" / "lora" / "checkpoints" / "step_00000006")
    ended = workshop.run("lora", *workshop.flags("lora", tmp_path / "cut", **flags), "--resume")
    assert ended.code == 0 and "resumed at step 3" in ended.out
    whole, cut = (load_file(tmp_path / n / "lora" / "adapter_model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_8bit_where_it_cannot_be(workshop, tmp_path, monkeypatch, make_model):
    with pytest.raises(UsageError, match="runs on cuda, not on cpu; use adamw"):
        build_optimizers(make_model(VOCABULARY), "paged_adamw8bit", 1e-3, 0.0)
    with pytest.raises(UsageError, match="not on meta; use adamw"):
        build_optimizers(make_model(VOCABULARY).to("meta"), "adamw8bit", 1e-3, 0.0)
    bnb = pytest.importorskip("bitsandbytes")

    def no_kernel(*_):
        raise RuntimeError("no kernel image\nfor this device")

    with monkeypatch.context() as patch:
        patch.setattr(bnb.optim.AdamW8bit, "update_step", no_kernel)
        with pytest.raises(UsageError, match=r"does not run here \(no kernel image\); use adamw"):
            build_optimizers(make_model(VOCABULARY), "adamw8bit", 1e-3, 0.0)
    monkeypatch.setattr("trainer.args.find_spec", lambda name: None)
    ended = workshop.run("lora", *workshop.flags("lora", tmp_path, optimizer="adamw8bit"))
    assert ended.code == 2 and "pip install bitsandbytes" in ended.error and not list(tmp_path.iterdir())


# --- dropout -----------------------------------------------------------------------------------------------


@pytest.fixture
def masks(monkeypatch, go):
    """`masks(**flags)`: each micro-batch's dropout mask, of one sample that is the same in every one."""

    def run(**changes):
        seen, sample = [], Samples(1)
        sample.samples, sample.lengths = sample.samples * 4, sample.lengths.repeat(4)
        sample.num_targets, sample.num_bytes = sample.num_targets.repeat(4), sample.num_bytes.repeat(4)
        real = torch.nn.functional.dropout

        def dropout(x, *arguments, **options):
            y = real(x, *arguments, **options)
            seen.append((y == 0).flatten())
            return y

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "dropout", dropout)
            go(samples=sample, lora_dropout=0.5, target_modules="model.layers.0.self_attn.q_proj", **changes)
        return seen

    return run


def test_every_forward_pass_drops_out_something_else(masks):
    seen = masks(max_steps=3, batch_size=2, micro_batch_size=1)
    assert len(seen) == 6 and all(0.3 < mask.float().mean() < 0.7 for mask in seen)
    for i, mask in enumerate(seen):
        assert not any(torch.equal(mask, other) for other in seen[:i])
    again = masks(max_steps=3, batch_size=2, micro_batch_size=1)
    assert all(torch.equal(a, b) for a, b in zip(seen, again, strict=True))  # of the run's seed alone
    other = masks(max_steps=3, batch_size=2, micro_batch_size=1, seed=7)
    assert not any(torch.equal(a, b) for a, b in zip(seen, other, strict=True))
