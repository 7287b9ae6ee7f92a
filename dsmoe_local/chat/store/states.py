"""KV states beside the sessions: files that an engine wrote, each known by its tokens, its size and a digest.

A state is only a shortcut: whatever is wrong with one, it is removed without a word, and the conversation is
read again. What is in the files is the engine's concern.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsmoe_local.base.durable import locked, replace, sync
from dsmoe_local.base.errors import FileError, LockedError
from dsmoe_local.base.faults import reach
from dsmoe_local.chat.store.database import Database
from dsmoe_local.chat.store.deleting import STATES_FOLDER, remove_files
from dsmoe_local.chat.store.rows import pack, storable, unpack
from dsmoe_local.engine.errors import EngineError

CAP_BYTES = 4 << 30
SPARE_BYTES = 1 << 30
"""A state is not written to a disk that would have less room than this afterwards."""
MIN_TOKENS = 16
_MIN_SHARE = 8
"""A state helps if an eighth of its tokens are wanted: reading the file costs less than computing those."""
_ENDING = ".state"
_WRITING = ".part"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class _State:
    file: str
    session: int
    token_ids: tuple[int, ...]
    n_bytes: int
    digest: bytes


class StateStore:
    """The KV states of the sessions in `folder`, of at most `cap_bytes` together. Holds nothing open.

    Any number of programs may use one folder at once. All methods raise FormatError or FileError when the
    session database cannot be used; of a state itself nothing is ever raised.
    """

    def __init__(self, folder: Path, cap_bytes: int = CAP_BYTES) -> None:
        self._folder = folder
        self._states = folder / STATES_FOLDER
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
        fingerprint = storable(fingerprint)
        with self._database() as database:
            with database.read() as connection:
                if not _is_there(connection, session_number):
                    return False
                known = _states(connection, session_number, fingerprint)
                bytes_per_token = _bytes_per_token(connection, fingerprint)
            if any(state.token_ids == tuple(token_ids) for state in known if self._is_whole(state)):
                return True
            expected = round(bytes_per_token * len(token_ids))
            if expected > self._cap_bytes or not self._has_room(expected):
                return False
            final = self._states / f"{secrets.token_hex(8)}{_ENDING}"
            try:
                with locked(final):
                    return self._write(database, session_number, fingerprint, token_ids, write, final)
            except (OSError, FileError, EngineError):
                return False

    def find(self, session_number: int, fingerprint: str, token_ids: Sequence[int]) -> Path | None:
        """The file whose state has most of the beginning of `token_ids`, exactly as it was written; None if
        none helps. Sessions that are forks of each other share their states.
        """
        fingerprint = storable(fingerprint)
        with self._database() as database:
            with database.read() as connection:
                candidates = _states(connection, session_number, fingerprint, forks=True)
            candidates.sort(key=lambda state: n_common(state.token_ids, token_ids), reverse=True)
            for state in candidates:
                n_wanted = n_common(state.token_ids, token_ids)
                if n_wanted < max(MIN_TOKENS, len(state.token_ids) // _MIN_SHARE):
                    return None
                if self._is_exact(state):
                    with database.write() as connection:
                        connection.execute(
                            "UPDATE state SET used = ? WHERE file = ?", (time.time(), state.file)
                        )
                    return self._states / state.file
                self._remove(database, [state.file])
        return None

    def tidy(self) -> None:
        """Remove what is too much, the one longest not used first, and what crashes left; never what another
        chat is writing.
        """
        with self._database() as database:
            self._enforce_cap(database)
            # In this order: a state's file is there before its row.
            with database.read() as connection:
                known = {file for (file,) in connection.execute("SELECT file FROM state")}
            present = self._files()
            self._remove(database, known - present)
            for file in present:
                if file not in known or not _is_final(file):
                    self._tidy_after(database, _final_of(file))

    @contextmanager
    def _database(self) -> Iterator[Database]:
        database = Database.open(self._folder)
        try:
            yield database
        finally:
            database.close()

    def _has_room(self, n_bytes: int) -> bool:
        try:
            self._states.mkdir(mode=0o700, exist_ok=True)
            return shutil.disk_usage(self._states).free >= n_bytes + SPARE_BYTES
        except OSError:
            return False

    def _write(
        self,
        database: Database,
        session_number: int,
        fingerprint: str,
        token_ids: Sequence[int],
        write: Callable[[Path], int],
        final: Path,
    ) -> bool:
        """The new file and its row, then the end of what it replaces. The caller holds the lock."""
        writing = final.with_name(final.name + _WRITING)
        try:
            n_tokens = write(writing)
            reach("state.written")
            if n_tokens <= 0 or writing.stat().st_size > self._cap_bytes:
                return False
            writing.chmod(0o600)
            n_bytes, digest = _digest(writing, durably=True)
            replace(writing, final)
        finally:
            writing.unlink(missing_ok=True)
        reach("state.renamed")
        state = _State(final.name, session_number, tuple(token_ids[:n_tokens]), n_bytes, digest)
        try:
            with database.write() as connection:
                replaced = _record(connection, state, fingerprint)
        except BaseException:
            final.unlink(missing_ok=True)
            raise
        reach("state.recorded")
        if replaced is None:
            final.unlink(missing_ok=True)
            return False
        remove_files(self._folder, replaced)
        self._enforce_cap(database)
        return True

    def _enforce_cap(self, database: Database) -> None:
        with database.read() as connection:
            rows = connection.execute("SELECT file, n_bytes FROM state ORDER BY used DESC, rowid DESC")
            total, too_much = 0, []
            for file, n_bytes in rows:
                total += n_bytes
                if total > self._cap_bytes:
                    too_much.append(file)
        self._remove(database, too_much)

    def _is_whole(self, state: _State) -> bool:
        try:
            return (self._states / state.file).stat().st_size == state.n_bytes
        except OSError:
            return False

    def _is_exact(self, state: _State) -> bool:
        try:
            return self._is_whole(state) and _digest(self._states / state.file) == (
                state.n_bytes,
                state.digest,
            )
        except OSError:
            return False

    def _remove(self, database: Database, files: Sequence[str] | set[str]) -> None:
        if files:
            with database.write() as connection:
                connection.executemany("DELETE FROM state WHERE file = ?", [(file,) for file in files])
            remove_files(self._folder, files)

    def _files(self) -> set[str]:
        """What is there: states, what becomes one, and locks."""
        try:
            return {path.name for path in self._states.iterdir() if _is_final(_final_of(path.name))}
        except OSError:
            return set()

    def _tidy_after(self, database: Database, final: str) -> None:
        """Remove what the writer of this state left; not while it writes."""
        try:
            with locked(self._states / final):
                # It may have finished since we looked.
                with database.read() as connection:
                    known = connection.execute("SELECT 1 FROM state WHERE file = ?", (final,)).fetchone()
                remove_files(self._folder, [final + _WRITING, *([] if known else [final])])
        except (LockedError, OSError):
            return


def _is_final(file: str) -> bool:
    return file.endswith(_ENDING) and not file.startswith(".")


def _final_of(file: str) -> str:
    """The state that a file is, becomes, or is the lock of."""
    if file.startswith(".") and file.endswith(".lock"):
        return file.removeprefix(".").removesuffix(".lock")
    return file.removesuffix(_WRITING)


def n_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids the two have in common at their beginning."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


def _is_there(connection: sqlite3.Connection, session_number: int) -> bool:
    return (
        connection.execute("SELECT 1 FROM session WHERE number = ?", (session_number,)).fetchone() is not None
    )


_OF_SESSION = "session = ?"
_OF_FORKS = "session IN (SELECT number FROM session WHERE tree = (SELECT tree FROM session WHERE number = ?))"


def _states(
    connection: sqlite3.Connection, session_number: int, fingerprint: str, *, forks: bool = False
) -> list[_State]:
    of_whom = _OF_FORKS if forks else _OF_SESSION
    rows = connection.execute(
        f"SELECT file, session, token_ids, n_bytes, digest FROM state"  # noqa: S608 - no foreign text
        f" WHERE {of_whom} AND fingerprint = ? ORDER BY used DESC",
        (session_number, fingerprint),
    )
    return [
        _State(file, session, unpack(packed), n_bytes, digest)
        for file, session, packed, n_bytes, digest in rows
        if len(packed) % 4 == 0
    ]


def _record(connection: sqlite3.Connection, state: _State, fingerprint: str) -> list[str] | None:
    """Add the row, and take away those that it replaces: their files. None if the session is gone."""
    if not _is_there(connection, state.session):
        return None
    replaced = [old.file for old in _states(connection, state.session, fingerprint)]
    connection.executemany("DELETE FROM state WHERE file = ?", [(file,) for file in replaced])
    connection.execute(
        "INSERT INTO state (file, session, fingerprint, token_ids, n_bytes, digest, used)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            state.file,
            state.session,
            fingerprint,
            pack(state.token_ids),
            state.n_bytes,
            state.digest,
            time.time(),
        ),
    )
    return replaced


def _bytes_per_token(connection: sqlite3.Connection, fingerprint: str) -> float:
    """What the largest state of this fingerprint takes; 0 without one."""
    row = connection.execute(
        "SELECT n_bytes, length(token_ids) / 4 FROM state WHERE fingerprint = ?"
        " AND length(token_ids) > 0 ORDER BY n_bytes DESC LIMIT 1",
        (fingerprint,),
    ).fetchone()
    return 0.0 if row is None else row[0] / row[1]


def _digest(path: Path, *, durably: bool = False) -> tuple[int, bytes]:
    """A file's size and digest; on the disk before, if asked for."""
    digest = hashlib.blake2b(digest_size=32)
    n_bytes = 0
    with path.open("rb") as file:
        if durably:
            sync(file.fileno())
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            n_bytes += len(chunk)
    return n_bytes, digest.digest()
