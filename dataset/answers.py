"""When an answer is right. All code that has to know asks here.
A reader may skip this file.

    test = answer_test({"question": "What is 2 + 3?", "answer": "2 + 3 = 5\\n#### 5"})
    test.is_right("The answer is 5.")  # True
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import DataError
from dataset.keys import is_empty


@dataclass(frozen=True)
class AnswerTest:
    """What a right answer looks like. Of number, contains and answers, the first that is there decides."""

    reference: str | None = None  # a right answer, for people to compare with
    number: str | None = None  # the final number of a right answer, as final_number writes it
    contains: tuple[str, ...] = ()  # a right answer holds all of these texts
    answers: tuple[str, ...] = ()  # a right answer is one of these texts
    calls: tuple[dict, ...] | None = None  # ... and calls these tools, in this order; None: any or none
    choices: tuple[str, ...] = ()  # a multiple choice, of which `answers` holds the right one
    right_choice: int | None = None  # the index of the right one in `choices`

    @property
    def decides(self) -> bool:
        """Whether the record says what is right."""
        return self.is_right("") is not None

    def is_right(self, answer: str, calls: Sequence[dict] = ()) -> bool | None:
        """calls: the tool calls beside the answer. None where the record does not say what is right."""
        if self.number is not None:
            return final_number(answer) == self.number
        if self.contains:
            return all(part in answer for part in self.contains)
        if self.answers:
            is_called = self.calls is None or same_json(list(self.calls), list(calls))
            return is_called and answer.strip() in [right.strip() for right in self.answers]
        return None


# Full-width signs such as "３", "％" and "－" -> ASCII. The full-width comma stays, because it only separates
# clauses.
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if code != 0xFF0C}
LATEX = ((r"(?<=\d) ?\\[dt]?frac", r" \\frac"), (r"\\[dt]?frac(\d)(\d)", r"\1/\2"),
         (r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2"), (r"\{,\}", ","), (r"\\[,;! ]", "\u2009"))
SCALES = {"k": 1e3, "K": 1e3, "thousand": 1e3, "million": 1e6, "billion": 1e9, "万": 1e4, "亿": 1e8}
CHINESE = re.compile("负?[零〇一二两三四五六七八九十百千万亿]{1,40}")
GAP = "[ \u00a0\u2009\u202f'’]"  # what stands between groups of three digits: spaces, or 1'234
# A number has at most nine groups: otherwise a long list would be read to its end from each number in it.
NUMBER = re.compile(r"""
    (?P<sign> (?<![A-Za-z\d)\]}%]) (?<![\d)\]}%][ ]) [-\u2212\u2013负] (?=[$€£¥￥]?[.\d¼-¾⅐-⅞]) )?
    [$€£¥￥]?
    (?<![A-Za-z\d^]) (?<!\^\{) (?<![A-Za-z]_)                             # no part of CO2, m^2, x_1
    (?: (?P<fraction> (?:\d{1,2}[ ])? \d+/\d+ ) (?![/\d])
      | (?: (?P<digits> [1-9]\d{0,2} (?:,\d{2,3}){0,9},\d{3} (?!\d) (?:\.\d+)?        # 1,234.5
                      | [1-9]\d{0,2} (?:GAP\d{3}){1,9} (?![\d,]) (?:\.\d+)? )         # 1 234.5
          | (?P<dots> [1-9]\d{0,2} (?:\.\d{3}){2,9} (?![.,]?\d) )                         # 1.234.567
          | (?P<comma> (?<!,) (?: [1-9]\d{0,2} (?:(?:\.|GAP)\d{3}){1,9} | \d+ ) ,\d+ ) (?![\d,])  # 1.234,5
          | (?P<plain> \d+ (?:\.\d+)? | (?<![\w.])\.\d+ ) )
        (?: [eE] (?P<e>[-+]?\d+) \b | [ ]?(?:[x×*·]|\\times|\\cdot)[ ]?10\^\{?(?P<ten>[-\u2212]?\d+)
          | \^\{?(?P<power>-?\d+) | :(?P<minutes>\d\d)(?!\d) | [ ]?(?P<half>[¼-¾⅐-⅞]) )?
      | (?P<vulgar>[¼-¾⅐-⅞]) )
    (?: \s? (?P<scale> thousand|million|billion|万|亿 ) | (?P<k>[kK]) (?![\w/]) )?
    """.replace("GAP", GAP), re.VERBOSE)


def final_number(text: str) -> str | None:
    """The number that an answer ends in, written in one way; None where it holds no number.

        after "####" or in \\boxed{} if there is one, else the last; in brackets only where no other is
        1,234.50   1 234.5   1.234,50   1.234.567   $1,234.50   12km   a comma before three digits groups them
        3,5 -> 3.5                                   ... before one, two or four digits it is a decimal comma
        -5   −5   -$5   负5, but 10-3 -> 3           a minus after a number is an operation, or a range
        3/4   ½   1 ½   1 3/4   \\frac34 -> 0.75        but 3/4/2025, a date, ends in 2025
        1e3   3 × 10^8   2^10 -> 1024                a power has its value; m^2, CO2, x_1 hold no number
        5% -> 5   5 million   12万   12k -> 12000     per cent is a unit; these words are part of the number
        9:30 -> 9:30, 9:00 -> 9                      a time or a ratio
        ３４   四十二 -> 42                            Chinese numerals count where there are no digits
    """
    # A model that does not stop asks itself more questions. So the first line with one number alone counts.
    lines = re.findall(r"####[ \t]?(\S{1,30})[ \t]*$", text, re.MULTILINE)
    lines = [line for line in lines if re.search(r"\d", line)]
    text = (lines[:1] or [part for part in text.split("####") if part.strip()] or [""])[-1]
    text = (re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})+)\}", text) or [text])[-1].translate(FULL_WIDTH)
    for pattern, meaning in LATEX:
        text = re.sub(pattern, meaning, text)
    for searched in (re.sub(r"\([^()]*\)", " ", text), text):  # remarks in brackets come second
        if found := list(NUMBER.finditer(searched)):
            return number_text(found[-1])
    if numerals := CHINESE.findall(text):
        # 一 stands in many words, such as 一起. So a numeral of several signs comes before a single sign.
        several_signs = [numeral for numeral in numerals if len(numeral) > 1]
        return f"{float(chinese_number((several_signs or numerals)[-1])):.15g}"
    glued = re.findall(r"\d+(?:\.\d+)?", text)  # USD5
    return f"{float(glued[-1]):.15g}" if glued else None


def number_text(found: re.Match) -> str:
    """What NUMBER found -> its value in the shortest writing, such as "0.75"; a time stays a time."""
    digits = (found["digits"] or found["plain"] or "0").replace(",", "")
    if comma := found["comma"] or found["dots"]:
        digits = comma.replace(".", "").replace(",", ".")
    value = float(re.sub(GAP, "", digits))
    if minutes := found["minutes"]:
        return f"{value:g}" if minutes == "00" else f"{value:g}:{minutes}"
    if found["fraction"]:
        *whole, fraction = found["fraction"].split(" ")
        above, below = map(float, fraction.split("/"))
        is_date = found.string[:found.start()].endswith("/")
        value = below if is_date or not below else above / below + sum(map(float, whole))
    if vulgar := found["half"] or found["vulgar"]:
        value += unicodedata.numeric(vulgar)
    try:
        value *= 10.0 ** int((found["e"] or found["ten"] or "0").replace("\u2212", "-"))
        value = value ** int(found["power"] or 1) * SCALES.get(found["scale"] or found["k"], 1)
    except (OverflowError, ZeroDivisionError, ValueError):  # 1e999, 0^-1, 1e99...9
        value = math.inf
    return f"{(-value if found['sign'] else value) + 0.0:.15g}"  # + 0.0: -0 becomes 0


def chinese_number(numeral: str) -> int:
    """四十二 -> 42, 二〇二六 -> 2026, 一亿二千万 -> 120000000."""
    total = section = digit = 0  # of 三万二千五: 30000, 2000 and 5
    for sign in numeral.replace("两", "二").replace("〇", "零"):
        if sign in "零一二三四五六七八九":
            digit = digit * 10 + "零一二三四五六七八九".index(sign)
        elif sign in "十百千":
            section, digit = section + (digit or 1) * 10 ** ("十百千".index(sign) + 1), 0
        elif sign == "万":
            total, section, digit = total + (section + digit or 1) * 10**4, 0, 0
        elif sign == "亿":
            total, section, digit = (total + section + digit or 1) * 10**8, 0, 0
    return -(total + section + digit) if numeral[0] == "负" else total + section + digit


def same_json(one: object, other: object) -> bool:
    """Whether two JSON values are the same: 1 and 1.0 are, 1 and true are not. Keys have no order."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def answer_test(record: dict, last_turn: str | None = None, calls: Sequence[dict] = ()) -> AnswerTest:
    """The test that the keys of a record ask for; inference/scoring.py lists these keys.

    last_turn, calls: what the assistant says at the end, and calls there, if the record is a conversation.
        The keys of other kinds of records have no meaning then.
    Raises DataError, with the reason alone, for a key with an unusable value.
    """
    if last_turn is None and "choices" in record:
        choices, index = tuple(required(record, "choices", list)), required(record, "answer", int)
        if not 0 <= index < len(choices):
            raise DataError(f"answer {index} is no index of {len(choices)} choices")
        return AnswerTest(choices[index], answers=(choices[index],), choices=choices, right_choice=index)
    if last_turn is None and "question" in record:
        reference = required(record, "answer", str)
        number = final_number(reference)
        if number is None:
            raise DataError("the answer holds no number to compare with")
        return AnswerTest(reference, number=number)
    contains, answers = (() if is_empty(record.get(key)) else tuple(required(record, key, list))
                         for key in ("contains", "answers"))
    if (last_turn or calls) and not contains and not answers:
        return AnswerTest(last_turn, answers=(last_turn,), calls=tuple(calls))
    return AnswerTest(last_turn or None, contains=contains, answers=answers)


def required(record: dict, key: str, kind: type):
    """The value of a key. Raises DataError if it is of another kind, or a list of other things than texts."""
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):  # Python counts True as an int
        raise DataError(f"{key!r} must be a {kind.__name__}, not {str(value)[:40]!r}")
    if kind is list and not all(isinstance(text, str) and text for text in value):
        raise DataError(f"{key!r} must be a list of texts, not {str(value)[:40]!r}")
    return value
