"""Collects the log of the engine's process: the last lines in memory, and optionally all in a file."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from dsmoe_local.base.errors import file_errors
from dsmoe_local.base.text import safe_line

_KEPT = 400
_MAX_LINE = 2000  # bytes; longer lines are split, so that a line without end cannot fill the memory


class LogKeeper:
    """The log of a child process and its replacements, with lines made safe to print."""

    def __init__(self, path: Path | None) -> None:
        """Open the file at `path` to append all lines. Raises FileError."""
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        if path is not None:
            with file_errors("the log cannot be written", path):
                self._file = path.open("a", encoding="utf-8", buffering=1)

    def begin(self) -> None:
        """Drop the lines of the previous child."""
        self._lines.clear()

    def read(self, source: BinaryIO) -> None:
        """Read lines until the end of `source`."""
        while line := source.readline(_MAX_LINE):
            text = safe_line(line.decode("utf-8", "replace").rstrip(), _MAX_LINE)
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
                # Continue to read, or the engine would block on a full pipe.
                self._stop_writing(error)

    def _stop_writing(self, error: OSError) -> None:
        self._lines.append(f"the log file cannot be written: {error.strerror}")
        if self._file is not None:
            with suppress(OSError):  # closing writes the buffer again, which is expected to fail
                self._file.close()
            self._file = None

    def lines(self) -> tuple[str, ...]:
        """Return the last few hundred lines."""
        return tuple(self._lines.copy())

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.close()
            except OSError as error:
                self._stop_writing(error)
            self._file = None
