"""Scores a model on test files: eval_model.py --data_path. A reader may skip this file.

The records, and when an answer is right:

    {"conversations": [..., {"role": "assistant", "content": "12"}]}   right: the answer is the last turn
        "answers": ["12", "It is 12."]                                 ... is any of these instead
        "contains": ["fox", "river"]                                   ... holds all of these instead
        "family": "sums"                                               scores are per family (else per file)
    {"question", "choices", "answer": 2}                               the likeliest choice is that index
    {"question", "answer": "... #### 42"}                              its final number is that (GSM8K)
    {"prompt"}, or a longer talk that the user ends                    answered for people to read, not scored
    {"text"}                                                           loss alone

A file of nothing but chats, or of texts, also gives loss, perplexity and bits per byte of its own words.
dataset/answers.py says whether an answer is right.
"""

import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from common.errors import DataError
from dataset.answers import AnswerTest, answer_test, required
from dataset.chat import encode_chat, encode_text
from dataset.lm_dataset import PretrainDataset, SFTDataset, collate
from dataset.messages import to_messages
from dataset.records import Report, read_records
from inference.chat_model import ChatModel, Sampling
from model.held_out import mean_loss

MAX_TOKENS_OF_RECORD = 2048  # the tokens of a record after these do not enter the loss
SPARE_TOKENS_OF_ANSWER = 8  # a tested answer may have 2 n + 8 tokens, where the longest right one has n


@dataclass
class Question:
    """One record, and below what scoring finds out about it. kind: chat, prompt, choice or text."""

    kind: str
    family: str
    file: str
    messages: list[dict] = field(default_factory=list)  # up to the answer
    tools: list | None = None
    test: AnswerTest = AnswerTest()

    answer: str = ""  # what the model said
    is_right: bool | None = None  # None: not scored
    is_right_by_sum: bool | None = None  # of a choice, by its likelihood not divided by its length


def parse_question(record: dict, file: Path) -> Question:
    """Raises DataError, with the reason alone, for a record of an unknown kind or with unusable values."""
    kind, messages, tools, test = "prompt", [], None, AnswerTest()
    if "choices" in record or "question" in record:
        kind = "choice" if "choices" in record else "prompt"
        test = answer_test(record)
        messages = [{"role": "user", "content": required(record, "question", str)}]
    elif "prompt" in record:
        messages = [{"role": "user", "content": required(record, "prompt", str)}]
    elif "text" in record:
        kind = "text"
    else:
        messages, tools = to_messages(record)
        if messages[-1]["role"] == "assistant":
            kind, test = "chat", answer_test(record, last_turn=messages[-1]["content"])
            messages = messages[:-1]
    return Question(kind, str(record.get("family", file.stem)), str(file), messages, tools, test)


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The usable records of a file, or `limit` of them; bad ones are shown. Raises DataError for none."""
    questions, report = [], Report()
    for _, line, record in read_records([path], report=report):
        try:
            questions.append(parse_question(record, Path(path)))
        except DataError as error:
            report.add(path, line, str(error))
    if not questions:
        raise DataError(f"{path}: no record to score in it (first problem: {report.first.get(str(path))})")
    return [questions[i] for i in spread(len(questions), limit)]


def spread(count: int, limit: int | None) -> list[int]:
    """Indices of `limit` out of `count` records, evenly over the file, which may be sorted by family."""
    limit = count if limit is None else min(limit, count)
    return [i * count // limit for i in range(limit)]


def forced_loss(chat_model: ChatModel, path: Path, kind: str, limit: int | None, batch_size: int):
    """The loss of a file's own words, each predicted from the true words before it.

    Returns the mean in nats, the number of tokens and the number of bytes.
    """
    dataset_class = SFTDataset if kind == "chat" else PretrainDataset
    dataset = dataset_class(path, chat_model.tokenizer, min(chat_model.max_positions, MAX_TOKENS_OF_RECORD),
                            allow_unusable=True)  # fmt: skip
    # Rows of about the same length need less padding.
    samples = sorted(spread(len(dataset), limit), key=dataset.lengths.__getitem__)
    rows = [[sample] for sample in samples]
    batches = (collate(dataset, rows[i:i + batch_size], chat_model.stop_ids[0])
               for i in range(0, len(rows), batch_size))
    loss, tokens = mean_loss(chat_model.model, batches)
    return loss, tokens, int(dataset.num_bytes[samples].sum())


def answer_all(chat_model: ChatModel, questions: list[Question], sampling: Sampling, batch_size: int):
    """Sets `answer` and `is_right` of all, many decoded at the same time; returns tokens per second."""
    work = []  # (how long the answer may be, prompt, question)
    for question in questions:
        limit = sampling.max_new_tokens
        if question.test.answers:  # an answer far longer than all right ones is wrong, however it goes on
            longest = max(len(encode_text(chat_model.tokenizer, text)) for text in question.test.answers)
            limit = min(limit, 2 * longest + SPARE_TOKENS_OF_ANSWER)
        prompt = chat_model.encode(question.messages, question.tools)
        if len(prompt) < chat_model.max_positions:
            work.append((limit, prompt, question))
        else:
            question.is_right = question.test.is_right("")
    if too_long := len(questions) - len(work):
        print(f"warning: {too_long} questions are too long for the model: counted wrong", file=sys.stderr)
    work.sort(key=lambda item: (item[0], len(item[1])))  # a batch takes as long as its longest answer
    tokens, began = 0, time.perf_counter()
    for i in range(0, len(work), batch_size):
        limits, prompts, batch = zip(*work[i:i + batch_size], strict=True)
        steps = list(chat_model.generate(prompts, replace(sampling, max_new_tokens=max(limits))))
        for question, row in zip(batch, torch.stack(steps, dim=1).tolist(), strict=True):  # (B, steps)
            ends = [n for n, token in enumerate(row) if token in chat_model.stop_ids]
            end = min(ends, default=len(row))
            tokens += min(end + 1, len(row))
            question.answer = chat_model.decode(row[:end]).strip()
            question.is_right = question.test.is_right(question.answer)
    return tokens / max(1e-9, time.perf_counter() - began)


def choose(chat_model: ChatModel, question: Question) -> None:
    """Sets `answer` to the likeliest choice, by log-likelihood per UTF-8 byte: length is no disadvantage.

    If a choice does not fit into the model, the question counts as wrong.
    """
    scores, choices = [], question.test.choices  # a score is the log-likelihood of a whole choice, in nats
    for choice in choices:
        if chat_model.plain:
            start = chat_model.encode(question.messages)
            gap = " " if question.messages[-1]["content"][-1:].isascii() else ""  # no space after Chinese
            ids = start + encode_text(chat_model.tokenizer, gap + choice)
            mask = [0] * len(start) + [1] * (len(ids) - len(start))
        else:
            answered = [*question.messages, {"role": "assistant", "content": choice}]
            ids, mask = encode_chat(chat_model.tokenizer, answered)
        if len(ids) > chat_model.max_positions:
            print("warning: a choice is too long for the model: counted wrong", file=sys.stderr)
            question.is_right = question.is_right_by_sum = False
            return
        ids, mask = torch.tensor([[ids], [mask]], device=chat_model.device)  # each (1, T)
        labels = ids.where(mask == 1, -100)  # (1, T)
        scores.append(-chat_model.model(ids, labels=labels).token_losses.sum().item())
    per_byte = [score / len(choice.encode()) for score, choice in zip(scores, choices, strict=True)]
    best = per_byte.index(max(per_byte))
    question.answer = choices[best]
    question.is_right = best == question.test.right_choice
    question.is_right_by_sum = scores.index(max(scores)) == question.test.right_choice


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share hits / n (Wilson 1927, doi:10.2307/2276774).

    Unlike share +- 1.96 sigma it stays right near 0 and 1 and for small n: 10 of 10 give (0.72, 1).
    """
    if n == 0:
        return 0.0, 1.0
    z, share = 1.96, hits / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))  # of the width
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


@torch.inference_mode()
def score(chat_model: ChatModel, paths: list[Path], sampling: Sampling, limit=None, batch_size=32) -> dict:
    """Scores the files, prints a table and returns what --json writes.

    limit: only so many records of each file. batch_size: how many answers are decoded at the same time.
    Raises DataError for a file that cannot be read.
    """
    files = [(path, read_questions(path, limit)) for path in paths]  # all of them, before any work
    questions = [question for _, some in files for question in some]
    losses = []  # of each file: mean, tokens, bytes
    for path, some in files:
        if {question.kind for question in some} in ({"chat"}, {"text"}):
            losses.append(forced_loss(chat_model, path, some[0].kind, limit, batch_size))
    for question in questions:
        if question.kind == "choice":
            choose(chat_model, question)
    to_answer = [question for question in questions if question.kind in ("chat", "prompt")]
    speed = answer_all(chat_model, to_answer, sampling, batch_size) if to_answer else None

    result = {**table(questions), "loss": None, "bits_per_byte": None, "tokens_per_second": speed}
    tokens = sum(count for _, count, _ in losses)
    if tokens:
        nats, num_bytes = sum(loss * count for loss, count, _ in losses), sum(size for _, _, size in losses)
        result |= {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / max(1, num_bytes)}
        print(f"loss {result['loss']:.4f}, perplexity {math.exp(min(result['loss'], 700)):.2f}, "
              f"{result['bits_per_byte']:.4f} bits per byte ({tokens:,} tokens)")
    if speed:
        print(f"{speed:,.0f} tokens/s generated")
    result["answers"] = [
        {"prompt": "\n".join(message["content"] for message in question.messages), "answer": question.answer,
         "reference": question.test.reference, "ok": question.is_right, "family": question.family,
         "file": question.file} for question in questions if question.kind != "text"]
    return result


def table(questions: list[Question]) -> dict:
    """Prints and returns the shares of right answers per family and over all, with n and 95 % intervals."""
    families: dict[str, list[Question]] = {}
    for question in questions:
        if question.is_right is not None:
            families.setdefault(question.family, []).append(question)
    result = {"scores": {}, "n": {}, "intervals": {}, "multiple_choice": {}}
    if not families:
        return result
    width = max(map(len, [*families, "family"]))
    print(f"{'family':<{width}}      n  right   95 % interval")
    for name, some in [*families.items(), ("all", sum(families.values(), []))]:
        hits, n = sum(question.is_right for question in some), len(some)
        low, high = wilson(hits, n)
        result["scores"][name], result["n"][name], result["intervals"][name] = hits / n, n, [low, high]
        line = f"{name:<{width}}  {n:>5}  {hits / n:5.3f}   {low:.3f} to {high:.3f}"
        if all(question.kind == "choice" for question in some):
            chance = sum(1 / len(question.test.choices) for question in some) / n
            by_sum = sum(question.is_right_by_sum for question in some) / n
            verdict = "above" if low > chance else "below" if high < chance else "not told from"
            line += f"   {verdict} chance ({chance:.3f}); not divided by length: {by_sum:.3f}"
            result["multiple_choice"][name] = {"per_byte": hits / n, "raw": by_sum, "chance": chance}
        print(line)
    return result
