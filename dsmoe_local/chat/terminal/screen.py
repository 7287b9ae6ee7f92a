"""The interfaces of a terminal that the chat uses, and the data that both terminals share.

`full` and `plain` implement `Terminal`; tests have a `Screen` that records. Screen's methods must be called
from the thread that answers messages, not from the thread that reads keys. They make text safe to print, so
callers pass it unchanged.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from dsmoe_local.base.errors import DsmoeError

if TYPE_CHECKING:
    from rich.console import RenderableType

_DUMB_TERMINALS = ("", "dumb", "unknown")
_DEFAULT_SIZE = os.terminal_size((80, 24))


@dataclass(frozen=True, slots=True)
class Status:
    """The contents of the status bar. Empty strings and zeros are left out."""

    model: str = ""
    session: str = ""
    n_used: int = 0
    n_context: int = 0
    tokens_per_second: float = 0.0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """A completion. `text` replaces the last `replaces` characters; the menu shows `shown` or `text`."""

    text: str
    replaces: int = 0
    help: str = ""
    shown: str = ""


Completer: TypeAlias = Callable[[str], Iterable[Choice]]
"""Returns the completions of the text before the cursor. The thread that reads keys calls it."""


def no_completions(before: str) -> Iterable[Choice]:
    """Return nothing: the completer of a terminal without completion."""
    return ()


class ReplyView(Protocol):
    """A reply that is being shown."""

    def progress(self, done: int, total: int) -> None:
        """Show that `done` of `total` prompt tokens are read."""
        ...

    def reasoning(self, piece: str) -> None:
        """Append to the reasoning before the reply. It is shown dimmed, not as Markdown."""
        ...

    def reasons(self, n_tokens: int) -> None:
        """Show that so many tokens of hidden reasoning exist."""
        ...

    def reasoned(self, summary: str) -> None:
        """End the reasoning, and show a dim line about it."""
        ...

    def text(self, piece: str) -> None:
        """Append to the reply."""
        ...

    def note(self, text: str) -> None:
        """Show a dim line after the text so far."""
        ...


class Screen(Protocol):
    """The output side of a terminal, with its questions to the user."""

    @property
    def width(self) -> int:
        """The number of columns."""
        ...

    @property
    def height(self) -> int:
        """The number of rows."""
        ...

    @property
    def plain(self) -> bool:
        """True if only lines of text are printed: with `--plain` or on a dumb terminal."""
        ...

    @property
    def colour(self) -> bool:
        """True if colours are wanted."""
        ...

    def notice(self, text: str) -> None:
        """Show a dim line."""
        ...

    def error(self, error: DsmoeError) -> None:
        """Show an error that does not end the chat."""
        ...

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        """Show rows of cells; the first cell is a name."""
        ...

    def show(self, renderable: RenderableType) -> None:
        """Show a Rich renderable of safe text, `width` columns wide."""
        ...

    def live(self, renderable: RenderableType | None) -> None:
        """Show a panel below the running reply in place of the last one; None removes it.

        The plain terminal ignores it.
        """
        ...

    def echo(self, message: str) -> None:
        """Show a message that was written elsewhere, such as in the editor, like a typed one."""
        ...

    def reply(self, after: str = "") -> AbstractContextManager[ReplyView]:
        """Begin a reply. When the context ends, even by an exception, the whole reply is on the screen.

        `after` is the text that this reply continues; it may end anywhere, even inside a code block.
        """
        ...

    def confirm(self, question: str) -> bool:
        """Ask for yes or no. Enter alone, Ctrl-C and end of input mean no."""
        ...

    def edit(self, text: str) -> str | None:
        """Open `text` in the user's editor; None if it was not saved. FileError if there is no editor."""
        ...

    def copy(self, text: str) -> str:
        """Copy `text` to the clipboard. Return the way used, for a message. FileError if there is none."""
        ...


class Terminal(Screen, Protocol):
    """A Screen that also reads input."""

    def run(self, take: Callable[[str], bool], cancel: Callable[[], None], kill: Callable[[], None]) -> None:
        """Read input until the user leaves or `take` returns False.

        `take` handles one input; what it raises is raised here. `cancel` stops it and must return at once;
        `kill` ends an engine that does not stop. Both are called from any thread, but not from a signal
        handler. Raises InterruptedRunError for SIGTERM and SIGHUP, after the terminal has been restored.
        """
        ...


def is_dumb() -> bool:
    """Return True if the terminal can only print text: no colours, no cursor movement."""
    return os.environ.get("TERM", "") in _DUMB_TERMINALS


def wants_colour() -> bool:
    """Return True if colours may be sent to the terminal."""
    return not os.environ.get("NO_COLOR") and not is_dumb()


def terminal_size() -> os.terminal_size:
    """Return the size of the terminal on stdout; 80 x 24 if it is unknown."""
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        size = _DEFAULT_SIZE
    return os.terminal_size((size.columns or _DEFAULT_SIZE.columns, size.lines or _DEFAULT_SIZE.lines))
