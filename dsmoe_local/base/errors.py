"""The error tree. Libraries raise these; only the command line turns them into exit codes.

DsmoeError                  a message of at most three lines: what, where, what to do
 ├─ UsageError              the command line asks for something impossible (exit status 2)
 ├─ MissingExtraError       a package of an optional extra is not installed
 ├─ FileError               a file cannot be read, written or locked
 │   ├─ LockedError         another run holds the output
 │   └─ NoSpaceError        the disk has too little free space
 ├─ FormatError             a file's content is malformed: corrupt, hostile or unsupported
 └─ InterruptedRunError     SIGINT or SIGTERM stopped the work (exit status 130 or 143)

Packages add their own branches (`dsmoe_convert.errors`, `dsmoe_quantize.errors`, …) below these.
"""

from __future__ import annotations

import copyreg
import errno
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsmoe_local.base.text import safe_line

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""The errors of a disk without space."""
PIP = f"{shlex.quote(sys.executable or 'python3')} -m pip"
"""The pip of the Python that runs this, for commands in messages: another pip installs elsewhere."""
_LINE_LIMIT = 400


class DsmoeError(Exception):
    """An error that the user can act on.

    Up to three lines: `what` went wrong, `where` (file, field, tensor), and the `remedy`. They are made
    safe to print here; `where` and `remedy` may be empty.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | Path = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = safe_line(what, _LINE_LIMIT)
        self.where = safe_line(str(where), _LINE_LIMIT)
        self.remedy = safe_line(remedy, _LINE_LIMIT)

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.where, self.remedy) if line)

    def __reduce__(self) -> tuple[object, ...]:
        # pickle would call the constructor, and those of subclasses differ.
        return copyreg.__newobj__, (type(self),), self.__dict__  # type: ignore[attr-defined]


class UsageError(DsmoeError):
    """The command line asks for something impossible."""

    exit_code = 2


class MissingExtraError(DsmoeError):
    """A package of an optional extra is not installed."""

    def __init__(self, extra: str, package: str, purpose: str) -> None:
        super().__init__(f"{package} is needed for {purpose}: {PIP} install 'dsmoe-local[{extra}]'")


class FileError(DsmoeError):
    """A file cannot be read, written or locked."""


class LockedError(FileError):
    """Another run holds the output."""


class NoSpaceError(FileError):
    """The disk has too little free space."""


class FormatError(DsmoeError):
    """A file's content is malformed: corrupt, hostile or unsupported."""


class InterruptedRunError(DsmoeError):
    """SIGINT or SIGTERM stopped the work. Finished parts are kept."""

    def __init__(self, what: str, *, signal_number: int = 2, remedy: str = "") -> None:
        super().__init__(what, remedy=remedy)
        self.exit_code = 128 + signal_number


@contextmanager
def file_errors(what: str, where: str | Path, remedy: str = "") -> Iterator[None]:
    """Raise an OSError of the block as FileError or NoSpaceError, with the system's reason after `what`."""
    try:
        yield
    except OSError as error:
        kind = NoSpaceError if error.errno in DISK_FULL else FileError
        raise kind(f"{what}: {error.strerror or error}", where=where, remedy=remedy) from error
