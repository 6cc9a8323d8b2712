"""Scoring: which records there are, and the numbers that come out of it."""

import json
from pathlib import Path

import pytest
import torch
from small_chat_model import turns, write

from common.errors import DataError
from inference.chat_model import ChatModel, Sampling
from inference.scoring import parse_question, read_questions, score, wilson

GREEDY = Sampling(temperature=0, max_new_tokens=2)


def test_loss_and_bits_per_byte_are_those_of_the_words(home, tmp_path):
    text = "A fox sleeps. 狐狸。"
    data = write(tmp_path / "t.jsonl", {"text": text}, {"text": "And so on."})
    chat_model = ChatModel(home / "base")
    result = score(chat_model, [data], GREEDY, limit=1)  # the first
    ids = torch.tensor([chat_model.tokenizer(text + "<|endoftext|>")["input_ids"]])
    output = chat_model.model(ids, labels=ids)
    first = len(chat_model.decode(ids[0, :1].tolist()).encode())  # nothing predicts the first token
    assert result["loss"] == pytest.approx(output.loss.item(), rel=1e-4)
    nats_per_byte = output.token_losses.sum().item() / (len(text.encode()) - first)
    assert result["bits_per_byte"] == pytest.approx(nats_per_byte / 0.6931472, rel=1e-4)
    assert result["tokens_per_second"] is None and result["answers"] == []


def test_the_loss_of_several_files_is_the_mean_over_their_tokens(home, tmp_path):
    chat_model, texts = ChatModel(home / "base"), ("A small red fox.", "猫 and so on, and so on.")
    files = [write(tmp_path / f"{i}.jsonl", {"text": text}) for i, text in enumerate(texts)]
    both = write(tmp_path / "both.jsonl", *({"text": text} for text in texts))
    together, apart = (score(chat_model, paths, GREEDY, batch_size=1) for paths in ([both], files))
    for name in ("loss", "bits_per_byte"):
        assert together[name] == pytest.approx(apart[name], rel=1e-6)


def test_multiple_choice_by_likelihood(home, capsys, tmp_path):
    """Against log-likelihoods summed by hand from the logits."""
    choices = ["yes", "a much longer answer than the other", "不"]
    data = write(
        tmp_path / "mc.jsonl", *({"question": "Is it?", "choices": choices, "answer": i} for i in range(3))
    )
    chat_model = ChatModel(home / "chat")
    result = score(chat_model, [data], GREEDY)
    assert result["scores"]["mc"] == pytest.approx(1 / 3)  # the same choice wins three times, right once
    assert "not told from chance (0.333)" in capsys.readouterr().out
    assert result["multiple_choice"]["mc"]["raw"] == pytest.approx(1 / 3)

    start, logs = chat_model.encode([{"role": "user", "content": "Is it?"}]), []
    for choice in choices:
        ids = start + chat_model.tokenizer(choice + "<|im_end|>")["input_ids"]
        log = chat_model.model(torch.tensor([ids])).logits.log_softmax(-1)[0]
        logs.append(sum(log[i - 1, ids[i]].item() for i in range(len(start), len(ids))))
    per_byte = [log / len(choice.encode()) for log, choice in zip(logs, choices, strict=True)]
    assert {a["answer"] for a in result["answers"]} == {choices[per_byte.index(max(per_byte))]}


def test_kinds_of_records():
    path, last = Path("g.jsonl"), {"role": "assistant", "content": "b"}
    for record, kind, contents in (
        (turns("a", "b"), "chat", ["a"]),
        (turns("a", "b", "c"), "prompt", ["a", "b", "c"]),
        ({"prompt": "a"}, "prompt", ["a"]),
        ({"question": "a", "answer": "1"}, "prompt", ["a"]),
        ({"question": "a", "choices": ["b"], "answer": 0}, "choice", ["a"]),
        ({"text": "a"}, "text", []),
    ):
        question = parse_question(record, path)
        assert (question.kind, question.family, question.file) == (kind, "g", "g.jsonl")
        assert [message["content"] for message in question.messages] == contents
    assert parse_question(turns("a", "b", family="x"), path).family == "x"
    assert last not in parse_question(turns("a", "b"), path).messages


def test_a_limit_spreads_over_the_file(tmp_path):
    data = write(tmp_path / "t.jsonl", *(turns("q", str(i)) for i in range(10)))
    assert [question.test.reference for question in read_questions(data, 4)] == ["0", "2", "5", "7"]
    assert len(read_questions(data, 11)) == len(read_questions(data)) == 10


def test_wilson_interval():
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-3)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)


def test_bad_records_are_shown_and_skipped(home, capsys, tmp_path):
    data = tmp_path / "t.jsonl"
    lines = [
        "{broken",
        json.dumps(turns("a", "b")),
        '{"question": "q", "choices": ["x"], "answer": 1}',
        '{"odd": 1}',
        '{"question": "q", "answer": "nothing counted"}',
    ]
    data.write_text("\n".join(lines), encoding="utf-8")
    score(ChatModel(home / "chat"), [data], GREEDY)
    got = capsys.readouterr()
    for number in (1, 3, 4):
        assert f"{data}:{number}: " in got.err
    assert "all" in got.out


@pytest.mark.parametrize("name", ["contains", "answers"])
def test_what_an_answer_is_compared_with_must_be_texts(name):
    with pytest.raises(DataError, match=f"'{name}' must be a list of texts"):
        parse_question(turns("a", "b", **{name: [5]}), Path("x"))


def test_questions_too_long_for_the_model_are_wrong_and_do_not_stop_the_rest(home, capsys, tmp_path):
    data = write(tmp_path / "t.jsonl", turns("word " * 300, "b"), turns("a", "b"))
    score(ChatModel(home / "chat"), [data], GREEDY)
    got = capsys.readouterr()
    assert f"{data}:1: a prompt of 313 tokens is too long" in got.err and "0.000" in got.out


def test_a_choice_too_long_for_the_model_is_wrong(home, capsys, tmp_path):
    long = {"question": "word " * 200, "choices": ["a", "b"], "answer": 0}
    short = {"question": "a?", "choices": ["a", "a"], "answer": 0}
    data = write(tmp_path / "q.jsonl", long, short)
    score(ChatModel(home / "chat"), [data], GREEDY)
    shown = capsys.readouterr()
    assert f"{data}:1: a choice is too long" in shown.err and "0.500" in shown.out
