"""The log of the engine's process as its client keeps it: the last lines, and all of them in a file."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path
from typing import BinaryIO, TextIO

from dsmoe_local.base.errors import FileError
from dsmoe_local.base.text import safe_line

_KEPT = 400
_LONGEST = 2000  # bytes of a line: what has no end does not fill the memory


class LogKeeper:
    """Lines made safe to print, of one child after another. FileError if the file cannot be written."""

    def __init__(self, path: Path | None) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        if path is not None:
            try:
                self._file = path.open("a", encoding="utf-8", buffering=1)
            except OSError as error:
                raise FileError(f"the log cannot be written: {error.strerror}", where=path) from error

    def begin(self) -> None:
        """Forget the lines of the child before."""
        self._lines.clear()

    def read(self, source: BinaryIO) -> None:
        """Keep every line until the end."""
        while line := source.readline(_LONGEST):
            text = safe_line(line.decode("utf-8", "replace").rstrip(), _LONGEST)
            if text:
                self._lines.append(text)
            self._write(f"{text}\n")

    def _write(self, line: str) -> None:
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(line)
            except OSError as error:
                # The engine's output must still be read, or it would wait for ever.
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._lines.append(f"the log file cannot be written: {error.strerror}")
        self._file = None

    def lines(self) -> tuple[str, ...]:
        """The last few hundred."""
        return tuple(self._lines.copy())

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.close()
            except OSError as error:
                self._give_up(error)
            self._file = None
