"""The teacher of train_distillation.py, and what its student learns from. A reader may skip this file."""

from dataclasses import replace
from pathlib import Path

import torch

from common.device import choose_dtype
from common.errors import UsageError
from model.lora import cast_frozen
from model.quantize import count_parameters
from model.transformer import PRESETS, CausalLM, ModelConfig, preset
from trainer import stage
from trainer.batches import Batches
from trainer.checkpoint import identity_of_weights
from trainer.distributed import Ranks


def load_teacher(path: Path, ranks: Ranks, tokenizer_path: Path | None, dtype: str):
    """(model, tokenizer) of the teacher: frozen, in eval mode, in the type that training computes in.

    Every process has the whole teacher on its device. For tokenizer_path and what is raised see
    stage.load_weights.
    """
    teacher, tokenizer = stage.load_weights(path, ranks, tokenizer_path, "--teacher")
    teacher.requires_grad_(False)
    cast_frozen(teacher, choose_dtype(dtype, ranks.device))
    return teacher.to(ranks.device).eval(), tokenizer


def check_same_vocabulary(path: Path, teacher_tokenizer, tokenizer) -> None:
    """Raises UsageError unless each id is the same token to teacher and student. path: of the teacher."""
    theirs, ours = (vocabulary.get_vocab() for vocabulary in (teacher_tokenizer, tokenizer))
    if differing := theirs.items() ^ ours.items():
        number = min(number for _, number in differing)
        names = [next((repr(name) for name, n in vocabulary.items() if n == number), "nothing")
                 for vocabulary in (theirs, ours)]
        raise UsageError(f"--teacher {path} has another vocabulary than the student ({len(theirs):,} tokens, "
                         f"not {len(ours):,}; token {number} is {names[0]}, not {names[1]}): the two must share "
                         f"a tokenizer")


def student_config(name: str | None, teacher: CausalLM) -> ModelConfig:
    """The shape of a new student: that preset, or the largest one with fewer parameters than the teacher.

    It has the teacher's vocabulary. Raises ModelError for an unknown name, UsageError where none is smaller.
    """
    vocab_size = teacher.config.vocab_size
    if name:
        return replace(preset(name), vocab_size=vocab_size)
    with torch.device("meta"):  # no memory is taken
        sizes = {name: count_parameters(CausalLM(replace(preset(name), vocab_size=vocab_size))) for name in PRESETS}
    smaller = {name: size for name, size in sizes.items() if size < count_parameters(teacher)}
    if not smaller:
        raise UsageError(f"--teacher has {count_parameters(teacher):,} parameters, and no preset has fewer: give "
                         f"the student's weights with --load_from, or its --preset")
    return student_config(max(smaller, key=smaller.get), teacher)


class Lessons(Batches):
    """The same batches, for a student: a resumed run must have the same teacher, too."""

    def __init__(self, batches: Batches, teacher: CausalLM):
        vars(self).update(vars(batches))
        self.teacher = identity_of_weights(teacher)

    def identity(self) -> str:
        return f"{super().identity()}, taught by {self.teacher}"

    def num_bytes(self) -> int:
        return 0  # The loss is no log-likelihood of the text, so it gives no bits per byte.
