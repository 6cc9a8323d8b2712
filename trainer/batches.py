"""Which rows of the data each step reads, and how they are divided among processes and forward passes."""

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset

from dataset.packing import Order, pack_rows, single_rows
from trainer.distributed import Ranks


class Batches(Dataset):
    """The batches of a run: batches[n] is what this process reads as its n-th batch, for every n from 0 on.

    There is no last batch: after len(self) batches, which are one epoch, the next epoch begins.

    batches[n] is (micro-batches, number of units, number of tokens). A micro-batch holds the rows of one
    forward pass of this process. Units are what the loss is a mean over: supervised tokens, or pairs. Both
    numbers are those of all processes together. Every process knows the rows of every batch, so none has to
    ask the others for these numbers. A batch follows from its number and the seed alone, so a resumed run
    reads what the first run would have read.

        6 rows in a batch, 2 processes, micro_batch_size 2
        process 0   rows 0 2 4   in two forward passes: [0 2] [4]
        process 1   rows 1 3 5   in two forward passes: [1 3] [5]

    replayed: the sample numbers of old data. replay: which part of the rows of each epoch is old data. 90
    rows of new data and a replay of 0.1 make epochs of 100 rows, 10 of them old.
    """

    def __init__(self, dataset, samples: np.ndarray, ranks: Ranks, *, batch_size: int, max_seq_len: int,
                 seed: int, pad_token_id: int, micro_batch_size: int | None = None, packing: bool = True,
                 replayed: np.ndarray | None = None, replay: float = 0.0):
        self.dataset, self.samples, self.replayed = dataset, samples, replayed
        self.rank, self.world_size = ranks.rank, ranks.world_size  # a DataLoader cannot copy `ranks`
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.pad_token_id, self.seed = pad_token_id, seed

        # The rows hold places in `numbers`, and no sample numbers: if numbers[3] is 17, a 3 means sample 17.
        def fill_rows(numbers):
            if packing:
                return pack_rows(dataset.lengths, max_seq_len, seed, numbers)
            return single_rows(len(numbers), seed)

        self.rows = fill_rows(samples)
        self.num_old = 0  # rows of old data in each epoch
        if replayed is not None:
            self.old_rows = fill_rows(replayed)
            # This solves old / (new + old) = replay for old.
            self.num_old = max(1, round(len(self.rows) * replay / (1 - replay)))
        self.epoch = -1  # the epoch for which begin_epoch has prepared an order; -1: none yet

    def __len__(self) -> int:
        """Batches in one epoch. The last one may have fewer rows."""
        return math.ceil((len(self.rows) + self.num_old) / self.batch_size)

    def __getitem__(self, number: int) -> tuple[list[dict], int, int]:
        rows = self.rows_of(number)
        samples = np.concatenate(rows)
        micro_batches = [self.dataset.collate(part, self.pad_token_id) for part in self.forward_passes(rows)]
        num_units = int(self.dataset.num_units[samples].sum())
        num_tokens = int(self.dataset.lengths[samples].sum())
        return micro_batches, num_units, num_tokens

    def forward_passes(self, rows: list) -> list[list]:
        """The rows that this process has of a batch, in parts: one for each of its forward passes."""
        mine = rows[self.rank::self.world_size]
        share = math.ceil(len(rows) / self.world_size)  # rows of a process; some processes may have one fewer
        size = self.micro_batch_size or share
        # All processes make the same number of forward passes. Where a process has no row left, its
        # micro-batch has no target.
        return [mine[start:start + size] for start in range(0, share, size)]

    def rows_of(self, number: int) -> list[np.ndarray]:
        """The sample numbers in each row of batch `number`."""
        epoch, place = divmod(number, len(self))
        if epoch != self.epoch:
            self.begin_epoch(epoch)
        chosen = self.order[place * self.batch_size:(place + 1) * self.batch_size]
        return [self.row(index) for index in chosen]

    def begin_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own, which the seed decides."""
        self.epoch = epoch
        self.order = Order(len(self.rows) + self.num_old, [self.seed, epoch])
        if self.num_old:
            used = epoch * self.num_old  # old rows in all epochs before
            self.old_in_epoch = shuffled_again(len(self.old_rows), used, self.num_old, self.seed)

    def row(self, index: int) -> np.ndarray:
        """The sample numbers in one row of the epoch. New rows have the first indices, old rows the last."""
        if index < len(self.rows):
            places = self.rows[index]
            return self.samples[places]
        old_row = self.old_in_epoch[index - len(self.rows)]
        places = self.old_rows[old_row]
        return self.replayed[places]

    # For validation, for the log and for messages

    def one_epoch(self) -> Iterator[dict]:
        """The micro-batches of this process in one pass over the data."""
        for number in range(len(self)):
            yield from self[number][0]

    def description(self) -> str:
        old = f" and {self.num_old:,} old" if self.num_old else ""
        return f"{len(self.rows):,}{old} rows"

    def identity(self) -> str:
        """A text with a checksum of the data: it changes if any sample changes."""
        return self.dataset.identity

    def num_bytes(self) -> int:
        """UTF-8 bytes of the supervised text in one pass over the data; 0: bits per byte mean nothing."""
        return int(self.dataset.num_bytes[self.samples].sum())

    def state(self) -> dict:
        """What a checkpoint must hold of the batches. Here nothing: they follow from their numbers."""
        return {}

    def load_state(self, state: dict) -> None:
        """Takes back what `state` gave."""

    def singly(self, number: int) -> Iterator[tuple[str, dict]]:
        """Yields for each sample of batch `number` its record ("x.jsonl:17") and a batch of it alone."""
        for sample in np.concatenate(self.rows_of(number)).tolist():
            yield self.dataset.where(sample), self.dataset.collate([[sample]], self.pad_token_id)


def shuffled_again(size: int, start: int, count: int, seed: int) -> np.ndarray:
    """`count` numbers of an endless sequence, from place `start` on.

    The sequence is 0, 1, ... size - 1 in a random order, then the same numbers in another random order, and
    so on. So each epoch takes the next old rows, and all are used equally often.
    """
    first, last = start // size, (start + count - 1) // size
    # The 1 keeps these random numbers apart from those of Order, whose seed is [seed, epoch].
    shuffles = [np.random.default_rng([seed, i, 1]).permutation(size) for i in range(first, last + 1)]
    begin = start - first * size
    return np.concatenate(shuffles)[begin:begin + count]


def split(dataset, eval_fraction: float, seed: int) -> tuple[Order, Order]:
    """Sample numbers for training and for validation: a seeded shuffle, cut in two."""
    order = Order(len(dataset), seed)
    held_out = int(len(dataset) * eval_fraction)
    return order[held_out:], order[:held_out]
