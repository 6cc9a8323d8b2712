"""Prompts whose answers no chat ever gives, and what a right answer is: for learning from rewards.
A reader may skip this file.

The model learns the answers by trying. The prompts that it trains on hold no answer, only the test that
the reward asks (dataset/answers.py). For validation and the test a record is a chat, whose last turn is a
right answer.
"""

import copy
import random

from dataset.world import FACTS_ABOUT, LANGUAGES, read_sections

SKILL_QUESTIONS = read_sections("skills")
FULL_STOP = {"en": ".", "zh": "。"}
# Up to this length an answer has a small reward of its own. Without it a first right number is rarely found.
NUMBER_TOKENS = 4


def fact(world, family, lang, for_test):
    """Tell me one fact about cows. -> A cow eats grass. (What SFT has taught is to tell several.)"""
    entity, facts = world.rng.choice([(entity, facts) for (entity, spoken), facts in FACTS_ABOUT.items()
                                      if spoken == lang and len(facts) > 2])
    statements = [known.statement for known in facts if known.value]
    question, _ = world.ask(family, "one", lang, for_test, x=facts[0].asked, xs=facts[0].several,
                            name=entity if lang == "en" else facts[0].asked)
    return question, world.rng.choice(statements), {"answers": statements}


def largest(world, family, lang, for_test):
    """What is the largest of 31, 7, 64? -> 64"""
    three = world.three_numbers(for_test)
    answer = str(max(three))
    listed = world.listed([str(number) for number in three], lang, ", ")
    question, _ = world.ask(family, "three", lang, for_test, list=listed)
    test = {"answers": [answer, answer + FULL_STOP[lang]], "max_reward_tokens": NUMBER_TOKENS}
    return question, answer, test


SKILLS = {"largest": largest, "fact": fact}
COUNTS = {"grpo": 1000, "grpo_eval": 64, "grpo_test": 200}  # prompts of each skill


def make_skills(world, wordings, seed, skills=SKILLS):
    """{file: [(record, None)]}. `world` stays as it is: these prompts have random numbers of their own.

    wordings: those of SKILL_QUESTIONS, split for training and test as all others are. skills:
    {family: generator}.
    """
    world, rng = copy.copy(world), random.Random(f"skills {seed}")
    world.rng, world.wordings = rng, wordings
    files, asked = {}, set()
    for file, count in COUNTS.items():
        files[file] = []
        for family, generator in skills.items():
            found = 0
            while found < count:
                lang, for_test = LANGUAGES[found % 2], file == "grpo_test"
                question, answer, test = generator(world, family, lang, for_test)
                if question in asked or not for_test and world.leaks(question):
                    continue
                asked.add(question)
                found += 1
                record = {"prompt": question}
                if file != "grpo":
                    record = {"conversations": [{"role": "user", "content": question},
                                                {"role": "assistant", "content": answer}]}
                record |= test | {"family": family}
                files[file].append((record, None))
    rng.shuffle(files["grpo"])
    return files
