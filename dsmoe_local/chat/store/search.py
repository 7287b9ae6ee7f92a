"""Full-text search over past turns: the newest first, and only turns that a session still shows.

SQLite's tokenizer takes a run of letters for one word. Chinese and Japanese have no spaces between words, and
Korean attaches particles to them, so that a whole clause would be one word. Here each of their characters is
separated by spaces before the text is indexed, and a word of a query becomes a phrase: 专家 is searched as
"专 家", and found in 混合专家, which is indexed as "混 合 专 家".
"""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from dataclasses import dataclass

from dsmoe_local.base.text import whole_characters
from dsmoe_local.chat.store.records import SESSION_COLUMNS, TURN_COLUMNS, read_session, read_turn
from dsmoe_local.chat.turns import Role

_SNIPPET = 80  # characters
_BEFORE = 24  # characters of a snippet before the word that was found

# Ideographs and their marks, kana, bopomofo, hangul, compatibility forms, half-width kana, planes 1 to 3.
_CHARACTER_BY_CHARACTER = re.compile(
    "([\u1100-\u11ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c\u3041-\u3096\u309d-\u309f"
    "\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f\u3131-\u318e\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U0001aff0-\U0001b16f\U00020000-\U0003ffff])"
)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Hit:
    """A turn that was found. `turn` is its number in the session, from 1, `when` in seconds since 1970."""

    number: int
    session: str
    turn: int
    role: Role
    snippet: str
    when: float


def search(connection: sqlite3.Connection, words: str, limit: int) -> list[Hit]:
    """Return the latest turns that have all of `words`, or words that begin with them."""
    expression = query(whole_characters(words))
    if expression is None:
        return []
    found = connection.execute(
        f"SELECT {TURN_COLUMNS} FROM search_index"  # noqa: S608 - no foreign text
        " JOIN turn ON turn.id = search_index.rowid WHERE search_index MATCH ?"
        " ORDER BY search_index.rowid DESC",
        (expression,),
    )
    hits: list[Hit] = []
    shown: dict[int, dict[int, tuple[int, str]]] = {}
    for row in map(read_turn, found):
        if row.tree not in shown:
            shown[row.tree] = _shown(connection, row.tree)
        if (session := shown[row.tree].get(row.id)) is None:
            continue
        turn = row.turn
        hits.append(Hit(*session, row.depth, turn.role, snippet(turn.content, words), row.created))
        if len(hits) == limit:
            break
    return hits


def _shown(connection: sqlite3.Connection, tree: int) -> dict[int, tuple[int, str]]:
    """Return the turns of a tree that sessions show, with number and name of the oldest such session."""
    parents = dict(connection.execute("SELECT id, parent FROM turn WHERE tree = ?", (tree,)))
    shown: dict[int, tuple[int, str]] = {}
    sessions = connection.execute(
        f"SELECT {SESSION_COLUMNS} FROM session WHERE tree = ? ORDER BY number",  # noqa: S608 - no foreign text
        (tree,),
    )
    for session in map(read_session, sessions):
        turn_id = session.head
        while turn_id is not None and turn_id not in shown:
            shown[turn_id] = session.number, session.name
            turn_id = parents.get(turn_id)
    return shown


def indexed(text: str) -> str:
    """Return `text` as it is indexed."""
    normal = unicodedata.normalize("NFKC", _CONTROL.sub(" ", text)).casefold()
    return _CHARACTER_BY_CHARACTER.sub(r" \1 ", normal)


def query(words: str) -> str | None:
    """Return the FTS5 query for turns with all of `words`, as whole words or prefixes; None without words.

    Quotes, brackets and keywords of the query language are plain text.
    """
    phrases = [f'"{phrase}"*' for phrase in _phrases(words)]
    return " AND ".join(phrases) if phrases else None


def snippet(text: str, words: str) -> str:
    """Return a line of `text` around the first of `words` in it."""
    line = " ".join(text.split())
    folded, places = _folded(line)
    found = [at for word in words.split() if (at := folded.find(_folded(word)[0])) >= 0]
    start = max(0, places[min(found)] - _BEFORE) if found else 0
    start = min(start, max(0, len(line) - _SNIPPET))
    shown = line[start : start + _SNIPPET].strip()
    return f"{'…' if start else ''}{shown}{'…' if start + _SNIPPET < len(line) else ''}"


def _phrases(words: str) -> list[str]:
    phrases = (" ".join(indexed(word).replace('"', " ").split()) for word in words.split())
    unique = dict.fromkeys(phrase for phrase in phrases if any(letter.isalnum() for letter in phrase))
    return list(unique)


def _folded(text: str) -> tuple[str, list[int]]:
    """Return `text` without case and accents, and for each of its characters the index in `text`."""
    letters: list[str] = []
    places: list[int] = []
    for place, letter in enumerate(text):
        for part in unicodedata.normalize("NFKD", letter).casefold():
            if not unicodedata.combining(part):
                letters.append(part)
                places.append(place)
    return "".join(letters), places
