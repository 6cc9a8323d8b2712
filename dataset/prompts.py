"""Prompts that the model answers by itself, with what their answers are checked by.
A reader may skip this file.

    {"prompt": "What is 2 + 3?", "contains": ["5"]}              a prompt: a text, or a list of messages
    {"conversations": [..., {"role": "user", ...}], "gt": "5"}   ends with the user, or with an empty answer
    {"conversations": [..., {"role": "assistant", ...}]}         the last answer is a right one, and left out
    {"question": "...", "answer": "... #### 42"}                 the final number decides (GSM8K)

"answers" and "contains" say what a right answer is, as in dataset/answers.py. "gt", MiniMind's key, means
"contains". A record without any of them is a prompt that other rewards judge. "max_reward_tokens" is for the
reward "length". An empty cell of a table is no key. inference/scoring.py means the same by all of this.
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import DataError
from dataset.answers import AnswerTest, answer_test, required
from dataset.chat import encode_chat
from dataset.keys import ALPACA, NAMES, is_empty, value_of
from dataset.messages import messages_in, to_messages
from dataset.records import Report, check_paths, nothing_usable, read_records, reason_of
from dataset.replies import read_message


@dataclass(frozen=True)
class Prompt:
    """One record. ids: the tokens after which the answer begins. where: such as "data.jsonl:17"."""

    messages: list[dict]
    ids: list[int]
    test: AnswerTest
    record: dict
    where: str


class PromptDataset:
    """The prompts of files of records, in memory.

    max_length: longer prompts are left out, because no room would be left for an answer. needs_test: so are
    records with nothing to check an answer by. Bad records are counted and skipped, and the first few are
    shown (quiet: none); with strict they are fatal. Raises DataError as dataset/lm_dataset.py does.
    """

    def __init__(self, data_path, tokenizer, max_length: int, *, needs_test: bool = False,
                 strict: bool = False, allow_unusable: bool = False, quiet: bool = False):
        report, self.prompts, sha256 = Report(strict, 0 if quiet else 3), [], hashlib.sha256()
        for path, line, record in read_records(data_path, report=report):
            try:
                notes: list[str] = []
                prompt = read_prompt(tokenizer, record, f"{path}:{line}", notes.append)
                if len(prompt.ids) > max_length:
                    length = len(prompt.ids)
                    raise DataError(f"a prompt of {length} tokens, of which {max_length} fit into a row")
                if needs_test and not prompt.test.decides:
                    raise DataError("nothing to check an answer by: it needs answers, contains, or gt")
            except (DataError, RecursionError) as error:
                report.add(path, line, reason_of(error))
                continue
            for text in dict.fromkeys(notes):
                report.note(path, line, text)
            report.usable[path] += 1
            self.prompts.append(prompt)
            # The whole record, since rewards may look at any of its keys.
            sha256.update(repr((prompt.ids, prompt.test, record)).encode("utf-8", "backslashreplace"))
        for path in check_paths(data_path):
            if not report.usable[path]:
                raise nothing_usable(path, report)
            if (refusal := report.refusal(path)) and not allow_unusable:
                raise DataError(f"{refusal}; give --allow_unusable to use the rest")
        if not quiet:
            for text in [*report.note_lines(), report.summary()]:
                if text:
                    print(f"warning: {text}", file=sys.stderr)
        self.identity = f"{len(self):,} prompts, sha256 {sha256.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


def read_prompt(tokenizer, record: dict, where: str, note: Callable) -> Prompt:
    """The prompt of a record. Raises DataError, with the reason alone, where there is none."""
    last_turn = None
    if holds_chat(record) or value_of(record, "asked") is None:
        messages, tools = to_messages(record, note)
        if messages[-1]["role"] == "assistant":
            messages, last_turn = messages[:-1], read_message(messages[-1])
    else:
        messages, tools = read_asked(record, note)
    if not messages or messages[-1]["role"] == "assistant":
        raise DataError("the prompt ends with an answer, and holds no question")
    longest = record.get("max_reward_tokens")
    if not is_empty(longest) and required(record, "max_reward_tokens", int) < 1:
        raise DataError(f"'max_reward_tokens' must be at least 1, not {longest}")
    ids, _ = encode_chat(tokenizer, messages, tools, True)
    return Prompt(messages, ids, test_of(record, last_turn), record, where)


def holds_chat(record: dict) -> bool:
    """Whether a record holds a conversation, which counts more than a question or a prompt beside it."""
    is_alpaca = {"instruction", "output"} <= record.keys() and any(
        not is_empty(record.get(key)) for key in ALPACA)
    return is_alpaca or value_of(record, "conversation") is not None


def read_asked(record: dict, note: Callable) -> tuple[list[dict], list | None]:
    """The messages and tools of a record with a "question" or a "prompt": a text, or a list of messages."""
    if not is_empty(record.get("choices")):
        raise DataError("a multiple choice: it can be scored, and is no prompt for an answer in words")
    asked = messages_in(value_of(record, "asked"))
    turns = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    beside = {key: record[key] for key in (*NAMES["system"], *NAMES["tools"]) if key in record}
    return to_messages({"messages": turns} | beside, note)


def test_of(record: dict, last_turn: dict | None) -> AnswerTest:
    """How answers to the record are checked. last_turn: the right answer that its conversation ends with."""
    said = last_turn or {"content": ""}
    if is_empty(record.get("answers")) and is_empty(record.get("contains")):
        if not is_empty(expected := record.get("gt")):
            # A table has 5.0 for 5 where another row has no number.
            texts = [f"{value:.15g}" if isinstance(value, float) else str(value)
                     for value in (expected if isinstance(expected, list) else [expected])]
            record = {"contains": texts}
        elif last_turn is None and not is_empty(record.get("answer")):
            return answer_test({"question": "", "answer": str(record["answer"])})
    return answer_test(record, said["content"], said.get("tool_calls", ()))
