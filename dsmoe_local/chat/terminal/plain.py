"""The chat's terminal for screen readers, --plain and terminals that can only print: lines in, lines out.

Nothing is drawn and nothing is written twice: no colours, no escape codes but those that readline needs to
tell pastes from keys, replies raw as they come. Everything happens in the thread that calls `run`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dsmoe_local.base.errors import DsmoeError, FileError, InterruptedRunError
from dsmoe_local.base.text import safe_line, safe_text
from dsmoe_local.chat.terminal import ansi
from dsmoe_local.chat.terminal.clipboard import copy_with_tool
from dsmoe_local.chat.terminal.completion import Complete, nothing
from dsmoe_local.chat.terminal.editor import Editor
from dsmoe_local.chat.terminal.lines import LineReader
from dsmoe_local.chat.terminal.output import terminal_size
from dsmoe_local.chat.terminal.screen import ReplyView
from dsmoe_local.chat.terminal.signals import Signals

if TYPE_CHECKING:
    from rich.console import RenderableType

_LONG_PROMPT = 256  # tokens that take long enough to be worth a line


class PlainTerminal:
    """A Screen that reads lines, see the module. `history_path` None: nothing typed is kept."""

    plain = True
    colour = False

    def __init__(self, complete: Complete = nothing, history_path: Path | None = None) -> None:
        self._signals = Signals()
        self._lines = LineReader(self._signals, self._write, complete, history_path)
        self._is_gone = False

    @property
    def width(self) -> int:
        """Columns."""
        return terminal_size().columns

    @property
    def height(self) -> int:
        """Lines."""
        return terminal_size().rows

    def run(self, take: Callable[[str], bool], cancel: Callable[[], None], kill: Callable[[], None]) -> None:
        """See open.Terminal."""
        signals = self._signals
        with signals.handled():
            while not signals.number:
                try:
                    text = self._lines.input()
                except KeyboardInterrupt:
                    self._write("\n")
                    self.notice("Ctrl-D or /exit leaves")
                    continue
                except EOFError:
                    self._write("\n")
                    break
                if text.strip():
                    self._lines.keep(text)
                with signals.job(cancel, kill):
                    goes_on = not signals.number and take(text)
                if not goes_on:
                    break
        if signals.number:
            raise InterruptedRunError("the chat was ended by a signal", signal_number=signals.number)

    def notice(self, text: str) -> None:
        """A quiet line of our own."""
        self._write(f"{safe_line(text, 400)}\n")

    def error(self, error: DsmoeError) -> None:
        """What went wrong, without ending the chat."""
        self.show(ansi.error_message(error))

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        """Rows, each on a line."""
        for row in rows:
            self._write(f"{'  '.join(safe_line(cell) for cell in row).rstrip()}\n")

    def show(self, renderable: RenderableType) -> None:
        """Anything that Rich can draw, as bare text."""
        lines = ansi.render_lines(renderable, self.width, colour=False, styles=False)
        self._write("".join(f"{line}\n" for line in lines))

    def live(self, renderable: RenderableType | None) -> None:
        """Nothing: what changes is no text to be read."""

    def echo(self, message: str) -> None:
        """A message that was not typed, shown as one that was."""
        self._write("> " + safe_text(message).replace("\n", "\n  ") + "\n")

    @contextmanager
    def reply(self, after: str = "") -> Iterator[ReplyView]:
        """A reply that begins."""
        view = _View(self._write)
        try:
            yield view
        finally:
            view.end_line()

    def confirm(self, question: str) -> bool:
        """Ask for yes or no."""
        try:
            return self._lines.line(f"{safe_line(question)} [y/N] ").strip().lower() in ("y", "yes")
        except (KeyboardInterrupt, EOFError):
            self._write("\n")
            return False

    def edit(self, text: str) -> str | None:
        """Have `text` changed in the user's editor; None if nothing was saved. FileError: no editor."""
        editor = Editor()
        with self._signals.lent_to(editor):
            return editor.edit(text)

    def copy(self, text: str) -> str:
        """Put `text` on the clipboard with a tool; returns its name. FileError if there is none."""
        tool = copy_with_tool(text)
        if tool is None:
            raise FileError("there is no program for the clipboard", remedy="install wl-copy, xclip or xsel")
        return tool

    def _write(self, text: str) -> None:
        if self._is_gone:
            return
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError:
            self._is_gone = True
            # What could not be written would be tried again at the end.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
            self._signals.hang_up()


class _View:
    """A running reply."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._at_line_start = True
        self._told = False

    def progress(self, done: int, total: int) -> None:
        """Said once, where it will take a while."""
        if not self._told and total - done >= _LONG_PROMPT:
            self._told = True
            self._write(f"reading {total:,} tokens\n")

    def text(self, piece: str) -> None:
        """More of the reply."""
        if piece:
            self._write(safe_text(piece))
            self._at_line_start = piece.endswith("\n")

    def note(self, text: str) -> None:
        """A line of our own."""
        self.end_line()
        self._write(f"{safe_line(text, 400)}\n")

    def end_line(self) -> None:
        """Begin a new line, unless one has begun."""
        if not self._at_line_start:
            self._write("\n")
            self._at_line_start = True
