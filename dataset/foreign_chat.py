"""Prompts of models from elsewhere: their own chat template, and a loss mask. A reader may skip this file.

A template (jinja, in tokenizer_config.json) writes a conversation as one string. To know whose words are
where in this string, we have the template write the conversation twice, once with a mark in the place of each
message's words:

    with marks    <s>[INST] {0} [/INST] {1}</s>
    with words    <s>[INST] Hi [/INST] Hello!</s>
    supervised                        ^^^^^^^^^^^   the words, the control token that ends the turn, and the
                                                    space before them where it is no part of the prompt

The ids are those that transformers gives for the string. Words that hold a control token's text would become
that control token in the string, so such a conversation is refused.
"""

import json
import re

from tokenizers import Tokenizer

from common.errors import DataError
from common.files import one_line

READ_AS_CONTROL = "this model would take it for a control token"
HAS_NO_TOKEN = "this tokenizer has no token for a character in it"
MARK = re.compile("\ue000(\\d+)\ue001")  # of Unicode's private use area: no template or tokenizer knows them
Piece = tuple[str, bool, bool]  # (text, is a control token, is supervised), as in dataset/chat.py


def unknown_id(model: dict, backend: Tokenizer) -> int | None:
    """The id of whatever a tokenizer cannot encode; no model is trained on it. model: of tokenizer.json."""
    return model.get("unk_id") if model.get("unk_token") is None else backend.token_to_id(model["unk_token"])


class CannotEncode(DataError):
    """The tokenizer has no token for something in a text: a fault of one record, and not of all."""


class ForeignTemplate:
    """The chat template of a tokenizer, for conversations of words alone. Raises DataError for any other."""

    def __init__(self, tokenizer):
        config = json.loads(tokenizer.backend_tokenizer.to_str())
        config.update(post_processor=None, truncation=None, padding=None)  # it adds tokens and trims offsets
        self.backend = Tokenizer.from_str(json.dumps(config))
        self.unknown = unknown_id(config["model"], self.backend)
        normalizer = self.backend.normalizer  # it may turn "＜" into "<", for example
        self.normalize = normalizer.normalize_str if normalizer else str
        control = [token.content for token in self.backend.get_added_tokens_decoder().values()]
        control += [self.normalize(token) for token in control]
        # Some tokenizers add runs of spaces (\u2581 is SentencePiece's), which control nothing. Where two
        # tokens fit, a tokenizer takes the longer one, so the longer one stands first here.
        control = sorted((token for token in control if token.strip("\u2581 \t\r\n")), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, control)) or r"(?!)")
        question = {"role": "user", "content": "Hi"}
        prompt = self._write(tokenizer, [question], add_generation_prompt=True)
        answer = {"role": "assistant", "content": "\ue0000\ue001"}
        whole = self._write(tokenizer, [question, answer], add_generation_prompt=False)
        # The space that the model writes first, between the prompt and its words: " " for Mistral.
        lead = whole.removeprefix(prompt).split("\ue000")[0]
        self.lead = lead if lead.isspace() else ""

    def _write(self, tokenizer, messages: list[dict], add_generation_prompt: bool) -> str:
        # We train without thinking. Qwen3's template then writes the same prompt in training and in use.
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False,
                                                 add_generation_prompt=add_generation_prompt)
        except Exception as error:  # errors of jinja, and of the expressions in the template
            raise DataError(f"this model's chat template refuses it: {one_line(error)}") from None

    def pieces(self, tokenizer, messages: list[dict], tools, add_generation_prompt: bool) -> list[Piece]:
        """A conversation as pieces whose texts together are what the template writes."""
        if tools or any(message.keys() - {"role", "content"} for message in messages):
            raise DataError("tools, tool calls and reasoning are for models of our own prompt format")
        contents = [message["content"] for message in messages]
        for content in contents:
            found = self.control.search(content) or self.control.search(self.normalize(content))
            if found:
                raise DataError(f"{found[0]!r} in a message: {READ_AS_CONTROL}")
        marks = [f"\ue000{number}\ue001" if content else "" for number, content in enumerate(contents)]
        marked = [dict(message, content=mark) for message, mark in zip(messages, marks, strict=True)]
        parts = MARK.split(self._write(tokenizer, marked, add_generation_prompt))  # text, number, text, ...
        text = self._write(tokenizer, messages, add_generation_prompt)
        spans = find_words(parts, contents, text)
        for found in self.control.finditer(text):  # half of it in a message, half in the text beside it
            if any(found.start() < end and start < found.end() for _, start, end, _ in spans):
                raise DataError(f"{found[0]!r} at the edge of a message: {READ_AS_CONTROL}")
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if [number for number, *_ in spans if number in answers] != [n for n in answers if contents[n]]:
            raise DataError("this model's chat template leaves out, or moves, what the assistant said")

        pieces, written = [], 0  # written: characters of `text` that are in `pieces`
        for number, start, end, after in spans:
            if number not in answers:
                continue
            close = self.control.search(after)
            if not close or after[:close.start()].strip():
                raise DataError("this model's chat template has no control token that ends an answer")
            if text.endswith(self.lead, written, start):
                start -= len(self.lead)
            end += close.end()
            pieces += [(text[written:start], False, False), (text[start:end], False, True)]
            written = end
        return [*pieces, (text[written:], False, False)]

    def encode(self, conversations: list[list[Piece]]) -> list[tuple[list[int], list[int]]]:
        """(ids, mask) of each conversation. A token is supervised if one of its characters is.

        Raises CannotEncode.
        """
        texts = ["".join(text for text, _, _ in pieces) for pieces in conversations]
        try:
            encodings = self.backend.encode_batch(texts)
        except Exception as error:  # tokenizers has no other kind
            raise CannotEncode(f"{HAS_NO_TOKEN} ({one_line(error)})") from None
        result = []
        for pieces, text, encoding in zip(conversations, texts, encodings, strict=True):
            ids, offsets = encoding.ids, encoding.offsets
            for index, (start, end) in zip(ids, offsets, strict=True):
                # The template itself may write the token for the unknown, as a control token.
                if index == self.unknown and not self.control.fullmatch(text[start:end].strip()):
                    raise CannotEncode(HAS_NO_TOKEN)
            supervised = []  # for each character: whether it is
            for part, _, is_supervised in pieces:
                supervised += [is_supervised] * len(part)
            mask = [int(any(supervised[start:max(end, start + 1)])) for start, end in offsets]
            result.append((ids, mask))
        return result


def find_words(parts: list[str], contents: list[str], text: str) -> list[tuple[int, int, int, str]]:
    """(message, start, end, text up to the next message's words) of each message's words in `text`.

    A template may trim the words, and change nothing else.
    """
    spans, written = [], parts[0]
    for number, after in zip(parts[1::2], parts[2::2], strict=True):
        said, start = contents[int(number)], len(written)
        trims = said, said.strip(), said.lstrip(), said.rstrip(), said.strip("\n"), said.lstrip("\n")
        fitting = [trimmed for trimmed in trims if text.startswith(trimmed + after, start)]
        said = fitting[0] if fitting else said
        spans.append((int(number), start, start + len(said), after))
        written += said + after
    if written != text:
        raise DataError("this model's chat template rewrites what a message says")
    return spans
