"""Rows filled with whole documents, and the token cache on disk.

Without packing, a batch of short documents is mostly padding. `pack_rows` puts several into one row, never
cutting one ("Fewer Truncations Improve Language Modeling", Ding et al. 2024, https://arxiv.org/abs/2404.10830);
document ids then keep them from seeing each other. `TokenCache` holds what tokenisation made as memory-mapped
arrays: a second start reads nothing, and the processes of a machine share the pages.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.jsonl import DataError

CACHE_DIR = Path(__file__).resolve().parents[1] / "out" / "cache"


class Rows(Sequence):
    """rows[i] is the list of the samples in row i; held as two flat arrays, for millions of documents."""

    def __init__(self, samples: np.ndarray, offsets: np.ndarray):
        self.samples, self.offsets = samples, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> list[int]:
        index = range(len(self))[index]  # negative indices; IndexError at the end
        return self.samples[self.offsets[index] : self.offsets[index + 1]].tolist()


def single_rows(count: int, seed: int) -> Rows:
    """Every sample in a row of its own, in seeded random order: what training without packing uses."""
    return Rows(np.random.default_rng(seed).permutation(count), np.arange(count + 1))


def pack_rows(lengths: np.ndarray, max_length: int, seed: int) -> Rows:
    """Best-fit packing: samples in seeded random order, each into the fullest row that still has room for it.

    Best-fit rather than best-fit-decreasing: sorting by length fills rows slightly better, but then the
    shortest documents, which are of one kind, end up together. Every sample is in exactly one row and no row
    is longer than max_length. Raises DataError when a sample is.

    Finding the row: open rows are stacked by the room they have left, and bit r of `has_room` says that stack
    r is not empty. For a document of 5 tokens the lowest set bit of has_room >> 5 leads to the tightest row.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > max_length:
        raise DataError(f"a sample of {lengths.max()} tokens does not fit a row of {max_length}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    row_of = np.empty(len(lengths), dtype=np.int64)  # by position in `order`
    stacks: dict[int, list[int]] = {}  # room left -> open rows with that room
    has_room, num_rows = 0, 0
    for position, sample in enumerate(order):
        length = int(lengths[sample])
        fitting = has_room >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = stacks[room].pop()
            if not stacks[room]:
                has_room ^= 1 << room
        else:
            room, row = max_length, num_rows
            num_rows += 1
        row_of[position] = row
        room -= length
        if room:
            stacks.setdefault(room, []).append(row)
            has_room |= 1 << room
    # rows in random order too: the first ones opened are the fullest
    row_of = rng.permutation(num_rows)[row_of]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return Rows(order[np.argsort(row_of, kind="stable")], offsets)


def fingerprint(paths: list[str], **settings) -> str:
    """Names what these files become under these settings; another path, size or time gives another name."""
    files = []
    for path in paths:
        stat = os.stat(path)
        files.append([str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns])
    # the code that tokenises is part of the result: an edited chat.py must not meet old caches
    names = ("jsonl.py", "chat.py", "foreign_chat.py", "lm_dataset.py", "packing.py")
    code = [hashlib.sha256((Path(__file__).parent / name).read_bytes()).hexdigest() for name in names]
    return hashlib.sha256(json.dumps([files, settings, code], sort_keys=True).encode()).hexdigest()[:32]


class TokenCache:
    """A folder of flat arrays, memory-mapped; sample i is tokens[offsets[i] : offsets[i + 1]].

    tokens (uint16, or uint32 for vocabularies over 65,536), mask (uint8, 1 = supervised; absent: all but the
    first), offsets (int64), lengths and num_targets (int32), num_bytes (int64), and meta.json, whose sha256
    is that of all values. Pickles as its path, so that worker processes map the same pages and copy none.
    """

    ARRAYS = {"tokens": None, "mask": "uint8", "offsets": "int64", "lengths": "int32",
              "num_targets": "int32", "num_bytes": "int64"}  # fmt: skip

    def __init__(self, folder: Path):
        """Raises OSError or ValueError when the folder is not a complete cache."""
        self.folder = Path(folder)
        self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        for name, (dtype, size) in self.meta["arrays"].items():
            path = self.folder / f"{name}.bin"
            if path.stat().st_size != size * np.dtype(dtype).itemsize:
                raise ValueError(f"{path} is damaged")
            setattr(self, name, np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(size,))))
        if "mask" not in self.meta["arrays"]:
            self.mask = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self):
        return TokenCache, (self.folder,)


def open_cache(folder: Path) -> TokenCache | None:
    """The cache in the folder, or None when there is none or it is damaged (a machine that lost power)."""
    try:
        return TokenCache(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


class CacheWriter:
    """Writes a TokenCache sample by sample: `with CacheWriter(folder, ...) as writer: writer.add(...)`.

    The work is done in a temporary folder beside the final one and renamed at the end, so a cache is complete
    or absent; when the block ends by an exception nothing is left.
    """

    def __init__(self, folder: Path, token_dtype: str, with_mask: bool):
        self.folder, self.meta = Path(folder), {}
        self.dtypes = dict(TokenCache.ARRAYS, tokens=token_dtype)
        if not with_mask:
            del self.dtypes["mask"]

    def __enter__(self):
        parent = self.folder.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for old in parent.glob("tmp-*/tokens.bin"):  # left by killed runs; a young one may be at work
                if time.time() - old.stat().st_mtime > 86400:
                    shutil.rmtree(old.parent, ignore_errors=True)
            self.temporary = parent / f"tmp-{uuid.uuid4().hex}"
            self.temporary.mkdir()
            self.files = {name: open(self.temporary / f"{name}.bin", "wb") for name in self.dtypes}
        except OSError as error:
            raise self._failed(error) from None
        self.sizes, self.sha256 = dict.fromkeys(self.dtypes, 0), hashlib.sha256()
        self._write("offsets", [0])
        return self

    def _failed(self, error: OSError) -> DataError:
        return DataError(f"cannot write the token cache in {self.folder.parent} ({error.strerror or error})")

    def _write(self, name: str, values):
        values = np.asarray(values, dtype=self.dtypes[name])
        self.sha256.update(values.tobytes())
        try:
            self.files[name].write(values.tobytes())
        except OSError as error:  # a full disk
            raise self._failed(error) from None
        self.sizes[name] += len(values)

    def add(self, ids: np.ndarray, mask: np.ndarray | None, num_targets: int, num_bytes: int):
        """One sample: token ids, their mask (None: all but the first are supervised), what they count."""
        self._write("tokens", ids)
        if mask is not None:
            self._write("mask", mask)
        self._write("offsets", [self.sizes["tokens"]])
        self._write("lengths", [len(ids)])
        self._write("num_targets", [num_targets])
        self._write("num_bytes", [num_bytes])

    def __exit__(self, kind, error, traceback):
        try:
            for file in self.files.values():
                file.close()  # before the rename: Windows does not move open files
            if kind is None:
                arrays = {name: [self.dtypes[name], size] for name, size in self.sizes.items()}
                meta = dict(self.meta, arrays=arrays, sha256=self.sha256.hexdigest())
                meta = json.dumps(meta, ensure_ascii=False, indent=1)
                (self.temporary / "meta.json").write_text(meta, encoding="utf-8")
                if open_cache(self.folder) is None:  # else another process was faster with the same result
                    shutil.rmtree(self.folder, ignore_errors=True)
                    try:
                        self.temporary.rename(self.folder)
                    except OSError:
                        if open_cache(self.folder) is None:
                            raise
        except OSError as failure:
            raise self._failed(failure) from None
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)
