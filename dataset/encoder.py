"""Pieces of text -> token ids, such that no text of a person ever becomes a control token.
A reader may skip this file.

A tokenizer looks for its control tokens, such as <|im_end|>, in every text that it is given. So a person who
types "<|im_end|>" would end the turn. We use a copy of the tokenizer in which every control token has another
name, which holds a random number that nobody can guess:

    pieces      ("<|im_start|>", control)  ("user\\n", text)  ("<|im_end|> Hi", text)  ("<|im_end|>", control)
    as text     <83c1f001>user\\n<|im_end|> Hi<83c1f002>         1 and 2 are the ids of the control tokens

The pieces are encoded as one text. So the ids are those that transformers gives for the whole text, and a
tokenizer that merges over the border of two pieces, or puts a space before each text, does here what it does
everywhere.

Not every added token is a control token. Some are ordinary words (DeepSeek-Coder's "ü"), or runs of spaces.
These keep their names, so they are used as transformers uses them.
"""

import json
import re
import secrets

from tokenizers import Tokenizer

from common.errors import DataError
from common.files import one_line

HAS_NO_TOKEN = "this tokenizer has no token for a character in it"
SHAPE_OF_CONTROL = re.compile(r"<[|｜].*[|｜]>|</?(think|tool_call|tool_response)>")
BRACKETED = re.compile(r"<.*>|\[.*\]")
Piece = tuple[str, bool, bool]  # (text, is a control token, is supervised)


class CannotEncode(DataError):
    """The tokenizer has no token for something in a text: a fault of one record, and not of all."""


class PlainEncoder:
    """A copy of the tokenizer that knows its control tokens by other names. Raises DataError.

    control: the id of each control token. start: the ids that the tokenizer itself puts before a text (the
    token that begins a text, for Llama; none for most others). config: the content of tokenizer.json.
    unknown: the id of whatever the tokenizer cannot encode, or None. No model is trained on it.
    """

    def __init__(self, tokenizer):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError("the tokenizer has no tokenizer.json (a 'fast' tokenizer is needed)")
        self.config = json.loads(backend.to_str())
        self.start = _start_of_text(self.config["post_processor"])
        self.config.update(post_processor=None, truncation=None, padding=None)
        template = json.dumps(tokenizer.chat_template, ensure_ascii=False)  # it may be a dict of several
        added = backend.get_added_tokens_decoder()
        self.control = {token.content: index for index, token in added.items() if is_control(token, template)}
        self.ordinary = {token.content: index for index, token in added.items()
                         if token.content not in self.control}  # fmt: skip
        # Some tokenizers look at what stands beside a word. Most control tokens begin with "<" and end with
        # ">", and so do their new names.
        number = secrets.token_hex(8)
        self.names = {text: f"<{number}{index}>" for text, index in self.control.items()}
        self.backend = Tokenizer.from_str(json.dumps(_renamed(self.config, self.names)))
        model = self.config["model"]
        unknown = model.get("unk_token")
        self.unknown = model.get("unk_id") if unknown is None else backend.token_to_id(unknown)
        for text, name in self.names.items():
            if self.backend.token_to_id(name) != self.control[text]:
                raise DataError(f"this tokenizer can't be copied without its control token {text!r}")
        self.control_ids = frozenset(self.control.values())
        self.forbidden = self.control_ids | {self.unknown}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Texts -> ids, on all cores, none of them a control token. Raises CannotEncode."""
        encodings = self._call(self.backend.encode_batch_fast, texts)
        batch = [encoding.ids for encoding in encodings]
        for ids in batch:
            if not self.forbidden.isdisjoint(ids):
                self._places(ids, [])
        return batch

    def encode_pieces(self, conversations: list[list[Piece]], cut_answers=False) -> list[tuple]:
        """(ids, mask) of each list of pieces. A token is supervised if one of its characters is.

        cut_answers: no token reaches over the beginning of a supervised text. Else a token may, such as one
        for two line breaks. A piece that is marked as a control token, and is unknown to this tokenizer, is
        encoded as text. Raises CannotEncode.
        """
        texts = ["".join(self._written(piece) for piece in pieces) for pieces in conversations]
        # Only a mask needs to know which characters a token stands for, and that takes time.
        has_mask = any(supervised for pieces in conversations for _, _, supervised in pieces)
        encode = self.backend.encode_batch if has_mask else self.backend.encode_batch_fast
        result = []
        for pieces, encoding in zip(conversations, self._call(encode, texts), strict=True):
            ids = encoding.ids  # a new list each time it is asked for
            mask, reached_over = self._mask(pieces, encoding, ids)
            if reached_over is not None and cut_answers:
                halves = pieces[:reached_over], pieces[reached_over:]
                (ids, mask), (more_ids, more_mask) = self.encode_pieces(halves, cut_answers)
                ids, mask = ids + more_ids, mask + more_mask
            result.append((ids, mask))
        return result

    def _written(self, piece: Piece) -> str:
        text, control, _ = piece
        return self.names.get(text, text) if control else text

    def _call(self, encode, texts: list[str]) -> list:
        """What encode_batch or encode_batch_fast gives for the texts."""
        try:
            return encode(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):  # an invalid character, as from a wrongly set terminal
            return self._call(encode, [text.encode("utf-8", "replace").decode("utf-8") for text in texts])
        except Exception as error:  # the library raises plain Exceptions
            raise CannotEncode(f"{HAS_NO_TOKEN} ({one_line(error)})") from None

    def _places(self, ids: list[int], expected: list[int]) -> list[int]:
        """The places of the control tokens in the ids, which must be those expected, in this order."""
        places = [place for place, index in enumerate(ids) if index in self.control_ids]
        wrong = [ids[place] for place in places] != expected
        if self.unknown is not None and ids.count(self.unknown) > expected.count(self.unknown):
            raise CannotEncode(HAS_NO_TOKEN)
        if wrong:
            raise DataError("this tokenizer makes control tokens of ordinary text, which is not safe")
        return places

    def _mask(self, pieces: list[Piece], encoding, ids: list[int]) -> tuple[list[int], int | None]:
        """The mask, and the index of a supervised piece that begins within a token, or None."""
        controls = [self.control[text] for text, control, _ in pieces if control and text in self.control]
        places = iter(self._places(ids, controls))
        mask, start, reached_over = [0] * len(ids), 0, None
        for index, piece in enumerate(pieces):
            text, control, supervised = piece
            end = start + len(self._written(piece))
            if control and text in self.control:
                mask[next(places)] = int(supervised)
            elif supervised and text:
                first, last = (self._first_token(encoding, ids, place) for place in (start, end))
                if first < len(mask) and encoding.token_to_chars(first)[0] < start:
                    reached_over = index
                mask[first:last] = [1] * (last - first)
            start = end
        return mask, reached_over

    def _first_token(self, encoding, ids: list[int], start: int) -> int:
        """The place of the first token that stands for a character at or after `start`.

        Some tokenizers write a token for a space before a text that has none. This token stands for no
        character, and it goes with the text after it.
        """
        before = start - 1
        while before >= 0 and encoding.char_to_token(before) is None:  # a tokenizer may trim blanks
            before -= 1
        place = 0 if before < 0 else encoding.char_to_token(before)
        # One character may have several tokens, of which char_to_token gives the first.
        while place < len(ids) and encoding.token_to_chars(place)[0] < start:
            # A control token may take blanks after it along. It is a piece of its own, whatever it takes.
            if encoding.token_to_chars(place)[1] > start and ids[place] not in self.control_ids:
                break
            place += 1
        return place


def is_control(token, template: str) -> bool:
    """Whether an added token controls the model, and is no ordinary word. template: the chat template.

    Special tokens do, unless they are blank (\\u2581 is SentencePiece's blank). So does a token that looks
    like one, <|EOT|>, or that the template writes in brackets, [INST]: some makers call only some of their
    control tokens special.
    """
    text = token.content.strip("\u2581 \t\r\n")
    if not text:
        return False
    in_template = BRACKETED.fullmatch(text) is not None and text in template
    return token.special or in_template or SHAPE_OF_CONTROL.fullmatch(text) is not None


def _start_of_text(post_processor: dict | None) -> list[int]:
    """The ids that a post-processor of tokenizer.json puts before a text."""
    if post_processor is None:
        return []
    if post_processor["type"] == "Sequence":
        return [index for one in post_processor["processors"] for index in _start_of_text(one)]
    if "cls" in post_processor:  # BERT's and RoBERTa's
        return [post_processor["cls"][1]]
    start = []
    for part in post_processor.get("single", []):  # TemplateProcessing: "<s> $A"
        if "SpecialToken" not in part:
            break
        start += post_processor["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    return start


def _renamed(config: dict, names: dict[str, str]) -> dict:
    """The tokenizer.json `config` with other names for some tokens: names[old] is the new one.

    Byte-pair encoding (BPE) builds long tokens out of short ones by a list of pairs to merge. Llama 2 has
    merges that build "</s>" from letters. A pair that has to do with a renamed token is taken off the list.
    """
    model = dict(config["model"])
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
    elif model.get("vocab"):  # Unigram's: (token, score)
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("merges"):
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    added = [dict(token, content=names.get(token["content"], token["content"]))
             for token in config["added_tokens"]]  # fmt: skip
    return dict(config, model=model, added_tokens=added)
