"""Rows filled with whole documents. A reader may skip this file.

Without packing, a batch of short documents is mostly padding. `pack_rows` puts several into one row and cuts
none ("Fewer Truncations Improve Language Modeling", Ding et al. 2024, https://arxiv.org/abs/2404.10830);
document ids then keep them from seeing each other. Memory does not grow with the data: the numbers of a long
order are computed one by one, and a long packing lies on disk.
"""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from common.errors import DataError
from dataset.token_cache import CacheWriter, TokenCache, cache_folder, open_cache

MAX_NUMBERS_IN_TABLE = 1 << 20  # an order of more numbers is computed
SAMPLES_PACKED_TOGETHER = 1 << 17  # more of them fill the rows no better


class Order(Sequence):
    """The numbers 0 .. size - 1 in a seeded random order (seed None: as they are), of any size.

    order[i] is a number, order[[3, 5]] an array, order[2:9] an Order again. A long order takes no memory: a
    Feistel network (Luby and Rackoff 1988, https://doi.org/10.1137/0217022) maps the numbers under a power of
    4 one to one. Where the result is not under `size`, the result goes through the network again.
    """

    def __init__(self, size: int, seed=None):
        self.size, self.seed, self.part, self.table = size, seed, range(size), None
        rng = np.random.default_rng(seed)
        if seed is not None and size <= MAX_NUMBERS_IN_TABLE:
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
        if isinstance(index, list):  # one row's samples; numpy is faster only for more than some dozens
            return np.array([self[i] for i in index], dtype=np.int64)
        if isinstance(index, (int, np.integer)):
            number = self.part[index]
            if self.seed is None or self.table is not None:
                return int(self._numbers(number))
            number = self._mix(number)
            while number >= self.size:
                number = self._mix(number)
            return number
        return self._numbers(self.part.start + np.asarray(index, dtype=np.int64) * self.part.step)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[np.arange(len(self))].astype(dtype or np.int64)

    def __repr__(self) -> str:
        return f"Order({self.size}, {self.seed})[{self.part}]"

    def _numbers(self, places):
        """The numbers at these places of the whole order. A computed order needs an array of places."""
        if self.seed is None:
            return places
        if self.table is not None:
            return self.table[places]
        numbers = self._mix(places.astype(np.uint64))
        while numbers.max(initial=0) >= self.size:
            too_large = numbers >= self.size
            numbers[too_large] = self._mix(numbers[too_large])
        return numbers.astype(np.int64)

    def _mix(self, numbers):
        """The network: one number, or an array of uint64, to as many other numbers under 4 ** half."""
        mask = (1 << self.half) - 1
        left, right = numbers >> self.half, numbers & mask
        for key in self.keys:
            mixed = (right ^ key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32 & mask)
        return left << self.half | right


class Rows(Sequence):
    """rows[i] is the list of the samples in row i; held as two flat arrays, for millions of documents.

    arrays: an object that holds them as `samples` and `offsets`. A TokenCache on disk is such an object.
    """

    def __init__(self, arrays: TokenCache | SimpleNamespace):
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays.offsets) - 1

    def __getitem__(self, index: int) -> list[int]:
        index = range(len(self))[index]  # negative indices; IndexError at the end
        row = self.arrays.samples[self.arrays.offsets[index] : self.arrays.offsets[index + 1]]
        if isinstance(self.arrays, TokenCache):
            self.arrays.count_read()
        return row.tolist() if isinstance(row, np.ndarray) else list(row)


def single_rows(count: int, seed: int) -> Rows:
    """Every sample in a row of its own, in seeded random order: what training without packing uses."""
    return Rows(SimpleNamespace(samples=Order(count, seed), offsets=Order(count + 1)))


def pack_rows(lengths: np.ndarray, max_length: int, seed: int, samples=None, cache_dir=None) -> Rows:
    """Best-fit packing: samples in seeded random order, each into the fullest row that still has room for it.

    lengths: tokens of each sample. samples: the numbers of those to pack (None: all). The rows hold places in
    `samples`: rows[0] = [4] is the sample samples[4]. More than SAMPLES_PACKED_TOGETHER are packed in groups,
    one after the other, into a cache in `cache_dir`, which the next start maps.

    We use best-fit and not best-fit-decreasing. Sorting by length fills rows slightly better, but then the
    shortest documents, which are of one kind, end up together. Every sample is in exactly one row, and no row
    is longer than max_length. Raises DataError when a sample is.
    """
    lengths = np.asarray(lengths)
    samples = Order(len(lengths)) if samples is None else samples
    if len(samples) <= SAMPLES_PACKED_TOGETHER:
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(samples))
        return Rows(best_fit(order, lengths[samples[order]], max_length, rng))

    key = hashlib.sha256(f"{max_length} {seed} {samples!r}".encode() + Path(__file__).read_bytes())
    key.update(np.ascontiguousarray(lengths))
    if isinstance(samples, np.ndarray):
        key.update(np.ascontiguousarray(samples))
    folder = cache_folder("rows", key.hexdigest()[:32], cache_dir)
    cache = open_cache(folder)
    if cache is None:
        order = Order(len(samples), seed)
        with CacheWriter(folder, {"samples": "int64", "offsets": "int64"}) as writer:
            writer.write(offsets=[0])
            for start in range(0, len(samples), SAMPLES_PACKED_TOGETHER):
                group = np.asarray(order[start : start + SAMPLES_PACKED_TOGETHER])
                rng = np.random.default_rng([seed, start])
                packed = best_fit(group, lengths[samples[group]], max_length, rng)
                writer.write(samples=packed.samples, offsets=start + packed.offsets[1:])
        cache = TokenCache(folder)
    return Rows(cache)


def best_fit(order: np.ndarray, lengths: np.ndarray, max_length: int, rng) -> SimpleNamespace:
    """The arrays `samples` and `offsets` of Rows that hold the samples `order`, taken one after the other.

    To find the row: open rows are stacked by the room that they have left, and bit r of `has_room` says that
    the stack of rows with r tokens of room is not empty. For a document of 5 tokens the lowest set bit of
    has_room >> 5 leads to the tightest row.
    """
    if len(lengths) and lengths.max() > max_length:
        raise DataError(f"a sample of {lengths.max()} tokens does not fit a row of {max_length}")
    row_of = np.empty(len(lengths), dtype=np.int64)  # by position in `order`
    stacks: dict[int, list[int]] = {}  # room left -> open rows with that room
    has_room, num_rows = 0, 0
    for position, length in enumerate(lengths.tolist()):
        fitting = has_room >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # this is the lowest bit that is set
            row = stacks[room].pop()
            if not stacks[room]:
                has_room ^= 1 << room
        else:
            room, row = max_length, num_rows
            num_rows += 1
        row_of[position] = row
        # A full row goes onto a stack, too: that of no room, where no document looks for a row.
        room -= length
        stacks.setdefault(room, []).append(row)
        has_room |= 1 << room
    # The rows are shuffled, too, as the first ones opened are the fullest.
    row_of = rng.permutation(num_rows)[row_of]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return SimpleNamespace(samples=order[np.argsort(row_of, kind="stable")], offsets=offsets)
