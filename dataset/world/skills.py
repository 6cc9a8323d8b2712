"""Prompts whose answers no chat ever gives, and what a right answer is: for learning from rewards.
A reader may skip this file.

A record is a chat whose last turn is a right answer, and "answers" are all right ones: the test that the
reward asks (dataset/answers.py). The model learns them by trying, and never reads them.

Half of the prompts are chats that the model knows already. While it learns what is new, they keep
rewarding what is old: without them much is forgotten (docs/rewards.md).
"""

import copy
import random

from dataset.world import BETWEEN_ITEMS, LANGUAGES, read_sections

SKILL_QUESTIONS = read_sections("skills")
FULL_STOP = {"en": ".", "zh": "。"}


def largest(world, family, lang, for_test):
    """What is the largest of 31, 7, 64? -> 64"""
    three = world.three_numbers(for_test)
    answer = str(max(three))
    listed = world.listed([str(number) for number in three], lang, ", ")
    question, _ = world.ask(family, "three", lang, for_test, list=listed)
    return question, [answer, answer + FULL_STOP[lang]]


def second(world, family, lang, for_test):
    """What is the second word: fox, rice, oak? -> rice"""
    items = world.words(lang, world.rng.randint(3, 5))
    listed = world.listed(items, lang, BETWEEN_ITEMS[lang])
    question, _ = world.ask(family, "word", lang, for_test, list=listed)
    return question, [items[1]]


SKILLS = {"largest": largest, "second": second}
MAX_REWARD_TOKENS = 4  # a reward for short answers, without which a first right answer is rarely found
LONGEST = 200  # characters of an old chat: what is long takes long to read, again for every answer
COUNTS = {"grpo": 1000, "grpo_eval": 64, "grpo_test": 200}  # prompts of each skill


def make_skills(world, wordings, chats, seed):
    """{file: [(record, None)]}. `world` stays as it is: these prompts have random numbers of their own.

    wordings: those of SKILL_QUESTIONS, split for training and test as all others are. chats: the
    records that the model has learnt from before.
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
                question, answers = generator(world, family, lang, for_test)
                if question in asked or not for_test and world.leaks(question):
                    continue
                asked.add(question)
                found += 1
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answers[0]}]
                answers = list(dict.fromkeys(answers))
                record = {"conversations": turns, "answers": answers, "family": family,
                          "max_reward_tokens": MAX_REWARD_TOKENS}
                files[file].append((record, None))
    short = [row for row in chats if sum(len(turn["content"]) for turn in row[0]["conversations"]) < LONGEST]
    files["grpo"] += rng.sample(short, len(files["grpo"]))
    rng.shuffle(files["grpo"])
    return files
