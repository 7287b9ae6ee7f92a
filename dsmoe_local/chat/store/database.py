"""The file of the session database: open it, migrate it, run transactions, and translate SQLite errors."""

from __future__ import annotations

import os
import sqlite3
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self

from dsmoe_local.base.durable import make_folders, sync, sync_folder
from dsmoe_local.base.errors import DsmoeError, FileError, FormatError, LockedError, NoSpaceError, file_errors
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat.store.records import DamagedRowError, integer
from dsmoe_local.chat.store.schema import APPLICATION_ID, MIGRATIONS

FILE_NAME = "sessions.db"
BUSY_SECONDS = 10.0
_STEPS_BETWEEN_CHECKS = 1000  # instructions of SQLite, far less than a second
_RECORD = struct.Struct("<QI")  # the number, and its checksum
_NUMBER = struct.Struct("<Q")
_REMEDY = "move it away, or chat with --no-history"

# EXTRA: a commit is on the disk before it returns, even where SQLite falls back from a write-ahead log to a
# rollback journal. fullfsync: on macOS, fsync alone does not flush the drive's cache. secure_delete: deleted
# content is overwritten.
_SETTINGS = (
    "PRAGMA trusted_schema = OFF",
    "PRAGMA foreign_keys = ON",
    "PRAGMA synchronous = EXTRA",
    "PRAGMA fullfsync = ON",
    "PRAGMA checkpoint_fullfsync = ON",
    "PRAGMA secure_delete = ON",
)


class Tally:
    """The number of durable transactions, in a file next to the database, to detect a lost write-ahead log.

    SQLite opens a database whose log is missing or damaged as if the transactions in it had never happened.
    This file is written after each transaction: if the database has had fewer, some are lost. It may have had
    more, after a kill between the two writes or when two processes wrote at once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> int:
        """Return the number, or 0 if there is no valid file."""
        try:
            number, checksum = _RECORD.unpack(self._path.read_bytes())
        except (OSError, struct.error):
            return 0
        return int(number) if zlib.crc32(_NUMBER.pack(number)) == checksum else 0

    def write(self, number: int) -> None:
        """Write the number, durably."""
        record = _RECORD.pack(number, zlib.crc32(_NUMBER.pack(number)))
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.pwrite(descriptor, record, 0)
                sync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            # The transaction itself is durable; only its loss could not be detected.
            return


class Database:
    """An open database. All methods may be called from any thread.

    Reads and writes have separate connections, so that a read never waits for a write to reach the disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tally = Tally(_tally_path(path))
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._writer = _connect(path)
        try:
            with _explained(path):
                self._writer.execute("PRAGMA journal_mode = WAL")
                self._migrate()
            self._reader = _connect(path)
        except BaseException:
            self._writer.close()
            raise

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open the database in `folder`. Create both, accessible to their owner only, if they do not exist.

        Raises FormatError if the file is damaged, from a newer version, or not a database of sessions;
        FileError if it cannot be opened.
        """
        path = folder / FILE_NAME
        with file_errors(
            "the sessions cannot be opened", path, "make the folder writable, or chat with --no-history"
        ):
            make_folders(folder, 0o700)
            folder.chmod(0o700)
            _make_private(path)
        return cls(path)

    @property
    def folder(self) -> Path:
        """The folder of the database."""
        return self.path.parent

    def close(self) -> None:
        """Close the database, after calls in other threads have ended. May be called twice."""
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Run a write transaction: durable when the block ends, rolled back if it raises."""
        with self._write_lock, _explained(self.path):
            with _transaction(self._writer, "IMMEDIATE"):
                yield self._writer
                self._writer.execute("UPDATE tally SET n_writes = n_writes + 1")
                n_writes = _n_writes(self._writer)
            self._tally.write(n_writes)

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Run a read transaction: all queries in the block see the same state."""
        with self._read_lock, _explained(self.path), _transaction(self._reader, "DEFERRED"):
            yield self._reader

    def empty_log(self) -> None:
        """Move the write-ahead log into the database, unless it is being read, to erase deleted content."""
        with self._write_lock, _explained(self.path):
            self._writer.execute("PRAGMA wal_checkpoint (TRUNCATE)").fetchall()

    def problems(self, stop: threading.Event) -> list[str]:
        """Return messages about damage that could go unnoticed. Reads the whole file, at about 100 MB/s.

        FileError once `stop` is set.
        """
        # Read first: every transaction that it counts is in the database by then.
        n_acknowledged = self._tally.read()
        # A separate connection: one that has used the full-text index reports it as damaged once another
        # connection has written to it.
        with closing(_connect(self.path)) as connection, _explained(self.path):
            connection.set_progress_handler(stop.is_set, _STEPS_BETWEEN_CHECKS)
            n_lost = n_acknowledged - _n_writes(connection)
            (found,) = connection.execute("PRAGMA quick_check (1)").fetchone()
        where = safe_line(str(self.path))
        lost = f"the last changes are lost: {where} is an older copy, or its log is damaged or missing"
        damaged = f"{where} is damaged ({safe_line(found)}): sessions or turns may be missing"
        return [*([lost] if n_lost > 0 else []), *([damaged] if found != "ok" else [])]

    def _migrate(self) -> None:
        newest = len(MIGRATIONS)
        if self._version() == newest:
            return
        with _transaction(self._writer, "IMMEDIATE"):
            # Another process may have migrated it since.
            version = self._version()
            if version == 0 and self._writer.execute("SELECT 1 FROM sqlite_schema").fetchone():
                raise FormatError("this is not a database of sessions", where=self.path, remedy=_REMEDY)
            if version > newest:
                raise FormatError(
                    "the sessions were saved by a newer version of dsmoe-local",
                    where=f"{self.path}: format {version}, this version reads up to {newest}",
                    remedy="upgrade, or chat with --no-history",
                )
            for statements in MIGRATIONS[version:]:
                for statement in statements:
                    self._writer.execute(statement)
            self._writer.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._writer.execute(f"PRAGMA user_version = {newest}")

    def _version(self) -> int:
        (application,) = self._writer.execute("PRAGMA application_id").fetchone()
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        return int(version) if application in (0, APPLICATION_ID) else 0


def _n_writes(connection: sqlite3.Connection) -> int:
    row = connection.execute("SELECT n_writes FROM tally").fetchone()
    return 0 if row is None else integer("n_writes", row[0])


def _tally_path(path: Path) -> Path:
    return path.with_suffix(".tally")


def _make_private(path: Path) -> None:
    """Restrict the file to its owner; create it if it is missing. SQLite's log gets the same mode."""
    try:
        # An existing file is not opened: closing it would release the locks of other connections.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        path.chmod(0o600)
    else:
        # A tally that exists belongs to a database that was moved away.
        _tally_path(path).unlink(missing_ok=True)
        sync_folder(path.parent)


def _connect(path: Path) -> sqlite3.Connection:
    with _explained(path):
        connection = sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        # Invalid UTF-8 in one column must not prevent reading the others.
        connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
        try:
            for setting in _SETTINGS:
                connection.execute(setting)
        except BaseException:
            connection.close()
            raise
        return connection


@contextmanager
def _transaction(connection: sqlite3.Connection, kind: str) -> Iterator[None]:
    try:
        # Inside `try`, since an interrupt may arrive right after it.
        connection.execute(f"BEGIN {kind}")
        yield
        connection.execute("COMMIT")
    except BaseException:
        # Some errors have already ended the transaction.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


# Values that are written satisfy all constraints, so only damaged rows can violate one.
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT})
_TOO_FULL = frozenset({sqlite3.SQLITE_FULL})
_LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise SQLite errors, and DamagedRowError, as DsmoeErrors."""
    try:
        yield
    except sqlite3.Error as error:
        raise _explain(error, path) from error
    except DamagedRowError as error:
        raise _damaged(path, error) from error
    except UnicodeDecodeError as error:
        # SQLite's error message quotes damaged text.
        raise _damaged(path, "it holds invalid text") from error


def _damaged(path: Path, detail: object) -> FormatError:
    return FormatError(f"the database of sessions is damaged: {detail}", where=path, remedy=_REMEDY)


def _explain(error: sqlite3.Error, path: Path) -> DsmoeError:
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    if code in _DAMAGED:
        return _damaged(path, error)
    if code in _TOO_FULL:
        return NoSpaceError(
            "the disk is full: the session is not saved", where=path, remedy="free some space"
        )
    if code in _LOCKED:
        return LockedError(
            "another program has locked the sessions",
            where=path,
            remedy="close it, or chat with --no-history",
        )
    return FileError(
        f"the sessions cannot be read or written: {error}", where=path, remedy="chat with --no-history"
    )
