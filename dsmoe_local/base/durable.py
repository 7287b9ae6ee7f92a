"""Files that survive a crash: sync, atomic replacement, locks, and an append-only journal."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from dsmoe_local.base.errors import DISK_FULL, FileError, LockedError, NoSpaceError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line

# The errors of a file system that does not support a call. Any other, such as EIO, means that data is lost.
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY})
_CHECKSUM = 9  # bytes before the entry in a journal's line: the checksum and a space


# What to do if an output cannot be written. ENOENT: in /proc and similar file systems, files cannot be made.
_REMEDIES = {
    **dict.fromkeys(DISK_FULL, "free some space, then run the same command to continue"),
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR),
        "name an output in a folder that you may write to",
    ),
    errno.ENAMETOOLONG: "use a shorter name",
}


@contextmanager
def output_errors(out: Path) -> Iterator[None]:
    """Raise an OSError of the block, which writes the output `out`, as FileError or NoSpaceError."""
    try:
        yield
    except OSError as error:
        kind = NoSpaceError if error.errno in DISK_FULL else FileError
        raise kind(
            f"the output cannot be written: {error.strerror or error}",
            where=error.filename or out,
            remedy=_REMEDIES.get(error.errno or 0, ""),
        ) from error


def sync(descriptor: int) -> None:
    """Sync a file's content to the disk. An error is fatal: the kernel may have dropped dirty pages."""
    if sys.platform == "darwin":
        # fsync on macOS only reaches the drive's cache. Network and FUSE volumes support nothing better.
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        else:
            return
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries (a rename, a new file) to the disk, if the file system supports that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def same_file(first: Path, second: Path) -> bool:
    """True if two paths lead to the same file. Compares device and inode, so links of either kind count."""
    try:
        return os.path.samestat(first.stat(), second.stat())
    except FileNotFoundError:
        return False


def replace(temporary: Path, final: Path) -> None:
    """Rename a synced file to its final name, durably. It replaces an existing file atomically."""
    temporary.replace(final)
    sync_folder(final.parent)


def make_folders(folder: Path, mode: int = 0o777) -> None:
    """Make `folder` and its missing parents durably, each with `mode`. Raises OSError."""
    if not folder.parent.is_dir():
        make_folders(folder.parent, mode)
    try:
        folder.mkdir(mode)
    except OSError:
        # On a read-only file system, an existing folder gives another error than FileExistsError.
        if not folder.is_dir():
            raise
    else:
        sync_folder(folder.parent)


def publish(temporary: Path, final: Path) -> None:
    """Rename a synced file to a name that does not exist, durably.

    Raises FileExistsError if it does exist.
    """
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except OSError as error:
        # Some disks have no hard links. A rename would replace an existing file, so check first.
        if os.path.lexists(final):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from error
        temporary.rename(final)
    else:
        temporary.unlink()
    sync_folder(final.parent)


def write_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a small file atomically and durably: after a crash it has the old content or the new one."""
    # A random name and O_EXCL: otherwise somebody could place a link there, which would be followed, or a
    # file, which would keep its own mode.
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_at_most(path: Path, limit: int) -> bytes:
    """Return a file's content, or its first `limit` + 1 bytes if it is larger than `limit`.

    Raises OSError.
    """
    with path.open("rb") as file:
        # `read` allocates all that it is asked for. A pipe's size is unknown.
        status = os.fstat(file.fileno())
        return file.read(min(status.st_size, limit) + 1 if stat.S_ISREG(status.st_mode) else limit + 1)


def read_into(buffer: memoryview, descriptor: int, offset: int) -> None:
    """Fill `buffer` from byte `offset` of an open file. Raises OSError, EOFError if the file is too short."""
    while buffer:
        n_read = os.preadv(descriptor, [buffer], offset)
        if not n_read:
            raise EOFError
        buffer, offset = buffer[n_read:], offset + n_read


def require_space(
    folder: Path, n_bytes: int, remedy: str = "free some space, or name an output on another disk"
) -> None:
    """Raise NoSpaceError unless the disk of `folder` has `n_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise NoSpaceError(
            f"not enough disk space: {format_size(n_bytes)} needed, {format_size(free)} free",
            where=folder,
            remedy=remedy,
        )


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock for writing `output`.

    Raises LockedError, which names the lock file, if another run holds it. OSError, which names `output`, if
    nothing can be written beside it.
    """
    path = output.with_name(f".{output.name}.lock")
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(output)) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise LockedError(
                f"another run is writing {safe_line(output.name)}",
                where=f"lock: {path}",
                remedy="wait for it to end, or name another output",
            ) from error
        # The previous holder may have removed the file between our open and our lock.
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


class Journal:
    """An append-only file of JSON lines. `append` returns once its entries are synced.

    Each line begins with a checksum of its entry and all entries before it, so changed, missing and reordered
    lines are detected. An incomplete last line, left by a crash, is removed when the journal is opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a+b")
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            self._file.truncate(whole)
        self.entries: list[Any] = []
        self._checksum = 0
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            entry = line[_CHECKSUM:]
            if line != self._line(entry):
                self._file.close()
                raise FileError(
                    "the journal is damaged", where=f"{path}, line {number}", remedy="remove it to start over"
                )
            self.entries.append(json.loads(entry))

    def append(self, *entries: object) -> None:
        """Append entries and sync the file."""
        for entry in entries:
            self._file.write(self._line(json.dumps(entry, separators=(",", ":")).encode()) + b"\n")
        self._file.flush()
        sync(self._file.fileno())
        self.entries.extend(entries)

    def _line(self, entry: bytes) -> bytes:
        """Return the next line: the checksum, then the entry."""
        self._checksum = zlib.crc32(entry, self._checksum)
        return b"%08x " % self._checksum + entry

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
