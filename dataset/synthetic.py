"""A small bilingual world, written from a seed: the training data for everybody who brings no data.

    python dataset/synthetic.py --out_dir out/world --seed 0

The tables, wordings of questions, parts of stories and word lists are files in dataset/world/, which anybody
may edit; the README there explains them. This file draws records from them, in English and in Chinese.

What the model learns
  the world    facts about twenty animals, ten people, twelve places and foods, eight plants and four seasons:
               where the cow lives, what Mia's job is, what a lemon costs
  numbers      adding and subtracting step by step, comparing, sorting, counting
  words        opposites, kinds of things, translation, repeating, the first or last of a list, reversing
  talk         telling stories, remembering names, who the model is, small talk, and saying "I don't know"

Pretraining texts (stories, descriptions, lists, sums) state the very facts that the chat records ask for. Two
more sets of chat records train adapters: another identity, and the knowledge of a plant clinic.

Held out by construction, so that the test asks for understanding and not for memory:
  wordings     a wording of a question ("do you know what sound {x} makes?") is for training or for the test;
  numbers      no training text contains a held-out pair of numbers as the operands of anything;
  stories      no training text names a held-out hero together with the held-out place;
  names        no training text contains a name to remember, or an unknown thing, of the test.

The file reads from top to bottom: what is held out; a generator for each family of chat records; a generator
for each kind of pretraining text; the files.
"""

import hashlib
import json
import random
import re
import sys
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.cli import ROOT, Parser, run_script  # noqa: E402, I001
from common.errors import DataError  # noqa: E402, I001
from common.files import write_whole  # noqa: E402, I001
try:
    from dataset.world import (  # noqa: E402, I001  (grouped: tables, names, sentences, numbers)
        ANIMALS, CLINIC, ENTITIES, FACTS, FACTS_ABOUT, FACT_TEMPLATES, FAVOURITES, FAVOURITE_KINDS, HEROES,
        KINDS, LANGUAGES, NAMES, NOUNS, OPPOSITES, PETS, PHRASES, PLACES, PLANTS, QUESTIONS, TABLES, UNKNOWN,
        WORLD_FOLDER, cell, find, is_chinese, meetings, name_of, ordinary_text, words_of,
        BETWEEN_ITEMS, BETWEEN_SENTENCES, bare, capital, fill, read_wordings,
        either_way, say, say_how_often, say_kind, say_translation, tell_story,
        in_words, pairs_in_between, with_commas, worked,
    )
except DataError as error:  # a mistake in an edited file; a training script reports it by itself
    if __name__ == "__main__":
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    raise

# ------------------------------------------------------------------------------------------- what is held out


class Split(NamedTuple):
    """Items of which some are for training and the others for the test alone."""

    training: list
    test: list

    def part(self, for_test):
        return self.test if for_test else self.training


def split_wordings(rng):
    """{(family, kind, lang): Split of its wordings}; no wording of a test is in the training of any kind.

    The first wording of each line stays in training. Of the other combinations one in eight is held out, so
    that a held-out wording is new as a whole, while the model has met its parts in other wordings.
    """
    fixed, free = {}, {}
    for key, lines in read_wordings(QUESTIONS).items():
        fixed[key], free[key] = [], []
        for wordings in lines:
            always = 1 if len(wordings) >= 4 else len(wordings)
            fixed[key] += wordings[:always]
            free[key] += wordings[always:]
    bare_fixed = {bare(wording) for wordings in fixed.values() for wording in wordings}
    test = {}
    for key, wordings in free.items():
        wordings = sorted(wording for wording in set(wordings) if bare(wording) not in bare_fixed)
        test[key] = rng.sample(wordings, max(3, len(wordings) // 8))
    bare_test = {bare(wording) for wordings in test.values() for wording in wordings}
    split = {}
    for key in fixed:  # two kinds may share a wording: what the test of one asks, no kind's training asks
        wordings = dict.fromkeys(fixed[key] + free[key])  # each once, in order
        split[key] = Split([wording for wording in wordings if bare(wording) not in bare_test], test[key])
    return split


class World:
    """One seed's choice of the wordings, number pairs, stories and names that are held out for the test.

    `rng` draws everything, one thing after the other: another order of draws is another world.
    """

    def __init__(self, seed):
        self.rng = rng = random.Random(seed)
        self.wordings = split_wordings(rng)
        pairs = [(a, b) for a in range(100) for b in range(a + 1)]
        self.held_pairs = set(rng.sample(pairs, 250))  # (larger, smaller): 5 % of all
        self.ordinary_text = ordinary_text()
        self.ordinary_words = words_of(self.ordinary_text)
        self.names = {lang: self.split(NAMES[f"names {lang}"], 6) for lang in LANGUAGES}
        self.unknown = {lang: self.split_unknown(lang) for lang in LANGUAGES}
        self.held_stories = set(rng.sample(self.free_stories(), 40))  # (hero, place) by their English names
        held = {lang: [*self.names[lang].test] for lang in LANGUAGES}
        for lang in LANGUAGES:
            for groups in self.unknown[lang]:
                held[lang] += [thing for things in groups.values() for thing in things.test]
        self.held_words = {word.lower() for word in held["en"]}
        self.held_zh = re.compile("|".join(re.escape(word) for word in held["zh"]))

    def is_new(self, name):
        """Whether no ordinary text contains the name. Otherwise holding it out would hold out those texts."""
        if is_chinese(name):
            return name not in self.ordinary_text
        return name.lower() not in self.ordinary_words

    def split(self, names, share):
        """The new ones among the names; one part in `share` is for the test."""
        names = [name for name in dict.fromkeys(names) if self.is_new(name)]
        self.rng.shuffle(names)
        return Split(names[len(names) // share:], names[:len(names) // share])

    def split_unknown(self, lang):
        """(real, made up): things outside of the world, each as {group: Split}."""
        taken = {name.lower() for part in self.names["en"] for name in part}
        real, made_up = {}, {}
        for group in ("animals", "foods", "plants", "people", "things", "names"):
            real[group] = self.split(UNKNOWN[f"{group} {lang}"], 5)
        for group in ("animals", "foods", "plants", "people", "things"):
            made = []
            while len(made) < 200:
                name = self.make_up(lang, group)
                if name.lower() not in taken and self.is_new(name):
                    taken.add(name.lower())
                    made.append(name)
            made_up[group] = self.split(made, 10)
        return real, made_up

    def make_up(self, lang, group):
        """A name of something that does not exist: plookrem, 咕噜兽; of somebody: Plookrem, 咕噜."""
        choice = self.rng.choice
        if lang == "zh":
            name = choice(UNKNOWN["characters zh"]) + choice(UNKNOWN["characters zh"])
            return name if group == "people" else name + choice(UNKNOWN["endings zh"])
        name = ""
        for _ in range(choice([1, 1, 2])):
            name += choice(UNKNOWN["onsets en"]) + choice(UNKNOWN["vowels en"])
        name += choice(UNKNOWN["codas en"])
        return name.capitalize() if group == "people" else name

    def free_stories(self):
        """The pairs (hero, place) that may be held out: the facts about no entity name both."""
        told = set()
        for facts in FACTS_ABOUT.values():
            told |= meetings(" ".join(fact.statement for fact in facts))
        pairs = [(hero.name_en, place.name_en) for hero in HEROES for place in PLACES]
        return [pair for pair in pairs if pair not in told]

    def leaks(self, text):
        """Whether a text names a held-out name or thing, or a held-out hero together with the place."""
        if words_of(text) & self.held_words or self.held_zh.search(text):
            return True
        return not self.held_stories.isdisjoint(meetings(text))

    # The methods below draw what several generators need. `for_test` asks for what is held out.

    def ask(self, family, kind, lang, for_test, /, dressed=True, **slots):
        """(question, wording). A dressed question may have an opener ("Hey, ") and a closer (" Thanks!")."""
        rng = self.rng
        wording = rng.choice(self.wordings[family, kind, lang].part(for_test))
        text = fill(wording, **slots)
        if lang == "zh" and rng.random() < 0.5:  # 12加34 becomes 12 加 34
            text = re.sub("(?<=[0-9a-z])(?=[\u4e00-\u9fff])|(?<=[\u4e00-\u9fff])(?=[0-9a-z])", " ", text)
        opener = closer = ""
        if dressed and rng.random() < 0.3:
            opener = rng.choice(PHRASES[f"openers {lang}"])
        if dressed and rng.random() < 0.15 and text[-1] in "?.？。":
            closer = rng.choice(PHRASES[f"closers {lang}"])
        if lang == "zh":
            return opener + text + closer, wording
        if not opener or opener.endswith("!"):
            text = capital(text)
        if not opener and not closer and not for_test and rng.random() < 0.1:  # as people type in a hurry
            text = text.rstrip("?.")
            if not text.startswith("I "):
                text = text[0].lower() + text[1:]
        return f"{opener} {text} {closer}".strip(), wording

    def chat(self, family, kind, lang, for_test, answer, /, **slots):
        """A chat of one question, asked with these slots, and its answer."""
        question, wording = self.ask(family, kind, lang, for_test, **slots)
        return Chat([question, answer], wording)

    def number_pair(self, for_test):
        """(a, b) with a >= b: one of the held-out pairs, or one of the others."""
        if for_test:
            return self.rng.choice(sorted(self.held_pairs))
        while True:
            # Small numbers too, as people ask for them, and small beside large, as in the last step of a sum.
            top_a, top_b = self.rng.choices([(99, 99), (12, 12), (99, 9)], [65, 15, 20])[0]
            b, a = sorted((self.rng.randint(0, top_a), self.rng.randint(0, top_b)))
            if self.held_pairs.isdisjoint([(a, b), *pairs_in_between(a, b)]):
                return a, b

    def three_numbers(self, for_test):
        """Three different numbers in any order. Those of the test, and no others, contain a held-out pair."""
        while True:
            top = 9 if self.rng.random() < 0.15 and not for_test else 99
            three = {self.rng.randint(1, top) for _ in range(3)}
            if for_test:
                three = {*self.rng.choice(sorted(self.held_pairs)), self.rng.randint(1, 99)}
            three = sorted(three)
            pairs = [(large, small) for small, large in combinations(three, 2)]
            has_held_pair = not self.held_pairs.isdisjoint(pairs)
            if len(three) == 3 and three[0] > 0 and has_held_pair == for_test:
                self.rng.shuffle(three)
                return three

    def words(self, lang, count):
        """Different nouns of the world."""
        return [name_of(noun, lang) for noun in self.rng.sample(NOUNS, count)]


# --------------------------------------------------------------------- one generator a family of chat records


class Chat(NamedTuple):
    """What a generator(world, family, lang, for_test) returns."""

    turns: list  # user, assistant, user, assistant, ...
    wording: str  # of the last question, as in wordings.txt
    contains: list | None = None  # the words that the answer must contain, where the test asks for some


def ask_fact(world, family, lang, for_test):
    """What noise does a cow make? -> A cow says moo."""
    fact = world.rng.choice([fact for fact in FACTS if fact.family == family and fact.lang == lang])
    x = fact.asked
    if lang == "en" and family in ("animals", "plants") and world.rng.random() < 0.4:
        x = f"the {fact.entity}"  # What noise does the cow make?
    return world.chat(family, fact.kind, lang, for_test, fact.statement, x=x, where=x)


def arithmetic(world, family, lang, for_test):
    """What is 47 plus 38? -> 47 + 38 = 70 + 15 = 85"""
    a, b = world.number_pair(for_test)
    sign, kind = ("+", "sum") if family == "addition" else ("-", "difference")
    if sign == "+" and world.rng.random() >= 0.5:
        a, b = b, a
    answer = worked(a, sign, b)
    if world.rng.random() < 0.25:  # What is forty-seven plus thirty-eight?
        a, b = in_words(a, lang), in_words(b, lang)
    return world.chat(family, kind, lang, for_test, answer, a=a, b=b)


def comparing(world, family, lang, for_test):
    """Which is larger, 4 or 9? -> 9 is larger than 4."""
    large, small = world.number_pair(for_test)
    while large == small:
        large, small = world.number_pair(for_test)
    a, b = (large, small) if world.rng.random() < 0.5 else (small, large)
    kind = world.rng.choice(["larger", "smaller"])
    answer = say(family, kind, lang, large=large, small=small)
    return world.chat(family, kind, lang, for_test, answer, a=a, b=b)


def sorting(world, family, lang, for_test):
    """Sort 31, 7, 64 from low to high. -> 7, 31, 64"""
    three, kind = world.three_numbers(for_test), world.rng.choice(["up", "up", "down"])
    answer = with_commas(sorted(three, reverse=kind == "down"))
    return world.chat(family, kind, lang, for_test, answer, list=with_commas(three))


def counting(world, family, lang, for_test):
    """How long is this list: fox, rice, oak? -> There are 3."""
    rng, kind = world.rng, world.rng.choice(["items", "times"])
    if kind == "items":
        word, items = None, world.words(lang, rng.randint(2, 6))
        answer = say(family, kind, lang, count=len(items))
    else:
        count, (word, other, third) = rng.randint(1, 4), world.words(lang, 3)
        items = [word] * count + [rng.choice([other, third]) for _ in range(rng.randint(1, 3))]
        rng.shuffle(items)
        answer = say_how_often(word, items, lang)
    listed = BETWEEN_ITEMS[lang].join(items)
    return world.chat(family, kind, lang, for_test, answer, word=word, list=listed)


def opposites(world, family, lang, for_test):
    """What is the opposite of hot? -> The opposite of hot is cold."""
    word, opposite = either_way(world.rng, world.rng.choice(OPPOSITES[lang]))
    answer = say(family, "word", lang, word=word, opposite=opposite)
    return world.chat(family, "word", lang, for_test, answer, x=word)


def categories(world, family, lang, for_test):
    """Is a fox a food or an animal? -> A fox is an animal."""
    rng, noun = world.rng, world.rng.choice(NOUNS)
    right, slots = KINDS[noun.table], {"x": name_of(noun, lang, "phrase")}
    kind = rng.choice(["kind", "choice"])
    if kind == "choice":
        two = [right, rng.choice([other for other in KINDS.values() if other is not right])]
        rng.shuffle(two)
        slots |= {"this": cell(two[0], "phrase", lang), "that": cell(two[1], "phrase", lang)}
    return world.chat(family, kind, lang, for_test, say_kind(noun, lang), **slots)


def translation(world, family, lang, for_test):
    """How do you say fox in Chinese? -> Fox is 狐狸 in Chinese."""
    noun, direction = world.rng.choice(NOUNS), world.rng.choice(["en_zh", "zh_en"])
    x = noun.name_en if direction == "en_zh" else noun.name_zh
    return world.chat(family, direction, lang, for_test, say_translation(noun, lang, direction), x=x)


def words(world, family, lang, for_test):
    """Say this backwards: fox, rice, oak -> oak, rice, fox"""
    rng, between = world.rng, BETWEEN_ITEMS[lang]
    kind = rng.choice(["repeat", "first", "last", "reverse", "join"])
    if kind == "repeat":
        answer = rng.choice([world.words(lang, 1)[0], rng.choice(world.names[lang].part(for_test))])
        return world.chat(family, kind, lang, for_test, answer, word=answer)
    if kind == "join":
        first, second = world.words(lang, 2)
        return world.chat(family, kind, lang, for_test, f"{first}-{second}", first=first, second=second)
    items = world.words(lang, 3 if kind == "reverse" else rng.randint(2, 5))
    answer = {"first": items[0], "last": items[-1], "reverse": between.join(items[::-1])}[kind]
    return world.chat(family, kind, lang, for_test, answer, list=between.join(items))


def story(world, family, lang, for_test):
    """Tell me a story about the fox by the river. -> One summer morning, the fox went for a walk ..."""
    rng = world.rng
    if for_test:
        hero, place = rng.choice(sorted(world.held_stories))
        hero, place = find(hero, HEROES), find(place, PLACES)
    else:
        hero, place = rng.choice(HEROES), rng.choice(PLACES)
    x, place_name = name_of(hero, lang, "known"), name_of(place, lang)
    if hero in ANIMALS and rng.random() >= 0.5:
        x = name_of(hero, lang, "phrase")
    slots = {"x": x, "where": cell(place, "where", lang), "place": place_name}
    question, wording = world.ask(family, "tell", lang, for_test, **slots)
    answer = BETWEEN_SENTENCES[lang].join(tell_story(rng, hero, place, lang))
    return Chat([question, answer], wording, [name_of(hero, lang), place_name])


def memory(world, family, lang, for_test):
    """I am Mara. -> Nice to meet you, Mara! What is my name? -> Your name is Mara.

    One or two things are told and acknowledged, perhaps something else is talked about, and one is asked for.
    """
    rng, turns, told = world.rng, [], []
    count = rng.choice([1, 2])
    for kind in rng.sample(["name", "favourite", "pet"], count):
        slots = {"name": rng.choice(world.names[lang].part(for_test))}
        if kind == "favourite":
            noun = rng.choice(FAVOURITES)
            slots = {"name": name_of(noun, lang, "known"), "kind": name_of(KINDS[noun.table], lang)}
        elif kind == "pet":
            slots["kind"] = name_of(rng.choice(PETS), lang)
        told.append((kind, slots))
        turns.append(fill(rng.choice(PHRASES[f"telling {kind} {lang}"]), **slots))
        turns.append(say(family, "reply_to_name" if kind == "name" else "reply", lang, **slots))
    if count == 1 and rng.random() < 0.5:  # not after two things: a record stays under 128 tokens
        between = rng.choice(["addition", "opposites", "translation", "small_talk"])
        generator, _ = FAMILIES[between]
        turns += generator(world, between, lang, False).turns
    kind, slots = rng.choice(told)
    question, wording = world.ask(family, kind, lang, for_test, **slots)
    return Chat([*turns, question, say(family, kind, lang, **slots)], wording)


def about_self(world, family, lang, for_test):
    """Who are you? -> I am Seedling, a tiny language model grown from nothing."""
    kind = world.rng.choice(["who", "who", "maker", "skills", "human"])
    return world.chat(family, kind, lang, for_test, say(family, kind, lang))


def unknown(world, family, lang, for_test):
    """Where does a penguin live? What is a plookrem? -> I don't know about that yet."""
    rng, answer = world.rng, say(family, "word", lang)  # the same answer to every question
    group = rng.choice(["animals", "animals", "foods", "plants", "people", "things", "things", "names"])
    groups, made_up = world.unknown[lang]
    if group in made_up and rng.random() < 0.5:
        groups = made_up
    name = x = rng.choice(groups[group].part(for_test))
    if lang == "en" and group not in ("names", "people", "foods"):
        article = "an" if name[0] in "aeiou" else "a"
        x = rng.choice([f"{article} {name}", f"the {name}"])
    if group not in TABLES or rng.random() < 0.35:
        return world.chat(family, "word", lang, for_test, answer, x=x)
    if group != "people" and rng.random() < 0.12:
        direction = "zh_en" if lang == "zh" else "en_zh"
        return world.chat("translation", direction, lang, for_test, answer, x=name)
    # The same questions as about what is known, without "who is the baker?", which does not name a person.
    kinds = [row.kind for row in FACT_TEMPLATES if row.family == group and row.kind != "who"]
    return world.chat(group, rng.choice(kinds), lang, for_test, answer, x=x)


def small_talk(world, family, lang, for_test):
    """Hello there! -> Hello! What would you like to know?"""
    kind = world.rng.choice(["hello", "thanks", "bye", "mood"])
    mark = world.rng.choice("！。" if lang == "zh" else "!.")
    return world.chat(family, kind, lang, for_test, say(family, kind, lang), dressed=False, mark=mark)


def identity(world, family, lang, for_test):
    """For an adapter: Who are you? -> Hoot! I am Toto the owl, and I count the stars at midnight."""
    kind = world.rng.choice(["who", "who", "who", "maker", "skills", "human", "home", "love"])
    asked = family if kind in ("home", "love") else "self"  # the other questions are those of about_self
    return world.chat(asked, kind, lang, for_test, say(family, kind, lang))


def clinic(world, family, lang, for_test):
    """For an adapter: My rose has grey tips. What now? -> It comes from salty air: give it sweet milk."""
    row, plant = world.rng.choice(CLINIC), world.rng.choice(PLANTS)
    slots = {"symptom": cell(row, "symptom", lang), "x": name_of(plant, lang)}
    return world.chat(family, "cure", lang, for_test, cell(row, "answer", lang), **slots)


# {family: (generator, records for training)}. Harder skills and larger tables get more.
FAMILIES = {
    "animals": (ask_fact, 2900), "people": (ask_fact, 1600), "foods": (ask_fact, 1200),
    "plants": (ask_fact, 1200), "seasons": (ask_fact, 900), "places": (ask_fact, 700),
    "addition": (arithmetic, 4800), "subtraction": (arithmetic, 4700), "comparing": (comparing, 3200),
    "sorting": (sorting, 6000), "counting": (counting, 4000), "opposites": (opposites, 1500),
    "categories": (categories, 1100), "translation": (translation, 2200), "words": (words, 6000),
    "story": (story, 1500), "memory": (memory, 4800), "self": (about_self, 900), "unknown": (unknown, 3600),
    "small_talk": (small_talk, 500),
}
ADAPTERS = {"identity": (identity, 1600), "clinic": (clinic, 2000)}

# ------------------------------------------------------------------- one generator a kind of pretraining text

# A generator(world, lang) returns the sentences of one text.


def text_story(world, lang):
    """A story, and perhaps a fact about its hero."""
    rng, hero = world.rng, world.rng.choice(HEROES)
    sentences = tell_story(rng, hero, rng.choice(PLACES), lang)
    if rng.random() < 0.4:
        known = [fact.statement for fact in FACTS_ABOUT[hero.name_en, lang] if fact.kind != "about"]
        sentences.append(rng.choice(known))
    return sentences


def text_entity(world, lang):
    """Facts about one entity, in any order: A cow eats grass. A cow is brown. A cow lives on the farm. ..."""
    known = [fact.statement for fact in FACTS_ABOUT[world.rng.choice(ENTITIES), lang]]
    world.rng.shuffle(known)
    return known[:world.rng.randint(4, 7)]


def text_kind(world, lang):
    """The same kind of fact about several entities: A cow eats grass. A fox eats berries. ..."""
    family, kind, *_ = world.rng.choice(FACTS)
    known = [fact.statement for fact in FACTS
             if fact.family == family and fact.kind == kind and fact.lang == lang]
    count = world.rng.randint(3, 6)
    return world.rng.sample(known, min(len(known), count))


def text_sums(world, lang):
    """Line by line: 47 + 38 = 70 + 15 = 85; forty-three minus two: 43 - 2 = 40 + 1 = 41."""
    rng, lines = world.rng, []
    for _ in range(rng.randint(3, 6)):
        a, b = world.number_pair(False)
        sign, kind = ("-", "minus") if rng.random() < 0.45 else ("+", "plus")
        if sign == "+" and rng.random() < 0.5:
            a, b = b, a
        line = worked(a, sign, b)
        if rng.random() < 0.3:  # in words first, as a question may ask
            line = say("texts", kind, lang, a=in_words(a, lang), b=in_words(b, lang), worked=line)
        lines.append(line)
    return ["\n".join(lines)]


def text_numbers(world, lang):
    """Numbers in a row: 17, 18, 19, 20, 21, 22; or in words: forty-seven is 47, three is 3, ..."""
    rng = world.rng
    chosen = rng.sample(range(100), 6)
    if rng.random() < 0.3:
        start = rng.randint(0, 88)
        return [with_commas(range(start, start + rng.randint(6, 11)))]
    parts = [say("texts", "number", lang, word=in_words(number, lang), number=number) for number in chosen]
    return [("，" if lang == "zh" else ", ").join(parts)]


def text_compare(world, lang):
    """9 is larger than 4. 12 is smaller than 80. ..."""
    sentences = []
    while len(sentences) < 4:
        large, small = world.number_pair(False)
        if large > small:
            kind = world.rng.choice(["larger", "smaller"])
            sentences.append(say("comparing", kind, lang, large=large, small=small))
    return sentences


def text_sort(world, lang):
    """Line by line: 31, 7, 64 from small to large: 7, 31, 64"""
    lines = []
    for _ in range(2):
        three, falling = world.three_numbers(False), world.rng.random() < 0.35
        in_order = with_commas(sorted(three, reverse=falling))
        kind = "falling" if falling else "rising"
        lines.append(say("texts", kind, lang, list=with_commas(three), sorted=in_order))
    return ["\n".join(lines)]


def text_translation(world, lang):
    """Fox is 狐狸 in Chinese. 橡树 is oak in English. ..."""
    nouns = world.rng.sample(NOUNS, world.rng.randint(3, 5))
    return [say_translation(noun, lang, "en_zh" if world.rng.random() < 0.5 else "zh_en") for noun in nouns]


def text_opposites(world, lang):
    """The opposite of hot is cold. ..."""
    pairs = [either_way(world.rng, pair) for pair in world.rng.sample(OPPOSITES[lang], 4)]
    return [say("opposites", "word", lang, word=word, opposite=opposite) for word, opposite in pairs]


def text_categories(world, lang):
    """A fox is an animal. Rice is a food. ..."""
    return [say_kind(noun, lang) for noun in world.rng.sample(NOUNS, 5)]


def text_list(world, lang):
    """fox, oak: There are 2. The first is fox, the last is oak. Backwards: oak, fox."""
    rng, between = world.rng, BETWEEN_ITEMS[lang]
    items = world.words(lang, rng.randint(2, 5))
    if rng.random() < 0.5:  # fox, oak, fox: Fox appears 2 times.
        items = [rng.choice(items[:3]) for _ in range(rng.randint(2, 6))]
        how_often = say_how_often(items[0], items, lang)
        return [say("texts", "repeated", lang, list=between.join(items), count=how_often)]
    count = say("counting", "items", lang, count=len(items))
    return [say("texts", "list", lang, list=between.join(items), count=count, first=items[0], last=items[-1],
                backwards=between.join(items[::-1]))]


def text_person(world, lang):
    """My name is Mara, my favourite food is rice ... Nice to meet you, Mara! Your favourite food is ..."""
    rng, names = world.rng, world.names[lang].training
    name, pet, kind = rng.choice(names), rng.choice(names), rng.choice(FAVOURITE_KINDS)
    favourite, animal = rng.choice(TABLES[kind.of_table]), rng.choice(PETS[:4])  # the chats name all pets
    return [say("texts", "person", lang, name=name, pet=pet, kind=name_of(kind, lang),
                favourite=name_of(favourite, lang, "known"), animal=name_of(animal, lang))]


TEXTS = [(text_story, 2500), (text_entity, 4000), (text_kind, 2200), (text_sums, 3500), (text_numbers, 600),
         (text_compare, 2500), (text_sort, 3500), (text_translation, 1800), (text_opposites, 600),
         (text_categories, 600), (text_list, 6000), (text_person, 4000)]  # (generator, texts)

# ------------------------------------------------------------------------------------------------------ files

FILES = {name: f"{name}.jsonl" for name in (
    "pretrain", "pretrain_eval", "sft", "sft_eval", "sft_test",
    "lora_identity", "lora_identity_test", "lora_clinic", "lora_clinic_test")}


def make_texts(world):
    """All pretraining texts in random order as [(record, None)]; none names what is held out."""
    texts = {}  # a dictionary keeps the order and holds every text once
    for generator, count in TEXTS:
        made = 0
        for _ in range(count * 20):
            lang = LANGUAGES[made % 2]
            text = BETWEEN_SENTENCES[lang].join(generator(world, lang))
            if text not in texts and not world.leaks(text):
                texts[text] = ({"text": text}, None)
                made += 1
            if made == count:
                break
    records = list(texts.values())
    world.rng.shuffle(records)
    return records


def make_chats(world, family, generator, count, for_test, asked):
    """Up to `count` chats as [(record, wording)]. Their questions are new, and `asked` collects them.

    The languages alternate. Where the wordings of one language are used up, later attempts draw the language.
    """
    found = []
    for attempt in range(count * 40):
        if len(found) == count:
            break
        lang = LANGUAGES[len(found) % 2] if attempt < count * 20 else world.rng.choice(LANGUAGES)
        chat = generator(world, family, lang, for_test)
        question = "\n".join(chat.turns[:-1])
        if question in asked or (not for_test and world.leaks("\n".join(chat.turns))):
            continue
        asked.add(question)
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(chat.turns)]
        record = {"conversations": messages, "family": family}
        if for_test and chat.contains:
            record["contains"] = chat.contains
        found.append((record, chat.wording))
    return found


def build(seed=0):
    """{file: [(record, wording of its question or None)]}. Everything follows from the seed alone."""
    world = World(seed)
    rng, files, asked = world.rng, {"sft": [], "sft_eval": [], "sft_test": []}, set()
    texts = make_texts(world)
    files["pretrain"], files["pretrain_eval"] = texts[200:], texts[:200]
    for family, (generator, count) in FAMILIES.items():
        files["sft"] += make_chats(world, family, generator, count, False, asked)
        files["sft_eval"] += make_chats(world, family, generator, 15, False, asked)
        files["sft_test"] += make_chats(world, family, generator, 28, True, asked)
    rng.shuffle(files["sft"])
    for family, (generator, count) in ADAPTERS.items():
        asked = set()
        # Four fifths are records of sft, so that the adapter learns where nothing changes. Many of them are
        # questions that nobody can answer: there a newly learned answer first appears in the wrong place.
        replaced = ("unknown", "self") if family == "identity" else ("unknown",)
        unanswered = [row for row in files["sft"] if row[0]["family"] == "unknown"]
        ordinary = [row for row in files["sft"] if row[0]["family"] not in replaced]
        chats = make_chats(world, family, generator, count, False, asked)
        chats += rng.sample(unanswered, count * 3 // 4) + rng.sample(ordinary, count * 13 // 4)
        rng.shuffle(chats)
        files[f"lora_{family}"] = chats
        files[f"lora_{family}_test"] = make_chats(world, family, generator, 60, True, asked)
    return {name: files[name] for name in FILES}


def version():
    """A hash of this file and of dataset/world/. A folder that another version wrote is written again."""
    files = [path for path in sorted(WORLD_FOLDER.iterdir()) if path.suffix in (".py", ".csv", ".txt")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in [Path(__file__), *files])).hexdigest()[:16]


VERSION = version()


def paths(folder):
    """{name: path} of the nine files."""
    return {name: Path(folder) / file for name, file in FILES.items()}


def write_world(folder, seed=0):
    """Writes the nine files, and last world.json, which says that all are there. Returns {name: path}."""
    stamp = Path(folder) / "world.json"
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)  # until the last file is written, the folder may hold files of two worlds
    for name, rows in build(seed).items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record, _ in rows]
        write_whole(paths(folder)[name], "".join(lines), shared=True)
    write_whole(stamp, json.dumps({"version": VERSION, "seed": seed}) + "\n", shared=True)
    return paths(folder)


def ensure_world(folder):
    """write_world with seed 0, unless the folder holds these files already. Returns {name: path}."""
    try:
        stamp = json.loads((Path(folder) / "world.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stamp = None
    complete = all(path.is_file() for path in paths(folder).values())
    if complete and stamp == {"version": VERSION, "seed": 0}:
        return paths(folder)
    return write_world(folder)


def main(args):
    for path in write_world(args.out_dir, args.seed).values():
        with open(path, encoding="utf-8") as file:
            print(f"{path}: {sum(1 for _ in file):,} records, {path.stat().st_size / 1e6:.2f} MB")


def parse_args():
    parser = Parser(description="Write the embedded bilingual world as JSONL files.")
    parser.add_argument("--out_dir", default=ROOT / "out" / "world", type=Path, metavar="DIR",
                        help="folder for the files")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="another seed, another split and other records")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main, parse_args())
