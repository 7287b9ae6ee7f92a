"""Blocks of Markdown drawn for a terminal, as lines with ANSI styles."""

from __future__ import annotations

from dsmoe_local.chat.markdown.blocks import Block
from dsmoe_local.chat.markdown.stream import MarkdownStream, Open


def render_ansi(block: Block, width: int, *, colour: bool) -> str:
    """A final block as it is printed, its last newline included."""
    return f"{block.content}\n"


def render_open(part: Open, width: int, height: int, *, colour: bool) -> str:
    """The last `height` lines of what is open, none wider than `width` cells, without a last newline.

    The cost depends on the size of the window, not on the length of the reply.
    """
    rows = [part.source[start : start + width] for start in range(0, len(part.source), width)]
    return "\n".join(rows[-height:])


def render_markdown(source: str, width: int, *, colour: bool) -> str:
    """A whole text at once: the same characters as its stream."""
    stream = MarkdownStream(highlight=colour)
    return "".join(
        render_ansi(block, width, colour=colour) for block in (*stream.feed(source), *stream.finish())
    )
