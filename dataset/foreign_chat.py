"""Prompts of models from elsewhere: their own chat template, with the loss mask that it does not tell.

A template (jinja, in tokenizer_config.json) writes a conversation as one string. To know whose words are
where in it, it is written twice, once with a mark in the place of each message's words:

    with marks    <s>[INST] {0} [/INST] {1}</s>
    with words    <s>[INST] Hi [/INST] Hello!</s>
    supervised                        ^^^^^^^^^^^   the words, the control token that ends the turn, and what
                                                    of the space before was not part of the prompt

The ids are those that transformers gives for the string. Words that hold a control token's text would become
that control token in it, so such a conversation is refused.
"""

import json
import re

from tokenizers import Tokenizer

from dataset.jsonl import DataError

TAKEN = "this model would take it for a control token"
MARK = re.compile("\ue000(\\d+)\ue001")  # of the private use area: no template and no tokenizer knows them
Piece = tuple[str, bool, bool]  # (text, is a control token, is supervised), as in dataset/chat.py


def unknown_id(model: dict, backend: Tokenizer) -> int | None:
    """The id of what a tokenizer can't encode; `model` is that of tokenizer.json. It is never trained on."""
    return model.get("unk_id") if model.get("unk_token") is None else backend.token_to_id(model["unk_token"])


class CannotEncode(DataError):
    """The tokenizer has no token for something in a text: one record's trouble, not that of all."""

    def __init__(self, error: Exception | None = None):
        super().__init__("this tokenizer has no token for a character in it"
                         + (f" ({str(error).splitlines()[0]})" if error else ""))


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
        # Longest first, as the tokenizer does; some tokenizers add runs of spaces, which control nothing.
        control = sorted((token for token in control if token.strip("\u2581 \t\r\n")), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, control)) or r"(?!)")
        question = [{"role": "user", "content": "Hi"}]
        prompt = self._write(tokenizer, question, add_generation_prompt=True)
        answer = [{"role": "assistant", "content": "\ue0000\ue001"}]
        whole = self._write(tokenizer, question + answer, add_generation_prompt=False)
        # The space between the prompt and the answer, as the model has to begin with it: " " for Mistral.
        lead = whole.removeprefix(prompt).split("\ue000")[0]
        self.lead = lead if lead.isspace() else ""

    def _write(self, tokenizer, messages: list[dict], add_generation_prompt: bool) -> str:
        # We train without thinking; Qwen3's template then writes the same prompt in training and in use.
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False,
                                                 add_generation_prompt=add_generation_prompt)
        except Exception as error:  # jinja's errors, and what raises inside of the template's expressions
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"this model's chat template refuses it: {reason}") from None

    def pieces(self, tokenizer, messages: list[dict], tools: list | None,
               add_generation_prompt: bool) -> list[Piece]:
        """A conversation as pieces whose texts together are what the template writes."""
        if tools or any(message.keys() - {"role", "content"} for message in messages):
            raise DataError("tools, tool calls and reasoning are for models of our own prompt format")
        words = [message["content"] for message in messages]
        for text in words:
            if found := self.control.search(text) or self.control.search(self.normalize(text)):
                raise DataError(f"{found[0]!r} in a message: {TAKEN}")
        marked = [dict(message, content=f"\ue000{i}\ue001" if words[i] else "")
                  for i, message in enumerate(messages)]
        parts = MARK.split(self._write(tokenizer, marked, add_generation_prompt))  # text, number, text, ...
        text = self._write(tokenizer, messages, add_generation_prompt)
        spans, end = self._spans(parts, words, text), 0
        for found in self.control.finditer(text):  # half of it in a message, half in what stands beside it
            if any(found.start() < stop and start < found.end() for _, start, stop in spans):
                raise DataError(f"{found[0]!r} at the edge of a message: {TAKEN}")
        if [i for i, *_ in spans if messages[i]["role"] == "assistant"] != \
                [i for i, message in enumerate(messages) if message["role"] == "assistant" and words[i]]:
            raise DataError("this model's chat template leaves out, or moves, what the assistant said")
        pieces = []
        following = [*(start for _, start, _ in spans[1:]), len(text)]  # where the next message's words begin
        for (i, start, stop), limit in zip(spans, following, strict=True):
            if messages[i]["role"] == "assistant":
                close = self.control.search(text, stop, limit)
                if not close or text[stop:close.start()].strip():
                    raise DataError("this model's chat template has no control token that ends an answer")
                start -= len(self.lead) * text.endswith(self.lead, end, start)
                pieces += [(text[end:start], False, False), (text[start:close.end()], False, True)]
                end = close.end()
        return [*pieces, (text[end:], False, False)]

    @staticmethod
    def _spans(parts: list[str], words: list[str], text: str) -> list[tuple[int, int, int]]:
        """(message, start, end) of the words in `text`; templates may trim them, and do nothing else."""
        spans, written = [], parts[0]
        for number, after in zip(map(int, parts[1::2]), parts[2::2], strict=True):
            w, place = words[number], len(written)
            trimmed = (w, w.strip(), w.lstrip(), w.rstrip(), w.strip("\n"), w.lstrip("\n"))
            said = next((said for said in trimmed if text.startswith(said + after, place)), w)
            spans.append((number, place, place + len(said)))
            written += said + after
        if written != text:
            raise DataError("this model's chat template rewrites what a message says")
        return spans

    def encode(self, conversations: list[list[Piece]]) -> list[tuple[list[int], list[int]]]:
        """(ids, mask) of each conversation: supervised is every token with a supervised character in it.

        Raises CannotEncode.
        """
        texts = ["".join(text for text, _, _ in pieces) for pieces in conversations]
        try:
            encodings = self.backend.encode_batch(texts)
        except Exception as error:  # tokenizers has no other kind
            raise CannotEncode(error) from None
        result = []
        for pieces, text, encoding in zip(conversations, texts, encodings, strict=True):
            ids, offsets = encoding.ids, encoding.offsets
            unknown = [place for i, place in zip(ids, offsets, strict=True) if i == self.unknown]
            if not all(self.control.fullmatch(text[start:end].strip()) for start, end in unknown):
                raise CannotEncode  # else the template itself writes that token
            on = [flag for text, _, flag in pieces for flag in [int(flag)] * len(text)]  # by character
            mask = [int(any(on[start:max(end, start + 1)])) for start, end in offsets]
            result.append((ids, mask))
        return result
