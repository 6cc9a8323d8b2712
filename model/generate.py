"""Decoding: one token after the other, each fed back in, with a cache of keys and values.

    for ids in generate(model, input_ids, max_new_tokens=100, temperature=0.7, eos_token_id=2):
        print(tokenizer.decode(ids), end="")    # ids: (B,), the next token of each row

Shapes: B batch, T tokens of the prompt, S tokens stored, K key/value heads, D head dim, V vocabulary.
"""

import math
from collections.abc import Iterator

import torch

from common.errors import ModelError, RunError
from model.config import ModelConfig
from model.transformer import CausalLM, rope_tables

LIKELIEST = 64  # tokens among which the nucleus of top-p is looked for first

class KVCache:
    """The keys and values of all tokens so far.

    A token sees only earlier tokens. So its keys and values stay the same when the text grows, and they can
    be stored. Without a cache each new token would need a forward pass over the whole text. With a cache
    the pass covers the new token alone, and attention reads the stored keys and values of the earlier ones.

    start (B,): how many pads stand on the left of each row. Positions count from there, and nobody sees pads.
    """

    def __init__(self, config: ModelConfig, batch_size, max_length, device=None, dtype=None, start=None):
        layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
        shape = (layers, batch_size, kv_heads, max_length, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.start, self.max_length = start, max_length
        self.length = 0  # number of tokens stored; the Decoder increases it after all layers have appended
        positions = torch.arange(max_length, device=device)[None]
        # The two tables of `rope_tables` for all positions; [0] drops the batch axis: (max_length, 1, D) each
        self.rope = [table[0] for table in rope_tables(config, positions, torch.float32)]

    def append(self, layer: int, k, v):
        """Stores new k, v (B, K, T, D) of one layer. Returns all k, v of this layer, (B, K, S, D)."""
        end = self.length + k.size(2)
        self.k[layer][:, :, self.length:end] = k
        self.v[layer][:, :, self.length:end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def take(self, rows):
        """Keeps these rows, given by their numbers (N,). A row that is named several times is copied."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.start = None if self.start is None else self.start[rows]

    def rope_at(self, positions, dtype):
        """What `rope_tables` gives for positions (B or 1, T): two tables (B or 1, T, 1, D)."""
        return [table[positions].to(dtype) for table in self.rope]


def generate(model: CausalLM, input_ids: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, seed: int | None = None, repetition_penalty: float = 1.0,
             eos_token_id: int | list[int] | None = None, prompt_lengths=None) -> Iterator[torch.Tensor]:
    """Continues the prompts input_ids (B, T): yields the next ids (B,), at most max_new_tokens times.

    temperature: 0 takes the likeliest token. With top_k 0 and top_p 1 every token may be chosen.
    repetition_penalty: above 1, tokens that have occurred, also in the prompt, become less likely.
    seed: the same seed gives the same text. Without one, torch's global random state decides.
    eos_token_id: tokens that end a row. An ended row repeats the first of these tokens, and decoding stops
        when all rows have ended.
    prompt_lengths (B,): the caller pads prompts of unequal length on the left, and gives their lengths
        without pads. Then each row gets the tokens that it would get alone.

    Put the model in eval() first. Raises ModelError for senseless values, and RunError where the model's
    numbers are not finite.
    """
    shape = tuple(input_ids.shape)
    for wrong, message in (
        (len(shape) != 2 or 0 in shape, f"input_ids must be (B, T) with at least one token, not {shape}"),
        (max_new_tokens < 0, f"max_new_tokens must be 0 or more, not {max_new_tokens}"),
        (temperature < 0, f"temperature must be 0 (greedy) or more, not {temperature}"),
        (top_k < 0, f"top_k must be 0 (all tokens) or more, not {top_k}"),
        (not 0 <= top_p <= 1, f"top_p must be between 0 and 1, not {top_p}"),
        (repetition_penalty <= 0, f"repetition_penalty must be above 0, not {repetition_penalty}"),
    ):
        if wrong:
            raise ModelError(message)
    device = model.model.embed_tokens.weight.device
    input_ids, start = input_ids.to(device), None
    if prompt_lengths is not None:
        prompt_lengths = torch.as_tensor(prompt_lengths, device=device)
        if prompt_lengths.shape != shape[:1] or prompt_lengths.min() < 1 or prompt_lengths.max() > shape[1]:
            raise ModelError(f"prompt_lengths must be one length per row, each from 1 to {shape[1]}")
        start = shape[1] - prompt_lengths
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    # Random numbers come from the CPU, so that a seed draws the same ones on every device.
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    # The loop is another function: a function with `yield` runs only when its first result is asked for,
    # and a wrong argument should raise at once.
    return _decode(model, input_ids, max_new_tokens, temperature, top_k, top_p, generator, start, eos,
                   repetition_penalty)


@torch.no_grad()
def _decode(model, input_ids, max_new_tokens, temperature, top_k, top_p, generator, start, eos,
            repetition_penalty):
    batch_size, length = input_ids.shape
    dtype = model.model.norm.weight.dtype
    cache = KVCache(model.config, batch_size, length + max_new_tokens, input_ids.device, dtype, start)
    ended = torch.zeros(batch_size, dtype=torch.bool, device=input_ids.device)
    eos_ids = torch.tensor(eos, dtype=torch.long, device=input_ids.device)
    seen = None
    if repetition_penalty != 1.0:
        seen = torch.zeros(batch_size, model.config.vocab_size, dtype=torch.bool, device=input_ids.device)
        for row in range(batch_size):
            first = 0 if start is None else start[row]  # pads have not occurred
            seen[row, input_ids[row, first:]] = True

    one_token = faster_step(model, batch_size)
    new = input_ids  # the whole prompt in one pass, then one token at a time
    for step in range(max_new_tokens):
        if cache.length and one_token:
            logits = one_token(new[:, 0], cache)  # (B, V)
        else:
            output = model(new, cache=cache)
            # Only the last position predicts something new. (output.logits is computed when it is read.)
            output.hidden = output.hidden[:, -1:]
            logits = output.logits[:, 0].float()  # (B, V)
        if seen is not None:
            logits = penalize(logits, seen, repetition_penalty)
        highest = logits.amax()  # of all rows; NaN if any logit is NaN
        numbers = torch.rand(batch_size, generator=generator).to(logits.device) if temperature else None
        token = choose_token(logits, temperature, top_k, top_p, numbers)  # (B,)
        if eos:
            token = torch.where(ended, eos_ids[0], token)
            ended |= torch.isin(token, eos_ids)
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        is_last = step == max_new_tokens - 1 or bool(eos and ended.all())
        # To read a value is to wait for the GPU. With eos, `ended` was read just now, so one more value costs
        # nothing. Without eos the last step is early enough: the cache keeps a NaN to the end.
        if (eos or step == 0 or is_last) and not math.isfinite(highest.item()):
            raise RunError(f"token {step + 1} of the answer: {why_not_finite(model)}")
        yield token
        if is_last:
            return
        new = token[:, None]  # (B, 1)


def faster_step(model: CausalLM, rows: int):
    """A faster forward pass for one token in each row (model/one_token.py). None if none fits."""
    return model.one_token if model.one_token and model.one_token.get_ready(rows) else None


def why_not_finite(model: CausalLM) -> str:
    """One line about a model that computes NaN or infinity, and what to do."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.isfinite().all():
            return f"the weight {name} holds numbers that are not finite: take an earlier checkpoint"
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    advice = "use weights in float32 (--dtype float32)" if dtype != "float32" else "its weights are too large"
    return f"the model's numbers are not finite in {dtype}, though its weights are: {advice}"


def choose_token(logits, temperature: float, top_k: int, top_p: float, numbers=None) -> torch.Tensor:
    """logits (B, V) -> token ids (B,): the likeliest at temperature 0, else what `numbers` (B,) draw."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, tokens = likely_tokens(logits, temperature, top_k, top_p)
    return tokens.gather(1, draw(probabilities, numbers)[:, None]).squeeze(1)


def draw(probabilities, numbers) -> torch.Tensor:
    """probabilities (B, N) -> places in it (B,), drawn by numbers (B,), which are uniform in [0, 1):

        probabilities   0.5   0.3   0.2
        cumulated       0.5   0.8   1.0        the number 0.6 draws the second place

    Probabilities that do not add up to 1 are taken as shares of their sum.
    """
    cumulated = probabilities.cumsum(dim=-1)
    # Rounding must not lead beyond the last place that has a probability.
    numbers = numbers.clamp(max=1 - 2**-20)[:, None] * cumulated[:, -1:]
    place = torch.searchsorted(cumulated, numbers, right=True).squeeze(1)
    return place.clamp(max=probabilities.size(-1) - 1)  # where the numbers are NaN


def penalize(logits, seen, penalty: float):
    """Divides positive logits (B, V) by the penalty, and multiplies negative ones, where `seen` is True.

    As in Keskar et al. 2019 (arXiv:1909.05858) and in the library transformers, it does not matter how
    often a token has occurred.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def likely_tokens(logits, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    """The tokens that may be drawn, by temperature, then top-k, then top-p, as in transformers.

    logits (B, V) -> probabilities (B, N), and tokens (B, N) that have them. Tokens that are ruled out have
    the probability 0, or are left out. The others do not get their share: the sum may be below 1.

    top-k keeps the k likeliest tokens, and all that tie with the last of them. top-p ("nucleus", Holtzman et
    al. 2019, arXiv:1904.09751) keeps the likeliest tokens until together they have at least probability p:
        probability of a token                    0.5   0.3   0.2
        sum over all likelier tokens              0.0   0.5   0.8
        kept if this sum is below p = 0.7         yes   yes   no
    """
    logits, size = logits / temperature, logits.size(-1)
    if 0 < top_k < size:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p == 1.0:
        return probabilities, torch.arange(size, device=logits.device).expand_as(probabilities)
    # On a CPU a sort takes longer than a step of a small model, and a few tokens mostly make up p. All are
    # sorted if they do not, or if the last token kept ties with one ruled out: then the lower id is kept.
    for count in (size,) if logits.is_cuda else (min(LIKELIEST, size), size):
        likeliest, tokens = (probabilities.topk(count, dim=-1) if count < size else
                             probabilities.sort(dim=-1, descending=True, stable=True))
        sums = likeliest.cumsum(dim=-1) - likeliest  # over all likelier tokens
        ruled_out = sums >= (top_p or 1e-9)  # the first sum is 0: the likeliest always stays
        least = likeliest.masked_fill(ruled_out, torch.inf).amin(dim=-1, keepdim=True)  # of those kept
        if ruled_out[:, -1].all() and (ruled_out == (likeliest < least)).all():
            break
    # Rounding decides the order of nearly equal probabilities. What is drawn must not depend on that.
    tokens, order = tokens.sort(dim=-1)
    return likeliest.masked_fill(ruled_out, 0.0).gather(1, order), tokens
