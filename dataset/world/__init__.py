"""The world, read from the data files in this folder: tables, nouns, facts, sentences, stories and wordings.

README.md explains the files to everybody who wants to edit them. dataset/synthetic.py draws its records from
what is read here.
"""

import csv
import re
from collections import namedtuple
from functools import cache
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError

WORLD_FOLDER = Path(__file__).resolve().parent
LANGUAGES = ("en", "zh")
BETWEEN_SENTENCES = {"en": " ", "zh": ""}
BETWEEN_ITEMS = {"en": ", ", "zh": "、"}  # of a list

# ------------------------------------------------------------------------------------------ reading the files


def read_text(file):
    """The text of a file in this folder."""
    try:
        return (WORLD_FOLDER / file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"dataset/world/{file} can't be read: {error}; it must be a text in UTF-8") from None


def row_class(name, header):
    """The named tuple for the rows of a table. A column that it lacks is a mistake in its file."""
    try:
        columns = namedtuple("Columns", [*header, "table"])
    except ValueError as error:
        raise DataError(f"dataset/world/{name}.csv: the first line must name the columns: {error}") from None

    class Row(columns):
        __slots__ = ()

        def __getattr__(self, column):
            if column.startswith("_"):  # Python itself asks for such names
                raise AttributeError(column)
            raise DataError(f"dataset/world/{name}.csv has no column {column!r}")

    return Row


def read_table(name, **references):
    """The rows of NAME.csv as named tuples, whose fields are the columns and `table`, the NAME.

    Each further argument says that a column holds names of another table's rows. With home=PLACES the text
    "farm" in the column "home" becomes that row of PLACES, so that animal.home.where_en is "on the farm".
    """
    header, *lines = list(csv.reader(StringIO(read_text(f"{name}.csv")))) or [[]]
    Row, rows = row_class(name, header), []
    for number, cells in enumerate(lines, start=2):
        if not cells:
            continue
        if len(cells) != len(header):
            raise DataError(f"dataset/world/{name}.csv, line {number} has {len(cells)} cells, but the table "
                            f"{len(header)} columns; put a text that contains a comma into double quotes")
        row = Row(*cells, name)
        for column, table in references.items():
            row = row._replace(**{column: find(getattr(row, column), table)})
        rows.append(row)
    if not rows:
        raise DataError(f"dataset/world/{name}.csv holds no row")
    return rows


def find(name_en, rows):
    """The row with this English name."""
    for row in rows:
        if row.name_en == name_en:
            return row
    raise DataError(f"dataset/world/{rows[0].table}.csv has no row whose name_en is {name_en!r}")


class Sections(dict):
    """What read_sections returns."""

    def __missing__(self, section):
        raise DataError(f"dataset/world/{self.file} has no section [{section}]")


def read_sections(name):
    """{section: its lines} of NAME.txt, where [section] stands above its lines and # starts a comment."""
    sections = Sections()
    sections.file = f"{name}.txt"
    for line in read_text(sections.file).splitlines():
        if line.startswith("["):
            lines = sections[line.strip("[] ")] = []
        elif line.strip() and not line.startswith("#"):
            if not sections:
                raise DataError(f"dataset/world/{name}.txt: {line!r} stands above the first [section]")
            lines.append(line)
    return sections


def read_words(name):
    """{section: its words} of NAME.txt, where spaces and ends of lines separate the words."""
    sections = read_sections(name)
    for section, lines in sections.items():
        sections[section] = " ".join(lines).split()
    return sections


def read_talk(name):
    """NAME.txt as (questions, answers): {section: its lines}, and {(family, kind, language): the answer}.

    Lines that start with "> " are the answers of their section, one a language.
    """
    questions, answers = read_sections(name), {}
    for section, lines in questions.items():
        family, _, kind = section.partition(".")
        for line in lines:
            if line.startswith("> "):
                answers[family, kind, language_of(line)] = line.removeprefix("> ")
        questions[section] = [line for line in lines if not line.startswith("> ")]
        for lang in LANGUAGES:
            if (family, kind, lang) not in answers:
                raise DataError(f"dataset/world/{name}.txt: [{section}] has no answer in the language "
                                f'{lang!r}: a line that starts with "> "')
    return questions, answers


def is_chinese(text):
    return re.search("[\u4e00-\u9fff]", text) is not None


def language_of(text):
    return "zh" if is_chinese(text) else "en"


COLOURS = read_table("colours")
PLACES = read_table("places")
SEASONS = read_table("seasons")
ANIMALS = read_table("animals", home=PLACES, colour=COLOURS)
FOODS = read_table("foods", colour=COLOURS)
PLANTS = read_table("plants", home=PLACES, colour=COLOURS, season=SEASONS)
PEOPLE = read_table("people", home=PLACES, food=FOODS, pet=ANIMALS)
TABLES = {"animals": ANIMALS, "people": PEOPLE, "foods": FOODS, "plants": PLANTS, "seasons": SEASONS,
          "places": PLACES, "colours": COLOURS}
KINDS = {kind.of_table: kind for kind in read_table("kinds")}  # KINDS["animals"] is the row of "an animal"
FACT_TEMPLATES = read_table("facts")
TALK, ANSWERS = read_talk("talk")  # what people say that needs no knowledge of the world, and the answers
SENTENCES = ANSWERS | {(row.family, row.kind, lang): sentence for row in read_table("sentences")
                       for lang, sentence in zip(LANGUAGES, (row.sentence_en, row.sentence_zh), strict=True)}
CLINIC = read_table("clinic")  # symptoms of plants: only the clinic's adapter is trained on them
OPPOSITES = {lang: [(row.word, row.opposite) for row in read_table("opposites") if row.language == lang]
             for lang in LANGUAGES}
QUESTIONS = read_sections("wordings")
QUESTIONS.update(TALK)
PHRASES = read_sections("phrases")
SHORTENED = {lang: [line.split(" | ") for line in PHRASES[f"shortened {lang}"]] for lang in LANGUAGES}
STORIES = read_sections("stories")
NAMES = read_words("names")
UNKNOWN = read_words("unknown")

HEROES = ANIMALS + PEOPLE  # of stories
NOUNS = [noun for table in KINDS for noun in TABLES[table]]
TRANSLATED = NOUNS + read_table("words")
FAVOURITE_KINDS = [kind for kind in KINDS.values() if kind.favourite == "yes"]
FAVOURITES = [noun for kind in FAVOURITE_KINDS for noun in TABLES[kind.of_table]]
PETS = [find(name, ANIMALS) for name in NAMES["pets en"]]

# -------------------------------------------------------------------------------------------- words and names


def words_of(text):
    """The English words of a text, in lower case."""
    return set(re.findall("[a-z]+", text.lower()))


def cell(row, column, lang):
    """A column in one language: cell(place, "where", "en") is place.where_en, "on the farm"."""
    return getattr(row, f"{column}_{lang}")


def name_of(noun, lang, form="name"):
    """fox or 狐狸. English has two more forms: "phrase" (a fox) and "known" (the fox)."""
    return cell(noun, form if lang == "en" else "name", lang)


def several_of(row):
    """foxes; for a thing that has no plural in its table, its name."""
    return row.plural_en if "plural_en" in row._fields else row.name_en


def named_in(text, rows):
    """The rows that a text names: in English by a whole word, in Chinese by the characters anywhere."""
    words = words_of(text)
    return [row for row in rows if row.name_en.lower() in words or row.name_zh in text]


def meetings(text):
    """Every (hero, place), by their English names, that a text names together."""
    places = named_in(text, PLACES)
    heroes = named_in(text, HEROES) if places else []
    return {(hero.name_en, place.name_en) for hero in heroes for place in places}


# ---------------------------------------------------------------------------------- sentences, facts, stories


def capital(text):
    return text[:1].upper() + text[1:]


class Slots(dict):
    """The slots of a template. {Hero} is the slot "hero" with a capital letter."""

    def __missing__(self, slot):
        if slot == slot.lower():
            raise DataError(f"dataset/world: a text uses the slot {{{slot}}}; it may use {', '.join(self)}")
        return capital(self[slot.lower()])


def fill(template, **slots):
    """The template with its slots filled in."""
    try:
        return template.format_map(Slots(slots))
    except DataError:
        raise
    except (ValueError, IndexError) as error:  # such as a brace that is not closed
        raise DataError(f"dataset/world: {template!r} can't be filled in: {error}") from None


def say(family, kind, lang, /, **slots):
    """A sentence of sentences.csv: say("counting", "items", "en", count=3) is "There are 3." """
    if (family, kind, lang) not in SENTENCES:
        raise DataError(f"dataset/world/sentences.csv has no row of family {family!r} and kind {kind!r}")
    return fill(SENTENCES[family, kind, lang], **slots)


def say_how_often(word, items, lang):
    """Fox appears 2 times."""
    count = items.count(word)
    return say("counting", "once" if count == 1 else "times", lang, word=word, count=count)


def say_kind(noun, lang):
    """A fox is an animal."""
    kind = cell(KINDS[noun.table], "phrase", lang)
    return say("categories", "kind", lang, noun=name_of(noun, lang, "phrase"), kind=kind)


def say_translation(noun, lang, direction):
    """Fox is 狐狸 in Chinese."""
    return say("translation", direction, lang, name_en=noun.name_en, name_zh=noun.name_zh)


class Fact(NamedTuple):
    """One fact in one language."""

    family: str  # animals
    kind: str  # sound
    lang: str  # en
    entity: str  # fox: the English name of what the fact is about, in both languages
    asked: str  # a fox: how a question names what it asks about
    several: str  # foxes
    value: str  # yip: what the statement says of it; "" if nobody asks the other way round
    statement: str  # A fox says yip.


def make_facts():
    """Every template of facts.csv, filled in with every row of the table that it belongs to."""
    facts = []
    for table, rows in TABLES.items():
        templates = [template for template in FACT_TEMPLATES if template.of_table == table]
        for i, row in enumerate(rows):
            # The seasons need the rows before and after them. The year is a circle: spring follows winter.
            slots = row._asdict() | {"previous": rows[i - 1], "next": rows[(i + 1) % len(rows)]}
            for template in templates:
                for lang in LANGUAGES:
                    entity = fill(template.entity, **slots)
                    asked, value, statement = (fill(cell(template, column, lang), **slots)
                                               for column in ("asked", "value", "statement"))
                    several = several_of(row) if lang == "en" else asked
                    facts.append(Fact(template.family, template.kind, lang, entity, asked, several, value,
                                      statement))
    return facts


def facts_by_value():
    """{(family, kind, language): {value: the facts that state it}}, for questions that are turned round."""
    found = {}
    for fact in FACTS:
        if fact.value:
            found.setdefault((fact.family, fact.kind, fact.lang), {}).setdefault(fact.value, []).append(fact)
    return found


FACTS = make_facts()
VALUES = facts_by_value()
ENTITIES = list(dict.fromkeys(fact.entity for fact in FACTS))
FACTS_ABOUT = {(entity, lang): [fact for fact in FACTS if fact.entity == entity and fact.lang == lang]
               for entity in ENTITIES for lang in LANGUAGES}


def either_way(rng, pair):
    """The pair, or the pair turned around."""
    return pair if rng.random() < 0.5 else pair[::-1]


def tell_story(rng, hero, place, lang):
    """["One summer morning, the fox went for a walk by the river.", "Under a stone it found a ...", ...]"""
    friend = rng.choice([other for other in HEROES if other is not hero])
    food, season = rng.choice(FOODS), rng.choice(SEASONS)
    happening, outcome = rng.choice(STORIES[f"plots {lang}"]).split(" | ")
    opening, ending = rng.choice(STORIES[f"openings {lang}"]), rng.choice(STORIES[f"endings {lang}"])
    slots = {"hero": name_of(hero, lang, "known"), "he": hero.pronoun_en, "his": hero.possessive_en,
             "friend": name_of(friend, lang, "known"), "season": name_of(season, lang),
             "food": name_of(food, lang, "phrase"), "place": name_of(place, lang),
             "where": cell(place, "where", lang)}
    return [fill(part, **slots) for part in (opening, happening, outcome, ending)]


def ordinary_text():
    """All that the world's texts say apart from names and unknown things, in lower case."""
    rows = [*FACTS, *NOUNS, *CLINIC, *OPPOSITES["en"], *OPPOSITES["zh"], BELOW_TWENTY, TENS,
            list(ANSWERS.values())]
    for sections in (QUESTIONS, PHRASES, STORIES):
        rows += [sections, *sections.values()]  # `sections` are the names of the sections
    return "\n".join(text for row in rows for text in row if isinstance(text, str)).lower()


# ---------------------------------------------------------------------------------------------------- numbers

BELOW_TWENTY = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
                "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "- ten twenty thirty forty fifty sixty seventy eighty ninety".split()
DIGITS_ZH = "零一二三四五六七八九"


def in_words(number, lang):
    """0 to 99: forty-seven, 四十七."""
    tens, ones = divmod(number, 10)
    if lang == "zh":
        if tens == 0:
            return DIGITS_ZH[ones]
        before = "十" if tens == 1 else DIGITS_ZH[tens] + "十"
        return before if ones == 0 else before + DIGITS_ZH[ones]
    if number < 20:
        return BELOW_TWENTY[number]
    return TENS[tens] if ones == 0 else f"{TENS[tens]}-{BELOW_TWENTY[ones]}"


NUMBERS_EN = {in_words(number, "en") for number in range(100)}


def with_commas(numbers):
    return ", ".join(map(str, numbers))


def tens_and_ones(a, sign, b):
    """Tens and ones apart, as people calculate in the head: 47 + 38 -> (70, 15), 92 - 57 -> (40, -5)."""
    factor = 1 if sign == "+" else -1
    return a // 10 * 10 + factor * (b // 10 * 10), a % 10 + factor * (b % 10)


def worked(a, sign, b):
    """47 + 38 = 70 + 15 = 85; 92 - 57 = 40 - 5 = 35. Numbers below ten need no step between: 3 + 9 = 12."""
    tens, ones = tens_and_ones(a, sign, b)
    if a < 10 and b < 10:
        return f"{a} {sign} {b} = {ones}"
    return f"{a} {sign} {b} = {tens} {'-' if ones < 0 else '+'} {abs(ones)} = {tens + ones}"


def pairs_in_between(a, b):
    """The pairs (larger, smaller) that the worked sum and difference of a and b calculate with in between."""
    if a < 10 and b < 10:
        return []
    steps = [tens_and_ones(a, "+", b), tens_and_ones(a, "-", b)]
    return [(max(tens, abs(ones)), min(tens, abs(ones))) for tens, ones in steps]


# ------------------------------------------------------------------------------------------------- wordings


def expand(pattern):
    """Every combination of the alternatives: "a (b|c)" -> ["a b", "a c"]."""
    texts = [""]
    for i, part in enumerate(re.split(r"\(([^()]*\|[^()]*)\)", pattern)):
        choices = part.split("|") if i % 2 else [part]  # re.split puts what stood in brackets at odd places
        texts = [text + choice for text in texts for choice in choices]
    return texts


def short_forms(lang):
    """(a pattern that finds the short forms of phrases.txt, {short form: the words that it stands for})."""
    spelled_out = {form.lower(): forms[0].lower() for forms in SHORTENED[lang] for form in forms}
    longest_first = sorted(spelled_out, key=len, reverse=True)
    edge = r"\b" if lang == "en" else ""  # Chinese has no spaces between words
    return re.compile(edge + "(" + "|".join(map(re.escape, longest_first)) + ")" + edge), spelled_out


SHORT_FORMS = {lang: short_forms(lang) for lang in LANGUAGES}
NAMED_EN = {word.lower() for row in NOUNS + PEOPLE for word in (row.name_en, several_of(row))}
NAMED_EN |= NUMBERS_EN | {word for pair in OPPOSITES["en"] for word in pair} | {row.job_en for row in PEOPLE}
NAMED_ZH = {row.name_zh for row in NOUNS + PEOPLE if len(row.name_zh) > 1} | {row.job_zh for row in PEOPLE}
# The part before the bracket makes the search fast: it asks for the first character of a name.
NAMED_ZH = re.compile(f"(?=[{''.join({name[0] for name in NAMED_ZH})}])({'|'.join(sorted(NAMED_ZH))})")


@cache
def bare(wording):
    """A wording without its marks, capital letters, short forms and "please", and with @ for what it names.

    "Repeat {word}.", "repeat {word}" and "please repeat {word}" are one wording, so that what is new in the
    test stays new when somebody is in a hurry. "Draw the {x}", "draw {name}" and "draw a cat" are one, too.
    """
    pattern, spelled_out = SHORT_FORMS[language_of(wording)]
    text = wording.lower()
    for _ in range(2):  # wut's, what's, what is
        text = pattern.sub(lambda form: spelled_out[form[0]], text)
    text = re.sub(r"\{(x|name|xs)\}", "@", text.replace("{large}", "{big}"))
    text = re.sub("[a-z-]+", lambda word: "@" if word[0] in NAMED_EN else word[0], text)
    text = re.sub(r"\b(a|an|the) @", "@", NAMED_ZH.sub("@", text))
    text = re.sub(r"\bplease\b|[请?!.,:？！。，：“”]", "", text)
    return "".join(text.split()) or wording


def read_wordings(questions):
    """{(family, kind, lang): [all wordings of the first line, all wordings of the second line, ...]}.

    A line is (its wordings, whether some may be held out for the test). None may of a line with one bracket:
    each alternative stands in one of its wordings alone, and nothing else would tell what it means.
    """
    wordings = {}
    for section, lines in questions.items():
        for line in lines:
            lang = language_of(line)
            texts = expand(line.removeprefix("~ "))
            can_hold_out = line.count("(") > 1 or line.startswith("~ ")
            if line.startswith("~ "):
                carriers = PHRASES[f"carriers {lang}"]
                texts = [carrier.replace("{clause}", text) for text in texts for carrier in carriers]
            for name in section.split():
                wordings.setdefault((*name.split("."), lang), []).append((texts, can_hold_out))
    for family, kind, _ in list(wordings):
        for lang in LANGUAGES:
            lines = wordings.get((family, kind, lang), [])
            has_enough = any(can_hold_out and len(texts) >= 4 for texts, can_hold_out in lines)
            if not has_enough and f"{family}.{kind}" not in TALK:
                raise DataError(f"dataset/world/wordings.txt: [{family}.{kind}] needs a line with two "
                                f"brackets and four wordings in the language {lang!r}: some are for the test")
    return wordings
