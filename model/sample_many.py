"""Many answers at once, for rewards: several to each prompt, drawn by given random numbers.
A reader may skip this file.

    answers = sample_many(model, prompts, 64, end_tokens=[2], group_size=16, numbers=torch.rand(256, 64))

`generate` (model/generate.py) writes the same tokens. Three things are faster here: a prompt goes through the
model once for all of its answers, rows that have ended leave the batch, and nothing is yielded in between. A
model with a compiled step (model/compiled_step.py) uses it for every token but the first.

What a row says depends on its prompt, its random numbers and the weights alone. The rows beside it change
nothing but float rounding. So any number of processes can share the work, and all draw the same answers.
"""

import torch

from common.device import matmul_dtype
from common.errors import RunError
from model.generate import KVCache, choose_token, faster_step, why_not_finite
from model.transformer import CausalLM


@torch.no_grad()
def sample_many(model: CausalLM, prompts: list[list[int]], max_new_tokens: int, end_tokens: list[int],
                group_size: int = 1, temperature: float = 1.0, numbers=None) -> list[torch.Tensor]:
    """The answers to all prompts, group_size to each, in the order of the prompts: tensors (T,) on the CPU.

    An answer ends with one of the end_tokens, or it has max_new_tokens and was cut off.
    numbers (len(prompts) * group_size, max_new_tokens): uniform in [0, 1). Token t of row r takes
        numbers[r, t], so that the same numbers draw the same answer. None is for temperature 0 alone, which
        takes the likeliest token each time.

    Put the model in eval() first. Raises RunError where the model's numbers are not finite.
    """
    device, longest = model.model.norm.weight.device, max(map(len, prompts))
    start = torch.tensor([longest - len(ids) for ids in prompts], device=device)  # pads on the left
    padded = [end_tokens[:1] * (longest - len(ids)) + ids for ids in prompts]
    # The cache has the type that the forward pass computes in, which autocast may have set.
    cache = KVCache(model.config, len(prompts), longest + max_new_tokens, device,
                    matmul_dtype(model.model.norm.weight), start if start.any() else None)
    logits = last_logits(model, torch.tensor(padded, device=device), cache)  # (prompts, V)
    groups = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
    cache.take(groups)  # from here on each answer is a row of its own
    logits = logits[groups]  # (rows, V)

    rows = torch.arange(len(groups), device=device)  # the answers that are still in the batch
    tokens = torch.zeros(len(groups), max_new_tokens, dtype=torch.long, device=device)
    ended, ends = torch.zeros_like(rows, dtype=torch.bool), torch.tensor(end_tokens, device=device)
    numbers = None if temperature == 0 else numbers.to(device)
    one_token = faster_step(model, len(rows))
    for step in range(max_new_tokens):
        if not logits.amax(dim=-1).isfinite().all():
            raise RunError(f"while sampling answers: {why_not_finite(model)}")
        new = choose_token(logits, temperature, 0, 1.0, None if numbers is None else numbers[rows, step])
        tokens[rows, step] = new
        ended |= torch.isin(new, ends)
        num_left = len(rows) - int(ended.sum())
        if num_left == 0 or step == max_new_tokens - 1:
            break
        # Moving the cache costs time, too. So rows leave the batch when half of it has ended.
        if num_left <= len(rows) // 2:
            left = (~ended).nonzero().squeeze(1)
            cache.take(left)
            rows, new, ended = rows[left], new[left], ended[left]
        logits = one_token(new, cache) if one_token else last_logits(model, new[:, None], cache)
    tokens = tokens.cpu()
    # A row may have stayed in the batch after its end. What it said there is cut off.
    is_end = torch.isin(tokens, ends.cpu())
    lengths = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, max_new_tokens)
    return [row[:length] for row, length in zip(tokens, lengths.tolist(), strict=True)]


def last_logits(model, input_ids, cache: KVCache) -> torch.Tensor:
    """The logits (B, V) of the token after input_ids (B, T), which are appended to the cache."""
    output = model(input_ids, cache=cache)
    output.hidden = output.hidden[:, -1:]
    return output.logits[:, 0].float()
