"""What the tests of GRPO and PPO share: a small model, a batch of answers, and plain log-probabilities."""

import torch

from model.transformer import CausalLM, ModelConfig
from trainer.losses import answer_log_probs

LENGTHS = (3, 1, 5)  # tokens of the three answers
PROMPTS = (4, 2, 3)
T = 9


def small_model(seed=0):
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig(vocab_size=23, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=1, intermediate_size=24, max_position_embeddings=16))
    model.lm_head.weight.data.mul_(8)  # far from uniform, so that probabilities differ
    return model


def answers(rows=range(3)) -> dict:
    """The batch of the contract; three answers of other lengths, one with a bad advantage."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, 23, (3, T), generator=generator)
    labels = torch.full((3, T), -100)
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        labels[row, prompt:prompt + length] = input_ids[row, prompt:prompt + length]
        input_ids[row, prompt + length:] = 0
    is_answer = labels != -100
    batch = {"input_ids": input_ids, "labels": labels,
             "advantages": torch.tensor([[1.5], [-0.7], [0.4]]) * is_answer,
             "weights": torch.tensor([1 / length for length in LENGTHS]),
             "token_weights": torch.full((3,), 3 / sum(LENGTHS))}
    old, _ = answer_log_probs(small_model(), batch, 0.8)
    noise = torch.randn(3, T, generator=generator) * 0.3
    batch["old_log_probs"] = ((old + noise) * is_answer).detach()
    batch["reference_log_probs"] = ((old - 2 * noise) * is_answer).detach()
    batch = {name: values[list(rows)] for name, values in batch.items()}
    return batch | {"sums": {"reward": torch.tensor(2.0)}}


def tokens(model, batch, temperature=0.8):
    """Yields (row, place, log p(token)) of all answers from plain logits, without the code under test."""
    for row in range(len(batch["labels"])):
        logits = model(batch["input_ids"][row:row + 1]).logits[0]
        for place in range(1, T):
            if batch["labels"][row, place] != -100:
                p = torch.softmax(logits[place - 1] / temperature, dim=0)[batch["labels"][row, place]]
                yield row, place, p.log()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def clipped_again(log_p, batch, row, place):
    """The term of one token in PPO's loss, with low = 0.1 and high = 0.3."""
    ratio, advantage = torch.exp(log_p - batch["old_log_probs"][row, place]), batch["advantages"][row, place]
    return -min(ratio * advantage, torch.clip(ratio, 0.9, 1.3) * advantage)
