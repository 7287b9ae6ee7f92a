"""A reply on its way to the screen: what of it is final, and the lines of what is open. Prints nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol

from dsmoe_local.base.text import safe_text
from dsmoe_local.chat.markdown.blocks import Block
from dsmoe_local.chat.markdown.leaves import LeafKind
from dsmoe_local.chat.markdown.render import render_ansi, render_open
from dsmoe_local.chat.markdown.stream import MarkdownStream, Open
from dsmoe_local.chat.markdown.wrap import fold

_DRAWN_AGAIN = (LeafKind.FENCE, LeafKind.INDENTED, LeafKind.TABLE)
_FENCE = re.compile(" {0,3}(```|~~~)")


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
    """Drawn as Markdown, block by block.

    `after` is the source of a reply that this one goes on with: what of it stays open, code, a table or an
    item of a list, is drawn again from its last line or its beginning on; prose just begins anew.
    """

    def __init__(self, *, colour: bool, after: str = "") -> None:
        self._colour = colour
        self._stream = MarkdownStream(highlight=colour)
        self._drawn: tuple[int, int, list[str]] | None = None
        self._stream.feed(after)
        # Spaces that separate it from prose above would indent what begins anew.
        self._begins_anew = _is_prose(self._stream.open)
        if self._begins_anew:
            self._stream = MarkdownStream(highlight=colour)
        self._joins = bool(after)  # the blank line above what comes first may be there already

    def feed(self, piece: str, width: int) -> str:
        if self._begins_anew:
            piece = piece.lstrip()
            self._begins_anew = not piece
        return self._render(self._stream.feed(piece), width)

    def finish(self, width: int) -> str:
        return self._render(self._stream.finish(), width)

    def lines(self, width: int, height: int) -> list[str]:
        if self._drawn is None or self._drawn[:2] != (width, height):
            part = self._stream.open
            text = render_open(part, width, height, colour=self._colour) if part and height > 0 else ""
            if self._joins:
                text = text.removeprefix("\n")
            self._drawn = (width, height, text.split("\n")[-height:] if text else [])
        return self._drawn[2]

    def _render(self, blocks: Iterable[Block], width: int) -> str:
        self._drawn = None
        text = "".join(render_ansi(block, width, colour=self._colour) for block in blocks)
        if text and self._joins:
            self._joins, text = False, text.removeprefix("\n")
        return text


def _is_prose(part: Open) -> bool:
    """Whether what is open needs nothing of what stands before it to be read."""
    in_container = part.context.before or part.context.after
    return bool(part) and not (part.kind in _DRAWN_AGAIN or in_container or _FENCE.match(part.rest))


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
        return ["".join(text for _, text in line) for line in fold([("", shown)], width)][-height:]
