"""When an answer is right. All code that has to know asks here.
A reader may skip this file.

    test = answer_test({"question": "What is 2 + 3?", "answer": "2 + 3 = 5\\n#### 5"})
    test.is_right("The answer is 5.")  # True
"""

import re
from dataclasses import dataclass

from common.errors import DataError


@dataclass(frozen=True)
class AnswerTest:
    """What a right answer looks like. Of number, contains and answers, the first that is there decides."""

    reference: str | None = None  # a right answer, for people to compare with
    number: str | None = None  # the final number of a right answer, as final_number writes it
    contains: tuple[str, ...] = ()  # a right answer holds all of these texts
    answers: tuple[str, ...] = ()  # a right answer is one of these texts
    choices: tuple[str, ...] = ()  # a multiple choice, of which `answers` holds the right one
    right_choice: int | None = None  # the index of the right one in `choices`

    def is_right(self, answer: str) -> bool | None:
        """None where the record does not say what is right."""
        if self.number is not None:
            return final_number(answer) == self.number
        if self.contains:
            return all(part in answer for part in self.contains)
        if self.answers:
            return answer.strip() in [right.strip() for right in self.answers]
        return None


def final_number(text: str) -> str | None:
    """'... #### 1,234' -> '1234'. Without #### the last number of the text counts; without a number: None."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.split("####")[-1])
    return f"{float(numbers[-1].replace(',', '')):.10g}" if numbers else None


def answer_test(record: dict, last_turn: str | None = None) -> AnswerTest:
    """The test that the keys of a record ask for; inference/scoring.py lists these keys.

    last_turn: what the assistant says at the end, if the record is a conversation.
    Raises DataError, with the reason alone, for a key with an unusable value.
    """
    if "choices" in record:
        choices, index = tuple(required(record, "choices", list)), required(record, "answer", int)
        if not 0 <= index < len(choices):
            raise DataError(f"answer {index} is no index of {len(choices)} choices")
        return AnswerTest(choices[index], answers=(choices[index],), choices=choices, right_choice=index)
    if "question" in record:
        reference = required(record, "answer", str)
        number = final_number(reference)
        if number is None:
            raise DataError("the answer holds no number to compare with")
        return AnswerTest(reference, number=number)
    contains = tuple(required(record, "contains", list)) if "contains" in record else ()
    answers = tuple(required(record, "answers", list)) if "answers" in record else ()
    if last_turn and not contains and not answers:
        answers = (last_turn,)
    return AnswerTest(last_turn, contains=contains, answers=answers)


def required(record: dict, key: str, kind: type):
    """The value of a key. Raises DataError if it is of another kind, or a list of other things than texts."""
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):  # Python counts True as an int
        raise DataError(f"{key!r} must be a {kind.__name__}, not {str(value)[:40]!r}")
    if kind is list and not all(isinstance(text, str) and text for text in value):
        raise DataError(f"{key!r} must be a list of texts, not {str(value)[:40]!r}")
    return value
