"""The texts that a model is pretrained on: stories, descriptions, lists and sums. They state the facts and
show the skills that the chat records ask for. A reader may skip this file.

A generator(world, lang) returns the sentences of one text. `world` is a World of dataset/synthetic.py: it
knows what is held out for the test.
"""

from dataset.world import (
    BETWEEN_ITEMS,
    ENTITIES,
    FACTS,
    FACTS_ABOUT,
    FAVOURITE_KINDS,
    HEROES,
    NOUNS,
    OPPOSITES,
    PETS,
    PLACES,
    TABLES,
    either_way,
    in_words,
    name_of,
    say,
    say_how_often,
    say_kind,
    say_translation,
    tell_story,
    with_commas,
    worked,
)


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
