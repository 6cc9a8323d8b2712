"""The one held-out loss: a mean over supervised tokens, in whatever batches and processes they are."""

import pytest
import torch
from small_models import ours

from model.held_out import mean_loss


def batch_of(rows, length, supervised, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (rows, length), generator=generator)
    labels = torch.where(torch.arange(length) >= length - supervised, ids, -100)
    return {"input_ids": ids, "labels": labels, "document_ids": None}


BATCHES = [batch_of(2, 9, 3, 0), batch_of(1, 12, 11, 1), batch_of(3, 5, 0, 2)]


def by_hand(model):
    """(mean, number of tokens), one token after the other."""
    losses = []
    with torch.no_grad():
        for batch in BATCHES:
            logs = model(batch["input_ids"]).logits.log_softmax(-1)
            for row, labels in enumerate(batch["labels"].tolist()):
                losses += [-logs[row, t - 1, label].item() for t, label in enumerate(labels) if label != -100]
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("training", [False, True])
def test_the_mean_over_all_supervised_tokens(training):
    model = ours().train(training)
    loss, num_targets = mean_loss(model, BATCHES)
    expected, count = by_hand(model)
    assert num_targets == count == 2 * 3 + 11 and loss == pytest.approx(expected, rel=1e-5)
    assert model.training == training and all(p.grad is None for p in model.parameters())


def test_several_processes_have_one_mean():
    """Each of two processes has a part of the batches; add_up gives both the sums over all."""
    model, parts = ours(), []
    for some in (BATCHES[:1], BATCHES[1:]):
        mean_loss(model, some, add_up=lambda *values: parts.append(values) or values)
    totals = [sum(float(value) for value in values) for values in zip(*parts, strict=True)]
    loss, num_targets = mean_loss(model, BATCHES[:1], add_up=lambda *values: totals)
    assert (loss, num_targets) == (pytest.approx(by_hand(model)[0], rel=1e-5), 17)


def test_nothing_supervised_is_zero_and_look_sees_every_pass():
    seen = []
    assert mean_loss(ours(), BATCHES[2:], look=lambda output, batch: seen.append(batch)) == (0.0, 0)
    assert seen == BATCHES[2:] and mean_loss(ours(), []) == (0.0, 0)
