"""The losses of GRPO and PPO against their equations, written out again token by token with autograd."""

from functools import partial

import pytest
import torch
from small_answers import LENGTHS, T, answers, clipped_again, gradients, small_model, tokens

from trainer.losses import answer_log_probs, cispo, clipped_ratio, gspo, policy_loss, reinforce


def reinforce_again(log_p, batch, row, place):
    return -batch["advantages"][row, place] * log_p


def cispo_again(log_p, batch, row, place):
    ratio = torch.exp(log_p - batch["old_log_probs"][row, place]).item()
    return -min(ratio, 1.3) * batch["advantages"][row, place] * log_p


TOKEN_LOSSES = {"reinforce": (reinforce, reinforce_again),
                "clipped": (partial(clipped_ratio, low=0.1, high=0.3), clipped_again),
                "cispo": (partial(cispo, high=0.3), cispo_again)}


@pytest.mark.parametrize("kl_beta", [0.0, 0.5])
@pytest.mark.parametrize("objective, again", TOKEN_LOSSES.values(), ids=TOKEN_LOSSES)
def test_loss_and_gradients_are_those_of_the_equation(objective, again, kl_beta):
    model, batch = small_model(), answers()
    expected = 0
    for row, place, log_p in tokens(model, batch):
        term = again(log_p, batch, row, place)
        difference = batch["reference_log_probs"][row, place] - log_p
        ratio = torch.exp(log_p - batch["old_log_probs"][row, place])
        term = term + kl_beta * ratio * (torch.exp(difference) - difference - 1)
        expected = expected + term / LENGTHS[row]
    wanted = gradients(model, expected)
    loss, _ = policy_loss(model, batch, objective=objective, temperature=0.8, kl_beta=kl_beta)
    assert torch.allclose(loss, expected, atol=1e-6)
    assert torch.allclose(gradients(model, loss), wanted, atol=2e-6)
    assert wanted.abs().max() > 0.01


def test_gspo_has_one_ratio_for_an_answer():
    model, batch = small_model(), answers()
    change = [0.0, 0.0, 0.0]
    for row, place, log_p in tokens(model, batch):
        change[row] = change[row] + (log_p - batch["old_log_probs"][row, place]) / LENGTHS[row]
    expected = 0
    for row, advantage in enumerate((1.5, -0.7, 0.4)):
        ratio = change[row].exp()
        expected = expected - min(ratio * advantage, torch.clip(ratio, 0.99, 1.01) * advantage)
    wanted = gradients(model, expected)
    loss, sums = policy_loss(model, batch, objective=partial(gspo, low=0.01, high=0.01), temperature=0.8)
    assert torch.allclose(loss, expected, atol=1e-6)
    assert torch.allclose(gradients(model, loss), wanted, atol=2e-6)
    assert sums["clipped"] > 0 and wanted.abs().max() > 0.01  # some answers are clipped, and not all


def test_log_probabilities_and_entropy_lie_at_the_places_of_the_labels():
    model, batch = small_model(), answers()
    log_probs, entropy = answer_log_probs(model, batch, 0.8)
    found = {(row, place): log_p for row, place, log_p in tokens(model, batch)}
    for row in range(3):
        logits = model(batch["input_ids"][row:row + 1]).logits[0] / 0.8
        for place in range(T):
            if (row, place) in found:
                p = torch.softmax(logits[place - 1], dim=0)
                assert torch.isclose(log_probs[row, place], found[row, place], atol=1e-6)
                assert torch.isclose(entropy[row, place], -(p * p.log()).sum(), atol=1e-5)
            else:
                assert log_probs[row, place] == 0 and entropy[row, place] == 0
    assert not entropy.requires_grad


def test_at_temperature_one_they_are_those_of_the_cross_entropy():
    model, batch = small_model(), answers()
    log_probs, _ = answer_log_probs(model, batch, 1.0)
    token_losses = model(batch["input_ids"], batch["labels"]).token_losses
    assert torch.allclose(-log_probs, token_losses, atol=1e-5)


def test_a_policy_that_has_not_moved_has_ratio_one_and_the_gradient_of_reinforce():
    model, batch = small_model(), answers()
    batch["old_log_probs"] = answer_log_probs(model, batch, 0.8)[0].detach()
    losses = {name: policy_loss(model, batch, objective=objective, temperature=0.8)
              for name, objective in (("reinforce", reinforce), ("clipped", clipped_ratio), ("cispo", cispo),
                                      ("gspo", gspo))}
    assert torch.isclose(losses["clipped"][0], -torch.tensor(1.5 - 0.7 + 0.4), atol=1e-5)
    wanted = gradients(model, losses.pop("reinforce")[0])
    for name, (loss, sums) in losses.items():
        assert torch.allclose(gradients(model, loss), wanted, atol=2e-6), name
        assert sums["clipped"] == 0


OBJECTIVES = (reinforce, clipped_ratio, cispo, gspo)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.__name__)
def test_the_sums_of_micro_batches_add_up_and_one_without_an_answer_adds_nothing(objective):
    model, batch = small_model(), answers()
    loss = partial(policy_loss, objective=objective, temperature=0.8, kl_beta=0.1)
    whole, named = loss(model, batch)
    empty = answers([0]) | {"sums": {"reward": torch.tensor(0.0)}}
    empty["labels"] = torch.full_like(empty["labels"], -100)
    parts = [loss(model, answers([0, 2])), loss(model, answers([1])), loss(model, empty)]
    assert torch.isclose(sum(part for part, _ in parts), whole, atol=1e-6)
    assert all(set(sums) == set(named) for _, sums in parts)
    for name in set(named) - {"reward"}:
        assert torch.isclose(sum(sums[name] for _, sums in parts), named[name], atol=1e-6), name
    nothing = parts[-1][0]
    assert nothing == 0 and (gradients(model, nothing) == 0).all()


def test_the_log_shows_means_over_tokens():
    model, batch = small_model(), answers()
    _, sums = policy_loss(model, batch, objective=clipped_ratio, temperature=0.8, kl_beta=0.1)
    log_p = torch.stack([log_p for _, _, log_p in tokens(model, batch)])
    is_answer = batch["labels"] != -100
    difference = batch["reference_log_probs"][is_answer] - log_p
    ratio = (log_p - batch["old_log_probs"][is_answer]).exp()
    assert torch.isclose(sums["kl"] / 3, (ratio * (difference.exp() - difference - 1)).mean(), atol=1e-6)
    _, entropy = answer_log_probs(model, batch, 0.8)
    assert torch.isclose(sums["entropy"] / 3, entropy.sum() / sum(LENGTHS), atol=1e-6)
    advantages = batch["advantages"][is_answer]
    is_clipped = (ratio > 1.2) & (advantages > 0) | (ratio < 0.8) & (advantages < 0)
    assert torch.isclose(sums["clipped"] / 3, is_clipped.float().mean()) and 0 < is_clipped.sum() < 9
    assert sums["reward"] == 2


def test_the_gradient_of_the_kl_is_that_of_the_divergence_itself():
    """One token after one prompt, with every word of the vocabulary as often as the policy says it."""
    model, prompt = small_model(), torch.tensor([[3, 7, 5]])
    reference = torch.log_softmax(torch.randn(23, generator=torch.Generator().manual_seed(5)), dim=0)
    divergence = torch.log_softmax(model(prompt).logits[0, -1], dim=0)
    divergence = (divergence.exp() * (divergence - reference)).sum()
    wanted = gradients(model, divergence)
    words = torch.arange(23)[:, None]
    labels = torch.cat((torch.full((23, 3), -100), words), dim=1)
    batch = {"input_ids": torch.cat((prompt.expand(23, 3), words), dim=1), "labels": labels, "sums": {},
             "advantages": torch.zeros(23, 4), "token_weights": torch.zeros(23)}
    batch["old_log_probs"] = answer_log_probs(model, batch, 1.0)[0].detach()
    batch["reference_log_probs"] = torch.nn.functional.pad(reference[:, None], (3, 0))
    batch["weights"] = batch["old_log_probs"][:, 3].exp()
    loss, _ = policy_loss(model, batch, objective=reinforce, kl_beta=1.0)
    assert torch.isclose(loss, divergence, atol=1e-5)
    assert torch.allclose(gradients(model, loss), wanted, atol=1e-5) and wanted.abs().max() > 0.01
