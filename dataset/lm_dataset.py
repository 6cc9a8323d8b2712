"""PretrainDataset and SFTDataset: files of records -> (input_ids, labels), from a token cache on disk.

Labels stand at the positions of their inputs (the model shifts them), -100 is not trained. Both, worked out:

    pretrain   text "A cat ."              input_ids   A    cat  .    <|endoftext|>
                                           labels     -100  cat  .    <|endoftext|>

    SFT        ... assistant "Yo"          input_ids   ...  <|im_start|> assistant  \\n   Yo  <|im_end|>  \\n
                                           labels      ...  -100         -100      -100  Yo  <|im_end|> -100

The first label is always -100: nothing comes before it to predict it from.
"""

import hashlib
import json
import os
import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dataset import chat
from dataset.jsonl import DataError, Report, check_paths, keys_of, nothing_usable, read_records
from dataset.packing import CACHE_DIR, CacheWriter, TokenCache, fingerprint, open_cache, stamps

BATCH_RECORDS, BATCH_CHARS = 1024, 2 << 20  # tokenised at once: enough for all cores, little for the memory


class _TokenDataset(torch.utils.data.Dataset):
    """What both datasets share: the cache, made at the first start and mapped at every later one.

    Bad records are counted, the first few shown with path:line, skipped, or fatal when strict. Raises
    DataError for a file that is missing or empty, or without a single usable record. Memory stays constant
    while the cache is built, and nearly none is used afterwards.
    """

    kind = ""

    def __init__(self, data_path, tokenizer, max_length: int = 512, *, strict: bool = False, cache_dir=None):
        if max_length < 2:
            raise DataError(f"max_length must be at least 2, not {max_length}")
        self.paths, self.max_length, self.strict = check_paths(data_path), max_length, strict
        encoder = chat.plain_encoder(tokenizer)
        words = [encoder.config, encoder.control, _end_of_text(tokenizer), tokenizer.chat_template]
        words = json.dumps(words)
        words = hashlib.sha256(words.encode()).hexdigest()
        key = fingerprint(self.paths, kind=self.kind, max_length=max_length, tokenizer=words)
        folder = Path(cache_dir or CACHE_DIR) / f"{self.kind}-{key}"
        self.cache = open_cache(folder)
        if self.cache is None:
            self._build(folder, tokenizer)
            self.cache = TokenCache(folder)
        elif strict and self.cache.meta["examples"]:
            raise DataError(f"{self.cache.meta['examples'][0]} (fatal with --strict)")
        if self.summary and os.environ.get("RANK", "0") == "0":
            print(f"warning: {', '.join(self.paths)}: {self.summary}", file=sys.stderr)

    @property
    def summary(self) -> str:
        """What was wrong with the data, such as "bad lines skipped: 12"; empty when nothing was."""
        return self.cache.meta["summary"]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per sample, int32."""
        return self.cache.lengths

    @property
    def num_targets(self) -> np.ndarray:
        """Supervised tokens per sample, int32."""
        return self.cache.num_targets

    @property
    def num_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the supervised tokens per sample, control tokens counting 0, int64."""
        return self.cache.num_bytes

    def where(self, sample: int) -> str:
        """The record that a sample was made of, such as "data.jsonl:17"."""
        sample = range(len(self))[sample]
        path = self.paths[bisect_right(self.cache.meta["first_samples"], sample) - 1]
        return f"{path}:{self.cache.lines[sample]}"

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = range(len(self))[index]  # negative indices; IndexError past the end, which ends a for loop
        start, end = self.cache.offsets[index : index + 2]
        input_ids = self.cache.tokens[start:end].astype(np.int64)  # (T,)
        labels = input_ids.copy()
        labels[0] = -100
        if self.cache.mask is not None:
            labels[self.cache.mask[start:end] == 0] = -100
        self.cache.was_read()
        return torch.from_numpy(input_ids), torch.from_numpy(labels)

    def _build(self, folder: Path, tokenizer):
        report = Report(self.strict)
        sizes = token_bytes(tokenizer)
        before = stamps(self.paths)
        dtypes = dict(TokenCache.ARRAYS, tokens="uint16" if len(sizes) <= 1 << 16 else "uint32")
        if self.kind != "sft":
            del dtypes["mask"]
        with CacheWriter(folder, dtypes) as writer:
            # disable=None: no bar where stderr is no terminal
            bar = tqdm(desc="tokenising", unit=" records", delay=1, disable=None, leave=False)
            first_samples = []  # of each file
            for path in self.paths:
                first_samples.append(writer.sizes["lengths"])
                for batch in _batches(self._records(tokenizer, path, report)):
                    for line, ids, mask in self._samples(tokenizer, path, batch, report):
                        supervised = sizes[ids[1:]] if mask is None else sizes[ids[mask == 1]]
                        writer.add(ids, mask, len(supervised), supervised.sum(), line)
                    bar.update(len(batch))
                    if stamps(self.paths) != before:  # looked at often: a log may grow faster than we read
                        raise DataError(f"{path}: changed while it was read; start again")
                if writer.sizes["lengths"] == first_samples[-1]:
                    raise nothing_usable(path, report)
            bar.close()
            writer.meta = {"first_samples": first_samples, "summary": report.summary(),
                           "examples": report.examples}

    def _records(self, tokenizer, path: str, report: Report) -> Iterator[tuple[int, object, int]]:
        """(line, what _prepare made of the record, its size in characters) of every usable record."""
        for _, line, record in read_records(path, report=report):
            try:
                yield line, *self._prepare(tokenizer, record)
            except DataError as error:
                report.add(path, line, str(error))
            except RecursionError:
                report.add(path, line, "JSON nested too deeply")

    def _samples(self, tokenizer, path: str, batch: list, report: Report) -> Iterator[tuple]:
        """(line, ids, mask) of the samples that a batch of `_records` makes."""
        try:
            encoded = self._encode(tokenizer, [prepared for _, prepared, _ in batch])
        except chat.CannotEncode as error:  # which of them is it?
            if len(batch) == 1:
                report.add(path, batch[0][0], str(error))
            else:
                for record in batch:
                    yield from self._samples(tokenizer, path, [record], report)
            return
        for (line, _, _), one in zip(batch, encoded, strict=True):
            for ids, mask in self._cut(one, path, line, report):
                yield line, ids, mask


class PretrainDataset(_TokenDataset):
    """{"text"} records: a document is its tokens + <|endoftext|>, in windows when longer than max_length.

    Windows overlap by one token, so that every token but the document's first is predicted exactly once:
    a b c d e f  at max_length 3  ->  [a b c] [c d e] [e f], predicting  b c, d e, f.
    """

    kind = "pretrain"

    def _prepare(self, tokenizer, record: dict) -> tuple[str, int]:
        text = record.get("text")
        if "text" not in record:
            raise DataError(f"no text in it, but {keys_of(record)}")
        if not isinstance(text, str):
            raise DataError("its text is not a string")
        if not text.strip():
            raise DataError("its text is empty")
        return text, len(text)

    def _encode(self, tokenizer, texts: list[str]) -> list[list[int]]:
        end = _end_of_text(tokenizer)
        return [ids + [end] for ids in chat.plain_encoder(tokenizer).encode_batch(texts)]

    def _cut(self, ids: list[int], path, line, report) -> Iterator[tuple[np.ndarray, None]]:
        ids = np.array(ids)
        for start in range(0, len(ids) - 1, self.max_length - 1):
            yield ids[start : start + self.max_length], None


class SFTDataset(_TokenDataset):
    """Conversations in chat.to_messages' formats; targets are the assistant's words and their <|im_end|>.

    A sample longer than max_length is cut there, or dropped when no target is left; both are counted.
    """

    kind = "sft"

    def _prepare(self, tokenizer, record: dict) -> tuple[list, int]:
        pieces = chat.write_chat(tokenizer, *chat.to_messages(record))
        return pieces, sum(len(text) for text, _, _ in pieces)

    def _encode(self, tokenizer, conversations: list[list]) -> list[tuple[list[int], list[int]]]:
        return chat.encode_pieces(tokenizer, conversations)

    def _cut(self, sample: tuple, path, line, report) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        ids, mask = sample
        if len(ids) > self.max_length:
            trained = any(mask[: self.max_length])
            what = "cut" if trained else "dropped (no assistant's word before that)"
            reason = f"a sample of {len(ids)} tokens, longer than a row of {self.max_length}: {what}"
            report.add(path, line, reason, kind=f"samples over {self.max_length} tokens {what}")
            if not trained:
                return
        yield np.array(ids[: self.max_length]), np.array(mask[: self.max_length], dtype=np.uint8)


def _batches(records: Iterator) -> Iterator[list]:
    batch, chars = [], 0
    for item in records:
        batch.append(item)
        chars += item[-1]
        if len(batch) >= BATCH_RECORDS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _end_of_text(tokenizer) -> int:
    """What ends a pretraining document. Raises DataError when the tokenizer has nothing for it."""
    control = chat.plain_encoder(tokenizer).control
    end = control.get("<|endoftext|>", tokenizer.eos_token_id)
    if end is None:
        raise DataError("the tokenizer has neither <|endoftext|> nor an eos token to end a document with")
    return end


def token_bytes(tokenizer) -> np.ndarray:
    """UTF-8 bytes that each token stands for, by id, int64; control tokens 0. For bits per byte."""
    encoder = chat.plain_encoder(tokenizer)
    vocabulary = encoder.backend.get_vocab()
    sizes = np.zeros(max([*vocabulary.values(), *encoder.control.values()]) + 1, dtype=np.int64)
    byte_level = '"ByteLevel"' in json.dumps([encoder.config["pre_tokenizer"], encoder.config["decoder"]])
    for token, index in vocabulary.items():
        if byte_level:
            sizes[index] = len(token)  # its alphabet has one character for each byte
        elif len(token) == 6 and token.startswith("<0x"):
            sizes[index] = 1  # sentencepiece's bytes, such as <0x0A>
        else:
            sizes[index] = len(token.replace("\u2581", " ").encode("utf-8"))
    sizes[list(encoder.control.values())] = 0
    return sizes


def collate(dataset, rows: list[list[int]], pad_token_id: int) -> dict:
    """Rows of sample indices -> input_ids, labels, document_ids, each (B, T), padded right to the longest.

    document_ids number the documents of a row from 0, padding has -1; None when every row is one document,
    where causal attention needs no mask: padding on the right is seen by nobody. No rows give a 1x1 batch
    without a target, for a rank that has nothing to do in this step.
    """
    rows = [[dataset[index] for index in row] for row in rows]
    width = max([1, *(sum(len(ids) for ids, _ in row) for row in rows)])
    shape = (max(1, len(rows)), width)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, -100, dtype=torch.int64)
    document_ids = torch.full(shape, -1, dtype=torch.int64)
    for r, row in enumerate(rows):
        start = 0
        for number, (ids, targets) in enumerate(row):
            end = start + len(ids)
            input_ids[r, start:end], labels[r, start:end], document_ids[r, start:end] = ids, targets, number
            start = end
    one_each = all(len(row) == 1 for row in rows)
    return {"input_ids": input_ids, "labels": labels, "document_ids": None if one_each else document_ids}
