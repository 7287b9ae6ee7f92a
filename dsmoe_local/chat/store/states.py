"""KV states beside the sessions: files that an engine wrote, each with the state of one block of tokens.

A block is known by all tokens up to its end, its size and a digest of its file. So what is there is never
written again: a conversation that goes on adds blocks, and forks share those that they have in common. What
is behind the last whole block is not kept.

A state is only a shortcut: whatever is wrong with one, it is removed without a word, and the conversation is
read again from there. What is in the files is the engine's concern.
"""

from __future__ import annotations

import hashlib
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
from dsmoe_local.chat.store import state_files
from dsmoe_local.chat.store.database import Database
from dsmoe_local.chat.store.rows import STATE_COLUMNS, StateRow, pack, state_of, storable
from dsmoe_local.chat.store.values import DamagedRowError
from dsmoe_local.engine.errors import EngineError

CAP_BYTES = 4 << 30
SPARE_BYTES = 1 << 30
"""A state is not written to a disk that would have less room than this afterwards."""
BLOCK = 64
"""Tokens: 15 MB of a 16B model, which nobody waits long for, and which are read again in a second."""


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
        write: Callable[[Path, int, int], int],
        stop: Callable[[], bool] = lambda: False,
    ) -> int:
        """Store the state of the whole blocks of `token_ids` that are not there yet, in their order, and drop
        those of this fingerprint that the session has of other tokens. Returns how many tokens are stored.

        `write(path, start, end)` makes a new file of that path with the state of these tokens, synced, and
        returns how many of the first `end` tokens the engine has: if fewer, there is no such block. That, an
        error of it, the room on the disk, the cap, a session that is not there and `stop`, which is asked
        before each block, end it early.
        """
        fingerprint = storable(fingerprint)
        blocks = _blocks(token_ids)
        with self._database() as database:
            with database.read() as connection:
                if not _is_there(connection, session_number):
                    return 0
                alike = _states(connection, "fingerprint = ?", fingerprint)
                shared = _states(connection, f"fingerprint = ? AND {_OF_FORKS}", fingerprint, session_number)
            known = {state.prefix: state for state in shared if self._is_whole(state)}
            n_expected = max((state.n_bytes for state in alike), default=0)
            chain: list[StateRow] = []
            for n_tokens, prefix in blocks:
                state = known.get(prefix)
                if state is None:
                    n_total = sum(each.n_bytes for each in chain) + n_expected
                    if stop() or n_total > self._cap_bytes or not self._has_room(n_expected):
                        break
                    state = self._write(database, session_number, fingerprint, n_tokens, prefix, write)
                    if state is None:
                        break
                    n_expected = max(n_expected, state.n_bytes)
                chain.append(state)
            _note_use(database, chain)
            if not stop():
                wanted = {prefix for _, prefix in blocks}
                ours = (state for state in shared if state.session == session_number)
                self._remove(database, [state.file for state in ours if state.prefix not in wanted])
            self._enforce_cap(database)
        return chain[-1].n_tokens if chain else 0

    def find(self, session_number: int, fingerprint: str, token_ids: Sequence[int]) -> list[Path]:
        """The files that together have the state of the beginning of `token_ids`, in their order, each
        exactly as it was written. Sessions that are forks of each other share their states.
        """
        fingerprint = storable(fingerprint)
        chain: list[StateRow] = []
        with self._database() as database:
            self._forget_damaged(database)
            with database.read() as connection:
                states = _states(connection, f"fingerprint = ? AND {_OF_FORKS}", fingerprint, session_number)
            for _, prefix in _blocks(token_ids):
                alike = [state for state in states if state.prefix == prefix]
                exact = next((state for state in alike if self._is_exact(state)), None)
                if exact is None:
                    self._remove(database, [state.file for state in alike])
                    break
                chain.append(exact)
            _note_use(database, chain)
        return [self._states / state.file for state in chain]

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
        n_tokens: int,
        prefix: bytes,
        write: Callable[[Path, int, int], int],
    ) -> StateRow | None:
        """A new file and its row; None, and neither, if there is no such block or it cannot be stored."""
        final = self._states / state_files.new_name()
        writing = state_files.writing_of(final)
        try:
            with locked(final):
                try:
                    n_held = write(writing, n_tokens - BLOCK, n_tokens)
                    reach("state.written")
                    if n_held < n_tokens or writing.stat().st_size > self._cap_bytes:
                        return None
                    writing.chmod(0o600)
                    n_bytes, digest = state_files.digest_of(writing)
                    replace(writing, final)
                finally:
                    writing.unlink(missing_ok=True)
                reach("state.renamed")
                state = StateRow(
                    final.name, session_number, fingerprint, prefix, n_tokens, n_bytes, digest, time.time()
                )
                try:
                    with database.write() as connection:
                        recorded = _record(connection, state)
                except BaseException:
                    final.unlink(missing_ok=True)
                    raise
                reach("state.recorded")
                if not recorded:
                    final.unlink(missing_ok=True)
                return state if recorded else None
        except (OSError, FileError, EngineError):
            return None

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


def _blocks(token_ids: Sequence[int]) -> list[tuple[int, bytes]]:
    """For each whole block of tokens its end, and a digest of all tokens up to there."""
    digest, blocks = hashlib.blake2b(digest_size=state_files.DIGEST_BYTES), []
    for end in range(BLOCK, len(token_ids) + 1, BLOCK):
        digest.update(pack(token_ids[end - BLOCK : end]))
        blocks.append((end, digest.digest()))
    return blocks


def _states(connection: sqlite3.Connection, condition: str = "TRUE", *values: object) -> list[StateRow]:
    """The states with that condition, the one used last first, without rows that make no sense. Of one
    conversation the beginning comes first, without which the rest is of no use.
    """
    order = "used DESC, n_tokens, rowid DESC"
    rows = connection.execute(f"{_ALL_STATES} WHERE {condition} ORDER BY {order}", values)
    return [state for _, *row in rows if (state := _read(row)) is not None]


def _read(row: Sequence[object]) -> StateRow | None:
    try:
        return state_of(row)
    except DamagedRowError:
        return None


def _record(connection: sqlite3.Connection, state: StateRow) -> bool:
    """Add the row; False if the session is gone."""
    if not _is_there(connection, state.session):
        return False
    connection.execute(
        "INSERT INTO state (file, session, fingerprint, prefix, n_tokens, n_bytes, digest, used)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            state.file,
            state.session,
            state.fingerprint,
            state.prefix,
            state.n_tokens,
            state.n_bytes,
            state.digest,
            state.used,
        ),
    )
    return True


def _note_use(database: Database, states: Iterable[StateRow]) -> None:
    """All of them at one moment."""
    now = time.time()
    with database.write() as connection:
        connection.executemany(
            "UPDATE state SET used = ? WHERE file = ?", [(now, state.file) for state in states]
        )
