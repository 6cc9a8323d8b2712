"""A prompt that begins like a text which has ended does not compute that beginning again. A reader may skip
this file.

A chat sends its whole history with each question, and most of it is the prompt and the answer of the question
before. Keys and values of a token depend on the tokens before it, and on nothing after it. So the keys and
values of a common beginning are the same, and only the rest of a prompt must go through the model:

    a text that ended:   [user] Who are you? [assistant] I am Seedling. [end]
    the next prompt:     [user] Who are you? [assistant] I am Seedling. [end] [user] And how old? [assistant]
                         copied                                               computed
"""

from dataclasses import dataclass

import torch

from model.generate import KVCache

SHORTEST = 16  # tokens that must be equal; fewer are computed as fast as they are found


@dataclass(eq=False)
class Text:
    """The tokens of a text, and their keys and values (L layers, K heads, T, D)."""

    adapter: str
    tokens: list[int]
    k: torch.Tensor
    v: torch.Tensor


class PrefixCache:
    """The last texts that ended, at most so many, and at most so many tokens of all of them.

    adapter: names the weights in use. Another adapter computes other keys and values from the same tokens.
    """

    def __init__(self, max_texts: int, max_tokens: int):
        self.max_texts, self.max_tokens = max_texts, max_tokens
        self.texts: list[Text] = []  # the one that was used last is the last one

    def add(self, adapter: str, tokens: list[int], k: torch.Tensor, v: torch.Tensor) -> None:
        """Copies k, v (L, K, T, D) of these tokens. What was not used for the longest time makes room."""
        if not SHORTEST <= len(tokens) <= self.max_tokens:
            return
        # A chat that has gone on takes the place of its beginning.
        self.texts = [text for text in self.texts
                      if text.adapter != adapter or tokens[:len(text.tokens)] != text.tokens]
        self.texts.append(Text(adapter, tokens, k.clone(), v.clone()))
        while len(self.texts) > self.max_texts or self.num_tokens() > self.max_tokens:
            self.texts.pop(0)

    def num_tokens(self) -> int:
        return sum(len(text.tokens) for text in self.texts)

    def fill(self, cache: KVCache, adapters: list[str], prompts: list[list[int]]) -> list[int]:
        """Copies what is known of these prompts into an empty cache, where they end at the same place.

        Sets cache.length to the number of places that need no computing. They are the same places for all
        prompts, and at least the last token of each is computed. Returns how many tokens of each prompt were
        known.
        """
        longest = max(map(len, prompts))
        found = [self.find(adapter, prompt) for adapter, prompt in zip(adapters, prompts, strict=True)]
        cache.length = min(longest - len(prompt) + count
                           for prompt, (_, count) in zip(prompts, found, strict=True))
        copied = []
        for row, (prompt, (text, _)) in enumerate(zip(prompts, found, strict=True)):
            begin = longest - len(prompt)
            count = max(0, cache.length - begin)
            if count:
                cache.k[:, row, :, begin:cache.length] = text.k[:, :, :count]
                cache.v[:, row, :, begin:cache.length] = text.v[:, :, :count]
            copied.append(count)
        return copied

    def find(self, adapter: str, prompt: list[int]) -> tuple[Text | None, int]:
        """The text that begins like the prompt for longest, and for how many tokens: not for all of it."""
        best, length = None, 0
        for text in self.texts:
            if text.adapter == adapter and text.tokens[:SHORTEST] == prompt[:SHORTEST]:
                count = common_length(text.tokens, prompt)
                if count > length:
                    best, length = text, count
        if best:
            self.texts.remove(best)
            self.texts.append(best)
        return best, min(length, len(prompt) - 1)


def common_length(one: list[int], other: list[int]) -> int:
    """How many tokens at the beginning of two texts are the same."""
    differs = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))
