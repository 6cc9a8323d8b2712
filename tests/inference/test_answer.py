"""The text of an answer in pieces: its parts are told apart, and nothing is shown too early."""

import pytest

from dataset.replies import Reply
from inference.answer import AnswerReader

MARKS = {1: "<think>", 2: "</think>", 3: "<tool_call>", 4: "</tool_call>"}


def decode(ids):
    """Ids are bytes, from 10 on: token 10 + b stands for the byte b."""
    return bytes(token - 10 for token in ids).decode("utf-8", "replace")


def tokens_of(text: str) -> list[int]:
    ids = []
    for number, mark in MARKS.items():
        text = text.replace(mark, chr(0xE000 + number))
    for sign in text:
        ids += [ord(sign) - 0xE000] if 0xE000 <= ord(sign) < 0xE010 else [byte + 10 for byte in sign.encode()]
    return ids


def read(text: str, stop=(), reply=None):
    """[(part, all that was shown of it)], and what was shown after each token."""
    reader = AnswerReader(decode, MARKS, reply or Reply(), stop)
    steps = [reader.add(token) for token in tokens_of(text)] + [reader.end()]
    parts = []
    for piece in sum(steps, []):
        if parts and parts[-1][0] == piece.part != "call":
            parts[-1][1] += piece.text
        else:
            parts.append([piece.part, piece.text])
    return [tuple(part) for part in parts], steps, reader


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hi", [("content", "Hi")]),
        ("猫 says 🐱", [("content", "猫 says 🐱")]),
        ("\n\nHi\n\n", [("content", "\n\nHi\n\n")]),  # an answer without parts is shown as it is
        (
            "<think>\nRivers.\n\nLong.\n</think>\n\nThe Rhine.\n",
            [("reasoning", "Rivers.\n\nLong."), ("content", "The Rhine.")],
        ),
        (
            'Yes.\n<tool_call>\n{"a": 1}\n</tool_call>\n<tool_call>\n{"b": 2}\n</tool_call>',
            [("content", "Yes."), ("call", '{"a": 1}'), ("call", '{"b": 2}')],
        ),
        ("<think>\ncut off\n", [("reasoning", "cut off")]),
        ('<tool_call>\n{"a":', [("call", '{"a":')]),
        ("<think></think>x", [("content", "x")]),
        ("", []),
    ],
)
def test_parts(text, expected):
    parts, _, reader = read(text)
    assert parts == expected
    assert reader.reply.text == text  # nothing of it is lost to those who need the whole
    message = reader.reply.message()
    assert "".join(text for part, text in parts if part == "reasoning") == message.get(
        "reasoning_content", ""
    )


def test_a_prompt_that_ends_in_think():
    assert read("\nHm.\n</think>\n\nYes.", reply=Reply(in_thought=True))[0] == [
        ("reasoning", "Hm."),
        ("content", "Yes."),
    ]


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("One. Two.", ["."], "One"),
        ("One. Two.", ["Tw", ". T"], "One"),
        ("aab", ["ab"], "a"),
        ("One", ["x", "One more"], "One"),  # it might have come
        ("猫狗", ["狗"], "猫"),
        ("a\n\nb", ["\n\n"], "a"),
        ("stop", ["stop"], ""),
        ("<think>\na.b\n</think>\n\nc", ["."], "a"),
    ],
)
def test_stop_texts(text, stop, shown):
    parts, steps, reader = read(text, stop)
    assert "".join(text for _, text in parts) == shown
    assert reader.has_stopped == any(word in text for word in stop)
    so_far = ""
    for pieces in steps:  # what is shown is never taken back
        so_far += "".join(piece.text for piece in pieces)
        assert shown.startswith(so_far)


def test_what_may_become_a_stop_text_waits():
    _, steps, _ = read("a STOp b", ["STOP"])
    assert ["".join(piece.text for piece in pieces) for pieces in steps] == [
        "a",
        " ",
        "",
        "",
        "",
        "STOp",
        " ",
        "b",
        "",
    ]


def test_half_a_character_waits():
    _, steps, _ = read("é!")
    assert ["".join(piece.text for piece in pieces) for pieces in steps] == ["", "é", "!", ""]


def test_pieces_count_the_tokens():
    _, steps, _ = read("abc")
    assert [piece.num_tokens for pieces in steps for piece in pieces] == [1, 2, 3]
