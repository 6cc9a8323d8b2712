"""How people in a hurry type: small letters, no marks, short forms, and now and then a wrong key. Everything
is drawn from the generator of random numbers that the caller gives. A reader may skip this file.

    hasty(rng, "What is the sound of {x}?", "en")   # "whats the sonud of {x}"
"""

import re

from dataset.world import SHORTENED

KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
NOISE_ZH = "的了啊哦嗯呃一是在哈呀吗吧个这那我他来去不啦嘛呢咯哎噢"


def hasty(rng, wording, lang, typos=True):
    """A wording as it is typed in a hurry. Its slots, such as {x}, stay as they are.

    typos: whether one word may be mistyped. A wording that decides the answer by one word has none.
    """
    parts = re.split(r"(\{\w+\})", wording)  # words stand at even places, slots at odd ones
    small_letters, shorten = rng.random() < 0.85, rng.random() < 0.6
    for i in range(0, len(parts), 2):
        if lang == "en" and shorten:
            parts[i] = parts[i].replace("'", "")
        if small_letters:
            parts[i] = parts[i].lower()
        if shorten:
            parts[i] = shortened(rng, parts[i], lang)
        if lang == "zh" and rng.random() < 0.4:
            parts[i] = parts[i].replace("，", rng.choice([" ", ""]))
    if typos and lang == "en" and rng.random() < 0.2:
        parts = mistype_one(rng, parts)
    end = rng.random()
    if end < 0.7:
        return "".join(parts).rstrip("?.!？。！") or wording
    if end < 0.78:
        return "".join(parts).replace("?", "??").replace("？", "？？")
    return "".join(parts).replace("？", "?") if end < 0.85 else "".join(parts)


def shortened(rng, text, lang):
    """Some of the words in their short forms, as phrases.txt lists them."""
    for words, *forms in SHORTENED[lang]:
        if words in text and rng.random() < 0.35:
            edge = r"\b" if lang == "en" else ""  # Chinese has no spaces between words
            text = re.sub(edge + re.escape(words) + edge, rng.choice(forms), text)
    return text


def mistype_one(rng, parts):
    """One word of four letters or more is mistyped. parts: words at even places, slots at odd ones."""
    words = [(i, word) for i in range(0, len(parts), 2) for word in re.finditer("[A-Za-z]{4,}", parts[i])]
    if not words:
        return parts
    i, word = rng.choice(words)
    changed = parts[i][:word.start()] + mistype(rng, word[0]) + parts[i][word.end():]
    return [*parts[:i], changed, *parts[i + 1:]]


def mistype(rng, word):
    """A word with one wrong keystroke; its first letter stays: frog becomes frg, frogg, forg or frpg."""
    if len(word) < 4:
        return word
    at = rng.randint(1, len(word) - 2)
    kind = rng.choice(["left out", "twice", "swapped", "swapped", "beside"])
    if kind == "left out":
        return word[:at] + word[at + 1:]
    if kind == "twice":
        return word[:at] + word[at] + word[at:]
    if kind == "swapped":
        return word[:at] + word[at + 1] + word[at] + word[at + 2:]
    row = next((row for row in KEYBOARD if word[at] in row), word[at])
    neighbour = row[(row.index(word[at]) + 1) % len(row)]
    return word[:at] + neighbour + word[at + 1:]


def noise(rng, lang):
    """What fingers type that mean nothing: sdfg, qwqwqw, hjkkkl, 啊啊啊, 哦的了."""
    if lang == "zh":
        return rng.choice([rng.choice(NOISE_ZH) * rng.randint(3, 6),
                           "".join(rng.choice(NOISE_ZH) for _ in range(rng.randint(3, 6)))])
    row = rng.choice(KEYBOARD)
    start, length = rng.randint(0, 3), rng.randint(3, 6)
    letters = "".join(KEYBOARD)
    return rng.choice([row[start:start + length], row[start:start + 2] * rng.randint(2, 4),
                       "".join(rng.choice(row) for _ in range(length)),
                       "".join(rng.choice(letters) for _ in range(length + 2)),
                       rng.choice("abcdfghjkmnopqrstvxz") * rng.randint(3, 7)])
