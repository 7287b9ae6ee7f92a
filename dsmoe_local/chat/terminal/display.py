"""The conversation on the full terminal: lines that are printed once, and the open end of a running reply.

Only the UI thread uses it.
"""

from __future__ import annotations

from collections.abc import Callable

from prompt_toolkit.data_structures import Size
from rich.console import RenderableType

from dsmoe_local.base.text import safe_line, safe_text
from dsmoe_local.chat.markdown.stream import MarkdownStream
from dsmoe_local.chat.terminal.ansi import notice, render_lines

_ROWS_BESIDE_PANEL = 4


class Display:
    """Prints lines with `print_above`, and returns the lines to be drawn below them.

    `activity` describes the state of the running reply, for the state line.
    """

    def __init__(self, print_above: Callable[[str], None], size: Callable[[], Size], *, colour: bool) -> None:
        self._print_above = print_above
        self._size = size
        self._colour = colour
        self._ends_blank = True  # the last printed line is empty
        self._reply: MarkdownStream | None = None
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

    def begin_reply(self, reply: MarkdownStream) -> None:
        """Begin a reply."""
        self._reply, self._reply_begun = reply, False

    def announce_wait(self, reply: MarkdownStream) -> None:
        """Show that `reply` has not begun yet, unless it already shows something."""
        silent = reply is self._reply and not self._reply_begun and not reply.lines(*self._live_size())
        if silent and not self.activity:
            self.activity = "waiting for the first word …  Ctrl-C stops"

    def feed(self, piece: str) -> None:
        """Append to the reply."""
        if self._reply is not None:
            self.activity = ""
            self._print_reply(self._reply.feed(piece, self._size().columns))

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
            self._reply = None
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
