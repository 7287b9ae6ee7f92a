"""Names of sessions: validation, comparison, and names that are still free."""

from __future__ import annotations

import itertools
import re
import sqlite3
import unicodedata

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line

MAX_NAME = 80
_ORDINAL = re.compile(r" \d+$")
_DEFAULT = re.compile(r"chat-\d+( \d+)?")


def key_of(name: str) -> str:
    """Return the form in which names are compared: without case and Unicode variants."""
    return unicodedata.normalize("NFKC", name).casefold()


def check_name(text: str) -> str:
    """Return `text` as a name, with single spaces. UsageError if it is not allowed."""
    name = " ".join(text.split())
    if not name:
        raise UsageError("the name of the session is missing")
    if len(name) > MAX_NAME:
        raise UsageError(f"the name has {len(name)} characters", remedy=f"use at most {MAX_NAME}")
    if safe_line(name) != name:
        raise UsageError(f"{name!r} cannot be a name: it contains control characters")
    if key_of(name).isdecimal():
        raise UsageError(
            f"{name} cannot be a name: it would be read as a session's number", remedy="add a letter"
        )
    return name


def free_name(connection: sqlite3.Connection, wanted: str) -> str:
    """Return `wanted`, or the first of `wanted 2`, `wanted 3` … that no session has."""
    if not is_taken(connection, wanted):
        return wanted
    stem = _ORDINAL.sub("", wanted)
    candidates = (f"{stem} {ordinal}" for ordinal in itertools.count(2))
    return next(name for name in candidates if not is_taken(connection, name))


def default_name(number: int) -> str:
    """Return the name of a session that the user has not named."""
    return f"chat-{number}"


def is_default(name: str) -> bool:
    """Return whether a name has the form of a default name."""
    return _DEFAULT.fullmatch(name) is not None


def is_taken(connection: sqlite3.Connection, name: str, by_other_than: int = 0) -> bool:
    """Return whether a session other than number `by_other_than` has this name."""
    row = connection.execute("SELECT number FROM session WHERE key = ?", (key_of(name),)).fetchone()
    return row is not None and row[0] != by_other_than
