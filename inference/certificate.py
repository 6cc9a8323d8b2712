"""What a model says to the same prompts, to compare with what it says elsewhere: for scripts/certify.py.
A reader may skip this file.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.prompts import holds_chat
from dataset.records import read_records
from model.adapters import Adapters
from model.generate import generate
from model.quantize import dequantize_model
from model.tokenizer_files import check_vocabulary, load_tokenizer
from model.weights import end_tokens, load_model

# Type of the numbers -> how far logits, the loss (nats) and a tensor (a share of its size) may be off.
LIMITS = {"F32": (1e-3, 1e-4, 1e-6), "F16": (0.1, 0.005, 1e-3), "BF16": (1.0, 0.03, 8e-3),
          "Q8_0": (2.0, 0.05, 0.02), "Q4_0": (8.0, 1.0, 0.2)}
COARSE = (8.0, 1.0, 0.3)  # of all other types
ROW = 3  # a row of a tensor may be off by so many times more than the whole tensor
TEXTS = ["Once upon a time there was a fox who lived by the river.", "What is 27 + 15? 3.14, 1000000",
         "从前有一只狐狸，住在河边。", "it's we'LL\t\ttabs  and\n\n\nlines \r\n",
         "e\u0301 é ½ 😀👍🏽 \u200b\u00a0|",
         "<think>a</think> <tool_call>{}</tool_call> <|im_start|>user\nhi<|im_end|>", "x", " "]
TALKS = [[{"role": "user", "content": "What sound does a frog make?"}],
         [{"role": "user", "content": "你是谁？"}],
         [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"},
          {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "What is 7 + 8?"}]]
# Conversations that no model is asked. What a chat template writes of them is compared as text.
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 7}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}}}}
FORMS = [{"conversation": [*TALKS[2], {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n15"}]},
         {"conversation": [*TALKS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]},
                           {"role": "tool", "content": "15"}],
          "tools": [TOOL], "add_generation_prompt": True}]


@dataclass
class Row:
    """What is found of one way to run the model. cells: {column: text}. off: what is wrong, one line each."""

    name: str
    cells: dict = field(default_factory=dict)
    off: list = field(default_factory=list)
    skipped: str = ""

    def check(self, column: str, text: str, problem: str | list | None = None) -> None:
        self.cells[column] = f"{self.cells[column]}; {text}" if column in self.cells else text
        if problem:
            self.off.append(problem)


    def check_greedy(self, equal: int, number: int, ties: int, others: list[str]) -> None:
        self.check("greedy", f"{equal}/{number}" + (f", {ties} ties" if ties else ""), others and
                   f"{len(others)} of {number} greedy answers are others; the first has {others[0]}")

    def check_tokens(self, equal: int, number: int, others: list[str]) -> None:
        self.check("ids", f"{equal}/{number}", others and
                   f"other tokens for {len(others)} of {number} texts; the first: {others[0]}")


class Reference:
    """Our model, with the adapter beside it and not merged, and what it says to all prompts."""

    def __init__(self, path: Path, loras: dict[Path, float], data_path: list[Path], limit: int,
                 max_new_tokens: int, rope_scaling: str | None = None):
        """loras: adapters and how much of each. limit: records of each file. Raises ModelError, DataError."""
        # Weights of 4 bits become plain ones, which are the same numbers.
        self.model = dequantize_model(load_model(path, rope_scaling=rope_scaling))
        self.tokenizer = load_tokenizer(path)
        check_vocabulary(self.tokenizer, self.model.config.vocab_size, path)
        if loras:
            adapters = Adapters(self.model)
            adapters.use({adapters.load(lora, str(lora)): weight for lora, weight in loras.items()})
        self.ends = end_tokens(self.model, self.tokenizer)
        # Those that its own files list. Some others, such as <|endoftext|>, are known by name everywhere.
        settings = self.model.generation_config or {"eos_token_id": self.ends}
        self.listed_ends = settings["eos_token_id"]
        self.talks = [talk for talk in TALKS if self.can_write(talk)] if self.tokenizer.chat_template else []
        self.prompts = [self.tokenizer(text)["input_ids"] for text in TEXTS]
        self.prompts += [self.ids_of(self.written(talk, self.tokenizer)) for talk in self.talks]
        self.prompts = [ids or self.ends[:1] for ids in self.prompts]
        self.answers = []
        for ids in self.prompts:
            steps = generate(self.model, torch.tensor([ids]), max_new_tokens=max_new_tokens,
                             temperature=0.0, eos_token_id=self.ends)
            self.answers.append([step.item() for step in steps])
        self.sequences = [ids + answer for ids, answer in zip(self.prompts, self.answers, strict=True)]
        self.samples = samples_of(data_path, limit, self)
        with torch.no_grad():
            self.logits = [forward_of(self.model)(ids) for ids in self.sequences]
            self.loss = loss_of(forward_of(self.model), self.samples)

    def ids_of(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @staticmethod
    def written(talk: list[dict], tokenizer) -> str:
        return tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)

    def can_write(self, talk: list[dict]) -> bool:
        try:
            return bool(self.written(talk, self.tokenizer))
        except Exception:  # a template may refuse a system message
            return False


def forward_of(model) -> Callable:
    """ids -> logits (T, V) in float32, of our model or of transformers'."""
    return lambda ids: model(torch.tensor([ids])).logits[0].detach().float()


def encoder_of(tokenizer) -> Callable:
    """(text, is_chat) -> ids. In a chat the template has written the token that begins a text."""
    return lambda text, is_chat: tokenizer(text, add_special_tokens=not is_chat)["input_ids"]


def samples_of(paths: list[Path], limit: int, reference: Reference) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of the first `limit` records of each file, as training would see them."""
    samples = []
    for path in paths:
        _, _, first = next(iter(read_records([path])))
        kind = PretrainDataset if "text" in first and not holds_chat(first) else SFTDataset
        with tempfile.TemporaryDirectory() as cache:
            length = min(512, reference.model.config.max_position_embeddings)
            dataset = kind(path, reference.tokenizer, length, cache_dir=Path(cache))
            found = [dataset[i] for i in range(min(limit, len(dataset)))]
            samples += [(ids.tolist(), labels.tolist()) for ids, labels in found]
    return samples


def loss_of(forward: Callable, samples: list) -> float | None:
    """The mean of -log p(label), in nats; None without samples."""
    losses = []
    for ids, labels in samples:
        targets = torch.tensor(labels[1:])
        losses.append(torch.nn.functional.cross_entropy(forward(ids)[:-1], targets, ignore_index=-100,
                                                        reduction="none")[targets != -100])
    return torch.cat(losses).double().mean().item() if losses else None


# --- one way to run it --------------------------------------------------------------------------------------


def compare_numbers(row: Row, forward: Callable, kind: str, reference: Reference) -> None:
    """Logits, greedy answers and loss of `forward`, beside the reference's.

    An answer is greedy where each of its tokens is the likeliest after the tokens before it. So one forward
    pass over prompt and answer shows where another runtime would leave ours. It may, where two tokens are
    nearly as likely as each other.
    """
    limit, loss_limit, _ = LIMITS.get(kind, COARSE)
    differences, equal, ties, others = [], 0, 0, []
    for ids, answer, expected in zip(reference.prompts, reference.answers, reference.logits, strict=True):
        logits = forward(ids + answer)
        if logits.shape != expected.shape:
            row.check("logits", "none", f"logits of shape {list(logits.shape)}, not {list(expected.shape)}")
            return
        differences.append((logits - expected).abs().max())
        picks = logits[len(ids) - 1 : -1].argmax(dim=-1).tolist()
        leaves = first_difference(picks, answer)
        if leaves is None:
            equal += 1
            continue
        here = expected[len(ids) - 1 + leaves]
        gap = (here.max() - here[picks[leaves]]).item()
        ties += gap <= 2 * limit
        if gap > 2 * limit:
            ours, theirs = (reference.tokenizer.decode([token]) for token in (answer[leaves], picks[leaves]))
            others.append(f"{theirs!r} and not {ours!r} at token {leaves}, its logit lower by {gap:.3g}")
    row.check_greedy(equal, len(reference.prompts), ties, others)
    farthest = torch.stack(differences).max().item()  # NaN if one is NaN, unlike Python's max
    row.check("logits", f"{farthest:.1e}", None if farthest <= limit else
              f"logits differ by up to {farthest:.3g}; {kind} may differ by {limit:g}")
    if reference.samples:
        difference = loss_of(forward, reference.samples) - reference.loss
        row.check("loss", f"{difference:+.1e}", None if abs(difference) <= loss_limit else
                  f"the loss differs by {difference:+.3g}; {kind} may differ by {loss_limit:g}")


def first_difference(some: list, others: list) -> int | None:
    return next((place for place, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), None)


def where_they_part(text: str, expected: str) -> str:
    """Two texts from a little before the first character that differs, to be shown in one line."""
    start = max(0, len(os.path.commonprefix([text, expected])) - 30)
    return f"{text[start:start + 120]!r} and not {expected[start:start + 120]!r}"


def compare_tokens(row: Row, encode: Callable, reference: Reference, tokenizer) -> None:
    """encode(text, is_chat) -> ids. tokenizer: whose chat template is compared; None where there is none."""
    equal, others, templates = 0, [], []
    texts = [(text, False) for text in TEXTS]
    for talk in reference.talks:
        expected = reference.written(talk, reference.tokenizer)
        if tokenizer and (text := reference.written(talk, tokenizer)) != expected:
            templates.append(where_they_part(text, expected))
        texts.append((expected, True))
    if tokenizer and reference.talks:
        pairs = zip(forms_of(tokenizer), forms_of(reference.tokenizer), strict=True)
        templates += [where_they_part(text, expected) for text, expected in pairs if text != expected]
    for (text, is_chat), ids in zip(texts, reference.prompts, strict=True):
        theirs = encode(text, is_chat) or reference.ends[:1]
        equal += theirs == ids
        if theirs != ids:
            others.append(f"{text!r} is {theirs[:12]} and not {ids[:12]}")
    row.check_tokens(equal, len(texts), others)
    if templates:
        row.check("rest", "template", f"another chat template: {templates[0]}")


def forms_of(tokenizer) -> list[str]:
    """What a chat template writes of FORMS; "refused" where it refuses one."""
    written = []
    for form in FORMS:
        try:
            written.append(tokenizer.apply_chat_template(tokenize=False, **form))
        except Exception:  # in the template's own words
            written.append("refused")
    return written


class LlamaCpp:
    """A GGUF file in llama.cpp, with keys and values in float32: its default, float16, would cost 0.01."""

    def __init__(self, path: Path, reference: Reference, adapter: Path | None = None):
        import llama_cpp  # here, because few have it

        longest = max(map(len, [*reference.sequences, *(ids for ids, _ in reference.samples)]))
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=longest + 8, n_batch=longest + 8, logits_all=True, type_k=0, type_v=0,
            n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(), verbose=False,
            lora_path=str(adapter) if adapter else None)

    def encode(self, text: str, is_chat: bool) -> list[int]:
        return self.llama.tokenize(text.encode("utf-8"), add_bos=not is_chat, special=True)

    def forward(self, ids: list[int]) -> torch.Tensor:
        self.llama.reset()
        self.llama.eval(ids)
        return torch.tensor(self.llama.scores[: len(ids)])
