"""Files that survive a crash: sync, atomic replacement, locks and an append-only journal. Knows no format."""

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
from types import TracebackType
from typing import Any, Self

from dsmoe_local.base.errors import FileError, LockedError, NoSpaceError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line

# How a file system says that it does not know a call. All else, EIO above all, means that data is lost.
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY})
_CHECKSUM = 9  # characters of a journal's line before its entry


def sync(descriptor: int) -> None:
    """Force a file's content to the medium. An error is fatal: the kernel may have dropped dirty pages."""
    if sys.platform == "darwin":
        # fsync on macOS stops at the drive's cache. Network and FUSE volumes know nothing better.
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        else:
            return
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (a rename, a new file) to the medium, where the file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def same_file(first: Path, second: Path) -> bool:
    """Whether two paths lead to one file: by device and inode, so through links of either kind."""
    try:
        return os.path.samestat(first.stat(), second.stat())
    except FileNotFoundError:
        return False


def replace(temporary: Path, final: Path) -> None:
    """Give a synced file its final name, durably. What was there before stays until this very step."""
    temporary.replace(final)
    sync_folder(final.parent)


def make_folders(folder: Path, mode: int = 0o777) -> None:
    """Make `folder`, and those above it that are missing, durably and each with `mode`. OSError if it cannot
    be made.
    """
    if not folder.parent.is_dir():
        make_folders(folder.parent, mode)
    try:
        folder.mkdir(mode)
    except OSError:
        # Some systems refuse to write before they say that it exists.
        if not folder.is_dir():
            raise
    else:
        sync_folder(folder.parent)


def publish(temporary: Path, final: Path) -> None:
    """Give a synced file a name that nothing else has, durably. FileExistsError if something has it by now:
    that stays.
    """
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except OSError as error:
        # Disks without hard links. There it is looked up first, since renaming replaces.
        if os.path.lexists(final):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from error
        temporary.rename(final)
    else:
        temporary.unlink()
    sync_folder(final.parent)


def write_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a small file as a whole: the old content or the new one, never half."""
    # A name that nobody can foresee, made anew: a link laid in its place would be written through, and a file
    # lying there would keep its own mode.
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
    """A file's content; of one that is larger than `limit`, one byte more than that. OSError."""
    with path.open("rb") as file:
        # Python sets aside at once what it is asked to read: of a small file, not more than it has. A pipe
        # does not tell.
        status = os.fstat(file.fileno())
        return file.read(min(status.st_size, limit) + 1 if stat.S_ISREG(status.st_mode) else limit + 1)


def require_space(folder: Path, n_bytes: int) -> None:
    """NoSpaceError unless `folder`'s disk has `n_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise NoSpaceError(
            f"not enough disk space: {format_size(n_bytes)} needed, {format_size(free)} free",
            where=folder,
            remedy="free some space, or name an output on another disk",
        )


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the right to write `output`; LockedError, naming the lock file, while another run has it."""
    path = output.with_name(f".{output.name}.lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise LockedError(
                f"another run is writing {safe_line(output.name)}",
                where=f"lock: {path}",
                remedy="wait for it to end, or name another output",
            ) from error
        # The winner before us may have removed the file between our open and our lock.
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
    """An append-only file of JSON lines. A line counts only once `append` has returned: it is synced then.

    Each line begins with a checksum of itself and all before it: what is believed was written here, in this
    order. A torn last line, left by a crash, is cut off when the journal is opened.
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
        """Add entries and sync: they are acknowledged when this returns."""
        for entry in entries:
            self._file.write(self._line(json.dumps(entry, separators=(",", ":")).encode()) + b"\n")
        self._file.flush()
        sync(self._file.fileno())
        self.entries.extend(entries)

    def _line(self, entry: bytes) -> bytes:
        """An entry behind its checksum, as the next line."""
        self._checksum = zlib.crc32(entry, self._checksum)
        return b"%08x " % self._checksum + entry

    def close(self) -> None:
        """Release the file; it stays on disk."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
