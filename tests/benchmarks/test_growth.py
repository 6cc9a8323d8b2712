"""The formulas of growth.py are what real models count, hold and send, and docs/scaling.md shows them."""

import re
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.attention import SDPBackend
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import formulas, growth
from model.lora import apply_lora, cast_frozen, freeze_all_but_lora
from model.quantize import count_parameters, quantize_model
from model.transformer import PRESETS, CausalLM
from trainer.distributed import Ranks, parallelise
from trainer.optim import build_optimizers

PAGE = growth.ROOT / "docs" / "scaling.md"
TINY = replace(PRESETS["tiny"], vocab_size=512)
SMALL = replace(formulas.shape(128), num_hidden_layers=3, vocab_size=256)
DENSE = {name: config for name, config in PRESETS.items() if not config.num_experts}
SHAPES = {**DENSE, "biases": replace(PRESETS["26m"], attention_bias=True),
          "untied": replace(PRESETS["64m"], tie_word_embeddings=False), "wide": formulas.shape(768)}
FLAGS = Namespace(device="cpu", steps=1, optimizer="muon")


def train(model, optimizers, rows, length):
    """One step as the loop takes it."""
    ids = torch.randint(model.config.vocab_size, (rows, length))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def in_state(optimizers) -> int:
    """Bytes of the moments, without the counters of steps and the tables that 8-bit moments share."""
    tensors = [value for o in optimizers for state in o.state.values() for name, value in state.items()
               if isinstance(value, torch.Tensor) and value.dim() and not name.startswith("qmap")]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_model(name):
    config = SHAPES[name]
    with torch.device("meta"):
        model = CausalLM(config)
    blocks = dict(model.model.layers.named_parameters())
    kinds = formulas.count(config)
    assert sum(kinds.values()) == count_parameters(model)
    assert kinds["matrices"] == sum(p.numel() for p in blocks.values() if p.dim() == 2)
    assert kinds["embedding"] == model.model.embed_tokens.weight.numel()


def test_public_shapes_have_their_published_sizes():
    published = [1_100_048_384, 6_738_415_616, 8_030_261_248]
    configs = [*formulas.MODELS.values(), formulas.LLAMA3]
    assert [sum(formulas.count(config).values()) for config in configs] == published


def test_flops_are_what_torch_counts():
    """Exactly; but torch counts all of attention's scores, whose upper half is masked."""
    length, model = 64, CausalLM(TINY)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(2, length, dtype=torch.long)).logits.sum().backward()
    masked = 6 * TINY.num_hidden_layers * TINY.hidden_size * length
    counted = counter.get_total_flops() / (2 * length)
    assert formulas.flops_per_token(TINY, length) == counted - masked
    adamw, muon = build_optimizers(model, "muon", 0.1, 0.0)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert formulas.muon_flops(TINY) == counter.get_total_flops()


@pytest.mark.parametrize("method", ["adamw", "muon", "adamw8bit", "lora", "qlora"])
def test_state_is_what_tensors_take(method):
    if method == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    model = CausalLM(TINY).train()
    if method == "qlora":
        quantize_model(model)
    if "lora" in method:
        apply_lora(model, 16)
        freeze_all_but_lora(model)
        cast_frozen(model, torch.bfloat16)
    optimizers = build_optimizers(model, "adamw" if "lora" in method else method, 1e-4, 0.0)
    train(model, optimizers, 1, 8)
    sizes = formulas.state(TINY, method)
    # A 4-bit matrix has one number more, the mean of its scales, and its last block of scales may be short.
    rounded = 2e-4 * sizes["weights"] if method == "qlora" else 0
    assert sum(p.nbytes for p in model.parameters()) == pytest.approx(sizes["weights"], rel=0, abs=rounded)
    assert sum(p.grad.nbytes for p in model.parameters() if p.requires_grad) == sizes["gradients"]
    assert in_state(optimizers) == sizes["optimizer"]


@pytest.mark.parametrize("rows, length", [(4, 32), (2, 512), (1, 1024), (1, 2048)])
@pytest.mark.parametrize("config", [TINY, SMALL], ids=["qk_norm", "plain"])
def test_activations_are_what_autograd_keeps(config, rows, length):
    model, kept = CausalLM(config).train(), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(config.vocab_size, (rows, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, labels=ids)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    predicted = formulas.activations(config, rows, length, "cpu")
    predicted += 2 * formulas.multiplied(config)  # weights that autocast copied
    assert predicted == pytest.approx(sum(kept.values()), rel=0.02)


@pytest.mark.parametrize("rows, checkpointing, optimizer",
                         [(32, False, "adamw"), (32, True, "adamw"), (1, False, "adamw"), (1, False, "muon")])
def test_the_peak_of_a_step_is_the_predicted_one(rows, checkpointing, optimizer):
    """With many rows it comes with the loss (checkpointing leaves far less); with one in the optimizer."""
    config, length = (replace(SMALL, vocab_size=2048), 64) if rows > 1 else (SMALL, 8)
    model = CausalLM(config).train()
    optimizers = build_optimizers(model, optimizer, 1e-4, 0.0)
    model.gradient_checkpointing = checkpointing
    train(model, optimizers, rows, length)
    model.zero_grad(set_to_none=True)
    measured = growth.most_allocated(lambda: train(model, optimizers, rows, length))
    measured += sum(p.nbytes for p in model.parameters()) + in_state(optimizers)
    parts = formulas.peak(config, rows, length, optimizer, "cpu", ddp=False)
    assert bool(parts[formulas.GRADIENTS]) == (rows == 1)
    predicted = sum(parts.values())
    if checkpointing:
        both = [formulas.activations(config, rows, length, "cpu", way) for way in (True, False)]
        assert both[0] < 0.7 * both[1]
        predicted += both[0] - both[1]
    assert predicted == pytest.approx(measured, rel=0.05 if optimizer == "adamw" else 0.1)


class Traffic(TorchDispatchMode):
    """Bytes of what is gathered, reduced and scattered."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith(("c10d._allgather_base_", "c10d._reduce_scatter_base_")):
            self.total += max(arg.nbytes for arg in args if isinstance(arg, torch.Tensor))
        return function(*args, **(kwargs or {}))


def test_fsdp_shards_and_sends_what_is_predicted():
    """fully_shard as one rank of eight sees it; the others are made up, which costs no process."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        model = CausalLM(SMALL)
        parallelise(model, "fsdp", torch.bfloat16, Ranks(0, 8, torch.device("cpu")))
        optimizers = build_optimizers(model, "adamw", 1e-4, 0.0)
        ids = torch.randint(SMALL.vocab_size, (1, 8))
        with Traffic() as traffic:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(ids, labels=ids).loss
            loss.backward()
        optimizers[0].step()
        sizes = formulas.state(SMALL, "adamw")
        assert sum(p.to_local().nbytes for p in model.parameters()) == sizes["weights"] / 8
        assert sum(p.grad.to_local().nbytes for p in model.parameters()) == sizes["gradients"] / 8
        moments = [v.to_local() for s in optimizers[0].state.values() for v in s.values() if v.dim()]
        assert sum(moment.nbytes for moment in moments) == sizes["optimizer"] / 8
    finally:
        dist.destroy_process_group()
    assert traffic.total * 7 / 8 == formulas.sent(SMALL, 8, "FSDP2")


def test_a_point_of_two_processes_and_the_pictures(tmp_path):
    found = growth.in_own_process({"width": 64, "rows": 2, "length": 16, "processes": 2}, FLAGS)
    assert found["parameters"] == sum(formulas.count(formulas.shape(64)).values())
    assert found["seconds"] > 0 and found["wall"] > 0
    # The first process holds weights, moments, and DDP's gradients; others may use the loopback, too.
    assert found["tensors"] == pytest.approx(sum(found["predicted"].values()), rel=0.1)
    assert found["sent"] >= found["predicted_sent"] > 0
    panels = {name: [{"x": 1} | found, {"x": 2} | found] for name in ("width", "processes")}
    read = {"tokens": 9, "first": 2.0, "second": 1.0, "first_peak": 2e6, "second_peak": 1e6}
    panels["file"] = [{"x": 1} | read, {"x": 4} | read]
    growth.draw(panels, tmp_path / "scaling.png")
    with Image.open(tmp_path / "scaling.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 8  # not a blank page
    for name, points in panels.items():
        head, line, *rows = growth.table(name, points).splitlines()
        assert len(rows) == 2 and len({text.count("|") for text in (head, line, *rows)}) == 1


def test_what_fits_on_paper_and_what_does_not():
    small, large = formulas.MODELS.values()
    assert formulas.cost(large, 64, "DDP") is None  # more GPUs do not make DDP smaller
    for config, gpus in ((small, 8), (large, 8), (large, 64)):
        it = formulas.cost(config, gpus, "FSDP2")
        assert it["peak"] <= 72e9 and it["mfu"] <= 0.4
        assert it["state"] == pytest.approx(16 * sum(formulas.count(config).values()) / gpus)


def test_the_page_shows_the_printed_tables_and_a_picture_that_is_there():
    page = PAGE.read_text(encoding="utf-8")
    tables = formulas.on_paper().split("\n\n")
    assert len(tables) == 4
    for shown in tables:
        assert shown in page, "python benchmarks/growth.py --on_paper prints another table"
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert pictures == ["scaling.png"] and (PAGE.parent / "scaling.png").stat().st_size < 150_000


def test_the_page_names_flags_that_exist():
    commands = re.findall(r"python (benchmarks/\S+\.py)([^\n`]*)", PAGE.read_text(encoding="utf-8"))
    assert {script for script, _ in commands} == {"benchmarks/growth.py"}
    helped = subprocess.run([sys.executable, growth.__file__, "--help"], capture_output=True,
                            text=True, check=True).stdout.split()
    for _, words in commands:
        assert set(re.findall(r"--\w+", words)) <= set(helped), words
