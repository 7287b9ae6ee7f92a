"""Texts as the search sees them: what is indexed, what is asked of the index, and what is shown of a hit.

SQLite's tokenizer takes a run of letters for one word. Chinese and Japanese have no spaces between words, and
Korean puts particles behind them, so a whole clause would be one word, found by nobody. Here each of their
characters is set apart with spaces before the text is indexed, and so is every word of a query, which is then
looked for as a phrase: 专家 is asked for as "专 家", and found in 混合专家, indexed as "混 合 专 家".
"""

from __future__ import annotations

import re
import unicodedata

_SNIPPET = 80
_BEFORE = 24

# Ideographs and their marks, kana, bopomofo, hangul, compatibility forms, half-width kana, the later planes.
_CHARACTER_BY_CHARACTER = re.compile(
    "([\u1100-\u11ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c\u3041-\u3096\u309d-\u309f"
    "\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f\u3131-\u318e\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U0001aff0-\U0001b16f\U00020000-\U0003ffff])"
)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


def indexed(text: str) -> str:
    """What the index is given of `text`."""
    normal = unicodedata.normalize("NFKC", _CONTROL.sub(" ", text)).casefold()
    return _CHARACTER_BY_CHARACTER.sub(r" \1 ", normal)


def query(words: str) -> str | None:
    """The full-text query for turns that hold all of `words`, or words that begin so; None if there are none.

    Whatever SQLite's query language would see in them, quotes, AND, brackets, is plain text.
    """
    phrases = [f'"{phrase}"*' for phrase in _phrases(words)]
    return " AND ".join(phrases) if phrases else None


def snippet(text: str, words: str) -> str:
    """One line of `text` around the first of `words` in it."""
    line = " ".join(text.split())
    folded, places = _folded(line)
    found = [at for word in words.split() if (at := folded.find(_folded(word)[0])) >= 0]
    start = max(0, places[min(found)] - _BEFORE) if found else 0
    start = min(start, max(0, len(line) - _SNIPPET))
    shown = line[start : start + _SNIPPET].strip()
    return f"{'…' if start else ''}{shown}{'…' if start + _SNIPPET < len(line) else ''}"


def _phrases(words: str) -> list[str]:
    phrases = (" ".join(indexed(word).replace('"', " ").split()) for word in words.split())
    spoken = dict.fromkeys(phrase for phrase in phrases if any(letter.isalnum() for letter in phrase))
    return list(spoken)


def _folded(text: str) -> tuple[str, list[int]]:
    """`text` without case and accents, and for each character of that its place in `text`."""
    letters: list[str] = []
    places: list[int] = []
    for place, letter in enumerate(text):
        for part in unicodedata.normalize("NFKD", letter).casefold():
            if not unicodedata.combining(part):
                letters.append(part)
                places.append(place)
    return "".join(letters), places
