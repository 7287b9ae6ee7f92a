"""All stored sessions: finding, naming, forking, deleting and searching them."""

from __future__ import annotations

import difflib
import sqlite3
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat.store.database import Database
from dsmoe_local.chat.store.deleting import delete_session
from dsmoe_local.chat.store.names import check_name, is_given, is_taken, key_of
from dsmoe_local.chat.store.rows import SESSION_COLUMNS, SessionRow, session_of, storable
from dsmoe_local.chat.store.searching import Hit, search
from dsmoe_local.chat.store.session import Session, Stored, seal_session
from dsmoe_local.chat.store.state_files import remove, states_folder
from dsmoe_local.chat.store.values import integer
from dsmoe_local.chat.turns import Transcript

__all__ = ["Hit", "Session", "SessionStore", "Summary"]


@dataclass(frozen=True, slots=True)
class Summary:
    """A session in a list. `title` is the beginning of its first message; `model_path` its model's file, if
    that is known; `updated` in seconds since 1970.
    """

    number: int
    name: str
    title: str
    n_turns: int
    model: str
    model_path: str | None
    updated: float


class SessionStore:
    """The sessions in one folder. Callable from any thread. Any number of programs may have it open at once.

    All methods raise FormatError when the database is damaged, FileError when it cannot be read or written.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        # So that a session which is open here learns its new name.
        self._open: weakref.WeakSet[Session] = weakref.WeakSet()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The store in `folder`, which is made if need be."""
        return cls(Database.open(folder))

    def problems(self) -> list[str]:
        """What is wrong with the database, for people, where sessions may be missing without a word."""
        return self._database.problems()

    def close(self) -> None:
        """Close the database. Closing twice is fine."""
        self._database.close()

    def create(self, model: str, vocabulary: str, system: str) -> Session:
        """A new session, stored from its first turn on. Until then it has no name, unless `rename` gives it
        one.
        """
        session = self._session(0, "", model, vocabulary)
        session.stored.transcript = Transcript(system=system)
        return session

    def find(self, text: str) -> Session:
        """The session of that name, number, or unique beginning of a name. UsageError, naming the nearest."""
        wanted = key_of(" ".join(text.split()))
        with self._database.read() as connection:
            by_key = {row.key: (row.number, row.name) for row in _rows(connection)}
        if not wanted:
            raise UsageError("which session? give its name or number", remedy="/sessions lists them")
        found = [wanted] if wanted in by_key else []
        found = found or [key for key, (number, _) in by_key.items() if wanted == str(number)]
        found = found or [key for key in by_key if key.startswith(wanted)]
        if len(found) == 1:
            return self._session(*by_key[found[0]])
        shown = safe_line(text, 60)
        if found:
            names = ", ".join(by_key[key][1] for key in found[:5])
            raise UsageError(f"several sessions begin with {shown}", remedy=f"say more of the name: {names}")
        near = difflib.get_close_matches(wanted, by_key, n=1, cutoff=0.5)
        raise UsageError(
            f"there is no session {shown}",
            remedy=f"did you mean {by_key[near[0]][1]}?" if near else "/sessions lists them",
        )

    def named(self, name: str) -> Session | None:
        """The session of that very name, in whatever case."""
        with self._database.read() as connection:
            found = _rows(connection, "key = ?", storable(key_of(" ".join(name.split()))))
        return self._session(found[0].number, found[0].name) if found else None

    def latest(self) -> Session | None:
        """The session that was saved last, of those that have turns."""
        with self._database.read() as connection:
            found = _rows(connection, "head IS NOT NULL")
        return self._session(found[0].number, found[0].name) if found else None

    def summaries(self) -> list[Summary]:
        """The sessions, the one saved last first; those without turns only if they were given a name."""
        with self._database.read() as connection:
            found = [_summary(connection, row) for row in _rows(connection)]
        return [summary for summary in found if summary.n_turns or not is_given(summary.name)]

    def summary(self, session: Session) -> Summary | None:
        """Of one session; None if it is not there any more."""
        with self._database.read() as connection:
            found = [_summary(connection, row) for row in _rows(connection, "number = ?", session.number)]
        return found[0] if found else None

    def names(self) -> list[str]:
        """The names of the sessions in the list, the one saved last first."""
        return [summary.name for summary in self.summaries()]

    def fork(self, session: Session, name: str = "") -> Session:
        """A new session that begins with the turns which `session` has in this chat.

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
        """Give a session another name. UsageError if it cannot be one, or is taken."""
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
                    raise UsageError(f"{session.name} was deleted elsewhere")
                seal_session(connection, session.number)
        session.name = name
        for other in self._open:
            if other.number and other.number == session.number:
                other.name = name

    def delete(self, session: Session) -> None:
        """Delete a session, the turns that no other one needs, and its KV states. Deleting twice is fine."""
        if session.number == 0:
            return
        with self._database.write() as connection:
            files = delete_session(connection, session.number)
        remove(states_folder(self._database.folder), files)
        self._database.empty_log()

    def search(self, words: str, limit: int = 20) -> list[Hit]:
        """The latest turns that hold all of `words`, of those that a session still shows."""
        with self._database.read() as connection:
            return search(connection, words, limit)

    def _session(self, number: int, name: str, model: str = "", vocabulary: str = "") -> Session:
        session = Session(self._database, number=number, name=name, model=model, vocabulary=vocabulary)
        self._open.add(session)
        return session


def _rows(connection: sqlite3.Connection, condition: str = "TRUE", *values: object) -> list[SessionRow]:
    """The sessions with that condition, the one saved last first."""
    found = connection.execute(
        f"SELECT {SESSION_COLUMNS} FROM session"  # noqa: S608 - no foreign text
        f" WHERE {condition} ORDER BY session.updated DESC, number DESC",
        values,
    )
    return [session_of(row) for row in found]


def _summary(connection: sqlite3.Connection, row: SessionRow) -> Summary:
    head = connection.execute("SELECT depth FROM turn WHERE id = ?", (row.head,)).fetchone()
    draft = connection.execute("SELECT 1 FROM draft WHERE session = ?", (row.number,)).fetchone()
    n_turns = (0 if head is None else integer("depth", head[0])) + (draft is not None)
    return Summary(row.number, row.name, row.title, n_turns, row.model, row.model_path, row.updated)


def _refuse_taken(connection: sqlite3.Connection, name: str, by_other_than: int = 0) -> None:
    if name and is_taken(connection, name, by_other_than):
        raise UsageError(f"there is a session {name} already", remedy="choose another name")
