"""The session database as a file: opening, migrating, transactions, and SQLite's errors in our words.

Knows nothing of what the tables mean.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self

from dsmoe_local.base.durable import make_folders, sync_folder
from dsmoe_local.base.errors import DsmoeError, FileError, FormatError, LockedError, NoSpaceError
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat.store.schema import APPLICATION_ID, MIGRATIONS
from dsmoe_local.chat.store.tally import Tally
from dsmoe_local.chat.store.values import DamagedRowError, integer

FILE_NAME = "sessions.db"
BUSY_SECONDS = 10.0
_WITHOUT = "move it away, or chat with --no-history"

# EXTRA: a commit is on the disk before it returns; also where SQLite cannot have a write-ahead log, and would
# lose one whose journal comes back after a power cut. fullfsync: on macOS fsync stops at the drive's cache.
# secure_delete: what is deleted is overwritten.
_SETTINGS = (
    "PRAGMA trusted_schema = OFF",
    "PRAGMA foreign_keys = ON",
    "PRAGMA synchronous = EXTRA",
    "PRAGMA fullfsync = ON",
    "PRAGMA checkpoint_fullfsync = ON",
    "PRAGMA secure_delete = ON",
)


class Database:
    """An open database. Callable from any thread: writing has one connection, reading another, so that a
    reader never waits for a write to reach the disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tally = Tally(_tally_of(path))
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
        """The database in `folder`; both are made if need be, for their owner only.

        Raises FormatError if it is damaged, of a newer version or none of ours, FileError if it cannot be
        opened.
        """
        path = folder / FILE_NAME
        try:
            make_folders(folder, 0o700)
            folder.chmod(0o700)
            _make_private(path)
        except OSError as error:
            raise FileError(
                f"the sessions cannot be opened: {error.strerror}",
                where=path,
                remedy="make the folder writable, or chat with --no-history",
            ) from error
        return cls(path)

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.path.parent

    def close(self) -> None:
        """Close it, after what other threads are doing. Closing twice is fine."""
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that changes something: durable as a whole when the block ends, undone if it
        raises.
        """
        with self._write_lock, _explained(self.path):
            with _transaction(self._writer, "IMMEDIATE"):
                yield self._writer
                self._writer.execute("UPDATE tally SET n_writes = n_writes + 1")
                n_writes = _n_writes(self._writer)
            self._tally.write(n_writes)

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A transaction that reads: everything in the block sees one state."""
        with self._read_lock, _explained(self.path), _transaction(self._reader, "DEFERRED"):
            yield self._reader

    def empty_log(self) -> None:
        """Move the write-ahead log into the database, if nobody reads: what was deleted is nowhere then."""
        with self._write_lock, _explained(self.path):
            self._writer.execute("PRAGMA wal_checkpoint (TRUNCATE)").fetchall()

    def problems(self) -> list[str]:
        """What is wrong with the file as a whole, for people: what is missing of it may not be missed."""
        # First: what is counted later is in the database by now.
        n_acknowledged = self._tally.read()
        # A connection of its own: one that has used the full-text index takes it for damaged once another one
        # has written to it.
        with closing(_connect(self.path)) as connection, _explained(self.path):
            n_lost = n_acknowledged - _n_writes(connection)
            (found,) = connection.execute("PRAGMA quick_check (1)").fetchone()
        where = safe_line(str(self.path))
        lost = f"what was saved last is lost: {where} is an older copy, or its log is damaged or missing"
        damaged = f"{where} is damaged ({safe_line(found)}): sessions or turns may be missing"
        return [*([lost] if n_lost > 0 else []), *([damaged] if found != "ok" else [])]

    def _migrate(self) -> None:
        newest = len(MIGRATIONS)
        if self._version() == newest:
            return
        with _transaction(self._writer, "IMMEDIATE"):
            # Another chat may have been faster.
            version = self._version()
            if version == 0 and self._writer.execute("SELECT 1 FROM sqlite_schema").fetchone():
                raise FormatError("this is not a database of sessions", where=self.path, remedy=_WITHOUT)
            if version > newest:
                raise FormatError(
                    "the sessions are of a newer version of dsmoe-local",
                    where=f"{self.path}: version {version}, this one reads up to {newest}",
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


def _tally_of(path: Path) -> Path:
    return path.with_suffix(".tally")


def _make_private(path: Path) -> None:
    """The file exists, and is its owner's only; SQLite gives its log the same mode."""
    try:
        # Never opened if it exists: closing it would take away the locks of this process's other connections.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        path.chmod(0o600)
    else:
        # Of one that was moved away.
        _tally_of(path).unlink(missing_ok=True)
        sync_folder(path.parent)


def _connect(path: Path) -> sqlite3.Connection:
    with _explained(path):
        connection = sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        # Bytes that are no text must not hide the rest of a row from those who check it.
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
        # Within: an interruption may come when it has begun and before anything else.
        connection.execute(f"BEGIN {kind}")
        yield
        connection.execute("COMMIT")
    except BaseException:
        # Some errors have ended the transaction already.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


# What we write keeps all rules; a row that does not was there already.
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT})
_TOO_FULL = frozenset({sqlite3.SQLITE_FULL})
_LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """SQLite's errors, and those of rows that make no sense, as ours."""
    try:
        yield
    except sqlite3.Error as error:
        raise _explain(error, path) from error
    except DamagedRowError as error:
        raise _damaged(path, error) from error
    except UnicodeDecodeError as error:
        # Of SQLite's own message, where that quotes what is damaged.
        raise _damaged(path, "it holds text that is none") from error


def _damaged(path: Path, detail: object) -> FormatError:
    return FormatError(f"the database of sessions is damaged: {detail}", where=path, remedy=_WITHOUT)


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
            "another program holds the sessions", where=path, remedy="close it, or chat with --no-history"
        )
    return FileError(f"the sessions cannot be used: {error}", where=path, remedy="chat with --no-history")
