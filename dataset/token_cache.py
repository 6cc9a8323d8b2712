"""Tokens on disk, written at the first start and mapped at every later one. A reader may skip this file.

dataset/lm_dataset.py says how a record becomes tokens. This file does that with whole data files. A second
start tokenises nothing, and the processes of a machine share the pages. Memory does not grow with the data.

A cache is never deleted, as another run may be using it. While no run goes on, out/cache may be removed.
"""

import hashlib
import json
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import DataError
from common.files import json_text, publish, remove, temporary_path
from dataset.chat import end_of_text, plain_encoder
from dataset.encoder import CannotEncode
from dataset.messages import NothingToLearn
from dataset.records import NOTHING_TO_LEARN, Report, nothing_usable, read_records, reason_of

CACHE_DIR = Path(__file__).resolve().parents[1] / "out" / "cache"
# What is tokenised at once: enough work for all cores, and little memory.
MAX_RECORDS_OF_BATCH, MAX_CHARACTERS_OF_BATCH = 1024, 2 << 20
READS_PER_RELEASE = 16  # after so many reads mapped pages are given back; a read may bring 2 MB into memory
# The name of a cache depends on these files, too: an edited chat.py must not meet the caches it wrote before.
MODULES = ("keys", "json_records", "tables", "records", "tool_calls", "messages", "encoder", "foreign_chat",
           "chat", "token_cache", "lm_dataset", "preference")  # fmt: skip

# --- the name of a cache ------------------------------------------------------------------------------------


def cache_folder(kind: str, key: str, cache_dir=None) -> Path:
    """The folder of a cache. CACHE_DIR is looked up nowhere else."""
    return Path(cache_dir or CACHE_DIR) / f"{kind}-{key}"


def file_stamps(paths: list[str]) -> list[list]:
    """[path, size, time of change, time of status change] of each file.

    Programs that change a file and put its date back, such as `cp -p` and rsync, cannot set the last of these
    times. Only a change that keeps the size, within a tick of the clock (about 4 ms), goes unnoticed.
    """
    files = [(Path(path).resolve(), os.stat(path)) for path in paths]
    return [[str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in files]


def cache_key(paths: list[str], **settings) -> str:
    """Names what these files become under these settings; another path, size or time gives another name."""
    code = [hashlib.sha256(Path(__file__).with_name(f"{n}.py").read_bytes()).hexdigest() for n in MODULES]
    parts = json.dumps([file_stamps(paths), settings, code], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


# --- reading and writing ------------------------------------------------------------------------------------


class TokenCache:
    """A folder of flat arrays, memory-mapped; sample i is tokens[offsets[i] : offsets[i + 1]].

    Mapped pages count as the process's memory once they are read. `count_read`, called after each read, gives
    them back from time to time; they stay in the system's own cache as long as nobody needs the room.

    tokens (uint16, or uint32 for vocabularies over 65,536), mask (uint8, 1 = supervised; absent: all but the
    first), offsets (int64), lengths and num_targets (int32), num_bytes (int64), lines (int64: the line of the
    file that the sample came from), and meta.json, whose sha256 is that of all values. A cache is pickled as
    its path, so that workers map the same pages and copy none.
    """

    ARRAYS = {"tokens": "uint32", "mask": "uint8", "offsets": "int64", "lengths": "int32",
              "num_targets": "int32", "num_bytes": "int64", "lines": "int64"}  # fmt: skip

    def __init__(self, folder: Path):
        """Raises OSError or ValueError when the folder is not a complete cache."""
        self.folder, self.maps, self.reads = Path(folder), [], 0
        self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        self.mask = None
        for name, (dtype, size) in self.meta["arrays"].items():
            path = self.folder / f"{name}.bin"
            if path.stat().st_size != size * np.dtype(dtype).itemsize:
                raise ValueError(f"{path} is damaged")
            with open(path, "rb") as file:
                self.maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            setattr(self, name, np.frombuffer(self.maps[-1], dtype=dtype))

    def __len__(self) -> int:
        return len(self.lengths)

    def count_read(self) -> None:
        self.reads += 1
        if self.reads % READS_PER_RELEASE == 0 and hasattr(mmap, "MADV_DONTNEED"):  # Windows trims by itself
            for pages in self.maps:
                pages.madvise(mmap.MADV_DONTNEED)

    def __reduce__(self):
        return TokenCache, (self.folder,)


def open_cache(folder: Path) -> TokenCache | None:
    """The cache in the folder, or None when there is none or it is damaged (a machine that lost power)."""
    try:
        return TokenCache(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def disk_errors(folder: Path):
    try:
        yield
    except OSError as error:  # such as a full disk
        raise DataError(f"cannot write the token cache in {folder} ({error.strerror or error})") from None


class CacheWriter:
    """Writes a TokenCache: `with CacheWriter(folder, {name: dtype}) as writer: writer.write(name=values)`.

    The cache is complete or absent: it is written beside its folder and moved there at the end. When the
    block ends by an exception nothing is left. Raises DataError where the disk fails.
    """

    def __init__(self, folder: Path, dtypes: dict[str, str]):
        self.folder, self.dtypes, self.meta = Path(folder), dtypes, {}
        self.sizes, self.sha256 = dict.fromkeys(dtypes, 0), hashlib.sha256()

    def __enter__(self):
        with disk_errors(self.folder.parent):
            self.temporary = temporary_path(self.folder, shared=True)
            self.temporary.mkdir(parents=True)
            self.files = {name: open(self.temporary / f"{name}.bin", "wb") for name in self.dtypes}
        return self

    def write(self, **arrays):
        """Appends the values to the arrays of these names, in this order: the checksum depends on it."""
        with disk_errors(self.folder.parent):
            for name, values in arrays.items():
                values = np.asarray(values, dtype=self.dtypes[name])
                self.sizes[name] += len(values)
                self.sha256.update(values.tobytes())
                self.files[name].write(values.tobytes())

    def __exit__(self, error_type, error, traceback):
        try:
            with disk_errors(self.folder.parent):
                for file in self.files.values():
                    file.close()  # before the move: Windows does not move open files
                if error_type is None:
                    self.publish()
        finally:
            remove(self.temporary)

    def publish(self):
        """Puts the cache in its place, unless another process was faster: its result is the same."""
        arrays = {name: [self.dtypes[name], size] for name, size in self.sizes.items()}
        meta = self.meta | {"arrays": arrays, "sha256": self.sha256.hexdigest()}
        (self.temporary / "meta.json").write_text(json_text(meta), encoding="utf-8")
        try:
            if open_cache(self.folder) is None:
                remove(self.folder)  # a damaged cache
                publish(self.temporary, self.folder)
        except OSError:
            if open_cache(self.folder) is None:
                raise


# --- records -> cache ---------------------------------------------------------------------------------------


def cached_tokens(dataset, tokenizer, strict: bool, allow_unusable: bool, cache_dir=None) -> TokenCache:
    """The cache of a TokenDataset (dataset/lm_dataset.py), which is built here where there is none yet.

    Complaints about the data are repeated at every start. Raises DataError where that is fatal, and, without
    allow_unusable, for a file of which most records cannot be used.
    """
    encoder = plain_encoder(tokenizer)
    end = end_of_text(tokenizer) if dataset.kind == "pretrain" else None  # chats need no such token
    vocabulary = [encoder.config, encoder.control, encoder.start, end, tokenizer.chat_template]
    key = cache_key(dataset.paths, kind=dataset.kind, max_length=dataset.max_length, tokenizer=vocabulary,
                    **dataset.settings)  # fmt: skip
    folder = cache_folder(dataset.kind, key, cache_dir)
    cache = open_cache(folder)
    if cache is None:
        build_cache(folder, dataset, tokenizer, Report(strict))
        cache = TokenCache(folder)
    elif strict and cache.meta["examples"]:
        raise DataError(f"{cache.meta['examples'][0]} (fatal with --strict)")
    if os.environ.get("RANK", "0") == "0":
        lines = list(cache.meta["notes"])
        if cache.meta["summary"]:
            lines.append(f"{', '.join(dataset.paths)}: {cache.meta['summary']}")
        if allow_unusable:
            lines += cache.meta["refusals"]
        for line in lines:
            print(f"warning: {line}", file=sys.stderr)
    if cache.meta["refusals"] and not allow_unusable:
        raise DataError(f"{cache.meta['refusals'][0]}; --allow_unusable uses the others all the same")
    return cache


def build_cache(folder: Path, dataset, tokenizer, report: Report) -> None:
    bytes_of_token = token_bytes(tokenizer)
    dtypes = dict(TokenCache.ARRAYS, tokens="uint16" if len(bytes_of_token) <= 1 << 16 else "uint32")
    if dataset.kind == "pretrain":
        del dtypes["mask"]
    stamps, first_samples = file_stamps(dataset.paths), []  # the number of the first sample of each file
    refusals = []
    # disable=None: no bar where stderr is no terminal
    bar = tqdm(desc="tokenising", unit=" records", delay=1, disable=None, leave=False)
    with CacheWriter(folder, dtypes) as writer, bar:
        writer.write(offsets=[0])
        for path in dataset.paths:
            first_samples.append(writer.sizes["lengths"])
            for batch in batches(dataset, tokenizer, path, report):
                for line, ids, mask in samples(dataset, tokenizer, path, batch, report):
                    supervised = ids[1:] if mask is None else ids[mask == 1]
                    masks = {} if mask is None else {"mask": mask}
                    writer.write(tokens=ids, **masks, offsets=[writer.sizes["tokens"] + len(ids)],
                                 lengths=[len(ids)], num_targets=[len(supervised)],
                                 num_bytes=[bytes_of_token[supervised].sum()], lines=[line])  # fmt: skip
                bar.update(len(batch))
                if file_stamps(dataset.paths) != stamps:  # not only at the end: a log may grow for ever
                    raise DataError(f"{path}: changed while it was read; start again")
            if writer.sizes["lengths"] == first_samples[-1]:
                raise nothing_usable(path, report)
            refusals += [refusal] if (refusal := report.refusal(path)) else []
        writer.meta = dict(first_samples=first_samples, summary=report.summary(), examples=report.examples,
                           notes=report.note_lines(), refusals=refusals,
                           unusable=report.unusable.total())  # for benchmarks/data.py  # fmt: skip


def batches(dataset, tokenizer, path: str, report: Report) -> Iterator[list[tuple[int, str | list | tuple]]]:
    """The usable records of a file, some hundred at a time, as (line, text or pieces to encode)."""
    batch, characters = [], 0
    for _, line, record in read_records(path, report=report):
        notes = []
        try:
            prepared = dataset.prepare(tokenizer, record, notes.append)
        except NothingToLearn as error:
            report.add(path, line, str(error), NOTHING_TO_LEARN)
            continue
        except (DataError, RecursionError) as error:
            report.add(path, line, reason_of(error))
            continue
        for note in dict.fromkeys(notes):  # each once
            report.note(path, line, note)
        report.usable[path] += 1
        batch += [(line, one) for one in prepared]
        characters += sum(map(number_of_characters, prepared))
        if len(batch) >= MAX_RECORDS_OF_BATCH or characters >= MAX_CHARACTERS_OF_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def number_of_characters(prepared: str | list | tuple) -> int:
    """Of a text, of the pieces of a conversation, or of the two conversations of a pair."""
    if isinstance(prepared, str):
        return len(prepared)
    if isinstance(prepared, tuple):
        return sum(map(number_of_characters, prepared))
    return sum(len(text) for text, _, _ in prepared)


def samples(dataset, tokenizer, path: str, batch: list, report: Report) -> Iterator[tuple]:
    """(line, ids, mask) of the samples that a batch of records makes."""
    try:
        encoded = dataset.encode(tokenizer, [prepared for _, prepared in batch])
    except CannotEncode as error:
        if len(batch) == 1:
            report.add(path, batch[0][0], str(error))
            report.usable[path] -= 1
        else:  # To find the record, each is tried alone.
            for record in batch:
                yield from samples(dataset, tokenizer, path, [record], report)
        return
    for (line, _), record in zip(batch, encoded, strict=True):
        for ids, mask in dataset.cut(record, partial(report.add, path, line)):
            yield line, ids, mask


def token_bytes(tokenizer) -> np.ndarray:
    """UTF-8 bytes that each token stands for, by id, int64; control tokens 0. For bits per byte."""
    encoder = plain_encoder(tokenizer)
    vocabulary = encoder.backend.get_vocab()
    sizes = np.zeros(max([*vocabulary.values(), *encoder.control.values()]) + 1, dtype=np.int64)
    byte_level = '"ByteLevel"' in json.dumps([encoder.config["pre_tokenizer"], encoder.config["decoder"]])
    for token, index in vocabulary.items():
        if token in encoder.ordinary:  # an added token is written as it is
            sizes[index] = len(token.encode("utf-8"))
        elif byte_level:
            sizes[index] = len(token)  # its alphabet has one character for each byte
        elif len(token) == 6 and token.startswith("<0x"):
            sizes[index] = 1  # sentencepiece's bytes, such as <0x0A>
        else:
            sizes[index] = len(token.replace("\u2581", " ").encode("utf-8"))
    sizes[list(encoder.control.values())] = 0
    return sizes
