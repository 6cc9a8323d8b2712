"""When an answer is right, for each kind of record that scoring lists."""

import pytest

from common.errors import DataError
from dataset.answers import AnswerTest, answer_test, final_number


def test_sums_compare_the_final_number():
    test = answer_test({"question": "?", "answer": "so 2 + 1,232\n#### 1,234"})
    answers = {"#### 1234": True, "it is 1,234.00 dollars": True, "1234 and 7": False, "": False}
    for answer, right in answers.items():
        assert test.is_right(answer) is right, answer
    assert test.reference == "so 2 + 1,232\n#### 1,234"


@pytest.mark.parametrize(("text", "number"), [
    ("... #### 1,234", "1234"), ("12 and -3.50", "-3.5"), ("12 #### none", None), ("no digits", None),
    ("", None),
])
def test_final_number(text, number):
    assert final_number(text) == number


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


def test_where_nothing_says_what_is_right_nobody_can_say():
    for test in (AnswerTest(), answer_test({"prompt": "?"}), answer_test({"tools": []}, last_turn="")):
        assert test.is_right("x") is None and test.is_right("") is None


@pytest.mark.parametrize("name", ["contains", "answers", "choices"])
@pytest.mark.parametrize("value", [[5], ["a", ""], [["a"]]])
def test_what_an_answer_is_compared_with_must_be_texts(name, value):
    with pytest.raises(DataError, match=f"'{name}' must be a list of texts"):
        answer_test({name: value}, last_turn="b")


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
        answer_test(record, last_turn="b")
