"""One stored session: its turns read back, and what is new in them made durable."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dsmoe_local.base.faults import reach
from dsmoe_local.base.sequences import n_common
from dsmoe_local.chat.frames import without_files
from dsmoe_local.chat.store.database import Database
from dsmoe_local.chat.store.names import free_name, given_name, key_of
from dsmoe_local.chat.store.rows import (
    SESSION_COLUMNS,
    TURN_COLUMNS,
    WRITTEN,
    TurnRow,
    row_of,
    session_of,
    storable,
    turn_of,
)
from dsmoe_local.chat.store.values import DamagedRowError, integer
from dsmoe_local.chat.store.words import indexed
from dsmoe_local.chat.turns import Role, Transcript, Turn

_TITLE = 80

# In a damaged database parents may go round in a circle: with every step the depth goes down, or it ends.
_PATH = f"""
    WITH RECURSIVE path (id, parent, depth, tree) AS (
        SELECT id, parent, depth, tree FROM turn WHERE id = ? AND tree = ?
        UNION ALL SELECT turn.id, turn.parent, turn.depth, turn.tree FROM turn JOIN path
        ON turn.id = path.parent AND turn.tree = path.tree
        AND turn.depth = path.depth - 1 AND turn.depth < path.depth
    )
    SELECT {TURN_COLUMNS} FROM path JOIN turn ON turn.id = path.id ORDER BY path.depth
"""  # noqa: S608 - no foreign text
_ADD_TURN = f"""
    INSERT INTO turn (parent, tree, writer, depth, created, {", ".join(WRITTEN)})
    VALUES (?, ?, ?, ?, ?, {", ".join("?" * len(WRITTEN))})
"""  # noqa: S608 - no foreign text


@dataclass(slots=True)
class Stored:
    """What this chat knows to be stored: the transcript, its turns' ids, and the revision that this was."""

    transcript: Transcript
    turn_ids: list[int] = field(default_factory=list)
    revision: int | None = None

    @property
    def head(self) -> int | None:
        return self.turn_ids[-1] if self.turn_ids else None


class Session:
    """A conversation in the store. Made by SessionStore; one thread at a time may load and save.

    `number` is 0 until the first turn is saved, and never given to another session. Both `number` and `name`
    change when a save has to go on as a new session.
    """

    def __init__(
        self, database: Database, *, number: int = 0, name: str = "", model: str = "", vocabulary: str = ""
    ) -> None:
        self.number = number
        self.name = name
        self.model = model
        self.vocabulary = vocabulary
        self.stored = Stored(Transcript())
        self._database = database

    def load(self, vocabulary: str, model: str = "") -> Transcript:
        """All turns, with the token ids that are of `vocabulary`. What is said from now on is of that, and of
        `model`, if one is named.

        FormatError if the database is damaged. A session that is not there any more is loaded as an empty
        one.
        """
        self.vocabulary = vocabulary
        if self.number == 0:
            return self.stored.transcript
        with self._database.read() as connection:
            row = connection.execute(
                f"SELECT {SESSION_COLUMNS} FROM session WHERE number = ?",  # noqa: S608 - no foreign text
                (self.number,),
            ).fetchone()
            if row is None:
                self.stored = Stored(Transcript())
                return self.stored.transcript
            stored = session_of(row)
            path = _path(connection, stored.head, stored.tree)
        self.name = stored.name
        self.model = model or stored.model
        turns = tuple(
            row.turn if row.vocabulary == vocabulary else replace(row.turn, token_ids=()) for row in path
        )
        transcript = Transcript(turns, stored.system, stored.n_left_out, stored.n_shifted)
        self.stored = Stored(transcript, [row.id for row in path], stored.revision)
        return transcript

    def save(self, transcript: Transcript) -> str | None:
        """Make `transcript` durable: it is once this returns. Only what is new is written.

        A session without turns is not stored at all before it has some. If another chat has gone on with this
        session, or deleted it, this one becomes a new session: then the return value says so.

        Raises NoSpaceError, FileError, FormatError; then nothing of it is stored, and the next save has it.
        """
        known = self.stored.transcript
        if self.number == 0 and not transcript.turns:
            self.stored.transcript = transcript
            return None
        if self.number and transcript == known and self.stored.revision is not None:
            return None
        with self._database.write() as connection:
            saving = _Saving(connection, self, transcript)
            saving.run()
        reach("session.saved")
        self.number, self.name, self.stored = saving.number, saving.name, saving.stored
        return saving.note


class _Saving:
    """One save, inside its transaction. The session takes what came of it once that is durable."""

    def __init__(self, connection: sqlite3.Connection, session: Session, transcript: Transcript) -> None:
        self._connection = connection
        self._session = session
        self._transcript = transcript
        self._tree = 0
        self._now = time.time()
        self.number = session.number
        self.name = session.name
        self.stored = Stored(transcript)
        self.note: str | None = None

    def run(self) -> None:
        """Write what is new."""
        before = self._session.stored
        turn_ids = before.turn_ids[: n_common(before.transcript.turns, self._transcript.turns)]
        row = self._connection.execute(
            f"SELECT {SESSION_COLUMNS} FROM session WHERE number = ?",  # noqa: S608 - no foreign text
            (self.number,),
        ).fetchone()
        stored = None if row is None else session_of(row)
        tree = _tree(self._connection, turn_ids[-1]) if turn_ids else None
        if tree is None:
            # Of what was deleted meanwhile, all is new again.
            turn_ids = []
        revision = 1
        if stored is not None and stored.revision == before.revision:
            self.name, self._tree, revision = stored.name, stored.tree, stored.revision + 1
        else:
            self._become_new(None if stored is None else stored.name, tree)
        turn_ids += self._add_turns(turn_ids[-1] if turn_ids else None, len(turn_ids))
        self.stored = Stored(self._transcript, turn_ids, revision)
        self._point_at(self.stored)

    def _become_new(self, changed: str | None, tree: int | None) -> None:
        """A new row: of a new session, a fork, or a session that another chat has changed or deleted."""
        wanted = changed or self._session.name
        name = free_name(self._connection, wanted) if wanted else ""
        if changed is not None:
            self.note = f"another chat has gone on with {changed}: this one is now the session {name}"
        elif self.number:
            self.note = f"{wanted} was deleted elsewhere: this chat is now the session {name}"
        elif name != wanted:
            self.note = f"the name {wanted} is taken: this is now the session {name}"
        self.number, self._tree, self.name = add_session(self._connection, name, tree, self._now)

    def _add_turns(self, parent: int | None, n_before: int) -> list[int]:
        added: list[int] = []
        for depth, turn in enumerate(self._transcript.turns[n_before:], n_before + 1):
            values = row_of(turn, self._session.vocabulary)
            parent = self._connection.execute(
                _ADD_TURN, (parent, self._tree, self.number, depth, self._now, *values)
            ).lastrowid
            assert parent is not None
            self._connection.execute(
                "INSERT INTO search_index (rowid, content) VALUES (?, ?)",
                (parent, indexed(storable(turn.content))),
            )
            added.append(parent)
            reach("session.turn")
        return added

    def _point_at(self, stored: Stored) -> None:
        transcript = stored.transcript
        self._connection.execute(
            "UPDATE session SET head = ?, revision = ?, system = ?, n_left_out = ?, n_shifted = ?, title = ?,"
            " model = ?, updated = ? WHERE number = ?",
            (
                stored.head,
                stored.revision,
                storable(transcript.system),
                transcript.n_left_out,
                transcript.n_shifted,
                _title(transcript.turns),
                storable(self._session.model),
                self._now,
                self.number,
            ),
        )


def add_session(
    connection: sqlite3.Connection, name: str, tree: int | None, now: float
) -> tuple[int, int, str]:
    """A new row, still without turns: number, tree, name. Without a name it is called after its number."""
    number = connection.execute(
        "INSERT INTO session (name, key, tree, revision, system, n_left_out, n_shifted, title, model,"
        " created, updated) VALUES ('', '', 0, 1, '', 0, 0, '', '', ?, ?)",
        (now, now),
    ).lastrowid
    assert number is not None
    tree = tree or number
    name = name or free_name(connection, given_name(number))
    connection.execute(
        "UPDATE session SET name = ?, key = ?, tree = ? WHERE number = ?", (name, key_of(name), tree, number)
    )
    return number, tree, name


def _path(connection: sqlite3.Connection, head: int | None, tree: int) -> list[TurnRow]:
    """The turns that lead to a head, all of them; none without one."""
    if head is None:
        return []
    path = [turn_of(row) for row in connection.execute(_PATH, (head, tree))]
    if not path or [row.depth for row in path] != [*range(1, len(path) + 1)]:
        raise DamagedRowError(f"the turns before turn {head} are not there")
    return path


def _tree(connection: sqlite3.Connection, turn_id: int) -> int | None:
    """The tree of a turn; None if it is not there. If it is, so are those before it: parents go last."""
    row = connection.execute("SELECT tree FROM turn WHERE id = ?", (turn_id,)).fetchone()
    return None if row is None else integer("tree", row[0])


def _title(turns: Sequence[Turn]) -> str:
    text = without_files(next((turn.content for turn in turns if turn.role is Role.USER), ""))
    line = " ".join(storable(text[: 8 * _TITLE]).split())
    return line if len(line) <= _TITLE else f"{line[: _TITLE - 1]}…"
