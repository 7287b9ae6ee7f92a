"""A program in tmux, a terminal that wraps its lines anew when its width changes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")


class Tmux:
    """`python ARGUMENTS` in the only window of a tmux server of its own."""

    def __init__(self, arguments: Sequence[str], folder: Path, *, columns: int = 80, lines: int = 24) -> None:
        self._sockets = tempfile.TemporaryDirectory(prefix="tmux")
        self._tmux = ("tmux", "-S", f"{self._sockets.name}/s", "-f", "/dev/null")
        path = os.pathsep.join(sys.path)
        command = shlex.join(["env", f"PYTHONPATH={path}", sys.executable, *arguments])
        self._call("new-session", "-d", "-x", str(columns), "-y", str(lines), "-c", str(folder), command)

    def send(self, *keys: str) -> None:
        """Send keys, by their names in tmux, or text."""
        self._call("send-keys", *keys)

    def resize(self, columns: int, lines: int) -> None:
        """Change the size of the window."""
        self._call("resize-window", "-x", str(columns), "-y", str(lines))

    def screen(self) -> str:
        """The screen."""
        return self._call("capture-pane", "-p").rstrip("\n")

    def whole(self) -> str:
        """The scrollback and the screen, with wrapped lines joined."""
        return self._call("capture-pane", "-p", "-J", "-S", "-").rstrip("\n")

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Wait until `pattern` is on the screen and the cursor is visible, which a program hides while it
        draws. Return the screen.
        """
        deadline = time.monotonic() + seconds
        while True:
            shown = self._call("capture-pane", "-p", ";", "display-message", "-p", "#{cursor_flag}")
            text, _, has_cursor = shown.rstrip("\n").rpartition("\n")
            text = text.rstrip("\n")
            if re.search(pattern, text) and has_cursor == "1":
                return text
            if time.monotonic() > deadline:
                raise AssertionError(f"{pattern!r} did not appear on:\n{text}")
            time.sleep(0.02)

    def _call(self, *arguments: str) -> str:
        done = subprocess.run([*self._tmux, *arguments], capture_output=True, text=True, check=True)
        return done.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, check=False)
        self._sockets.cleanup()
