"""Searching past turns: the newest first, and only those that a session still shows."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from dsmoe_local.chat.store.rows import storable
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
    """The latest turns with all of `words`, or words that begin so. ValueError for a turn that is damaged."""
    expression = query(storable(words))
    if expression is None:
        return []
    found = connection.execute(
        "SELECT turn.id, turn.tree, depth, role, turn.content, created FROM search_index"
        " JOIN turn ON turn.id = search_index.rowid WHERE search_index MATCH ?"
        " ORDER BY search_index.rowid DESC",
        (expression,),
    )
    hits: list[Hit] = []
    shown: dict[int, dict[int, tuple[int, str]]] = {}
    for turn_id, tree, depth, role, content, created in found:
        if tree not in shown:
            shown[tree] = _shown(connection, tree)
        if (session := shown[tree].get(turn_id)) is None:
            continue
        hits.append(Hit(*session, depth, Role(role), snippet(content, words), created))
        if len(hits) == limit:
            break
    return hits


def _shown(connection: sqlite3.Connection, tree: int) -> dict[int, tuple[int, str]]:
    """The turns of a tree that its sessions show, each with the number and name of the oldest of those."""
    parents = dict(connection.execute("SELECT id, parent FROM turn WHERE tree = ?", (tree,)))
    shown: dict[int, tuple[int, str]] = {}
    for number, name, head in connection.execute(
        "SELECT number, name, head FROM session WHERE tree = ? ORDER BY number", (tree,)
    ):
        turn_id = head
        while turn_id is not None and turn_id not in shown:
            shown[turn_id] = number, name
            turn_id = parents.get(turn_id)
    return shown
