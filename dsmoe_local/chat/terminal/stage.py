"""What is printed, in which order and with which blank lines between, and what is drawn below it meanwhile.

Belongs to the thread that draws.
"""

from __future__ import annotations

from collections.abc import Callable

from prompt_toolkit.data_structures import Size
from rich.console import RenderableType

from dsmoe_local.base.text import safe_line, safe_text
from dsmoe_local.chat.terminal.ansi import notice, render_lines
from dsmoe_local.chat.terminal.reply import ReplyText

_LEFT_FREE = 4  # rows that a panel leaves to the reply


class Stage:
    """`print_above` prints lines for good; `state` is what is to be said of the running reply."""

    def __init__(self, print_above: Callable[[str], None], size: Callable[[], Size], *, colour: bool) -> None:
        self._print_above = print_above
        self._size = size
        self._colour = colour
        self._ends_blank = True
        self._reply: ReplyText | None = None
        self._reply_begun = False
        self._held: list[str] = []
        self._panel: RenderableType | None = None
        self._panel_lines: tuple[int, list[str]] = (0, [])
        self.state = ""

    def print(self, text: str, *, gap: bool = False) -> None:
        """Print lines, each with its newline; `gap`: with a blank line before them."""
        if not text:
            return
        if gap and not self._ends_blank:
            text = f"\n{text}"
        self._ends_blank = text == "\n" or text.endswith("\n\n")
        self._print_above(text)

    def echo(self, message: str) -> None:
        """Print what the user sent."""
        style = "1;36" if self._colour else "1"
        first, *rest = safe_text(message).split("\n")
        lines = [f"\x1b[{style}m>\x1b[0m {first}", *(f"  {line}" for line in rest)]
        self.print("".join(f"{line.rstrip()}\n" for line in lines), gap=True)

    def begin(self, reply: ReplyText) -> None:
        """A reply begins."""
        self._reply, self._reply_begun = reply, False

    def wait_for(self, reply: ReplyText) -> None:
        """Say that a reply is on its way, unless there is more to say of it or something of it to see."""
        waits = reply is self._reply and not self._reply_begun and not reply.lines(*self._window())
        if waits and not self.state:
            self.state = "waiting for the first word …  Ctrl-C stops"

    def feed(self, piece: str) -> None:
        """More of the reply."""
        if self._reply is not None:
            self.state = ""
            self._print_reply(self._reply.feed(piece, self._size().columns))

    def note(self, text: str) -> None:
        """A quiet line. Amid a reply it waits for the end, lest it come between two lines of code."""
        if self._reply is not None and self._reply.lines(*self._window()):
            self._held.append(text)
            self.state = safe_line(text)
        else:
            self._print_note(text)

    def finish(self) -> None:
        """The reply is over."""
        if self._reply is not None:
            self._print_reply(self._reply.finish(self._size().columns))
            self._reply = None
        for text in self._held:
            self._print_note(text)
        self._held.clear()
        self.state = ""

    def show_panel(self, panel: RenderableType | None) -> None:
        """What is drawn below the reply; None takes it away."""
        self._panel, self._panel_lines = panel, (0, [])

    def top(self, columns: int, rows: int) -> list[str]:
        """The open part of the reply and the panel, in at most `rows` lines."""
        if rows <= 1:
            return []
        panel = self._draw_panel(columns)[: max(0, rows - _LEFT_FREE)]
        panel += [""] if panel else []
        room = rows - len(panel) - 2
        # Half of the window: were it all, a window made half as wide could not show it.
        live = [] if self._reply is None else self._reply.lines(columns, min(room, max(3, rows // 2)))
        # What follows in a reply brings its own blank line, where there is one.
        joined = self._ends_blank or (live and self._reply_begun)
        return [*([] if joined else [""]), *live, *([""] if live else []), *panel]

    def _window(self) -> tuple[int, int]:
        size = self._size()
        return size.columns, max(3, size.rows // 2)

    def _print_reply(self, text: str) -> None:
        self.print(text, gap=not self._reply_begun)
        self._reply_begun = self._reply_begun or bool(text)

    def _print_note(self, text: str) -> None:
        lines = render_lines(notice(text), self._size().columns, colour=self._colour)
        self.print("".join(f"{line}\n" for line in lines), gap=not self._reply_begun)

    def _draw_panel(self, columns: int) -> list[str]:
        if self._panel is None:
            return []
        if self._panel_lines[0] != columns:
            self._panel_lines = (columns, render_lines(self._panel, columns, colour=self._colour))
        return list(self._panel_lines[1])
