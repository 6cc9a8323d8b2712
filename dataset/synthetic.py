"""A small bilingual world, written from a seed: the training data for everybody who brings no data.

    python dataset/synthetic.py --out_dir out/world --seed 0

The tables, wordings of questions, parts of stories and word lists are files in dataset/world/, which anybody
may edit; the README there explains them. This file draws records from them, in English and in Chinese.

What the model learns
  the world    facts about twenty animals, ten people, twelve places and foods, eight plants and four seasons:
               where the cow lives, what Mia's job is, what a lemon costs
  numbers      adding and subtracting step by step, comparing, sorting, counting
  words        opposites, kinds of things, translation, repeating, the first or last of a list, reversing
  talk         telling stories, remembering names, who the model is, feelings, small talk, what the model
               cannot do, and saying "I don't know"

Half of the questions are written as people in a hurry type them (dataset/world/hasty.py). Some records are
the end of a longer chat, so that the model answers the last question and still remembers the first.

Pretraining texts (stories, descriptions, lists, sums) state the very facts that the chat records ask for. Two
more sets of chat records train adapters: another identity, and the knowledge of a plant clinic. Pairs of
stories, for preferences, come from dataset/world/pairs.py.

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
        ANIMALS, CLINIC, FACTS, FACTS_ABOUT, FACT_TEMPLATES, FAVOURITES, HEROES, KINDS, LANGUAGES, NAMES,
        NOUNS, OPPOSITES, PETS, PHRASES, PLACES, PLANTS, QUESTIONS, TABLES, TALK, TRANSLATED, UNKNOWN, VALUES,
        WORLD_FOLDER,
        cell, find, is_chinese, meetings, name_of, ordinary_text, several_of, words_of,
        BETWEEN_ITEMS, BETWEEN_SENTENCES, bare, capital, fill, read_wordings,
        either_way, say, say_how_often, say_kind, say_translation, tell_story,
        in_words, pairs_in_between, with_commas, worked,
    )
    from dataset.world.hasty import hasty, mistype, noise  # noqa: E402, I001
    from dataset.world.pairs import make_pairs  # noqa: E402, I001
    from dataset.world.skills import SKILL_QUESTIONS, SKILLS, make_skills  # noqa: E402, I001
    from dataset.world.texts import TEXTS  # noqa: E402, I001
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


def split_wordings(rng, questions=QUESTIONS):
    """{(family, kind, lang): Split of its lines, each a list of wordings}.

    No wording of a test is in the training of any kind.

    The first wording of each line stays in training. Of the other combinations one in eight is held out, so
    that a held-out wording is new as a whole, while the model has met its parts in other wordings.
    """
    lines = read_wordings(questions)
    always = {bare(wording) for some in lines.values() for line, can_hold_out in some
              for wording in (line[:1] if can_hold_out and len(line) >= 4 else line)}
    test = {}
    for key in lines:
        free = sorted({wording for line, _ in lines[key] for wording in line if bare(wording) not in always})
        test[key] = set(rng.sample(free, min(len(free), max(3, len(free) // 8))))
    bare_test = {bare(wording) for wordings in test.values() for wording in wordings}
    split = {}
    for key, some in lines.items():  # two kinds may share a wording: what one tests, the other does not train
        training = [[wording for wording in line if bare(wording) not in bare_test] for line, _ in some]
        tested = [[wording for wording in line if wording in test[key]] for line, _ in some]
        split[key] = Split([line for line in training if line], [line for line in tested if line])
    return split


class World:
    """One seed's choice of the wordings, number pairs, stories and names that are held out for the test.

    `rng` draws everything, one thing after the other: another order of draws is another world.
    """

    def __init__(self, seed):
        self.rng = rng = random.Random(seed)
        self.wordings = split_wordings(rng)
        self.talk_kinds = {  # those that have a wording
            (family, lang, for_test): [kind for kind in kinds
                                       if self.wordings[family, kind, lang].part(for_test)]
            for family, kinds in TALK_KINDS.items() for lang in LANGUAGES for for_test in (False, True)}
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

    def ask(self, family, kind, lang, for_test, /, **slots):
        """(question, wording). Each line of wordings.txt is drawn as often as any other.

        A question may have an opener ("Hey, ") and a closer (" Thanks!"), and half of them are hasty.
        """
        rng, is_talk = self.rng, f"{family}.{kind}" in TALK
        text = wording = rng.choice(rng.choice(self.wordings[family, kind, lang].part(for_test)))
        opener = closer = ""
        if rng.random() < (0.12 if is_talk else 0.25):
            opener = rng.choice(PHRASES[f"openers {lang}"])
        if text[-1] in "?.？。" and rng.random() < (0.03 if is_talk else 0.12):
            closer = rng.choice(PHRASES[f"closers {lang}"])
        if is_talk and text[-1] in ".。" and rng.random() < 0.25:
            text = text[:-1] + ("!" if lang == "en" else "！")
        text = opener + text + closer if lang == "zh" else f"{opener} {text} {closer}".strip()
        is_hasty, can_mistype = rng.random() < 0.55, family not in EXACT and not for_test
        if is_hasty:
            text = hasty(rng, text, lang, typos=can_mistype)
            slots |= {slot: slots[slot].lower() for slot in ("x", "xs", "name") if slot in slots}
            if can_mistype and rng.random() < 0.1:
                slots |= {slot: mistype(rng, slots[slot]) for slot in ("x", "xs", "name") if slot in slots}
        text = fill(text, **slots)
        if lang == "zh" and rng.random() < 0.4:  # 12加34 becomes 12 加 34
            text = re.sub("(?<=[0-9a-z])(?=[\u4e00-\u9fff])|(?<=[\u4e00-\u9fff])(?=[0-9a-z])", " ", text)
        if lang == "en" and not is_hasty and (not opener or opener.endswith("!")):
            start = len(opener) + 1 if opener else 0
            text = text[:start] + capital(text[start:])
        return text.strip(), wording

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

    def exchange(self, lang):
        """[question, answer] of some family, for the middle of a longer chat."""
        family = self.rng.choice(IN_BETWEEN)
        generator, _ = FAMILIES[family]
        return generator(self, family, lang, False).turns

    def words(self, lang, count):
        """Different nouns of the world."""
        return [name_of(noun, lang) for noun in self.rng.sample(NOUNS, count)]

    def anything(self, lang, for_test):
        """The name of something or somebody, of this world or not."""
        if self.rng.random() < 0.35:
            return name_of(self.rng.choice([noun for noun in NOUNS if noun.table != "seasons"]), lang)
        real, made_up = self.unknown[lang]
        groups = real if self.rng.random() < 0.85 else made_up
        return self.rng.choice(self.rng.choice(list(groups.values())).part(for_test))

    def listed(self, items, lang, between):
        """The items as people write a list: "5, 2, 9", "5,2,9" or "5 2 9"."""
        other = [" ", ","] if lang == "en" or items[0].isdigit() else [" ", "，"]
        return (between if self.rng.random() < 0.7 else self.rng.choice(other)).join(items)


# --------------------------------------------------------------------- one generator a family of chat records


class Chat(NamedTuple):
    """What a generator(world, family, lang, for_test) returns."""

    turns: list  # user, assistant, user, assistant, ...
    wording: str  # of the last question, as in wordings.txt
    contains: list | None = None  # the words that the answer must contain, where the test asks for some


FACTS_OF = {(family, lang): [fact for fact in FACTS if fact.family == family and fact.lang == lang]
            for family in dict.fromkeys(fact.family for fact in FACTS) for lang in LANGUAGES}


def ask_fact(world, family, lang, for_test):
    """What noise does a cow make? Who says moo? Does a cow say woof? -> A cow says moo."""
    rng = world.rng
    fact = rng.choice(FACTS_OF[family, lang])
    same = VALUES.get((family, fact.kind, lang), {})  # {yip: the facts of all that say it}
    slots, about = slots_of(rng, fact), fact.kind
    answer, way = fact.statement, rng.choices(["what", "who", "is"], [6, 4, 2])[0]
    if way == "who" and (family, f"who_{fact.kind}", lang) in world.wordings and len(same[fact.value]) <= 4:
        about, slots = f"who_{fact.kind}", {"value": fact.value}
        if fact.kind == "thing" and lang == "en":  # a little lighthouse, the lighthouse
            slots["value"] = rng.choice([fact.value, f"the {fact.value.split()[-1]}"])
        answer = BETWEEN_SENTENCES[lang].join(other.statement for other in same[fact.value])
    elif way == "is" and (family, f"is_{fact.kind}", lang) in world.wordings:
        about, slots["value"] = f"is_{fact.kind}", rng.choice([fact.value, rng.choice(list(same))])
    return world.chat(family, about, lang, for_test, answer, **slots)


def slots_of(rng, fact):
    """How a question may name what it asks about: a cow or the cow, cow, cows; on the farm."""
    x = fact.asked
    if fact.lang == "en" and fact.family in ("animals", "plants") and rng.random() < 0.4:
        x = f"the {fact.entity}"  # What noise does the cow make?
    return {"x": x, "xs": fact.several, "name": fact.entity if fact.lang == "en" else x, "where": x}


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
    listed = world.listed([str(number) for number in three], lang, ", ")
    return world.chat(family, kind, lang, for_test, answer, list=listed)


def counting(world, family, lang, for_test):
    """How long is this list: fox, rice, oak? -> There are 3. Count to 4. -> 1, 2, 3, 4"""
    rng, between = world.rng, BETWEEN_ITEMS[lang]
    kind = rng.choices(["items", "times", "up_to"], [6, 6, 2])[0]
    if kind == "up_to":
        number = rng.randint(4, 20)  # a list of three could be one that is held out from sorting
        slots = {"n": in_words(number, lang) if rng.random() < 0.3 else str(number)}
        return world.chat(family, kind, lang, for_test, with_commas(range(1, number + 1)), **slots)
    if kind == "items":
        word, items = "", world.words(lang, rng.randint(2, 6))
        answer = say(family, kind, lang, count=len(items))
    else:
        count, (word, other, third) = rng.randint(1, 4), world.words(lang, 3)
        items = [word] * count + [rng.choice([other, third]) for _ in range(rng.randint(1, 3))]
        rng.shuffle(items)
        answer = say_how_often(word, items, lang)
    listed = world.listed(items, lang, between)
    return world.chat(family, kind, lang, for_test, answer, word=word, list=listed)


def opposites(world, family, lang, for_test):
    """What is the opposite of hot? -> The opposite of hot is cold."""
    word, opposite = either_way(world.rng, world.rng.choice(OPPOSITES[lang]))
    answer = say(family, "word", lang, word=word, opposite=opposite)
    return world.chat(family, "word", lang, for_test, answer, x=word)


def categories(world, family, lang, for_test):
    """Is a fox a food or an animal? -> A fox is an animal. Is a fox a food? -> A fox is an animal."""
    rng, noun = world.rng, world.rng.choice(NOUNS)
    right, answer, kind = KINDS[noun.table], say_kind(noun, lang), rng.choice(["kind", "choice", "is_kind"])
    slots = {"x": name_of(noun, lang, "phrase"), "xs": several_of(noun), "name": name_of(noun, lang)}
    wrong = rng.choice([other for other in KINDS.values() if other is not right])
    if kind == "choice":
        this, that = either_way(rng, (right, wrong))
        slots |= {"this": cell(this, "phrase", lang), "that": cell(that, "phrase", lang)}
    elif kind == "is_kind":
        asked = rng.choice([right, wrong])
        slots |= {"value": cell(asked, "phrase", lang), "values": f"{asked.name_en}s"}
    return world.chat(family, kind, lang, for_test, answer, **slots)


def translation(world, family, lang, for_test):
    """How do you say fox in Chinese? -> Fox is 狐狸 in Chinese."""
    noun, direction = world.rng.choice(TRANSLATED), world.rng.choice(["en_zh", "zh_en"])
    x = noun.name_en if direction == "en_zh" else noun.name_zh
    return world.chat(family, direction, lang, for_test, say_translation(noun, lang, direction), x=x)


def words(world, family, lang, for_test):
    """Say this backwards: fox, rice, oak -> oak, rice, fox"""
    rng, between = world.rng, BETWEEN_ITEMS[lang]
    kind = rng.choice(["repeat", "first", "last", "reverse", "join"])
    if kind == "repeat":
        answer = rng.choice([world.anything(lang, for_test), rng.choice(world.names[lang].part(for_test))])
        return world.chat(family, kind, lang, for_test, answer, word=answer)
    if kind == "join":
        first, second = world.words(lang, 2)
        return world.chat(family, kind, lang, for_test, f"{first}-{second}", first=first, second=second)
    items = world.words(lang, 3 if kind == "reverse" else rng.randint(2, 5))
    answer = {"first": items[0], "last": items[-1], "reverse": between.join(items[::-1])}[kind]
    return world.chat(family, kind, lang, for_test, answer, list=world.listed(items, lang, between))


def story(world, family, lang, for_test):
    """Tell me a story about the fox by the river. -> One summer morning, the fox went for a walk ..."""
    rng = world.rng
    kind = rng.choices(["tell", "hero", "any"], [6, 4, 0 if for_test else 1])[0]
    if for_test and kind == "tell":
        hero, place = rng.choice(sorted(world.held_stories))
        hero, place = find(hero, HEROES), find(place, PLACES)
    else:
        hero, place = rng.choice(HEROES), rng.choice(PLACES)
    if kind == "hero" and not for_test and rng.random() < 0.5:
        hero = a_stranger(world, lang, for_test)
    x, name, place_name = name_of(hero, lang, "known"), name_of(hero, lang), name_of(place, lang)
    if hero.table == "animals" and rng.random() >= 0.4:
        x = name_of(hero, lang, "phrase")
    slots = {"x": x, "name": name, "where": cell(place, "where", lang), "place": place_name}
    question, wording = world.ask(family, kind, lang, for_test, **slots)
    answer = BETWEEN_SENTENCES[lang].join(tell_story(rng, hero, place, lang))
    return Chat([question, answer], wording, {"tell": [name, place_name], "hero": [name]}.get(kind))


def a_stranger(world, lang, for_test):
    """A hero from outside of the world: a row like that of an animal, for a penguin or a rocket."""
    real, made_up = world.unknown[lang]
    groups = made_up if world.rng.random() < 0.1 else real
    name = world.rng.choice(groups[world.rng.choice(["animals", "animals", "things"])].part(for_test)).lower()
    phrase = f"an {name}" if name[0] in "aeiou" else f"a {name}"
    return ANIMALS[0]._replace(name_en=name, name_zh=name, known_en=f"the {name}", phrase_en=phrase)


def memory(world, family, lang, for_test):
    """I am Mara. -> Nice to meet you, Mara! What is my name? -> Your name is Mara.

    One or two things are told and acknowledged, perhaps something else is talked about, and one is asked for.
    Sometimes nothing was told.
    """
    rng, turns, told = world.rng, [], []
    kinds = rng.sample(["name", "favourite", "pet"], rng.choice([1, 2]))
    is_told = rng.random() < 0.88
    for kind in kinds:
        slots = {"name": rng.choice(world.names[lang].part(for_test))}
        if kind == "favourite":
            noun = rng.choice(FAVOURITES)
            slots = {"name": name_of(noun, lang, "known"), "kind": name_of(KINDS[noun.table], lang)}
        elif kind == "pet":
            slots["kind"] = name_of(rng.choice(PETS), lang)
        told.append((kind, slots))
        if is_told:
            said = rng.choice(PHRASES[f"telling {kind} {lang}"])
            if rng.random() < 0.4:
                said = hasty(rng, said, lang)
                if rng.random() < 0.5:
                    slots["name"] = slots["name"].lower()
            turns.append(capital(fill(said, **slots)) if said[0].isupper() else fill(said, **slots))
            turns.append(say(family, "reply_to_name" if kind == "name" else "reply", lang, **slots))
    if not for_test and len(turns) == 2 and rng.random() < 0.2:  # nothing is asked for yet
        return Chat(turns, "")
    for _ in range(rng.choices([0, 1, 2, 3], [70, 30, 0, 0] if for_test else [56, 24, 13, 7])[0]):
        turns += world.exchange(lang)
    kind, slots = rng.choice(told)
    question, wording = world.ask(family, kind, lang, for_test, **slots)
    answer = say(family, kind, lang, **slots) if is_told else say(family, "untold", lang)
    if len(turns) == 2 and rng.random() < 0.15:  # My name is Mara. What is my name?
        question = f"{turns[0]}{BETWEEN_SENTENCES[lang] or '，'}{question}"
        turns = []
    return Chat([*turns, question, answer], wording)


# {family: its kinds, each as often as its section has lines}
TALK_KINDS = {family: [section.removeprefix(f"{family}.") for section, lines in TALK.items()
                       if section.startswith(f"{family}.") for _ in lines]
              for family in ("small_talk", "self", "limits", "unknown")}


def talk(world, family, lang, for_test):
    """Any section of talk.txt: I am tired. -> Then take a good rest. You have earned it."""
    rng = world.rng
    kind = rng.choice(world.talk_kinds[family, lang, for_test])
    a, _ = world.number_pair(for_test)
    c, d, e = world.three_numbers(for_test)
    big, large = (rng.randint(100, rng.choice([999, 9999])) for _ in range(2))
    slots = {"x": world.anything(lang, for_test), "a": a, "c": c, "d": d, "e": e, "big": big, "large": large,
             "noise": noise(rng, lang)}
    return world.chat(family, kind, lang, for_test, say(family, kind, lang), **slots)


def unknown(world, family, lang, for_test):
    """Where does a penguin live? What is a plookrem? -> I don't know about that yet."""
    rng, answer = world.rng, say(family, "word", lang)  # the same answer to every question
    if rng.random() < 0.25:
        return talk(world, family, lang, for_test)
    group = rng.choice(["animals", "animals", "foods", "plants", "people", "things", "things", "names"])
    groups, made_up = world.unknown[lang]
    if group in made_up and rng.random() < 0.35:
        groups = made_up
    name = x = rng.choice(groups[group].part(for_test))
    if lang == "en" and group not in ("names", "people", "foods"):
        article = "an" if name[0] in "aeiou" else "a"
        x = rng.choice([f"{article} {name}", f"the {name}", f"{article} {name}"])
    slots = {"x": x, "name": name, "xs": name if group in ("names", "people") or lang == "zh" else f"{name}s"}
    asked, kind = "unknown", "word"
    if group in TABLES and rng.random() < 0.6:
        # The same questions as about what is known, without "who is the baker?", which names no person.
        asked = group
        kind = rng.choice([row.kind for row in FACT_TEMPLATES if row.family == group and row.kind != "who"])
        if rng.random() < 0.15 and (group, f"is_{kind}", lang) in world.wordings:
            slots["value"] = rng.choice(list(VALUES[group, kind, lang]))
            kind = f"is_{kind}"
    turned = {"foods": [("animals", "who_food"), ("people", "who_likes")], "animals": [("people", "who_pet")]}
    if group in turned and rng.random() < 0.12:  # Who eats pizza?
        asked, kind = rng.choice(turned[group])
        slots["value"] = x
    elif group != "people" and rng.random() < 0.12:
        direction = "zh_en" if lang == "zh" else "en_zh"
        asked, kind = rng.choice([("translation", direction), ("opposites", "word")])
        slots["x"] = name
    return world.chat(asked, kind, lang, for_test, answer, **slots)


def identity(world, family, lang, for_test):
    """For an adapter: Who are you? -> Hoot! I am Toto the owl, and I count the stars at midnight."""
    kind = world.rng.choice(["who", "who", "who", "maker", "skills", "human", "home", "love"])
    return world.chat("self", kind, lang, for_test, say(family, kind, lang))


def clinic(world, family, lang, for_test):
    """For an adapter: My rose has grey tips. What now? -> It comes from salty air: give it sweet milk."""
    row, plant = world.rng.choice(CLINIC), world.rng.choice(PLANTS)
    slots = {"symptom": cell(row, "symptom", lang), "x": name_of(plant, lang)}
    return world.chat(family, "cure", lang, for_test, cell(row, "answer", lang), **slots)


# {family: (generator, records for training)}. Harder skills and larger tables get more.
FAMILIES = {
    "animals": (ask_fact, 6400), "people": (ask_fact, 3600), "foods": (ask_fact, 2200),
    "plants": (ask_fact, 2200), "seasons": (ask_fact, 1400), "places": (ask_fact, 1000),
    "addition": (arithmetic, 4800), "subtraction": (arithmetic, 4700), "comparing": (comparing, 4500),
    "sorting": (sorting, 8500), "counting": (counting, 9000), "opposites": (opposites, 1500),
    "categories": (categories, 1800), "translation": (translation, 2200), "words": (words, 6000),
    "story": (story, 2000), "memory": (memory, 7500), "self": (talk, 5000), "unknown": (unknown, 8000),
    "small_talk": (talk, 11000), "limits": (talk, 8500),
}
EXACT = ("comparing", "sorting", "counting", "words", "addition", "subtraction", *SKILLS)  # no typos
IN_BETWEEN = [family for family in FAMILIES if family not in ("memory", "story", "self")]  # of a longer chat
ADAPTERS = {"identity": (identity, 1600), "clinic": (clinic, 2000)}

# ------------------------------------------------------------------------------------------------------ files

FILES = {name: f"{name}.jsonl" for name in (
    "pretrain", "pretrain_eval", "sft", "sft_eval", "sft_test",
    "lora_identity", "lora_identity_test", "lora_clinic", "lora_clinic_test",
    "dpo", "dpo_eval", "dpo_test", "grpo", "grpo_eval", "grpo_test")}


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

    The languages take turns. Where the wordings of one are used up, later attempts draw the language.
    """
    found = []
    for attempt in range(count * 40):
        if len(found) == count:
            break
        # In training 3 of 5 are English, which people shorten and misspell in more ways.
        turn = len(found) % 2 if for_test else len(found) % 5 % 2
        lang = LANGUAGES[turn] if attempt < count * 20 else world.rng.choice(LANGUAGES)
        chat = generator(world, family, lang, for_test)
        if not for_test and family != "memory" and world.rng.random() < 0.1:  # a chat that had begun before
            before = [turn for _ in range(world.rng.randint(1, 4)) for turn in world.exchange(lang)]
            chat = chat._replace(turns=before + chat.turns)
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
        files["sft_test"] += make_chats(world, family, generator, 100, True, asked)
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
        files[f"lora_{family}_test"] = make_chats(world, family, generator, 100, True, asked)
    files |= make_skills(world, split_wordings(random.Random(seed), SKILL_QUESTIONS), seed)
    files |= make_pairs(world, seed)
    return {name: files[name] for name in FILES}


def version():
    """A hash of this file and of dataset/world/. A folder that another version wrote is written again."""
    files = [path for path in sorted(WORLD_FOLDER.iterdir()) if path.suffix in (".py", ".csv", ".txt")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in [Path(__file__), *files])).hexdigest()[:16]


VERSION = version()


def paths(folder):
    """{name: path} of the files."""
    return {name: Path(folder) / file for name, file in FILES.items()}


def write_world(folder, seed=0):
    """Writes the files, and last world.json, which says that all are there. Returns {name: path}."""
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
