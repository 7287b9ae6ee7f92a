"""A reply on its way to the screen: what of it is final, and the lines of what is open. Prints nothing."""

from __future__ import annotations

from typing import Protocol

from rich.text import Text

from dsmoe_local.base.text import safe_text
from dsmoe_local.chat.markdown.text import fold_lines


class ReplyText(Protocol):
    """A reply that comes piece by piece. What it gives for printing ends with a newline, or is empty."""

    def feed(self, piece: str, width: int) -> str:
        """More of it; returns what became final."""
        ...

    def finish(self, width: int) -> str:
        """It is over; returns the rest."""
        ...

    def lines(self, width: int, height: int) -> list[str]:
        """The last lines of what is open, at most `height`."""
        ...


class RawText:
    """As it came, line by line; long lines are the terminal's to wrap."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, piece: str, width: int) -> str:
        done, newline, self._rest = (self._rest + safe_text(piece)).rpartition("\n")
        return done + newline

    def finish(self, width: int) -> str:
        rest, self._rest = self._rest, ""
        return f"{rest}\n" if rest else ""

    def lines(self, width: int, height: int) -> list[str]:
        if not self._rest or height <= 0:
            return []
        shown = self._rest[-width * height :].expandtabs(4)
        return [line.plain for line in fold_lines(Text(shown), width)][-height:]
