"""Rollouts: what is sampled, which answers are trained and with which weight, alone and among processes."""

import threading
from functools import partial

import numpy as np
import pytest
import torch

from dataset.answers import AnswerTest
from dataset.prompts import Prompt
from trainer import losses
from trainer.distributed import Ranks
from trainer.rollouts import Rollouts, group_advantages, padded, reference_log_probs, unpadded

ENDS, LONGEST = [3, 10, 20, 30, 40], 6


class Prompts:
    """What Rollouts asks of a PromptDataset."""

    def __init__(self, count=7):
        rng = np.random.default_rng(0)
        self.prompts = [Prompt([{"role": "user", "content": f"prompt {i}"}],
                               rng.integers(4, 50, 2 + i).tolist(), AnswerTest(), {}, f"x.jsonl:{i + 1}")
                        for i in range(count)]
        self.identity = "some prompts"

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, index):
        return self.prompts[index]


class Words:
    """A tokenizer that decodes to numbers."""

    pad_token_id = 0

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


def judge(prompts, answers):
    """The reward is 1 where the first token is even; no answer to prompt 3 gets any."""
    return [{"reward": float(answer.text.split()[:1] != [] and int(answer.text.split()[0]) % 2 == 0
                             and prompt.messages[0]["content"] != "prompt 3")}
            for prompt, answer in zip(prompts, answers, strict=True)]


judge.identity = ", even numbers"


def make(model, ranks=None, **changes):
    settings = dict(dtype=torch.float32, batch_size=16, group_size=4, max_new_tokens=LONGEST, seed=5)
    settings |= changes
    dataset = settings.pop("dataset", None) or Prompts()
    ranks = ranks or Ranks(0, 1, torch.device("cpu"))
    samples = list(range(len(dataset)))
    return Rollouts(model, Words(), ENDS, dataset, samples, judge, ranks, **settings)


def rows_of(batches):
    return [row for batch in batches for row in unpadded(batch)]


def answer_of(row):
    return row["labels"][row["labels"] != -100].tolist()


# --- advantages and weights ---------------------------------------------------------------------------------


def test_advantages_are_what_is_above_the_mean_of_the_group():
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.1, 0.1, 0.1, 0.1]])
    expected = torch.tensor([[0.5, -0.5, 0.5, -0.5], [0.25, 0.25, 0.25, -0.75], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(group_advantages(rewards), expected)
    assert (group_advantages(rewards, divide=True)[2] == 0).all()  # exactly: rounding is no signal
    deviation = np.array([[1, 0, 1, 0]]).std(ddof=1)
    assert torch.allclose(group_advantages(rewards, divide=True)[0], expected[0] / (deviation + 1e-4))


@pytest.mark.parametrize("mean_over", ["tokens", "answers", "constant"])
def test_weights_make_the_sum_of_a_step_the_mean_that_was_asked_for(make_model, mean_over):
    all_are_trained = {"complete": lambda batches: None}
    rollouts = make(make_model(), mean_over=mean_over, **all_are_trained)
    batches, num_units, _ = rollouts[0]
    rows = rows_of(batches)
    lengths = [len(answer_of(row)) for row in rows]
    assert num_units == len(rows) == 16 and len(set(lengths)) > 2
    values = torch.rand(16, LONGEST, generator=torch.Generator().manual_seed(0))
    used = [values[i, :length] for i, length in enumerate(lengths)]
    found = sum(float(row["weights"] * some.sum()) for row, some in zip(rows, used, strict=True)) / 16
    right = {"tokens": torch.cat(used).mean(), "constant": torch.cat(used).sum() / LONGEST / 16,
             "answers": torch.stack([some.mean() for some in used]).mean()}[mean_over]
    assert found == pytest.approx(right.item(), rel=1e-5)
    shown = sum(float(row["token_weights"] * some.sum()) for row, some in zip(rows, used, strict=True))
    assert shown / 16 == pytest.approx(torch.cat(used).mean().item(), rel=1e-5)


def test_groups_without_a_difference_are_counted_and_not_trained(make_model):
    rollouts = make(make_model(), dataset=Prompts(4))  # prompt 3 is always among them
    batches, num_units, _ = rollouts[0]
    sums = {name: float(value) for name, value in batches[0]["sums"].items()}
    rows = rows_of(batches)
    assert num_units == 16 and len(rows) == sums["signal"] < 16
    assert all(any(row["advantages"] != 0) for row in rows)
    assert sums.keys() == {"reward", "length", "cut_off", "signal"} and 0 < sums["reward"] < 16


def test_a_rollout_without_any_signal_gives_a_loss_of_0_and_says_what_to_change(make_model, capsys):
    model = make_model()
    dataset = Prompts(4)
    dataset.prompts = [dataset.prompts[3]] * 4
    rollouts = make(model, dataset=dataset)
    for number in range(20):
        batches, num_units, _ = rollouts[number]
    loss = partial(losses.policy_loss, objective=losses.clipped_ratio)
    total, sums = loss(model, batches[0])
    total.backward()
    assert len(batches) == 1 and num_units == 16 and total == 0 and sums["signal"] == 0
    assert all(parameter.grad is None or (parameter.grad == 0).all() for parameter in model.parameters())
    assert capsys.readouterr().out.count("warning: in 20 rollouts in a row") == 1


def test_answers_that_were_cut_off_are_marked_and_can_be_masked(make_model):
    counted, masked = make(make_model()), make(make_model(), mask_cut_off=True)
    (batches, _, _), (fewer, _, _) = counted[0], masked[0]
    assert batches[0]["sums"]["cut_off"] == fewer[0]["sums"]["cut_off"] > 0
    assert any(answer_of(row)[-1] not in ENDS for row in rows_of(batches))
    assert all(answer_of(row)[-1] in ENDS for row in rows_of(fewer))


# --- what is sampled ----------------------------------------------------------------------------------------


def test_old_log_probs_are_those_of_the_tokens_at_the_temperature_of_sampling(make_model):
    model = make_model()
    rollouts = make(model, temperature=0.7, complete=lambda batches: None, micro_batch_size=5)
    for row in rows_of(rollouts[0][0]):
        with torch.no_grad():
            expected = (model.eval()(row["input_ids"][None]).logits[0] / 0.7).log_softmax(-1)
        for place in (row["labels"] != -100).nonzero().flatten().tolist():
            right = expected[place - 1, row["input_ids"][place]]
            assert row["old_log_probs"][place] == pytest.approx(right.item(), abs=1e-5)
        assert (row["old_log_probs"][row["labels"] == -100] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_first_update_every_ratio_is_exactly_1(make_model, dtype):
    model = make_model()
    rollouts = make(model, dtype=dtype, complete=lambda batches: None, micro_batch_size=3)
    for batch in rollouts[0][0]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            log_probs, _ = losses.answer_log_probs(model.train(), batch, 1.0)
        assert torch.equal(log_probs.detach(), batch["old_log_probs"])


def test_the_same_rollout_serves_its_updates_and_the_next_sees_new_weights(make_model):
    model = make_model()
    rollouts = make(model, updates_per_rollout=2, complete=lambda batches: None)
    first, again = rollouts[0][0], rollouts[1][0]
    assert first is again and len(rollouts) == 2 * 2  # 7 prompts, 4 in a rollout
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)
    changed = [answer_of(row) for row in rows_of(rollouts[2][0])]
    other = make(make_model(), updates_per_rollout=2, complete=lambda batches: None)
    assert changed != [answer_of(row) for row in rows_of(other[2][0])]


def test_an_epoch_asks_every_prompt_once(make_model):
    rollouts = make(make_model())
    for epoch in (0, 1):
        asked = [sample for number in (0, 1) for sample in rollouts.prompts_of(2 * epoch + number)]
        assert sorted(asked) == list(range(7))


def test_validation_takes_the_likeliest_answers_and_samples_anew_each_time(make_model):
    model = make_model()
    rollouts = make(model, greedy=True, group_size=1, batch_size=4)
    rows = [row for number in range(len(rollouts)) for row in rows_of(rollouts[number][0])]
    assert len(rows) == 7
    for row, prompt in zip(rows, Prompts().prompts, strict=True):
        ids = list(prompt.ids)
        for token in answer_of(row):
            with torch.no_grad():
                assert model.eval()(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)
        assert (row["advantages"][row["labels"] != -100] == row["rewards"]).all()
    before = [answer_of(row) for row in rows_of(rollouts[0][0])]
    with torch.no_grad():
        model.model.norm.weight.neg_()
    assert before != [answer_of(row) for row in rows_of(rollouts[0][0])]


# --- processes, and stopped runs ----------------------------------------------------------------------------


class Together(Ranks):
    """Ranks of threads: `gather` and `sum` exchange through a list that the threads share."""

    def share(self, table, barrier):
        object.__setattr__(self, "exchange", (table, barrier))
        return self

    def gather(self, value):
        table, barrier = self.exchange
        table[self.rank] = value
        barrier.wait()
        found = list(table)
        barrier.wait()
        return found

    def sum(self, *values):
        return [sum(column) for column in zip(*self.gather([float(value) for value in values]), strict=True)]


def in_threads(world_size, work):
    """work(ranks) in each of so many threads -> what each returned."""
    table, barrier, results = [None] * world_size, threading.Barrier(world_size), [None] * world_size

    def run(rank):
        results[rank] = work(Together(rank, world_size, torch.device("cpu")).share(table, barrier))

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(world_size)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    return results


@pytest.mark.parametrize("world_size", [2, 4, 5])
def test_several_processes_train_the_answers_that_one_trains(make_model, world_size):
    settings = dict(updates_per_rollout=2, dataset=Prompts(3), batch_size=12)
    alone = make(make_model(), **settings)
    expected, num_units, num_tokens = alone[0]
    expected, state = rows_of(expected), alone.state()

    models = [make_model() for _ in range(world_size)]  # the threads share torch's random numbers

    def work(ranks):
        rollouts = make(models[ranks.rank], ranks, micro_batch_size=2, **settings)
        return rollouts[0], rollouts.state()

    found = in_threads(world_size, work)
    assert len({len(batches) for (batches, _, _), _ in found}) == 1  # as many forward passes in each
    for rank, ((batches, units, tokens), their_state) in enumerate(found):
        assert (units, tokens) == (num_units, num_tokens)
        rows = rows_of(batches)
        assert len(rows) == len(expected[rank::world_size])
        for one, other in zip(rows, expected[rank::world_size], strict=True):
            for name in other:
                torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=0)
        assert [row["input_ids"].tolist() for row in their_state["rows"]] == \
            [row["input_ids"].tolist() for row in state["rows"]]
        assert their_state["totals"] == state["totals"]
    keys = {tuple(sorted(batch)) + tuple(sorted(batch["sums"]))
            for (batches, _, _), _ in found for batch in batches}
    assert len(keys) == 1  # the loop adds up the sums of all processes by name


def test_a_stopped_run_keeps_the_rollout_of_which_more_updates_are_to_come(make_model, tmp_path):
    settings = dict(updates_per_rollout=2, micro_batch_size=3)
    rollouts = make(make_model(), **settings)
    batches, *numbers = rollouts[2]
    torch.save(rollouts.state(), tmp_path / "state.pt")
    resumed = make(make_model(seed=1), **settings)  # other weights: nothing may be sampled again
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    again, *same_numbers = resumed[3]
    assert numbers == same_numbers and len(batches) == len(again)
    for one, other in zip(batches, again, strict=True):
        assert one["sums"] == other.pop("sums") and one.keys() - {"sums"} == other.keys()
        for name, value in other.items():
            assert torch.equal(one[name], value) and one[name].dtype == value.dtype
    rollouts[3]
    assert rollouts.state() == {}  # the next batch is sampled with the weights of then


def test_rows_come_back_as_they_were_padded():
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "weights": torch.tensor(weight)}
            for ids, labels, weight in (([4, 5, 6], [-100, 5, 6], 0.5), ([7, 8], [-100, 8], 2.0))]
    batch = padded(rows, 0)
    assert batch["input_ids"].tolist() == [[4, 5, 6], [7, 8, 0]] and batch["weights"].tolist() == [0.5, 2.0]
    assert batch["labels"].tolist() == [[-100, 5, 6], [-100, 8, -100]]
    for one, other in zip(unpadded(batch), rows, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


# --- the reference ------------------------------------------------------------------------------------------


def test_the_reference_is_the_model_as_it_was(make_model):
    model = make_model()
    batch = {"input_ids": torch.tensor([[4, 5, 6, 7]]), "labels": torch.tensor([[-100, -100, 6, 7]])}
    assert reference_log_probs(model, 0.0, 1.0) is None
    reference = reference_log_probs(model, 0.1, 0.5)
    before = losses.answer_log_probs(model, batch, 0.5)[0]
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)
    assert torch.equal(reference(batch), before)
    assert not torch.equal(losses.answer_log_probs(model, batch, 0.5)[0], before)


def test_with_adapters_the_reference_is_the_model_without_them(make_model):
    from model.lora import apply_lora, freeze_all_but_lora

    model = make_model()
    batch = {"input_ids": torch.tensor([[4, 5, 6, 7]]), "labels": torch.tensor([[-100, -100, 6, 7]])}
    before = losses.answer_log_probs(model, batch, 1.0)[0]
    apply_lora(model, 2)
    freeze_all_but_lora(model)
    reference = reference_log_probs(model, 0.1, 1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora.B" in name:
                parameter.fill_(0.1)
    adapted = losses.answer_log_probs(model, batch, 1.0)[0]
    assert torch.allclose(reference(batch), before, atol=1e-6)
    assert not torch.allclose(adapted, before, atol=1e-3)
    assert torch.equal(losses.answer_log_probs(model, batch, 1.0)[0], adapted)  # it is on again
