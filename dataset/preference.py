"""PreferenceDataset: pairs of a better and a worse answer to the same messages, for trainer/train_dpo.py.
A reader may skip this file.

A pair has two sides, chosen and rejected. The messages that both share are the prompt, earlier answers
included. The loss looks at the tokens of the answers after them:

    prompt    user "2 + 2?"  assistant "4"  user "Sure?"
    chosen    assistant "Yes."      labels: Yes . <|im_end|>
    rejected  assistant "No!"       labels: No ! <|im_end|>

In the token cache the two sides are two samples. Sample 2i is the chosen side of pair i, sample 2i + 1 the
rejected one.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from common.errors import DataError
from dataset import chat
from dataset.keys import Note, is_empty
from dataset.lm_dataset import TokenDataset, collate
from dataset.messages import NothingToLearn, check_words, to_messages
from dataset.records import keys_of

SIDES = ("chosen", "rejected")


class PairSides(TokenDataset):
    """The sides of all pairs as single samples: chosen, rejected, chosen, rejected, ...

    Pairs with nothing to compare are counted, shown with path:line, and left out: those without a difference,
    and those of which a side has no word left in a row of max_length tokens. A side is cut as in SFTDataset.
    """

    kind = "preference"

    def prepare(self, tokenizer, record: dict, note: Callable) -> list[tuple]:
        """The one pair of a record, as the pieces of its two sides. Raises DataError where it is none."""
        sides = to_pair(record, note)
        return [tuple(chat.write_chat(tokenizer, messages, tools) for messages, tools in sides)]

    def encode(self, tokenizer, pairs: list[tuple]) -> list[tuple]:
        """(ids, mask) of both sides of each pair."""
        encoded = chat.encode_pieces(tokenizer, [side for pair in pairs for side in pair])
        return list(zip(encoded[::2], encoded[1::2], strict=True))

    def cut(self, pair: tuple, complain: Callable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The two samples (ids, mask) of a pair, or none. complain(reason, kind) shows and counts why."""
        row, sides = self.max_length, []
        for name, (ids, mask) in zip(SIDES, pair, strict=True):
            sides.append((np.array(ids[:row]), np.array(mask[:row], dtype=np.uint8)))
            if len(ids) <= row:
                continue
            if not any(mask[:row]):
                complain(f"a {name} side of {len(ids)} tokens: no word of its answer is in a row of {row}: "
                         "dropped", kind=f"pairs dropped (no word of an answer in {row} tokens)")
                return
            complain(f"a {name} side of {len(ids)} tokens, longer than a row of {row}: cut",
                     kind=f"sides over {row} tokens cut")
        if np.array_equal(sides[0][0], sides[1][0]):
            complain("a pair without a difference between its sides as tokens: dropped",
                     kind="pairs without a difference dropped")
            return
        yield from sides


class PreferenceDataset(torch.utils.data.Dataset):
    """The pairs of the files in `data_path`; the arguments are those of TokenDataset.

    pairs[i] is ((input_ids, labels) of the chosen side, (input_ids, labels) of the rejected side).
    """

    def __init__(self, *arguments, **settings):
        self.sides = PairSides(*arguments, **settings)
        self.summary = self.sides.summary
        self.reference = None  # a cache with the reference model's log-probabilities: trainer/reference.py

    def __len__(self) -> int:
        return len(self.sides) // 2

    def __getitem__(self, index: int) -> tuple:
        index = range(len(self))[index]  # accepts negative numbers; raises IndexError past the end
        return self.sides[2 * index], self.sides[2 * index + 1]

    @property
    def identity(self) -> str:
        """A text with a checksum of the data: it changes if any pair changes."""
        return f"{len(self):,} pairs, {self.sides.identity}"

    def where(self, pair: int) -> str:
        """The record that a pair was made of, such as "pairs.jsonl:17"."""
        return self.sides.where(2 * range(len(self))[pair])

    # Arrays with a number for each pair
    lengths = property(lambda self: self.sides.lengths.reshape(-1, 2).sum(1))  # tokens of both sides
    num_units = property(lambda self: np.ones(len(self), dtype=np.int64))  # the loss is a mean over pairs
    num_bytes = property(lambda self: np.zeros(len(self), dtype=np.int64))  # bits per byte mean nothing here

    def collate(self, rows: list[list[int]], pad_token_id: int) -> dict:
        """A micro-batch of rows with one pair each: input_ids and labels, (2 P, T), padded right.

        The P chosen sides come first, then the P rejected sides. With a reference there is also
        "reference_log_probs" (2 P,). Without a pair the batch has two sides of one token, and no label.
        """
        pairs = [pair for row in rows for pair in row]
        samples = [2 * pair for pair in pairs] + [2 * pair + 1 for pair in pairs]
        batch = collate(self.sides, [[sample] for sample in samples], pad_token_id)
        if not pairs:
            batch = {name: value if value is None else value.repeat(2, 1) for name, value in batch.items()}
        if self.reference is not None:
            log_probs = self.reference.log_probs[samples] if pairs else np.zeros(2, dtype=np.float32)
            batch["reference_log_probs"] = torch.from_numpy(log_probs.copy())
        return batch


def to_pair(record: dict, note: Note) -> list[tuple[list[dict], list | None]]:
    """[(messages, tools) of the chosen side, (messages, tools) of the rejected side].

    Answers that both sides share are marked as not to be learnt. Raises DataError where the record holds
    no pair, and NothingToLearn where its sides cannot be compared.
    """
    for side in SIDES:
        if side not in record:
            raise DataError(f"no preference pair: there is no {side!r} in it, but {keys_of(record)}")
        if is_empty(record[side]) or record[side] == "[]":
            raise NothingToLearn(f"the {side} answer of the pair is empty")
    sides = [to_messages(record, note, side) for side in SIDES]
    (chosen, _), (rejected, _) = sides
    for messages in (chosen, rejected):
        check_words(messages, note)
    if said(chosen) == said(rejected):
        raise NothingToLearn("a pair without a difference between the chosen and the rejected answer")
    shared = 0
    while said(chosen[: shared + 1]) == said(rejected[: shared + 1]):
        shared += 1
    for side, (messages, _) in zip(SIDES, sides, strict=True):
        if len(messages) == shared or messages[-1]["role"] != "assistant":
            raise NothingToLearn(f"the {side} side of the pair ends without an answer of its own")
    if not chosen[shared]["role"] == rejected[shared]["role"] == "assistant":
        raise DataError(f"the sides of the pair differ in message {shared + 1}, which is no answer: both "
                        "must answer the same messages")
    for side, (messages, _) in zip(SIDES, sides, strict=True):
        answers = [message for message in messages if message["role"] == "assistant"]
        compared = [message for message in messages[shared:] if message["role"] == "assistant"]
        for answer in answers[: len(answers) - len(compared)]:
            answer["trained"] = False
        if not any(answer.get("trained", True) for answer in compared):
            raise NothingToLearn(f"the {side} answer of the pair is marked as not to be learnt")
        if len(compared) > 1:
            note("the sides of a pair differ in more than the last answer: all answers after the messages "
                 "that both share are compared")
    return sides


def said(messages: list[dict]) -> list[dict]:
    """The messages without the marks of what is learnt."""
    return [{key: value for key, value in message.items() if key != "trained"} for message in messages]
