"""Log-probabilities of the answers of preference pairs under a fixed model. A reader may skip this file.

DPO compares the model with what it was before: its reference. The reference never changes, so its
log-probabilities are computed once, before the training, and kept on disk beside the tokens. No second model
is in memory while the first one trains.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.device import autocast, choose_dtype, to_device
from dataset.preference import PreferenceDataset
from dataset.token_cache import CacheWriter, TokenCache, cache_folder, open_cache
from model.adapters import set_lora
from model.lora import adapted_layers
from trainer.checkpoint import identity_of_weights
from trainer.distributed import Ranks

TOKENS_TOGETHER = 8192  # of a forward pass, padding included: enough work for all cores, and little memory


def add_reference(model, datasets: list[PreferenceDataset], dtype: str, ranks: Ranks) -> None:
    """Gives each dataset the log-probabilities under the model as it is now, its adapters switched off.

    They are read from out/cache where they were computed before for the same data, weights and dtype.
    Otherwise all processes compute them together.
    """
    has_lora = bool(adapted_layers(model, required=False))
    dtype = choose_dtype(dtype, ranks.device)
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    weights = identity_of_weights(model)
    for dataset in dict.fromkeys(datasets):  # validation data may be a part of the training data's file
        parts = (dataset.identity, weights, dtype, ranks.device.type, code)
        folder = cache_folder("reference", hashlib.sha256(repr(parts).encode()).hexdigest()[:32])
        if ranks.any(open_cache(folder) is None, ranks.patient):
            if has_lora:
                set_lora(model, False)
            log_probs = side_log_probs(model, dataset, dtype, ranks)
            if has_lora:
                set_lora(model, True)
            with ranks.main_first():
                if open_cache(folder) is None:
                    with CacheWriter(folder, {"log_probs": "float32"}) as writer:
                        writer.write(log_probs=log_probs)
        dataset.reference = TokenCache(folder)


@torch.no_grad()
def side_log_probs(model, dataset: PreferenceDataset, dtype: torch.dtype, ranks: Ranks) -> np.ndarray:
    """The summed log-probability of the answer of every side, float32 (2 N,): chosen, rejected, chosen, ...

    Pairs of like length go through the model together. The groups depend on the lengths alone, so any number
    of processes computes the same.
    """
    model.to(ranks.device)
    was_training = model.training
    model.eval()
    groups, width = [[]], 0  # width: tokens of the longest side in the newest group
    for pair in np.argsort(-dataset.lengths, kind="stable").tolist():
        longest = int(dataset.sides.lengths[2 * pair : 2 * pair + 2].max())
        width = max(width, longest)
        if groups[-1] and 2 * width * (len(groups[-1]) + 1) > TOKENS_TOGETHER:
            groups.append([])
            width = longest
        groups[-1].append(pair)
    found = np.zeros((len(dataset), 2), dtype=np.float32)
    mine = groups[ranks.rank :: ranks.world_size]
    # disable=None: no bar where stderr is no terminal
    for group in tqdm(mine, "reference", unit=" groups", delay=1, disable=None if ranks.is_main else True):
        batch = dataset.collate([[pair] for pair in group], 0)  # any id will do as padding
        batch = to_device(batch, ranks.device)
        with autocast(ranks.device, dtype):
            log_probs = -model(batch["input_ids"], batch["labels"]).token_losses.sum(dim=1)  # (2 P,)
        found[group] = log_probs.float().view(2, -1).T.cpu().numpy()
    model.train(was_training)
    return sum(ranks.gather(found)).reshape(-1)  # what another process computed is 0 here
