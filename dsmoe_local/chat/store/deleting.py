"""Deleting a session: which turns go with it, and which others need."""

from __future__ import annotations

import sqlite3

from dsmoe_local.chat.store.values import integer

# What the tree's other sessions show, what they have written and undone, and all that those are answers to.
_NEEDED = """
    WITH RECURSIVE needed (id) AS (
        SELECT head FROM session WHERE tree = :tree AND head IS NOT NULL
        UNION SELECT undone FROM session WHERE tree = :tree AND undone IS NOT NULL
        UNION SELECT turn.id FROM turn JOIN session ON turn.writer = session.number WHERE turn.tree = :tree
        UNION SELECT turn.parent FROM turn JOIN needed ON turn.id = needed.id WHERE turn.parent IS NOT NULL
    )
    SELECT id FROM needed
"""


def delete_session(connection: sqlite3.Connection, number: int) -> list[str]:
    """Delete the rows of a session, in the caller's transaction. Returns what its rows say are the files of
    its KV states.
    """
    row = connection.execute("SELECT tree FROM session WHERE number = ?", (number,)).fetchone()
    if row is None:
        return []
    tree = integer("tree", row[0])
    # In a damaged database a turn may be older than its parent.
    connection.execute("PRAGMA defer_foreign_keys = ON")
    files = [file for (file,) in connection.execute("SELECT file FROM state WHERE session = ?", (number,))]
    connection.execute("DELETE FROM session WHERE number = ?", (number,))
    needed = {turn_id for (turn_id,) in connection.execute(_NEEDED, {"tree": tree})}
    turns = [turn_id for (turn_id,) in connection.execute("SELECT id FROM turn WHERE tree = ?", (tree,))]
    unneeded = [(turn_id,) for turn_id in turns if turn_id not in needed]
    connection.executemany("DELETE FROM search_index WHERE rowid = ?", unneeded)
    connection.executemany("DELETE FROM turn WHERE id = ?", unneeded)
    # The index keeps deleted words until its parts are merged.
    connection.execute("INSERT INTO search_index (search_index) VALUES ('optimize')")
    return files
