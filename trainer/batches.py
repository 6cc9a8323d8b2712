"""The rows of each batch of a run, cut into what this rank's forward passes read."""

import math

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.lm_dataset import collate
from dataset.packing import Order, pack_rows, single_rows
from trainer.distributed import Ranks


class Batches(Dataset):
    """Batch number b of the run, as micro-batches of this rank: item b -> (micro-batches, targets, tokens).

    Every rank knows the rows of every batch, so it knows the number of supervised tokens (`targets`) on all
    ranks without asking. The loss of a step is the sum over supervised tokens divided by that number, never a
    mean of means: with 10 tokens of loss 1 here and 30 of loss 3 there it is (10 + 90) / 40 = 2.5, not 2.

    `replayed` are the samples of old data of which --replay mixes rows into every epoch, in the part that the
    flag names: 90 rows of new data and a replay of 0.1 make epochs of 100 rows, 10 of them old.
    """

    def __init__(self, dataset, samples: np.ndarray, args, pad_token_id: int, ranks: Ranks,
                 replayed: np.ndarray | None = None):
        self.dataset, self.pad_token_id, self.seed = dataset, pad_token_id, args.seed
        self.rank, self.world_size = ranks.rank, ranks.world_size  # not `ranks`, which no worker can be sent
        self.batch_size, self.micro_batch_size = args.batch_size, args.micro_batch_size
        self.samples, self.replayed = samples, replayed

        def fill(samples):
            return (pack_rows(dataset.lengths, args.max_seq_len, args.seed, samples) if args.packing
                    else single_rows(len(samples), args.seed))

        self.rows, self.num_old = fill(samples), 0  # num_old: rows of old data in an epoch
        if replayed is not None:
            self.old_rows = fill(replayed)
            self.num_old = max(1, round(len(self.rows) * args.replay / (1 - args.replay)))
        self.epoch, self.order = -1, None

    def __len__(self) -> int:
        """Batches in one pass over the data; the last may be smaller, and counts by its tokens."""
        return math.ceil((len(self.rows) + self.num_old) / self.batch_size)

    def rows_of(self, number: int) -> list[list[int]]:
        """The sample numbers of each row of batch `number`."""
        epoch, number = divmod(number, len(self))
        if epoch != self.epoch:  # each pass has an order of its own, which the seed decides
            self.epoch = epoch
            self.order = Order(len(self.rows) + self.num_old, [self.seed, epoch])
            if self.num_old:
                self.old = shuffled_again(len(self.old_rows), epoch * self.num_old, self.num_old, self.seed)
        chosen = self.order[number * self.batch_size:(number + 1) * self.batch_size]
        new = len(self.rows)
        return [self.samples[self.rows[i]] if i < new else self.replayed[self.old_rows[self.old[i - new]]]
                for i in chosen]

    def __getitem__(self, number: int) -> tuple[list[dict], int, int]:
        rows = self.rows_of(number)
        samples = np.concatenate(rows)
        mine = rows[self.rank::self.world_size]
        share = math.ceil(len(rows) / self.world_size)  # rows of the fullest rank
        size = self.micro_batch_size or share
        # All ranks make the same number of forward passes; one with no rows left gets a row without targets.
        micro = [collate(self.dataset, mine[i:i + size], self.pad_token_id) for i in range(0, share, size)]
        return micro, int(self.dataset.num_targets[samples].sum()), int(self.dataset.lengths[samples].sum())


def shuffled_again(size: int, start: int, count: int, seed: int) -> np.ndarray:
    """Items start .. start + count - 1 of an endless sequence: 0 .. size - 1 shuffled, shuffled anew, ..."""
    first, last = start // size, (start + count - 1) // size
    shuffles = [np.random.default_rng([seed, i, 1]).permutation(size) for i in range(first, last + 1)]
    return np.concatenate(shuffles)[start - first * size:][:count]


def split(dataset, eval_fraction: float, seed: int) -> tuple[Order, Order]:
    """Sample numbers for training and for validation, by a seeded shuffle; of n_train and of n_eval."""
    order = Order(len(dataset), seed)
    held_out = int(len(dataset) * eval_fraction)
    return order[held_out:], order[:held_out]


def to_device(batch: dict, device: torch.device) -> dict:
    return {k: v if v is None else v.to(device, non_blocking=True) for k, v in batch.items()}
