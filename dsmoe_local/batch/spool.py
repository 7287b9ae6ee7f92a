"""Standard input kept in a file beside the output, so that a run can be resumed. Reads no lines."""

from __future__ import annotations

import os
import select
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError, InterruptedRunError, UsageError
from dsmoe_local.base.faults import reach

_CHUNK = 1 << 20
_PATIENCE = 0.2


def spool_path(out: Path) -> Path:
    """Where the input of `out` is kept."""
    return out.with_name(f"{out.name}.input")


class Spool:
    """Standard input as it was read, or what an earlier run kept of it, in `path`."""

    def __init__(self, path: Path, kept: Path) -> None:
        self.path = path
        self._kept = kept

    def keep(self) -> None:
        """Let later runs find it; it takes the place of what an earlier one kept."""
        if self.path != self._kept:
            with _telling(self._kept):
                durable.replace(self.path, self._kept)
        self.path = self._kept
        reach("batch.spooled")


@contextmanager
def spooled(out: Path, stop: threading.Event) -> Iterator[Spool]:
    """Standard input beside `out`; what an earlier run kept, when there is nothing on standard input.

    Unless it is kept, nothing of it stays. Setting `stop` ends the wait for more with InterruptedRunError.
    Raises UsageError without any input.
    """
    kept = spool_path(out)
    temporary = kept.with_name(f".{kept.name}.part")
    try:
        is_new = _receive(temporary, stop)
        if not is_new and not kept.exists():
            raise UsageError("standard input is empty", remedy="pipe the lines in, or name a file")
        yield Spool(temporary if is_new else kept, kept)
    finally:
        temporary.unlink(missing_ok=True)


def _receive(path: Path, stop: threading.Event) -> bool:
    """Write standard input to `path`; False if there was none."""
    descriptor = sys.stdin.fileno()
    with _telling(path), path.open("wb") as file:
        if not os.isatty(descriptor):
            _copy(descriptor, file.fileno(), stop)
        durable.sync(file.fileno())
        return os.fstat(file.fileno()).st_size > 0


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(f"standard input cannot be kept: {error.strerror}", where=path) from error


def _copy(source: int, target: int, stop: threading.Event) -> None:
    # A regular file is always ready, and on macOS select may not be asked about one.
    waits = not stat.S_ISREG(os.fstat(source).st_mode)
    while not stop.is_set():
        if waits and not select.select([source], [], [], _PATIENCE)[0]:
            continue
        chunk = os.read(source, _CHUNK)
        if not chunk:
            return
        while chunk:
            chunk = chunk[os.write(target, chunk) :]
    raise InterruptedRunError("interrupted: standard input was not read to its end")
