"""Keep standard input in a file beside the output, so that a run can be resumed without it."""

from __future__ import annotations

import os
import select
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError, InterruptedRunError, UsageError, file_errors
from dsmoe_local.base.faults import reach
from dsmoe_local.batch.input_form import InputForm
from dsmoe_local.batch.sources import Source

_CHUNK = 1 << 20
_POLL_SECONDS = 0.2
_NOT_COPIED = "standard input cannot be copied"


def spool_path(out: Path) -> Path:
    """Return the path of the copy of standard input that belongs to the output `out`."""
    return out.with_name(f"{out.name}.input")


class Spool:
    """A copy of standard input: `n_bytes` of it, then their digest. An earlier run may have written it."""

    def __init__(self, path: Path, kept: Path, n_bytes: int) -> None:
        self._path = path
        self._kept = kept
        self._n_bytes = n_bytes

    def source(self, form: InputForm) -> Source:
        """Return the copy as an input."""
        return Source(self._path, form, "standard input", self._n_bytes)

    def keep(self) -> None:
        """Keep the copy for later runs. It replaces the copy of an earlier run."""
        if self._path != self._kept:
            with file_errors(_NOT_COPIED, self._kept):
                durable.replace(self._path, self._kept)
        self._path = self._kept
        reach("batch.spooled")


@contextmanager
def spooled(out: Path, stop: threading.Event) -> Iterator[Spool]:
    """Copy standard input to a file. If it is empty, use the copy that an earlier run kept.

    The copy is removed at the end of the block unless `keep` was called. Raises UsageError if there is no
    input, FileError if the copy of an earlier run is damaged, InterruptedRunError if `stop` is set.
    """
    kept = spool_path(out)
    temporary = kept.with_name(f".{kept.name}.part")
    try:
        n_bytes = _receive(temporary, stop)
        if n_bytes:
            yield Spool(temporary, kept, n_bytes)
        elif kept.exists():
            yield Spool(kept, kept, _check(kept))
        else:
            raise UsageError("standard input is empty", remedy="pipe the lines in, or name a file")
    finally:
        temporary.unlink(missing_ok=True)


def _receive(path: Path, stop: threading.Event) -> int:
    """Write standard input and its digest to `path`. Return the number of bytes of the input."""
    descriptor = sys.stdin.fileno()
    with file_errors(_NOT_COPIED, path), path.open("wb") as file:
        if os.isatty(descriptor):
            return 0
        digest = _digest()
        n_bytes = 0
        for chunk in _chunks(descriptor, stop):
            file.write(chunk)
            digest.update(chunk)
            n_bytes += len(chunk)
        file.write(_trailer(digest))
        file.flush()
        durable.sync(file.fileno())
        return n_bytes


def _check(kept: Path) -> int:
    """Return the number of bytes of input in the copy. FileError if the digest does not match."""
    digest = _digest()
    with file_errors(_NOT_COPIED, kept), kept.open("rb") as file:
        n_bytes = os.fstat(file.fileno()).st_size - len(_trailer(digest))
        n_left = n_bytes
        while n_left > 0 and (chunk := file.read(min(n_left, _CHUNK))):
            digest.update(chunk)
            n_left -= len(chunk)
        is_whole = n_left == 0 and file.read() == _trailer(digest)
    if not is_whole:
        raise FileError(
            "the copy of standard input is damaged", where=kept, remedy="pipe the same lines in again"
        )
    return n_bytes


def _digest() -> blake2b:
    return blake2b(digest_size=16)


def _trailer(digest: blake2b) -> bytes:
    return f"\n#blake2b {digest.hexdigest()}\n".encode()


def _chunks(source: int, stop: threading.Event) -> Iterator[bytes]:
    # A regular file is always ready, and select on macOS does not take one.
    waits = not stat.S_ISREG(os.fstat(source).st_mode)
    while not stop.is_set():
        if waits and not select.select([source], [], [], _POLL_SECONDS)[0]:
            continue
        chunk = os.read(source, _CHUNK)
        if not chunk:
            return
        yield chunk
    raise InterruptedRunError("interrupted: standard input was not read to its end")
