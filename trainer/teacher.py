"""The teacher of train_distillation.py, and the batches that its student learns from.
A reader may skip this file.

    off-policy   Both models read the answers of the data. At each token the student learns the teacher's
                 probabilities.
    on-policy    Both read answers that the student itself has just written to the same prompts. There the
                 student meets its own mistakes, and learns how the teacher would go on after them (GKD:
                 Agarwal et al. 2024, arXiv:2306.13649).
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common.device import autocast, choose_dtype
from common.errors import UsageError
from dataset.lm_dataset import collate
from model.lora import cast_frozen
from model.quantize import count_parameters
from model.sample_many import sample_many
from model.transformer import PRESETS, CausalLM, ModelConfig, preset
from trainer import stage
from trainer.batches import Batches
from trainer.distributed import Ranks


def load_teacher(ranks: Ranks, *, teacher, load_from, tokenizer, dtype, max_seq_len, **other_flags):
    """(model, tokenizer) of the teacher: frozen, in eval mode, in the type that training computes in.

    Every process has the whole teacher on its device. The caller passes all flags by name, as **vars(args).
    Raises as stage.load_weights does, and UsageError where the teacher has fewer than max_seq_len positions.
    """
    # Without --load_from the student has the teacher's tokenizer, and --tokenizer is for both.
    its_tokenizer = None if load_from else tokenizer
    model, its_tokenizer = stage.load_weights(teacher, ranks, tokenizer=its_tokenizer, flag="--teacher")
    if max_seq_len > (positions := model.config.max_position_embeddings):
        raise UsageError(f"--max_seq_len {max_seq_len}: --teacher {teacher} has only {positions} positions")
    model.requires_grad_(False)
    cast_frozen(model, choose_dtype(dtype, ranks.device))
    return model.to(ranks.device).eval(), its_tokenizer


def check_same_vocabulary(path: Path, teacher_tokenizer, tokenizer) -> None:
    """Raises UsageError unless every id is the same token to teacher and student. path: of the teacher."""
    theirs, ours = ({number: token for token, number in vocabulary.get_vocab().items()}
                    for vocabulary in (teacher_tokenizer, tokenizer))
    for number in sorted(theirs.keys() | ours.keys()):
        if theirs.get(number) != ours.get(number):
            raise UsageError(
                f"--teacher {path} has another vocabulary ({len(theirs):,} tokens) than the student "
                f"({len(ours):,}): token {number} is {theirs.get(number)!r} there and {ours.get(number)!r} "
                "here; only models of one tokenizer can be compared token by token")


def student_config(name: str | None, teacher: CausalLM) -> ModelConfig:
    """The shape of a new student: that preset, or the largest one with fewer parameters than the teacher.

    The vocabulary is the teacher's. Raises ModelError for an unknown name, UsageError where none is smaller.
    """
    def config(name):
        return replace(preset(name), vocab_size=teacher.config.vocab_size)

    if name:
        return config(name)
    with torch.device("meta"):  # without memory for the weights
        sizes = {name: count_parameters(CausalLM(config(name))) for name in PRESETS
                 if not PRESETS[name].num_experts}
    smaller = [name for name in sizes if sizes[name] < count_parameters(teacher)]
    if not smaller:
        raise UsageError(f"no preset has fewer parameters than the teacher ({count_parameters(teacher):,}): "
                         "give the student's weights with --load_from")
    return config(max(smaller, key=sizes.get))


class Lessons(Batches):
    """The batches of `batches`, for a student. A resumed run must have the same teacher, too.

    of_teacher: identity_of_weights of the teacher.
    """

    def __init__(self, batches: Batches, of_teacher: str):
        vars(self).update(vars(batches))
        self.of_teacher = of_teacher

    def identity(self) -> str:
        return f"{super().identity()}, teacher {self.of_teacher}"

    def num_bytes(self) -> int:
        return 0  # the loss is no likelihood of the text, so it gives no bits per byte


class OwnAnswers(Lessons):
    """Lessons of which a part, on_policy, are on-policy: the student answers the prompts of the batch anew.

    on_policy 0.25 are the batches 3, 7, 11 and so on. An answer takes the place of the last answer of its
    conversation, has at most max_new_tokens, and ends with one of end_tokens where it is not cut off. Rows
    keep their conversations, so packed rows become longer where answers do. An answer follows from the
    number of the batch, the seed and the weights of the moment. So a resumed run needs no other state, and
    any number of processes writes the same.
    """

    def __init__(self, batches: Batches, of_teacher: str, student: CausalLM, ranks: Ranks, *,
                 on_policy: float, end_tokens: list[int], max_new_tokens: int, dtype: torch.dtype):
        super().__init__(batches, of_teacher)
        self.student, self.ranks, self.on_policy, self.dtype = student, ranks, on_policy, dtype
        self.end_tokens, self.max_new_tokens = end_tokens, max_new_tokens

    def __getitem__(self, number: int) -> tuple[list[dict], int, int]:
        if int((number + 1) * self.on_policy) == int(number * self.on_policy):
            return super().__getitem__(number)
        rows = self.rows_of(number)
        samples = np.concatenate(rows).tolist()
        # Each sample of the batch has a row of random numbers, whichever process answers it. The 2 keeps
        # these numbers apart from those of other generators with this seed.
        numbers = np.random.default_rng([self.seed, number, 2]).random(
            (len(samples), self.max_new_tokens), dtype=np.float32)
        numbers = dict(zip(samples, torch.from_numpy(numbers), strict=True))
        micro_batches, num_units, num_tokens = [], 0, 0
        for part in self.forward_passes(rows):
            mine = np.concatenate([*part, []]).astype(int).tolist()  # no row: no sample
            written = self.write(mine, torch.stack([numbers[sample] for sample in mine])) if mine else {}
            num_units += sum(int((labels != -100).sum()) for _, labels in written.values())
            num_tokens += sum(len(ids) for ids, _ in written.values())
            batch = collate(written, part, self.pad_token_id)
            micro_batches.append(batch | {"by_student": torch.tensor(True)})
        num_units, num_tokens = self.ranks.sum(num_units, num_tokens)
        return micro_batches, int(num_units), int(num_tokens)

    def write(self, samples: list[int], numbers: torch.Tensor) -> dict[int, tuple]:
        """Sample number -> (input_ids, labels) with the student's answer; numbers: as for sample_many."""
        prompts = [up_to_last_answer(*self.dataset[sample]) for sample in samples]
        was_training = self.student.training
        self.student.eval()
        with autocast(self.ranks.device, self.dtype):
            answers = sample_many(self.student, [prompt.tolist() for prompt in prompts], self.max_new_tokens,
                                  self.end_tokens, numbers=numbers)
        self.student.train(was_training)
        written = {}
        for sample, prompt, answer in zip(samples, prompts, answers, strict=True):
            answer = answer[:self.dataset.max_length - len(prompt)]  # as long as a sample of the data at most
            labels = torch.cat((torch.full_like(prompt, -100), answer))
            written[sample] = torch.cat((prompt, answer)), labels
        return written


def up_to_last_answer(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The tokens of a sample (T,) before its last run of labels.

        labels   -100  -100   7   8  -100  -100   5  -100      the first six tokens, up to the answer "5"
    """
    supervised = labels != -100
    begins = supervised[1:] & ~supervised[:-1]  # the first label is always -100
    return input_ids[:int(begins.nonzero()[-1]) + 1]
