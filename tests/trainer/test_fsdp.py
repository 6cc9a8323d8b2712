"""--parallel fsdp: weights, gradients and optimizer cut up over processes train what one process trains."""

import os
import shutil

import forks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.errors import UsageError
from trainer.args import lora_parser, parse_args
from trainer.checkpoint import checkpoints, load_checkpoint

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed here")
# 33 rows of ragged chats: an epoch ends with a batch of one row, and ranks without one.
FLAGS = {"max_steps": 12, "log_interval": 1, "save_interval": 5, "learning_rate": 1e-3, "lora_dropout": None,
         "micro_batch_size": 1}


@pytest.fixture(scope="module")
def sharded(workshop):
    """Folders: both stages on one process; both cut up; what one of those left in the middle.

    full_sft, with Muon and AdamW, begins on two processes and goes on on three; LoRA runs on two, its blocks
    computed once more in the backward pass.
    """
    out_dir, one = workshop.folder / "fsdp", workshop.folder / "fsdp_one"
    sft = workshop.flags("full_sft", out_dir, **FLAGS, parallel="fsdp")
    sft = [*workshop.command("full_sft", *sft), "--no-packing"]
    lora = workshop.flags("lora", out_dir, **FLAGS, parallel="fsdp", gradient_checkpointing=True)
    lora = [*workshop.command("lora", *lora), "--no-packing"]
    running = [forks.start(words, processes=2) for words in ([*sft, "--max_minutes", "1e-9"], lora)]
    for stage in ("full_sft", "lora"):
        assert workshop.run(stage, *workshop.flags(stage, one, **FLAGS), "--no-packing").code == 0
    said = [process.communicate(timeout=240) for process in running]
    assert "stopped at step 1; to go on: " in said[0][0], said[0][1][-3000:]
    shutil.copytree(out_dir / "full_sft", workshop.folder / "fsdp_stopped")
    resumed = forks.start([*sft, "--resume"], processes=3)
    out, err = resumed.communicate(timeout=240)
    assert resumed.returncode == 0 and "float32 on cpu x 3 (fsdp), resumed at step 1" in out, err[-3000:]
    assert running[1].returncode == 0, said[1][1][-3000:]
    return one, out_dir, workshop.folder / "fsdp_stopped"


@pytest.mark.parametrize("stage", ["full_sft", "lora"])
def test_a_model_cut_up_trains_as_a_whole_one(stage, sharded, read_log):
    one, many, _ = (folder / stage for folder in sharded)
    ours, theirs = read_log(many), read_log(one)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] and len(ours) == 12 + 2
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and a.get("tokens") == b.get("tokens")
        for name in {"loss", "eval_loss"} & a.keys():
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
        if "grad_norm" in a:  # of more numbers in one float32 sum more small ones are lost
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    ours, theirs = (load_file(next(folder.glob("*model.safetensors"))) for folder in (many, one))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=0, msg=name)
    assert {p.name for p in many.iterdir()} == {p.name for p in one.iterdir()}  # nothing else is left behind


@pytest.mark.parametrize("stage, dtype", [("full_sft", "float16"), ("lora", "bfloat16")])
def test_it_does_so_in_half_precision(stage, dtype, workshop, read_log):
    """float16 with its GradScaler; LoRA over blocks with frozen weights in bfloat16, adapters in float32."""
    flags = FLAGS | {"max_steps": 6, "dtype": dtype, "eval_fraction": 0, "save_interval": 100}
    one, many = (workshop.folder / f"{name}_{dtype}" for name in ("one", "fsdp"))
    words = workshop.command(stage, *workshop.flags(stage, many, **flags, parallel="fsdp"), "--no-packing")
    process = forks.start(words, processes=2)
    alone = workshop.run(stage, *workshop.flags(stage, one, **flags), "--no-packing")
    out, err = process.communicate(timeout=240)
    assert alone.code == 0 and process.returncode == 0, alone.err + err[-3000:]
    assert f"{dtype} on cpu x 2 (fsdp)" in out
    ours, theirs = read_log(many / stage), read_log(one / stage)
    for a, b in zip(ours, theirs, strict=True):
        assert (a["step"], a["skipped"]) == (b["step"], b["skipped"])
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.05)


def settings(run_dir):
    return torch.load(checkpoints(run_dir)[0] / "state.pt", weights_only=True)["settings"]


def test_a_sharded_checkpoint_holds_each_number_once(sharded):
    (checkpoint,) = checkpoints(sharded[2])
    names = sorted(path.name for path in checkpoint.iterdir())
    assert len(names) == 2 + 2 and names[2:] == ["state.pt", "state.pt.sha256"]
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert state["step"] == 1 and state["parameters"] is None
    first, second = (load_file(checkpoint / name) for name in names[:2])
    trained = load_file(sharded[0] / "full_sft" / "model.safetensors")
    for name, tensor in trained.items():
        if name != "lm_head.weight":  # tied
            assert len(first[name]) + len(second[name]) == len(tensor)
    total = sum(t.numel() for part in (first, second) for n, t in part.items() if n in trained)
    assert total == sum(t.numel() for n, t in trained.items() if n != "lm_head.weight")


def test_damage_to_any_file_of_a_sharded_checkpoint_is_noticed(sharded, tmp_path, capsys):
    def cut(path):
        path.write_bytes(path.read_bytes()[:-1])

    def flip(path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)

    def drop_last_line(path):
        path.write_text("".join(path.read_text(encoding="ascii").splitlines(True)[:-1]), encoding="ascii")

    names = [path.name for path in checkpoints(sharded[2])[0].iterdir() if path.suffix != ".sha256"]
    tries = [(way, name) for way in (cut, flip, os.unlink) for name in names]
    tries.append((drop_last_line, "state.pt.sha256"))
    for i, (way, name) in enumerate(tries):
        run_dir = tmp_path / str(i)
        shutil.copytree(sharded[2], run_dir)
        assert load_checkpoint(run_dir, settings(run_dir))["step"] == 1
        way(checkpoints(run_dir)[0] / name)
        with pytest.raises(UsageError, match="every checkpoint is damaged"):
            load_checkpoint(run_dir, {})
        assert capsys.readouterr().err.count("is damaged") == 1


def test_a_sharded_run_goes_on_sharded(sharded):
    with pytest.raises(UsageError, match="began with --parallel fsdp, not ddp"):
        load_checkpoint(sharded[2], settings(sharded[2]) | {"--parallel": "ddp"})


@pytest.mark.parametrize("flags, says", [
    ([], "torchrun"), (["--compile"], "--compile"), (["--optimizer", "adamw8bit"], "use adamw"),
    (["--quantize", "nf4"], "nf4")])
def test_what_can_not_be_cut_up_is_refused_at_once(flags, says, monkeypatch, capsys):
    if flags:
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        parse_args(lora_parser("a test"), ["--name", "x", "--parallel", "fsdp", *flags])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: --parallel fsdp") and err.count("\n") == 1
    assert says in err
