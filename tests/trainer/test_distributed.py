"""Two processes train what one trains; the device and the dtype that the flags mean."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trainer.args import UsageError
from trainer.distributed import Ranks, choose_device, choose_dtype


def torchrun(*flags, processes=2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
         f"--master_port={port}", *flags], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, encoding="utf-8", timeout=120)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not in this build")
@pytest.mark.parametrize("stage", ["full_sft", "lora"])
def test_two_processes_equal_one(stage, workshop, read_log, tmp_path):
    # 41 chats, a fifth held out: 33 rows, so an epoch ends with a batch of one row, and one rank has none.
    changes = {"max_steps": None, "epochs": 2, "optimizer": "adamw", "learning_rate": 1e-3, "log_interval": 1,
               "lora_dropout": None, "micro_batch_size": 1}
    one, two = ([*workshop.flags(stage, tmp_path / name, **changes), "--no-packing"]
                for name in ("one", "two"))
    alone = workshop.run(stage, *one)
    assert alone.code == 0, alone
    ended = torchrun(*workshop.command(stage, *two))
    assert ended.returncode == 0, ended.stderr
    assert "33 rows" in ended.stdout and "cpu x 2" in ended.stdout
    assert ended.stdout.count("saved ") == ended.stdout.count("step  1/") == 1  # one rank talks
    ours, theirs = (read_log(tmp_path / name / stage) for name in ("two", "one"))
    assert len(ours) == len(theirs) == 18 + 2
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and (a["step"], a.get("tokens")) == (b["step"], b.get("tokens"))
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-4)
    (one,), (two,) = ((tmp_path / name / stage).glob("*model.safetensors") for name in ("one", "two"))
    one, two = load_file(one), load_file(two)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0, msg=name)


def test_one_process_needs_no_collectives():
    alone = Ranks(0, 1, torch.device("cpu"))
    assert alone.is_main and alone.any(True) and not alone.any(False)
    assert alone.sum(1, torch.tensor(2.5)) == [1.0, 2.5]
    alone.barrier()
    with alone.main_first():
        pass


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "", "cpu,cuda"])
def test_no_such_device(name):
    with pytest.raises(UsageError, match="--device"):
        choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(name):
    with pytest.raises(UsageError, match="no CUDA GPU here; use --device cpu"):
        choose_device(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_too_many():
    with pytest.raises(UsageError, match="counted from 0"):
        choose_device("cuda:99")


def test_auto_always_finds_a_device_and_a_dtype():
    device = choose_device("auto")
    assert choose_dtype("auto", device) in (torch.float32, torch.bfloat16, torch.float16)
    assert choose_dtype("float16", device) == torch.float16
