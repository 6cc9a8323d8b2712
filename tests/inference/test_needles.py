"""Needles: where they lie, that nobody can guess them, and that right answers are counted."""

import json
import random
import re

import pytest
from PIL import Image

import eval_model
from common.errors import UsageError
from dataset.chat import encode_text
from dataset.synthetic import World
from dataset.world.needles import hay, make_chats, make_needle
from inference import needles
from inference.chat_model import ChatModel
from model.weights import load_tokenizer

FACT = re.compile(r"The code of (\w+) is (\d{4})\.")


@pytest.fixture(scope="module")
def world():
    return World(0)


@pytest.fixture(scope="module")
def length_of():
    tokenizer = load_tokenizer(eval_model.ROOT / "model" / "tokenizer")
    return lambda text: len(encode_text(tokenizer, text))


@pytest.fixture(scope="module")
def chat(home):
    return ChatModel(home / "chat", device="cpu")


@pytest.mark.parametrize("room", [64, 300])
def test_a_text_fills_its_room_and_holds_one_needle_at_its_depth(world, length_of, room):
    world.rng = random.Random(0)
    sentences, places = hay(world, length_of), {0.0: [], 0.5: [], 1.0: []}
    for depth in [0.0, 0.5, 1.0] * 10:
        needle = make_needle(world, sentences, room, depth, length_of, for_test=True)
        assert FACT.findall(needle.text) == [FACT.search(needle.fact).groups()]
        assert needle.question == f"What is the code of {FACT.search(needle.fact)[1]}?"
        assert needle.code == FACT.search(needle.fact)[2] and needle.fact.startswith(needle.begun)
        assert room - 12 <= length_of(f"{needle.text}\n{needle.question}") <= room + 4
        places[depth].append(needle.text.index(needle.fact) / (len(needle.text) - len(needle.fact)))
    assert set(places[0.0]) == {0} and set(places[1.0]) == {1}
    assert 0.3 < sum(places[0.5]) / 10 < 0.7


def test_no_name_of_the_test_is_in_training_and_codes_differ(world, length_of):
    world.rng = random.Random(1)
    chats = make_chats(world, 200, 40, 100, length_of)
    asked = [FACT.search(record["conversations"][1]["content"]).groups() for record in chats]
    assert not {name for name, _ in asked} & set(world.names["en"].test)
    assert len({code for _, code in asked}) > 190
    for record, (name, code) in zip(chats, asked, strict=True):
        question = record["conversations"][0]["content"]
        assert f"The code of {name} is {code}." in question and question.endswith(f"code of {name}?")
        assert 20 < length_of(question) <= 104


@pytest.mark.parametrize("stage", ["chat", "base"])
def test_prompts_fill_the_length_and_end_with_the_question(stage, home, world, length_of):
    model = ChatModel(home / stage, device="cpu")
    world.rng = random.Random(2)
    for length in (64, 100):
        prompt, needle = needles.ask(model, world, length, 0.5)
        assert length - 40 <= len(prompt) <= length - 18  # there is room for the answer
        text = model.decode(prompt)
        assert needle.fact in text
        assert text.rstrip().endswith(f"{needle.question}\nassistant" if stage == "chat" else needle.begun)


def test_right_answers_are_counted_by_length_and_depth(chat, world, monkeypatch):
    """A model that finds every needle in the first half of a text of 64 tokens, and no other."""
    def answers(model, batch):
        return [needle.fact if depth <= 0.5 and len(prompt) < 90 else f"It is {int(needle.code) + 1}."
                for depth, prompt, needle in batch]

    monkeypatch.setattr(needles, "answer_all", answers)
    monkeypatch.setattr(needles, "World", lambda seed: world)  # making one takes a second
    result = needles.measure(chat, [64, 128], 50)
    assert result["found"] == {64: {0.0: 1, 0.25: 1, 0.5: 1, 0.75: 0, 1.0: 0}, 128: dict.fromkeys(
        needles.DEPTHS, 0)}
    assert len(result["answers"]) == 100 and sum(answer["right"] for answer in result["answers"]) == 30
    table = needles.table_of(result).splitlines()
    assert table[1].split() == ["64", "100%", "100%", "100%", "0%", "0%", "60.0%"]
    positions = [place for place, _ in result["perplexity"]]
    assert positions[-1] == 127 and positions == sorted(positions)
    assert needles.measure(chat, [64, 128], 50) == result  # the same texts each time


def test_a_model_that_has_learnt_nothing_finds_nothing(home, tmp_path, capsys):
    flags = ["--load_from", home / "chat", "--needle", "96", "64", "--limit", "7", "--json",
             tmp_path / "n.json", "--device", "cpu"]
    eval_model.main(eval_model.parse_args([str(flag) for flag in flags]))
    *lines, advice = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    assert [(row[0], row[-1]) for row in rows[1:]] == [("64", "0.0%"), ("96", "0.0%")]
    assert "scripts/make_needles.py" in advice
    found = json.loads((tmp_path / "n.json").read_text(encoding="utf-8"))
    assert len(found["answers"]) == 14 and found["model"] == str(home / "chat")
    with Image.open(tmp_path / "n.png") as picture:
        assert picture.width > 600


def test_what_cannot_be_asked_is_one_line(home, chat, capsys):
    with pytest.raises(UsageError, match="--needle 256: the model has only 128 positions"):
        needles.measure(chat, [64, 256])
    for flags, words in ((["--needle", "20"], "at least 64"), (["--needle", "64", "--seed", "1"], "--needle"),
                         (["--needle", "64", "--repetition_penalty", "2"], "error: --repetition_penalty: "),
                         (["--prompt", "hi", "--batch_size", "2"], "--batch_size belong to"),
                         (["--needle", "64", "--json", "x.png"], ".json"),
                         (["--needle", "64", "--system", "x"], "--system has no effect")):
        with pytest.raises(SystemExit):
            eval_model.parse_args(["--load_from", str(home / "chat"), *flags])
        assert words in capsys.readouterr().err
