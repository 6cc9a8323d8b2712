"""What a step of GRPO or PPO reads: answers that the model itself has just written, and their rewards.
A reader may skip this file.

`Rollouts` answers the loop as `Batches` does. One rollout: the model of this moment answers some prompts,
group_size times each; the answers get their rewards; an answer that was better than the others of its group
gets an advantage above 0, a worse one below 0. Then updates_per_rollout steps learn from these answers.

    prompt "2 + 3?"    answers    5    6    5    23        group_size 4
                       rewards    1    0    1    0         mean 0.5
                       advantages 0.5 -0.5 0.5 -0.5        every token of an answer has its advantage

If all answers of a group have the same reward, nothing can be learnt from the group: its advantages are 0.
Such groups are counted and not trained.
"""

import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from common.device import autocast, choose_dtype, to_device
from common.errors import UsageError
from dataset.packing import Order
from dataset.prompts import PromptDataset
from model.adapters import set_lora
from model.compiled_step import compile_decoding
from model.sample_many import sample_many
from model.weights import end_tokens
from trainer.distributed import Ranks
from trainer.losses import answer_log_probs
from trainer.rewards import Answer, Rewards
from trainer.stage import read_data

PATIENCE = 20  # rollouts in a row without any signal, after which a line says what to change
SHOWN_ANSWERS, SHOWN_CHARACTERS = 3, 100  # of a group that is printed


def group_advantages(rewards: torch.Tensor, divide: bool = False) -> torch.Tensor:
    """A = r - mean(r of the group): rewards (groups, group_size) -> advantages of the same shape.

    divide: A / (standard deviation of the group + 1e-4), as in GRPO (Shao et al. 2024, arXiv:2402.03300).
    Groups in which nearly all answers are right, or wrong, then weigh more. Dr. GRPO (Liu et al. 2025,
    arXiv:2503.20783) does not divide.
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    # Rounding must not make a signal of equal rewards.
    advantages = advantages.masked_fill((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0.0)
    return advantages / (rewards.std(dim=1, keepdim=True) + 1e-4) if divide else advantages


class Rollouts:
    """rollouts[n] is what this process learns from in its n-th batch, for every n from 0 on.

    rewards: rewards(prompts, answers) -> [{"reward": ...}] (trainer/rewards.py).
    advantages: a function of rewards (groups, group_size), such as group_advantages.
    reference: None, or a function that gives reference_log_probs (B, T) to a micro-batch.
    complete: None, or a function that adds to this process's micro-batches, a list, before the first update.
        With it, or with a reference, all answers are trained, also those whose advantage is 0.
    mean_over: what the loss is a mean over. "tokens": every token of the step counts the same. "answers":
        every answer counts the same. "constant": a token counts 1 / max_new_tokens, so that neither the
        length of an answer nor that of the others changes what it weighs (Dr. GRPO).
    mask_cut_off: an answer that was cut off at max_new_tokens is not trained.
    greedy: the likeliest answer to each prompt, for validation. Advantages are the rewards themselves.
    """

    def __init__(self, model, tokenizer, end_tokens: list[int], dataset, samples, rewards: Rewards,
                 ranks: Ranks, *, dtype: torch.dtype, batch_size: int, max_new_tokens: int, seed: int,
                 advantages: Callable = group_advantages, reference: Callable | None = None,
                 complete: Callable | None = None, group_size: int = 1, updates_per_rollout: int = 1,
                 temperature: float = 1.0, mean_over: str = "tokens", mask_cut_off: bool = False,
                 micro_batch_size: int | None = None, show_interval: int = 0, greedy: bool = False):
        self.model, self.tokenizer, self.end_tokens = model, tokenizer, end_tokens
        self.dataset, self.samples, self.rewards = dataset, samples, rewards
        self.ranks, self.dtype = ranks, dtype
        self.advantages, self.reference, self.complete = advantages, reference, complete
        self.group_size, self.updates, self.temperature = group_size, updates_per_rollout, temperature
        self.num_groups = min(batch_size // group_size, len(samples))  # of a rollout
        self.max_new_tokens, self.mean_over, self.mask_cut_off = max_new_tokens, mean_over, mask_cut_off
        self.micro_batch_size, self.show_interval = micro_batch_size, show_interval
        self.seed, self.greedy = seed, greedy
        self.pad_token_id = tokenizer.pad_token_id or 0  # any id will do
        # The present rollout: its number, and what this process learns from
        self.number, self.batches, self.num_answers, self.num_tokens = None, [], 0, 0
        self.last_batch, self.without_signal = -1, 0

    def __len__(self) -> int:
        """Batches in one epoch, which shows every prompt once. The last rollout may have fewer prompts."""
        return math.ceil(len(self.samples) / self.num_groups) * self.updates

    def __getitem__(self, number: int) -> tuple[list[dict], int, int]:
        self.last_batch = number
        if number // self.updates != self.number or self.greedy:  # weights change between two validations
            was_training = self.model.training
            self.model.eval()
            self.roll_out(number // self.updates)
            self.model.train(was_training)
        return self.batches, self.num_answers, self.num_tokens

    # --- one rollout --------------------------------------------------------------------------------------

    def roll_out(self, number: int) -> None:
        """Samples rollout `number` with the weights of this moment, and keeps it as micro-batches."""
        samples = self.prompts_of(number)
        # Each process answers a share of the prompts. Then all processes know all answers.
        mine = range(len(samples))[self.ranks.rank::self.ranks.world_size]
        own = self.answer([samples[group] for group in mine], number, mine, len(samples))
        written = self.ranks.gather(own)
        groups = [written[group % self.ranks.world_size][group // self.ranks.world_size]
                  for group in range(len(samples))]
        rewards = torch.tensor([[found["reward"] for _, found in group] for group in groups])
        advantages = rewards if self.greedy else self.advantages(rewards)  # (groups, group_size)
        if self.mask_cut_off and not self.greedy:
            cut_off = torch.tensor([[found["cut_off"] for _, found in group] for group in groups])
            advantages = advantages.masked_fill(cut_off > 0, 0.0)
        has_signal = (advantages != 0).any(dim=1)
        totals = {name: float(sum(found[name] for group in groups for _, found in group))
                  for name in groups[0][0][1]}
        totals["signal"] = float(has_signal.sum()) * self.group_size  # the loop divides by all answers
        self.warn(bool(has_signal.any()))

        self.number, self.num_answers = number, rewards.numel()
        rows = [(self.dataset[sample].ids, ids, advantage, found["reward"])
                for sample, group, of_group in zip(samples, groups, advantages.tolist(), strict=True)
                for (ids, found), advantage in zip(group, of_group, strict=True)
                if advantage or self.reference or self.complete or self.greedy]
        lengths = [len(ids) for group in groups for ids, _ in group]
        of_step = {"tokens": sum(lengths), "trained": sum(len(ids) for _, ids, _, _ in rows)}
        self.deal([self.row(*row, of_step) for row in rows], totals)
        for batch in self.batches:
            self.add_log_probs(batch)
        if self.complete:
            self.complete(self.batches)

    def prompts_of(self, number: int) -> list[int]:
        """The samples that rollout `number` asks. Each epoch has an order of its own, from the seed."""
        epoch, place = divmod(number, len(self) // self.updates)
        order = Order(len(self.samples), None if self.greedy else [self.seed, epoch])
        chosen = order[place * self.num_groups:(place + 1) * self.num_groups]
        return [int(self.samples[index]) for index in chosen]

    def answer(self, samples: list[int], number: int, mine: range, num_groups: int) -> list[list[tuple]]:
        """What this process writes: for each of its groups [(ids, {"reward": ..., "length": ...}), ...].

        mine: the numbers of these groups among all num_groups of the rollout.
        """
        if not samples:
            return []
        # All processes draw the same numbers, and each takes those of its own groups. The 2 keeps them apart
        # from the numbers of Order, whose seed is [seed, epoch].
        shape = (num_groups, self.group_size, self.max_new_tokens)
        numbers = np.random.default_rng([self.seed, number, 2]).random(shape, dtype=np.float32)[mine]
        prompts = [self.dataset[sample] for sample in samples]
        # The step in C++ computes in float32.
        with autocast(self.ranks.device, torch.float32 if self.model.one_token else self.dtype):
            written = sample_many(self.model, [prompt.ids for prompt in prompts], self.max_new_tokens,
                                  self.end_tokens, self.group_size, 0 if self.greedy else self.temperature,
                                  torch.from_numpy(numbers).flatten(0, 1))
        answers = [self.read(ids.tolist()) for ids in written]
        rewards = self.rewards([prompt for prompt in prompts for _ in range(self.group_size)], answers)
        if self.ranks.is_main and self.show_interval and number % self.show_interval == 0:
            show(number, prompts[0], answers[:self.group_size], rewards)
        rows = [(ids, {**reward, "length": answer.num_tokens, "cut_off": float(answer.is_cut_off)})
                for ids, answer, reward in zip(written, answers, rewards, strict=True)]
        return [rows[begin:begin + self.group_size] for begin in range(0, len(rows), self.group_size)]

    def read(self, ids: list[int]) -> Answer:
        is_cut_off = ids[-1] not in self.end_tokens
        words = ids if is_cut_off else ids[:-1]
        # Control tokens in the middle of an answer stay visible: no reward may be had by hidden words.
        text = self.tokenizer.decode(words, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Answer(text, len(ids), is_cut_off)

    def row(self, prompt: list[int], ids: torch.Tensor, advantage: float, reward: float,
            of_step: dict) -> dict:
        """One answer after its prompt: tensors (T,), and numbers as tensors without a dimension.

        of_step: how many tokens all answers of the step have, and those of them that are trained.
        """
        labels = torch.cat([torch.full((len(prompt),), -100), ids])
        weight = {"tokens": self.num_answers / of_step["tokens"], "answers": 1 / max(1, len(ids)),
                  "constant": 1 / self.max_new_tokens}[self.mean_over]
        return {"input_ids": torch.cat([torch.tensor(prompt), ids]), "labels": labels,
                "advantages": torch.where(labels != -100, advantage, 0.0),
                "rewards": torch.tensor(reward), "weights": torch.tensor(weight),
                "token_weights": torch.tensor(self.num_answers / of_step["trained"])}

    def deal(self, rows: list[dict], totals: dict[str, float]) -> None:
        """Sets self.batches: this process's share of the rows, as micro-batches. totals: sums for the log."""
        mine = rows[self.ranks.rank::self.ranks.world_size]
        # All processes make the same number of forward passes. A micro-batch without a row has no target.
        share = max(1, math.ceil(len(rows) / self.ranks.world_size))
        size = self.micro_batch_size or share
        empty = self.row([self.pad_token_id], torch.zeros(0, dtype=torch.long), 0.0, 0.0,
                         {"tokens": 1, "trained": 1})
        # The rows of a rollout that is resumed have more names.
        empty |= {name: torch.zeros(1) for name in (rows[0] if rows else {}) if name not in empty}
        self.batches = [padded(mine[begin:begin + size] or [empty], self.pad_token_id)
                        for begin in range(0, share, size)]
        for place, batch in enumerate(self.batches):
            is_first = self.ranks.is_main and place == 0
            batch["sums"] = {name: torch.tensor(total if is_first else 0.0) for name, total in totals.items()}
        self.num_tokens = sum(len(row["input_ids"]) for row in rows)

    def add_log_probs(self, batch: dict) -> None:
        """Adds what the model that sampled, and the reference, think of the tokens."""
        on_device = to_device(batch, self.ranks.device)
        # Training computes by other functions than inference, whose results differ by rounding. Gradients are
        # on here, so that the first update finds the very same numbers, and ratios of exactly 1.
        with torch.enable_grad(), autocast(self.ranks.device, self.dtype):
            log_probs, _ = answer_log_probs(self.model, on_device, self.temperature)
            batch["old_log_probs"] = log_probs.detach().cpu()
            if self.reference:
                batch["reference_log_probs"] = self.reference(on_device).detach().cpu()

    def warn(self, has_signal: bool) -> None:
        """Says what to change if rollouts stay without a signal."""
        self.without_signal = 0 if has_signal else self.without_signal + 1
        if self.ranks.is_main and self.without_signal and self.without_signal % PATIENCE == 0:
            print(f"warning: in {self.without_signal} rollouts in a row all answers to a prompt had the same "
                  "reward, which teaches nothing: ask easier prompts, raise --group_size or --temperature, "
                  "or add a reward for a first step", flush=True)

    # --- what the loop asks of all batches ------------------------------------------------------------------

    def description(self) -> str:
        answers = "one answer" if self.group_size == 1 else f"{self.group_size} answers"
        return f"{len(self.samples):,} prompts, {answers} each"

    def identity(self) -> str:
        return self.dataset.identity + self.rewards.identity

    def num_bytes(self) -> int:
        return 0

    def state(self) -> dict:
        """The present rollout, if the next batch learns from it, too. All processes call this together."""
        if (self.last_batch + 1) // self.updates != self.number:
            return {}
        rows = self.ranks.gather([row for batch in self.batches for row in unpadded(batch)])
        longest = max(map(len, rows))
        totals = self.ranks.sum(*self.batches[0]["sums"].values())
        return {"number": self.number, "num_answers": self.num_answers,
                "totals": dict(zip(self.batches[0]["sums"], totals, strict=True)),
                "rows": [some[place] for place in range(longest) for some in rows if place < len(some)]}

    def load_state(self, state: dict) -> None:
        if state:
            self.number, self.num_answers = state["number"], state["num_answers"]
            self.deal(state["rows"], state["totals"])

    def singly(self, number: int) -> Iterator[tuple[str, dict]]:
        """Yields each row of batch `number` alone. Its record is not known any more."""
        for batch in self.batches:
            for row in unpadded(batch):
                yield f"an answer of rollout {self.number}", padded([row], self.pad_token_id) | {"sums": {}}


def padded(rows: list[dict], pad_token_id: int) -> dict:
    """A micro-batch: tensors (T,) become (B, T), padded on the right; numbers become (B,)."""
    fill = {"input_ids": pad_token_id, "labels": -100}
    return {name: pad_sequence([row[name] for row in rows], True, fill.get(name, 0)) if value.dim() else
            torch.stack([row[name] for row in rows]) for name, value in rows[0].items()}


def unpadded(batch: dict) -> list[dict]:
    """The rows that `padded` was given, without those that have no target."""
    rows = []
    for place, labels in enumerate(batch["labels"]):
        length = int((labels != -100).nonzero().max()) + 1 if (labels != -100).any() else 0
        if length:
            rows.append({name: value[place, :length].clone() if value.dim() > 1 else value[place].clone()
                         for name, value in batch.items() if name != "sums"})
    return rows


def show(number: int, prompt, answers: list[Answer], rewards: list[dict]) -> None:
    """Prints some answers of a group, each with its reward."""
    def short(text: str) -> str:
        text = " ".join(text.split())
        return text[:SHOWN_CHARACTERS] + (" ..." if len(text) > SHOWN_CHARACTERS else "")

    print(f"rollout {number}: {short(prompt.messages[-1]['content'])}")
    for answer, found in list(zip(answers, rewards, strict=False))[:SHOWN_ANSWERS]:
        cut_off = " (cut off)" if answer.is_cut_off else ""
        print(f"  {found['reward']:6.3f}  {short(answer.text)}{cut_off}", flush=True)


# --- for the recipes ----------------------------------------------------------------------------------------


def reference_log_probs(model, kl_beta: float, temperature: float) -> Callable | None:
    """A function of a micro-batch: the log-probabilities by the model as it is now, before it trains.

    With adapters that is the base: they are switched off for a moment. Otherwise it is a frozen copy. None if
    kl_beta is 0.
    """
    if not kl_beta:
        return None
    if any(not parameter.requires_grad for parameter in model.parameters()):  # LoRA
        def of_base(batch: dict) -> torch.Tensor:
            set_lora(model, False)
            found = answer_log_probs(model, batch, temperature)[0]
            set_lora(model, True)
            return found

        return of_base
    frozen = copy.deepcopy(model).requires_grad_(False).eval()

    def of_copy(batch: dict) -> torch.Tensor:
        return answer_log_probs(frozen.to(batch["input_ids"].device), batch, temperature)[0]

    return of_copy


def load_rollouts(model, tokenizer, ranks: Ranks, advantages: Callable, reference: Callable | None,
                  complete: Callable | None = None, /, *, rewards, max_seq_len, max_new_tokens, dtype, strict,
                  allow_unusable, batch_size, group_size, updates_per_rollout, temperature,
                  micro_batch_size, show_interval, seed, compile_rollouts, mask_cut_off=False,
                  mean_over="tokens", **flags) -> tuple[Rollouts, Rollouts | None]:
    """Returns the Rollouts of training, and those of validation, which may be None. Flags are passed by name.

    Raises UsageError where no token ends an answer, and DataError for the files.
    """
    end = end_tokens(model, tokenizer)
    if not end:
        raise UsageError("no token of the tokenizer or of generation_config.json ends an answer")
    if compile_rollouts:
        if ranks.device.type != "cpu":
            raise UsageError(f"--compile_rollouts compiles for a CPU, and this run is on {ranks.device.type}")
        compile_decoding(model)

    def read(paths) -> PromptDataset:
        return PromptDataset(paths, tokenizer, max_seq_len - max_new_tokens, needs_test="answers" in rewards,
                             strict=strict, allow_unusable=allow_unusable, quiet=not ranks.is_main)

    train_set, samples, eval_set, eval_samples = read_data(read, ranks, seed=seed, **flags)
    judge = Rewards(rewards, **flags)
    same = {"reference": reference, "complete": complete, "batch_size": batch_size, "mean_over": mean_over,
            "max_new_tokens": max_new_tokens, "micro_batch_size": micro_batch_size, "seed": seed,
            "temperature": temperature, "dtype": choose_dtype(dtype, ranks.device)}
    batches = Rollouts(model, tokenizer, end, train_set, samples, judge, ranks, advantages=advantages,
                       group_size=group_size, updates_per_rollout=updates_per_rollout,
                       mask_cut_off=mask_cut_off, show_interval=show_interval, **same)
    if not len(eval_samples):
        return batches, None
    return batches, Rollouts(model, tokenizer, end, eval_set, eval_samples, judge, ranks, greedy=True, **same)
