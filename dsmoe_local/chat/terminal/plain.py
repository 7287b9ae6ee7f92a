"""The chat's terminal for screen readers, --plain and terminals that can only print: lines in, lines out.

Nothing is drawn and nothing is written twice: no colours, no escape codes, replies raw as they come. Readline
edits the input where the terminal can. Everything happens in the thread that calls `run`.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from dsmoe_local.base.errors import DsmoeError, FileError, InterruptedRunError
from dsmoe_local.base.text import safe_line, safe_text
from dsmoe_local.chat.terminal import ansi
from dsmoe_local.chat.terminal.clipboard import copy_with_tool
from dsmoe_local.chat.terminal.completion import Complete, nothing
from dsmoe_local.chat.terminal.editor import edit_text
from dsmoe_local.chat.terminal.history import open_history
from dsmoe_local.chat.terminal.keys import block_is_open
from dsmoe_local.chat.terminal.output import terminal_size
from dsmoe_local.chat.terminal.screen import ReplyView

if TYPE_CHECKING:
    from rich.console import RenderableType

_LONG_PROMPT = 256  # tokens that take long enough to be worth a line
_PASTE_SECONDS = 0.03  # lines that come faster than that were pasted


class PlainTerminal:
    """A Screen that reads lines, see the module. `history_path` None: nothing typed is kept."""

    plain = True
    colour = False

    def __init__(self, complete: Complete = nothing, history_path: Path | None = None) -> None:
        self._history = open_history(history_path)
        self._readline = _start_readline(complete)
        if self._readline:
            import readline

            for text in reversed(list(self._history.load_history_strings())):
                if "\n" not in text:
                    readline.add_history(text)
        self._signal = 0
        self._busy = False
        self._n_interrupts = 0
        self._woken = -1  # can be read once a signal has come

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
        with self._signals_handled(cancel, kill):
            while not self._signal:
                try:
                    text = self._read()
                except KeyboardInterrupt:
                    _write("\n")
                    self.notice("Ctrl-D or /exit leaves")
                    continue
                except EOFError:
                    _write("\n")
                    break
                if not self._take(take, text):
                    break
        if self._signal:
            raise InterruptedRunError("the chat was ended by a signal", signal_number=self._signal)

    def notice(self, text: str) -> None:
        """A quiet line of our own."""
        _write(f"{safe_line(text, 400)}\n")

    def error(self, error: DsmoeError) -> None:
        """What went wrong, without ending the chat."""
        self.show(ansi.error_message(error))

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        """Rows, each on a line."""
        for row in rows:
            _write(f"{'  '.join(safe_line(cell) for cell in row).rstrip()}\n")

    def show(self, renderable: RenderableType) -> None:
        """Anything that Rich can draw, as bare text."""
        lines = ansi.render_lines(renderable, self.width, colour=False, styles=False)
        _write("".join(f"{line}\n" for line in lines))

    def live(self, renderable: RenderableType | None) -> None:
        """Nothing: what changes is no text to be read."""

    @contextmanager
    def reply(self) -> Iterator[ReplyView]:
        """A reply that begins."""
        view = _View()
        try:
            yield view
        finally:
            view.end_line()

    def confirm(self, question: str) -> bool:
        """Ask for yes or no."""
        busy, self._busy = self._busy, False
        try:
            return self._line(f"{safe_line(question)} [y/N] ").strip().lower() in ("y", "yes")
        except (KeyboardInterrupt, EOFError):
            _write("\n")
            return False
        finally:
            self._busy = busy

    def edit(self, text: str) -> str | None:
        """Have `text` changed in the user's editor; None if nothing was saved. FileError: no editor."""
        return edit_text(text)

    def copy(self, text: str) -> str:
        """Put `text` on the clipboard with a tool; returns its name. FileError if there is none."""
        tool = copy_with_tool(text)
        if tool is None:
            raise FileError("there is no program for the clipboard", remedy="install wl-copy, xclip or xsel")
        return tool

    def _take(self, take: Callable[[str], bool], text: str) -> bool:
        if text.strip():
            self._history.append_string(text)
        self._busy, self._n_interrupts = True, 0
        try:
            return take(text)
        finally:
            self._busy = False

    def _read(self) -> str:
        """An input: a line, a block between three quotes, or a paste of lines."""
        typed_ahead = _waits()
        lines = [self._line("> ")]
        while block_is_open("\n".join(lines)):
            lines.append(self._line("  "))
        while not typed_ahead and _waits(_PASTE_SECONDS):
            lines.append(self._line())
        return "\n".join(lines)

    def _line(self, prompt: str = "") -> str:
        if self._readline or not sys.stdin.isatty():
            return input(prompt)
        _write(prompt)
        # A signal that comes just before a blocking read would not be seen before there is a line.
        while sys.stdin not in select.select([sys.stdin, self._woken], [], [])[0]:
            os.read(self._woken, 64)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    @contextmanager
    def _signals_handled(self, cancel: Callable[[], None], kill: Callable[[], None]) -> Iterator[None]:
        def interrupt(number: int, frame: FrameType | None) -> None:
            if not self._busy:
                raise KeyboardInterrupt
            self._n_interrupts += 1
            _in_thread(cancel if self._n_interrupts == 1 else kill)

        def leave(number: int, frame: FrameType | None) -> None:
            again, self._signal = bool(self._signal), number
            if not self._busy:
                raise EOFError
            _in_thread(kill if again else cancel)

        handlers = {signal.SIGINT: interrupt, signal.SIGTERM: leave, signal.SIGHUP: leave}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        self._woken, wake = os.pipe()
        os.set_blocking(wake, False)
        woken_before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(woken_before)
            os.close(self._woken)
            os.close(wake)
            for number, handler in before.items():
                signal.signal(number, handler)


class _View:
    """A running reply."""

    def __init__(self) -> None:
        self._at_line_start = True
        self._told = False

    def progress(self, done: int, total: int) -> None:
        """Said once, where it will take a while."""
        if not self._told and total - done >= _LONG_PROMPT:
            self._told = True
            _write(f"reading {total:,} tokens\n")

    def text(self, piece: str) -> None:
        """More of the reply."""
        if piece:
            _write(safe_text(piece))
            self._at_line_start = piece.endswith("\n")

    def note(self, text: str) -> None:
        """A line of our own."""
        self.end_line()
        _write(f"{safe_line(text, 400)}\n")

    def end_line(self) -> None:
        """Begin a new line, unless one has begun."""
        if not self._at_line_start:
            _write("\n")
            self._at_line_start = True


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _in_thread(function: Callable[[], None]) -> None:
    """Not in the signal handler: the thread that it interrupts may hold what `function` waits for."""
    threading.Thread(target=function, daemon=True).start()


def _waits(seconds: float = 0.0) -> bool:
    """Whether input is there already."""
    return sys.stdin.isatty() and bool(select.select([sys.stdin], [], [], seconds)[0])


def _start_readline(complete: Complete) -> bool:
    """Edit lines with readline where the terminal is more than a printer; it adds no codes of its own."""
    if os.environ.get("TERM", "") in ("", "dumb", "unknown") or not sys.stdin.isatty():
        return False
    try:
        import readline
    except ImportError:
        return False
    offered: list[str] = []

    def offer(word: str, number: int) -> str | None:
        if number == 0:
            before = readline.get_line_buffer()[: readline.get_endidx()]
            begin = readline.get_begidx()
            offered[:] = [
                before[begin : len(before) - choice.replaces] + choice.text
                for choice in complete(before)
                if len(before) - choice.replaces >= begin
            ]
        return offered[number] if number < len(offered) else None

    readline.set_completer_delims(" ")
    readline.set_completer(offer)
    readline.set_auto_history(True)
    for setting in (
        "tab: complete",
        "set enable-bracketed-paste off",
        "set enable-meta-key off",
        "set bell-style none",
    ):
        readline.parse_and_bind(setting)
    return True
