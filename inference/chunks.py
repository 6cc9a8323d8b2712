"""Answers in the shapes of OpenAI's API, whole and in pieces. A reader may skip this file.

    whole       {"object": "chat.completion", "choices": [{"message": {"content": "Hi!", ...}, ...}], ...}
    in pieces   {"object": "chat.completion.chunk", "choices": [{"delta": {"content": "Hi"}}], ...}, then "!"
"""

import json
import time
import uuid
from dataclasses import dataclass, field

from dataset.chat import to_json
from dataset.replies import parse_call
from inference.answer import Piece
from model.batch import Choice

LOWEST_LOGPROB = -9999.0  # JSON has no infinity


def head(kind: str, prefix: str, model: str) -> dict:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(num_prompt_tokens: int, num_cached: int, num_new_tokens: int) -> dict:
    return {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_new_tokens,
            "total_tokens": num_prompt_tokens + num_new_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached}}


def event(data: dict) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


@dataclass
class Message:
    """An answer of a chat, which grows. `add` returns what it adds, as a delta."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict] = field(default_factory=list)

    def add(self, piece: Piece) -> dict:
        text = piece.text
        if piece.part == "call":
            call = parse_call(text)
            if call:
                arguments = call["arguments"]
                arguments = arguments if isinstance(arguments, str) else to_json(arguments)
                self.calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                                   "function": {"name": call["name"], "arguments": arguments}})
                return {"tool_calls": [{"index": len(self.calls) - 1, **self.calls[-1]}]}
            text = f"<tool_call>\n{text}\n</tool_call>"  # no call, so it is shown as it was written
        if piece.part == "reasoning":
            self.reasoning += text
            # Clients disagree on the name of this field.
            return {"reasoning_content": text, "reasoning": text}
        self.content += text
        return {"content": text}

    def whole(self) -> dict:
        message = {"role": "assistant", "content": self.content, "refusal": None}
        if self.reasoning:
            message |= {"reasoning_content": self.reasoning, "reasoning": self.reasoning}
        if self.calls:
            message |= {"tool_calls": self.calls, "content": self.content or None}
        return message

    def finish(self, reason: str) -> str:
        return "tool_calls" if self.calls and reason == "stop" else reason


class TokenTexts:
    """What single tokens of a tokenizer stand for: texts, and bytes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.known = tokenizer, {}
        # Some tokenizers drop a space at the start of a text, so each token is decoded after another one.
        self.anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self.bytes_of = bytes_of_signs()

    def __getitem__(self, token: int) -> tuple[str, list[int]]:
        if token not in self.known:
            before, both = self._decode(self.anchor), self._decode([*self.anchor, token])
            text = both[len(before):]
            self.known[token] = text, self._bytes(token, text)
        return self.known[token]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _bytes(self, token: int, text: str) -> list[int]:
        """A token that is a part of a character has bytes, but no text of its own."""
        if "\ufffd" in text:
            written = self.tokenizer.convert_ids_to_tokens(token)
            if written and len(written) == 6 and written.startswith("<0x"):  # SentencePiece's spelling
                return [int(written[3:5], 16)]
            if written and all(sign in self.bytes_of for sign in written):
                return [self.bytes_of[sign] for sign in written]
        return list(text.encode("utf-8", "replace"))


def bytes_of_signs() -> dict[str, int]:
    """{sign: byte} of byte-level tokenizers, which write every byte as a visible sign (GPT-2's convention).

    Visible bytes of Latin-1 stand for themselves. The others, in order, are the signs from number 256 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    signs = [chr(byte) for byte in visible] + [chr(256 + place) for place in range(len(hidden))]
    return dict(zip(signs, visible + hidden, strict=True))


def token_entry(texts: TokenTexts, token: int, logprob: float) -> dict:
    text, data = texts[token]
    return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": data, "id": token}


def chat_logprobs(texts: TokenTexts, choices: list[Choice]) -> dict:
    content = [token_entry(texts, choice.token, choice.logprob)
               | {"top_logprobs": [token_entry(texts, *pair) for pair in choice.top]} for choice in choices]
    return {"content": content, "refusal": None}


def completion_logprobs(texts: TokenTexts, choices: list[Choice], offset: int) -> dict:
    """The older shape. offset: where in the text the first of the tokens begins."""
    found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for choice in choices:
        text = texts[choice.token][0]
        logprob = None if choice.logprob is None else max(choice.logprob, LOWEST_LOGPROB)
        top = {texts[token][0]: max(value, LOWEST_LOGPROB) for token, value in choice.top}
        if logprob is not None:  # the token itself is always among them
            top.setdefault(text, logprob)
        found["tokens"].append(text)
        found["token_logprobs"].append(logprob)
        found["top_logprobs"].append(None if logprob is None else top)
        found["text_offset"].append(offset)
        offset += len(text)
    return found
