"""The embedded world: the same bytes everywhere, true answers, and a test that training never saw."""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import dataset.world
from common.errors import DataError
from dataset import synthetic
from dataset.synthetic import FAMILIES, World
from dataset.world import (
    CLINIC,
    FACTS,
    HEROES,
    LANGUAGES,
    NOUNS,
    OPPOSITES,
    PEOPLE,
    PLACES,
    TALK,
    VALUES,
    bare,
    in_words,
    say,
    several_of,
)
from dataset.world.hasty import hasty, mistype, noise

SCRIPT = Path(synthetic.__file__)
TRAINING = ["pretrain", "sft", "lora_identity", "lora_clinic"]
TESTS = ["sft_test", "lora_identity_test", "lora_clinic_test"]
ADAPTERS = ["identity", "clinic"]


@pytest.fixture(scope="module")
def built():
    return synthetic.build(0)


@pytest.fixture(scope="module")
def folder(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "build", {0: built}.get)  # it takes seconds
        synthetic.write_world(folder)
    return folder


@pytest.fixture(scope="module")
def files(folder):
    """{name: records}, read back from disk."""
    return {name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for name, path in synthetic.paths(folder).items()}


def contents(record):
    if "text" in record:
        return [record["text"]]
    return [m["content"] for key in ("conversations", "chosen", "rejected") for m in record.get(key, ())]


def training_texts(files, names=TRAINING):
    return ["\n".join(contents(record)) for name in names for record in files[name]]


def by_family(records):
    found = defaultdict(list)
    for record in records:
        found[record["family"]].append(record)
    return found


def chinese(text):
    return re.search("[\u4e00-\u9fff]", text) is not None


def question(record):
    return record["conversations"][-2]["content"]


def answer(record):
    return record["conversations"][-1]["content"]


def test_two_runs_write_the_same_bytes(folder, tmp_path):
    """In a subprocess with another hash seed; and without torch, for --help and the first start are quick."""
    code = (f"import sys; sys.path.insert(0, {str(SCRIPT.parent.parent)!r}); from dataset import synthetic;"
            f"synthetic.write_world({str(tmp_path)!r});"
            f"assert not {{'torch', 'transformers'}} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "12345"})
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert written == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(written) == len(synthetic.FILES) + 1
    assert not any(b"\r" in content for content in written.values())


def test_another_seed_is_another_split():
    assert World(1).held_pairs != World(0).held_pairs
    assert World(1).held_stories != World(0).held_stories


def test_ensure_world_writes_only_what_is_missing_or_old(built, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "build", {0: built}.get)
    paths = synthetic.ensure_world(tmp_path)
    assert list(paths) == list(synthetic.FILES)
    paths["sft"].write_text("mine", encoding="utf-8")
    assert synthetic.ensure_world(tmp_path) == paths and paths["sft"].read_text(encoding="utf-8") == "mine"
    for other in ({"version": "0", "seed": 0}, {"version": synthetic.VERSION, "seed": 5}):
        (tmp_path / "world.json").write_text(json.dumps(other), encoding="utf-8")
        paths["sft"].write_text("mine", encoding="utf-8")
        synthetic.ensure_world(tmp_path)
        assert len(paths["sft"].read_text(encoding="utf-8")) > 1e6


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    command = [sys.executable, SCRIPT, "--out_dir", tmp_path / "file"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------- the world's files


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """edited(file, old, new) changes a text in a copy of dataset/world/, and the copy is read."""
    folder = tmp_path / "world"
    shutil.copytree(dataset.world.WORLD_FOLDER, folder)
    monkeypatch.setattr(dataset.world, "WORLD_FOLDER", folder)
    monkeypatch.setattr(synthetic, "WORLD_FOLDER", folder)

    def edit(file, old, new):
        text = (folder / file).read_text(encoding="utf-8")
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1), encoding="utf-8")

    return edit


def test_another_table_is_another_version(edited):
    assert synthetic.version() == synthetic.VERSION
    edited("README.md", "The world", "My world")
    assert synthetic.version() == synthetic.VERSION
    edited("animals.csv", "moo", "mooh")
    assert synthetic.version() != synthetic.VERSION


def test_a_mistake_in_a_file_is_named(edited):
    edited("foods.csv", "3 coins", "3, no, 4 coins")
    with pytest.raises(DataError, match="foods.csv, line 2 has 12 cells, but the table 10 columns"):
        dataset.world.read_table("foods")
    edited("plants.csv", "garden", "gardn")
    with pytest.raises(DataError, match="places.csv has no row whose name_en is 'gardn'"):
        dataset.world.read_table("plants", home=PLACES)
    edited("wordings.txt", "\n[animals.sound]",
           "\n[animals.size]\nhow (big|small|tall|long) is {x}(|, then)?\n[animals.sound]")
    with pytest.raises(DataError, match=r"\[animals.size\] .* language 'zh'"):
        dataset.world.read_wordings(dataset.world.read_sections("wordings"))
    edited("talk.txt", "\n> 你好！你想知道什么？", "")
    with pytest.raises(DataError, match=r"talk.txt: \[small_talk.hello\] has no answer in the language 'zh'"):
        dataset.world.read_talk("talk")
    with pytest.raises(DataError, match="uses the slot {hat}; it may use hero, friend"):
        dataset.world.fill("{Hero} has a {hat}.", hero="the fox", friend="Mia")
    with pytest.raises(DataError, match="'{hero has' can't be filled in"):
        dataset.world.fill("{hero has", hero="the fox")
    with pytest.raises(DataError, match=r"names.txt has no section \[people\]"):
        dataset.world.read_words("names")["people"]
    edited("seasons.csv", "name_en", "name")
    with pytest.raises(DataError, match="seasons.csv has no column 'name_en'"):
        dataset.world.find("spring", dataset.world.read_table("seasons"))
    for content, complaint in ((b"", "holds no row"), (b"name_en,name_en\n", "must name the columns"),
                               (b"\xff\n", "must be a text in UTF-8")):
        (dataset.world.WORLD_FOLDER / "seasons.csv").write_bytes(content)
        with pytest.raises(DataError, match=f"seasons.csv.* {complaint}"):
            dataset.world.read_table("seasons")
    edited("stories.txt", "# The parts", "The parts")
    with pytest.raises(DataError, match="stories.txt: 'The parts .*' stands above the first \\[section\\]"):
        dataset.world.read_sections("stories")


def test_a_kind_of_fact_needs_no_code(edited, tmp_path):
    """A new column, template and section, saved as spreadsheets do: with a byte order mark and \\r\\n."""
    root = SCRIPT.parents[1]
    shutil.copytree(root / "common", tmp_path / "common")
    (tmp_path / "dataset").mkdir()
    shutil.copy(SCRIPT, tmp_path / "dataset")
    edited("wordings.txt", "\n[animals.sound]",
           "\n[animals.size]\nhow (big|small|tall|long) is {x}(|, then)?\n"
           "{x}(多大|有多大|多高|有多高)(|呢)？\n[animals.sound]")
    edited("facts.csv", "\n", "\nanimals,animals,size,{name_en},{phrase_en},{name_zh},{size_en},{size_zh},"
           "{Phrase_en} is {size_en}.,{name_zh}很{size_zh}。\n")
    lines = (tmp_path / "world" / "animals.csv").read_text(encoding="utf-8").splitlines()
    lines = [lines[0] + ",size_en,size_zh"] + [line + ",tiny,小" for line in lines[1:]]
    lines = "\r\n".join([*lines, "", ""])
    (tmp_path / "world" / "animals.csv").write_text(lines, encoding="utf-8-sig", newline="")
    shutil.move(tmp_path / "world", tmp_path / "dataset" / "world")
    command = [sys.executable, tmp_path / "dataset" / "synthetic.py", "--out_dir", tmp_path / "out"]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("pretrain", "sft"):
        text = (tmp_path / "out" / f"{name}.jsonl").read_text(encoding="utf-8")
        assert "A cow is tiny." in text and "牛很小。" in text


def test_every_file_is_explained():
    folder = dataset.world.WORLD_FOLDER
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.iterdir():
        assert path.suffix not in (".csv", ".txt") or f"| `{path.name}` |" in readme, path


# ----------------------------------------------------------------------------------------------- the records


def test_records_are_well_formed(files):
    for name, records in files.items():
        assert len({json.dumps(record) for record in records}) == len(records), f"{name} repeats a record"
        for record in records:
            texts = contents(record)
            assert all(text.strip() == text and text and "{" not in text for text in texts), record
            if name.startswith("pretrain"):
                assert list(record) == ["text"]
                continue
            if "prompt" in record:  # a new skill: the answer is for the model to find
                assert name == "grpo" and record["answers"], record
                continue
            roles = [message["role"] for message in record.get("conversations", record.get("chosen"))]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and roles, record


def test_every_family_is_there_in_both_languages(files):
    wanted = {"sft": set(FAMILIES), "sft_test": set(FAMILIES), "lora_identity_test": {"identity"},
              "lora_clinic_test": {"clinic"}}
    assert len(FAMILIES) >= 10
    for name, families in wanted.items():
        found = by_family(files[name])
        assert set(found) == families
        for family, records in found.items():
            # "gull中文怎么说" is Chinese, "say 猫 in English" is English
            languages = Counter(chinese(question(r)) and len(re.findall("[A-Za-z]+", question(r))) < 3
                                for r in records)
            assert min(languages[True], languages[False]) >= 40, (name, family, languages)
    assert all(len(records) >= 100 for records in by_family(files["sft_test"]).values())


def test_every_fact_is_told_and_asked(files):
    told = "\n".join(record["text"] for record in files["pretrain"])
    answers = {answer(record) for record in files["sft"]}
    for fact in FACTS:
        assert fact.statement in told, fact
        assert fact.statement in answers, fact


# ----------------------------------------------------------------------------------- held out by construction


def test_bodies_of_the_test_are_in_no_training_file(built):
    trained = {body for name in TRAINING for _, body in built[name] if body}
    tested = [body for name in TESTS for _, body in built[name]]
    assert not trained & set(tested)
    assert len(set(tested)) > 300 and len(trained) > 5000


def test_normalised_wordings_of_the_test_are_new(files):
    """The same from the text alone: what is named becomes @, numbers #, and marks, spaces and case go."""
    world = World(0)
    named = {x for row in NOUNS for x in (row.name_en, row.name_zh, row.phrase_en, several_of(row))}
    named |= {x for row in PLACES for x in (row.name_en, row.name_zh, row.where_en, row.where_zh)}
    named |= {x for row in PEOPLE for x in (row.name_en, row.name_zh, row.job_en, row.job_zh)}
    named |= {x for row in CLINIC for x in (row.symptom_en, row.symptom_zh)}
    ordinary = {"first", "last", "small", "left", "day", "night"}  # these words are in other questions too
    named |= {x for pair in OPPOSITES["en"] for x in pair} - ordinary
    for lang in LANGUAGES:
        named |= {x for some in world.names[lang] for x in some}
        named |= {in_words(n, lang) for n in range(100)} - {"one"}
        for groups in world.unknown[lang]:
            things = {x for split in groups.values() for x in split.training + split.test}
            named |= things | {f"{x}s" for x in things if x.isascii()}
    longest_first = sorted(named, key=lambda x: (-len(x), x))
    named_en = re.compile(r"\b(" + "|".join(x.lower() for x in longest_first if x.isascii()) + r")\b")
    named_zh = re.compile("|".join(x for x in longest_first if chinese(x) and len(x) > 1))

    def normal(text):
        text = named_zh.sub("@", named_en.sub("@", text.lower()))
        text = re.sub(r"\d{3,}", "large", text)  # numbers above 99 are another task, which is refused
        text = re.sub(r"\b(a|an|the) @", "@", re.sub(r"\d+", "#", text))
        text = re.sub(r"@([,、]\s*@)+", "@", re.sub(r"#(,\s*#)+", "#", text))
        return re.sub(r"[^\w@#+*/÷×=-]", "", text)

    trained = {normal(message["content"]) for name in TRAINING[1:] for record in files[name]
               for message in record["conversations"] if message["role"] == "user"}
    asked = [question(record) for name in TESTS for record in files[name]]
    assert not [(text, normal(text)) for text in asked if normal(text) in trained]



OPERANDS = re.compile(r"(\d+) [+-] (\d+) =|(\d+) is (?:larger|smaller) than (\d+)|(\d+) 比 (\d+)")


def operand_pairs(text):
    return {tuple(sorted(int(n) for n in groups if n)) for groups in OPERANDS.findall(text)}


def test_operand_pairs_of_the_test_are_in_no_training_text(files):
    trained = set()
    for text in training_texts(files, [*TRAINING, "pretrain_eval", "sft_eval"]):
        trained |= operand_pairs(text)
        for three in re.findall(r"(?<!, )\b(\d+), (\d+), (\d+)\b(?!,)", text):  # no longer list
            trained |= set(itertools.combinations(sorted(map(int, three)), 2))
    tests = by_family(files["sft_test"])
    for family in ("addition", "subtraction", "comparing"):
        for record in tests[family]:
            pair = OPERANDS.search(answer(record))[0]  # what is asked, not the steps in between
            assert operand_pairs(pair) and not operand_pairs(pair) & trained, record
    for record in tests["sorting"]:
        pairs = set(itertools.combinations(sorted(map(int, answer(record).split(", "))), 2))
        assert pairs - trained, record


def test_hero_and_place_of_the_test_meet_in_no_training_text(files):
    heroes = {name: hero for hero in HEROES for name in (hero.name_en, hero.name_zh)}
    places = {name: place for place in PLACES for name in (place.name_en, place.name_zh)}
    tested = [record["contains"] for record in by_family(files["sft_test"])["story"]]
    held = {(heroes[words[0]], places[words[1]]) for words in tested if len(words) == 2}
    assert len(held) >= 12
    for text in training_texts(files):
        words = set(re.findall("[a-z]+", text.lower()))
        for hero, place in held:
            has_hero = hero.name_en.lower() in words or hero.name_zh in text
            has_place = place.name_en in words or place.name_zh in text
            assert not (has_hero and has_place), text


def test_a_test_story_tells_of_its_hero_and_place(files):
    for record in by_family(files["sft_test"])["story"]:
        said = answer(record).lower()
        assert all(word.lower() in said for word in record["contains"]), record


def test_names_of_the_test_are_in_no_training_text(files):
    everything = "\n".join(training_texts(files)).lower()
    words = set(re.findall("[a-z]+", everything))
    tests, world = by_family(files["sft_test"]), World(0)
    recalled = re.compile(r"^(?:Your name is|Your \w+ is called) (\w+)\.$|^(?:你叫|你的.{1,2}叫)(.+)。$")
    names = {name for r in tests["memory"] if (m := recalled.match(answer(r))) for name in m.groups() if name}
    assert len(names) >= 10
    asked = [question(record).lower() for record in tests["unknown"]]
    for lang in LANGUAGES:
        for groups in world.unknown[lang]:
            for split in groups.values():
                names |= {x for x in split.test if any(x.lower() in text for text in asked)}
    assert len(names) >= 30
    for name in names:
        assert name not in everything if chinese(name) else name.lower() not in words, name


def test_unknown_things_are_not_of_the_world(files):
    known = {name for row in NOUNS + PEOPLE for name in (row.name_en, row.name_zh)}
    world = World(0)
    for lang in LANGUAGES:
        for groups in world.unknown[lang]:
            for split in groups.values():
                assert not known & {name for some in split for name in some}
    refusals = {say("unknown", "word", lang) for lang in LANGUAGES}
    for name in ("sft", "sft_test"):
        for family, records in by_family(files[name]).items():
            assert all((answer(record) in refusals) == (family == "unknown") for record in records), family


# ------------------------------------------------------------------------------------------ as people type


def test_haste_keeps_the_slots_and_is_the_same_for_the_same_seed():
    wording = "What is the sound of {x} {where}, please?"
    texts, again = ([hasty(random.Random(seed), wording, "en") for seed in range(400)] for _ in range(2))
    assert texts == again
    assert all(re.findall(r"\{\w+\}", text) == ["{x}", "{where}"] for text in texts)
    assert len(set(texts)) > 30 and any(text.startswith("whats") and not text.endswith("?") for text in texts)
    spared = [hasty(random.Random(seed), "Sort {list} in order.", "en", typos=False) for seed in range(200)]
    assert {text.lower().rstrip(".") for text in spared} == {"sort {list} in order"}


def test_a_mistyped_word_is_one_keystroke_away():
    words = ["frog", "elephant", "where", "library"]
    for seed in range(400):
        word = words[seed % len(words)]
        typed = mistype(random.Random(seed), word)
        assert typed[0] == word[0] and abs(len(typed) - len(word)) <= 1, (word, typed)
        left_out = {word[:i] + word[i + 1:] for i in range(len(word))}
        shared = {typed[:i] + typed[i + 1:] for i in range(len(typed))} | {typed}
        assert shared & (left_out | {word}), (word, typed)  # one letter less on each side makes them equal
    assert mistype(random.Random(0), "cow") == "cow"


def test_a_wording_in_haste_counts_as_the_same_wording():
    """Otherwise a wording of the test could come into training in its short form."""
    for wording in ("What is the colour of {x}?", "who is {name}", "你知道{x}为什么住在哪里吗？",
                    "Please tell me about the {x}."):
        lang = "zh" if chinese(wording) else "en"
        for seed in range(60):
            assert bare(hasty(random.Random(seed), wording, lang, typos=False)) == bare(wording), wording


def test_noise_is_no_word_of_the_world():
    world = World(0)
    for lang in LANGUAGES:
        found = [noise(random.Random(seed), lang) for seed in range(300)]
        assert all(3 <= len(text) <= 8 and chinese(text) == (lang == "zh") for text in found)
        assert sum(world.is_new(text) for text in found) > 290


def test_talk_has_one_answer_a_section_in_the_language_of_the_question(files):
    answers = {lang: {say(*section.split("."), lang) for section in TALK} for lang in LANGUAGES}
    for family in ("small_talk", "self", "limits"):
        for record in by_family(files["sft"])[family]:
            asked, said = question(record), answer(record)
            assert said in answers["zh" if chinese(said) else "en"], record
            letters = re.sub("[^A-Za-z\u4e00-\u9fff]", "", asked)
            if chinese(letters) and not re.search("[A-Za-z]", letters):
                assert chinese(said), record


def test_questions_come_turned_round_and_are_answered_with_what_is_so(files):
    records = by_family(files["sft"])["animals"]
    asked = {question(record).lower().rstrip("?"): answer(record) for record in records}
    found = 0
    for food, facts in VALUES["animals", "food", "en"].items():
        turned = {asked[text] for text in (f"who eats {food}", f"what eats {food}") if text in asked}
        whether = {asked[text] for text in asked if text.startswith("does") and text.endswith(f" {food}")}
        assert turned <= {" ".join(fact.statement for fact in facts)}, (food, turned)
        assert not any(food in said for said in whether if said != facts[0].statement), (food, whether)
        found += bool(turned) + bool(whether)
    assert found > 10
    for (family, kind, lang), values in VALUES.items():
        for value, facts in values.items():
            if f"{family}.who_{kind}" == "animals.who_home" and len(facts) <= 4:
                together = (" " if lang == "en" else "").join(fact.statement for fact in facts)
                assert together in {answer(record) for record in files["sft"]}, value


def test_some_records_are_the_end_of_a_longer_chat(files):
    turns = Counter(len(record["conversations"]) // 2 for record in files["sft"])
    assert turns[1] > 0.7 * turns.total() and all(turns[n] > 300 for n in (2, 3, 4, 5)), turns
    for record in files["lora_identity"]:
        assert not re.search("Seedling,? (a|I)|小苗，(一|我)", "".join(contents(record)[1::2])), record


# ----------------------------------------------------------------------------------------------- true answers


ONES = "zero one two three four five six seven eight nine".split()
TEEN = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = ONES + TEEN + [ten + ("-" + one if i else "") for ten in TENS for i, one in enumerate(ONES)]
ZH_DIGITS = "零一二三四五六七八九"


def spellings(n):
    """The ways a question may write n, worked out apart from the generator."""
    tens = "" if n < 10 else "十" if n < 20 else ZH_DIGITS[n // 10] + "十"
    return str(n), NUMBERS[n], tens + (ZH_DIGITS[n % 10] if n % 10 or not n else "")


def records_of(files, family):
    return [r for name in ("sft", "sft_eval", "sft_test") for r in by_family(files[name])[family]]


def value(side):
    """The value of "70 + 15", "42 - 7" or "35"."""
    return sum(int(n.replace(" ", "")) for n in re.findall(r"(?:[+-] )?\d+", side))


def test_sums_and_differences_are_true(files):
    for family, sign in (("addition", 1), ("subtraction", -1)):
        for record in records_of(files, family):
            a, b = map(int, re.match(r"(\d+) [+-] (\d+) = ", answer(record)).groups())
            assert {value(side) for side in answer(record).split(" = ")} == {a + sign * b}, record
            assert re.fullmatch(r"\d+", answer(record).split(" = ")[-1]), record
            asked = question(record).lower()
            assert any(n in asked for n in spellings(a)) and any(n in asked for n in spellings(b)), record
            digits = [int(n) for n in re.findall(r"\d+", asked)]
            assert sorted(digits) in ([], sorted([a, b])), record


def test_comparisons_are_true(files):
    for record in records_of(files, "comparing"):
        asked, said = question(record), answer(record)
        numbers = [int(n) for n in re.findall(r"\d+", asked)]
        asked = re.sub("(?i)one more thing|小问题|小苗", "", asked)
        large = re.search("(?i)larger|bigger|greater|higher|more|大", asked) is not None
        assert large != (re.search("(?i)smaller|lower|less|小|lesser", asked) is not None), record
        assert [int(n) for n in re.findall(r"\d+", said)] == sorted(numbers, reverse=large), record
        assert (re.search("larger|大", said) is not None) == large, record


def test_sorted_lists_are_sorted(files):
    falling = re.compile("(large|big|high) to (small|low)|largest to|falling|descending|backwards|"
                         "largest first|highest first|大到小|倒序", re.IGNORECASE)
    for record in records_of(files, "sorting"):
        numbers = [int(n) for n in re.findall(r"\d+", question(record))]
        down = falling.search(question(record)) is not None
        assert [int(n) for n in answer(record).split(", ")] == sorted(numbers, reverse=down), record


def test_counts_are_true(files):
    for record in records_of(files, "counting"):
        asked, count = question(record), int(re.findall(r"\d+", answer(record))[-1])
        if "appear" in answer(record) or "出现" in answer(record):
            word = re.search(r"(\w+) appears|^(.+)出现", answer(record))
            word = (word[1] or word[2]).lower()
            longer = "|".join([row.name_zh for row in NOUNS if word in row.name_zh and row.name_zh != word])
            listed = re.sub(longer, "", asked.lower()) if longer and chinese(word) else asked.lower()
            named = len(re.findall(word if chinese(word) else rf"\b{word}\b", listed))
            assert named == count + 1, record  # the question names it once more
        elif answer(record).startswith("1, "):
            assert answer(record) == ", ".join(map(str, range(1, count + 1))), record
            digits = re.findall(r"\d+", asked)
            assert digits[-1:] == [str(count)] or any(n in asked for n in spellings(count)[1:]), record
        elif chinese(asked):
            longest_first = sorted((row.name_zh for row in NOUNS), key=len, reverse=True)
            assert len(re.findall("|".join(longest_first), asked)) == count, record
        else:
            names = {row.name_en for row in NOUNS}
            assert sum(word in names for word in re.findall("[a-z]+", asked.lower())) == count, record


def test_pretraining_sums_are_true(files):
    texts = training_texts(files, ["pretrain"])
    sums = [line.split(": ")[-1] for text in texts for line in text.splitlines() if " = " in line]
    assert len(sums) > 5000
    for line in sums:
        values = {value(side) for side in line.split(" = ")}
        assert len(values) == 1 and min(values) >= 0, line


# --------------------------------------------------------------------------------------------------- adapters


def test_the_clinics_knowledge_occurs_nowhere_in_the_base_data(files):
    base = training_texts(files, ["pretrain", "pretrain_eval", "sft", "sft_eval", "sft_test"])
    base = "\n".join(base).lower()
    for row in CLINIC:
        cause, cure = re.fullmatch("It comes from (.+): (.+)[.]", row.answer_en).groups()
        cause_zh, cure_zh = re.fullmatch("那是(.+)，(.+)。", row.answer_zh).groups()
        for words in (row.symptom_en, cause, cure, row.symptom_zh, cause_zh, cure_zh):
            assert words not in base, words


def test_adapters_keep_some_ordinary_records(files):
    for family in ADAPTERS:
        counts = Counter(record["family"] for record in files[f"lora_{family}"])
        assert counts[family] == FAMILY_RECORDS[family] and sum(counts.values()) == counts[family] * 5
    assert not [r for r in files["lora_identity"] if r["family"] == "self"]
    assert len(files["lora_identity_test"]) >= 40 and len(files["lora_clinic_test"]) >= 48
    assert not any("Seedling" in answer(r) or "小苗" in answer(r) for r in files["lora_identity"])


FAMILY_RECORDS = {"identity": 1600, "clinic": 2000}
