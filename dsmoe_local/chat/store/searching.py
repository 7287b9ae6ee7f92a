"""Searching past turns: the newest first, and only those that a session still shows."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from dsmoe_local.chat.store.rows import SESSION_COLUMNS, TURN_COLUMNS, session_of, storable, turn_of
from dsmoe_local.chat.store.words import query, snippet
from dsmoe_local.chat.turns import Role


@dataclass(frozen=True, slots=True)
class Hit:
    """A turn that was found, the `turn`-th (from 1) of a session. `when` in seconds since 1970."""

    number: int
    session: str
    turn: int
    role: Role
    snippet: str
    when: float


def search(connection: sqlite3.Connection, words: str, limit: int) -> list[Hit]:
    """The latest turns with all of `words`, or words that begin so."""
    expression = query(storable(words))
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
    for row in map(turn_of, found):
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
    """The turns of a tree that its sessions show, each with the number and name of the oldest of those."""
    parents = dict(connection.execute("SELECT id, parent FROM turn WHERE tree = ?", (tree,)))
    shown: dict[int, tuple[int, str]] = {}
    sessions = connection.execute(
        f"SELECT {SESSION_COLUMNS} FROM session WHERE tree = ? ORDER BY number",  # noqa: S608 - no foreign text
        (tree,),
    )
    for session in map(session_of, sessions):
        turn_id = session.head
        while turn_id is not None and turn_id not in shown:
            shown[turn_id] = session.number, session.name
            turn_id = parents.get(turn_id)
    return shown
