"""What a stage does unasked fits what it starts from: a model that grew here a moment ago, or a grown one."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

import trainer.args
from scripts.quickstart import training_command
from trainer.defaults import tokens_seen

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("pretrain", "full_sft", "lora", "dpo", "ppo")
WATCHED = ("optimizer", "learning_rate", "warmup_ratio", "lr_schedule", "max_seq_len", "batch_size",
           "micro_batch_size", "epochs", "weight_decay")
# What the stages do to a young model: written down by hand, because the README's figures were made with it.
YOUNG = {"pretrain": ("muon", 5e-3, 0.02, "wsd", 256, 16, None, 1, 0.1),
         "full_sft": ("muon", 3e-3, 0.02, "cosine", 256, 16, None, 1, 0.1),
         "lora": ("adamw", 5e-3, 0.02, "cosine", 256, 16, None, 3, 0.0),
         "dpo": ("adamw", 5e-5, 0.02, "cosine", 256, 32, None, 1, 0.0),
         "ppo": ("adamw", 3e-4, 0.02, "cosine", 256, 256, None, 1, 0.0)}
OVER_A_GROWN_MODEL = {"pretrain": ("adamw", 1e-4, 0.1, "wsd", 1024, 4, 1, 1, 0.1),
                      "full_sft": ("adamw", 1e-4, 0.1, "cosine", 1024, 4, 1, 1, 0.1),
                      "lora": ("adamw", 1e-3, 0.1, "cosine", 1024, 4, 1, 1, 0.0),
                      "dpo": ("adamw", 1e-5, 0.1, "cosine", 1024, 4, 1, 1, 0.0),
                      "ppo": ("adamw", 1e-5, 0.1, "cosine", 1024, 256, 8, 1, 0.0)}


@pytest.fixture
def chosen(monkeypatch, tmp_path):
    """Called with a stage and flags: the values of WATCHED with which the script's `main` would be called."""
    def call(stage: str, *flags) -> tuple:
        called = []
        monkeypatch.setattr(trainer.args, "run_script", lambda main, args: called.append(args))
        words = [f"train_{stage}.py", "--out_dir", tmp_path / "out", *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        runpy.run_path(str(ROOT / "trainer" / f"train_{stage}.py"), run_name="__main__")
        return tuple(getattr(called[0], name) for name in WATCHED)

    return call


@pytest.fixture
def make_folder(tmp_path):
    """A folder that a model could lie in, with the two files that are read to choose."""
    def make(name: str = "base", training: dict | str | None = None, **config) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if training is not None:
            text = training if isinstance(training, str) else json.dumps(training)
            (folder / "training.json").write_text(text, encoding="utf-8")
        return folder

    return make


@pytest.mark.parametrize("stage", STAGES)
def test_a_young_model_learns_as_before(stage, chosen, make_folder, capsys):
    young = make_folder(training={"stage": "full_sft", "tokens": 400_000, "tokens_seen": 2_500_000})
    assert chosen(stage, "--load_from", young) == YOUNG[stage]
    assert chosen(stage) == YOUNG[stage]  # typed bare, with nothing in out/
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("stage", ("pretrain", "full_sft", "lora_identity", "lora_clinic"))
def test_the_quickstart_does_what_it_did(stage, chosen, make_folder, tmp_path, capsys):
    right = {"pretrain": ("muon", 1e-2, 0.02, "cosine", 128, 8, None, 1, 0.1),
             "full_sft": ("muon", 7e-3, 0.02, "cosine", 256, 8, None, 1, 0.1),
             "lora_identity": ("adamw", 3e-3, 0.02, "cosine", 256, 4, None, 3, 0.0),
             "lora_clinic": ("adamw", 3e-3, 0.02, "cosine", 256, 4, None, 3, 0.0)}
    make_folder("pretrain", {"stage": "pretrain", "parent": None, "tokens": 298_625, "tokens_seen": 298_625})
    make_folder("full_sft", {"stage": "full_sft", "tokens": 3_377_866, "tokens_seen": 3_676_491})
    script, *flags = training_command(tmp_path, stage, scale=1)
    assert chosen(Path(script).stem.removeprefix("train_"), *flags) == right[stage]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("training", [
    None, {"tokens": 5_000, "tokens_seen": None}, {"tokens_seen": 2 * 10**9},
    {"stage": "full_sft", "tokens": 9, "parent": "gone"}, "no JSON", "[]"])
def test_a_grown_model_is_treated_gently(stage, training, chosen, make_folder, capsys):
    grown = make_folder(training=training, hidden_size=512)
    assert chosen(stage, "--load_from", grown) == OVER_A_GROWN_MODEL[stage]
    (line,) = capsys.readouterr().out.splitlines()
    seen = "has seen 2,000,000,000 tokens" if training == {"tokens_seen": 2 * 10**9} else "did not grow here"
    assert line.startswith(f"{grown} {seen}, ") and "flags that you type win" in line
    # It names every value that is not the stage's, and no other.
    for name, before, value in zip(WATCHED, YOUNG[stage], OVER_A_GROWN_MODEL[stage], strict=True):
        change = f"--{name} {value}" if before is None else f"--{name} {value} (not {before})"
        assert (change in line) == (f"--{name} " in line) == (value != before), name


def test_minimind_s_weights_are_a_grown_model(chosen, tmp_path):
    (tmp_path / "sft_512.pth").write_bytes(b"weights are not read to choose")
    assert chosen("full_sft", "--load_from", tmp_path / "sft_512.pth") == OVER_A_GROWN_MODEL["full_sft"]


def test_how_much_a_run_shows_decides_too(chosen, make_folder, tmp_path):
    """Where the run is a good part of all that the model ever sees, nothing needs to be spared."""
    base = make_folder(training={"tokens_seen": 120_000_000})
    for name, size in (("small", 1_000_000), ("large", 60_000_000)):  # about 0.25 and 15 million tokens
        with (tmp_path / f"{name}.jsonl").open("wb") as file:
            file.truncate(size)
    flags = ("--load_from", base, "--data_path")
    assert chosen("full_sft", *flags, tmp_path / "small.jsonl") == OVER_A_GROWN_MODEL["full_sft"]
    assert chosen("full_sft", *flags, tmp_path / "large.jsonl") == YOUNG["full_sft"]
    assert chosen("full_sft", *flags, *[tmp_path / "small.jsonl"] * 3, "--epochs", 20)[0] == "muon"
    assert chosen("full_sft", *flags, tmp_path / "not_there.jsonl") == OVER_A_GROWN_MODEL["full_sft"]


@pytest.mark.parametrize("size, epochs", [(4_000_000, 1), (250_000, 2), (20_000, 10), (10, 10)])
def test_few_records_are_shown_more_often(size, epochs, chosen, make_folder, tmp_path, capsys):
    """One pass over some dozens of records would be two steps, which teach nothing."""
    with (tmp_path / "my.jsonl").open("wb") as file:
        file.truncate(size)
    flags = ("lora", "--load_from", make_folder(), "--data_path", tmp_path / "my.jsonl")
    assert dict(zip(WATCHED, chosen(*flags), strict=True))["epochs"] == epochs
    assert dict(zip(WATCHED, chosen(*flags, "--epochs", 3), strict=True))["epochs"] == 3
    capsys.readouterr()
    chosen(*flags, "--max_steps", 5)
    assert "--epochs" not in capsys.readouterr().out  # it would have no effect


def test_wide_models_and_short_contexts(chosen, make_folder):
    def rate_and_rows(stage, **config):
        values = chosen(stage, "--load_from", make_folder(f"{stage} {config}", **config))
        return values[1], values[4], values[5]

    assert rate_and_rows("full_sft", hidden_size=576, max_position_embeddings=8192) == (1e-4, 1024, 4)
    assert rate_and_rows("full_sft", hidden_size=64, max_position_embeddings=512) == (1e-4, 512, 8)
    assert rate_and_rows("full_sft", hidden_size=2048, max_position_embeddings=131072) == (3e-5, 1024, 4)
    assert rate_and_rows("full_sft", hidden_size=4096, max_position_embeddings=32) == (1e-5, 32, 128)
    assert rate_and_rows("lora", hidden_size=4096, max_position_embeddings=4096) == (1e-4, 1024, 4)
    assert rate_and_rows("lora", hidden_size="wide", max_position_embeddings=None) == (1e-3, 1024, 4)


def test_what_is_typed_wins(chosen, make_folder, capsys):
    base = make_folder()
    # Also where the typed value is the stage's own default.
    typed = ("--optimizer", "muon", "--learning_rate", 3e-3, "--warmup_ratio", 0.02, "--max_seq_len", 256,
             "--batch_size", 16, "--micro_batch_size", 16)
    values = dict(zip(WATCHED, chosen("full_sft", "--load_from", base, *typed), strict=True))
    assert values == dict(zip(WATCHED, YOUNG["full_sft"], strict=True)) | {"micro_batch_size": 16}
    assert capsys.readouterr().out == ""  # nothing was chosen
    # A step keeps its number of tokens where only the rows are given.
    values = dict(zip(WATCHED, chosen("full_sft", "--load_from", base, "--max_seq_len", 256), strict=True))
    assert (values["max_seq_len"], values["batch_size"], values["optimizer"]) == (256, 16, "adamw")
    assert "--max_seq_len" not in capsys.readouterr().out


def test_one_process_says_it(chosen, make_folder, monkeypatch, capsys):
    base = make_folder()
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert chosen("lora", "--load_from", base) == OVER_A_GROWN_MODEL["lora"]
        assert capsys.readouterr().out.count("\n") == lines


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_both_values(stage, chosen, capsys):
    with pytest.raises(SystemExit):
        chosen(stage, "--help")
    text = " ".join(capsys.readouterr().out.split())
    young, grown = (dict(zip(WATCHED, values[stage], strict=True)) for values in (YOUNG, OVER_A_GROWN_MODEL))
    for name in ("optimizer", "learning_rate", "warmup_ratio", "epochs", "max_seq_len", "batch_size"):
        assert f"; {grown[name]} over a grown model (default: {young[name]})" in text


def test_tokens_are_summed_over_the_stages(make_folder, tmp_path):
    make_folder("a", {"stage": "pretrain", "parent": None, "tokens": 70})  # as older versions wrote it
    make_folder("b", {"stage": "full_sft", "parent": str(tmp_path / "a"), "tokens": 5})
    make_folder("merged", {"stage": "merge_lora", "parent": str(tmp_path / "b")})
    assert tokens_seen(tmp_path / "b") == tokens_seen(tmp_path / "merged") == 75
    make_folder("c", {"stage": "lora", "parent": "gone", "tokens": 5, "tokens_seen": 80})
    assert tokens_seen(tmp_path / "c") == 80  # whatever became of its parent
    make_folder("from_elsewhere", {"stage": "lora", "parent": "gone", "tokens": 5, "tokens_seen": None})
    make_folder("itself", {"stage": "lora", "parent": str(tmp_path / "itself"), "tokens": 5})
    make_folder("odd", {"tokens_seen": "many", "tokens": [], "parent": 7})
    for name in ("from_elsewhere", "itself", "odd", "not there"):
        assert tokens_seen(tmp_path / name) is None


@pytest.fixture
def foreign(workshop, tmp_path) -> Path:
    """The workshop's base without its training.json, as if another project had made it."""
    folder = tmp_path / "foreign"
    shutil.copytree(workshop.base, folder)
    (folder / "training.json").unlink()
    return folder


def test_a_run_is_recorded_with_its_values_and_the_next_stage_still_spares_it(workshop, foreign, tmp_path):
    common = ("--data_path", workshop.chats, "--out_dir", tmp_path / "out", "--device", "cpu",
              "--dtype", "float32", "--max_steps", "1", "--eval_interval", "0")
    first = workshop.run("full_sft", "--load_from", foreign, *common)
    assert first.code == 0 and first.out.splitlines()[0].startswith(f"{foreign} did not grow here")
    record = json.loads((tmp_path / "out" / "full_sft" / "training.json").read_text(encoding="utf-8"))
    assert tuple(record["arguments"][name] for name in WATCHED) == OVER_A_GROWN_MODEL["full_sft"]
    assert record["tokens_seen"] is None and record["tokens"] > 0
    shutil.rmtree(foreign)  # what the next stage starts from says itself where it comes from
    second = workshop.run("lora", "--load_from", tmp_path / "out" / "full_sft", *common)
    assert second.code == 0 and "did not grow here" in second.out.splitlines()[0]


def test_resume_keeps_what_was_chosen(workshop, foreign, tmp_path, monkeypatch):
    """To the bit, also if --load_from has moved by then; another choice would be refused."""
    def run(name, *more, base=foreign):
        return workshop.run("full_sft", "--load_from", base, "--data_path", workshop.chats, "--out_dir",
                            tmp_path / "out", "--device", "cpu", "--dtype", "float32", "--epochs", "8",
                            "--name", name, *more)

    assert run("whole").code == 0
    stop_after_two_steps(monkeypatch)
    assert run("stopped", "--save_interval", "2").code == 130
    monkeypatch.undo()
    moved = foreign.rename(tmp_path / "moved")
    refused = run("stopped", "--resume", "--optimizer", "muon", base=moved)
    assert refused.code == 2 and "this run began with --optimizer adamw, not muon" in refused.error
    ended = run("stopped", "--resume", base=moved)
    assert ended.code == 0, ended
    whole, stopped = (tmp_path / "out" / name / "model.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()


def stop_after_two_steps(monkeypatch) -> None:
    """The loop saves and ends after its second step, as after Ctrl-C."""
    import trainer.loop

    real, steps = trainer.loop.learning_rate_factor, []

    def count(*arguments):
        steps.append(arguments)
        return real(*arguments)

    class StopRequests:
        def __init__(self, max_minutes):
            pass

        def __enter__(self):
            return lambda: 130 if len(steps) == 2 else 0

        def __exit__(self, *error):
            return False

    monkeypatch.setattr(trainer.loop, "learning_rate_factor", count)
    monkeypatch.setattr(trainer.loop, "stop_requests", StopRequests)
