"""The screen and the scrollback of a program on a pseudo-terminal, by pyte; golden screens.

The golden screens are the files in tests/chat/golden. `GOLDEN_SCREENS=write pytest FILE` writes those of a
test file again; check the changes before you commit them.
"""

from __future__ import annotations

import difflib
import fcntl
import os
import re
import struct
import termios
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyte
from wcwidth import wcwidth

from support.terminal import Terminal

GOLDEN = Path(__file__).parent.parent / "chat" / "golden"

# pyte cuts lines off when it becomes narrower, as xterm does, so the program is told that this is xterm.
_ENVIRONMENT = {
    "XTERM_VERSION": "XTerm(390)",
    **dict.fromkeys(("TMUX", "STY", "NO_COLOR", "VISUAL", "EDITOR", "DISPLAY", "WAYLAND_DISPLAY"), ""),
}


class RigidScreen(pyte.HistoryScreen):
    """pyte as a terminal that joins no emoji and, like xterm, cuts lines off in a narrower window.

    Corrects pyte, which drops what follows a character without width, cuts wide characters in two at the
    edge, and in a lower window drops the first lines but does not move the cursor.
    """

    def draw(self, data: str) -> None:
        """Draw a run of text."""
        if data.isascii():
            super().draw(data)
            return
        for character in data:
            width = wcwidth(character)
            if width == 2 and self.cursor.x == self.columns - 1 and pyte.modes.DECAWM in self.mode:
                self.carriage_return()
                self.linefeed()
            if width > 0 or unicodedata.combining(character):
                super().draw(character)

    def resize(self, lines: int | None = None, columns: int | None = None) -> None:
        """Change the size."""
        lines, columns = lines or self.lines, columns or self.columns
        n_above = max(0, self.cursor.y - lines + 1)
        self.history.top.extend(self.buffer[row] for row in range(n_above))
        kept = [self.buffer[row + n_above] for row in range(min(lines, self.lines - n_above))]
        self.buffer.clear()
        for row, line in enumerate(kept):
            self.buffer[row] = line
        for line in (*kept, *self.history.top):
            for column in [column for column in line if column >= columns]:
                del line[column]
        self.lines, self.columns = lines, columns
        self.cursor.y -= n_above
        self.cursor.x = min(self.cursor.x, columns - 1)
        self.tabstops = set(range(8, columns, 8))
        self.set_margins()


class ScreenTerminal(Terminal):
    """A Terminal with a screen."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        columns: int = 80,
        lines: int = 24,
        folder: Path | None = None,
    ) -> None:
        self.screen = RigidScreen(columns, lines, history=10_000, ratio=0.5)
        self._stream = pyte.Stream(self.screen)
        values = {**_ENVIRONMENT, **(environment or {})}
        super().__init__(arguments, values, columns=columns, lines=lines, folder=folder)

    def took(self, text: str) -> None:
        """Draw what the program wrote."""
        self._stream.feed(text)

    def resize(self, columns: int, lines: int) -> None:
        """Change the size of the window."""
        self.screen.resize(lines, columns)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def screen_text(self) -> str:
        """The screen, without trailing spaces and trailing empty lines."""
        return _text(self.screen.buffer[row] for row in range(self.screen.lines))

    def whole_text(self) -> str:
        """The scrollback and the screen."""
        rows = [*self.screen.history.top, *(self.screen.buffer[row] for row in range(self.screen.lines))]
        return _text(rows)

    def until(self, shown: Callable[[str], bool], seconds: float = 60) -> str:
        """Wait until `shown` accepts the text of the screen; return that text."""
        deadline = time.monotonic() + seconds
        while not shown(text := self.screen_text()):
            left = deadline - time.monotonic()
            if left <= 0 or not self._read(left):
                raise AssertionError(f"the screen did not become what was expected:\n{text}")
        return text

    def wait_screen(self, pattern: str, seconds: float = 60) -> str:
        """Wait until `pattern` is on the screen; return the text of the screen."""
        return self.until(lambda text: bool(re.search(pattern, text)), seconds)

    def wait_gone(self, pattern: str, seconds: float = 60) -> str:
        """Wait until `pattern` is no longer on the screen; return the text of the screen."""
        return self.until(lambda text: not re.search(pattern, text), seconds)

    def check(self, name: str, *, whole: bool = False) -> None:
        """Wait until the screen, with `whole` the scrollback too, equals the golden one of that name."""
        path = GOLDEN / f"{name}.txt"
        content = self.whole_text if whole else self.screen_text
        if os.environ.get("GOLDEN_SCREENS") == "write":
            self._settle()
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{content()}\n", encoding="utf-8")
            return
        wanted = path.read_text(encoding="utf-8").removesuffix("\n")
        try:
            self.until(lambda _: content() == wanted)
        except AssertionError:
            shown = content().splitlines()
            lines = difflib.unified_diff(wanted.splitlines(), shown, "golden", "shown", lineterm="")
            raise AssertionError(f"not the golden screen {name}:\n" + "\n".join(lines)) from None

    def _settle(self) -> None:
        while self._read(1.0):
            pass


StartChat: TypeAlias = Callable[..., ScreenTerminal]
"""Starts a chat; see the fixture `chat`."""


def _text(rows: Iterable[Mapping[int, Any]]) -> str:
    lines = []
    for row in rows:
        last = max(row, default=-1)
        lines.append("".join(row[column].data for column in range(last + 1)).rstrip())
    return "\n".join(lines).rstrip("\n")
