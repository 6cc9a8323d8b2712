"""train_grpo.py: it learns what is rewarded, and is as exact as the other stages."""

import shutil
import signal

import forks
import pytest
import torch
from safetensors.torch import load_file

import trainer.loop
from model.compiled_step import COMPILERS
from trainer.optim import learning_rate_factor

SCORE = "def score(messages, answer, record):\n    return answer.count('a') - 0.1 * len(messages)\n"


@pytest.fixture(scope="module")
def flags(workshop):
    """The flags of a run of a second or two, over a model with random weights."""
    file = workshop.folder / "reward.py"
    file.write_text(SCORE, encoding="utf-8")

    def make(out_dir, **changes):
        return workshop.flags("grpo", out_dir, **{
            "max_steps": 6, "batch_size": 16, "group_size": 4, "max_new_tokens": 8, "save_interval": 50,
            "log_interval": 1, "eval_interval": 3, "optimizer": "adamw", "learning_rate": 1e-2,
            "reward_file": f"{file}:score", "show_interval": 4, "updates_per_rollout": 2} | changes)

    return make


def with_old_chats(workshop):
    return {"kl_beta": 0.05, "sft_data_path": workshop.chats, "sft_weight": 0.3, "sft_batch_size": 3}


@pytest.fixture(scope="module")
def whole(workshop, flags):
    """A run that nobody disturbed: its --out_dir."""
    ended = workshop.run("grpo", *flags(workshop.folder / "whole", **with_old_chats(workshop)))
    assert ended.code == 0, ended
    return workshop.folder / "whole", ended


def weights(out_dir, name="model"):
    return load_file(out_dir / "grpo" / f"{name}.safetensors")


def assert_same(one, other, name="model", tolerance=0.0):
    one, other = weights(one, name), weights(other, name)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=tolerance, rtol=0, msg=key)


def test_what_is_rewarded_becomes_more_frequent(workshop, flags, read_log):
    changes = dict(max_steps=30, batch_size=64, group_size=8, updates_per_rollout=1, eval_interval=0,
                   learning_rate=0.03)
    ended = workshop.run("grpo", *flags(workshop.folder / "learns", **changes))
    assert ended.code == 0, ended
    log = [line for line in read_log(workshop.folder / "learns" / "grpo") if "loss" in line]
    first, last = (sum(line["reward"] for line in some) / 5 for some in (log[:5], log[-5:]))
    assert last > first + 0.5


def test_the_log_says_what_happens_in_the_rollouts(whole, read_log):
    out_dir, ended = whole
    log = read_log(out_dir / "grpo")
    steps = [line for line in log if "reward" in line]
    assert {"reward", "length", "cut_off", "signal", "entropy", "kl", "clipped",
            "old_chats"} <= steps[0].keys()
    assert abs(steps[0]["kl"]) < 1e-6 < steps[-1]["kl"] and steps[0]["clipped"] == 0  # the first ratio is 1
    assert steps[0]["reward"] == steps[1]["reward"] != steps[2]["reward"]  # two updates of each rollout
    evaluations = [line for line in log if "eval_reward" in line]
    assert [line["step"] for line in evaluations] == [3, 6]
    for line in evaluations:  # the greedy answers have their rewards as advantages, and ratios of 1
        assert line["eval_loss"] == pytest.approx(-line["eval_reward"] + 0.05 * line["eval_kl"], abs=1e-4)
    assert "rollout 0: " in ended.out and "8 of" not in ended.out and "4 answers each" in ended.out


def test_stopped_within_a_rollout_and_resumed(workshop, flags, whole, tmp_path, monkeypatch):
    for stop in (0, 3):  # after the first update of a rollout, and after the second of another

        def factor(step, *rest, stop=stop):
            if step == stop:
                signal.raise_signal(signal.SIGINT)
            return learning_rate_factor(step, *rest)

        monkeypatch.setattr(trainer.loop, "learning_rate_factor", factor)
        ended = workshop.run("grpo", *flags(tmp_path, **with_old_chats(workshop)), "--resume")
        assert ended.code == 130 and f"stopped at step {stop + 1};" in ended.out, ended
    monkeypatch.undo()
    # The function may lie elsewhere by now, but it must be the same one.
    for name, text in (("other.py", SCORE + "    # changed\n"), ("moved.py", SCORE)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        changes = with_old_chats(workshop) | {"reward_file": f"{tmp_path / name}:score"}
        ended = workshop.run("grpo", *flags(tmp_path, **changes), "--resume")
        if name == "other.py":
            assert ended.code == 2 and "rewarded by score of a file of sha256" in ended.error, ended
    assert ended.code == 0, ended
    assert_same(tmp_path, whole[0])


def test_two_processes_and_accumulation_equal_one(workshop, flags, whole, tmp_path, read_log):
    words = workshop.command("grpo", *flags(tmp_path, micro_batch_size=3, **with_old_chats(workshop)))
    process = forks.start(words, processes=2)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("saved ") == out.count("rollout 0: ") == 1  # one process talks
    for ours, theirs in zip(read_log(tmp_path / "grpo"), read_log(whole[0] / "grpo"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert_same(tmp_path, whole[0], tolerance=1e-5)


@pytest.mark.parametrize("changes", [
    {"lora_rank": 4, "kl_beta": 0.05}, {"lora_rank": 4, "quantize": "nf4"},
    {"dtype": "float16"}, {"gradient_checkpointing": True}, {"policy_loss": "gspo", "advantage": "group_std"},
    {"policy_loss": "cispo", "mean_over": "constant"}, {"policy_loss": "reinforce", "mask_cut_off": True},
], ids=lambda changes: "-".join(map(str, changes.values())))  # fmt: skip
def test_with_all_that_goes_together(workshop, flags, tmp_path, changes):
    ended = workshop.run("grpo", *flags(tmp_path, max_steps=2, eval_interval=0, **changes))
    assert ended.code == 0, ended
    name = "adapter_model" if "lora_rank" in changes else "model"
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path, name).values())


def test_gradient_checkpointing_changes_nothing(workshop, flags, tmp_path):
    for number, more in enumerate(({}, {"gradient_checkpointing": True})):
        assert workshop.run("grpo", *flags(tmp_path / str(number), max_steps=2, **more)).code == 0
    assert_same(tmp_path / "0", tmp_path / "1", tolerance=1e-6)


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler")
@pytest.mark.parametrize("more", [{}, {"lora_rank": 4, "kl_beta": 0.05}], ids=["whole", "adapters"])
def test_answers_that_cpp_writes_are_the_same(workshop, flags, tmp_path, more):
    more |= {"max_steps": 5, "dtype": "float32"}
    for name, compiled in (("a", {}), ("b", {"compile_rollouts": True})):
        ended = workshop.run("grpo", *flags(tmp_path / name, **more, **compiled))
        assert ended.code == 0, ended
    saved = "adapter_model" if "lora_rank" in more else "model"
    assert_same(tmp_path / "a", tmp_path / "b", saved, tolerance=1e-4)


@pytest.mark.parametrize(("changes", "says"), [
    ({"group_size": 1}, "--group_size 1: a group of one has no mean to compare with"),
    ({"batch_size": 10}, "--batch_size 10 counts answers, so it must be a multiple of --group_size 4"),
    ({"temperature": "1e-40"}, "--temperature must be from 0.001 to 1000, not 1e-40"),  # gives no numbers
    ({"num_workers": 1}, "--num_workers has no effect here"),
    ({"packing": True}, "--packing: the rows of this stage can't be packed"),
    ({"compile": True}, "--compile would compile anew"),
    ({"compile_rollouts": True, "lora_rank": 4, "quantize": "nf4"}, "--compile needs a model without"),
    ({"max_new_tokens": 64}, "--max_new_tokens 64 leaves no room for a prompt in --max_seq_len 64"),
    ({"reward_file": "no.py:score"}, "there is no file no.py"),
    ({"reward_file": None, "data_path": "{texts}"}, "no conversations"),
    ({"sft_weight": 0.5}, "--sft_weight and --sft_batch_size need --sft_data_path, the old chats"),
    ({"sft_data_path": "{texts}"}, "no conversations"),
])  # fmt: skip
def test_a_mistake_is_one_line(workshop, flags, tmp_path, changes, says):
    changes = {name: workshop.texts if value == "{texts}" else value for name, value in changes.items()}
    ended = workshop.run("grpo", *flags(tmp_path, **changes))
    assert ended.code == 2 and says in ended.error


def test_a_reward_that_raises_ends_the_run_with_function_and_prompt(workshop, flags, tmp_path):
    (tmp_path / "bad.py").write_text("def score(*args):\n    raise KeyError('level')\n", encoding="utf-8")
    ended = workshop.run("grpo", *flags(tmp_path, reward_file=f"{tmp_path / 'bad.py'}:score"))
    assert ended.code == 1 and "bad.py:score raised KeyError: 'level', for the prompt of " in ended.error


def test_a_grown_model_is_treated_gently_but_answers_stay_in_groups(tmp_path):
    from trainer.args import parse_args, rollout_parser

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"hidden_size": 576}', encoding="utf-8")
    parser = rollout_parser("a test")
    parser.set_defaults(stage="grpo", name="grpo", batch_size=256, out_dir=tmp_path,
                        load_from=tmp_path / "base")
    args = parse_args(parser, [])
    assert (args.batch_size, args.group_size, args.learning_rate, args.micro_batch_size) == (256, 16, 1e-5, 8)
