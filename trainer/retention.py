"""Does fine-tuning forget? Old data is measured before and after it, and may be replayed during it.
A reader may skip this file.

A part of the old data is held out: it is measured and never replayed. So "after" shows what the model still
knows, and not what it has just rehearsed. Without --replay the same part is held out, so that two runs can be
compared.
"""

import hashlib
import math

import numpy as np
import torch
from torch.utils.data import ConcatDataset

from common.device import choose_dtype
from common.errors import UsageError
from dataset.lm_dataset import collate
from model.held_out import mean_loss
from trainer.batches import Batches, split
from trainer.distributed import Ranks

HELD_OUT_FRACTION = 0.2  # of the different samples of the old data
MAX_MEASURED_SAMPLES = 1000
MAX_TOKENS_OF_EXACT_ANSWER = 64  # nobody expects a longer answer word for word; it counts in the loss alone


class TwoDatasets(ConcatDataset):
    """New and old data as one dataset: sample i of the old data has the number len(new) + i."""

    def __init__(self, new, old):
        super().__init__([new, old])
        for name in ("lengths", "num_targets", "num_units", "num_bytes"):
            setattr(self, name, np.concatenate([getattr(new, name), getattr(old, name)]))
        self.identity = f"{new.identity}, and old data of {old.identity}"

    def collate(self, rows: list[list[int]], pad_token_id: int) -> dict:
        return collate(self, rows, pad_token_id)

    def where(self, sample: int) -> str:
        new, old = self.datasets
        return new.where(sample) if sample < len(new) else old.where(sample - len(new))


def hold_out(dataset, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers of the old data to replay, and to measure. Copies of a sample are on the same side.

    Raises UsageError where there are too few different samples to hold one out.
    """
    number_of: dict[bytes, int] = {}  # 16 bytes for each different sample -> its number
    content = np.empty(len(dataset), dtype=np.int64)  # for each sample, that number: equal for copies
    for sample, (ids, _) in enumerate(dataset):
        digest = hashlib.blake2b(ids.numpy().tobytes(), digest_size=16).digest()
        content[sample] = number_of.setdefault(digest, len(number_of))
    replayed, held_out = split(number_of, HELD_OUT_FRACTION, seed)
    if not len(held_out):
        raise UsageError(f"--retain_data_path: {len(number_of)} different records are too few to hold some "
                         f"out; give at least {math.ceil(1 / HELD_OUT_FRACTION)}")
    measured = np.flatnonzero(np.isin(content, held_out))
    measured = np.random.default_rng(seed).permutation(measured)[:MAX_MEASURED_SAMPLES]
    return np.flatnonzero(np.isin(content, replayed)), np.sort(measured)


def measure(model, eval_batches: Batches | None, retained: Batches | None, dtype: str, ranks: Ranks) -> dict:
    """{"new": ..., "old": ...}, each {"loss", "exact", "answers", "samples"}; {} without old data.

    exact: the part of the short answers that greedy decoding would give word for word, end of turn included.
    No decoding is needed to know this. Greedy decoding follows the true words for as long as each of them is
    the likeliest one after the true words before it, and one forward pass shows that for all words at once.
    """
    if retained is None:
        return {}
    model.to(ranks.device)
    return {name: measure_one(model, batches, dtype, ranks)
            for name, batches in (("new", eval_batches), ("old", retained)) if batches}


def measure_one(model, batches: Batches, dtype: str, ranks: Ranks) -> dict:
    counts = torch.zeros(2, dtype=torch.int64)  # short answers, and exact ones

    def count(output, batch):
        for hidden, labels in zip(output.hidden, batch["labels"], strict=True):
            counts.add_(torch.tensor(exact_answers(output.head, hidden, labels)))

    loss, _ = mean_loss(model, batches.one_epoch(), choose_dtype(dtype, ranks.device), ranks.sum, count)
    short, exact = ranks.sum(*counts)
    return {"loss": loss, "exact": exact / short if short else None, "answers": int(short),
            "samples": len(batches.samples)}


def exact_answers(head, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
    """One row, hidden (T, C) and labels (T,) -> the number of short answers, and of exact ones among them.

        labels     -100  -100   7   8  -100  -100   5      two answers: [7, 8] and [5]
        likeliest          7    8   3    1     4    9      at the position before each label: [7, 8] is exact
    """
    supervised = labels[1:] != -100
    likeliest = head(hidden[:-1][supervised.to(hidden.device)]).argmax(dim=-1).cpu()
    is_right = likeliest == labels[1:][supervised]
    begins = supervised & ~torch.cat((supervised.new_zeros(1), supervised[:-1]))
    answer = begins.cumsum(0)[supervised]  # for each supervised token, the number of its answer, from 1 on
    lengths, hits = torch.bincount(answer), torch.bincount(answer, weights=is_right.double())
    short = (lengths > 0) & (lengths <= MAX_TOKENS_OF_EXACT_ANSWER)
    return int(short.sum()), int((short & (hits == lengths)).sum())


def compare(before: dict, after: dict, ranks: Ranks) -> dict:
    """Prints what the model learned and forgot; returns that for training.json, {} without old data."""
    if not before:
        return {}
    if ranks.is_main:
        print(f"{'':9}samples  loss before    after  answers  exact before   after")
        for name in before:
            a, b = before[name], after[name]
            line = f"{name} data {a['samples']:>7,}{a['loss']:>13.4f}{b['loss']:>9.4f}{a['answers']:>9,}"
            if a["exact"] is not None:
                line += f"{a['exact']:14.3f}{b['exact']:8.3f}"
            print(line)
    return {"retention": {"before": before, "after": after}}
