"""Answers that must have a form: JSON of a schema, or a tool call. A reader may skip this file.

    grammars = Grammars(tokenizer, vocab_size=6400, end_tokens=[2])
    row.constraint = grammars.json({"type": "object", "properties": {"age": {"type": "integer"}}})

Before each token llguidance (https://github.com/guidance-ai/llguidance) says which tokens can still lead to a
text of that form, and all others get probability 0. So even an untrained model writes valid JSON, unless it
is cut off.
"""

import importlib.util
import json
import re

import numpy as np
import torch

from common.errors import DataError, UsageError

# As training writes JSON (dataset/chat.py): ", " and ": ", and no other white space.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MARKS = ("<tool_call>", "</tool_call>")


class Grammars:
    """Makes the constraints for one tokenizer. Raises UsageError where llguidance is not installed."""

    def __init__(self, tokenizer, vocab_size: int, end_tokens: list[int]):
        if importlib.util.find_spec("llguidance") is None:
            raise UsageError("the package llguidance is missing: pip install -r requirements-serve.txt")
        from llguidance import hf

        self.vocab_size = vocab_size
        self.tokenizer = hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=end_tokens)
        # A mark is one token where the tokenizer has one for it, and its letters where it has none.
        added = tokenizer.get_added_vocab()
        self.begin, self.end = (mark if mark in added else json.dumps(mark) for mark in MARKS)

    def json(self, schema: dict) -> "Constraint":
        """Raises DataError for a schema that can't be understood."""
        from llguidance import LLMatcher

        return self._constraint(LLMatcher.grammar_from_json_schema, schema, overrides=JSON_STYLE)

    def calls(self, tools: list[dict], several: bool = True) -> "Constraint":
        """Calls of these tools (OpenAI's {"name", "parameters"}), one or, with `several`, more."""
        from llguidance import LLMatcher

        forms = []
        for tool in tools:
            arguments = tool.get("parameters") or {"type": "object"}
            if "properties" in arguments:  # no others, unless it says so
                arguments = {"additionalProperties": False} | arguments
            form = {"type": "object", "additionalProperties": False, "required": ["name", "arguments"],
                    "properties": {"name": {"const": tool["name"]}, "arguments": arguments}}
            forms.append(f"%json {json.dumps(form | {'x-guidance': JSON_STYLE})}")
        call = f'{self.begin} "\\n" arguments "\\n" {self.end}'
        more = f'("\\n" {call})*' if several else ""
        rules = "\n".join(f"arguments_{place}: {form}" for place, form in enumerate(forms))
        choice = " | ".join(f"arguments_{place}" for place in range(len(forms)))
        return self._constraint(LLMatcher.grammar_from_lark,
                                f"start: {call} {more}\narguments: {choice}\n{rules}\n")

    def _constraint(self, make, *arguments, **options) -> "Constraint":
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self.tokenizer, make(*arguments, **options))
        except ValueError as error:
            raise DataError(in_one_line(str(error))) from None
        if matcher.is_error():
            raise DataError(in_one_line(matcher.get_error()))
        return Constraint(matcher, self.vocab_size)


class Constraint:
    """Which tokens may come next in one answer: model.batch.Constraint by an LLMatcher."""

    def __init__(self, matcher, vocab_size: int):
        self.matcher, self.vocab_size = matcher, vocab_size

    def copy(self) -> "Constraint":
        """The same, at its present place, for another answer."""
        return Constraint(self.matcher.deep_copy(), self.vocab_size)

    def allowed(self) -> torch.Tensor:
        bits = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), np.uint8), bitorder="little")
        return torch.from_numpy(bits[:self.vocab_size].astype(bool))

    def accept(self, token: int) -> None:
        self.matcher.consume_token(token)

    @property
    def error(self) -> str | None:
        """Why nothing more can be said in this form, where the matcher gave up."""
        if not self.matcher.is_error():
            return None
        return f"the form that was asked for is too complex: {in_one_line(self.matcher.get_error())}"


def in_one_line(message: str) -> str:
    """A message of llguidance without the grammar that it repeats, and without its place there."""
    message = re.split(r"\n +\d+ \| ", message)[0]
    return " ".join(re.sub(r"^at \d+\(\d+\): ", "", message).split())[:500]
