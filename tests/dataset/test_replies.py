"""What a model wrote -> a message: the inverse of assistant_text, for whole texts and for their pieces."""

import json

import pytest

from dataset.chat import assistant_text, encode_chat
from dataset.messages import to_messages
from dataset.replies import MARKS, Reply, mark_ids, parse_call, read_message

CLOCK = {"name": "clock", "arguments": {"zone": "Oslo", "at": [1, 2.5, None, True]}}
MESSAGES = [
    {"content": "The Rhine."},
    {"content": "  Two lines\n\nwith spaces around.\n"},
    {"content": "The Rhine.", "reasoning_content": "Rivers are long.\nThe Rhine is one."},
    {"content": "", "tool_calls": [CLOCK]},
    {"content": "One moment.", "tool_calls": [CLOCK, {"name": "猫", "arguments": {}}]},
    {"content": "Wait.\n\nNow.", "reasoning_content": "A clock?", "tool_calls": [CLOCK, CLOCK]},
]


def read(text: str, **options) -> Reply:
    reply = Reply(MARKS, **options)
    reply.add(text)
    reply.end()
    return reply


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_comes_back_from_its_text(message):
    message = {"role": "assistant", **message}
    assert read_message(message) == message
    record = {"messages": [{"role": "user", "content": "q"}, message]}
    assert read_message(to_messages(record)[0][-1]) == message  # what the datasets make of the record


@pytest.mark.parametrize("message", MESSAGES)
def test_text_that_arrives_in_pieces_gives_the_same_message(message):
    text = assistant_text(message)
    for size in (1, 2, 3, 5, 8):
        reply, shown = Reply(MARKS), []
        for start in range(0, len(text), size):
            shown += reply.add(text[start:start + size])
        shown += reply.end()
        assert reply.message() == read(text).message() and reply.text == text
        for part in ("reasoning", "content", "call"):  # all that is shown belongs to the part it is shown as
            whole = "".join(text for name, text in reply.parts if name == part)
            assert "".join(text for name, text in shown if name == part) == whole


def test_the_beginning_of_a_mark_waits_and_is_text_if_no_mark_comes():
    reply = Reply(MARKS)
    assert reply.add("1 <") == [("content", "1 ")]
    assert reply.add(" 2 <thi") == [("content", "< 2 ")]
    assert reply.end() == [("content", "<thi")]


def test_a_prompt_that_begins_the_thought():
    """The templates of Qwen3-Thinking and DeepSeek-R1 write <think> themselves."""
    message = read("Rivers are long.\n</think>\n\nThe Rhine.", in_thought=True).message()
    assert message["reasoning_content"] == "Rivers are long." and message["content"] == "The Rhine."
    cut = read("Rivers are lo", in_thought=True).message()
    assert cut == {"role": "assistant", "content": "", "reasoning_content": "Rivers are lo"}


def test_an_empty_thought_is_no_thought():
    assert read("<think>\n\n</think>\n\nHi").message() == {"role": "assistant", "content": "Hi"}


@pytest.mark.parametrize("text", ["{", "[1]", '{"name": 1}', '{"arguments": {}}', "[" * 100_000, "",
                                  '{"name": "a", "name": "b"}', '{"name": "a", "arguments": {}, "more": 1}'])
def test_what_is_no_call_stays_as_it_was_written(text):
    assert parse_call(text) is None
    assert read(f"<tool_call>{text}</tool_call>").message()["content"] == f"<tool_call>{text}</tool_call>"


def test_arguments_written_as_json_text_are_values():
    assert parse_call(json.dumps(CLOCK | {"arguments": json.dumps(CLOCK["arguments"])})) == CLOCK
    assert parse_call('{"name": "now"}') == {"name": "now", "arguments": {}}


@pytest.mark.parametrize("text", [
    "<think>short</think>The Rhine.",  # other line breaks than ours
    "<think>\nnever ends", "<tool_call>\n{\"name\": \"a\", \"arguments\": {\"n\": 1}}</tool_call> there",
    "The Rhine.", "<think>\nLong.\n</think>\n\nThe Rhine.",
])
def test_the_next_prompt_holds_the_tokens_that_the_model_wrote(tokenizer, text):
    user = {"role": "user", "content": "q"}
    as_trained, mask = encode_chat(tokenizer, [user, {"role": "assistant", "content": text}])
    assert encode_chat(tokenizer, [user, read(text).turn(tokenizer)]) == (as_trained, mask)


def test_the_text_of_a_base_model_is_a_turn_without_a_tokenizer():
    """A base model's tokenizer may have a template that refuses every conversation."""
    reply = Reply()
    reply.add("\n<think>x</think>y\n")
    assert reply.turn(None) == {"role": "assistant", "content": "\n<think>x</think>y\n"}


def test_the_marks_of_our_tokenizer(tokenizer):
    assert mark_ids(tokenizer) == {tokenizer.convert_tokens_to_ids(mark): mark for mark in MARKS}
