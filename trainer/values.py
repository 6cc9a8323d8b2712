"""What PPO has beyond GRPO: a value head, and advantages for each token. A reader may skip this file.

GRPO compares an answer with other answers to the same prompt. PPO asks a second output of the model, its
value head, how much reward is still to come after each token, and compares what came with that.
"""

import torch
from torch import nn


def add_value_head(model) -> nn.Linear:
    """Gives the model one linear layer on its last hidden states, which trains; returns that layer.

    As a part of the model it is in checkpoints, and DDP adds up its gradients. It begins at zero, so that at
    first every reward is a surprise. Call `del model.value_head` before the model is saved.
    """
    model.value_head = nn.Linear(model.config.hidden_size, 1)
    nn.init.zeros_(model.value_head.weight)
    nn.init.zeros_(model.value_head.bias)
    return model.value_head


def token_rewards(reward: float, log_probs: torch.Tensor, reference_log_probs: torch.Tensor | None,
                  kl_beta: float) -> torch.Tensor:
    """The reward of each token of one answer, (T,): that of the answer at its end, less what the KL costs.

        r_t = -kl_beta (log p(token t) - log p_ref(token t)),   and at the last token + reward
        (Ziegler et al. 2019, arXiv:1909.08593)
    """
    rewards = torch.zeros_like(log_probs)
    if kl_beta:
        rewards = kl_beta * (reference_log_probs - log_probs)
    rewards[-1] += reward
    return rewards


def generalised_advantages(rewards: torch.Tensor, values: torch.Tensor, gamma: float = 1.0,
                           decay: float = 0.95) -> torch.Tensor:
    """How much better each token of one answer was than its value head expected, (T,).

        A_t = d_t + (gamma decay) d_t+1 + (gamma decay)^2 d_t+2 + ...,   d_t = r_t + gamma V_t+1 - V_t
        (GAE: Schulman et al. 2016, arXiv:1506.02438)

    rewards, values: (T,); the value after the last token is 0. decay, "lambda" in the paper: 1 trusts the
    rewards alone, and 0 trusts the value head from the next token on. The returns, which values learn, are
    advantages + values.
    """
    rewards, values = rewards.tolist(), [*values.tolist(), 0.0]
    advantage, advantages = 0.0, []
    for t in reversed(range(len(rewards))):
        surprise = rewards[t] + gamma * values[t + 1] - values[t]
        advantage = surprise + gamma * decay * advantage
        advantages.append(advantage)
    return torch.tensor(advantages[::-1])


def normalised(advantages: list[torch.Tensor]) -> list[torch.Tensor]:
    """The advantages of a rollout, (T,) for each answer, moved and scaled to mean 0 and deviation 1 over all
    tokens."""
    together = torch.cat(advantages).double()
    mean, variance = together.mean(), together.var() if len(together) > 1 else torch.tensor(0.0)
    return [((a - mean) / (variance + 1e-8).sqrt()).float() for a in advantages]
