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
    TURN_PLACE,
    WRITTEN,
    SessionRow,
    Settings,
    TurnRow,
    row_of,
    said_of,
    session_of,
    settings_text,
    storable,
    turn_of,
)
from dsmoe_local.chat.store.values import DamagedRowError, check_seal, integer, seal_of
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
_TURN_WRITTEN = ("writer", *TURN_PLACE, *WRITTEN, "seal")
_ADD_TURN = f"""
    INSERT INTO turn ({", ".join(_TURN_WRITTEN)}) VALUES ({", ".join("?" * len(_TURN_WRITTEN))})
"""  # noqa: S608 - no foreign text
_DRAFT = ("session", *WRITTEN, "seal")
_SET_DRAFT = f"""
    INSERT OR REPLACE INTO draft ({", ".join(_DRAFT)}) VALUES ({", ".join("?" * len(_DRAFT))})
"""  # noqa: S608 - no foreign text


@dataclass(slots=True)
class Stored:
    """What this chat knows to be stored: the transcript, the ids of its turns and of those undone, a reply
    that was not finished, the settings, and the revision that this was.
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
    """A conversation in the store. Made by SessionStore; one thread at a time may load and save.

    `number` is 0 until the first turn is saved, and never given to another session. Both `number` and `name`
    change when a save has to go on as a new session. `model`, its file's path and the `settings` are stored
    with what is saved next; None: not known.
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
            path = _branch(connection, stored)
            draft = _draft(connection, self.number)
            if draft is not None and stored.undone is not None:
                raise DamagedRowError("turns are undone behind a reply that is not finished")
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

    def save(self, transcript: Transcript, *, growing: bool = False) -> str | None:
        """Make `transcript` durable: it is once this returns. Only what is new is written.

        `growing`: its last turn is a reply that is not finished, and takes the place of what was last saved
        of it. A session without turns is not stored at all before it has some. If another chat has gone on
        with this session, or deleted it, this one becomes a new session: then the return value says so.

        Raises NoSpaceError, FileError, FormatError; then nothing of it is stored, and the next save has it.
        """
        if self.number == 0 and not transcript.turns:
            self.stored.transcript = transcript
            return None
        draft = None
        if growing:
            *turns, draft = transcript.turns
            transcript = replace(transcript, turns=tuple(turns), undone=())
        known = self.stored
        same = (transcript, draft, self.settings) == (known.transcript, known.draft, known.settings)
        if self.number and same and known.revision is not None:
            return None
        with self._database.write() as connection:
            saving = _Saving(connection, self, transcript, draft)
            saving.run()
        reach("session.grown" if growing else "session.saved")
        self.number, self.name, self.stored = saving.number, saving.name, saving.stored
        return saving.note


class _Saving:
    """One save, inside its transaction. The session takes what came of it once that is durable."""

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
        """Write what is new."""
        before = self._session.stored
        turn_ids = before.turn_ids[: n_common(_all(before.transcript), _all(self._transcript))]
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
        self.stored.turn_ids, self.stored.revision = turn_ids, revision
        self._point_at(self.stored)
        self._set_draft(self.stored.draft)

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
        for depth, turn in enumerate(_all(self._transcript)[n_before:], n_before + 1):
            values = (parent, self._tree, depth, self._now, *row_of(turn, self._session.vocabulary))
            parent = self._connection.execute(_ADD_TURN, (self.number, *values, seal_of(values))).lastrowid
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
            "UPDATE session SET head = ?, undone = ?, revision = ?, system = ?, n_left_out = ?,"
            " n_shifted = ?, title = ?, model = ?, model_path = ?, settings = ?, updated = ?"
            " WHERE number = ?",
            (
                stored.head,
                stored.undone,
                stored.revision,
                storable(transcript.system),
                transcript.n_left_out,
                transcript.n_shifted,
                _title(transcript.turns),
                storable(self._session.model),
                None if self._session.model_path is None else storable(self._session.model_path),
                settings_text(stored.settings),
                self._now,
                self.number,
            ),
        )
        seal_session(self._connection, self.number)

    def _set_draft(self, draft: Turn | None) -> None:
        if draft is None:
            self._connection.execute("DELETE FROM draft WHERE session = ?", (self.number,))
        else:
            values = (self.number, *row_of(draft, self._session.vocabulary))
            self._connection.execute(_SET_DRAFT, (*values, seal_of(values)))


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
    seal_session(connection, number)
    return number, tree, name


def seal_session(connection: sqlite3.Connection, number: int) -> None:
    """Seal a session's row, which has been changed."""
    row = connection.execute(
        f"SELECT {SESSION_COLUMNS} FROM session WHERE number = ?",  # noqa: S608 - no foreign text
        (number,),
    ).fetchone()
    connection.execute("UPDATE session SET seal = ? WHERE number = ?", (seal_of(row[:-1]), number))


def _branch(connection: sqlite3.Connection, session: SessionRow) -> list[TurnRow]:
    """The turns that lead to a session's head, and behind it those that were undone."""
    path = _path(connection, session.head, session.tree)
    if session.undone is None:
        return path
    whole = _path(connection, session.undone, session.tree)
    if len(whole) <= len(path) or [row.id for row in whole[: len(path)]] != [row.id for row in path]:
        raise DamagedRowError(f"turn {session.undone} does not follow turn {session.head}")
    return whole


def _path(connection: sqlite3.Connection, head: int | None, tree: int) -> list[TurnRow]:
    """The turns that lead to a head, all of them; none without one."""
    if head is None:
        return []
    path = [turn_of(row) for row in connection.execute(_PATH, (head, tree))]
    if not path or [row.depth for row in path] != [*range(1, len(path) + 1)]:
        raise DamagedRowError(f"the turns before turn {head} are not there")
    return path


def _draft(connection: sqlite3.Connection, number: int) -> tuple[str | None, Turn] | None:
    """The reply that a session's head has so far, with the vocabulary of its token ids."""
    row = connection.execute(
        f"SELECT {', '.join(_DRAFT)} FROM draft WHERE session = ?",  # noqa: S608 - no foreign text
        (number,),
    ).fetchone()
    if row is None:
        return None
    *values, seal = row
    check_seal(f"the last reply of session {number}", seal, values)
    return said_of(values[1:])


def _turn_for(vocabulary: str, of: str | None, turn: Turn) -> Turn:
    """A turn as one who has that vocabulary may use it."""
    return turn if of == vocabulary else replace(turn, token_ids=())


def _all(transcript: Transcript) -> tuple[Turn, ...]:
    return (*transcript.turns, *transcript.undone)


def _tree(connection: sqlite3.Connection, turn_id: int) -> int | None:
    """The tree of a turn; None if it is not there. If it is, so are those before it: parents go last."""
    row = connection.execute("SELECT tree FROM turn WHERE id = ?", (turn_id,)).fetchone()
    return None if row is None else integer("tree", row[0])


def _title(turns: Sequence[Turn]) -> str:
    text = without_files(next((turn.content for turn in turns if turn.role is Role.USER), ""))
    line = " ".join(storable(text[: 8 * _TITLE]).split())
    return line if len(line) <= _TITLE else f"{line[: _TITLE - 1]}…"
