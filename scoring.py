"""Scores a model on test files: eval_model.py --data_path. The records, and when an answer is right:

    {"conversations": [..., {"role": "assistant", "content": "12"}]}   right: the answer is the last turn
        "answers": ["12", "It is 12."]                                 ... is any of these instead
        "contains": ["fox", "river"]                                   ... holds all of these instead
        "family": "sums"                                               scores are per family (else per file)
    {"question", "choices", "answer": 2}                               the likeliest choice is that index
    {"question", "answer": "... #### 42"}                              its final number is that (GSM8K)
    {"prompt"}, or a longer talk that the user ends                    answered for people to read, not scored
    {"text"}                                                           loss alone

A file of nothing but chats, or of texts, also gives loss, perplexity and bits per byte of its own words.
"""

import math
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dataset.chat import encode_chat, encode_text, to_messages
from dataset.jsonl import DataError, Report, read_records
from dataset.lm_dataset import PretrainDataset, SFTDataset, collate

LONGEST = 2048  # tokens of a record that enter the loss


@dataclass
class Question:
    """One record, and below what scoring finds out about it. kind: chat, prompt, choice or text."""

    kind: str
    family: str
    file: str
    messages: list[dict] = field(default_factory=list)  # up to the answer
    tools: list | None = None
    reference: str | None = None  # a right answer, for people to compare with
    answers: list[str] = field(default_factory=list)
    contains: list[str] = field(default_factory=list)
    number: str | None = None
    choices: list[str] = field(default_factory=list)
    index: int = -1  # of the right choice

    answer: str = ""  # what the model said
    ok: bool | None = None  # None: not scored
    raw_ok: bool | None = None  # of a choice, by its likelihood not divided by its length

    def judge(self) -> None:
        if self.number is not None:
            self.ok = final_number(self.answer) == self.number
        elif self.contains:
            self.ok = all(part in self.answer for part in self.contains)
        elif self.answers:
            self.ok = self.answer.strip() in {answer.strip() for answer in self.answers}


def final_number(text: str) -> str | None:
    """'... #### 1,234' -> '1234'; without #### the last number there is; None without any."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.split("####")[-1])
    return f"{float(found[-1].replace(',', '')):.10g}" if found else None


def parse_question(record: dict, file: Path) -> Question:
    """Raises DataError, with the reason alone, for a record that is none of the above."""

    def need(name: str, kind: type):
        if not isinstance(record.get(name), kind) or isinstance(record[name], bool):
            raise DataError(f"{name!r} must be a {kind.__name__}, not {str(record.get(name))[:40]!r}")
        return record[name]

    def texts(name: str) -> list[str]:
        if not all(isinstance(text, str) and text for text in need(name, list)):
            raise DataError(f"{name!r} must be a list of texts, not {str(record[name])[:40]!r}")
        return record[name]

    question = Question("prompt", str(record.get("family", file.stem)), str(file))
    if "choices" in record:
        question.kind, question.choices, question.index = "choice", texts("choices"), need("answer", int)
        if not 0 <= question.index < len(question.choices):
            raise DataError(f"answer {question.index} is no index of {len(question.choices)} choices")
        question.reference = question.choices[question.index]
        question.messages = [{"role": "user", "content": need("question", str)}]
    elif "question" in record:
        question.reference = need("answer", str)
        question.number = final_number(question.reference)
        if question.number is None:
            raise DataError("the answer holds no number to compare with")
        question.messages = [{"role": "user", "content": need("question", str)}]
    elif "prompt" in record:
        question.messages = [{"role": "user", "content": need("prompt", str)}]
    elif "text" in record:
        question.kind = "text"
    else:
        question.messages, question.tools = to_messages(record)
        if question.messages[-1]["role"] == "assistant":
            question.kind, question.reference = "chat", question.messages.pop()["content"]
            question.contains = texts("contains") if "contains" in record else []
            question.answers = texts("answers") if "answers" in record else []
            if not question.contains and not question.answers and question.reference:
                question.answers = [question.reference]
    return question


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
    return list(range(count)) if not limit or limit >= count else [i * count // limit for i in range(limit)]


def forced_loss(speaker, path: Path, kind: str) -> tuple[float, int, int]:
    """Loss of a file's own words, each predicted from the true words before: (sum in nats, tokens, bytes)."""
    longest = min(speaker.model.config.max_position_embeddings, LONGEST)
    dataset = (SFTDataset if kind == "chat" else PretrainDataset)(path, speaker.tokenizer, longest)
    samples = spread(len(dataset), speaker.args.limit)
    samples.sort(key=dataset.lengths.__getitem__)  # less padding
    loss = 0.0
    for i in range(0, len(samples), speaker.args.batch_size):
        rows = [[sample] for sample in samples[i:i + speaker.args.batch_size]]
        batch = collate(dataset, rows, speaker.stop[0])
        batch = {name: tensor.to(speaker.device) for name, tensor in batch.items() if tensor is not None}
        loss += speaker.model(**batch).loss_sum.item()
    return loss, int(dataset.num_targets[samples].sum()), int(dataset.num_bytes[samples].sum())


def answer_all(speaker, questions: list[Question]) -> float:
    """Sets `answer` and `ok` of all, many decoded at the same time; returns tokens per second."""
    work, too_long = [], 0
    for question in questions:
        limit = speaker.args.max_new_tokens
        if question.answers:  # twice as long as the longest right answer is wrong, whatever comes after
            longest = max(len(encode_text(speaker.tokenizer, text)) for text in question.answers)
            limit = min(limit, 2 * longest + 8)
        prompt = speaker.encode(question.messages, question.tools)
        if len(prompt) < speaker.model.config.max_position_embeddings:
            work.append((limit, prompt, question))
        else:
            too_long += 1
            question.judge()  # no answer is a wrong one
    if too_long:
        print(f"warning: {too_long} questions are too long for the model: counted wrong", file=sys.stderr)
    work.sort(key=lambda item: (item[0], len(item[1])))  # a batch takes as long as its longest answer
    tokens, began = 0, time.perf_counter()
    for i in range(0, len(work), speaker.args.batch_size):
        limits, prompts, batch = zip(*work[i:i + speaker.args.batch_size], strict=True)
        steps = list(speaker.generate(prompts, max(limits), speaker.args.seed))
        for question, row in zip(batch, torch.stack(steps, dim=1).tolist(), strict=True):  # (B, steps)
            end = next((n for n, token in enumerate(row) if token in speaker.stop), len(row))
            tokens += min(end + 1, len(row))
            question.answer = speaker.decode(row[:end]).strip()
            question.judge()
    return tokens / max(1e-9, time.perf_counter() - began)


def choose(speaker, question: Question) -> None:
    """Sets `answer` to the likeliest choice, by log-likelihood per UTF-8 byte: length is no disadvantage.

    Where one does not fit into the model the question counts as wrong.
    """
    raw = []
    for choice in question.choices:
        if speaker.plain:
            start = speaker.encode(question.messages)
            gap = " " if question.messages[-1]["content"][-1:].isascii() else ""  # no space after Chinese
            ids = start + encode_text(speaker.tokenizer, gap + choice)
            mask = [0] * len(start) + [1] * (len(ids) - len(start))
        else:
            answered = [*question.messages, {"role": "assistant", "content": choice}]
            ids, mask = encode_chat(speaker.tokenizer, answered)
        if len(ids) > speaker.model.config.max_position_embeddings:
            print("warning: a choice is too long for the model: counted wrong", file=sys.stderr)
            question.ok = question.raw_ok = False
            return
        labels = [token if on else -100 for token, on in zip(ids, mask, strict=True)]
        ids, labels = (torch.tensor([row], device=speaker.device) for row in (ids, labels))  # (1, T)
        raw.append(-speaker.model(ids, labels=labels).loss_sum.item())
    per_byte = [score / len(choice.encode()) for score, choice in zip(raw, question.choices, strict=True)]
    best = per_byte.index(max(per_byte))
    question.answer, question.ok = question.choices[best], best == question.index
    question.raw_ok = raw.index(max(raw)) == question.index


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share hits / n (Wilson 1927, doi:10.2307/2276774).

    Unlike share +- 1.96 sigma it stays right near 0 and 1 and for few: 10 of 10 give (0.72, 1), not (1, 1).
    """
    if n == 0:
        return 0.0, 1.0
    z, share = 1.96, hits / n
    middle = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


@torch.inference_mode()
def score(speaker, paths: list[Path]) -> dict:
    """Scores the files with eval_model.py's Speaker, prints a table and returns what --json writes.

    Raises DataError for a file that can't be read, ModelError for a prompt longer than the model.
    """
    files = [(path, read_questions(path, speaker.args.limit)) for path in paths]  # all, before any work
    questions = [question for _, some in files for question in some]
    loss, tokens, size, speed = 0.0, 0, 0, None
    for path, some in files:
        kinds = {question.kind for question in some}
        if kinds in ({"chat"}, {"text"}):
            more = forced_loss(speaker, path, *kinds)
            loss, tokens, size = loss + more[0], tokens + more[1], size + more[2]
    for question in questions:
        if question.kind == "choice":
            choose(speaker, question)
    to_answer = [question for question in questions if question.kind in ("chat", "prompt")]
    if to_answer:
        speed = answer_all(speaker, to_answer)

    result = {**table(questions), "loss": None, "bits_per_byte": None, "tokens_per_second": speed}
    if tokens:
        result |= {"loss": loss / tokens, "bits_per_byte": loss / math.log(2) / max(1, size)}
        print(f"loss {result['loss']:.4f}, perplexity {math.exp(min(result['loss'], 700)):.2f}, "
              f"{result['bits_per_byte']:.4f} bits per byte ({tokens:,} tokens)")
    if speed:
        print(f"{speed:,.0f} tokens/s generated")
    result["answers"] = [
        {"prompt": "\n".join(message["content"] for message in q.messages), "reference": q.reference,
         "answer": q.answer, "ok": q.ok, "family": q.family, "file": q.file}
        for q in questions if q.kind != "text"]
    return result


def table(questions: list[Question]) -> dict:
    """Prints and returns the shares of right answers per family and over all, with n and 95 % intervals."""
    families: dict[str, list[Question]] = {}
    for question in questions:
        if question.ok is not None:
            families.setdefault(question.family, []).append(question)
    result = {"scores": {}, "n": {}, "intervals": {}, "multiple_choice": {}}
    if not families:
        return result
    width = max(map(len, [*families, "family"]))
    print(f"{'family':<{width}}      n  right   95 % interval")
    for name, some in [*families.items(), ("all", sum(families.values(), []))]:
        hits, n = sum(question.ok for question in some), len(some)
        low, high = wilson(hits, n)
        result["scores"][name], result["n"][name], result["intervals"][name] = hits / n, n, [low, high]
        line = f"{name:<{width}}  {n:>5}  {hits / n:5.3f}   {low:.3f} to {high:.3f}"
        if all(question.kind == "choice" for question in some):
            chance = sum(1 / len(question.choices) for question in some) / n
            raw = sum(question.raw_ok for question in some) / n
            verdict = "above" if low > chance else "below" if high < chance else "not told from"
            line += f"   {verdict} chance ({chance:.3f}); not divided by length: {raw:.3f}"
            result["multiple_choice"][name] = {"per_byte": hits / n, "raw": raw, "chance": chance}
        print(line)
    return result
