"""Texts in twenty scripts, the same at every call, made of what Python knows of Unicode.

Latin ones are words of the names of characters ("black chess queen"); in the other scripts words
are letters of the script with its marks between, which no language need have.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache

import numpy as np

RANGES = {
    "latin": (0x41, 0x24F),
    "greek": (0x370, 0x3FF),
    "cyrillic": (0x400, 0x4FF),
    "armenian": (0x531, 0x587),
    "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x620, 0x64A),
    "devanagari": (0x900, 0x97F),
    "bengali": (0x980, 0x9FF),
    "gurmukhi": (0xA00, 0xA7F),
    "gujarati": (0xA80, 0xAFF),
    "tamil": (0xB80, 0xBFF),
    "telugu": (0xC00, 0xC7F),
    "malayalam": (0xD00, 0xD7F),
    "thai": (0xE01, 0xE5B),
    "georgian": (0x10D0, 0x10FF),
    "ethiopic": (0x1200, 0x1357),
    "khmer": (0x1780, 0x17D3),
    "kana": (0x3041, 0x30FA),
    "han": (0x4E00, 0x5FFF),
    "hangul": (0xAC00, 0xD7A3),
}
"""First and last code point of a part of each script that every version of Unicode has."""
NAMED = (0x2190, 0x2BFF)
"""Arrows, signs and symbols, whose names have most words."""
WITHOUT_SPACES = frozenset(("thai", "khmer", "kana", "han"))
PUNCTUATION = (".", "!", "?", ",", ";", ":", "…", "—", "'", '"', "(", ")", "-", "_", "&", "#", "/")
OTHERS = (
    "12,345.67",
    "3×4",
    "°C",
    "№ 7",
    "½",
    "ﬁn",
    "\U0001f680",
    "👩🏽‍🚀",
    "&amp;",
    "<b>",
    "Ａ１",
)


@cache
def letters(script: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the letters of a script, and the marks that may follow one."""
    first, last = RANGES[script]
    kinds: dict[str, list[str]] = {"L": [], "M": []}
    for code in range(first, last + 1):
        kinds.get(unicodedata.category(chr(code))[0], []).append(chr(code))
    return tuple(kinds["L"]), tuple(kinds["M"])


@cache
def named_words() -> tuple[str, ...]:
    """Return the words of the names of characters, in lower case."""
    names = (unicodedata.name(chr(code), "") for code in range(NAMED[0], NAMED[1] + 1))
    return tuple(sorted({word for name in names for word in name.lower().split()}))


def word(script: str, rng: np.random.Generator) -> str:
    """Draw a word."""
    if script == "latin" and rng.random() < 0.8:
        return str(rng.choice(named_words()))
    alphabet, marks = letters(script)
    drawn = []
    for _ in range(rng.integers(1, 8)):
        drawn.append(alphabet[rng.integers(len(alphabet))])
        if marks and rng.random() < 0.3:
            drawn.append(marks[rng.integers(len(marks))])
    return "".join(drawn)


def text(script: str, rng: np.random.Generator) -> str:
    """Draw a text of 1 to 12 words, a few of 40, with capitals, punctuation, digits and signs."""
    num_words = 40 if rng.random() < 0.04 else int(rng.integers(1, 13))
    words = [word(script, rng) for _ in range(num_words)]
    for place in range(num_words):
        if rng.random() < 0.2:
            words[place] = [str.upper, str.title][rng.integers(2)](words[place])
        if rng.random() < 0.1:
            words[place] += PUNCTUATION[rng.integers(len(PUNCTUATION))]
        if rng.random() < 0.05:
            words[place] = OTHERS[rng.integers(len(OTHERS))]
    between = "" if script in WITHOUT_SPACES else " "
    if rng.random() < 0.05:
        between = ("  ", "\t", "\u3000", "\n", "_")[rng.integers(5)]
    made = between.join(words)
    # A combination that NFC would join, which tokenizers may or may not do.
    return unicodedata.normalize("NFD", made) if rng.random() < 0.1 else made


def draw_texts(num_texts: int, *, seed: int = 0) -> tuple[str, ...]:
    """Return so many different texts, the scripts by turns."""

    def draw() -> Iterator[str]:
        rng, seen = np.random.default_rng(seed), {""}
        while True:
            for script in RANGES:
                made = text(script, rng)
                while made in seen:
                    made = text(script, rng)
                seen.add(made)
                yield made

    source = draw()
    return tuple(next(source) for _ in range(num_texts))
