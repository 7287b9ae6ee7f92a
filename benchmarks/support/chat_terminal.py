"""A chat on a pseudo-terminal, for measuring what its user waits for."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_PATIENCE = 120.0  # seconds


class ChatTerminal:
    """`dsmoe-chat` with the demo's model; nothing is kept of it."""

    def __init__(self, *options: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        program = str(Path(sys.executable).with_name("dsmoe-chat"))
        self._child = subprocess.Popen(
            [program, "--no-history", *options],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.close(slave)

    def send(self, text: str) -> None:
        """Send keys."""
        os.write(self._master, text.encode())

    def seconds_until(self, text: str) -> float:
        """Wait until `text` is written; how long that took."""
        started = time.perf_counter()
        seen = b""
        while text.encode() not in seen:
            ready, _, _ = select.select([self._master], [], [], _PATIENCE)
            if not ready:
                raise SystemExit(f"{text!r} did not appear in {seen!r}")
            seen += os.read(self._master, 1 << 16)
        return time.perf_counter() - started

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()
        self._child.wait()
        os.close(self._master)
