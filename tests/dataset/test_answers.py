"""When an answer is right, for each kind of record that scoring lists."""

import json
import time
from pathlib import Path

import pytest

from common.errors import DataError
from dataset.answers import AnswerTest, answer_test, final_number


def test_sums_compare_the_final_number():
    test = answer_test({"question": "?", "answer": "so 2 + 1,232\n#### 1,234"})
    answers = {"#### 1234": True, "it is 1,234.00 dollars": True, "1234 and 7": False, "": False}
    for answer, right in answers.items():
        assert test.is_right(answer) is right, answer
    assert test.reference == "so 2 + 1,232\n#### 1,234"


SPELLINGS = [
    # The mark of GSM8K and LaTeX's box say where the answer is; else the last number is the answer.
    ("2 + 1,232\n#### 1,234", "1234"), ("12 #### none", None), ("\\boxed{42}, in 3 steps", "42"),
    ("\\boxed{\\frac{3}{4}}", "0.75"), ("= 42", "42"), ("12 and -3.50", "-3.5"), ("1234 and 7", "7"),
    ("The answer is 42 (forty-two)", "42"),
    # A remark in brackets is not the answer, unless no other number is there.
    ("42 (not 41)", "42"), ("($5)", "5"),
    # What stands around a number: punctuation, markup, currencies, units, counters.
    ("42.", "42"), ("**42**", "42"), ("__42__", "42"), ("$42$", "42"), ("42 apples", "42"), ("12km", "12"),
    ("$1,234.50", "1234.5"), ("¥12", "12"), ("USD5", "5"), ("第3", "3"), ("5th", "5"), ("5%", "5"),
    # Groups of three digits: as in English and Chinese, a comma before three digits is no decimal comma.
    ("1,234", "1234"), ("1,23,456", "123456"), ("1 234", "1234"), ("1\u2009234\u202f567", "1234567"),
    ("1'234", "1234"), ("1{,}234", "1234"),
    # A comma that cannot group is a decimal comma; several commas separate a list.
    ("1.234.567", "1234567"), ("1.234.567,5", "1234567.5"), ("0.1.2", "2"),
    ("1.234,50", "1234.5"), ("1 234,5", "1234.5"), ("3,5", "3.5"), ("0,125", "0.125"), ("1,2,3", "3"),
    (".5", "0.5"), ("5.0", "5"), ("3.14.", "3.14"), ("No.5", "5"),
    # A minus is a sign where no number and no word stands before it, and an operation or a range elsewhere.
    ("-5", "-5"), ("−5", "-5"), ("–5", "-5"), ("-$5", "-5"), ("$-5", "-5"), ("x=-5", "-5"), ("负5", "-5"),
    ("10-3", "3"), ("10 - 3", "3"), ("10 -3", "3"), ("10-3=7", "7"), ("3-5", "5"), ("3–5", "5"),
    ("GPT-4", "4"), ("2026-11-27", "27"), ("-0", "0"),
    # Fractions have their value; a date is none, and nothing is divided by 0.
    ("3/4", "0.75"), ("½", "0.5"), ("1½", "1.5"), ("1 3/4", "1.75"), ("-½", "-0.5"), ("3/4/2025", "2025"),
    ("1/0", "0"),
    # Powers have their value; the exponent of a unit and the digit of a name are no numbers.
    ("1e3", "1000"), ("3.5e-2", "0.035"), ("3 × 10^8", "300000000"), ("3\\times 10^{8}", "300000000"),
    ("2^10 = 1024", "1024"), ("2^10", "1024"), ("5 m^2", "5"), ("5 m²", "5"), ("12 g of CO2", "12"),
    ("x_1 is 9, as is x_2", "9"), ("1e999", "inf"), ("9^999999", "inf"), ("1e" + "9" * 5000, "inf"),
    # Times and ratios are compared as they are written; a full hour is its number.
    ("9:30", "9:30"), ("09:30", "9:30"), ("9:00", "9"),
    # Words of size belong to the number.
    ("5 million", "5000000"), ("12万", "120000"), ("1.5亿元", "150000000"),
    # Full-width digits; Chinese numerals where there are no digits. English words are not read.
    ("３４", "34"), ("１２．５", "12.5"), ("四十二", "42"), ("答案是一百零五。", "105"),
    ("一亿二千万", "120000000"),
    ("二〇二六年", "2026"), ("负五", "-5"), ("四十二个在一起", "42"), ("7个一组", "7"),
    ("two hundred", None), ("no digits", None), ("", None),
    # The first line that holds the mark and a number alone; an empty mark or box says nothing.
    ("so 18\n#### 18\n\nQuestion: 3 + 4?\nAnswer: 7\n#### 7", "18"),
    ("#### Step 1: 3 + 4\n#### Sum\n7", "7"),
    ("18 ####", "18"), ("#### 18\n####", "18"), ("\\boxed{18}, \\boxed{}", "18"),
    ("\\boxed{$9{,}500}", "9500"), ("The total is 72, altogether, of 9.", "9"), ("\\boxed{8,000}", "8000"),
    # LaTeX's short fractions, mixed numbers, and a thousand as one letter
    ("\\frac12", "0.5"), ("-\\dfrac34", "-0.75"), ("3\\frac{1}{2}", "3.5"), ("3 \\tfrac12", "3.5"),
    ("12 ½", "12.5"), ("line 5\n\\frac{1}{2}", "0.5"), ("$50k", "50000"), ("1.5K.", "1500"), ("5km", "5"),
    ("12 kg", "12"), ("5k/h", "5"),
    ("12345678901", "12345678901"),  # two large numbers that differ stay different
]


@pytest.mark.parametrize(("text", "number"), SPELLINGS)
def test_final_number(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize("part", ["1,", "(", "1 ", "-", "1/", "\\boxed{", "一", "9", "{,}", "1.111", ".111",
                                  ",11", " 111", "#### 9", "#", "\\frac"])  # fmt: skip
def test_a_long_answer_is_read_in_no_time(part):
    began = time.thread_time()  # on a busy machine other programs' time must not count
    for text in (part * 20_000, part * 20_000 + "1"):
        final_number(text)
    assert time.thread_time() - began < 5  # 0.05 s; a pattern that goes back again and again takes minutes


def test_every_reference_of_gsm8k_is_read():
    """In this file a reference is "#### " and digits with commas: float reads it without the commas."""
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "eval" / "gsm8k_test.jsonl"
    if not path.is_file():
        pytest.skip("no copy of GSM8K's test file beside the repository")
    answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 1319
    for answer in answers:
        assert float(final_number(answer)) == float(answer.split("#### ")[1].replace(",", ""))


def test_a_conversation_is_answered_word_for_word():
    test = answer_test({}, last_turn="It is 12.")
    assert test.is_right(" It is 12.\n") and not test.is_right("12") and not test.is_right("")
    several = answer_test({"answers": ["12", "twelve "]}, last_turn="It is 12.")
    assert several.is_right("12") and several.is_right("twelve") and not several.is_right("It is 12.")
    assert several.reference == "It is 12."


def test_an_answer_that_must_hold_texts_holds_all_of_them():
    test = answer_test({"contains": ["fox", "river"], "answers": ["x"]}, last_turn="x")
    assert test.is_right("a river and a fox") and not test.is_right("a fox") and not test.is_right("x")


def test_a_choice_is_known_by_its_index_and_its_text():
    test = answer_test({"question": "?", "choices": ["yes", "no"], "answer": 1})
    assert test.choices == ("yes", "no") and test.right_choice == 1
    assert test.is_right("no") and not test.is_right("yes") and test.reference == "no"


def test_tool_calls_are_compared_as_values_and_in_order():
    one, other = {"name": "a", "arguments": {"n": 1, "of": ["x", None]}}, {"name": "b", "arguments": {}}
    test = answer_test({}, last_turn="", calls=[one, other])
    assert test.is_right("", [{"arguments": {"of": ["x", None], "n": 1.0}, "name": "a"}, other])
    for calls in ([], [one], [other, one], [one, other, other], [one, {"name": "b", "arguments": {"n": 1}}],
                  [{"name": "a", "arguments": {"n": True, "of": ["x", None]}}, other],
                  [{"name": "a", "arguments": {"n": "1", "of": ["x", None]}}, other]):
        assert test.is_right("", calls) is False
    assert test.is_right("words", [one, other]) is False
    assert answer_test({}, last_turn="Hi").is_right("Hi", [one]) is False
    assert answer_test({"answers": ["Hi"]}, last_turn="Hi").is_right("Hi", [one])  # only words are asked for


def test_where_nothing_says_what_is_right_nobody_can_say():
    for test in (AnswerTest(), answer_test({"prompt": "?"}), answer_test({"tools": []}, last_turn="")):
        assert test.is_right("x") is None and test.is_right("") is None


@pytest.mark.parametrize("name", ["contains", "answers", "choices"])
@pytest.mark.parametrize("value", [[5], ["a", ""], [["a"]]])
def test_what_an_answer_is_compared_with_must_be_texts(name, value):
    with pytest.raises(DataError, match=f"'{name}' must be a list of texts"):
        answer_test({name: value}, last_turn=None if name == "choices" else "b")


@pytest.mark.parametrize(("record", "words"), [
    ({"choices": "x", "answer": 0}, "'choices' must be a list, not 'x'"),
    ({"choices": ["x"], "answer": True}, "'answer' must be a int, not 'True'"),
    ({"choices": ["x"], "answer": 1}, "answer 1 is no index of 1 choices"),
    ({"choices": ["x"], "answer": -1}, "answer -1 is no index"),
    ({"question": "?"}, "'answer' must be a str, not 'None'"),
    ({"question": "?", "answer": "none"}, "the answer holds no number"),
    ({"contains": "x"}, "'contains' must be a list, not 'x'"),
])
def test_an_unusable_value_is_named(record, words):
    with pytest.raises(DataError, match=words):
        answer_test(record, last_turn="b" if "contains" in record else None)
