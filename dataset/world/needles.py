"""Needles: a fact in the middle of a text, and a question for it at the end. A reader may skip this file.

    A cow eats grass. The code of Ruth is 4821. The opposite of loud is quiet. ...
    What is the code of Ruth?                                                        The code of Ruth is 4821.

The hay around the needle is made of the sentences of pretraining (dataset/world/texts.py). Nobody can guess a
code: it is drawn anew for each text. So an answer is right only if the model has found the needle. `world` is
a World of dataset/synthetic.py; it says which names are for training and which are for the test.
"""

from typing import NamedTuple

from dataset.world.texts import TEXTS

TRIES = 8  # sentences that may not fit any more, until a text is full
FACT, QUESTION, BEGUN = "The code of {} is {}.", "What is the code of {}?", "The code of {} is"


class Needle(NamedTuple):
    """The text with the needle in it, the question, the fact itself, how a base model begins it, the code."""

    text: str
    question: str
    fact: str
    begun: str
    code: str


def hay(world, length_of):
    """Endless sentences in English: (sentence, its length with the space before it)."""
    generators, counts = zip(*TEXTS, strict=True)
    while True:
        sentences = world.rng.choices(generators, counts)[0](world, "en")
        if not world.leaks(" ".join(sentences)):
            yield from ((sentence, length_of(" " + sentence)) for sentence in sentences)


def make_needle(world, sentences, room: int, depth: float, length_of, for_test=False) -> Needle:
    """A text with at most `room` tokens or so, question included.

    sentences: as `hay` gives them. depth: where the needle lies, 0 at the beginning and 1 at the end of the
    text. length_of(text): its number of tokens.
    """
    rng = world.rng
    name, code = rng.choice(world.names["en"].part(for_test)), f"{rng.randrange(10_000):04}"
    fact, question = FACT.format(name, code), QUESTION.format(name)
    left, chosen, too_long = room - length_of(f"{fact}\n{question}"), [], 0
    while too_long < TRIES:
        sentence, length = next(sentences)
        if length > left:
            too_long += 1
            continue
        chosen.append(sentence)
        left -= length
    chosen.insert(round(depth * len(chosen)), fact)
    return Needle(" ".join(chosen), question, fact, BEGUN.format(name), code)


def make_chats(world, count: int, shortest: int, longest: int, length_of) -> list[dict]:
    """Chats to train on, whose prompts have from `shortest` to `longest` tokens; the needle lies anywhere."""
    sentences, records = hay(world, length_of), []
    for _ in range(count):
        room = world.rng.randint(shortest, longest)
        depth = min(1.0, max(0.0, 1.2 * world.rng.random() - 0.1))  # one in twelve at either end of the text
        needle = make_needle(world, sentences, room, depth, length_of)
        records.append({"conversations": [
            {"role": "user", "content": f"{needle.text}\n{needle.question}"},
            {"role": "assistant", "content": needle.fact}], "family": "needle"})
    return records
