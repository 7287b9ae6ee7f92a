"""One stored session: load its turns, and save new ones durably."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dsmoe_local.base.faults import reach
from dsmoe_local.base.sequences import n_common
from dsmoe_local.base.text import whole_characters
from dsmoe_local.chat.attachments import without_files
from dsmoe_local.chat.store.database import Database
from dsmoe_local.chat.store.names import default_name, free_name, key_of
from dsmoe_local.chat.store.records import (
    SESSION_COLUMNS,
    TURN_COLUMNS,
    TURN_CONTENT,
    TURN_POSITION,
    DamagedRowError,
    SessionRow,
    Settings,
    TurnRow,
    check_seal,
    integer,
    read_content,
    read_session,
    read_turn,
    seal_of,
    settings_json,
    turn_seal_of,
    turn_values,
)
from dsmoe_local.chat.store.search import indexed
from dsmoe_local.chat.turns import Role, Transcript, Turn

_TITLE = 80

# Every step must lower the depth, so that the query ends even if damaged rows form a cycle.
_PATH = f"""
    WITH RECURSIVE path (id, parent, depth, tree) AS (
        SELECT id, parent, depth, tree FROM turn WHERE id = ? AND tree = ?
        UNION ALL SELECT turn.id, turn.parent, turn.depth, turn.tree FROM turn JOIN path
        ON turn.id = path.parent AND turn.tree = path.tree
        AND turn.depth = path.depth - 1 AND turn.depth < path.depth
    )
    SELECT {TURN_COLUMNS} FROM path JOIN turn ON turn.id = path.id ORDER BY path.depth
"""  # noqa: S608 - no foreign text
_TURN_COLUMNS = ("writer", *TURN_POSITION, *TURN_CONTENT, "seal")
_ADD_TURN = f"""
    INSERT INTO turn ({", ".join(_TURN_COLUMNS)}) VALUES ({", ".join("?" * len(_TURN_COLUMNS))})
"""  # noqa: S608 - no foreign text
_DRAFT = ("session", *TURN_CONTENT, "seal")
_SET_DRAFT = f"""
    INSERT OR REPLACE INTO draft ({", ".join(_DRAFT)}) VALUES ({", ".join("?" * len(_DRAFT))})
"""  # noqa: S608 - no foreign text


@dataclass(slots=True)
class Stored:
    """What was stored when this chat last loaded or saved the session.

    `turn_ids` are those of the transcript's turns, then of its undone turns; `draft` is an unfinished reply;
    None for `revision`: the session has not been loaded or saved yet.
    """

    transcript: Transcript
    turn_ids: list[int] = field(default_factory=list)
    revision: int | None = None
    draft: Turn | None = None
    settings: Settings | None = None

    @property
    def head(self) -> int | None:
        n_turns = len(self.transcript.turns)
        return self.turn_ids[n_turns - 1] if n_turns else None

    @property
    def undone(self) -> int | None:
        return self.turn_ids[-1] if self.transcript.undone else None


class Session:
    """A session in the store, created by SessionStore. Only one thread at a time may load and save.

    `number` is 0 until the first turn is saved, and is never reused. `number` and `name` change if a save has
    to create a new session. `model`, `model_path` and `settings` are stored with the next save; None: not
    known.
    """

    def __init__(
        self, database: Database, *, number: int = 0, name: str = "", model: str = "", vocabulary: str = ""
    ) -> None:
        self.number = number
        self.name = name
        self.model = model
        self.model_path: str | None = None
        self.settings: Settings | None = None
        self.vocabulary = vocabulary
        self.stored = Stored(Transcript())
        self._database = database

    def load(self, vocabulary: str, model: str = "") -> Transcript:
        """Return all turns. Token ids of another vocabulary than `vocabulary` are left out.

        Turns that are saved from now on are of this vocabulary, and of `model` if it is given. FormatError if
        the database is damaged. A session that does not exist any more is loaded as an empty one.
        """
        self.vocabulary = vocabulary
        if self.number == 0:
            return self.stored.transcript
        with self._database.read() as connection:
            row = _row(connection, self.number)
            if row is None:
                self.stored = Stored(Transcript())
                return self.stored.transcript
            stored = read_session(row)
            path = _branch(connection, stored)
            draft = _draft(connection, self.number)
            if draft is not None and stored.undone is not None:
                raise DamagedRowError("an unfinished reply has undone turns after it")
        self.name = stored.name
        self.model = model or stored.model
        self.model_path, self.settings = stored.model_path, stored.settings
        turns = tuple(_turn_for(vocabulary, row.vocabulary, row.turn) for row in path)
        n_turns = next((place for place, row in enumerate(path, 1) if row.id == stored.head), 0)
        transcript = Transcript(
            turns[:n_turns], stored.system, stored.n_left_out, stored.n_shifted, turns[n_turns:]
        )
        self.stored = Stored(transcript, [row.id for row in path], stored.revision, settings=stored.settings)
        if draft is None:
            return transcript
        self.stored.draft = _turn_for(vocabulary, *draft)
        return replace(transcript, turns=(*transcript.turns, self.stored.draft))

    def save(self, transcript: Transcript, *, partial: bool = False) -> str | None:
        """Save `transcript` durably. Only new turns are written; a session without turns is not stored.

        `partial`: the last turn is an unfinished reply, which replaces the one saved before. If another
        program has changed or deleted this session, the transcript is saved as a new session, and a message
        about that is returned.

        Raises NoSpaceError, FileError or FormatError: then nothing is stored, and the next call tries again.
        """
        if self.number == 0 and not transcript.turns:
            self.stored.transcript = transcript
            return None
        draft = None
        if partial:
            *turns, draft = transcript.turns
            transcript = replace(transcript, turns=tuple(turns), undone=())
        known = self.stored
        same = (transcript, draft, self.settings) == (known.transcript, known.draft, known.settings)
        if self.number and same and known.revision is not None:
            return None
        with self._database.write() as connection:
            saving = _Saving(connection, self, transcript, draft)
            saving.run()
        reach("session.grown" if partial else "session.saved")
        self.number, self.name, self.stored = saving.number, saving.name, saving.stored
        return saving.note


class _Saving:
    """One save, inside its transaction. The session takes over the result when the transaction is durable."""

    def __init__(
        self, connection: sqlite3.Connection, session: Session, transcript: Transcript, draft: Turn | None
    ) -> None:
        self._connection = connection
        self._session = session
        self._transcript = transcript
        self._tree = 0
        self._now = time.time()
        self.number = session.number
        self.name = session.name
        self.stored = Stored(transcript, draft=draft, settings=session.settings)
        self.note: str | None = None

    def run(self) -> None:
        """Write the new turns and the session's row."""
        before = self._session.stored
        turn_ids = before.turn_ids[: n_common(_all(before.transcript), _all(self._transcript))]
        row = _row(self._connection, self.number)
        stored = None if row is None else read_session(row)
        tree = _tree(self._connection, turn_ids[-1]) if turn_ids else None
        if tree is None:
            # The turns have been deleted meanwhile: write all of them again.
            turn_ids = []
        revision = 1
        if stored is not None and stored.revision == before.revision:
            self.name, self._tree, revision = stored.name, stored.tree, stored.revision + 1
        else:
            self._add_row(None if stored is None else stored.name, tree)
        turn_ids += self._add_turns(turn_ids[-1] if turn_ids else None, len(turn_ids))
        self.stored.turn_ids, self.stored.revision = turn_ids, revision
        self._update_row(self.stored)
        self._set_draft(self.stored.draft)

    def _add_row(self, changed: str | None, tree: int | None) -> None:
        """Add a row for a new session, a fork, or a session that another program has changed or deleted.

        `changed` is the name of the session that was changed, if it was.
        """
        wanted = changed or self._session.name
        name = free_name(self._connection, wanted) if wanted else ""
        if changed is not None:
            self.note = f"another program has changed {changed}: this chat is now the session {name}"
        elif self.number:
            self.note = f"{wanted} was deleted by another program: this chat is now the session {name}"
        elif name != wanted:
            self.note = f"the name {wanted} is taken: this chat is now the session {name}"
        self.number, self._tree, self.name = add_session(self._connection, name, tree, self._now)

    def _add_turns(self, parent: int | None, n_before: int) -> list[int]:
        added: list[int] = []
        for depth, turn in enumerate(_all(self._transcript)[n_before:], n_before + 1):
            values = (parent, self._tree, depth, self._now, *turn_values(turn, self._session.vocabulary))
            seal = turn_seal_of(values)
            parent = self._connection.execute(_ADD_TURN, (self.number, *values, seal)).lastrowid
            assert parent is not None
            self._connection.execute(
                "INSERT INTO search_index (rowid, content) VALUES (?, ?)",
                (parent, indexed(whole_characters(turn.content))),
            )
            added.append(parent)
            reach("session.turn")
        return added

    def _update_row(self, stored: Stored) -> None:
        transcript = stored.transcript
        self._connection.execute(
            "UPDATE session SET head = ?, undone = ?, revision = ?, system = ?, n_left_out = ?,"
            " n_shifted = ?, title = ?, model = ?, model_path = ?, settings = ?, updated = ?"
            " WHERE number = ?",
            (
                stored.head,
                stored.undone,
                stored.revision,
                whole_characters(transcript.system),
                transcript.n_left_out,
                transcript.n_shifted,
                _title(transcript.turns),
                whole_characters(self._session.model),
                None if self._session.model_path is None else whole_characters(self._session.model_path),
                settings_json(stored.settings),
                self._now,
                self.number,
            ),
        )
        seal_session(self._connection, self.number)

    def _set_draft(self, draft: Turn | None) -> None:
        if draft is None:
            self._connection.execute("DELETE FROM draft WHERE session = ?", (self.number,))
        else:
            values = (self.number, *turn_values(draft, self._session.vocabulary))
            self._connection.execute(_SET_DRAFT, (*values, turn_seal_of(values)))


def add_session(
    connection: sqlite3.Connection, name: str, tree: int | None, now: float
) -> tuple[int, int, str]:
    """Add a row without turns. Return its number, tree and name, which is made from the number if empty."""
    number = connection.execute(
        "INSERT INTO session (name, key, tree, revision, system, n_left_out, n_shifted, title, model,"
        " created, updated) VALUES ('', '', 0, 1, '', 0, 0, '', '', ?, ?)",
        (now, now),
    ).lastrowid
    assert number is not None
    tree = tree or number
    name = name or free_name(connection, default_name(number))
    connection.execute(
        "UPDATE session SET name = ?, key = ?, tree = ? WHERE number = ?", (name, key_of(name), tree, number)
    )
    seal_session(connection, number)
    return number, tree, name


def seal_session(connection: sqlite3.Connection, number: int) -> None:
    """Update the seal of a session's row after a change."""
    row = _row(connection, number)
    connection.execute("UPDATE session SET seal = ? WHERE number = ?", (seal_of(row[:-1]), number))


def _row(connection: sqlite3.Connection, number: int) -> Any:  # noqa: ANN401 - a tuple of SQLite's, or None
    """Return a session's SESSION_COLUMNS; None if it does not exist."""
    query = f"SELECT {SESSION_COLUMNS} FROM session WHERE number = ?"  # noqa: S608 - no foreign text
    return connection.execute(query, (number,)).fetchone()


def _branch(connection: sqlite3.Connection, session: SessionRow) -> list[TurnRow]:
    """Return the turns up to a session's head, then those that were undone."""
    path = _path(connection, session.head, session.tree)
    if session.undone is None:
        return path
    whole = _path(connection, session.undone, session.tree)
    if len(whole) <= len(path) or [row.id for row in whole[: len(path)]] != [row.id for row in path]:
        raise DamagedRowError(f"turn {session.undone} does not follow turn {session.head}")
    return whole


def _path(connection: sqlite3.Connection, head: int | None, tree: int) -> list[TurnRow]:
    """Return all turns up to a head; none if it is None."""
    if head is None:
        return []
    path = [read_turn(row) for row in connection.execute(_PATH, (head, tree))]
    if not path or [row.depth for row in path] != [*range(1, len(path) + 1)]:
        raise DamagedRowError(f"turns before turn {head} are missing")
    return path


def _draft(connection: sqlite3.Connection, number: int) -> tuple[str | None, Turn] | None:
    """Return the unfinished reply of a session with the vocabulary of its token ids, or None."""
    row = connection.execute(
        f"SELECT {', '.join(_DRAFT)} FROM draft WHERE session = ?",  # noqa: S608 - no foreign text
        (number,),
    ).fetchone()
    if row is None:
        return None
    *values, seal = row
    check_seal(f"the last reply of session {number}", seal, turn_seal_of(values))
    return read_content(values[1:])


def _turn_for(vocabulary: str, of: str | None, turn: Turn) -> Turn:
    """Return `turn` without its token ids if they are of another vocabulary."""
    return turn if of == vocabulary else replace(turn, token_ids=())


def _all(transcript: Transcript) -> tuple[Turn, ...]:
    return (*transcript.turns, *transcript.undone)


def _tree(connection: sqlite3.Connection, turn_id: int) -> int | None:
    """Return the tree of a turn, or None if it was deleted. Its ancestors exist if it does."""
    row = connection.execute("SELECT tree FROM turn WHERE id = ?", (turn_id,)).fetchone()
    return None if row is None else integer("tree", row[0])


def _title(turns: Sequence[Turn]) -> str:
    text = without_files(next((turn.content for turn in turns if turn.role is Role.USER), ""))
    line = " ".join(whole_characters(text[: 8 * _TITLE]).split())
    return line if len(line) <= _TITLE else f"{line[: _TITLE - 1]}…"
