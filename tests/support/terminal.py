"""A program on a pseudo-terminal: send keys, wait for output, get the exit status."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ENTER, CTRL_C, CTRL_D, ALT_ENTER = "\r", "\x03", "\x04", "\x1b\r"
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b[=>]|\x1b\][^\x07]*\x07")


class Terminal:
    """`python ARGUMENTS` on a pseudo-terminal of its own."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        columns: int = 100,
        lines: int = 40,
        folder: Path | None = None,
    ) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        values = {
            **os.environ,
            "TERM": "xterm-256color",
            "PYTHONPATH": os.pathsep.join(sys.path),
            **(environment or {}),
        }
        self._child = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={name: value for name, value in values.items() if value},
            cwd=folder,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.raw = ""
        self._seen = 0

    @property
    def pid(self) -> int:
        """The program's process id."""
        return self._child.pid

    def send(self, text: str) -> None:
        """Send keys."""
        os.write(self.master, text.encode())

    def paste(self, text: str) -> None:
        """Send text as a bracketed paste."""
        self.send(f"\x1b[200~{text}\x1b[201~")

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Wait until `pattern` appears after the last match; return the text up to its end."""
        deadline = time.monotonic() + seconds
        while True:
            text = self.text[self._seen :]
            found = re.search(pattern, text)
            if found:
                self._seen += found.end()
                return text[: found.end()]
            left = deadline - time.monotonic()
            if left <= 0 or not self._read(left):
                raise AssertionError(f"{pattern!r} did not appear in {text!r}")

    @property
    def text(self) -> str:
        """The output so far without control sequences."""
        return _CONTROLS.sub("", self.raw).replace("\r", "")

    def _read(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        try:
            chunk = os.read(self.master, 65536)
        except OSError:  # on Linux: the child has closed its side
            return False
        text = self._decoder.decode(chunk)
        self.raw += text
        self.took(text)
        if b"\x1b[6n" in chunk:
            # Answer the request for the cursor's position.
            self.send("\x1b[1;1R")
        return bool(chunk)

    def took(self, text: str) -> None:
        """Handle output. Subclasses draw it."""

    def ending(self, seconds: float = 120) -> int:
        """Wait for the end; return the exit status."""
        deadline = time.monotonic() + seconds
        while self._read(max(0.0, deadline - time.monotonic())):
            pass
        return self._child.wait(max(0.1, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()
        self._child.wait()
        os.close(self.master)


def wait_for_file(path: Path, seconds: float = 60) -> None:
    """Wait until a program has written a file."""
    deadline = time.monotonic() + seconds
    while not path.exists() or not path.stat().st_size:
        if time.monotonic() > deadline:
            raise AssertionError(f"{path} was not written")
        time.sleep(0.01)


def editor_script(folder: Path, text: str) -> str:
    """Write a shell script to be used as $EDITOR; return its path."""
    path = folder / "editor"
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o700)
    return str(path)
