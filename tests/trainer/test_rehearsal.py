"""Old chats beside the answers of a rollout: their share of the loss, and which of them a step reads."""

from functools import partial

import pytest
import torch

from trainer.batches import Batches
from trainer.distributed import Ranks
from trainer.rehearsal import Rehearsal, rehearse, with_chats


class Answers:
    """Batches of 8 units whose loss is the sum of one parameter."""

    def __getitem__(self, number):
        return [{"number": torch.tensor(number)}], 8, 20

    def identity(self):
        return "answers"

    def singly(self, number):
        yield "an answer", {"number": torch.tensor(number)}


class Chats:
    """A dataset of three rows of 6 tokens, of which the last 2, 3 and 4 are learnt."""

    lengths, num_units, identity = torch.full((3,), 6).numpy(), torch.tensor([2, 3, 4]).numpy(), "chats"

    def collate(self, rows, pad_token_id):
        torch.manual_seed(0)
        input_ids = torch.randint(4, 50, (3, 6))[torch.tensor([sample for [sample] in rows])]
        labels = torch.stack([torch.where(torch.arange(6) >= 4 - sample, ids, -100)
                              for [sample], ids in zip(rows, input_ids, strict=True)])
        return {"input_ids": input_ids, "labels": labels}

    def where(self, sample):
        return f"x.jsonl:{sample + 1}"


def rehearsal(weight, size=2, **changes):
    rows = Batches(Chats(), torch.arange(3).numpy(), Ranks(0, 1, torch.device("cpu")), batch_size=size,
                   max_seq_len=6, seed=1, pad_token_id=0, packing=False, **changes)
    return Rehearsal(Answers(), rows, weight)


def answers_loss(model, batch):
    return batch["number"] * next(model.parameters()).sum(), {"reward": torch.tensor(1.0)}


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 1}], ids=["whole", "in parts"])
def test_the_loss_gains_weight_times_the_mean_over_the_tokens_of_the_chats(make_model, changes):
    """Sum of a step / its units = loss of the answers + weight * mean of -log p over the chats' tokens."""
    model, loss = make_model(), partial(with_chats, answers_loss)
    batches, num_units, num_tokens = rehearsal(0.7, **changes)[2]
    assert num_units == 8 and num_tokens == 20 + 2 * 6
    step = sum(loss(model, batch)[0] for batch in batches) / num_units
    step.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    [chats], num_targets, _ = rehearsal(0.7).chats[2]
    log_probs = model(chats["input_ids"]).logits.log_softmax(-1)
    losses = [-log_probs[row, place - 1, chats["input_ids"][row, place]]
              for row, place in (chats["labels"] != -100).nonzero().tolist()]
    assert len(losses) == num_targets
    by_hand = 2 * next(model.parameters()).sum() / 8 + 0.7 * sum(losses) / len(losses)
    by_hand.backward()
    assert step.item() == pytest.approx(by_hand.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-5)


def test_the_log_tells_both_parts_apart(make_model):
    shown = [with_chats(answers_loss, make_model(), batch)[1] for batch in rehearsal(0.7)[0][0]]
    assert [list(some) for some in shown] == [["old_chats"], ["reward"]]


def test_each_step_reads_other_chats_which_follow_from_its_number():
    ids = [[batch["input_ids"].tolist() for batch in rehearsal(1.0)[number][0][:-1]] for number in (0, 1, 0)]
    assert ids[0] == ids[2] != ids[1]


def test_a_step_that_is_not_finite_finds_its_record_among_the_chats(make_model):
    named = list(rehearsal(1.0).singly(0))
    assert [where for where, _ in named][0] == "an answer" and named[1][0].startswith("x.jsonl:")
    assert all(with_chats(answers_loss, make_model(), batch)[0].isfinite() for _, batch in named)
    assert rehearsal(1.0).identity() == "answers, and old chats of chats"


def test_beside_built_in_prompts_the_built_in_chats_are_learnt(workshop, tokenizer, monkeypatch):
    """... and beside somebody's own prompts only the chats that they name."""
    monkeypatch.setattr("dataset.synthetic.ensure_world", lambda folder: {"sft": workshop.chats})
    monkeypatch.setattr("dataset.token_cache.CACHE_DIR", workshop.folder / "cache")

    def chats(data_path, sft_data_path):
        batches, loss = rehearse(answers := Answers(), answers_loss, tokenizer, ranks, data_path=data_path,
                                 sft_data_path=sft_data_path, sft_weight=1.0, sft_batch_size=2, strict=False,
                                 allow_unusable=False, max_seq_len=64, micro_batch_size=None, seed=1)
        assert (batches is answers) == (loss is answers_loss)
        return None if batches is answers else batches.identity()

    ranks = Ranks(0, 1, torch.device("cpu"))
    assert chats(["mine.jsonl"], None) is None
    assert chats(None, None) == chats(["mine.jsonl"], [workshop.chats]) is not None
