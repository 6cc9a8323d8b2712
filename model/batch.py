"""Texts that grow together: rows join and leave between two tokens (continuous batching). A reader may skip
this file.

    batch = Batch(model, adapters, max_rows=32, max_tokens=32 * 512)
    batch.add([Row(prompt, max_new_tokens=64, end_tokens=(2,), seed=1)])  # its first token
    while batch.rows:
        batch.step()  # one more token for each row; a row that has its last token leaves

A row gets the tokens that `generate` (model/generate.py) gives to it alone with the same seed. The rows
beside it change nothing but float rounding: each has its own settings, adapter and random numbers.

All rows end at the same place of the cache, as prompts do that are padded on the left. Positions in a text
count from the row's own start. So keys and values of a prompt, computed apart from the others, are valid
wherever they are copied to:

    row 0    . . . a b c d e f |
    row 1    . . . . . . g h i |        <- end: here the next token of each row is written
    row 2    . . . . j k l m n |        a new row is copied so that it ends here, too
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from model.adapters import Adapters
from model.generate import KVCache, choose_token, faster_step, penalize, why_not_finite
from model.prefix_cache import PrefixCache
from model.transformer import CausalLM

SMALLEST_LENGTH = 256  # tokens that a row of the cache has room for, at least
PROMPT_TOKENS_AT_ONCE = 2048  # prompts that join together; more would let the others wait
TOKENS_OF_A_PART = 512  # of prompts, that go through the model at once
LOGPROB_ROWS = 256  # prompt tokens that go through the output head at once


class Constraint(Protocol):
    """What a row may say, token by token; inference/grammar.py makes them of JSON schemas."""

    def allowed(self) -> torch.Tensor:
        """The tokens that may come next: bool (V,)."""

    def accept(self, token: int) -> None:
        """Tells that this token came next."""

    @property
    def error(self) -> str | None:
        """Why the constraint can't be kept any further."""


class Choice(NamedTuple):
    """A token, its log-probability, and the likeliest tokens of its place with theirs, in order.

    Probabilities are those of the model itself, before temperature, penalties and constraints. logprob is
    None for the first token of a text, which nothing predicts.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Row:
    """A prompt, how it is to be continued, and what came of it.

    The settings are those of `generate`. presence_penalty, frequency_penalty: subtracted from the logits of
    tokens that the answer has already, once, and for each time. logit_bias: added to the logits of tokens.
    adapter: as Adapters.use takes it. top_logprobs: None for no probabilities at all, n for those of the
    tokens and of the n likeliest. prompt_logprobs: those of the prompt's tokens, too.
    """

    prompt: list[int]
    max_new_tokens: int
    end_tokens: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    adapter: str | dict[str, float] | None = None
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    # What came of it
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Choice] = field(default_factory=list)
    logprobs_of_prompt: list[Choice] = field(default_factory=list)
    num_cached: int = 0  # tokens of the prompt whose keys and values were known already
    finish: str | None = None  # "stop": an end token; "length": max_new_tokens; "error": see error
    error: str | None = None
    numbers: Iterator[float] | None = None  # random ones, from the seed; the batch makes them

    @property
    def room(self) -> int:
        """How many tokens of the cache the row needs at its end. The last token is never stored."""
        return len(self.prompt) + max(0, self.max_new_tokens - 1)

    @property
    def changes_logits(self) -> bool:
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
                    or self.logit_bias or self.constraint)


class Batch:
    """Rows of one model. rows: those that grow now. max_tokens: how many the cache holds, of all rows.

    max_kept: how many tokens of rows that have ended are kept for prompts that begin like them.
    """

    def __init__(self, model: CausalLM, adapters: Adapters, max_rows: int, max_tokens: int, max_kept=0):
        self.prefixes = PrefixCache(max_rows, max_kept)
        self.model, self.adapters, self.max_rows, self.max_tokens = model, adapters, max_rows, max_tokens
        config, weight = model.config, model.model.norm.weight
        self.device, self.rows, self.end = weight.device, [], 0
        # One block of memory for all layers, and for rows of any length: `_arrange` divides it up.
        size = config.num_key_value_heads * config.head_dim * max_tokens
        self.memory = [torch.zeros(config.num_hidden_layers, size, dtype=weight.dtype, device=self.device)
                       for _ in "kv"]
        self.start = torch.zeros(max_rows, dtype=torch.long, device=self.device)
        self.next = torch.zeros(max_rows, dtype=torch.long, device=self.device)  # the last token of each row
        self.in_use = None  # the adapter of each row, as the layers have them now
        self._arrange(self._length_for(1))

    # --- rows come and go ---------------------------------------------------------------------------------

    def fits(self, rows: list[Row]) -> bool:
        """Whether these rows can join those that are there."""
        if not self.adapters.fit_together([row.adapter for row in [*rows, *self.rows]]):
            return False
        # All are padded to the longest of them.
        num_prompts = len(set(map(prompt_key, rows)))
        if num_prompts > 1 and num_prompts * max(len(row.prompt) for row in rows) > PROMPT_TOKENS_AT_ONCE:
            return False
        length = self._length_for(max(row.room for row in [*rows, *self.rows]))
        return len(self.rows) + len(rows) <= min(self.max_rows, self.max_tokens // length)

    def add(self, rows: list[Row]) -> list[Row]:
        """Their prompts go through the model together, and each gets its first token. Returns the rows.

        Ask `fits` first. A row of a single token leaves again at once. A prompt that several rows share, one
        list, goes through the model once.
        """
        for _ in self.read(rows):
            pass
        return rows

    @torch.inference_mode()
    def read(self, rows: list[Row]) -> Iterator[None]:
        """The same as `add`, in parts.

        Between two parts of a long prompt other rows may grow by `step`, or leave. None may join meanwhile.
        """
        for row in rows:
            row.numbers = random_numbers(row.seed)
        by_key = {prompt_key(row): row for row in rows}
        prompts = list(by_key.values())  # a row of each prompt
        places = [list(by_key).index(prompt_key(row)) for row in rows]  # of each row: the place of its prompt
        lengths = torch.tensor([len(row.prompt) for row in prompts], device=self.device)
        longest = int(lengths.max())
        ids = torch.tensor([[0] * (longest - len(row.prompt)) + row.prompt for row in prompts],
                           device=self.device)
        is_padded = bool((lengths < longest).any())
        dtype = self.model.model.norm.weight.dtype
        own = KVCache(self.model.config, len(prompts), longest, self.device, dtype,
                      longest - lengths if is_padded else None)
        adapters, hidden = [row.adapter for row in prompts], []
        if not any(row.prompt_logprobs for row in prompts):  # these need the output at every token
            known = self.prefixes.fill(own, list(map(str, adapters)), [row.prompt for row in prompts])
            for row, place in zip(rows, places, strict=True):
                row.num_cached = known[place]
        width = max(1, TOKENS_OF_A_PART // len(prompts))
        for part in ids[:, own.length:].split(width, dim=1):
            if hidden:
                yield
            self._use(adapters)  # the rows that have grown meanwhile may have used others
            output = self.model(part, cache=own)
            hidden.append(output.hidden)
        if any(row.prompt_logprobs for row in prompts):
            output.hidden = torch.cat(hidden, dim=1)
            self._read_prompts(prompts, output)
        for row, place in zip(rows, places, strict=True):
            row.logprobs_of_prompt = prompts[place].logprobs_of_prompt
        output.hidden = output.hidden[places, -1:]
        tokens = self._choose(output.logits[:, 0].float(), rows)

        self._make_room(max(row.room for row in rows), len(rows), longest)
        first, end = len(self.rows), self.end
        for stored, new in zip(self.views, (own.k, own.v), strict=True):
            stored[:, first:first + len(rows), :, end - longest:end] = new if new.size(1) == len(rows) \
                else new[:, places]
        self.start[first:first + len(rows)] = end - lengths[places]
        self.next[first:first + len(rows)] = tokens
        self.rows += rows
        self._let_go()

    def remove(self, row: Row) -> None:
        """Takes a row out. The last row moves to its place."""
        place, last = self.rows.index(row), len(self.rows) - 1
        if row.finish != "error":
            begin, count = int(self.start[place]), len(row.prompt) + max(0, len(row.tokens) - 1)
            self.prefixes.add(str(row.adapter), (row.prompt + row.tokens)[:count],
                              *(stored[:, place, :, begin:begin + count] for stored in self.views))
        if place != last:
            for stored in self.views:
                stored[:, place] = stored[:, last]
            self.start[place], self.next[place] = self.start[last], self.next[last]
            self.rows[place] = self.rows[last]
        self.rows.pop()

    def _let_go(self) -> None:
        for row in [row for row in self.rows if row.finish]:
            self.remove(row)

    # --- the cache ----------------------------------------------------------------------------------------

    def _length_for(self, room: int) -> int:
        """How long the rows of the cache must be: more than `room`, so that they are seldom moved."""
        length = SMALLEST_LENGTH
        while length < room * 5 // 4:
            length *= 2
        return max(room, min(length, self.max_tokens))

    def _arrange(self, length: int) -> None:
        """Divides the memory into rows of `length` tokens. What the rows hold is moved along."""
        config, begin = self.model.config, self._first()
        count = min(self.max_rows, self.max_tokens // length)
        shape = (config.num_hidden_layers, count, config.num_key_value_heads, length, config.head_dim)
        kept = [stored[:, :len(self.rows), :, begin:self.end].clone() for stored in self.views] \
            if self.rows else []
        size = count * shape[2] * length * shape[4]
        self.views = [memory[:, :size].view(shape) for memory in self.memory]
        for stored, old in zip(self.views, kept, strict=False):
            stored[:, :len(self.rows), :, :old.size(3)] = old
        self.start -= begin
        self.end -= begin
        self.length, self.count = length, count
        self.cache = KVCache(config, 1, length, self.device)  # for its tables of rotations
        self.cache.k = self.cache.v = None

    def _first(self) -> int:
        """The first place of the cache that a row has in use."""
        return int(self.start[:len(self.rows)].min()) if self.rows else self.end

    def _make_room(self, room: int, more_rows: int, longest: int) -> None:
        """Rows of `room` tokens must fit, and the next one must find `longest` tokens before the end."""
        if room > self.length or len(self.rows) + more_rows > self.count:
            self._arrange(self._length_for(max([room, *(row.room for row in self.rows)])))
        if not self.rows:
            self.end = longest
        elif longest > self.end:
            self._move(longest - self.end)

    def _move(self, by: int) -> None:
        """Moves what the rows hold to the right, or to the left where `by` is negative."""
        begin, count = self._first(), len(self.rows)
        for stored in self.views:
            stored[:, :count, :, begin + by:self.end + by] = stored[:, :count, :, begin:self.end].clone()
        self.start += by
        self.end += by

    # --- one more token -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """One more token for each row. Returns all rows, also those that have left with it."""
        rows, count = list(self.rows), len(self.rows)
        begin = self._first()
        if self.end == self.length:
            self._move(-begin)
            begin = 0
        one_token = self._use([row.adapter for row in rows])
        cache = copy.copy(self.cache)  # the part of the memory that the rows have in use
        cache.k, cache.v = (stored[:, :count, :, begin:] for stored in self.views)
        cache.start = self.start[:count] - begin
        if not cache.start.any():
            cache.start = None
        cache.length, cache.max_length = self.end - begin, self.length - begin
        new = self.next[:count]
        if one_token:
            logits = one_token(new, cache)  # (B, V)
        else:
            logits = self.model(new[:, None], cache=cache).logits[:, 0].float()
        self.end += 1
        self.next[:count] = self._choose(logits, rows)
        self._let_go()
        return rows

    def _use(self, names: list):
        """Puts the adapter of each row in use. Returns the faster forward pass for it, or None."""
        if names != self.in_use:
            if all(name == names[0] for name in names):
                if not self.in_use or any(name != names[0] for name in self.in_use):
                    self.adapters.use(names[0])
            else:
                self.adapters.use_rows(names)
            self.one_token = faster_step(self.model, len(names))
            self.in_use = names
        return self.one_token

    def _choose(self, logits, rows: list[Row]) -> torch.Tensor:
        """logits (B, V) -> the next token of each row (B,), noted in the row."""
        is_finite = logits.amax(dim=-1).isfinite().tolist()
        told = [place for place, row in enumerate(rows) if row.top_logprobs is not None]
        if told:
            log_probs = logits[told].log_softmax(dim=-1)
        if any(row.changes_logits for row in rows):
            logits = logits.clone()
            for place, row in enumerate(rows):
                if row.changes_logits:
                    logits[place] = change(logits[place], row)
        groups = {}  # rows with equal settings choose together
        for place, row in enumerate(rows):
            groups.setdefault((row.temperature, row.top_k, row.top_p), []).append(place)
        tokens = torch.empty(len(rows), dtype=torch.long, device=self.device)
        for settings, places in groups.items():
            scores = logits if len(groups) == 1 else logits[places]
            numbers = [next(rows[place].numbers) for place in places]
            tokens[places] = choose_token(scores, *settings, torch.tensor(numbers, device=self.device))
        for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if not is_finite[place]:
                row.finish, row.error = "error", why_not_finite(self.model)
            elif row.max_new_tokens == 0:
                row.finish = "length"
            else:
                note(row, token)
        if told:
            self._note_logprobs([rows[place] for place in told], log_probs)
        return tokens

    def _note_logprobs(self, rows: list[Row], log_probs) -> None:
        most = max(row.top_logprobs for row in rows)
        top = log_probs.topk(most, dim=-1)
        values, ids = top.values.tolist(), top.indices.tolist()
        for place, row in enumerate(rows):
            if len(row.logprobs) < len(row.tokens):
                pairs = list(zip(ids[place], values[place], strict=True))[:row.top_logprobs]
                row.logprobs.append(Choice(row.tokens[-1], log_probs[place, row.tokens[-1]].item(), pairs))

    def _read_prompts(self, rows: list[Row], output) -> None:
        """Notes the log-probabilities of prompts. output: of the forward pass over all of them, (B, T, C)."""
        for place, row in enumerate(rows):
            if not row.prompt_logprobs:
                continue
            row.logprobs_of_prompt.append(Choice(row.prompt[0], None, []))
            hidden, most = output.hidden[place, -len(row.prompt):], row.top_logprobs or 0
            for begin in range(0, len(row.prompt) - 1, LOGPROB_ROWS):
                targets = row.prompt[begin + 1:begin + 1 + LOGPROB_ROWS]
                part = type(output)(hidden[begin:begin + len(targets)], output.head)
                log_probs = part.logits.float().log_softmax(dim=-1)  # (tokens, V)
                top = log_probs.topk(most, dim=-1)
                found = zip(targets, log_probs[range(len(targets)), targets].tolist(), top.indices.tolist(),
                            top.values.tolist(), strict=True)
                row.logprobs_of_prompt += [Choice(token, logprob, list(zip(ids, values, strict=True)))
                                           for token, logprob, ids, values in found]


def prompt_key(row: Row) -> tuple:
    """Rows with the same key can share one pass over their prompt."""
    return id(row.prompt), str(row.adapter), row.top_logprobs, row.prompt_logprobs


def random_numbers(seed: int | None) -> Iterator[float]:
    """Those that `generate` draws for one row with this seed, one after the other, without an end."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    while True:  # 64 in one call are the numbers that 64 calls would give, in less time
        yield from torch.rand(64, generator=generator).tolist()


def note(row: Row, token: int) -> None:
    """The row has one more token. Was it the last one?"""
    row.tokens.append(token)
    if row.constraint:
        row.constraint.accept(token)
        if row.constraint.error:
            row.finish, row.error = "error", row.constraint.error
            return
    if token in row.end_tokens:
        row.finish = "stop"
    elif len(row.tokens) >= row.max_new_tokens:
        row.finish = "length"


def change(logits, row: Row) -> torch.Tensor:
    """The logits (V,) of a row after its penalties, biases and constraint."""
    if row.repetition_penalty != 1:
        seen = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        seen[row.prompt + row.tokens] = True
        logits = penalize(logits, seen, row.repetition_penalty)
    if row.presence_penalty or row.frequency_penalty:
        counts = torch.bincount(torch.tensor(row.tokens, dtype=torch.long), minlength=len(logits))
        counts = counts.to(logits.device)
        logits = logits - row.frequency_penalty * counts - row.presence_penalty * (counts > 0)
    if row.logit_bias:
        tokens, added = map(torch.tensor, zip(*row.logit_bias.items(), strict=True))
        logits = logits.index_add(0, tokens.to(logits.device), added.float().to(logits.device))
    if row.constraint:
        logits = logits.masked_fill(~row.constraint.allowed().to(logits.device), -torch.inf)
    return logits
