"""PretrainDataset and SFTDataset: files of records -> (input_ids, labels).

Labels stand at the positions of their inputs (the model shifts them), and -100 is not trained. An example
of each dataset:

    pretrain   text "A cat ."              input_ids   A    cat  .    <|endoftext|>
                                           labels     -100  cat  .    <|endoftext|>

    SFT        ... assistant "Yo"          input_ids   ...  <|im_start|> assistant  \\n   Yo  <|im_end|>  \\n
                                           labels      ...  -100         -100      -100  Yo  <|im_end|> -100

The first label is always -100: nothing comes before it from which it could be predicted.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from common.errors import DataError
from dataset import chat
from dataset.keys import FLAGS, is_learnt, name_unknown
from dataset.messages import SPELLED, NothingToLearn, learnt_messages
from dataset.records import check_paths, keys_of
from dataset.token_cache import cached_tokens


class TokenDataset(torch.utils.data.Dataset):
    """What both datasets share: samples from a token cache on disk.

    dataset/token_cache.py builds the cache at the first start. For that it calls the methods `prepare`,
    `encode` and `cut` of the two classes below. Later starts open the cache. Bad records are counted and
    skipped, and the first few are shown with path:line; with strict they are fatal. Raises DataError for a
    file that is missing or empty, or without a single usable record; and, without allow_unusable, for a file
    of which most records cannot be used.
    """

    settings: dict = {}  # of `prepare`; part of the name of the cache

    def __init__(self, data_path, tokenizer, max_length: int = 512, *, strict: bool = False,
                 allow_unusable: bool = False, cache_dir=None):
        if max_length < 2:
            raise DataError(f"max_length must be at least 2, not {max_length}")
        self.paths, self.max_length = check_paths(data_path), max_length
        self.cache = cached_tokens(self, tokenizer, strict, allow_unusable, cache_dir)
        self.summary = self.cache.meta["summary"]  # such as "bad lines skipped: 12"; empty when all was well

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = range(len(self))[index]  # accepts negative numbers; raises IndexError past the end
        start, end = self.cache.offsets[index : index + 2]
        input_ids = self.cache.tokens[start:end].astype(np.int64)  # (T,)
        labels = input_ids.copy()
        labels[0] = -100
        if self.cache.mask is not None:
            labels[self.cache.mask[start:end] == 0] = -100
        self.cache.count_read()  # after some reads the pages that were read leave this process's memory
        return torch.from_numpy(input_ids), torch.from_numpy(labels)

    @property
    def identity(self) -> str:
        """A text with a checksum of the data: it changes if any sample changes."""
        tokens, sha256 = int(self.lengths.sum()), self.cache.meta["sha256"]
        return f"{len(self):,} samples of {tokens:,} tokens, sha256 {sha256[:16]}"

    def where(self, sample: int) -> str:
        """The record that a sample was made of, such as "data.jsonl:17"."""
        sample = range(len(self))[sample]  # as above
        file = bisect_right(self.cache.meta["first_samples"], sample) - 1  # the sample's file
        return f"{self.paths[file]}:{self.cache.lines[sample]}"

    # Arrays with a number for each sample. They are read from the cache each time. If they were stored in
    # this object, a DataLoader would copy them into each of its worker processes.
    lengths = property(lambda self: self.cache.lengths)  # tokens, int32
    num_targets = property(lambda self: self.cache.num_targets)  # supervised tokens, int32
    num_bytes = property(lambda self: self.cache.num_bytes)  # UTF-8 bytes of supervised tokens, int64
    num_units = num_targets  # of the loss, which is a mean over supervised tokens

    def collate(self, rows: list[list[int]], pad_token_id: int) -> dict:
        """A micro-batch of rows of sample numbers."""
        return collate(self, rows, pad_token_id)


class PretrainDataset(TokenDataset):
    """{"text"} records: a document is its tokens + <|endoftext|>, in windows when longer than max_length.

    Windows overlap by one token, so that every token but the document's first is predicted exactly once:
    a b c d e f  at max_length 3  ->  [a b c] [c d e] [e f], predicting  b c, d e, f.
    """

    kind = "pretrain"

    def __init__(self, data_path, tokenizer, max_length: int = 512, *, split_documents=False, **settings):
        """split_documents: text between two control tokens, as <|im_start|>, is a document of its own."""
        self.settings = {"split_documents": split_documents}
        super().__init__(data_path, tokenizer, max_length, **settings)

    def prepare(self, tokenizer, record: dict, note: Callable) -> list[str]:
        """The documents of a record. note(text) is called for what is not used. Raises DataError for none."""
        if "text" not in record:
            raise DataError(f"no text in it, but {keys_of(record)}")
        if not isinstance(record["text"], str):
            raise DataError("its text is not a string")
        if not record["text"].strip():
            raise DataError("its text is empty")
        name_unknown(record, {"text", *FLAGS}, "record", note)
        if is_learnt(record, note) is False:
            raise NothingToLearn("a text that is marked as not to be learnt")
        documents = [text for text in SPELLED.split(record["text"]) if text.strip()]
        if self.settings["split_documents"] and documents:
            return documents
        if SPELLED.search(record["text"]):
            note("control tokens are spelled in the text, and read as text: with --split_documents what "
                 "stands between two of them becomes a document")
        return [record["text"]]

    def encode(self, tokenizer, texts: list[str]) -> list[list[int]]:
        """The ids of each document."""
        encoder, end = chat.plain_encoder(tokenizer), chat.end_of_text(tokenizer)
        return [encoder.start + ids + [end] for ids in encoder.encode_batch(texts)]

    def cut(self, ids: list[int], complain: Callable) -> Iterator[tuple[np.ndarray, None]]:
        """The samples (ids, mask) of a document. A mask of None: all tokens but the first are supervised."""
        ids = np.array(ids)
        for start in range(0, len(ids) - 1, self.max_length - 1):
            yield ids[start : start + self.max_length], None


class SFTDataset(TokenDataset):
    """Conversations in the formats of dataset/messages.py; targets are the assistant's words + <|im_end|>.

    A sample is cut after max_length tokens, or dropped when that leaves no target. Both are counted.
    """

    kind = "sft"

    def prepare(self, tokenizer, record: dict, note: Callable) -> list[list[chat.Piece]]:
        """The pieces of the one conversation of a record. Raises DataError where it is none."""
        return [chat.write_chat(tokenizer, *learnt_messages(record, note))]

    def encode(self, tokenizer, conversations: list[list[chat.Piece]]) -> list[tuple[list[int], list[int]]]:
        """(ids, mask) of each conversation."""
        return chat.encode_pieces(tokenizer, conversations)

    def cut(self, conversation: tuple, complain: Callable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The sample (ids, mask) of a conversation. complain(reason, kind) shows and counts a problem."""
        ids, mask = conversation
        if len(ids) > self.max_length:
            trained = any(mask[: self.max_length])
            what = "cut" if trained else "dropped (no word of the assistant in the row)"
            complain(f"a sample of {len(ids)} tokens, longer than a row of {self.max_length}: {what}",
                     kind=f"samples over {self.max_length} tokens {what}")  # fmt: skip
            if not trained:
                return
        yield np.array(ids[: self.max_length]), np.array(mask[: self.max_length], dtype=np.uint8)


def collate(dataset, rows: list[list[int]], pad_token_id: int) -> dict:
    """Rows of sample numbers -> input_ids, labels, document_ids, each (B, T), padded right to the longest.

    document_ids are the numbers of a row's documents, from 0, and -1 for padding. Where every row is one
    document they are None: a token sees only earlier tokens, so it never sees the padding on the right. If
    `rows` is empty, because a process has nothing to do in this step, the batch is 1x1 and has no target.
    """
    input_ids, labels, document_ids = [], [], []  # a tensor for each row
    for row in rows:
        ids, targets = zip(*[dataset[index] for index in row], strict=True)
        lengths = torch.tensor([len(document) for document in ids])
        input_ids.append(torch.cat(ids))
        labels.append(torch.cat(targets))
        document_ids.append(torch.arange(len(row)).repeat_interleave(lengths))
    if not rows:
        input_ids, labels = [torch.tensor([pad_token_id])], [torch.tensor([-100])]
    # If `rows` is empty this is True, and document_ids become None.
    one_each = all(len(row) == 1 for row in rows)
    return {"input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "document_ids": None if one_each else pad_sequence(document_ids, True, -1)}  # True: batch first
