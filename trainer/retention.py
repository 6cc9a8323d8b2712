"""Does fine-tuning forget? Old data is measured before and after it, and may be replayed during it.

A part of the old data is held out to be measured and never replayed, so that "after" shows what is still
known and not what was rehearsed. Without --replay it is the same part: two runs can be compared.
"""

import hashlib
import math

import numpy as np
import torch
from torch.utils.data import ConcatDataset

from trainer.args import UsageError
from trainer.batches import Batches, split, to_device
from trainer.distributed import Ranks, autocast, choose_dtype

HELD_OUT, MEASURED = 0.2, 1000  # part of the old data that is held out, and samples of it that are measured
SHORT = 64  # tokens of an answer that can be expected word for word; longer ones count in the loss alone


class Both(ConcatDataset):
    """New and old data as one dataset: sample i of the old has the number len(new) + i."""

    def __init__(self, new, old):
        super().__init__([new, old])
        for name in ("lengths", "num_targets", "num_bytes"):
            setattr(self, name, np.concatenate([getattr(new, name), getattr(old, name)]))

    def where(self, sample: int) -> str:
        new, old = self.datasets
        return new.where(sample) if sample < len(new) else old.where(sample - len(new))


def hold_out(dataset, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers of the old data to replay, and to measure. Copies of a sample are on the same side.

    Raises UsageError where there are too few different samples to hold one out.
    """
    numbers: dict[bytes, int] = {}  # 16 bytes for each different sample
    digests = (hashlib.blake2b(ids.numpy().tobytes(), digest_size=16).digest() for ids, _ in dataset)
    kinds = np.array([numbers.setdefault(digest, len(numbers)) for digest in digests])
    replayed, held_out = split(numbers, HELD_OUT, seed)
    if not len(held_out):
        raise UsageError(f"--retain_data_path: {len(numbers)} different records are too few to hold some "
                         f"out; give at least {math.ceil(1 / HELD_OUT)}")
    measured = np.flatnonzero(np.isin(kinds, held_out))
    measured = np.random.default_rng(seed).permutation(measured)[:MEASURED]
    return np.flatnonzero(np.isin(kinds, replayed)), np.sort(measured)


@torch.no_grad()
def measure(model, eval_batches: Batches | None, retained: Batches | None, args, ranks: Ranks) -> dict:
    """{"new": ..., "old": ...}, each {"loss", "exact", "answers", "samples"}; {} without old data.

    exact: the part of the short answers that greedy decoding would give word for word, end of turn included.
    No decoding is needed to know: it follows the true words exactly as long as each of them is the likeliest
    after the true ones before it, which one forward pass tells for all at once.
    """
    if retained is None:
        return {}
    device, dtype, was_training = ranks.device, choose_dtype(args.dtype, ranks.device), model.training
    model.to(device).eval()
    result = {}
    for name, batches in (("new", eval_batches), ("old", retained)):
        if batches is None:
            continue
        sums = torch.zeros(4, dtype=torch.float64)  # loss, supervised tokens, short answers, exact ones
        for number in range(len(batches)):
            for batch in batches[number][0]:
                with autocast(device, dtype):
                    output = model(**to_device(batch, device))
                    sums[0] += output.loss_sum.cpu()
                    for hidden, labels in zip(output.hidden, batch["labels"], strict=True):
                        answers = exact_answers(output.head, hidden, labels)
                        sums[1:] += torch.tensor(answers, dtype=torch.float64)
        loss, tokens, short, exact = ranks.sum(*sums)
        result[name] = {"loss": loss / max(1, tokens), "exact": exact / short if short else None,
                        "answers": int(short), "samples": len(batches.samples)}
    model.train(was_training)
    return result


def exact_answers(head, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[int, int, int]:
    """One row, hidden (T, C) and labels (T,) -> supervised tokens, short answers, exact ones among them.

        labels     -100  -100   7   8  -100  -100   5      two answers: [7, 8] and [5]
        likeliest          7    8   3    1     4    9      at the position before each label: [7, 8] is exact
    """
    on = labels[1:] != -100
    likeliest = head(hidden[:-1][on.to(hidden.device)]).argmax(dim=-1).cpu()
    right = likeliest == labels[1:][on]
    answer = (on & ~torch.cat((on.new_zeros(1), on[:-1]))).cumsum(0)[on]  # its number, from 1, of each token
    lengths, hits = torch.bincount(answer), torch.bincount(answer, weights=right.double())
    short = (lengths > 0) & (lengths <= SHORT)
    return int(on.sum()), int(short.sum()), int((short & (hits == lengths)).sum())


def compare(before: dict, after: dict, ranks: Ranks) -> dict:
    """Prints what was learned and what forgotten; returns it for training.json. Nothing without old data."""
    if not before:
        return {}
    if ranks.is_main:
        print(f"{'':9}samples  loss before    after  answers  exact before   after")
        for name in before:
            a, b = before[name], after[name]
            exact = "" if a["exact"] is None else f"{a['exact']:14.3f}{b['exact']:8.3f}"
            print(f"{name} data {a['samples']:>7,}{a['loss']:>13.4f}{b['loss']:>9.4f}{a['answers']:>9,}"
                  + exact)
    return {"retention": {"before": before, "after": after}}
