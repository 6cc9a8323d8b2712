"""Prompts of models from elsewhere: their own chat template, and a loss mask. A reader may skip this file.

A template (jinja, in tokenizer_config.json) writes a conversation as one string, which is what transformers
encodes, and so do we. To know who said what in this string, we have the template write the conversation once
more, with marks around everything that somebody said:

    with words    <s>[INST] Hi [/INST] Hello!</s>
    with marks    <s>[INST] {0Hi0} [/INST] {1Hello!1}</s>
    supervised                        ^^^^^^^^^^^   from the end of the prompt to the control token that ends
                                                    the turn

The prompt of an answer is what the template writes where a model is to go on (add_generation_prompt). What
follows it is the assistant's: its words, and the signs that the template writes around thinking and calls.
Words that hold a control token's text would become that control token in the string, so such a conversation
is refused. So is any other of which the parts can't be told apart.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from common.errors import DataError
from common.files import one_line
from dataset.encoder import Piece, PlainEncoder

READ_AS_CONTROL = "this model would take it for a control token"
MODEL_WRITES = re.compile(r"(</?think>|</?tool_call>)")  # control tokens that an assistant's text may contain
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "go", "arguments": {"to": "a"}}]}
RESULT = {"role": "tool", "content": "ok"}
THOUGHT = {**ANSWER, "reasoning_content": "Hm"}
TOOL_USE = [USER, CALL, RESULT, ANSWER]
TOOLS = [{"type": "function", "function": {"name": "go", "description": "Go.", "parameters": {
    "type": "object", "properties": {"to": {"type": "string", "description": "Where"}}}}}]  # fmt: skip
WAYS_OF_CALLS = list(product((False, True), repeat=3))


@dataclass
class Leaf:
    """Something said: the content, the thinking, or the name of a call, of a message (by its number)."""

    message: int
    kind: str  # content, reasoning_content, name
    words: str  # between its marks
    places: list[int]  # of its marks in the text


class ForeignTemplate:
    """The chat template of a tokenizer. Raises DataError for a conversation of which it can't tell the mask.

    writes_words_like_us: whether it writes conversations of words alone as dataset/chat.py does.
    """

    def __init__(self, tokenizer, encoder: PlainEncoder, writes_words_like_us: bool):
        self.tokenizer, self.writes_words_like_us = tokenizer, writes_words_like_us
        normalizer = tokenizer.backend_tokenizer.normalizer  # it may turn "＜" into "<", for example
        self.normalize = normalizer.normalize_str if normalizer else str
        self.tokens = {self.normalize(token): token for token in encoder.control}
        self.tokens |= {token: token for token in encoder.control}
        # Where two tokens fit, a tokenizer takes the longer one, so the longer one stands first here.
        control = sorted(self.tokens, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, control)) or r"(?!)")
        self.prompts: dict[tuple[bool, bool], str] = {}  # what `_prompt` found
        self.way = None  # what `way_of_calls` found

    def pieces(self, messages: list[dict], tools, add_generation_prompt: bool, thinking: bool) -> list[Piece]:
        """A conversation as pieces whose texts together are what the template writes.

        thinking: whether the answer to come may begin with a thought, where the template has a switch for it.
        """
        self._check_words(messages, tools)
        thinking = thinking or any(thinks(message) for message in messages)
        text, leaves, control = self._layout(messages, tools, add_generation_prompt, thinking)
        self._check_all_is_there(messages, leaves)
        if tools and text == self._write(messages, None, add_generation_prompt, thinking):
            raise DataError("this model's chat template has no place for tools")
        spans = [self._answer(number, messages, text, leaves, control)
                 for number in sorted({leaf.message for leaf in leaves if leaf.places},
                                      key=lambda n: places_of(leaves, n)[0])
                 if messages[number]["role"] == "assistant"]  # fmt: skip
        return list(cut(text, control, [span for span in spans if span]))

    # --- writing ------------------------------------------------------------------------------------------

    def _write(self, messages: list[dict], tools, add_generation_prompt: bool, thinking: bool) -> str:
        # Models that think unless they are told not to are told so: most data holds no thoughts. Training
        # and use then have the same prompt.
        options = {} if thinking else {"enable_thinking": False}
        try:
            return self.tokenizer.apply_chat_template(
                with_standard_calls(messages, *self.way_of_calls(messages)), tools=tools, tokenize=False,
                add_generation_prompt=add_generation_prompt, **options)
        except Exception as error:  # errors of jinja, and of the expressions in the template
            raise DataError(f"this model's chat template refuses it: {one_line(error)}") from None

    def way_of_calls(self, messages: list[dict]) -> tuple[bool, bool, bool]:
        """How the messages should hold tool calls: templates differ. See with_standard_calls."""
        if self.way is None and any(message.get("tool_calls") for message in messages):
            for self.way in WAYS_OF_CALLS:  # The first that works stays. `_write` reads self.way.
                with suppress(DataError):
                    self._check_all_is_there(TOOL_USE, self._layout(TOOL_USE, TOOLS, False, False)[1])
                    break
            else:
                self.way = WAYS_OF_CALLS[0]
        return self.way or WAYS_OF_CALLS[0]

    def _layout(self, messages, tools, add_generation_prompt, thinking):
        """(text, leaves, control): what the template writes, and where in it things are.

        control: (start, end, token) of the control tokens in the text.
        """
        text = self._write(messages, tools, add_generation_prompt, thinking)
        for blanks_first in (True, False):
            marked, leaves, marks = with_marks(messages, blanks_first)
            parts = marks.split(self._write(marked, tools, add_generation_prompt, thinking))
            if "".join(parts[::3]) == text:
                break
        else:
            raise DataError("this model's chat template rewrites what a message says")
        control, written = [], 0
        for part, number in zip(parts[::3], [*parts[2::3], None], strict=True):
            control += [(written + found.start(), written + found.end(), self.tokens[found[0]])
                        for found in self.control.finditer(part)]
            written += len(part)
            if number is not None:
                leaves[int(number)].places.append(written)
        for leaf in leaves:
            as_json = [json.dumps(leaf.words, ensure_ascii=escaped)[1:-1] for escaped in (True, False)]
            # A template may write a tool's result as JSON.
            if len(leaf.places) == 2 and text[slice(*leaf.places)] not in (leaf.words, *as_json):
                raise DataError("this model's chat template rewrites what a message says")
        known = {(start, end) for start, end, _ in control}
        for found in self.control.finditer(text):
            if found.span() not in known:  # half of it in a message, half in the text beside it
                raise DataError(f"{found[0]!r} at the edge of a message: {READ_AS_CONTROL}")
        return text, leaves, control

    # --- what must hold -----------------------------------------------------------------------------------

    def _check_words(self, messages: list[dict], tools) -> None:
        for message in messages:
            said = [message["content"], message.get("reasoning_content") or ""]
            said += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or []]
            if message["role"] == "assistant":  # it may write some control tokens
                said = [MODEL_WRITES.sub("\n", text) for text in said]
            self._check(said, "a message")
        self._check([json.dumps(tool, ensure_ascii=False) for tool in tools or []], "the tools")

    def _check(self, texts: list[str], where: str) -> None:
        for text in texts:
            found = self.control.search(text) or self.control.search(self.normalize(text))
            if found:
                raise DataError(f"{found[0]!r} in {where}: {READ_AS_CONTROL}")

    def _check_all_is_there(self, messages: list[dict], leaves: list[Leaf]) -> None:
        """Raises DataError where the template leaves something out, or writes an answer twice."""
        for leaf in leaves:
            message = messages[leaf.message]
            # A thought at the beginning of the words vanishes together with the first mark of the words.
            without_thought = leaf.kind == "content" and thinks(message) and len(leaf.places) == 1
            if leaf.kind == "reasoning_content" or without_thought:
                # Thoughts about earlier questions are left out by some templates, as their models expect.
                is_old = any(later["role"] == "user" for later in messages[leaf.message:])
                is_left_out = without_thought or not leaf.places
                if is_left_out and not (is_old and self._shows_thoughts):
                    raise DataError("this model's chat template leaves out what the assistant thought")
            elif leaf.kind == "name" and not leaf.places:
                raise DataError("this model's chat template leaves out tool calls")
            elif message["role"] == "assistant" and not 1 <= len(leaf.places) <= 2:
                raise DataError("this model's chat template leaves out, or moves, what the assistant said")
            elif not leaf.places and message["content"].strip():
                raise DataError(f"this model's chat template leaves out a message of the {message['role']}")

    @cached_property
    def _shows_thoughts(self) -> bool:
        _, leaves, _ = self._layout([USER, THOUGHT], None, False, True)
        return all(leaf.places for leaf in leaves)

    # --- the assistant's part -----------------------------------------------------------------------------

    def _prompt(self, after_tool: bool, thinking: bool) -> str:
        """What the template writes from the last word of a question (or a tool's result) to an answer."""
        key = after_tool, thinking
        if key not in self.prompts:
            asked = [USER, CALL, RESULT] if after_tool else [USER]
            text, leaves, _ = self._layout(asked, None, True, thinking)
            prompt = text[max(places_of(leaves, len(asked) - 1)):]
            text, leaves, _ = self._layout([*asked, ANSWER], None, False, thinking)
            places = places_of(leaves, len(asked))
            others = [place for leaf in leaves for place in leaf.places if place < places[0]]
            before = text[max(others, default=0):places[0]]
            rest = before.removeprefix(prompt)
            if before.startswith(prompt) and rest.strip() and "think>" not in rest:
                prompt = before  # This template has no add_generation_prompt.
            self.prompts[key] = prompt
        return self.prompts[key]

    def _answer(self, number: int, messages, text: str, leaves, control) -> tuple[int, int] | None:
        """(start, end) of what the assistant writes in a message; None where it is not to be learnt."""
        places = places_of(leaves, number)
        others = [place for leaf in leaves if leaf.message != number for place in leaf.places]
        begin = max([place for place in others if place <= places[0]], default=0)
        end = min([place for place in others if place >= places[-1]], default=len(text))
        calls = [leaf for leaf in leaves if leaf.message == number and leaf.kind == "name"]
        ends = [found for found in control if places[-1] <= found[0] and found[1] <= end]
        if calls and places[-1] in calls[-1].places:  # the sign that ends a call may be a control token, too
            ends = [found for found in ends if found[2] == self._end_of_turn]
        elif ends and (text[places[-1]:ends[0][0]].strip() or ends[0][2] != self._end_of_turn):
            ends = []  # the control token belongs to the next message
        if not ends:
            raise DataError("this model's chat template has no control token that ends an answer")
        after_tool = number > 0 and messages[number - 1]["role"] == "tool"
        prompt = self._prompt(after_tool, thinks(messages[number]))
        found = end_of_prompt(text[begin:places[0]], prompt)
        start = places[0] if found is None else begin + found
        first = next(leaf for leaf in leaves if leaf.message == number and places[0] in leaf.places)
        if first.kind == "content" and not thinks(messages[number]):
            before = text[start:places[0]].strip()
            if before and "think>" not in before:  # The template writes no prompt, so only words are learnt
                start = places[0]
        elif found is None:
            raise DataError("this model's chat template writes a prompt that is not found in a conversation")
        return (start, ends[0][1]) if messages[number].get("trained", True) else None

    @cached_property
    def _end_of_turn(self) -> str | None:
        """The control token that ends an answer of words."""
        _, leaves, control = self._layout([USER, ANSWER], None, False, False)
        after = places_of(leaves, 1)[-1]
        return next((token for start, _, token in control if start >= after), None)


def thinks(message: dict) -> bool:
    """Whether a message begins with a thought, beside its content or at the beginning of it."""
    return bool(message.get("reasoning_content")) or (
        message["role"] == "assistant" and message["content"].lstrip().startswith("<think>"))


def places_of(leaves: list[Leaf], message: int) -> list[int]:
    """The places of all marks of a message, in order."""
    return sorted(place for leaf in leaves if leaf.message == message for place in leaf.places)


def with_standard_calls(messages: list[dict], no_content: bool, as_text: bool, with_ids: bool) -> list[dict]:
    """The messages as transformers documents them for templates, with tool calls as OpenAI writes them.

    no_content: beside a call no content is None, and not "". as_text: arguments are JSON text, for templates
    that put them into a string; else objects, for those that turn them into JSON. with_ids: calls and results
    have ids, of nine characters as Mistral demands.
    """
    result, count, open_calls = [], 0, []
    for message in messages:
        message = {key: value for key, value in message.items() if key != "trained"}
        if message["role"] == "tool" and with_ids and open_calls:
            message["tool_call_id"], message["name"] = open_calls.pop(0)
        calls = []
        for call in message.get("tool_calls") or []:
            function = dict(call.get("function", call))
            arguments = function.get("arguments", {})
            if as_text and not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            elif isinstance(arguments, str) and not as_text:
                arguments = json.loads(arguments)
            call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
            open_calls.append((f"call{count:05d}", function["name"]))
            calls.append(call | ({"id": f"call{count:05d}"} if with_ids else {}))
            count += 1
        if calls:
            message["tool_calls"] = calls
            message["content"] = message["content"] or (None if no_content else "")
        result.append(message)
    return result


def with_marks(messages: list[dict], blanks_first: bool) -> tuple[list[dict], list[Leaf], re.Pattern]:
    """The messages with marks around all that is said, what is said, and a pattern that finds the marks.

    The marks stand between the blanks and the words, since a template may trim blanks; in a text of nothing
    but blanks they stand after these, or before them. A mark is the number of a leaf between two characters
    of Unicode's private use area that occur nowhere in the messages.
    """
    everything = json.dumps(messages, ensure_ascii=False)
    unused = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in everything)
    border, leaves, marked = next(unused), [], []

    def mark(text: str, message: int, kind: str) -> str:
        words = text.strip()
        before = text[:len(text) - len(text.lstrip())] if words or blanks_first else ""
        after = text[len(before) + len(words):]
        # A template that knows thoughts takes them out of a content, from this sign on.
        opening = re.match(r"<think>\s*(?=\S)", words) if kind == "content" else None
        before += opening[0] if opening else ""
        sign = f"{border}{len(leaves)}{border}"
        words = words.removeprefix(opening[0] if opening else "")
        leaves.append(Leaf(message, kind, words, []))
        return before + sign + words + sign + after

    for number, message in enumerate(messages):
        message = dict(message)
        for kind in ("reasoning_content", "content"):
            if message.get(kind):
                message[kind] = mark(message[kind], number, kind)
        if message.get("tool_calls"):
            calls = [dict(call.get("function", call)) for call in message["tool_calls"]]
            message["tool_calls"] = [call | {"name": mark(call["name"], number, "name")} for call in calls]
        marked.append(message)
    return marked, leaves, re.compile(f"({border})(\\d+){border}")


def end_of_prompt(text: str, prompt: str) -> int | None:
    """Where in the text the prompt ends; None where it is not there.

    A template may leave out blanks, or the sign for a thought, at the end of the prompt: the answer of a
    conversation may have no thought.
    """
    for part in (prompt, prompt.rstrip(), prompt.split("<think>")[0], prompt.split("<think>")[0].rstrip()):
        if part and part in text:
            return text.rindex(part) + len(part)
    return None


def cut(text: str, control: list, spans: list[tuple[int, int]]) -> Iterator[Piece]:
    """The text as pieces: cut at the control tokens, and where a supervised span begins or ends."""
    tokens = {start: (end, token) for start, end, token in control}
    borders = sorted({0, len(text), *tokens, *(end for end, _ in tokens.values()),
                      *(place for span in spans for place in span)})  # fmt: skip
    for start, end in zip(borders, borders[1:], strict=False):
        supervised = any(first <= start < last for first, last in spans)
        _, token = tokens.get(start, (None, text[start:end]))
        yield token, start in tokens, supervised
