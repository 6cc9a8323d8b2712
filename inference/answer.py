"""The tokens of an answer -> its text, in pieces, while they come. A reader may skip this file.

    reader = AnswerReader(chat_model.decode, chat_model.marks, chat_model.new_reply(ids), stop=["\\n\\n"])
    for token in tokens:
        for piece in reader.add(token): ...
    for piece in reader.end(): ...

What waits before it is shown: a token that is half a character, letters that may become a mark such as
<think>, letters that may become a stop text, and line breaks at the end of a part, which are dropped where
another part follows. So the pieces are the same whoever puts them together, and whenever.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dataset.replies import Reply


class Piece(NamedTuple):
    """The next part of an answer."""

    part: str  # what the text belongs to: reasoning, content or call (dataset/replies.py); a call comes whole
    text: str
    num_tokens: int  # of the answer so far


class AnswerReader:
    """Reads one answer, token by token. has_stopped: a stop text has come, and nothing more is shown.

    decode: ids -> text. marks: {token: mark} of the tokens that part an answer. reply: gets all of it.
    stop: texts that end the answer, and are no part of it.
    """

    def __init__(self, decode: Callable, marks: dict[int, str], reply: Reply, stop: Sequence[str] = ()):
        self.decode, self.marks, self.reply, self.stop = decode, marks, reply, stop
        self.tokens: list[int] = []
        self.before, self.shown = 0, 0  # tokens[before:shown] are the last piece that was decoded
        self.part, self.held = reply.part, ""  # what waits: of this part, this text
        self.is_first, self.is_blank = True, True  # the first part; a part of which nothing was shown
        self.has_stopped = False

    def add(self, token: int) -> list[Piece]:
        """Takes the next token. Returns what can be shown now."""
        if self.has_stopped:
            return []
        self.tokens.append(token)
        mark = self.marks.get(token)
        text = self._text_after(self.tokens[self.before:len(self.tokens) - bool(mark)],
                                self.shown - self.before)
        found = []
        if mark or not text.endswith("\ufffd"):  # half a character waits for its other half
            found += self.reply.add(text)
            self.before, self.shown = self.shown, len(self.tokens)
        if mark:
            found += self.reply.end()
            self.reply.add_mark(mark)
            self.before = self.shown
        return self._show(found)

    def end(self) -> list[Piece]:
        """Everything that still waits."""
        if self.has_stopped:
            return []
        rest = self._text_after(self.tokens[self.before:], self.shown - self.before)
        pieces = self._show(self.reply.add(rest) + self.reply.end())
        return pieces if self.has_stopped else pieces + self._close(is_last=True)

    def _text_after(self, ids: list[int], count: int) -> str:
        """The text of ids[count:].

        Some tokenizers drop a space at the start of what they decode. So the ids before are decoded, too, and
        their text is cut off.
        """
        return self.decode(ids)[len(self.decode(ids[:count])):]

    def _show(self, found: list[tuple[str, str]]) -> list[Piece]:
        """What can be shown of the texts (part, text) that came. A part may follow another without a text."""
        pieces = []
        for part, text in found:
            if part != self.part:
                pieces += self._close()
                self.part = part
            pieces += self._put(text)
            if self.has_stopped:
                return pieces
        if self.reply.part != self.part:
            pieces += self._close()
            self.part = self.reply.part
        return pieces

    def _put(self, text: str) -> list[Piece]:
        self.held += text
        found = [place for stop in self.stop if (place := self.held.find(stop)) >= 0]
        if found:
            self.held, self.has_stopped = self.held[:min(found)], True
            return self._close(is_last=True)
        if self.part == "call":
            return []
        waits = max((length for stop in self.stop for length in range(1, min(len(stop), len(self.held) + 1))
                     if self.held.endswith(stop[:length])), default=0)
        text = self.held[:len(self.held) - waits].rstrip("\n")
        self.held = self.held[len(text):]
        return self._piece(text)

    def _close(self, is_last: bool = False) -> list[Piece]:
        """The end of a part."""
        text, self.held = self.held, ""
        if not (is_last and self.is_first and self.part == "content"):
            text = text.rstrip("\n")
        pieces = self._piece(text)
        self.is_first, self.is_blank = False, True
        return pieces

    def _piece(self, text: str) -> list[Piece]:
        if self.is_blank and not (self.is_first and self.part == "content"):
            text = text.lstrip("\n")
        if not text:
            return []
        self.is_blank = False
        return [Piece(self.part, text, len(self.tokens))]
