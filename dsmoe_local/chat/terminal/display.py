"""The conversation on the full terminal: lines that are printed once, and the open end of a running reply.

Only the UI thread uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from prompt_toolkit.data_structures import Size
from rich.console import RenderableType
from rich.style import Style
from rich.text import Text

from dsmoe_local.base.text import safe_line, safe_text
from dsmoe_local.chat.markdown.text import to_ansi, wrap
from dsmoe_local.chat.terminal.ansi import notice, render_lines

_ROWS_BESIDE_PANEL = 4
_DIM = Style(dim=True)


class LiveText(Protocol):
    """A text that is rendered while it arrives: see MarkdownStream."""

    def feed(self, piece: str, width: int) -> str:
        """Add text. Return the lines that are finished, each with a newline."""
        ...

    def finish(self, width: int) -> str:
        """End the text. Return the remaining lines."""
        ...

    def lines(self, width: int, height: int) -> list[str]:
        """Return the last `height` lines of the unfinished part."""
        ...


class DimText:
    """LiveText that is shown dimmed as it is, one paragraph after another."""

    def __init__(self, *, colour: bool) -> None:
        self._colour = colour
        self._rest = ""  # the line that is not complete

    def feed(self, piece: str, width: int) -> str:
        *whole, self._rest = (self._rest + safe_text(piece)).split("\n")
        return "".join(f"{row}\n" for line in whole for row in self._rows(line, width))

    def finish(self, width: int) -> str:
        rest, self._rest = self._rest, ""
        return "".join(f"{row}\n" for row in self._rows(rest, width)) if rest else ""

    def lines(self, width: int, height: int) -> list[str]:
        if not self._rest or height <= 0:
            return []
        # The cost depends on the window, not on the line. The cut moves rarely: with each move, words wrap
        # elsewhere.
        step = max(1, width * height)
        cut = max(0, len(self._rest) // step - 1) * step
        return self._rows(self._rest[cut:], width)[-height:]

    def _rows(self, line: str, width: int) -> list[str]:
        rows = wrap(Text.assemble((line.rstrip(), _DIM)), max(1, width), fold=True)
        return [to_ansi(row, colour=self._colour) for row in rows]


class Display:
    """Prints lines with `print_above`, and returns the lines to be drawn below them.

    `activity` describes the state of the running reply, for the state line.
    """

    def __init__(self, print_above: Callable[[str], None], size: Callable[[], Size], *, colour: bool) -> None:
        self._print_above = print_above
        self._size = size
        self._colour = colour
        self._ends_blank = True  # the last printed line is empty
        self._reply: LiveText | None = None
        self._answer: LiveText | None = None  # the reply that follows when `_reply` is its reasoning
        self._reply_begun = False  # a part of the reply has been printed
        self._held_notes: list[str] = []
        self._panel: RenderableType | None = None
        self._panel_lines: tuple[int, list[str]] = (0, [])  # for a width
        self.activity = ""

    def print(self, text: str, *, gap: bool = False) -> None:
        """Print lines, each with its newline. With `gap` an empty line is above them."""
        if not text:
            return
        if gap and not self._ends_blank:
            text = f"\n{text}"
        self._ends_blank = text == "\n" or text.endswith("\n\n")
        self._print_above(text)

    def render(self, renderable: RenderableType) -> str:
        """Return the lines of a renderable, each with its newline. From any thread."""
        lines = render_lines(renderable, self._size().columns, colour=self._colour)
        return "".join(f"{line}\n" for line in lines)

    def echo(self, message: str) -> None:
        """Print a message of the user."""
        style = "1;36" if self._colour else "1"
        first, *rest = safe_text(message).split("\n")
        lines = [f"\x1b[{style}m>\x1b[0m {first}", *(f"  {line}" for line in rest)]
        self.print("".join(f"{line.rstrip()}\n" for line in lines), gap=True)

    def begin_reply(self, reply: LiveText) -> None:
        """Begin a reply."""
        self._reply, self._answer, self._reply_begun = reply, None, False

    def announce_wait(self, reply: LiveText) -> None:
        """Show that `reply` has not begun yet, unless it already shows something."""
        silent = reply is self._reply and not self._reply_begun and not reply.lines(*self._live_size())
        if silent and not self.activity:
            self.activity = "waiting for the first word …  Ctrl-C stops"

    def feed(self, piece: str) -> None:
        """Append to the reply."""
        if self._reply is not None:
            self.activity = ""
            self._print_reply(self._reply.feed(piece, self._size().columns))

    def feed_reasoning(self, piece: str) -> None:
        """Append to the reasoning before the reply."""
        if self._answer is None and self._reply is not None:
            self._reply, self._answer = DimText(colour=self._colour), self._reply
        self.feed(piece)

    def end_reasoning(self, summary: str) -> None:
        """End the reasoning, and print a dim line about it. The answer follows after an empty line."""
        self.activity = ""
        if self._answer is not None and self._reply is not None:
            self._print_reply(self._reply.finish(self._size().columns))
            self._reply, self._answer = self._answer, None
        self.print(self.render(notice(summary)), gap=not self._reply_begun)
        self._reply_begun = False

    def note(self, text: str) -> None:
        """Print a dim line.

        While the end of the reply may still change, the line is held back until the reply ends: it must not
        come between two lines of code.
        """
        if self._reply is not None and self._reply.lines(*self._live_size()):
            self._held_notes.append(text)
            self.activity = safe_line(text)
        else:
            self.print(self.render(notice(text)), gap=not self._reply_begun)

    def finish_reply(self) -> None:
        """End the reply."""
        if self._reply is not None:
            self._print_reply(self._reply.finish(self._size().columns))
            self._reply = self._answer = None
        for text in self._held_notes:
            self.print(self.render(notice(text)), gap=not self._reply_begun)
        self._held_notes.clear()
        self.activity = ""

    def set_panel(self, panel: RenderableType | None) -> None:
        """Set the panel below the reply; None removes it."""
        self._panel, self._panel_lines = panel, (0, [])

    def live_lines(self, columns: int, rows: int) -> list[str]:
        """Return the end of the reply, as far as it may still change, and the panel: at most `rows` lines."""
        if rows <= 1:
            return []
        panel = self._draw_panel(columns)[: max(0, rows - _ROWS_BESIDE_PANEL)]
        panel += [""] if panel else []
        room = rows - len(panel) - 2
        # At most half of the window, so that the reply still fits if the window becomes half as wide.
        live = [] if self._reply is None else self._reply.lines(columns, min(room, max(3, rows // 2)))
        # A reply that has begun contains the empty lines between its blocks.
        gap = not (self._ends_blank or (live and self._reply_begun))
        return [*([""] if gap else []), *live, *([""] if live else []), *panel]

    def _live_size(self) -> tuple[int, int]:
        size = self._size()
        return size.columns, max(3, size.rows // 2)

    def _print_reply(self, text: str) -> None:
        self.print(text, gap=not self._reply_begun)
        self._reply_begun = self._reply_begun or bool(text)

    def _draw_panel(self, columns: int) -> list[str]:
        if self._panel is None:
            return []
        if self._panel_lines[0] != columns:
            self._panel_lines = (columns, render_lines(self._panel, columns, colour=self._colour))
        return list(self._panel_lines[1])
