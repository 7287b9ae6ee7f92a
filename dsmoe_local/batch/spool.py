"""Standard input kept in a file beside the output, so that a run can be resumed. Reads no lines."""

from __future__ import annotations

import os
import select
import stat
import sys
import threading
from pathlib import Path

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError, InterruptedRunError, UsageError
from dsmoe_local.base.faults import reach

_CHUNK = 1 << 20
_PATIENCE = 0.2


def spool_path(out: Path) -> Path:
    """Where the input of `out` is kept."""
    return out.with_name(f"{out.name}.input")


def spool(out: Path, stop: threading.Event) -> Path:
    """Keep standard input beside `out`; what an earlier run kept, when there is nothing on standard input.

    Setting `stop` ends the wait for more with InterruptedRunError. Raises UsageError without any input.
    """
    path = spool_path(out)
    temporary = path.with_name(f".{path.name}.part")
    descriptor = sys.stdin.fileno()
    try:
        with temporary.open("wb") as file:
            if not os.isatty(descriptor):
                _copy(descriptor, file.fileno(), stop)
            n_bytes = os.fstat(file.fileno()).st_size
            durable.sync(file.fileno())
        if n_bytes:
            durable.replace(temporary, path)
    except OSError as error:
        raise FileError(f"standard input cannot be kept: {error.strerror}", where=temporary) from error
    finally:
        temporary.unlink(missing_ok=True)
    reach("batch.spooled")
    if not path.exists():
        raise UsageError("standard input is empty", remedy="pipe the lines in, or name a file")
    return path


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
