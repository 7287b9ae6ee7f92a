"""KV states beside the sessions: files that an engine wrote, each known by its tokens, its size and a digest.

A state is only a shortcut: whatever is wrong with one, it is removed without a word, and the conversation is
read again. What is in the files is the engine's concern.
"""

from __future__ import annotations

import itertools
import shutil
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dsmoe_local.base.durable import locked, make_folders, replace
from dsmoe_local.base.errors import FileError, LockedError
from dsmoe_local.base.faults import reach
from dsmoe_local.base.sequences import n_common
from dsmoe_local.chat.store import state_files
from dsmoe_local.chat.store.database import Database
from dsmoe_local.chat.store.rows import STATE_COLUMNS, StateRow, pack, state_of, storable
from dsmoe_local.chat.store.values import DamagedRowError
from dsmoe_local.engine.errors import EngineError

CAP_BYTES = 4 << 30
SPARE_BYTES = 1 << 30
"""A state is not written to a disk that would have less room than this afterwards."""
MIN_TOKENS = 16
_MIN_SHARE = 8
"""A state helps if an eighth of its tokens are wanted: reading the file costs less than computing those."""


class StateStore:
    """The KV states of the sessions in `folder`, of at most `cap_bytes` together. Holds nothing open.

    Any number of programs may use one folder at once. All methods raise FormatError or FileError when the
    session database cannot be used; of a state itself nothing is ever raised.
    """

    def __init__(self, folder: Path, cap_bytes: int = CAP_BYTES) -> None:
        self._folder = folder
        self._states = state_files.states_folder(folder)
        self._cap_bytes = cap_bytes

    def keep(
        self,
        session_number: int,
        fingerprint: str,
        token_ids: Sequence[int],
        write: Callable[[Path], int],
    ) -> bool:
        """Store the state of `token_ids`, in place of what the session had of this fingerprint.

        `write` makes a new file of that path, and returns how many of the ids it holds; 0: there is none.
        False if nothing is stored: because of that or its error, the room on the disk, the cap, or a session
        that is not there.
        """
        fingerprint, ids = storable(fingerprint), tuple(token_ids)
        with self._database() as database:
            with database.read() as connection:
                if not _is_there(connection, session_number):
                    return False
                alike = _states(connection, "fingerprint = ?", fingerprint)
            known = [state for state in alike if state.session == session_number and state.token_ids == ids]
            if whole := next((state for state in known if self._is_whole(state)), None):
                _note_use(database, whole)
                return True
            expected = round(_bytes_per_token(alike) * len(ids))
            if expected > self._cap_bytes or not self._has_room(expected):
                return False
            final = self._states / state_files.new_name()
            try:
                with locked(final):
                    return self._write(database, session_number, fingerprint, ids, write, final)
            except (OSError, FileError, EngineError):
                return False

    def find(self, session_number: int, fingerprint: str, token_ids: Sequence[int]) -> Path | None:
        """The file whose state has most of the beginning of `token_ids`, exactly as it was written; None if
        none helps. Sessions that are forks of each other share their states.
        """
        fingerprint, ids = storable(fingerprint), tuple(token_ids)
        with self._database() as database:
            self._forget_damaged(database)
            with database.read() as connection:
                states = _states(connection, f"fingerprint = ? AND {_OF_FORKS}", fingerprint, session_number)
            candidates = [(n_common(state.token_ids, ids), state) for state in states]
            # Of two that hold as much of it, the one that holds less beside it.
            candidates.sort(key=lambda each: (-each[0], len(each[1].token_ids)))
            for n_wanted, state in candidates:
                if n_wanted < max(MIN_TOKENS, len(state.token_ids) // _MIN_SHARE):
                    continue
                if self._is_exact(state):
                    _note_use(database, state)
                    return self._states / state.file
                self._remove(database, [state.file])
        return None

    def tidy(self) -> None:
        """Remove what is too much, the one longest not used first, and what crashes left; never what another
        chat is writing.
        """
        with self._database() as database:
            self._forget_damaged(database)
            self._enforce_cap(database)
            # In this order: a state's file is there before its row.
            with database.read() as connection:
                known = {state.file for state in _states(connection)}
            present = state_files.present(self._states)
            self._remove(database, known - present.keys())
            for file, final in present.items():
                if file not in known:
                    self._tidy_after(database, final)

    @contextmanager
    def _database(self) -> Iterator[Database]:
        database = Database.open(self._folder)
        try:
            yield database
        finally:
            database.close()

    def _has_room(self, n_bytes: int) -> bool:
        try:
            make_folders(self._states, 0o700)
            return shutil.disk_usage(self._states).free >= n_bytes + SPARE_BYTES
        except OSError:
            return False

    def _write(
        self,
        database: Database,
        session_number: int,
        fingerprint: str,
        token_ids: tuple[int, ...],
        write: Callable[[Path], int],
        final: Path,
    ) -> bool:
        """The new file and its row, then the end of what it replaces. The caller holds the lock."""
        writing = state_files.writing_of(final)
        try:
            n_tokens = write(writing)
            reach("state.written")
            if n_tokens <= 0 or writing.stat().st_size > self._cap_bytes:
                return False
            writing.chmod(0o600)
            n_bytes, digest = state_files.digest_of(writing, durably=True)
            replace(writing, final)
        finally:
            writing.unlink(missing_ok=True)
        reach("state.renamed")
        state = StateRow(
            final.name, session_number, fingerprint, token_ids[:n_tokens], n_bytes, digest, time.time()
        )
        try:
            with database.write() as connection:
                replaced = _record(connection, state)
        except BaseException:
            final.unlink(missing_ok=True)
            raise
        reach("state.recorded")
        if replaced is None:
            final.unlink(missing_ok=True)
            return False
        state_files.remove(self._states, replaced)
        self._enforce_cap(database)
        return True

    def _enforce_cap(self, database: Database) -> None:
        with database.read() as connection:
            states = _states(connection)
        totals = itertools.accumulate(state.n_bytes for state in states)
        pairs = zip(states, totals, strict=True)
        self._remove(database, [state.file for state, total in pairs if total > self._cap_bytes])

    def _forget_damaged(self, database: Database) -> None:
        """Take away the rows that make no sense. What they call their file is not looked at."""
        with database.read() as connection:
            damaged = [(rowid,) for rowid, *row in connection.execute(_ALL_STATES) if _read(row) is None]
        if damaged:
            with database.write() as connection:
                connection.executemany("DELETE FROM state WHERE rowid = ?", damaged)

    def _is_whole(self, state: StateRow) -> bool:
        try:
            return (self._states / state.file).stat().st_size == state.n_bytes
        except OSError:
            return False

    def _is_exact(self, state: StateRow) -> bool:
        if not self._is_whole(state):
            return False
        try:
            return state_files.digest_of(self._states / state.file) == (state.n_bytes, state.digest)
        except OSError:
            return False

    def _remove(self, database: Database, files: Collection[str]) -> None:
        if files:
            with database.write() as connection:
                connection.executemany("DELETE FROM state WHERE file = ?", [(file,) for file in files])
            state_files.remove(self._states, files)

    def _tidy_after(self, database: Database, final: str) -> None:
        """Remove what the writer of this state left; not while it writes."""
        try:
            path = self._states / final
            with locked(path):
                # It may have finished since we looked.
                with database.read() as connection:
                    known = connection.execute("SELECT 1 FROM state WHERE file = ?", (final,)).fetchone()
                orphans = [state_files.writing_of(path).name, *([] if known else [final])]
                state_files.remove(self._states, orphans)
        except (LockedError, OSError):
            return


_OF_FORKS = "session IN (SELECT number FROM session WHERE tree = (SELECT tree FROM session WHERE number = ?))"
_ALL_STATES = f"SELECT rowid, {STATE_COLUMNS} FROM state"  # noqa: S608 - no foreign text


def _is_there(connection: sqlite3.Connection, session_number: int) -> bool:
    return (
        connection.execute("SELECT 1 FROM session WHERE number = ?", (session_number,)).fetchone() is not None
    )


def _states(connection: sqlite3.Connection, condition: str = "TRUE", *values: object) -> list[StateRow]:
    """The states with that condition, the one used last first, without rows that make no sense."""
    rows = connection.execute(f"{_ALL_STATES} WHERE {condition} ORDER BY used DESC, rowid DESC", values)
    return [state for _, *row in rows if (state := _read(row)) is not None]


def _read(row: Sequence[object]) -> StateRow | None:
    try:
        return state_of(row)
    except DamagedRowError:
        return None


def _record(connection: sqlite3.Connection, state: StateRow) -> list[str] | None:
    """Add the row, and take away those that it replaces: their files. None if the session is gone."""
    if not _is_there(connection, state.session):
        return None
    of_same = "session = ? AND fingerprint = ?", state.session, state.fingerprint
    replaced = [old.file for old in _states(connection, *of_same)]
    connection.executemany("DELETE FROM state WHERE file = ?", [(file,) for file in replaced])
    connection.execute(
        "INSERT INTO state (file, session, fingerprint, token_ids, n_bytes, digest, used)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            state.file,
            state.session,
            state.fingerprint,
            pack(state.token_ids),
            state.n_bytes,
            state.digest,
            state.used,
        ),
    )
    return replaced


def _note_use(database: Database, state: StateRow) -> None:
    with database.write() as connection:
        connection.execute("UPDATE state SET used = ? WHERE file = ?", (time.time(), state.file))


def _bytes_per_token(states: Iterable[StateRow]) -> float:
    """What the largest of the states takes; 0 without one."""
    sizes = [(state.n_bytes, len(state.token_ids)) for state in states if state.token_ids]
    return max(sizes)[0] / max(sizes)[1] if sizes else 0.0
