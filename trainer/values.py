"""What PPO has beyond GRPO: a value head, and advantages for each token. A reader may skip this file.

GRPO compares an answer with other answers to the same prompt. PPO asks a second output of the model, its
value head, how much reward is still to come after each token, and compares what came with that.
"""

import math

import torch
from torch import nn

from common.device import autocast, to_device
from trainer.distributed import Ranks
from trainer.losses import labelled_values


def add_value_head(model) -> nn.Linear:
    """Gives the model one linear layer on its last hidden states, which trains; returns that layer.

    As a part of the model it is in checkpoints, and DDP adds up its gradients. It begins at zero, so that at
    first it expects no reward at all. Call `del model.value_head` before the model is saved.
    """
    model.value_head = nn.Linear(model.config.hidden_size, 1)
    nn.init.zeros_(model.value_head.weight)
    nn.init.zeros_(model.value_head.bias)
    return model.value_head


def rewards_differ(rewards: torch.Tensor) -> torch.Tensor:
    """1 for all answers of a rollout, or 0 for all if they have the same reward: there is nothing to compare.

    In `Rollouts` this has the place of the advantages, which `judge_tokens` computes later. So the log shows
    rollouts without a signal, and many of them in a row are reported.
    """
    return torch.full_like(rewards, float((rewards != rewards.flatten()[0]).any()))


@torch.no_grad()
def judge_tokens(batches: list[dict], *, model, ranks: Ranks, dtype: torch.dtype, kl_beta: float,
                 gamma: float, gae_decay: float) -> None:
    """Gives the micro-batches of a rollout values, returns and advantages for each token, all (B, T).

    batches: this process's part of the rollout, with the rewards (B,) of the answers. model: as it sampled
    them, with a value head. Over all processes the advantages get mean 0 and standard deviation 1.
    """
    for batch in batches:
        on_device = to_device(batch, ranks.device)
        with autocast(ranks.device, dtype):
            output = model(on_device["input_ids"])
            values = labelled_values(output, on_device["labels"], model.value_head).cpu()
        advantages = torch.zeros_like(values)
        for row, is_answer in enumerate(batch["labels"] != -100):
            if is_answer.any():
                rewards, expected = token_rewards(batch, row, is_answer, kl_beta), values[row, is_answer]
                advantages[row, is_answer] = generalised_advantages(rewards, expected, gamma, gae_decay)
        batch |= {"values": values, "returns": advantages + values, "advantages": advantages}
    normalise_advantages(batches, ranks)


def token_rewards(batch: dict, row: int, is_answer: torch.Tensor, kl_beta: float) -> torch.Tensor:
    """The reward of each token of one answer, (T,): that of the answer at its end, less what the KL costs.

        r_t = -kl_beta (log p(token t) - log p_ref(token t)),   and at the last token + reward
        (Ziegler et al. 2019, arXiv:1909.08593)
    """
    rewards = torch.zeros(int(is_answer.sum()))
    if kl_beta:
        rewards = kl_beta * (batch["reference_log_probs"] - batch["old_log_probs"])[row, is_answer]
    rewards[-1] += batch["rewards"][row]
    return rewards


def generalised_advantages(rewards: torch.Tensor, values: torch.Tensor, gamma: float,
                           gae_decay: float) -> torch.Tensor:
    """How much better each token of one answer was than the value head expected, (T,).

        A_t = d_t + (gamma decay) d_t+1 + (gamma decay)^2 d_t+2 + ...,   d_t = r_t + gamma V_t+1 - V_t
        (GAE: Schulman et al. 2016, arXiv:1506.02438)

    rewards, values: (T,); the value after the last token is 0. gae_decay, lambda in the paper: with 1 the
    rewards alone decide, and with 0 the value head decides from the next token on. The returns, which the
    value head learns to predict, are advantages + values.
    """
    rewards, values = rewards.tolist(), [*values.tolist(), 0.0]
    advantage, advantages = 0.0, []
    for t in reversed(range(len(rewards))):
        surprise = rewards[t] + gamma * values[t + 1] - values[t]
        advantage = surprise + gamma * gae_decay * advantage
        advantages.append(advantage)
    return torch.tensor(advantages[::-1])


def normalise_advantages(batches: list[dict], ranks: Ranks) -> None:
    """Gives the advantages the mean 0 and the standard deviation 1, over all tokens of all processes."""
    found = torch.cat([batch["advantages"][batch["labels"] != -100] for batch in batches]).double()
    count, total = ranks.sum(len(found), found.sum())
    mean = total / max(1, count)
    (squares,) = ranks.sum(((found - mean) ** 2).sum())
    deviation = math.sqrt(squares / max(1, count - 1) + 1e-8)
    for batch in batches:
        batch["advantages"] = (batch["advantages"] - mean) / deviation * (batch["labels"] != -100)
