"""Records of every format give the same messages; what is wrong with a record is said in one line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from dataset import chat
from dataset.messages import ROLES, to_messages

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "加 two", "parameters": {"a": 1}}},
    {"name": "tell", "parameters": {}},
]


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        {"instruction": "Hi", "input": "", "output": "Hello!"},
        {"instruction": "Hi", "output": "Hello!", "input": None},
        {"conversations": json.dumps([USER, ASSISTANT]), "tools": ""},
        {"conversations": None, "messages": [USER, ASSISTANT], "tools": None},
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ASSISTANT],
            "tools": "[]",
        },
        {"messages": [{"role": "user", "content": [{"type": None, "text": "Hi", "x": None}]}, ASSISTANT]},
    ],
)
def test_formats_give_the_same_messages(record):
    assert to_messages(record) == ([USER, ASSISTANT], None)


def test_more_formats():
    system = {"role": "system", "content": "S"}
    assert to_messages({"system": "S", "messages": [USER, ASSISTANT]})[0] == [system, USER, ASSISTANT]
    assert to_messages({"instruction": "a", "input": "b", "output": "c"})[0][0]["content"] == "a\nb"
    record = {
        "tools": json.dumps(TOOLS),
        "conversations": [
            USER,
            {"role": "function_call", "content": '{"name": "add", "arguments": {"a": 1}}'},
            {"role": "observation", "content": "3"},
            ASSISTANT,
        ],
    }
    messages, tools = to_messages(record)
    assert tools == TOOLS
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "add", "arguments": {"a": 1}}],
    }


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"question": "a", "x\n" * 40: 1}, "no conversations, messages or instruction and output"),
        ({}, "but nothing"),
        ({"messages": []}, "no conversations, messages"),
        ({"messages": 5}, "not a list of messages"),
        ({"messages": "hello"}, "not valid JSON"),
        ({"messages": ["hello"]}, "message 1 is not an object"),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, "message 2 has the role 'robot'"),
        ({"messages": [{"content": "x"}]}, "message 1 has the role 'None'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "has the role"),
        ({"messages": [USER, {"role": "system", "content": "x"}, ASSISTANT]}, "not the first message"),
        ({"messages": [{"role": "user", "content": 5}, ASSISTANT]}, "content of message 1 is not text"),
        ({"messages": [{"role": "user"}, ASSISTANT]}, "content of message 1 is not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]}, "not text"),
        ({"messages": [USER, {"role": "assistant", "content": ""}, USER, ASSISTANT]}, "says nothing"),
        ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "without a name"),
        ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": 3}]}, "without a name"),
        ({"messages": [USER, {"role": "function_call", "content": "add(1)"}]}, "not valid JSON"),
        ({"messages": [USER, {"role": "function_call", "content": 5}]}, "without a name"),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{"}]},
                ]
            },
            "JSON",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "x", "reasoning_content": 5}]},
            "reasoning_content",
        ),
        ({"messages": [USER, ASSISTANT], "tools": "["}, "tools: not valid JSON"),
        ({"messages": [USER, ASSISTANT], "tools": '["\\ud800"]'}, "half of a surrogate pair"),
        ({"messages": [USER, ASSISTANT], "tools": "[" * 100_000}, "tools: JSON nested too deeply"),
        ({"messages": [USER, ASSISTANT], "tools": '[{"a": 1, "a": 2}]'}, "the key 'a' twice"),
        ({"messages": [USER, ASSISTANT], "tools": {"a": 1}}, "tools is not a list"),
        ({"instruction": ["x"], "output": "x"}, "instruction must be text"),
        ({"instruction": "x", "output": True}, "output must be text"),
    ],
)
def test_wrong_records(record, reason):
    with pytest.raises(DataError) as error:
        to_messages(record)
    assert reason in str(error.value) and "\n" not in str(error.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(
    ["role", "from", "content", "value", "tool_calls", "reasoning_content", "name", "arguments"]
)
turns = st.dictionaries(keys, st.sampled_from(sorted(ROLES)) | json_values, max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["messages", "conversations"]), st.lists(turns, max_size=3) | json_values, json_values)
def test_no_record_gives_a_traceback(tokenizer, key, conversation, tools):
    try:
        messages, tools = to_messages({key: conversation, "tools": tools, "system": tools})
    except DataError as error:
        assert "\n" not in str(error)
    else:
        chat.encode_chat(tokenizer, messages, tools)
