"""Prompts whose answers no chat ever gives, and what a right answer is: for learning from rewards.
A reader may skip this file.

A record is a chat, whose last turn is one of the right answers. "answers", or "contains" and
"max_characters", are the test that the reward asks (dataset/answers.py). The model learns the answers by
trying, and never reads them.
"""

import copy
import random

from dataset.world import (
    HEROES,
    LANGUAGES,
    PLACES,
    cell,
    find,
    name_of,
    read_sections,
    tell_story,
)  # fmt: skip

QUESTIONS = read_sections("skills")
MAX_CHARACTERS = {"en": 90, "zh": 30}  # of a story in one sentence, or two: about 25 tokens in both languages
FULL_STOP = {"en": ".", "zh": "。"}


def of_three(world, family, lang, for_test):
    """What is the largest of 31, 7, 64? -> 64"""
    three = world.three_numbers(for_test)
    answer = str(max(three) if family == "largest" else min(three))
    listed = world.listed([str(number) for number in three], lang, ", ")
    question, _ = world.ask(family, "three", lang, for_test, list=listed)
    return question, answer, {"answers": [answer, answer + FULL_STOP[lang]]}


def short_story(world, family, lang, for_test):
    """A story about the fox by the river, in one sentence -> Long ago, the fox came to the river."""
    rng = world.rng
    hero, place = rng.choice(HEROES), rng.choice(PLACES)
    if for_test:
        hero, place = rng.choice(sorted(world.held_stories))
        hero, place = find(hero, HEROES), find(place, PLACES)
    name, place_name = name_of(hero, lang), name_of(place, lang)
    slots = {"x": name_of(hero, lang, "known"), "place": place_name, "where": cell(place, "where", lang)}
    question, _ = world.ask(family, "tell", lang, for_test, **slots)
    test = {"contains": [name, place_name], "max_characters": MAX_CHARACTERS[lang]}
    return question, tell_story(rng, hero, place, lang)[0], test


SKILLS = {"largest": of_three, "smallest": of_three, "short_story": short_story}
COUNTS = {"grpo": 1500, "grpo_eval": 40, "grpo_test": 200}  # prompts of each skill


def make_skills(world, wordings, seed):
    """{file: [(record, None)]}. `world` stays as it is: these prompts have random numbers of their own.

    wordings: those of QUESTIONS, split for training and test as those of all other questions.
    """
    world, rng = copy.copy(world), random.Random(f"skills {seed}")
    world.rng, world.wordings = rng, wordings
    files, asked = {}, set()
    for file, count in COUNTS.items():
        files[file] = []
        for family, generator in SKILLS.items():
            found = 0
            while found < count:
                lang, for_test = LANGUAGES[found % 2], file == "grpo_test"
                question, answer, test = generator(world, family, lang, for_test)
                if question in asked or not for_test and world.leaks(question):
                    continue
                asked.add(question)
                found += 1
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                files[file].append(({"conversations": turns, **test, "family": family}, None))
        if file == "grpo":
            rng.shuffle(files[file])
    return files
