"""PPO: its loss, its value head and its advantages, against the equations written out again."""

import math

import forks
import pytest
import torch
from safetensors.torch import load_file
from small_answers import LENGTHS, T, answers, clipped_again, gradients, small_model, tokens

from trainer.checkpoint import checkpoints
from trainer.distributed import Ranks
from trainer.losses import ppo
from trainer.values import (
    add_value_head,
    generalised_advantages,
    judge_tokens,
    rewards_differ,
    token_rewards,
)

ONE_PROCESS = Ranks(0, 1, torch.device("cpu"))


def ppo_answers(rows=range(3)) -> dict:
    batch = answers(rows)
    generator = torch.Generator().manual_seed(2)
    is_answer = batch["labels"] != -100
    for name in ("values", "returns"):
        batch[name] = torch.randn(3, batch["labels"].size(1), generator=generator)[list(rows)] * is_answer
    return batch


def model_with_values():
    model = small_model()
    head = add_value_head(model)
    assert (head.weight == 0).all() and (head.bias == 0).all()
    torch.manual_seed(4)
    torch.nn.init.normal_(head.weight, std=0.2)
    return model, head


def test_the_loss_is_that_of_the_equation():
    model, head = model_with_values()
    batch, expected, value_losses = ppo_answers(), 0, []
    for row, place, log_p in tokens(model, batch):
        state = model(batch["input_ids"][row:row + 1]).hidden[0, place - 1]
        value = (head.weight @ state + head.bias)[0]
        old, wanted = batch["values"][row, place], batch["returns"][row, place]
        near = torch.clip(value, old - 0.3, old + 0.3)
        value_losses.append(max((value - wanted) ** 2, (near - wanted) ** 2) / 2)
        term = clipped_again(log_p, batch, row, place) + 0.7 * value_losses[-1]
        expected = expected + term / LENGTHS[row]
    wanted = gradients(model, expected)
    loss, sums = ppo(model, batch, value_head=head, temperature=0.8, low=0.1, high=0.3, value_clip=0.3,
                     value_weight=0.7)
    assert torch.allclose(loss, expected, atol=1e-5)
    assert torch.allclose(gradients(model, loss), wanted, atol=1e-5)
    assert torch.isclose(sums["value_loss"] / 3, torch.stack(value_losses).mean(), atol=1e-6)
    assert head.weight.grad.abs().max() > 0.01 and 0 < sums["clipped"] < 3


def test_micro_batches_add_up_and_one_without_an_answer_adds_nothing():
    model, head = model_with_values()
    settings = {"value_head": head, "temperature": 0.8}
    whole, named = ppo(model, ppo_answers(), **settings)
    empty = ppo_answers([0]) | {"sums": {"reward": torch.tensor(0.0)}}
    empty["labels"] = torch.full_like(empty["labels"], -100)
    parts = [ppo(model, ppo_answers([0, 1]), **settings), ppo(model, ppo_answers([2]), **settings),
             ppo(model, empty, **settings)]
    assert torch.isclose(sum(part for part, _ in parts), whole, atol=1e-6)
    assert all(set(sums) == set(named) for _, sums in parts)
    assert parts[-1][0] == 0 and (gradients(model, parts[-1][0]) == 0).all()


@pytest.mark.parametrize("gamma, decay", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0)])
def test_generalised_advantages_are_the_sum_of_the_paper(gamma, decay):
    rewards, values = torch.tensor([0.5, 0.0, -1.0, 2.0]), torch.tensor([0.3, 1.0, -0.5, 0.8])
    after = [*values.tolist(), 0.0]
    surprises = [rewards[t].item() + gamma * after[t + 1] - after[t] for t in range(4)]
    expected = [sum((gamma * decay) ** (i - t) * surprises[i] for i in range(t, 4)) for t in range(4)]
    assert torch.allclose(generalised_advantages(rewards, values, gamma, decay), torch.tensor(expected))


def test_with_decay_one_the_returns_are_the_discounted_rewards_and_the_values_do_not_matter():
    rewards, values = torch.tensor([0.5, 0.0, -1.0, 2.0]), torch.tensor([0.3, 1.0, -0.5, 0.8])
    returns = generalised_advantages(rewards, values, 0.9, 1.0) + values
    assert torch.allclose(returns[0], torch.tensor(0.5 - 0.81 + 0.729 * 2))
    assert torch.allclose(returns[3], torch.tensor(2.0))


def test_the_reward_comes_with_the_last_token_and_the_kl_costs_at_each():
    is_answer = torch.tensor([False, True, True, True, False])
    batch = {"old_log_probs": torch.tensor([[0.0, -1.0, -2.0, -0.5, 0.0]]), "rewards": torch.tensor([3.0]),
             "reference_log_probs": torch.tensor([[0.0, -1.5, -1.0, -0.5, 0.0]])}
    assert token_rewards(batch, 0, is_answer, 0.0).tolist() == [0, 0, 3]
    assert torch.allclose(token_rewards(batch, 0, is_answer, 0.1), torch.tensor([-0.05, 0.1, 3.0]))
    assert batch["old_log_probs"].tolist() == [[0.0, -1.0, -2.0, -0.5, 0.0]]  # they are only read


def judged(model, batches, ranks=ONE_PROCESS, **settings):
    settings = {"kl_beta": 0.1, "gamma": 0.9, "gae_decay": 0.8} | settings
    judge_tokens(batches, model=model, ranks=ranks, dtype=torch.float32, **settings)
    return batches


def test_tokens_are_judged_by_the_value_head_and_normalised_over_the_rollout():
    model, head = model_with_values()
    whole = judged(model, [answers() | {"rewards": torch.tensor([1.0, 0.0, 2.0])}])[0]
    surprises = []
    for row, place, _ in tokens(model, whole):
        state = model(whole["input_ids"][row:row + 1]).hidden[0, place - 1]
        assert torch.isclose(whole["values"][row, place], (head.weight @ state + head.bias)[0], atol=1e-5)
    is_answer = whole["labels"] != -100
    for row in range(3):
        place = is_answer[row]
        rewards = token_rewards(whole, row, place, 0.1)
        surprises.append(generalised_advantages(rewards, whole["values"][row, place], 0.9, 0.8))
        assert torch.allclose(whole["returns"][row, place], surprises[-1] + whole["values"][row, place])
    surprises = torch.cat(surprises)
    expected = (surprises - surprises.mean()) / surprises.std()
    assert torch.allclose(whole["advantages"][is_answer], expected, atol=1e-5)
    for name in ("values", "returns", "advantages"):
        assert (whole[name][~is_answer] == 0).all() and not whole[name].requires_grad

    # The same in micro-batches, one of which has no answer
    empty = answers([0]) | {"rewards": torch.tensor([0.0]), "labels": torch.full((1, T), -100)}
    parts = judged(model, [answers([0]) | {"rewards": torch.tensor([1.0])}, empty,
                           answers([1, 2]) | {"rewards": torch.tensor([0.0, 2.0])}])
    found = torch.cat([parts[0]["advantages"], parts[2]["advantages"]])
    assert torch.allclose(found, whole["advantages"], atol=1e-6) and (parts[1]["advantages"] == 0).all()


def test_a_rollout_without_any_surprise_has_advantages_of_zero():
    model = small_model()
    add_value_head(model)
    batch = judged(model, [answers() | {"rewards": torch.zeros(3)}], kl_beta=0.0)[0]
    assert (batch["advantages"] == 0).all() and (batch["returns"] == 0).all()
    empty = answers([0]) | {"rewards": torch.zeros(1), "labels": torch.full((1, T), -100)}
    assert (judged(model, [empty])[0]["advantages"] == 0).all()


def test_a_rollout_whose_rewards_are_all_the_same_counts_as_without_a_signal():
    assert rewards_differ(torch.full((3, 2), 0.7)).tolist() == [[0, 0]] * 3
    assert rewards_differ(torch.tensor([[1.0, 1.0], [1.0, 0.0]])).tolist() == [[1, 1]] * 2


# --- the recipe ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(workshop):
    """A short run over rewards for the letter e: `flags(folder, lora_rank=4)`."""
    judge = workshop.folder / "judge.py"
    judge.write_text("def score(messages, answer, record):\n    return answer.count('e') - len(answer) / 40",
                     encoding="utf-8")

    def make(out_dir, **changes):
        given = {"reward_file": f"{judge}:score", "max_new_tokens": 6, "batch_size": 10, "max_steps": 6,
                 "updates_per_rollout": 3, "kl_beta": 0.05, "optimizer": "adamw", "log_interval": 1,
                 "eval_interval": 0, "show_interval": 0}
        return workshop.flags("ppo", out_dir, **(given | changes))

    return make


@pytest.fixture(scope="module")
def undisturbed(workshop, flags):
    ended = workshop.run("ppo", *flags(workshop.folder / "undisturbed"))
    assert ended.code == 0, ended
    return workshop.folder / "undisturbed" / "ppo"


def test_the_value_head_is_in_checkpoints_and_never_in_the_saved_model(workshop, flags, undisturbed, read_log,
                                                                       tmp_path):
    """Stopped in the middle of a rollout, the run goes on with the same answers, to the same bits."""
    stopped = workshop.run("ppo", *flags(tmp_path, max_minutes=1e-6))
    assert stopped.code != 0 and "stopped at step 1" in stopped.out
    (checkpoint,) = checkpoints(tmp_path / "ppo")
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert {"value_head.weight", "value_head.bias"} < state["parameters"].keys()
    assert state["batches"]["rows"][0].keys() >= {"values", "returns", "old_log_probs", "advantages"}
    resumed = workshop.run("ppo", *flags(tmp_path), "--resume")
    assert resumed.code == 0, resumed
    ours, theirs = (load_file(run_dir / "model.safetensors") for run_dir in (tmp_path / "ppo", undisturbed))
    base = load_file(workshop.base / "model.safetensors")
    assert ours.keys() == theirs.keys() == base.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(not torch.equal(theirs[name], base[name]) for name in theirs)
    assert read_log(tmp_path / "ppo") == read_log(undisturbed)


def test_what_the_log_shows(undisturbed, read_log):
    steps = [line for line in read_log(undisturbed) if "loss" in line]
    assert {"reward", "length", "entropy", "clipped", "kl", "value_loss"} < steps[0].keys()
    assert steps[0]["clipped"] == steps[0]["kl"] == 0  # at first the model is that which sampled
    assert steps[0]["reward"] == steps[2]["reward"] != steps[3]["reward"]  # three updates read one rollout
    assert steps[2]["kl"] > 0 and steps[2]["value_loss"] != steps[0]["value_loss"]


def test_a_base_that_is_frozen_stays_and_the_value_head_trains(workshop, flags, tmp_path):
    stopped = workshop.run("ppo", *flags(tmp_path, lora_rank=2, max_minutes=1e-6))
    assert "a value head" in stopped.out
    state = torch.load(checkpoints(tmp_path / "ppo")[0] / "state.pt", weights_only=True)
    heads = {name for name in state["parameters"] if ".lora." not in name}
    assert heads == {"value_head.weight", "value_head.bias"}
    assert all((state["parameters"][name] != 0).any() for name in heads)
    resumed = workshop.run("ppo", *flags(tmp_path, lora_rank=2), "--resume")
    assert resumed.code == 0, resumed
    saved = load_file(tmp_path / "ppo" / "adapter_model.safetensors")
    assert saved and all("lora" in name for name in saved)


@pytest.mark.parametrize("changes", [
    {"dtype": "float16"}, {"dtype": "bfloat16", "lora_rank": 2, "quantize": "nf4"}], ids=["float16", "QLoRA"])
def test_other_number_types(changes, workshop, flags, read_log, tmp_path):
    ended = workshop.run("ppo", *flags(tmp_path, max_steps=4, **changes))
    assert ended.code == 0, ended
    steps = [line for line in read_log(tmp_path / "ppo") if "loss" in line]
    assert len(steps) == 4 and all(math.isfinite(line["loss"]) for line in steps)
    assert 0 < steps[-1]["grad_norm"] < math.inf and steps[-1]["value_loss"] > 0


def test_gradient_checkpointing_changes_nothing(workshop, flags, undisturbed, tmp_path):
    assert workshop.run("ppo", *flags(tmp_path), "--gradient_checkpointing").code == 0
    ours, theirs = (load_file(run_dir / "model.safetensors") for run_dir in (tmp_path / "ppo", undisturbed))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


def test_accumulation_and_two_processes_change_nothing(workshop, flags, undisturbed, read_log, tmp_path):
    pair = forks.start(workshop.command("ppo", *flags(tmp_path / "two", micro_batch_size=3)), processes=2)
    accumulated = workshop.run("ppo", *flags(tmp_path / "one", micro_batch_size=3))
    assert accumulated.code == 0, accumulated
    _, err = pair.communicate()
    assert pair.returncode == 0, err
    wanted, weights = read_log(undisturbed), load_file(undisturbed / "model.safetensors")
    for run_dir in (tmp_path / "one" / "ppo", tmp_path / "two" / "ppo"):
        for ours, theirs in zip(read_log(run_dir), wanted, strict=True):
            assert ours == pytest.approx(theirs, abs=2e-5), run_dir
        found = load_file(run_dir / "model.safetensors")
        assert all(torch.allclose(found[name], weights[name], atol=1e-5) for name in weights), run_dir


def test_with_old_chats_on_two_processes(workshop, flags, read_log, tmp_path):
    """Chats give no gradient to the value head, which DDP must not wait for. A lower rate: less rounding."""
    chats = {"sft_data_path": workshop.chats, "sft_weight": 0.3, "sft_batch_size": 3, "learning_rate": 1e-3}
    pair = forks.start(workshop.command("ppo", *flags(tmp_path / "two", **chats)), processes=2)
    alone = workshop.run("ppo", *flags(tmp_path / "one", **chats))
    assert alone.code == 0, alone
    _, err = pair.communicate()
    assert pair.returncode == 0, err
    logs = [read_log(tmp_path / name / "ppo") for name in ("one", "two")]
    assert all(ours == pytest.approx(theirs, abs=2e-5) for ours, theirs in zip(*logs, strict=True))
    assert logs[0][0]["old_chats"] > 1
    one, two = (load_file(tmp_path / name / "ppo" / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
