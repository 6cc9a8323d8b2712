"""Skills for rewards: right answers are right, no trick earns them, and no chat teaches them."""

import random
import re
from collections import Counter

import pytest

from dataset.answers import answer_test
from dataset.synthetic import FAMILIES, World, make_chats, split_wordings
from dataset.world.skills import (
    COUNTS,
    SKILL_QUESTIONS,
    SKILLS,
    make_skills,
)


@pytest.fixture(scope="module")
def world():
    return World(0)


@pytest.fixture(scope="module")
def chats(world):
    """A few chats of every family, as SFT has them."""
    asked = set()
    return [row for family, (generator, _) in FAMILIES.items()
            for row in make_chats(world, family, generator, 60, False, asked)]


@pytest.fixture(scope="module")
def files(world):
    before = world.rng.getstate()
    made = make_skills(world, split_wordings(random.Random(0), SKILL_QUESTIONS), 0)
    assert world.rng.getstate() == before  # the records of other files are drawn as without the skills
    return {name: [record for record, _ in rows] for name, rows in made.items()}


def asked(record):
    return record["prompt"] if "prompt" in record else record["conversations"][-2]["content"]


def check_of(record):
    last = record["conversations"][-1]["content"] if "conversations" in record else ""
    return answer_test(record, last)


def test_each_file_has_its_records_and_each_question_once(files):
    for name, count in COUNTS.items():
        assert Counter(record["family"] for record in files[name]) == dict.fromkeys(SKILLS, count)
    questions = [asked(record) for records in files.values() for record in records]
    assert len(set(questions)) == len(questions)


def test_a_prompt_to_train_on_holds_no_answer_but_its_test(files):
    for record in files["grpo"]:
        assert "conversations" not in record and check_of(record).decides


def test_right_answers_are_right(files):
    for record in files["grpo_test"]:
        test, right = check_of(record), record["conversations"][-1]["content"]
        assert test.is_right(right) and all(map(test.is_right, record["answers"]))
        assert not test.is_right(f"{right} {right}")  # one fact, one number, and no more


def test_one_skill_alone(world):
    """As the benchmarks ask for it."""
    wordings = split_wordings(random.Random(0), SKILL_QUESTIONS)
    files = make_skills(world, wordings, 0, {"largest": SKILLS["largest"]})
    assert {record["family"] for rows in files.values() for record, _ in rows} == {"largest"}
    for record, _ in files["grpo_test"]:
        numbers = list(map(int, re.findall(r"\d+", asked(record))))
        test = check_of(record)
        assert len(numbers) == 3 and test.is_right(str(max(numbers)))
        assert not any(test.is_right(str(number)) for number in numbers if number != max(numbers))


def test_no_answer_is_right_for_many_questions(files):
    """A constant answer is right for less than a tenth of the questions of a skill."""
    for family in SKILLS:
        records = [record for record in files["grpo_test"] if record["family"] == family]
        often = Counter(answer for record in records for answer in set(record["answers"]))
        assert often.most_common(1)[0][1] < len(records) / 10


def test_what_is_tested_is_held_out(world, files):
    for record in files["grpo"] + files["grpo_eval"]:
        assert not world.leaks(asked(record))
    train = {tuple(sorted(re.findall(r"\d+", asked(record)))) for record in files["grpo"]
             if record["family"] == "largest"}
    tested = {tuple(sorted(re.findall(r"\d+", asked(record)))) for record in files["grpo_test"]
              if record["family"] == "largest"}
    assert not train & tested  # these three numbers never stand together in training
    wordings = split_wordings(random.Random(0), SKILL_QUESTIONS)
    for split in wordings.values():
        training, test = ({wording for line in part for wording in line} for part in split)
        assert test and not training & test


def test_no_chat_asks_for_a_skill(chats):
    """What makes the question, such as "one fact about", stands in no question of SFT."""
    marks = re.compile(r"(?<!to )(largest|biggest)( number)?(:| of)|最大的(数|数字)(是|：)"
                       r"|哪个(数|数字)最大："
                       r"|\bone (fact|thing)|single (fact|thing)"
                       r"|(一个|一条)(关于.*的)?(事实|知识)|一(件|条)关于")
    for split in split_wordings(random.Random(0), SKILL_QUESTIONS).values():
        assert all(marks.search(wording) for part in split for line in part for wording in line)
    for record, _ in chats:
        for message in record["conversations"]:
            assert not marks.search(message["content"].lower()), message
