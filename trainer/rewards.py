"""How good an answer is: the parts of a reward, weighted and added up. A reader may skip this file.

    --rewards answers length:0.5 --max_reward_tokens 30

answers  1 if the answer is right by the record's own test (dataset/prompts.py), else 0
format   1 if the whole answer, ends stripped, matches --reward_format, else 0
length   1 up to --max_reward_tokens; from there it falls evenly, to 0 at twice as many. A record may have its
         own "max_reward_tokens"; without both the length doesn't matter: 1
file     what the person's own function says: --reward_file my.py:score, where my.py holds
             def score(messages, answer, record):    # the prompt as messages, the text, the whole record
                 return float(len(answer) < 80)      # any number
model    what a reward model says: --reward_model DIR, of transformers' kind "sequence classification"
"""

import copy
import hashlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import ModelError, RunError, UsageError
from common.files import one_line
from dataset.foreign_chat import with_standard_calls
from dataset.keys import is_empty
from dataset.prompts import Prompt
from dataset.replies import read_message
from trainer.checkpoint import identity_of_weights

FILE_OF_REWARDS = "file_of_rewards"  # the name of the module; that of the file could hide another module
LARGEST_REWARD = 1e30  # sums over a group must stay finite in float32
TEXTS_AT_ONCE = 32  # that a reward model reads


@dataclass(frozen=True)
class Answer:
    """What the model wrote. num_tokens counts its end token; an answer without one was cut off."""

    text: str
    num_tokens: int
    is_cut_off: bool


# A part of a reward takes prompts and their answers, and gives a number for each.
Part = Callable[[list[Prompt], list[Answer]], list[float]]


class Rewards:
    """The weighted sum of several parts: rewards(prompts, answers) -> [{"reward": sum, part: number, ...}].

    The arguments are the flags of the same names. weights: {"answers": 1.0, "length": 0.5}.
    identity: a text with checksums of the files that judge. A resumed run must have the same ones.
    """

    def __init__(self, weights: dict[str, float], *, reward_format: str | None = None,
                 max_reward_tokens: int | None = None, reward_file: str | None = None,
                 reward_model: Path | None = None, **other_flags):
        make = {"answers": lambda: right_answers, "format": lambda: matches(reward_format),
                "length": lambda: shortness(max_reward_tokens), "file": lambda: own_function(reward_file),
                "model": lambda: RewardModel(reward_model)}
        self.weights, self.parts = weights, {name: make[name]() for name in weights}
        self.identity = ""
        if "file" in weights:
            path, _, name = reward_file.rpartition(":")
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
            self.identity += f", rewarded by {name} of a file of sha256 {digest}"
        if "model" in weights:
            self.identity += f", rewarded by a model of {identity_of_weights(self.parts['model'].model)}"

    def __call__(self, prompts: list[Prompt], answers: list[Answer]) -> list[dict[str, float]]:
        found = {name: part(prompts, answers) for name, part in self.parts.items()}
        rewards = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
        return [{"reward": sum(self.weights[name] * value for name, value in parts.items())}
                | ({f"reward_{name}": value for name, value in parts.items()} if len(parts) > 1 else {})
                for parts in rewards]


def right_answers(prompts: list[Prompt], answers: list[Answer]) -> list[float]:
    """What the model thought before its answer counts neither for it nor against it."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        said = read_message({"role": "assistant", "content": answer.text})
        found.append(float(bool(prompt.test.is_right(said["content"], said.get("tool_calls", ())))))
    return found


def matches(pattern: str) -> Part:
    """The part "format". Raises UsageError for what is no regular expression."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UsageError(f"--reward_format {pattern!r} is no regular expression: {error}") from None
    return lambda _, answers: [float(bool(compiled.fullmatch(answer.text.strip()))) for answer in answers]


def shortness(longest: int | None) -> Part:
    """The part "length". longest: --max_reward_tokens."""
    def judge(prompt: Prompt, answer: Answer) -> float:
        own = prompt.record.get("max_reward_tokens")
        limit = longest if is_empty(own) else own
        return min(1.0, max(0.0, 2 - answer.num_tokens / limit)) if limit else 1.0

    return lambda prompts, answers: [judge(*pair) for pair in zip(prompts, answers, strict=True)]


def own_function(path_and_name: str) -> Part:
    """The function of a Python file, "my.py:score". Raises UsageError where there is none."""
    path, _, name = path_and_name.rpartition(":")
    flag = f"--reward_file {path_and_name}"
    if not path or not Path(path).is_file():
        raise UsageError(f"{flag}: there is no file {path or path_and_name}; write it as my.py:function")
    try:
        spec = importlib.util.spec_from_file_location(FILE_OF_REWARDS, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[FILE_OF_REWARDS] = module  # dataclasses and pickle look for it there
        sys.path.append(str(Path(path).resolve().parent))  # the file may import others that lie beside it
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the person's file does
        raise UsageError(f"{flag}: {path} can't be run: {type(error).__name__}: {one_line(error)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{flag}: {path} has no function {name!r}")

    def judge(prompt: Prompt, answer: Answer) -> float:
        said = f"the prompt of {prompt.where} and the answer {answer.text[:60]!r}"
        # Copies, because the function may change what it gets, and more answers to the prompt follow.
        messages, record = copy.deepcopy((prompt.messages, prompt.record))
        try:
            value = function(messages, answer.text, record)
        except (Exception, SystemExit) as error:
            raise RunError(f"{flag} raised {type(error).__name__}: {one_line(error)}, for {said}") from None
        try:
            number = float(value)
        except Exception:  # of the value's own __float__, too
            shown = " ".join(repr(value).split())[:60]
            raise RunError(f"{flag} returned {shown}, no number, for {said}") from None
        if not abs(number) < LARGEST_REWARD:
            raise RunError(f"{flag} returned {number}, no finite number below {LARGEST_REWARD:g}, for {said}")
        return number

    return lambda prompts, answers: [judge(*pair) for pair in zip(prompts, answers, strict=True)]


class RewardModel:
    """A model that gives a text one number: a folder of transformers' AutoModelForSequenceClassification."""

    def __init__(self, path: Path):
        # Imported here, because it takes seconds.
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # a missing head is named below, in one line and not in a table
        if not (path / "config.json").is_file():
            raise UsageError(f"--reward_model {path}: there is no model in that folder")
        try:  # no code from the folder runs, and nothing is fetched
            self.tokenizer = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False)
            self.tokenizer.truncation_side = "left"  # the answer stands at the end of a long text
            self.model, report = AutoModelForSequenceClassification.from_pretrained(
                path, output_loading_info=True, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise ModelError(f"--reward_model {path} can't be read: {one_line(error)}") from None
        if missing := report["missing_keys"]:
            raise ModelError(f"--reward_model {path} has no head that gives a number ({sorted(missing)[0]} "
                             "is missing): it must be a model for sequence classification")
        if self.model.config.num_labels != 1:
            raise ModelError(f"--reward_model {path} gives {self.model.config.num_labels} numbers, not one")
        self.model.eval()

    def __call__(self, prompts: list[Prompt], answers: list[Answer]) -> list[float]:
        import torch

        texts, scores = [self.text(*pair) for pair in zip(prompts, answers, strict=True)], []
        # In padded rows the model looks for the last token that is no padding, by the id in its own config.
        padding = getattr(self.model.config, "pad_token_id", None)
        size = TEXTS_AT_ONCE if padding is not None and padding == self.tokenizer.pad_token_id else 1
        for begin in range(0, len(texts), size):
            inputs = self.tokenizer(texts[begin:begin + size], return_tensors="pt", padding=size > 1,
                                    truncation=True, add_special_tokens=not self.tokenizer.chat_template)
            with torch.no_grad():
                scores += self.model(**inputs).logits[:, 0].float().tolist()
        if not all(map(math.isfinite, scores)):
            raise RunError("--reward_model gives numbers that are not finite")
        return scores

    def text(self, prompt: Prompt, answer: Answer) -> str:
        """The prompt and the answer as this model reads them. Raises RunError where its template can't."""
        messages = [*prompt.messages, {"role": "assistant", "content": answer.text}]
        if not self.tokenizer.chat_template:
            return "\n".join(message["content"] for message in messages)
        messages = with_standard_calls(messages, no_content=False, as_text=False, with_ids=False)
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # errors of jinja, and of the expressions in the template
            raise RunError("the chat template of --reward_model refuses the prompt of "
                           f"{prompt.where}: {one_line(error)}") from None
