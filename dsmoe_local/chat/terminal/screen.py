"""What the chat asks of a terminal. `full` and `plain` are the two; tests have a recording one.

Every method may be called from the thread that works on replies, never from the one that reads keys. All text
is made safe here: callers pass it as it came.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from dsmoe_local.base.errors import DsmoeError

if TYPE_CHECKING:
    from rich.console import RenderableType


class ReplyView(Protocol):
    """A reply on its way to the screen."""

    def progress(self, done: int, total: int) -> None:
        """`done` of `total` prompt tokens are read."""
        ...

    def text(self, piece: str) -> None:
        """More of the reply."""
        ...

    def note(self, text: str) -> None:
        """A quiet line of our own, after what was said so far."""
        ...


class Screen(Protocol):
    """A terminal that a conversation is held on."""

    @property
    def width(self) -> int:
        """Columns."""
        ...

    @property
    def height(self) -> int:
        """Lines."""
        ...

    @property
    def plain(self) -> bool:
        """Whether nothing but lines of text is wanted: --plain, a dumb terminal."""
        ...

    @property
    def colour(self) -> bool:
        """Whether colours are wanted."""
        ...

    def notice(self, text: str) -> None:
        """A quiet line of our own."""
        ...

    def error(self, error: DsmoeError) -> None:
        """What went wrong, without ending the chat."""
        ...

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        """Rows of a name, a value or explanation, and so on."""
        ...

    def show(self, renderable: RenderableType) -> None:
        """Anything that Rich can draw, made of safe text; its width is `width`."""
        ...

    def live(self, renderable: RenderableType | None) -> None:
        """What is drawn beside the running reply, in place of what was; None takes it away. Plain terminals
        ignore it.
        """
        ...

    def echo(self, message: str) -> None:
        """A message that was not typed into the input, shown as one that was."""
        ...

    def reply(self, after: str = "") -> AbstractContextManager[ReplyView]:
        """A reply that begins; it is complete on the screen when the context ends, in whatever way.

        `after` is the text that it goes on with, which may have ended in the middle of anything.
        """
        ...

    def confirm(self, question: str) -> bool:
        """Ask for yes or no; Enter alone, Ctrl-C and the end of the input are no."""
        ...

    def edit(self, text: str) -> str | None:
        """Have `text` changed in the user's editor; None if nothing was saved. FileError: no editor."""
        ...

    def copy(self, text: str) -> str:
        """Put `text` on the clipboard; returns the way it took, for people. FileError if there is none."""
        ...
