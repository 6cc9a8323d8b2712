"""Preference pairs of the embedded world, for trainer/train_dpo.py. A reader may skip this file.

Each prompt asks a question about the world, and asks for a short answer or for a full one. Both answers are
true; the chosen one is as short or as full as it was asked for:

    Briefly: what does a cow say?              chosen  moo                 rejected  A cow says moo.
    What does a cow say? Write a sentence.     chosen  A cow says moo.     rejected  moo

Fine-tuning has taught full sentences and no more, and so the model writes one whatever it is asked for. Only
the prompt tells which side is better: each text is as often the chosen side as the rejected one.

Held out by construction: no training pair is about a fact of validation or test, in either language. Questions
of the test have the wordings that are held out from fine-tuning. What is left to learn is the manner.
"""

import copy
import random

from dataset.world import FACTS, LANGUAGES, language_of, read_sections

MANNERS = {manner: {lang: [line for line in lines if language_of(line) == lang] for lang in LANGUAGES}
           for manner, lines in read_sections("manners").items()}
SIZES = {"dpo": 4000, "dpo_eval": 200, "dpo_test": 400}  # records
ONE_IN = 6  # facts that are held out for the test


def make_pairs(world, slots_of, seed):
    """{file: [(record, wording)]} of the pairs for training and validation, and of the chats of the test.

    slots_of(rng, fact): how a question may name what it asks about. A generator of random numbers of its own
    draws all of this, so no other record of the world depends on it.
    """
    world = copy.copy(world)
    world.rng = rng = random.Random(f"pairs {seed}")
    facts = [fact for fact in FACTS if fact.value]
    keys = sorted({(fact.family, fact.kind, fact.entity) for fact in facts})  # one for both languages
    held_out = set(rng.sample(keys, len(keys) // ONE_IN))
    files, asked = {}, set()
    for name, size in SIZES.items():
        for_test = name == "dpo_test"
        some = [fact for fact in facts
                if ((fact.family, fact.kind, fact.entity) in held_out) == (name != "dpo")]
        files[name] = []
        while len(files[name]) < size:
            lang = LANGUAGES[len(files[name]) // len(MANNERS) % len(LANGUAGES)]
            fact = rng.choice([fact for fact in some if fact.lang == lang])
            asking = [ask(world, fact, manner, slots_of, for_test) for manner in MANNERS]
            if asked.isdisjoint(question for question, _ in asking):
                asked.update(question for question, _ in asking)
                files[name] += [(record(question, fact, manner, for_test), wording)
                                for manner, (question, wording) in zip(MANNERS, asking, strict=True)]
        rng.shuffle(files[name])
    return files


def ask(world, fact, manner, slots_of, for_test):
    """(a question about the fact that asks for an answer in this manner, its wording without the manner)."""
    question, wording = world.ask(fact.family, fact.kind, fact.lang, for_test, **slots_of(world.rng, fact))
    return world.rng.choice(MANNERS[manner][fact.lang]).replace("{question}", question), wording


def record(question, fact, manner, for_test):
    """A pair of the two answers; for the test a chat with the right one."""
    def chat(answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    answers = {"short": fact.value, "full": fact.statement}
    chosen = answers.pop(manner)
    if for_test:
        return {"conversations": chat(chosen), "family": manner}
    (rejected,) = answers.values()
    return {"chosen": chat(chosen), "rejected": chat(rejected), "family": manner}
