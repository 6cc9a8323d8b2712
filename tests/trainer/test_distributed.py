"""Two processes train what one trains; the device and the dtype that the flags mean."""

import os
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.cli import ROOT
from common.device import choose_device, choose_dtype
from common.errors import UsageError
from model.weights import save_model
from trainer.distributed import Ranks, join_ranks
from trainer.stage import is_finished


def torchrun(*flags, processes=2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
         f"--master_port={port}", *flags], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


@pytest.fixture(scope="module")
def trained_twice(workshop):
    """Stage -> (folder of one process, of two, code, stdout, stderr of the two)."""
    # 41 chats, a fifth held out: 33 rows, so an epoch ends with a batch of one row, and one rank has none.
    changes = {"max_steps": None, "epochs": 2, "learning_rate": 1e-3, "log_interval": 1, "lora_dropout": None,
               "micro_batch_size": 1}
    one, two, running = workshop.folder / "one", workshop.folder / "two", {}
    for stage in ("full_sft", "lora"):
        flags = [*workshop.flags(stage, two, **changes), "--no-packing"]
        running[stage] = torchrun(*workshop.command(stage, *flags))
    for stage in running:
        assert workshop.run(stage, *workshop.flags(stage, one, **changes), "--no-packing").code == 0
    ended = {}
    for stage, process in running.items():
        out, err = process.communicate(timeout=120)
        ended[stage] = one / stage, two / stage, process.returncode, out, err
    return ended


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not in this build")
@pytest.mark.parametrize("stage", ["full_sft", "lora"])
def test_two_processes_equal_one(stage, trained_twice, read_log):
    one, two, code, out, err = trained_twice[stage]
    assert code == 0, err
    assert "33 rows" in out and "cpu x 2" in out
    assert out.count("saved ") == out.count("step  1/") == 1  # one rank talks
    ours, theirs = read_log(two), read_log(one)
    assert len(ours) == len(theirs) == 18 + 2
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and (a["step"], a.get("tokens")) == (b["step"], b.get("tokens"))
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-4)
    one, two = (load_file(next(folder.glob("*model.safetensors"))) for folder in (one, two))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0, msg=name)


def test_the_ranks_of_a_finished_run_leave_together(tmp_path, monkeypatch):
    """Rank 0 holds the store: were it the first to leave, others that still join would end with an error."""
    args, met = SimpleNamespace(run_dir=tmp_path, resume=True, overwrite=False), []
    (tmp_path / "training.json").touch()
    for agree in (True, False):
        monkeypatch.setattr(Ranks, "same", lambda ranks, value, agree=agree: met.append(value) or agree)
        for rank in (0, 1):
            with nullcontext() if agree else pytest.raises(UsageError, match="must be shared"):
                ranks = Ranks(rank, 2, torch.device("cpu"))
                assert is_finished(args.run_dir, args.resume, args.overwrite, ranks)
    assert met == [True] * 4


def has_compiler() -> bool:
    return any(map(shutil.which, ("c++", "g++", "clang++", "cl")))


@pytest.fixture(scope="module")
def plain_lora(workshop, tokenizer, make_model):
    """LoRA over a 4-bit base in float16 by one process, nothing else on: its flags and its folder."""
    # One length, so that torch.compile compiles once; 9 chats, so that one rank has a row more; all of them
    # in every batch, so that it does not matter how often the scaler skips one at first.
    words = "abcdefghi"
    data = workshop.write("even_nine.jsonl", [
        {"conversations": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in zip(words, reversed(words), strict=True)])
    model = make_model(len(tokenizer))  # of one block: compiling takes its time
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    save_model(model, workshop.folder / "one_block", tokenizer)
    flags = {"load_from": workshop.folder / "one_block", "data_path": data, "max_steps": 3,
             "dtype": "float16", "learning_rate": 1e-3, "log_interval": 1, "eval_fraction": 0,
             "lora_dropout": None, "lora_plus_ratio": 4, "lora_rslora": True, "quantize": "nf4",
             "batch_size": 9}
    folder = workshop.folder / "plain"
    ended = workshop.run("lora", *workshop.flags("lora", folder, **flags), "--no-packing")
    assert ended.code == 0, ended.err
    return flags, folder / "lora"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not in this build")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.skipif(
    not has_compiler(), reason="torch.compile needs a C++ compiler on a CPU: there is none"))])
def test_everything_at_once_equals_nothing_at_all(compiled, plain_lora, workshop, read_log):
    """DDP, accumulation, checkpointing, GradScaler, a 4-bit base, LoRA+, and torch.compile: all together."""
    flags, one = plain_lora
    together = {"micro_batch_size": 1, "gradient_checkpointing": True, "compile": compiled or None}
    out_dir = workshop.folder / f"all_at_once_{compiled}"
    words = workshop.command("lora", *workshop.flags("lora", out_dir, **flags | together), "--no-packing")
    process = forks.start(words, processes=2)
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    assert "float16 on cpu x 2" in out and "bits each" in out
    ours, theirs = read_log(out_dir / "lora"), read_log(one)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2, 3]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3) and a["tokens"] == b["tokens"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.05) and a["grad_norm"] > 0
    plain, adapter = (load_file(folder / "adapter_model.safetensors") for folder in (one, out_dir / "lora"))
    assert plain.keys() == adapter.keys()  # no wrapper's name in a key
    for name, tensor in plain.items():
        assert adapter[name].dtype == torch.float32
        close = 1e-3 if ".lora_A." in name else 2e-2  # in three steps A moves by hundredths
        assert (adapter[name] - tensor).norm() < close * tensor.norm(), name


def test_one_process_needs_no_collectives():
    alone = Ranks(0, 1, torch.device("cpu"))
    assert alone.is_main and alone.any(True) and not alone.any(False)
    assert alone.sum(1, torch.tensor(2.5)) == [1.0, 2.5]
    assert not alone.any(False, alone.patient)
    with alone.main_first():
        pass


TWO = """
import os, sys, time
from pathlib import Path
from trainer.distributed import join_ranks
ranks, made = join_ranks("cpu"), Path(sys.argv[1])
assert ranks.sum(1.0, ranks.rank) == [2.0, 1.0] and ranks.max(7 * ranks.rank) == 7
assert ranks.any(ranks.rank == 1) and not ranks.any(False)
assert ranks.same(3) and not ranks.same(ranks.rank)
with ranks.main_first():
    if ranks.is_main:
        time.sleep(0.3)
        made.touch()
    assert made.exists()
ranks.any(False, ranks.patient)
try:
    with ranks.main_first():
        made.unlink()  # fails on rank 1, were it to get here
        raise ValueError("one complaint is enough")
except ValueError as error:
    print("ValueError:", error, file=sys.stderr, flush=True)
    os._exit(1)  # at the interpreter's usual end PyTorch may abort, with a process group open
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not in this build")
def test_two_processes_agree_and_wait(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", TWO, str(tmp_path / "made")]
    running = [subprocess.Popen(command, cwd=ROOT, env=os.environ | place | {"RANK": str(rank)},
                                stderr=subprocess.PIPE, encoding="utf-8") for rank in (0, 1)]
    said = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [1, 2], said
    assert said[0].rstrip().endswith("ValueError: one complaint is enough") and "Traceback" not in said[1]


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "", "cpu,cuda"])
def test_no_such_device(name):
    with pytest.raises(UsageError, match="--device"):
        choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(name):
    with pytest.raises(UsageError, match="there is no cuda:[01] here, only cpu"):
        choose_device(name)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda:1") and choose_device("cpu:0").type == "cpu"
    with pytest.raises(UsageError, match="--device auto: there is no cuda:2 here, only cuda:0, cuda:1, cpu"):
        choose_device("auto", 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_too_many():
    with pytest.raises(UsageError, match="there is no cuda:99 here, only cuda:0"):
        choose_device("cuda:99")


def test_processes_of_one_host_can_not_share_a_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--device cuda:0: .* use --device cuda "):
        join_ranks("cuda:0")


def test_auto_always_finds_a_device_and_a_dtype():
    device = choose_device("auto")
    assert choose_dtype("auto", device) in (torch.float32, torch.bfloat16, torch.float16)
    assert choose_dtype("float16", device) == torch.float16


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tell a process that its parent has died")
@pytest.mark.parametrize("parent", ["TORCHELASTIC_RUN_ID", "SEEDLING_QUICKSTART"])
def test_a_process_does_not_outlive_its_torchrun_or_quickstart(parent):
    rank = ("import time; from trainer.distributed import end_with_parent; end_with_parent(); "
            "print('here', flush=True); time.sleep(600)")
    starts_it = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    process = subprocess.Popen([sys.executable, "-c", starts_it], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {parent: "a test"})
    assert process.stdout.readline() == "here\n"
    process.kill()
    assert process.stdout.read() == ""  # ends with the last process that holds it
    process.wait()
