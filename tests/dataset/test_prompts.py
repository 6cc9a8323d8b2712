"""Prompts: what is asked, and what its answers are checked by, in the formats that people have."""

import json

import pytest

from common.errors import DataError
from dataset.chat import encode_chat
from dataset.prompts import PromptDataset

ASKED = [{"role": "user", "content": "What is 2 + 3?"}]
FIVE, THOUGHT = [{"role": "assistant", "content": "5"}], "<think>\nHm.\n</think>\n\n"
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}, *ASKED]


@pytest.fixture(scope="module")
def tokenizer():
    from common.cli import ROOT
    from model.weights import load_tokenizer

    return load_tokenizer(ROOT / "model" / "tokenizer")


@pytest.fixture
def read(tmp_path, tokenizer):
    def read(*records, **settings):
        path = tmp_path / "x.jsonl"
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
                        encoding="utf-8")
        return PromptDataset(path, tokenizer, settings.pop("max_length", 100), **settings)

    return read


@pytest.mark.parametrize(("record", "messages", "right", "wrong"), [
    ({"prompt": "What is 2 + 3?", "contains": ["5"]}, ASKED, "It is 5.", "It is 6."),
    ({"prompt": "What is 2 + 3?", "answers": ["5", "five"]}, ASKED, " five ", "It is 5."),
    ({"prompt": TURNS, "answers": ["5"]}, TURNS, "5", "6"),
    ({"prompt": "What is 2 + 3?", "answer": "5"}, ASKED, "So it is 5.", "6"),
    ({"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"}, ASKED, "2 + 3 is 5", "2 + 3"),
    ({"conversations": [*TURNS, *FIVE]}, TURNS, "5", "6"),
    ({"conversations": [*TURNS, *FIVE], "contains": ["five"]}, TURNS, "five!", "5"),
    ({"conversations": [*TURNS, {"role": "assistant", "content": ""}], "gt": ["5"]}, TURNS, "2 + 3 = 5", "4"),
    ({"conversations": [*TURNS, {"role": "assistant", "content": "无"}], "gt": 5}, TURNS, "2 + 3 = 5", "4"),
    ({"conversations": TURNS, "gt": "5"}, TURNS, "5", "4"),
    ({"conversations": TURNS, "gt": 5.0}, TURNS, "It is 5.", "4"),
    ({"prompt": TURNS, "gt": [2.5]}, TURNS, "2.5", "2"),
    ({"messages": [*TURNS, {"role": "assistant", "content": f"{THOUGHT}5"}]}, TURNS, "5", f"{THOUGHT}6"),
    ({"prompt": json.dumps(TURNS), "answers": ["5"]}, TURNS, "5", "6"),  # a cell of a table
    ({"prompt": "What is 2 + 3?", "question": None, "contains": None, "gt": "", "answer": "5",
      "max_reward_tokens": None, "choices": []}, ASKED, "5", "6"),
    ({"prompt": "[INST] ...", "instruction": "What is 2 + 3?", "output": "5"}, ASKED, "5", "6"),
    ({"prompt": "What is 2 + 3?", "input": "2, 3", "output": "Five.", "gt": 5}, ASKED, "5", "6"),
    ({"prompt": "What is 2 + 3?", "system_prompt": "Be brief.", "contains": ["5"]},
     [{"role": "system", "content": "Be brief."}, *ASKED], "It is 5.", "6"),
])  # fmt: skip
def test_what_is_asked_and_what_is_right(read, tokenizer, record, messages, right, wrong):
    [prompt] = read(record).prompts
    assert prompt.messages == messages and prompt.record == record
    assert prompt.ids == encode_chat(tokenizer, messages, None, True)[0]
    assert prompt.test.is_right(right) is True and prompt.test.is_right(wrong) is False


def test_the_identity_follows_every_key_that_a_reward_may_read(read):
    record = {"prompt": "2 + 3?", "answers": ["5"], "max_reward_tokens": 4}
    assert read(record).identity == read(record).identity != read(record | {"max_reward_tokens": 9}).identity


def test_a_prompt_without_a_test_serves_other_rewards(read, capsys):
    record = {"prompt": "Tell me a story."}
    assert read(record).prompts[0].test.is_right("A story.") is None
    dataset = read(record, {"prompt": "2 + 3?", "answers": ["5"]}, needs_test=True)
    assert len(dataset) == 1
    assert "x.jsonl:1: nothing to check an answer by" in capsys.readouterr().err
    with pytest.raises(DataError, match="no usable record in it .*nothing to check an answer by"):
        read(record, needs_test=True)


def test_tools_and_a_system_message_are_a_part_of_the_prompt(read, tokenizer):
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    calls = [{"role": "assistant", "content": "", "tool_calls": [{"name": "clock", "arguments": {}}]}]
    [prompt] = read({"conversations": [*ASKED, *calls], "tools": tools, "system": "Be brief."}).prompts
    messages = [{"role": "system", "content": "Be brief."}, *ASKED]
    assert prompt.ids == encode_chat(tokenizer, messages, tools, True)[0]
    assert prompt.test.is_right("", [{"name": "clock", "arguments": {}}]) is True
    assert prompt.test.is_right("", []) is False


@pytest.mark.parametrize(("record", "says"), [
    ({"text": "A story."}, "no conversations"),
    ({"prompt": 3}, "content"),
    ({"question": "Why?", "answer": "Because."}, "holds no number"),
    ({"prompt": "What?", "answers": "5"}, "'answers' must be a list"),
    ({"prompt": "long " * 99, "answers": ["5"]}, "tokens, of which 60 fit into a row"),
    ({"prompt": [*ASKED, *FIVE]}, "ends with an answer"),
    ({"prompt": "[INST] 2 + 3?", "question": "2 + 3?", "answer": "5"}, "say different things"),
    ({"question": "2 + 3?", "choices": ["4", "5"], "answer": 1}, "a multiple choice"),
])  # fmt: skip
def test_a_record_that_cannot_be_asked_is_named_with_its_line(read, capsys, record, says):
    good = {"prompt": "2 + 3?", "answers": ["5"]}
    assert len(read(good, record, max_length=60)) == 1
    error = capsys.readouterr().err
    assert "x.jsonl:2: " in error and says in error
    with pytest.raises(DataError, match="fatal with --strict"):
        read(good, record, max_length=60, strict=True)


def test_a_file_of_which_most_cannot_be_used_is_refused(read):
    bad = {"text": "A story."}
    with pytest.raises(DataError, match="2 of 3 records cannot be used"):
        read({"prompt": "2 + 3?"}, bad, bad)
    assert len(read({"prompt": "2 + 3?"}, bad, bad, allow_unusable=True)) == 1


def test_the_identity_changes_with_prompts_and_with_tests(read):
    found = {read({"prompt": "2 + 3?", "answers": [answer]}).identity for answer in ("5", "6")}
    found |= {read({"prompt": "2 + 4?", "answers": ["6"]}).identity}
    assert len(found) == 3 and all("1 prompts" in text for text in found)
