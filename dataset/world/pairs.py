"""Preference pairs of the embedded world, for trainer/train_dpo.py. A reader may skip this file.

Each prompt asks for a story and names a season. The two answers are one story in two seasons:

    Tell me a story about the fox in winter.
    chosen      One winter morning, the fox went for a walk by the river. Under a stone it found ...
    rejected    One summer morning, the fox went for a walk by the river. Under a stone it found ...

Fine-tuning has taught stories in which the season is drawn at random, and so the model does not listen to
that wish. Only the prompt tells which side is better: a second pair, with the other season in its prompt, has
the same two answers the other way round.

Held out by construction: no training pair has a hero together with a season of validation or test, in either
language, and questions of the test have the wordings that are held out from fine-tuning.
"""

import copy
import random

from dataset.world import (
    BETWEEN_SENTENCES,
    HEROES,
    LANGUAGES,
    PLACES,
    SEASONS,
    name_of,
    tell_story,
)

SIZES = {"dpo": 3000, "dpo_eval": 200, "dpo_test": 400}  # records


def make_pairs(world, seed):
    """{file: [(record, wording)]} of the pairs for training and validation, and of the chats of the test.

    A generator of random numbers of its own draws all of this, so no other record of the world depends on it.
    """
    world = copy.copy(world)
    world.rng = rng = random.Random(f"pairs {seed}")
    shuffled = {hero: rng.sample(SEASONS, len(SEASONS)) for hero in HEROES}  # two for training, two held out
    files, asked = {}, set()
    for name, size in SIZES.items():
        files[name], for_test = [], name == "dpo_test"
        while len(files[name]) < size:
            lang, hero = LANGUAGES[len(files[name]) // 2 % 2], rng.choice(HEROES)
            seasons = shuffled[hero][:2] if name == "dpo" else shuffled[hero][2:]
            stories = tell(world, hero, seasons, lang)
            asking = [ask(world, hero, season, lang, for_test) for season in seasons]
            if asked.isdisjoint(question for question, _ in asking):
                asked.update(question for question, _ in asking)
                both_ways = (stories, stories[::-1])
                for season, (question, wording), story in zip(seasons, asking, both_ways, strict=True):
                    contains = [name_of(hero, lang), name_of(season, lang)]
                    files[name].append((record(question, *story, contains if for_test else None), wording))
        rng.shuffle(files[name])
    return files


def tell(world, hero, seasons, lang):
    """One story about the hero in each of the two seasons."""
    this, that = (name_of(season, lang) for season in seasons)
    while True:
        opening, *rest = tell_story(world.rng, hero, world.rng.choice(PLACES), lang)
        story = BETWEEN_SENTENCES[lang].join([opening, *rest])
        if this in opening and not world.leaks(story):
            return [story, BETWEEN_SENTENCES[lang].join([opening.replace(this, that), *rest])]


def ask(world, hero, season, lang, for_test):
    """(a request for a story about the hero in this season, its wording)."""
    known, name, when = name_of(hero, lang, "known"), name_of(hero, lang), name_of(season, lang)
    where = f"in {when}" if lang == "en" else when  # the season stands where else a place is named
    return world.ask("story", "tell", lang, for_test, x=known, name=name, where=where, place=when)


def record(question, chosen, rejected, contains):
    """A pair; with `contains`, a chat of the test, whose answer must contain these words."""
    def chat(answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    if contains:
        return {"conversations": chat(chosen), "family": "season", "contains": contains}
    return {"chosen": chat(chosen), "rejected": chat(rejected), "family": "season"}
