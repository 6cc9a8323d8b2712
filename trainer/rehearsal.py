"""Chats that a model learns beside its own answers, so that it keeps what it could do before.
A reader may skip this file.

A stage that learns from rewards sees no right answer, and forgets: what is not asked drifts away. With
--sft_data_path every step learns some rows of old chats, too, as in SFT (the "PPO-ptx" of InstructGPT:
Ouyang et al. 2022, arXiv:2203.02155). Without --data_path these are the chats of the built-in world.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from common.cli import ROOT
from dataset.lm_dataset import SFTDataset
from dataset.packing import Order
from trainer.batches import Batches
from trainer.distributed import Ranks
from trainer.losses import cross_entropy
from trainer.rollouts import Rollouts


class Rehearsal:
    """The batches of a stage, with some rows of old chats in each of them. It answers the loop as they do.

    weight: the loss of a step is that of the answers + weight * the mean cross-entropy of the chats' tokens.
    """

    def __init__(self, batches: Rollouts, chats: Batches, weight: float):
        self.batches, self.chats, self.weight = batches, chats, weight

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[list[dict], int, int]:
        micro_batches, num_units, num_tokens = self.batches[number]
        chats, num_targets, num_chat_tokens = self.chats[number]
        # The loop divides the sum of a step by num_units, and not by the number of the chats' tokens.
        weight = {"chat_weight": torch.tensor(self.weight * num_units / max(1, num_targets))}
        # The answers come last: in the last backward pass DDP waits for a gradient of every parameter, and
        # chats give none to PPO's value head.
        return [*(batch | weight for batch in chats), *micro_batches], num_units, num_tokens + num_chat_tokens

    def description(self) -> str:
        return f"{self.batches.description()}, and {self.chats.description()} of old chats"

    def identity(self) -> str:
        return f"{self.batches.identity()}, and old chats of {self.chats.identity()}"

    def state(self) -> dict:
        return self.batches.state()

    def load_state(self, state: dict) -> None:
        self.batches.load_state(state)

    def singly(self, number: int) -> Iterator[tuple[str, dict]]:
        yield from self.batches.singly(number)
        for where, batch in self.chats.singly(number):
            yield where, batch | {"chat_weight": torch.tensor(1.0)}


def with_chats(loss: Callable, model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`loss` for a micro-batch of answers; for one of chats the cross-entropy times "chat_weight"."""
    if "chat_weight" not in batch:
        return loss(model, batch)
    chats = {name: value for name, value in batch.items() if name != "chat_weight"}
    total = batch["chat_weight"] * cross_entropy(model, chats)[0]
    return total, {"old_chats": total.detach()}


def rehearse(batches: Rollouts, loss: Callable, tokenizer, ranks: Ranks, /, *, data_path, sft_data_path,
             sft_weight, sft_batch_size, strict, allow_unusable, max_seq_len, micro_batch_size, seed,
             **flags) -> tuple[Rollouts | Rehearsal, Callable]:
    """(batches, loss) for `train`: as they are, or with the chats of --sft_data_path. Flags go by name."""
    if data_path and not sft_data_path:
        return batches, loss
    with ranks.main_first():  # process 0 tokenises, and the others read its token cache
        if not sft_data_path:
            from dataset.synthetic import ensure_world  # here: this import reads the files of the world

            sft_data_path = [ensure_world(ROOT / "out" / "world")["sft"]]
        chats = SFTDataset(sft_data_path, tokenizer, max_seq_len, strict=strict,
                           allow_unusable=allow_unusable)
    rows = Batches(chats, Order(len(chats)), ranks, batch_size=sft_batch_size, max_seq_len=max_seq_len,
                   seed=seed, pad_token_id=tokenizer.pad_token_id or 0, micro_batch_size=micro_batch_size)
    return Rehearsal(batches, rows, sft_weight), partial(with_chats, loss)
