"""The stored sessions of a folder: find, name, fork, delete and search them."""

from __future__ import annotations

import difflib
import sqlite3
import threading
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line, whole_characters
from dsmoe_local.chat.store.database import Database
from dsmoe_local.chat.store.names import check_name, is_default, is_taken, key_of
from dsmoe_local.chat.store.records import SESSION_COLUMNS, SessionRow, integer, read_session
from dsmoe_local.chat.store.search import Hit, search
from dsmoe_local.chat.store.session import Session, Stored, seal_session
from dsmoe_local.chat.store.states import remove_states, states_folder
from dsmoe_local.chat.turns import Transcript

__all__ = ["Hit", "Session", "SessionStore", "Summary"]


@dataclass(frozen=True, slots=True)
class Summary:
    """A session as it is listed. `title` is the beginning of its first message, `model_path` the file of its
    model or None if it is not known, `updated` in seconds since 1970.
    """

    number: int
    name: str
    title: str
    n_turns: int  # messages and replies
    model: str
    model_path: str | None
    updated: float


class SessionStore:
    """The sessions in one folder. Several threads and processes may use it at once.

    All methods raise FormatError if the database is damaged, FileError if it cannot be read or written.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        # `rename` changes the name of all objects of a session.
        self._open: weakref.WeakSet[Session] = weakref.WeakSet()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open the store in `folder`; create it if it is missing."""
        return cls(Database.open(folder))

    def problems(self, stop: threading.Event | None = None) -> list[str]:
        """Check the whole database. Return messages about damage that could otherwise go unnoticed.

        FileError once `stop` is set.
        """
        return self._database.problems(stop or threading.Event())

    def close(self) -> None:
        """Close the database. May be called twice."""
        self._database.close()

    def create(self, model: str, vocabulary: str, system: str) -> Session:
        """Return a new session. It is stored with its first turn, and then gets a name if it has none."""
        session = self._session(0, "", model, vocabulary)
        session.stored.transcript = Transcript(system=system)
        return session

    def find(self, text: str) -> Session:
        """Return the session with this name, number or beginning of a name. UsageError if there is none."""
        wanted = key_of(" ".join(text.split()))
        with self._database.read() as connection:
            by_key = {row.key: (row.number, row.name) for row in _rows(connection)}
        if not wanted:
            raise UsageError("the name or number of a session is missing", remedy="/sessions lists them")
        found = [wanted] if wanted in by_key else []
        found = found or [key for key, (number, _) in by_key.items() if wanted == str(number)]
        found = found or [key for key in by_key if key.startswith(wanted)]
        if len(found) == 1:
            return self._session(*by_key[found[0]])
        shown = safe_line(text, 60)
        if found:
            names = ", ".join(by_key[key][1] for key in found[:5])
            raise UsageError(f"several sessions begin with {shown}", remedy=f"type more of the name: {names}")
        near = difflib.get_close_matches(wanted, by_key, n=1, cutoff=0.5)
        raise UsageError(
            f"there is no session {shown}",
            remedy=f"did you mean {by_key[near[0]][1]}?" if near else "/sessions lists them",
        )

    def named(self, name: str) -> Session | None:
        """Return the session with exactly this name, in any case, or None."""
        with self._database.read() as connection:
            found = _rows(connection, "key = ?", whole_characters(key_of(" ".join(name.split()))))
        return self._session(found[0].number, found[0].name) if found else None

    def latest(self) -> Session | None:
        """Return the session that was saved last and has turns, or None."""
        with self._database.read() as connection:
            found = _rows(connection, "head IS NOT NULL")
        return self._session(found[0].number, found[0].name) if found else None

    def summaries(self) -> list[Summary]:
        """Return the sessions that have turns or a chosen name, the last saved first."""
        with self._database.read() as connection:
            found = [_summary(connection, row) for row in _rows(connection)]
        return [summary for summary in found if summary.n_turns or not is_default(summary.name)]

    def summary(self, session: Session) -> Summary | None:
        """Return the summary of a session, or None if it does not exist any more."""
        with self._database.read() as connection:
            found = [_summary(connection, row) for row in _rows(connection, "number = ?", session.number)]
        return found[0] if found else None

    def names(self) -> list[str]:
        """Return the names of the sessions in `summaries`."""
        return [summary.name for summary in self.summaries()]

    def fork(self, session: Session, name: str = "") -> Session:
        """Return a new session with the turns that `session` has in this chat.

        UsageError if it has none, or the name is taken.
        """
        if name:
            name = check_name(name)
            with self._database.read() as connection:
                _refuse_taken(connection, name)
        if session.number and session.stored.revision is None:
            session = self._session(session.number, session.name)
            session.load("")
        transcript = session.stored.transcript
        if session.number == 0 or not transcript.turns:
            raise UsageError("there is nothing to fork yet")
        fork = self._session(0, name or session.name, session.model, session.vocabulary)
        fork.model_path, fork.settings = session.model_path, session.settings
        fork.stored = Stored(transcript, list(session.stored.turn_ids))
        draft = session.stored.draft
        turns = transcript.turns if draft is None else (*transcript.turns, draft)
        fork.save(replace(transcript, turns=turns))
        return fork

    def rename(self, session: Session, name: str) -> None:
        """Rename a session. UsageError if the name is not allowed or taken."""
        name = check_name(name)
        if session.number == 0:
            with self._database.read() as connection:
                _refuse_taken(connection, name)
        else:
            with self._database.write() as connection:
                _refuse_taken(connection, name, by_other_than=session.number)
                n_renamed = connection.execute(
                    "UPDATE session SET name = ?, key = ? WHERE number = ?",
                    (name, key_of(name), session.number),
                ).rowcount
                if n_renamed == 0:
                    raise UsageError(
                        f"{session.name} was deleted by another program", remedy="/sessions lists the others"
                    )
                seal_session(connection, session.number)
        session.name = name
        for other in self._open:
            if other.number and other.number == session.number:
                other.name = name

    def delete(self, session: Session) -> None:
        """Delete a session, the turns that no other session needs, and its KV states. May be called twice."""
        if session.number == 0:
            return
        with self._database.write() as connection:
            files = _delete_session(connection, session.number)
        remove_states(states_folder(self._database.folder), files)
        self._database.empty_log()

    def search(self, words: str, limit: int = 20) -> list[Hit]:
        """Return the latest turns with all of `words`, of those that a session still shows."""
        with self._database.read() as connection:
            return search(connection, words, limit)

    def _session(self, number: int, name: str, model: str = "", vocabulary: str = "") -> Session:
        session = Session(self._database, number=number, name=name, model=model, vocabulary=vocabulary)
        self._open.add(session)
        return session


def _rows(connection: sqlite3.Connection, condition: str = "TRUE", *values: object) -> list[SessionRow]:
    """Return the sessions with this condition, the last saved first."""
    found = connection.execute(
        f"SELECT {SESSION_COLUMNS} FROM session"  # noqa: S608 - no foreign text
        f" WHERE {condition} ORDER BY session.updated DESC, number DESC",
        values,
    )
    return [read_session(row) for row in found]


def _summary(connection: sqlite3.Connection, row: SessionRow) -> Summary:
    head = connection.execute("SELECT depth FROM turn WHERE id = ?", (row.head,)).fetchone()
    draft = connection.execute("SELECT 1 FROM draft WHERE session = ?", (row.number,)).fetchone()
    n_turns = (0 if head is None else integer("depth", head[0])) + (draft is not None)
    return Summary(row.number, row.name, row.title, n_turns, row.model, row.model_path, row.updated)


def _refuse_taken(connection: sqlite3.Connection, name: str, by_other_than: int = 0) -> None:
    if name and is_taken(connection, name, by_other_than):
        raise UsageError(f"a session {name} exists already", remedy="choose another name")


# The heads of the tree's other sessions, the turns that they wrote or can redo, and all ancestors of these.
_NEEDED = """
    WITH RECURSIVE needed (id) AS (
        SELECT head FROM session WHERE tree = :tree AND head IS NOT NULL
        UNION SELECT undone FROM session WHERE tree = :tree AND undone IS NOT NULL
        UNION SELECT turn.id FROM turn JOIN session ON turn.writer = session.number WHERE turn.tree = :tree
        UNION SELECT turn.parent FROM turn JOIN needed ON turn.id = needed.id WHERE turn.parent IS NOT NULL
    )
    SELECT id FROM needed
"""


def _delete_session(connection: sqlite3.Connection, number: int) -> list[str]:
    """Delete the rows of a session in the caller's transaction. Return the files of its KV states as they are
    stored, which may be damaged.
    """
    row = connection.execute("SELECT tree FROM session WHERE number = ?", (number,)).fetchone()
    if row is None:
        return []
    tree = integer("tree", row[0])
    # In a damaged database, parents may have larger ids than their children.
    connection.execute("PRAGMA defer_foreign_keys = ON")
    files = [file for (file,) in connection.execute("SELECT file FROM state WHERE session = ?", (number,))]
    connection.execute("DELETE FROM session WHERE number = ?", (number,))
    needed = {turn_id for (turn_id,) in connection.execute(_NEEDED, {"tree": tree})}
    turns = [turn_id for (turn_id,) in connection.execute("SELECT id FROM turn WHERE tree = ?", (tree,))]
    unneeded = [(turn_id,) for turn_id in turns if turn_id not in needed]
    connection.executemany("DELETE FROM search_index WHERE rowid = ?", unneeded)
    connection.executemany("DELETE FROM turn WHERE id = ?", unneeded)
    # The index keeps deleted words until its segments are merged.
    connection.execute("INSERT INTO search_index (search_index) VALUES ('optimize')")
    return files
