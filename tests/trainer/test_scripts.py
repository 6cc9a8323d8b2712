"""The three scripts as a person meets them: help, mistakes, what a run prints and leaves behind."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import get_worker_info

import trainer.args
import trainer.stage
from common.cli import explain
from model.transformer import CausalLM
from trainer.args import parse_args, training_parser
from trainer.batches import Batches
from trainer.checkpoint import checkpoints
from trainer.interrupt import command_to_resume

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("pretrain", "full_sft", "lora")
OWN_SHAPE = {"hidden_size": None, "num_hidden_layers": None, "intermediate_size": None}  # that of the weights


def chat(*turns):
    return {"conversations": [{"role": role, "content": content} for role, content in turns]}


# --- help and ways to call ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [*STAGES, "dpo", "grpo", "ppo", "distillation"])
def test_help_is_grouped_complete_and_imports_nothing_heavy(stage):
    script = str(ROOT / "trainer" / f"train_{stage}.py")
    ended = subprocess.run([sys.executable, "-X", "importtime", script, "--help"], capture_output=True,
                           encoding="utf-8")
    imported = set(re.findall(r"\| +(\w+)", ended.stderr))
    assert ended.returncode == 0 and "argparse" in imported
    assert not imported & {"torch", "numpy", "transformers", "pandas", "matplotlib", "wandb", "tokenizers"}
    for group in ("data:", "the run:", "optimisation:", "device:", "logging:"):
        assert f"\n{group}\n" in ended.stdout
    assert f"python trainer/train_{stage}.py" in ended.stdout  # the commands at the top, as they are written
    for flag in re.findall(r"^  (--\w+)(?! \| | *\n? *-)", ended.stdout, re.MULTILINE):
        text = ended.stdout.split(f"\n  {flag}", 1)[1].split("\n  --", 1)[0]
        assert "(default:" in text or re.search(r"--(load_from|max_steps|\w+_size|num_\w+|name)", flag) or \
            flag in ("--strict", "--allow_unusable", "--split_documents", "--resume", "--overwrite",
                     "--compile", "--compile_rollouts", "--gradient_checkpointing",
                     "--use_wandb", "--lora_rslora", "--mask_cut_off"), flag


@pytest.fixture(scope="session")
def called(tmp_path_factory):
    """The ways to call a script, side by side, each with a data file that is not there."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    ways = {"python trainer/x.py": (ROOT, ["trainer/train_pretrain.py"]),
            "cd trainer && python x.py": (ROOT / "trainer", ["train_full_sft.py"]),
            "python -m trainer.x": (ROOT, ["-m", "trainer.train_pretrain"]),
            "from elsewhere": (elsewhere, [str(ROOT / "trainer" / "train_pretrain.py")])}
    running = {}
    for way, (folder, words) in ways.items():
        words = [sys.executable, *words, "--data_path", "nowhere.jsonl", "--out_dir", str(elsewhere / "out")]
        words += ["--load_from", str(elsewhere / "none")] if "sft" in words[1] else []
        running[way] = subprocess.Popen(words, cwd=folder, encoding="utf-8", stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE)
    return {way: (process, *process.communicate()) for way, process in running.items()}


@pytest.mark.parametrize("way", ["python trainer/x.py", "cd trainer && python x.py", "python -m trainer.x",
                                 "from elsewhere"])
def test_every_way_to_call_a_script(way, called):
    process, out, err = called[way]
    assert process.returncode == 2 and out == "", err
    (line,) = err.splitlines()
    assert line.startswith("error: ") and ("nowhere.jsonl" in line or "none" in line)


# --- a good run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_run_leaves_behind(stage, finished, read_log):
    folder, ended = finished[stage]
    names = {path.name for path in folder.iterdir()}
    assert {"metrics.jsonl", "loss.png", "training.json"} <= names and "checkpoints" not in names
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names if stage == "lora" else \
        {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    log = read_log(folder)
    trained, validated = [m for m in log if "loss" in m], [m for m in log if "eval_loss" in m]
    assert [m["step"] for m in trained] == [4, 8, 12, 16, 20, 24]
    assert [m["step"] for m in validated] == [9, 18, 24]
    assert set(trained[0]) == {"step", "max_steps", "loss", "learning_rate", "grad_norm", "skipped", "tokens"}
    assert set(validated[0]) == {"step", "eval_loss", "bits_per_byte"}
    assert all(math.isfinite(value) for line in log for value in line.values())
    if stage != "lora":
        assert trained[-1]["loss"] < trained[0]["loss"]
        assert validated[-1]["eval_loss"] < validated[0]["eval_loss"]
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert record["stage"] == stage and record["steps"] == 24 and record["tokens"] == trained[-1]["tokens"]
    assert record["arguments"]["learning_rate"] == 0.01 and record["versions"]["torch"] == torch.__version__
    assert record["eval_loss"] == validated[-1]["eval_loss"]
    assert ended.out.splitlines()[-1] == f"saved {folder}" and "error" not in ended.err


def test_next_stage_reads_what_the_one_before_saved(workshop, finished, tmp_path):
    ended = workshop.run("full_sft", *workshop.flags("full_sft", tmp_path, load_from=finished["pretrain"][0],
                                                     max_steps=1))
    assert ended.code == 0
    record = json.loads((tmp_path / "full_sft" / "training.json").read_text(encoding="utf-8"))
    assert record["parent"] == str(finished["pretrain"][0])
    config = json.loads((tmp_path / "full_sft" / "config.json").read_text(encoding="utf-8"))
    assert config["hidden_size"] == 32 and config["num_hidden_layers"] == 2  # inherited


def test_pretraining_can_go_on_from_weights(workshop, finished, tmp_path):
    flags = workshop.flags("pretrain", tmp_path, load_from=finished["pretrain"][0], max_steps=1, **OWN_SHAPE)
    assert workshop.run("pretrain", *flags).code == 0
    first = json.loads((tmp_path / "pretrain" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["loss"] < 8  # a new model begins at ln 6400 = 8.8


def test_lora_prints_its_share_and_leaves_the_base_alone(workshop, finished):
    folder, ended = finished["lora"]
    line = re.search(r"([\d,]+) parameters in all, ([\d,]+) LoRA, ([\d.]+) %", ended.out)
    total, lora, percent = (float(number.replace(",", "")) for number in line.groups())
    adapter = load_file(folder / "adapter_model.safetensors")
    base = load_file(workshop.base / "model.safetensors")
    assert lora == sum(t.numel() for t in adapter.values()) and all("lora" in name for name in adapter)
    assert total == lora + sum(t.numel() for t in base.values())
    assert percent == pytest.approx(100 * lora / total, abs=0.005)
    assert any(t.abs().max() > 0 for name, t in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize("targets, kinds", [
    (["all-linear"], None), (["square"], {"q_proj", "o_proj"}), (["q_proj"], {"q_proj"}),
    (["q_proj", "up_proj"], {"q_proj", "up_proj"}), ([r".*\.(k|v)_proj"], {"k_proj", "v_proj"})])
def test_target_modules(targets, kinds, workshop, tmp_path):
    flags = workshop.flags("lora", tmp_path, max_steps=1, target_modules=targets)
    ended = workshop.run("lora", *flags)
    assert ended.code == 0, ended.err
    adapter = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    everything = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".lora_")[0].split(".")[-1] for name in adapter} == (kinds or everything)


def test_finishing_needs_no_git(workshop, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert workshop.run("full_sft", *workshop.flags("full_sft", tmp_path, max_steps=1)).code == 0
    record = json.loads((tmp_path / "full_sft" / "training.json").read_text(encoding="utf-8"))
    assert record["git"] is None


def test_wandb_offline(workshop, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = workshop.flags("full_sft", tmp_path, max_steps=2, use_wandb=True, wandb_project="a-test")
    ended = workshop.run("full_sft", *flags)
    assert ended.code == 0, ended.err
    assert list((tmp_path / "full_sft").glob("wandb/offline-run-*/*.wandb"))


def test_wandb_without_an_account(workshop, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**options):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    ended = workshop.run("pretrain", *workshop.flags("pretrain", tmp_path, use_wandb=True))
    assert ended.code == 2 and "--use_wandb: No API key configured.; with WANDB_MODE=offline" in ended.error


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="no C++ compiler")
def test_compiled_run_equals_the_plain_one(workshop, read_log, tmp_path):
    logs, data = [], workshop.write("even.jsonl", [GOOD] * 8)  # one length: compiled once, not for each shape
    for compiled in (None, True):
        out_dir = tmp_path / str(compiled)
        flags = workshop.flags("full_sft", out_dir, data_path=data, max_steps=2, log_interval=1,
                               eval_fraction=0, optimizer="adamw", compile=compiled)
        ended = workshop.run("full_sft", "--no-packing", *flags)
        assert ended.code == 0, ended.err
        logs.append([line["loss"] for line in read_log(out_dir / "full_sft")])
        state = load_file(out_dir / "full_sft" / "model.safetensors")
        assert not any("_orig_mod" in name for name in state)
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)


def test_bad_lines_are_shown_counted_and_skipped(workshop, tmp_path):
    path = workshop.write("some_bad.jsonl", [chat(("user", "a"), ("assistant", "b")), '{"conversations": [',
                                             {"what": "ever"}, chat(("user", "no answer")),
                                             *[chat(("user", "c"), ("assistant", "d"))] * 5])
    ended = workshop.run("full_sft", *workshop.flags("full_sft", tmp_path, data_path=path, max_steps=1))
    assert ended.code == 0
    for line in (2, 3, 4):
        assert f"{path}:{line}: " in ended.err
    assert "bad lines skipped: 2, records with nothing to learn skipped: 1" in ended.err


# --- mistakes ----------------------------------------------------------------------------------------------


def snapshot(folder):
    return {path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in folder.rglob("*")}


@pytest.fixture
def complaint(workshop, tmp_path):
    """Runs a script that must refuse: code 2, one line, an earlier run's folder as it was."""
    for stage in STAGES:
        (tmp_path / "out" / stage / "checkpoints").mkdir(parents=True)
        for name in ("model.safetensors", "metrics.jsonl", "loss.png", "training.json", "checkpoints/x"):
            (tmp_path / "out" / stage / name).write_text("precious", encoding="utf-8")

    def run(stage, *more, **changes):
        before = snapshot(tmp_path / "out")
        ended = workshop.run(stage, *workshop.flags(stage, tmp_path / "out", **changes), *more)
        assert ended.code == 2, ended
        assert snapshot(tmp_path / "out") == before
        line = ended.error
        assert ended.err.strip().endswith(line) and len(line) < 600
        return line

    return run


GOOD, TEXT = chat(("user", "a"), ("assistant", "b")), {"text": "a small text"}
BAD_DATA = {  # name -> (records for pretraining, records for chats, what the line must say)
    "broken": ([TEXT, '{"text": "cut'], [GOOD, '{"conversations": ['], "not valid JSON"),
    "unknown": ([TEXT, {"what": 1}], [GOOD, {"what": 1}], "'what'"),
    "roles": ([TEXT, {"text": 5}], [GOOD, chat(("robot", "a"), ("assistant", "b"))], ""),
    "silent": ([TEXT, {"text": " "}], [GOOD, chat(("user", "a"))], ""),
    "long": (None, [GOOD, chat(("user", "word " * 90), ("assistant", "b"))], "longer than a row of 64"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_records(stage, name, workshop, complaint):
    texts, chats, says = BAD_DATA[name]
    records = texts if stage == "pretrain" else chats
    if records is None:
        pytest.skip("a long text is cut into windows")
    path = workshop.write(f"{name}_{stage}.jsonl", records)
    line = complaint(stage, "--strict", data_path=path)
    assert line.startswith(f"error: {path}:2: ") and says in line
    path = workshop.write(f"{name}_{stage}_only.jsonl", records[1:] * 2)
    line = complaint(stage, data_path=path)  # not one good record: fatal without --strict too
    assert str(path) in line and says in line


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_of_which_most_is_unusable_is_refused(stage, workshop, complaint):
    """Such as a README.md with one line of JSON in it."""
    good = TEXT if stage == "pretrain" else GOOD
    path = workshop.write(f"most_{stage}.md", ["# Title", "Some words.", good])
    line = complaint(stage, data_path=path)
    assert f"{path}: 2 of 3 records cannot be used (first problem: line 1: not valid JSON" in line
    assert "--allow_unusable" in line


def test_flags_for_files_of_others(workshop, tmp_path):
    text = "<|im_start|>the cat sat on a stone<|im_end|> " * 20
    path = workshop.write("others.jsonl", ["# Title", "Some words.", {"text": text}])
    flags = workshop.flags("pretrain", tmp_path / "out", data_path=path)
    ended = workshop.run("pretrain", *flags, "--allow_unusable", "--split_documents")
    assert ended.code == 0 and "2 of 3 records cannot be used" in ended.err and "spelled" not in ended.err
    about = json.loads((tmp_path / "out" / "pretrain" / "training.json").read_text(encoding="utf-8"))
    assert about["arguments"]["split_documents"] and about["arguments"]["allow_unusable"]


@pytest.mark.parametrize("stage", STAGES)
def test_data_files(stage, workshop, complaint, tmp_path):
    assert "nowhere.jsonl: no such file" in complaint(stage, data_path="nowhere.jsonl")
    empty = workshop.write("empty.jsonl", [])
    assert f"{empty}: the file is empty" in complaint(stage, data_path=empty)
    good = workshop.texts if stage == "pretrain" else workshop.chats
    assert "nowhere.jsonl" in complaint(stage, data_path=[good, "nowhere.jsonl"])
    assert "nowhere.jsonl" in complaint(stage, eval_data_path="nowhere.jsonl", eval_fraction=None)
    assert str(tmp_path) in complaint(stage, data_path=tmp_path)
    other = workshop.chats if stage == "pretrain" else workshop.write("numbers.jsonl", ["1", "2"])
    assert str(other) in complaint(stage, data_path=other)


@pytest.mark.parametrize("stage", STAGES)
def test_weights(stage, workshop, complaint, tmp_path):
    changes = OWN_SHAPE if stage == "pretrain" else {}
    assert "nowhere" in complaint(stage, load_from=tmp_path / "nowhere", **changes)
    (tmp_path / "hollow").mkdir()
    assert "hollow" in complaint(stage, load_from=tmp_path / "hollow", **changes)

    def spoiled(name):
        shutil.copytree(workshop.base, tmp_path / name)
        return tmp_path / name

    other = spoiled("other_shape")
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}), encoding="utf-8")
    assert "[64, 32], the config asks for [96, 32]" in complaint(stage, load_from=other, **changes)

    cut = spoiled("cut_off")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "cut_off" in complaint(stage, load_from=cut, **changes)

    small = spoiled("other_tokenizer")  # weights for 100 entries, beside a tokenizer of 6,400
    state = load_file(small / "model.safetensors")
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:100].clone()
    save_file(state, small / "model.safetensors", {"format": "pt"})
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 100}), encoding="utf-8")
    line = complaint(stage, load_from=small, **changes)
    assert "6,400" in line and "100" in line and "tokenizer" in line


@pytest.mark.parametrize("stage, command", [("full_sft", "python trainer/train_pretrain.py"),
                                            ("lora", "python trainer/train_full_sft.py")])
def test_a_stage_before_its_turn_names_the_command(stage, command, complaint, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.args, "ROOT", tmp_path / "fresh_clone")  # where default paths begin
    assert complaint(stage, load_from=None).endswith(f"make it first: {command}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("stage", STAGES)
def test_a_gpu_flag_without_a_gpu(stage, complaint):
    assert "--device cuda: there is no cuda:0 here, only cpu" in complaint(stage, device="cuda")


def test_shapes(complaint, workshop):
    known = "there are micro, tiny, 26m, 64m, 104m"
    assert f"unknown preset 'huge'; {known}" in complaint("pretrain", preset="huge")
    assert "attention" in complaint("pretrain", num_attention_heads=3, num_key_value_heads=2)
    assert "the model has only 32768 positions" in complaint("pretrain", max_seq_len=40_000)
    line = complaint("pretrain", load_from=workshop.base)  # with --hidden_size 32 and others
    assert "--load_from" in line and "--hidden_size" in line
    assert "--preset" in complaint("pretrain", load_from=workshop.base, preset="26m", **OWN_SHAPE)
    line = complaint("pretrain", load_from=workshop.base, tokenizer="some", **OWN_SHAPE)
    assert "no tokenizer in some" in line
    assert "nowhere" in complaint("pretrain", tokenizer="nowhere")


def test_lora_flags(complaint):
    assert "rank" in complaint("lora", lora_rank=0)
    assert "rank 40 is above the width" in complaint("lora", lora_rank=40)
    assert "dropout" in complaint("lora", lora_dropout=1)
    assert "alpha" in complaint("lora", lora_alpha=-1)
    assert "'z_proj'" in complaint("lora", target_modules=["q_proj", "z_proj"])
    assert "regular expression" in complaint("lora", target_modules="(q_proj")


def test_an_output_folder_that_cannot_be(complaint, tmp_path):
    (tmp_path / "file").write_text("precious", encoding="utf-8")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "below"):  # noticed before the data is read
        line = complaint("full_sft", "--out_dir", out_dir, data_path="nowhere.jsonl")
        assert f"--out_dir {out_dir}: {tmp_path / 'file'} is no folder" in line
    assert (tmp_path / "file").read_text(encoding="utf-8") == "precious"


def test_a_model_and_an_adapter_never_share_a_run_folder(complaint, tmp_path):
    for stage, other in (("full_sft", "adapter_config.json"), ("lora", "config.json")):
        folder = tmp_path / stage
        folder.mkdir()
        (folder / other).write_text("{}", encoding="utf-8")
        line = complaint(stage, "--out_dir", tmp_path, data_path="nowhere.jsonl")
        assert f"--name {stage}: with {folder / other} a model and an adapter would lie in one folder" in line


@pytest.mark.parametrize("fraction", [None, 0.5])
def test_a_run_without_a_validation_says_so(fraction, workshop, tmp_path):
    one = workshop.write("one.jsonl", [{"messages": [{"role": "user", "content": "a"},
                                                     {"role": "assistant", "content": "b"}]}])
    flags = workshop.flags("full_sft", tmp_path, data_path=one, eval_fraction=fraction, max_steps=1)
    ended = workshop.run("full_sft", *flags)
    assert ended.code == 0 and "no validation: no sample is set apart" in ended.out


def test_an_output_folder_that_is_not_writable(complaint, tmp_path, monkeypatch):
    real = os.access  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and real(path, mode))
    line = complaint("full_sft", "--out_dir", tmp_path / "new" / "out", data_path="nowhere.jsonl")
    assert f"--out_dir {tmp_path / 'new' / 'out'}: {tmp_path} is not writable" in line
    assert not (tmp_path / "new").exists()


# --- how a run ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code, says", [(signal.SIGINT, 130, "stopped by Ctrl-C"),
                                                (signal.SIGTERM, 143, "stopped by SIGTERM")])
@pytest.mark.parametrize("moment", ["load_data", "describe"])  # before the loop, and after it
def test_a_signal_outside_the_loop(number, code, says, moment, workshop, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(trainer.stage, moment, lambda *_, **flags: signal.raise_signal(number))
    ended = workshop.run("full_sft", *workshop.flags("full_sft", tmp_path, max_steps=1))
    assert ended.code == code and ended.err == f"{says}\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_that_goes_on_is_the_one_that_was_typed(workshop, tmp_path, monkeypatch):
    flags = workshop.flags("full_sft", tmp_path / "a folder's", max_steps=2, max_minutes=1e-9)
    ended = workshop.run("full_sft", *flags)
    assert ended.code == 75
    command = ended.out.splitlines()[-1].split("stopped at step 1; to go on: ")[1]
    assert shlex.split(command)[1:] == [str(ROOT / "trainer" / "train_full_sft.py"), *flags, "--resume"]
    again = workshop.run("full_sft", *shlex.split(command)[2:])
    assert again.code == 0 and "resumed at step 1" in again.out
    monkeypatch.setattr(sys, "argv", ["x.py", "--overw", "--name", "overwrite"])
    assert command_to_resume().endswith("x.py --name overwrite --resume")  # it has been overwritten
    monkeypatch.setattr(sys, "argv", ["trainer/train_lora.py", "--resume"])
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert command_to_resume() == "torchrun --nproc_per_node=2 trainer/train_lora.py --resume"


CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory:"
                   " you tried to allocate 3221225472 bytes. Error code 12 (Cannot allocate memory)")
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.50 GiB. GPU 0 has a total capacity of"
                              " 79.10 GiB of which 1.25 GiB is free. Including non-PyTorch memory, ...")


@pytest.mark.parametrize("error, says", [
    (CPU, "out of memory: 3.00 GiB were asked for, of "), (MemoryError(), "out of memory, of "),
    (CUDA, "out of memory: 12.50 GiB were asked for, of 79.10 GiB on the GPU 1.25 GiB are free")])
def test_out_of_memory_names_the_flags_that_need_less(error, says, workshop, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(CausalLM, "forward", fail)
    flags = workshop.flags("lora", tmp_path, batch_size=12)
    line = workshop.run("lora", *flags)
    assert line.code == 1 and says in line.error
    named = re.findall(r"--(\w+) ?([\w.]*)", line.error)
    assert named == [("micro_batch_size", "6"), ("gradient_checkpointing", ""), ("resume", "goes"),
                     ("max_seq_len", "32"), ("optimizer", "adamw8bit"), ("quantize", "nf4")]
    used = ["--micro_batch_size", "1", "--gradient_checkpointing", "--quantize", "nf4"]
    line = workshop.run("lora", *flags, *used).error
    assert [name for name, _ in re.findall(r"--(\w+) ?([\w.]*)", line)] == ["max_seq_len", "optimizer"]


def test_a_bug_keeps_its_traceback(workshop, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(CausalLM, "forward", fail)
    with pytest.raises(RuntimeError, match="size of tensor"):
        workshop.run("lora", *workshop.flags("lora", tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="workers that are forked do as this process was told")
def test_a_dead_worker_names_the_last_checkpoint_and_the_command(workshop, tmp_path, monkeypatch):
    real = Batches.__getitem__

    def die(self, number):
        if number == 12 and get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, number)

    monkeypatch.setattr(Batches, "__getitem__", die)
    ended = workshop.run("lora", *workshop.flags("lora", tmp_path, num_workers=1, save_interval=3))
    assert ended.code == 1 and "error: a process that this one works with ended (" in ended.error
    last = checkpoints(tmp_path / "lora")[-1]  # workers are some batches ahead
    assert f"the last good checkpoint is {last}; to go on: " in ended.error
    assert ended.error.endswith("--resume")


def test_a_lost_connection_is_no_mistake_of_the_user():
    """What a killed worker may be noticed by, instead; an OSError too, as is a missing file."""
    for error in (ConnectionResetError(104, "Connection reset by peer"), BrokenPipeError(32, "Broken pipe")):
        code, line = explain(error)
        assert code == 1 and line.startswith("error: a process that this one works with ended (")
    assert explain(FileNotFoundError(2, "No such file"))[0] == 2


def test_only_one_of_many_ranks_complains_of_the_flags(monkeypatch, capsys):
    for rank, count in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            parse_args(training_parser("a test"), ["--batch_size", "many"])
        err = capsys.readouterr().err
        assert ended.value.code == 2 and err.count("\n") == err.count("error: argument --batch_size") == count


@pytest.mark.parametrize("flag, value", [
    ("batch_size", 0), ("micro_batch_size", 0), ("epochs", 0), ("max_steps", 0), ("max_seq_len", 1),
    ("learning_rate", 0), ("learning_rate", "nan"), ("learning_rate", "inf"), ("grad_clip", "nan"),
    ("weight_decay", "nan"), ("warmup_ratio", 1), ("eval_fraction", -0.1),
    ("seed", -1), ("seed", 2**33), ("weight_decay", -1), ("grad_clip", -1), ("num_workers", -1),
    ("max_minutes", 0), ("max_minutes", "nan"), ("on_full_disk", "hope"), ("resume", "--overwrite"),
    ("log_interval", 0), ("save_interval", 0), ("keep_last", 0), ("eval_interval", -1),
    ("name", ""), ("name", ".."), ("name", "a/b")])
def test_flags_out_of_range(flag, value, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(training_parser("a test"), ["--name", "x", f"--{flag}", str(value)])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and f"--{flag}" in err


def test_a_time_limit_under_a_torchrun_that_starts_runs_again(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    parse_args(training_parser("a test"), ["--name", "x", "--max_minutes", "1"])
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    parse_args(training_parser("a test"), ["--name", "x"])
    with pytest.raises(SystemExit) as ended:
        parse_args(training_parser("a test"), ["--name", "x", "--max_minutes", "1"])
    assert ended.value.code == 2 and "--max_minutes and torchrun's --max-restarts" in capsys.readouterr().err


def test_names_that_are_not_utf8(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(training_parser("a test"), ["--name", "x", "--data_path", "\udcff.jsonl"])
    assert ended.value.code == 2 and "'\\udcff.jsonl' is not valid UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cache", "world", "..", "a/b", ""])
def test_a_name_stays_a_folder_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(training_parser("a test"), ["--name", name])
    assert ended.value.code == 2 and f"--name {name}" in capsys.readouterr().err.replace("'", "")


def test_wandb_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr("trainer.args.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        parse_args(training_parser("a test"), ["--name", "x", "--use_wandb"])
    assert ended.value.code == 2 and "pip install wandb" in capsys.readouterr().err


def test_a_run_never_writes_over_the_weights_it_starts_from(tmp_path, capsys):
    (tmp_path / "base").mkdir()
    with pytest.raises(SystemExit) as ended:
        parse_args(training_parser("a test"), ["--load_from", str(tmp_path / "base"),
                                               "--out_dir", str(tmp_path), "--name", "base"])
    assert ended.value.code == 2 and "would write over --load_from" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_weights_of_minimind_are_trained_and_resumed(stage, workshop, tmp_path):
    """A .pth file: half precision, with rotary tables and with a head that is the embedding; no tokenizer."""
    from model.weights import load_model

    state = {name: tensor.half() for name, tensor in load_model(workshop.base).state_dict().items()}
    torch.save(state | {"model.freqs_cos": torch.zeros(4, 4)}, tmp_path / "sft_32.pth")
    own_shape = OWN_SHAPE if stage == "pretrain" else {}
    flags = workshop.flags(stage, tmp_path, load_from=tmp_path / "sft_32.pth", **own_shape)
    ended = workshop.run(stage, *flags, "--max_minutes", "0.00001")
    assert ended.code == 75 and "sft_32.pth holds no tokenizer, so it gets Seedling's own" in ended.out
    ended = workshop.run(stage, *flags, "--resume")
    assert ended.code == 0 and f"saved {tmp_path / stage}" in ended.out
    if stage != "lora":
        own = (workshop.base / "tokenizer.json").read_bytes()
        assert (tmp_path / stage / "tokenizer.json").read_bytes() == own
        assert load_model(tmp_path / stage).config.qk_norm


def test_another_tokenizer_can_be_named_and_must_fit(complaint, workshop, tmp_path):
    from model.weights import load_model

    model = load_model(workshop.base)
    state = {name: tensor[:1000] if tensor.size(0) == 6400 else tensor
             for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "small.pth")
    line = complaint("full_sft", load_from=tmp_path / "small.pth")
    assert "small.pth: the tokenizer needs 6,400 rows of the embedding, the weights have 1,000" in line
    line = complaint("full_sft", load_from=tmp_path / "small.pth", tokenizer=workshop.base)
    assert "do not belong together" in line
    assert "nowhere.pth" in complaint("full_sft", load_from=tmp_path / "nowhere.pth")


@pytest.mark.parametrize("stage", STAGES)
def test_a_tokenizer_that_names_no_end_and_no_padding(stage, workshop, tmp_path):
    """Both are in the vocabulary, and tokenizer_config.json says nothing of them."""
    base = tmp_path / "base"
    shutil.copytree(workshop.base, base)
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (base / "chat_template.jinja").unlink()
    own_shape = OWN_SHAPE if stage == "pretrain" else {}
    flags = workshop.flags(stage, tmp_path, load_from=base, max_steps=2, **own_shape)
    ended = workshop.run(stage, *flags)
    assert ended.code == 0, ended
    if stage != "lora":
        generation = json.loads((tmp_path / stage / "generation_config.json").read_text(encoding="utf-8"))
        assert generation["eos_token_id"] == [2, 0]  # known by their names
