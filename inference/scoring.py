"""Scores a model on test files: eval_model.py --data_path. A reader may skip this file.

The records, and when an answer is right:

    {"conversations": [..., {"role": "assistant", "content": "12"}]}   right: the words and the tool calls of
                                                                       this last turn, whatever it thought
        "answers": ["12", "It is 12."]                                 ... the words are any of these instead
        "contains": ["fox", "river"]                                   ... holds all of these instead
        "family": "sums"                                               scores are per family (else per file)
    {"question", "choices", "answer": 2}                               the likeliest choice is that index
    {"question", "answer": "... #### 42"}                              its final number is that (GSM8K)
    {"prompt"}, {"question"}, or a longer talk that the user ends      answered for people to read, not scored
        "contains", "answers", "gt" or "answer"                        ... scored by it: dataset/prompts.py
    {"text"}                                                           loss alone

A record with a conversation, in any format of dataset/messages.py, is scored as one, whatever else it holds.
A record that the model cannot be asked, as its tokenizer or its template refuses it, is named and left out. A
file of nothing but chats, or of texts, also gives loss, perplexity and bits per byte of its own words.
dataset/answers.py says whether an answer is right.
"""

import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from common.errors import DataError, RunError
from dataset.answers import AnswerTest, answer_test, required
from dataset.chat import assistant_text, encode_chat, encode_continuation, encode_text
from dataset.foreign_chat import thinks
from dataset.keys import NAMES, is_empty, name_unknown, no_note
from dataset.lm_dataset import PretrainDataset, SFTDataset, collate
from dataset.messages import to_messages
from dataset.prompts import holds_chat, read_asked, test_of
from dataset.records import Report, read_records, reason_of
from dataset.replies import Reply, read_message
from inference.chat_model import DEFAULT_NEW_TOKENS, ChatModel, Sampling
from model.generate import why_not_finite
from model.held_out import mean_loss

MAX_TOKENS_OF_RECORD = 2048  # the tokens of a record after these do not enter the loss
NOT_SCORED, TOO_LONG = "records not scored", "records too long for the model, counted wrong"  # for the report
SPARE_TOKENS_OF_ANSWER = 8  # a tested answer may have 2 n + 8 tokens, where the longest right one has n


@dataclass
class Question:
    """One record, and below what scoring finds out about it. kind: chat, prompt, choice or text."""

    kind: str
    family: str
    file: str
    line: int | None = None
    messages: list[dict] = field(default_factory=list)  # up to the answer
    last_turn: dict | None = None  # the answer that the record holds, as a message
    tools: list | None = None
    test: AnswerTest = AnswerTest()

    answer: str = ""  # what the model said
    reasoning: str | None = None  # what it thought before
    calls: list[dict] = field(default_factory=list)  # its tool calls
    skipped: str | None = None  # why the model could not be asked
    is_right: bool | None = None  # None: not scored
    is_right_by_sum: bool | None = None  # of a choice, by its likelihood not divided by its length


def parse_question(record: dict, file: Path, line: int | None = None, note=no_note) -> Question:
    """The question of a record. note(text) is called for what is not used of a conversation.

    Raises DataError, with the reason alone, for a record of an unknown kind or with unusable values.
    """
    kind, messages, last_turn, tools, test = "prompt", [], None, None, AnswerTest()
    is_choice = record.get("choices") is not None
    is_asked = not all(is_empty(record.get(name)) for name in NAMES["asked"])
    if holds_chat(record) or record.get("chosen") or not (is_choice or is_asked or "text" in record):
        messages, tools = to_messages(record, note)
        if messages[-1]["role"] == "assistant":
            kind, messages, last_turn = "chat", messages[:-1], messages[-1]
        test = test_of(record, last_turn and read_message(last_turn))
    elif is_choice:
        kind, test = "choice", answer_test(record)
        messages = [{"role": "user", "content": required(record, "question", str)}]
        name_unknown(record, {"question", "choices", "answer"}, "record", note)
    elif is_asked:
        messages, tools = read_asked(record, note)
        test = test_of(record, None)
        known = {*NAMES["asked"], *NAMES["system"], *NAMES["tools"], "answer"}
        name_unknown(record, known, "record", note)
    else:
        kind = "text"
    family = str(record.get("family", file.stem))
    return Question(kind, family, str(file), line, messages, last_turn, tools, test)


def read_questions(path: Path, limit: int | None = None, report: Report | None = None) -> list[Question]:
    """The usable records of a file, or `limit` of them; bad ones are shown. Raises DataError for none."""
    questions, report = [], Report() if report is None else report
    for _, line, record in read_records([path], report=report):
        try:
            notes = []
            questions.append(parse_question(record, Path(path), line, notes.append))
            for text in dict.fromkeys(notes):
                report.note(path, line, text)
        except (DataError, RecursionError) as error:
            report.add(path, line, reason_of(error))
    if not questions:
        raise DataError(f"{path}: no record to score in it (first problem: {report.first.get(str(path))})")
    return [questions[i] for i in spread(len(questions), limit)]


def spread(count: int, limit: int | None) -> list[int]:
    """Indices of `limit` out of `count` records, evenly over the file, which may be sorted by family."""
    limit = count if limit is None else min(limit, count)
    return [i * count // limit for i in range(limit)]


def forced_loss(chat_model: ChatModel, path: Path, kind: str, limit: int | None, batch_size: int):
    """The loss of a file's own words, each predicted from the true words before it.

    Returns the mean in nats, the number of tokens and the number of bytes. Raises RunError for a loss that is
    not finite.
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
    if not math.isfinite(loss):
        raise RunError(f"{path}: the loss of the model is {loss}: {why_not_finite(chat_model.model)}")
    return loss, tokens, int(dataset.num_bytes[samples].sum())


def answer_all(chat_model: ChatModel, questions: list[Question], sampling: Sampling, batch_size: int,
               report: Report):
    """Sets `answer` and `is_right` of all, many decoded at the same time; returns tokens per second.

    A question that cannot be asked goes to the report, and stays without an answer.
    """
    work = []  # (how long the answer may be, prompt, the last turn as the model would write it, question)
    for question in questions:
        try:
            thinking = question.last_turn is not None and thinks(question.last_turn)
            prompt = chat_model.encode(question.messages, question.tools, thinking)
            reference = last_turn_ids(chat_model, question)
            limit = max_answer_tokens(chat_model, question, prompt, reference, sampling.max_new_tokens)
        except (DataError, RecursionError) as error:
            skip(question, error, report)
            continue
        if len(prompt) < chat_model.max_positions:
            work.append((limit, prompt, reference, question))
        else:
            reason = f"a prompt of {len(prompt)} tokens is too long for the model: counted wrong"
            report.add(question.file, question.line, reason, TOO_LONG)
            question.is_right = question.test.is_right("")
    work.sort(key=lambda item: (item[0], len(item[1])))  # a batch takes as long as its longest answer
    tokens, began = 0, time.perf_counter()
    for i in range(0, len(work), batch_size):
        batch = work[i:i + batch_size]
        most, prompts = max(limit for limit, *_ in batch), [prompt for _, prompt, *_ in batch]
        steps = list(chat_model.generate(prompts, replace(sampling, max_new_tokens=most)))
        rows = torch.stack(steps, dim=1).tolist()  # (B, steps)
        for (_, prompt, reference, question), row in zip(batch, rows, strict=True):
            ends = [n for n, token in enumerate(row) if token in chat_model.stop_ids]
            end = min(ends, default=len(row))
            tokens += min(end + 1, len(row))
            take_answer(question, chat_model.read(prompt, row[:end]))
            # Tool calls that a template writes without <tool_call> can only be compared as tokens.
            is_last_turn = question.test.calls is not None and row[:end] == reference
            question.is_right = is_last_turn or question.test.is_right(question.answer, question.calls)
    return tokens / max(1e-9, time.perf_counter() - began)


def skip(question: Question, error: Exception, report: Report) -> None:
    question.skipped = reason_of(error)
    report.add(question.file, question.line, question.skipped, NOT_SCORED)


def take_answer(question: Question, reply: Reply) -> None:
    message = reply.message()
    question.answer, question.reasoning = message["content"].strip(), message.get("reasoning_content")
    question.calls = message.get("tool_calls", [])


def last_turn_ids(chat_model: ChatModel, question: Question) -> list[int]:
    """The tokens with which the model would give the answer of the record, thinking and tool calls included.

    Without the token that ends it; empty where the record holds no answer. Raises DataError.
    """
    if question.last_turn is None:
        return []
    if chat_model.plain:
        return encode_text(chat_model.tokenizer, assistant_text(question.last_turn))
    # An answer that is not to be learnt is scored all the same.
    answer = {key: value for key, value in question.last_turn.items() if key != "trained"}
    ids, mask = encode_chat(chat_model.tokenizer, [*question.messages, answer], question.tools)
    end = max((place for place, supervised in enumerate(mask) if supervised), default=-1) + 1
    start = max((place for place in range(end) if not mask[place]), default=-1) + 1
    return [token for token in ids[start:end] if token not in chat_model.stop_ids]


def max_answer_tokens(chat_model: ChatModel, question: Question, prompt: list[int], reference: list[int],
                      wanted: int | None) -> int:
    """How long an answer may get: an answer far longer than all right ones is wrong, however it goes on.

    wanted: a limit that the person set, which is kept.
    """
    right = [len(encode_text(chat_model.tokenizer, text)) for text in question.test.answers]
    needed = 2 * max([len(reference), *right]) + SPARE_TOKENS_OF_ANSWER
    # Without a list of right answers, or where the prompt begins a thought, an answer may be longer.
    if not question.test.answers or chat_model.new_reply(prompt).part == "reasoning":
        needed = max(needed, DEFAULT_NEW_TOKENS)
    return needed if wanted is None else min(needed, wanted)


def choose(chat_model: ChatModel, question: Question) -> None:
    """Sets `answer` to the likeliest choice, by log-likelihood per UTF-8 byte: length is no disadvantage.

    If a choice does not fit into the model, the question counts as wrong.
    """
    scores, choices = [], question.test.choices  # a score is the log-likelihood of a whole choice, in nats
    for choice in choices:
        if chat_model.plain:
            asked = "\n".join(message["content"] for message in question.messages)
            gap = " " if asked[-1:].isascii() else ""  # no space after Chinese
            ids, mask = encode_continuation(chat_model.tokenizer, asked, gap + choice)
            if mask[:1] == [1]:  # an empty question: the first token is predicted from a token before it
                ids, mask = chat_model.stop_ids[:1] + ids, [0] + mask
        else:
            answered = [*question.messages, {"role": "assistant", "content": choice}]
            ids, mask = encode_chat(chat_model.tokenizer, answered)
        if len(ids) > chat_model.max_positions:
            question.is_right = question.is_right_by_sum = False
            return
        ids, mask = torch.tensor([[ids], [mask]], device=chat_model.device)  # each (1, T)
        labels = ids.where(mask == 1, -100)  # (1, T)
        scores.append(-chat_model.model(ids, labels=labels).token_losses.sum().item())
    if not all(map(math.isfinite, scores)):
        raise RunError(f"the likelihoods of the choices are {scores}: {why_not_finite(chat_model.model)}")
    per_byte = [score / len(choice.encode()) for score, choice in zip(scores, choices, strict=True)]
    best = per_byte.index(max(per_byte))
    question.answer = choices[best]
    question.is_right = best == question.test.right_choice
    question.is_right_by_sum = scores.index(max(scores)) == question.test.right_choice


def choose_or_report(chat_model: ChatModel, question: Question, report: Report) -> None:
    """`choose`, for a record that may be impossible: it goes to the report then."""
    try:
        choose(chat_model, question)
    except (DataError, RecursionError) as error:
        skip(question, error, report)
        return
    if not question.answer:
        reason = "a choice is too long for the model: counted wrong"
        report.add(question.file, question.line, reason, TOO_LONG)


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
    report = Report()
    files = [(path, read_questions(path, limit, report)) for path in paths]  # all of them, before any work
    questions = [question for _, some in files for question in some]
    # Weights that are not finite raise a RunError here, whatever is scored.
    next(chat_model.generate([chat_model.stop_ids[:1]], Sampling(temperature=0, max_new_tokens=1)))
    losses = []  # of each file: mean, tokens, bytes
    for path, some in files:
        if {question.kind for question in some} in ({"chat"}, {"text"}):
            try:
                losses.append(forced_loss(chat_model, path, some[0].kind, limit, batch_size))
            except DataError as error:  # such as a template that refuses every record
                report.add(path, None, f"no loss of its words: {error}", "files without a loss")
    if not losses:  # else forced_loss has read the file as training does, and has named what is not used
        for line in report.note_lines():
            print(f"warning: {line}", file=sys.stderr)
    for question in questions:
        if question.kind == "choice":
            choose_or_report(chat_model, question, report)
    to_answer = [question for question in questions if question.kind in ("chat", "prompt")]
    speed = answer_all(chat_model, to_answer, sampling, batch_size, report) if to_answer else None
    if report.counts:
        print(f"warning: {report.summary()}", file=sys.stderr)
    if not losses and all(question.skipped or question.kind == "text" for question in questions):
        reason = next(iter(report.first.values()))
        raise DataError(f"none of {len(questions)} records can be scored (first problem: {reason})")

    thoughts = [question.reasoning is not None for question in to_answer if not question.skipped]
    result = {**table(questions), "skipped": report.counts.get(NOT_SCORED, 0), "loss": None,
              "bits_per_byte": None, "tokens_per_second": speed,
              "thought": sum(thoughts) / len(thoughts) if thoughts else None}
    if any(thoughts):
        print(f"thought before {sum(thoughts)} of {len(thoughts)} answers")
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
         "reasoning": question.reasoning, "tool_calls": question.calls, "reference": question.test.reference,
         "reference_tool_calls": list(question.test.calls or ()), "ok": question.is_right,
         "skipped": question.skipped, "family": question.family, "file": question.file, "line": question.line}
        for question in questions if question.kind != "text"]
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
