"""Names of sessions: what may be one, which are equal, and which is still free."""

from __future__ import annotations

import itertools
import re
import sqlite3
import unicodedata

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line

MAX_NAME = 80
_ORDINAL = re.compile(r" \d+$")
_GIVEN = re.compile(r"chat-\d+( \d+)?")


def key_of(name: str) -> str:
    """What two names have in common that are the same to people."""
    return unicodedata.normalize("NFKC", name).casefold()


def check_name(text: str) -> str:
    """`text` as a name: one line, single spaces. UsageError if it cannot be one."""
    name = " ".join(text.split())
    if not name:
        raise UsageError("a session needs a name")
    if len(name) > MAX_NAME:
        raise UsageError(f"the name has {len(name)} characters", remedy=f"use at most {MAX_NAME}")
    if safe_line(name) != name:
        raise UsageError(f"{name!r} cannot be a name: it has control characters")
    if key_of(name).isdecimal():
        raise UsageError(
            f"{name} cannot be a name: it is taken for a number", remedy="put a letter in front of it"
        )
    return name


def free_name(connection: sqlite3.Connection, wanted: str) -> str:
    """`wanted`, or the first of `wanted 2`, `wanted 3` … that no session has."""
    if not is_taken(connection, wanted):
        return wanted
    stem = _ORDINAL.sub("", wanted)
    candidates = (f"{stem} {ordinal}" for ordinal in itertools.count(2))
    return next(name for name in candidates if not is_taken(connection, name))


def given_name(number: int) -> str:
    """What a session is called that nobody gave a name."""
    return f"chat-{number}"


def is_given(name: str) -> bool:
    """Whether it looks as if nobody chose that name."""
    return _GIVEN.fullmatch(name) is not None


def is_taken(connection: sqlite3.Connection, name: str, by_other_than: int = 0) -> bool:
    """Whether a session has this name."""
    row = connection.execute("SELECT number FROM session WHERE key = ?", (key_of(name),)).fetchone()
    return row is not None and row[0] != by_other_than
