"""What the chat puts on the terminal: replies as they come, a status line, notices. Decides nothing."""

from __future__ import annotations

import sys
import termios
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.text import safe_line, safe_text
from dsmoe_local.engine.types import FinishReason, TokenEvent, Usage

_INPUT, _LOCAL = 0, 3  # places in what termios.tcgetattr returns
_ENDINGS = {
    FinishReason.LENGTH: "cut at max_tokens: /continue goes on",
    FinishReason.CONTEXT_FULL: "the context is full: /clear starts over, /undo goes back",
    FinishReason.CANCELLED: "stopped: /continue goes on",
}


class Screen:
    """The terminal. Everything foreign passes safe_text and is never read as markup."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._can_erase = self.console.is_terminal and not self.console.is_dumb_terminal
        self._status = False

    def notice(self, text: str) -> None:
        """A quiet line of our own."""
        self.console.print(Text(safe_line(text, 400), style="dim"))

    def error(self, error: DsmoeError) -> None:
        """What went wrong, without ending the chat."""
        first, *rest = safe_text(str(error)).splitlines()
        self.console.print(Text(f"error: {first}", style="red"))
        for line in rest:
            self.console.print(Text(f"  {line}", style="dim"))

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        """Rows of a name, a value or explanation, and so on."""
        table = Table.grid(padding=(0, 2))
        for number, row in enumerate(rows):
            if number == 0:
                for column in range(len(row)):
                    table.add_column(style="bold" if column == 0 else None, no_wrap=column == 0)
            table.add_row(*(Text(safe_line(cell)) for cell in row))
        self.console.print(table, soft_wrap=False)

    def reply(self, events: Iterable[TokenEvent], *, trim: bool) -> None:
        """Print a reply while it comes. `trim` leaves out the whitespace that it begins with."""
        begun = not trim
        at_line_start = True
        try:
            for event in events:
                if event.progress is not None:
                    self._show_status(f"reading {event.progress.done} of {event.progress.total} tokens")
                text = event.text if begun else event.text.lstrip()
                if text:
                    begun = True
                    self._clear_status()
                    self._write(safe_text(text))
                    at_line_start = text.endswith("\n")
                if event.finish_reason is not None:
                    self._clear_status()
                    if not at_line_start:
                        self._write("\n")
                    at_line_start = True
                    if event.finish_reason in _ENDINGS:
                        self.notice(f"[{_ENDINGS[event.finish_reason]}]")
        finally:
            self._clear_status()
            if not at_line_start:
                self._write("\n")

    def _write(self, text: str) -> None:
        self.console.file.write(text)
        self.console.file.flush()

    def _show_status(self, text: str) -> None:
        if self._can_erase:
            self._clear_status()
            self.console.print(Text(text, style="dim"), end="")
            self.console.file.flush()
            self._status = True

    def _clear_status(self) -> None:
        if self._status:
            self._write("\r\x1b[K")
            self._status = False


def describe_usage(usage: Usage) -> str:
    """One line on what a reply took."""
    seed = "" if usage.seed is None else f", seed {usage.seed}"
    read = usage.prompt_tokens - usage.cached_tokens
    return (
        f"prompt {usage.prompt_tokens} tokens ({read} read in {usage.prompt_seconds:.2f} s), "
        f"reply {usage.completion_tokens} tokens in {usage.completion_seconds:.2f} s "
        f"({usage.tokens_per_second:.1f} tokens/s){seed}"
    )


@contextmanager
def keys_withheld() -> Iterator[None]:
    """Typed keys stay off the screen and wait until a prompt reads them; Ctrl-C still interrupts."""
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    withheld = termios.tcgetattr(descriptor)
    # Without ICRNL a typed Enter reaches the prompt as Enter, not as Ctrl-J.
    withheld[_INPUT] &= ~termios.ICRNL
    withheld[_LOCAL] &= ~(termios.ECHO | termios.ICANON)
    # Ctrl-C would throw away what was typed before it.
    withheld[_LOCAL] |= termios.NOFLSH
    termios.tcsetattr(descriptor, termios.TCSADRAIN, withheld)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
