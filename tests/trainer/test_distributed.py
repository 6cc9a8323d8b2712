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
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
         f"--master_port={port}", *flags], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


@pytest.fixture(scope="module")
def trained_twice(workshop):
    """Stage -> (folder of one process, of two, code, stdout, stderr of the two)."""
    # 41 chats, a fifth held out: 33 rows, so an epoch ends with a batch of one row, and one rank has none.
    changes = {"max_steps": None, "epochs": 2, "optimizer": "adamw", "learning_rate": 1e-3, "log_interval": 1,
               "lora_dropout": None, "micro_batch_size": 1}
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
