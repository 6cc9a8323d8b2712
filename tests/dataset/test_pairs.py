"""The world's preference pairs: what decides is in the prompt alone, and the test is held out."""

import math
import re
from collections import Counter

import pytest

from dataset import synthetic
from dataset.answers import answer_test
from dataset.world import HEROES, SEASONS, find, is_chinese, name_of
from dataset.world.pairs import SIZES, make_pairs


@pytest.fixture(scope="module")
def world():
    return synthetic.World(0)


@pytest.fixture(scope="module")
def built(world):
    return make_pairs(world, 0)


@pytest.fixture(scope="module")
def files(built):
    return {name: [record for record, _ in rows] for name, rows in built.items()}


def prompt(record):
    return record.get("chosen", record.get("conversations"))[0]["content"]


def sides(pair):
    return [pair[side][-1]["content"] for side in ("chosen", "rejected")]


def units(text):
    """Words, or the signs of a Chinese text."""
    return re.findall("[a-z]+", text.lower()) if not is_chinese(text) else list(text)


def named(text, rows):
    lang = "zh" if is_chinese(text) else "en"
    return [row.name_en for row in rows
            if re.search(rf"\b{name_of(row, 'en')}\b" if lang == "en" else name_of(row, "zh"), text, re.I)]


def test_sizes_and_form(files):
    assert {name: len(records) for name, records in files.items()} == SIZES
    for name, records in files.items():
        assert 0.4 < sum(is_chinese(prompt(record)) for record in records) / len(records) < 0.6
        for record in records:
            assert record["family"] == "season"
            conversations = [record[key] for key in ("chosen", "rejected", "conversations") if key in record]
            assert len(conversations) == (1 if name == "dpo_test" else 2)
            for messages in conversations:
                assert [m["role"] for m in messages] == ["user", "assistant"]
                assert messages[0]["content"] == prompt(record) and messages[1]["content"].strip()


def test_the_chosen_story_has_the_season_that_the_prompt_names(files):
    for record in files["dpo"] + files["dpo_eval"]:
        (asked,) = named(prompt(record), SEASONS)
        chosen, rejected = sides(record)
        assert named(chosen, SEASONS) == [asked] and asked not in named(rejected, SEASONS)
    for record in files["dpo_test"]:
        test = answer_test(record, record["conversations"][-1]["content"])
        assert test.is_right(record["conversations"][-1]["content"])
        assert not test.is_right("") and len(test.contains) == 2
        assert named(record["contains"][1], SEASONS) == named(prompt(record), SEASONS)


def test_no_hero_has_a_season_of_the_test_in_training(built, files):
    def met(records):
        return {(hero_of(record), *named(prompt(record), SEASONS)) for record in records}

    def hero_of(record):
        """From the answer, since a prompt may mistype a name. In Chinese a name may be part of another."""
        answer = record.get("chosen", record.get("conversations"))[-1]["content"]
        found = named(re.split("[.。]", answer)[0], HEROES)
        lang = "zh" if is_chinese(answer) else "en"
        return max(found, key=lambda name: len(name_of(find(name, HEROES), lang)))

    training, held_out = met(files["dpo"]), met(files["dpo_eval"] + files["dpo_test"])
    assert len(training) == len(held_out) == 2 * len(HEROES) and not training & held_out
    assert not {prompt(r) for r in files["dpo"]} & {prompt(r) for r in files["dpo_eval"] + files["dpo_test"]}
    assert not {w for _, w in built["dpo"]} & {w for _, w in built["dpo_test"]}


def test_neither_length_nor_one_side_tells_which_is_chosen(files):
    """The best guess by length, and naive Bayes over the words of the sides, both stay at chance."""
    for name in ("dpo", "dpo_eval"):
        for size in (len, lambda text: len(units(text))):
            lengths = [[size(text) for text in sides(pair)] for pair in files[name]]
            longer = sum((a > b) + 0.5 * (a == b) for a, b in lengths) / len(lengths)
            assert abs(longer - 0.5) < 0.1
            cuts = range(min(map(min, lengths)), max(map(max, lengths)))
            best = max(sum((a > cut) + (b <= cut) for a, b in lengths) / 2 / len(lengths) for cut in cuts)
            assert max(best, 1 - best) < 0.6
    assert accuracy(files, lambda pair, text: units(text)) < 0.6
    # The same guesser with the prompt at hand is right: this test can fail.
    assert accuracy(files, lambda pair, text: [
        f"{asked}, {told}" for asked in named(prompt(pair), SEASONS) for told in named(text, SEASONS)]) > 0.95


def accuracy(files, features):
    """Of naive Bayes, trained on all sides of the training pairs, on the pairs of validation."""
    counts = [Counter(), Counter()]
    for pair in files["dpo"]:
        for side, text in enumerate(sides(pair)):
            counts[side].update(features(pair, text))

    def score(pair, text):
        return sum(math.log(counts[0][word] + 1) - math.log(counts[1][word] + 1)
                   for word in features(pair, text))

    gaps = [score(pair, sides(pair)[0]) - score(pair, sides(pair)[1]) for pair in files["dpo_eval"]]
    return sum((gap > 1e-9) + 0.5 * (abs(gap) <= 1e-9) for gap in gaps) / len(gaps)


def test_every_text_is_as_often_chosen_as_rejected(files):
    for name in ("dpo", "dpo_eval"):
        chosen, rejected = (Counter(sides(pair)[side] for pair in files[name]) for side in (0, 1))
        assert chosen == rejected


def test_a_constant_answer_scores_nothing(files):
    tests = [answer_test(record, "x") for record in files["dpo_test"]]
    for record in files["dpo_test"][::10]:
        answer = record["conversations"][-1]["content"]
        assert sum(test.is_right(answer) for test in tests) / len(tests) < 0.1


def test_the_pairs_follow_from_the_seed_and_disturb_nothing_else(world, files):
    state = world.rng.getstate()
    again = make_pairs(world, 0)
    assert world.rng.getstate() == state
    assert {name: [record for record, _ in rows] for name, rows in again.items()} == files
    assert all(not world.leaks("\n".join(sides(record))) for record in files["dpo"])
