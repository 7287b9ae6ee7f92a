"""A stream of Markdown cut into blocks that are final. Draws nothing.

A stream belongs to one thread; blocks and the open part that it gives away are plain data for any.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_local.base.text import safe_text
from dsmoe_local.chat.markdown.blocks import Block


@dataclass(frozen=True, slots=True)
class Open:
    """What is not final yet; false where there is nothing."""

    source: str = ""

    def __bool__(self) -> bool:
        return bool(self.source)


class MarkdownStream:
    """Takes a reply as it comes, gives the blocks that became final, in order and each once."""

    def __init__(self, *, highlight: bool = True) -> None:
        self._rest = ""

    def feed(self, text: str) -> list[Block]:
        """More of the source; returns what became final."""
        *lines, self._rest = (self._rest + safe_text(text)).split("\n")
        return [Block(line) for line in lines]

    def finish(self) -> list[Block]:
        """The source is over; returns the rest of it. The stream is then as new."""
        rest, self._rest = self._rest, ""
        return [Block(rest)] if rest else []

    @property
    def open(self) -> Open:
        """What is not final yet."""
        return Open(self._rest)
