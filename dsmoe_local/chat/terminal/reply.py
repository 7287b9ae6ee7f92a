"""A reply on its way to the screen: what of it is final, and the lines of what is open. Prints nothing."""

from __future__ import annotations

from typing import Protocol

from rich.cells import chop_cells

from dsmoe_local.base.text import safe_text
from dsmoe_local.chat.markdown.render import render_ansi, render_open
from dsmoe_local.chat.markdown.stream import MarkdownStream


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


class MarkdownText:
    """Drawn as Markdown, block by block."""

    def __init__(self, *, colour: bool) -> None:
        self._colour = colour
        self._stream = MarkdownStream(highlight=colour)
        self._drawn: tuple[int, int, list[str]] | None = None

    def feed(self, piece: str, width: int) -> str:
        self._drawn = None
        return "".join(render_ansi(block, width, colour=self._colour) for block in self._stream.feed(piece))

    def finish(self, width: int) -> str:
        self._drawn = None
        return "".join(render_ansi(block, width, colour=self._colour) for block in self._stream.finish())

    def lines(self, width: int, height: int) -> list[str]:
        if self._drawn is None or self._drawn[:2] != (width, height):
            part = self._stream.open
            text = render_open(part, width, height, colour=self._colour) if part and height > 0 else ""
            self._drawn = (width, height, text.split("\n")[-height:] if text else [])
        return self._drawn[2]


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
        return chop_cells(shown, width)[-height:]
