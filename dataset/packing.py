"""Rows filled with whole documents, and the token cache on disk.

Without packing, a batch of short documents is mostly padding. `pack_rows` puts several into one row, never
cutting one ("Fewer Truncations Improve Language Modeling", Ding et al. 2024, https://arxiv.org/abs/2404.10830);
document ids then keep them from seeing each other. `TokenCache` holds what tokenisation made as memory-mapped
arrays: a second start reads nothing, and the processes of a machine share the pages. Nothing here grows with
the data: long orders are computed item by item, long packings lie on disk, and read pages are given back.

A cache is never deleted, as another run may be using it; without a run, out/cache may be removed at any time.
"""

import copy
import hashlib
import json
import mmap
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.jsonl import DataError

CACHE_DIR = Path(__file__).resolve().parents[1] / "out" / "cache"
TABLE = 1 << 20  # numbers up to which an order is held as a table
CHUNK = 1 << 17  # documents that are packed together; more of them fill the rows no better
FORGET = 16  # reads after which mapped pages are given back: each may have brought 2 MB into memory


class Order(Sequence):
    """The numbers 0 .. size - 1 in a seeded random order (seed None: as they are), of any size.

    order[i] is a number, order[[3, 5]] an array, order[2:9] an Order again. A long one takes no memory: a
    Feistel network (Luby and Rackoff 1988, https://doi.org/10.1137/0217022) maps the numbers under a power of
    4 one to one; a result that is too large goes through it again until it is under `size`.
    """

    def __init__(self, size: int, seed=None):
        self.size, self.seed, self.part, self.table = size, seed, range(size), None
        rng = np.random.default_rng(seed)
        if seed is not None and size <= TABLE:
            self.table = rng.permutation(size)
        self.half = (max(1, size - 1).bit_length() + 1) // 2  # bits of half a number
        self.keys = rng.integers(0, 1 << 64, 6, dtype=np.uint64).tolist()

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index):
        if isinstance(index, slice):
            order = copy.copy(self)
            order.part = self.part[index]
            return order
        if isinstance(index, list):  # a row's worth; numpy pays from some dozens on
            return np.array([self[i] for i in index], dtype=np.int64)
        if isinstance(index, (int, np.integer)):
            number = self.part[index]
            if self.seed is None or self.table is not None:
                return number if self.seed is None else int(self.table[number])
            while (number := self._mix(number)) >= self.size:
                pass
            return number
        return self._numbers(self.part.start + np.asarray(index, dtype=np.int64) * self.part.step)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        places = np.arange(self.part.start, self.part.stop, self.part.step)
        return self._numbers(places).astype(dtype or np.int64)

    def __repr__(self) -> str:
        return f"Order({self.size}, {self.seed})[{self.part}]"

    def _numbers(self, places: np.ndarray) -> np.ndarray:
        if self.seed is None:
            return places
        if self.table is not None:
            return self.table[places]
        numbers = self._mix(places.astype(np.uint64))
        while (large := numbers >= self.size).any():
            numbers[large] = self._mix(numbers[large])
        return numbers.astype(np.int64)

    def _mix(self, numbers):
        """One number, or an array of uint64, to as many others under 4 ** half."""
        mask = (1 << self.half) - 1
        left, right = numbers >> self.half, numbers & mask
        for key in self.keys:
            mixed = (right ^ key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32 & mask)
        return left << self.half | right


class Rows(Sequence):
    """rows[i] is the list of the samples in row i; held as two flat arrays, for millions of documents."""

    def __init__(self, samples, offsets, cache: "TokenCache | None" = None):
        self.samples, self.offsets, self.cache = samples, offsets, cache

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> list[int]:
        index = range(len(self))[index]  # negative indices; IndexError at the end
        row = self.samples[self.offsets[index] : self.offsets[index + 1]]
        if self.cache is not None:
            self.cache.was_read()
        return row.tolist() if isinstance(row, np.ndarray) else list(row)

    def __reduce__(self):
        return (Rows, (self.samples, self.offsets)) if self.cache is None else (_mapped_rows, (self.cache,))


def _mapped_rows(cache: "TokenCache") -> Rows:
    return Rows(cache.samples, cache.offsets, cache)


def single_rows(count: int, seed: int) -> Rows:
    """Every sample in a row of its own, in seeded random order: what training without packing uses."""
    return Rows(Order(count, seed), Order(count + 1))


def pack_rows(lengths: np.ndarray, max_length: int, seed: int, samples=None, cache_dir=None) -> Rows:
    """Best-fit packing: samples in seeded random order, each into the fullest row that still has room for it.

    lengths: tokens of each sample. samples: the numbers of those to pack (None: all); the rows hold places in
    it, rows[0] = [4] being samples[4]. Up to CHUNK samples are packed at once; more in chunks of that order,
    one after the other, into a cache in `cache_dir`, which the next start maps.

    Best-fit rather than best-fit-decreasing: sorting by length fills rows slightly better, but then the
    shortest documents, which are of one kind, end up together. Every sample is in exactly one row and no row
    is longer than max_length. Raises DataError when a sample is.

    Finding the row: open rows are stacked by the room they have left, and bit r of `has_room` says that stack
    r is not empty. For a document of 5 tokens the lowest set bit of has_room >> 5 leads to the tightest row.
    """
    lengths = np.asarray(lengths)
    samples = Order(len(lengths)) if samples is None else samples
    if len(samples) <= CHUNK:
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(samples))
        return Rows(*_pack(order, lengths[samples[order]], max_length, rng))
    name = hashlib.sha256(f"{max_length} {seed} {samples!r}".encode() + Path(__file__).read_bytes())
    for start in range(0, len(lengths), CHUNK):
        name.update(lengths[start : start + CHUNK].tobytes())
    if isinstance(samples, np.ndarray):
        name.update(samples.tobytes())
    folder = Path(cache_dir or CACHE_DIR) / f"rows-{name.hexdigest()[:32]}"
    if (cache := open_cache(folder)) is None:
        order = Order(len(samples), seed)
        with CacheWriter(folder, {"samples": "int64", "offsets": "int64"}) as writer:
            writer.write("offsets", [0])
            for start in range(0, len(samples), CHUNK):
                chunk = np.asarray(order[start : start + CHUNK])
                rng = np.random.default_rng([seed, start])
                packed, offsets = _pack(chunk, lengths[samples[chunk]], max_length, rng)
                writer.write("samples", packed)
                writer.write("offsets", start + offsets[1:])
        cache = TokenCache(folder)
    return _mapped_rows(cache)


def _pack(order: np.ndarray, lengths: np.ndarray, max_length: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Rows, as samples and offsets, of the samples `order`, taken one after the other; their lengths."""
    if len(lengths) and lengths.max() > max_length:
        raise DataError(f"a sample of {lengths.max()} tokens does not fit a row of {max_length}")
    row_of = np.empty(len(lengths), dtype=np.int64)  # by position in `order`
    stacks: dict[int, list[int]] = {}  # room left -> open rows with that room
    has_room, num_rows = 0, 0
    for position, length in enumerate(lengths.tolist()):
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
    return order[np.argsort(row_of, kind="stable")], offsets


def stamps(paths: list[str]) -> list[list]:
    """[path, size, time of change, time of status change] of each file.

    The last one is the system's own: a program that changes a file and puts its date back, as `cp -p` and
    rsync do, can't set it. Only a change of equal size within a tick of the clock (about 4 ms) shows in none.
    """
    files = [(path, os.stat(path)) for path in paths]
    return [[str(Path(p).resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for p, stat in files]


def fingerprint(paths: list[str], **settings) -> str:
    """Names what these files become under these settings; another path, size or time gives another name."""
    # the code that tokenises is part of the result: an edited chat.py must not meet old caches
    names = ("jsonl.py", "chat.py", "foreign_chat.py", "lm_dataset.py", "packing.py")
    code = [hashlib.sha256((Path(__file__).parent / name).read_bytes()).hexdigest() for name in names]
    parts = json.dumps([stamps(paths), settings, code], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


class TokenCache:
    """A folder of flat arrays, memory-mapped; sample i is tokens[offsets[i] : offsets[i + 1]].

    Mapped pages count as the process's memory once they are read; `was_read`, called after each read, gives
    them back from time to time. They stay in the system's own cache as long as nobody needs the room.

    tokens (uint16, or uint32 for vocabularies over 65,536), mask (uint8, 1 = supervised; absent: all but the
    first), offsets (int64), lengths and num_targets (int32), num_bytes (int64), lines (int64: of the file it
    came from), and meta.json, whose sha256 is that of all values. Pickles as its path, so that workers map
    the same pages and copy none.
    """

    ARRAYS = {"tokens": "uint32", "mask": "uint8", "offsets": "int64", "lengths": "int32",
              "num_targets": "int32", "num_bytes": "int64", "lines": "int64"}  # fmt: skip

    def __init__(self, folder: Path):
        """Raises OSError or ValueError when the folder is not a complete cache."""
        self.folder, self.maps, self.reads = Path(folder), [], 0
        self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        for name, (dtype, size) in self.meta["arrays"].items():
            path = self.folder / f"{name}.bin"
            if path.stat().st_size != size * np.dtype(dtype).itemsize:
                raise ValueError(f"{path} is damaged")
            with open(path, "rb") as file:
                self.maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            setattr(self, name, np.frombuffer(self.maps[-1], dtype=dtype))
        if "mask" not in self.meta["arrays"]:
            self.mask = None

    def __len__(self) -> int:
        return len(self.lengths)

    def was_read(self) -> None:
        self.reads += 1
        if self.reads % FORGET == 0 and hasattr(mmap, "MADV_DONTNEED"):  # Windows trims by itself
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


class CacheWriter:
    """Writes a TokenCache: `with CacheWriter(folder, {name: dtype, ...}) as writer: writer.write(name, ...)`.

    The work is done in a temporary folder beside the final one and renamed at the end, so a cache is complete
    or absent; when the block ends by an exception nothing is left.
    """

    def __init__(self, folder: Path, dtypes: dict[str, str]):
        self.folder, self.dtypes, self.meta = Path(folder), dtypes, {}

    def __enter__(self):
        parent = self.folder.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for old in parent.glob("tmp-*/offsets.bin"):  # left by killed runs; a young one may be at work
                if time.time() - old.stat().st_mtime > 86400:
                    shutil.rmtree(old.parent, ignore_errors=True)
            self.temporary = parent / f"tmp-{uuid.uuid4().hex}"
            self.temporary.mkdir()
            self.files = {name: open(self.temporary / f"{name}.bin", "wb") for name in self.dtypes}
        except OSError as error:
            raise self._failed(error) from None
        self.sizes, self.sha256 = dict.fromkeys(self.dtypes, 0), hashlib.sha256()
        return self

    def _failed(self, error: OSError) -> DataError:
        return DataError(f"cannot write the token cache in {self.folder.parent} ({error.strerror or error})")

    def write(self, name: str, values):
        """Appends to an array."""
        values = np.asarray(values, dtype=self.dtypes[name])
        self.sha256.update(values.tobytes())
        try:
            self.files[name].write(values.tobytes())
        except OSError as error:  # a full disk
            raise self._failed(error) from None
        self.sizes[name] += len(values)

    def add(self, ids: np.ndarray, mask: np.ndarray | None, num_targets: int, num_bytes: int, line: int):
        """One sample: token ids, mask (None: all but the first are supervised), what they count, its line."""
        if not self.sizes["offsets"]:
            self.write("offsets", [0])
        self.write("tokens", ids)
        if mask is not None:
            self.write("mask", mask)
        self.write("offsets", [self.sizes["tokens"]])
        self.write("lengths", [len(ids)])
        self.write("num_targets", [num_targets])
        self.write("num_bytes", [num_bytes])
        self.write("lines", [line])

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
