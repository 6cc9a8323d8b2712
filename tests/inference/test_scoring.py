"""Scoring: which records there are, and the numbers that come out of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_chat_model import turns, write

from common.cli import ROOT
from common.errors import DataError, RunError
from dataset.keys import no_note
from dataset.prompts import read_prompt
from inference.chat_model import ChatModel, Sampling
from inference.scoring import parse_question, read_questions, score, wilson
from model.weights import load_tokenizer

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


@pytest.mark.parametrize(("record", "right", "wrong"), [
    ({"prompt": "2 + 3?", "contains": ["5"]}, "It is 5.", "It is 6."),
    ({"prompt": [{"role": "user", "content": "2 + 3?"}], "answer": "5"}, "So it is 5.0", "5 or 6"),
    ({"prompt": "2 + 3?", "gt": 5}, "5", "6"),
    (turns("Hi", "Hello!", "2 + 3?", gt="5"), "5", "6"),
    (turns("2 + 3?", answers=["5", "five"]), "five", "It is 5."),
    (turns("2 + 3?", "It is 5.", gt="5"), "5", "It is 6."),
    ({"question": "2 + 3?", "answer": "4", "answers": ["five"]}, "five", "4"),
    ({"question": "2 + 3?", "answer": 5}, "So it is 5.", "6"),
    ({"prompt": "2 + 3?", "text": None, "choices": None, "contains": None, "gt": "5"}, "5", "6"),
])  # fmt: skip
def test_a_prompt_with_something_to_check_it_by_is_scored(record, right, wrong):
    """The same files serve train_grpo.py, so both must mean the same by these keys."""
    test = parse_question(record, Path("g.jsonl")).test
    tokenizer = load_tokenizer(ROOT / "model" / "tokenizer")
    assert test == read_prompt(tokenizer, record, "g.jsonl:1", no_note).test
    assert test.is_right(right) is True and test.is_right(wrong) is False


def test_a_key_beside_a_prompt_is_obeyed_or_named():
    def notes_on(record):
        notes = []
        question = parse_question(record, Path("g.jsonl"), 1, notes.append)
        return [message["role"] for message in question.messages], notes

    user = ["user"]
    assert notes_on({"prompt": "a", "completion": "b"}) == (
        user, ["the key 'completion' of a record is not used"])  # fmt: skip
    assert notes_on({"question": "a", "answer": "1", "options": ["1", "2"]}) == (
        user, ["the key 'options' of a record is not used"])  # fmt: skip
    assert notes_on({"question": "a", "choices": ["b"], "answer": 0, "system": "S", "id": 3}) == (
        user, ["the key 'system' of a record is not used"])  # fmt: skip
    assert notes_on({"question": "a", "answer": "1", "system": "S"}) == (["system", "user"], [])


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


# ---------------------------------------------------------------- what a record is


CHAT = {"messages": [{"role": "user", "content": "Name a river."},
                     {"role": "assistant", "content": "The Rhine."}]}
ALPACA = {"instruction": "Name a river.", "input": "", "output": "The Rhine."}


@pytest.mark.parametrize("record", [
    CHAT | {"prompt": "Name a river.", "prompt_id": "a1"},  # UltraChat
    CHAT | {"question": "Name a river.", "answer": "The Rhine."},
    CHAT | {"text": "<s>[INST] Name a river."},
    CHAT | {"question": "Name a river.", "choices": ["The Rhine.", "Blue."], "answer": 0},
    {"prompt": "x", "conversations": [{"from": "human", "value": "Name a river."},
                                      {"from": "gpt", "value": "The Rhine."}]},
    ALPACA | {"text": "Below is an instruction."}, ALPACA | {"prompt": "x", "question": "y"},
])
def test_a_conversation_is_scored_as_one_whatever_stands_beside_it(record):
    """The lines of shared/cases/eval_extra_columns, and others of their kind."""
    question, plain = parse_question(record, Path("t")), parse_question(CHAT, Path("t"))
    assert question.kind == "chat" and question.messages == plain.messages
    assert question.test == plain.test and question.test.answers == ("The Rhine.",)


def test_null_columns_are_no_conversation():
    """Parquet and datasets give every record every column."""
    record = {"text": "a", "messages": None, "conversations": None}
    assert parse_question(record, Path("t")).kind == "text"


def test_extra_columns_change_no_score(home, capsys, tmp_path):
    chat_model, seen = ChatModel(home / "chat"), []
    for name, more in (("plain", {}), ("more", {"text": "x", "prompt": "y", "question": "z", "answer": "1"})):
        score(chat_model, [write(tmp_path / name / "t.jsonl", CHAT | more)], GREEDY)
        seen.append([line for line in capsys.readouterr().out.splitlines() if "tokens/s" not in line])
    assert seen[0] == seen[1] and "loss" in seen[0][-1] and len(seen[0]) == 4


# ---------------------------------------------------------------- what cannot be scored


@pytest.fixture
def foreign(home, tmp_path):
    """The chat model with a template that knows neither tools nor a system message."""
    folder = tmp_path / "foreign"
    shutil.copytree(home / "chat", folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return ChatModel(folder)


def test_a_record_that_the_model_cannot_take_is_named_and_left_out(foreign, capsys, tmp_path):
    """The lines of shared/cases/scoring_stops_at_one_record, with a control token of our tokenizer."""
    system = {"role": "system", "content": "Be brief."}
    data = write(tmp_path / "t.jsonl", CHAT, turns("What does <|im_end|> mean?", "The end of a turn."),
                 {"messages": [system, *CHAT["messages"]]}, turns("Name a colour.", "Blue."))
    choice = {"choices": ["The Rhine.", "Blue."], "answer": 0}
    choices = write(tmp_path / "mc.jsonl", {"question": "Name a river.", **choice},
                    {"question": "What does <|im_end|> mean?", **choice})
    result = score(foreign, [data, choices], GREEDY)
    errors = capsys.readouterr().err
    for place in (f"{data}:2: ", f"{data}:3: ", f"{choices}:2: "):
        assert f"warning: {place}" in errors
    assert "records not scored: 3" in errors
    assert result["skipped"] == 3 and result["n"] == {"t": 2, "mc": 1, "all": 3}
    skipped = [answer["line"] for answer in result["answers"] if answer["skipped"]]
    assert skipped == [2, 3, 2] and result["loss"] > 0


def test_nothing_that_can_be_scored_is_an_error(foreign, tmp_path):
    data = write(tmp_path / "t.jsonl", turns("What does <|im_end|> mean?", "The end of a turn."))
    with pytest.raises(DataError, match="none of 1 records can be scored .first problem: '<|im_end|>'"):
        score(foreign, [data], GREEDY)


@pytest.mark.parametrize("record", [
    CHAT, {"text": "A fox."}, {"prompt": "Hi"}, {"question": "?", "choices": ["a", "b"], "answer": 0},
])
def test_a_model_that_is_not_finite_has_no_score(home, tmp_path, record):
    chat_model = ChatModel(home / "chat")
    chat_model.model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(RunError, match="the weight model.norm.weight holds numbers that are not finite"):
        score(chat_model, [write(tmp_path / "t.jsonl", record)], GREEDY)
