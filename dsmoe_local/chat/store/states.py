"""KV states next to the sessions: files that an engine wrote, each with the state of one block of tokens.

A block is identified by all tokens up to its end, so blocks that are stored are never written again: a
longer conversation adds blocks, and forks share those that they have in common. The tokens after the last
whole block are not stored.

A state only saves time. A damaged one is removed silently, and the tokens of its block and of later blocks
are decoded again.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path

from dsmoe_local.base.durable import locked, make_folders, replace
from dsmoe_local.base.errors import FileError, LockedError
from dsmoe_local.base.faults import reach
from dsmoe_local.base.text import whole_characters
from dsmoe_local.chat.store.database import Database
from dsmoe_local.chat.store.records import (
    DIGEST_BYTES,
    STATE_COLUMNS,
    DamagedRowError,
    StateRow,
    is_state_file,
    pack_ids,
    read_state,
)
from dsmoe_local.engine.errors import EngineError

CAP_BYTES = 4 << 30
SPARE_BYTES = 1 << 30
"""Free space that a new state must leave on the disk."""
BLOCK = 64
"""Tokens in a block: 15 MB for a 16B model, which are written, or decoded again, in about a second."""
_FOLDER = "states"
_PART = ".part"  # the ending of a file that is being written
_CHUNK = 1 << 20


class StateStore:
    """The KV states of the sessions in `folder`, which take at most `cap_bytes`. Keeps no file open.

    Several processes may use a folder at once. All methods raise FormatError or FileError if the session
    database cannot be used, but never because of a state.
    """

    def __init__(self, folder: Path, cap_bytes: int = CAP_BYTES) -> None:
        self._folder = folder
        self._states = states_folder(folder)
        self._cap_bytes = cap_bytes

    def keep(
        self,
        session_number: int,
        fingerprint: str,
        token_ids: Sequence[int],
        write: Callable[[Path, int, int], int],
        stop: Callable[[], bool] = lambda: False,
    ) -> int:
        """Store the states of the whole blocks of `token_ids` that are missing, in order, and remove the
        session's states of other tokens. Return the number of tokens whose state is stored.

        `write(path, start, end)` writes the state of a range of tokens to a new file, with fsync, and returns
        how many of the first `end` tokens the engine has. The call ends early if the engine has too few, if
        `write` fails, if the disk is full or `cap_bytes` are reached, if the session does not exist, or when
        `stop`, which is called before each block, returns true.
        """
        fingerprint = whole_characters(fingerprint)
        blocks = _blocks(token_ids)
        with self._database() as database:
            with database.read() as connection:
                if not _exists(connection, session_number):
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
        """Return the files with the states of the first blocks of `token_ids`, in order, after checking their
        digests. Sessions that are forks of each other share their states.
        """
        fingerprint = whole_characters(fingerprint)
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
        """Remove the least recently used states beyond `cap_bytes`, and the files that crashes left behind.
        Files that another process is writing stay.
        """
        with self._database() as database:
            self._forget_damaged(database)
            self._enforce_cap(database)
            # The rows are read before the files: a file is created before its row.
            with database.read() as connection:
                known = {state.file for state in _states(connection)}
            present = _present(self._states)
            self._remove(database, known - present.keys())
            for file, final in present.items():
                if file not in known:
                    self._remove_orphans(database, final)

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
        """Write a state file and add its row. Return None, and leave neither behind, if that fails."""
        final = self._states / _new_name()
        writing = _part_of(final)
        try:
            with locked(final):
                try:
                    n_held = write(writing, n_tokens - BLOCK, n_tokens)
                    reach("state.written")
                    if n_held < n_tokens or writing.stat().st_size > self._cap_bytes:
                        return None
                    writing.chmod(0o600)
                    n_bytes, digest = _digest_of(writing)
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
        """Remove invalid rows. Their files are not touched: an invalid row may name any file."""
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
            return _digest_of(self._states / state.file) == (state.n_bytes, state.digest)
        except OSError:
            return False

    def _remove(self, database: Database, files: Collection[str]) -> None:
        if files:
            with database.write() as connection:
                connection.executemany("DELETE FROM state WHERE file = ?", [(file,) for file in files])
            remove_states(self._states, files)

    def _remove_orphans(self, database: Database, final: str) -> None:
        """Remove the files that a crash left of this state, unless a process is writing it."""
        try:
            path = self._states / final
            with locked(path):
                # The other process may have finished it in the meantime.
                with database.read() as connection:
                    known = connection.execute("SELECT 1 FROM state WHERE file = ?", (final,)).fetchone()
                orphans = [_part_of(path).name, *([] if known else [final])]
                remove_states(self._states, orphans)
        except (LockedError, OSError):
            return


_OF_FORKS = "session IN (SELECT number FROM session WHERE tree = (SELECT tree FROM session WHERE number = ?))"
_ALL_STATES = f"SELECT rowid, {STATE_COLUMNS} FROM state"  # noqa: S608 - no foreign text


def _exists(connection: sqlite3.Connection, session_number: int) -> bool:
    return (
        connection.execute("SELECT 1 FROM session WHERE number = ?", (session_number,)).fetchone() is not None
    )


def _blocks(token_ids: Sequence[int]) -> list[tuple[int, bytes]]:
    """Return the end of each whole block of tokens, and a digest of all tokens up to there."""
    digest, blocks = hashlib.blake2b(digest_size=DIGEST_BYTES), []
    for end in range(BLOCK, len(token_ids) + 1, BLOCK):
        digest.update(pack_ids(token_ids[end - BLOCK : end]))
        blocks.append((end, digest.digest()))
    return blocks


def _states(connection: sqlite3.Connection, condition: str = "TRUE", *values: object) -> list[StateRow]:
    """Return the valid states that match the condition, the most recently used first.

    Within a conversation, earlier blocks come first, since later ones are useless without them.
    """
    order = "used DESC, n_tokens, rowid DESC"
    rows = connection.execute(f"{_ALL_STATES} WHERE {condition} ORDER BY {order}", values)
    return [state for _, *row in rows if (state := _read(row)) is not None]


def _read(row: Sequence[object]) -> StateRow | None:
    try:
        return read_state(row)
    except DamagedRowError:
        return None


def _record(connection: sqlite3.Connection, state: StateRow) -> bool:
    """Add a row. Return False if the session does not exist any more."""
    if not _exists(connection, state.session):
        return False
    connection.execute(
        "INSERT INTO state (file, session, fingerprint, prefix, n_tokens, n_bytes, digest, used)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        astuple(state),
    )
    return True


def _note_use(database: Database, states: Iterable[StateRow]) -> None:
    """Set the time of last use of all `states` to now."""
    now = time.time()
    with database.write() as connection:
        connection.executemany(
            "UPDATE state SET used = ? WHERE file = ?", [(now, state.file) for state in states]
        )


def states_folder(sessions: Path) -> Path:
    """Return the folder of the states, given that of the sessions."""
    return sessions / _FOLDER


def _new_name() -> str:
    """Return a new random name for a state's file."""
    return f"{secrets.token_hex(8)}.state"


def _part_of(final: Path) -> Path:
    """Return the path of a state's file while it is written."""
    return final.with_name(final.name + _PART)


def _present(folder: Path) -> dict[str, str]:
    """Return the names of the files of states, with parts and locks, each with its state's name."""
    try:
        found = {path.name: _state_of(path.name) for path in folder.iterdir()}
    except OSError:
        return {}
    return {name: final for name, final in found.items() if is_state_file(final)}


def remove_states(folder: Path, names: Iterable[object]) -> None:
    """Remove the files of states, also unfinished ones, and ignore other names. `tidy` tries again to remove
    files that cannot be removed now.
    """
    for name in names:
        if isinstance(name, str) and is_state_file(name.removesuffix(_PART)):
            try:
                (folder / name).unlink(missing_ok=True)
            except OSError:
                continue


def _digest_of(path: Path) -> tuple[int, bytes]:
    """Return the size and the digest of a file."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    n_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            n_bytes += len(chunk)
    return n_bytes, digest.digest()


def _state_of(name: str) -> str:
    """Return the name of the state that a file belongs to."""
    if name.startswith(".") and name.endswith(".lock"):
        return name.removeprefix(".").removesuffix(".lock")
    return name.removesuffix(_PART)
