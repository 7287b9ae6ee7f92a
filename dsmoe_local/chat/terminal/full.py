"""The chat's terminal at its best: replies as Markdown while they come, an input that is there all the time.

Keys are read and everything is drawn in the thread that calls `run`. Inputs are dealt with in another one,
the worker, whose calls of Screen's methods are handed over.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from dsmoe_local.base.errors import DsmoeError, FileError, InterruptedRunError
from dsmoe_local.chat.markdown.stream import MarkdownStream
from dsmoe_local.chat.terminal import ansi
from dsmoe_local.chat.terminal.clipboard import copy_with_tool, osc_52
from dsmoe_local.chat.terminal.completion import Complete, nothing
from dsmoe_local.chat.terminal.environment import wants_colour
from dsmoe_local.chat.terminal.interface import Interface
from dsmoe_local.chat.terminal.output import terminal_size
from dsmoe_local.chat.terminal.reply import RawText
from dsmoe_local.chat.terminal.screen import ReplyView
from dsmoe_local.chat.terminal.status import Status

if TYPE_CHECKING:
    from rich.console import RenderableType

_LAST_WAIT = 3.0  # seconds for a worker to end, once it is told to stop and once its engine is gone
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

_T = TypeVar("_T")


class FullTerminal:
    """A Screen with an input line, see the module.

    `state` gives the bottom line, `complete` what Tab offers: both are called from other threads than the
    worker's. Without `markdown` replies are printed as they come. `history_path` None: nothing typed is kept.
    """

    plain = False

    def __init__(
        self,
        state: Callable[[], Status],
        complete: Complete = nothing,
        history_path: Path | None = None,
        *,
        markdown: bool = True,
    ) -> None:
        self.colour = wants_colour()
        self._markdown = markdown
        self._inputs: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._signal = 0
        self._running = threading.Event()
        self._over = threading.Event()
        self._interface = Interface(
            state=state,
            complete=complete,
            history_path=history_path,
            colour=self.colour,
            send=self._inputs.put,
        )

    @property
    def width(self) -> int:
        """Columns."""
        return terminal_size().columns

    @property
    def height(self) -> int:
        """Lines."""
        return terminal_size().rows

    def run(self, take: Callable[[str], bool], cancel: Callable[[], None], kill: Callable[[], None]) -> None:
        """Read inputs until the user leaves, or `take` says so.

        `take` deals with one input, in the worker, and returns whether the chat goes on; what it raises is
        raised here. `cancel` stops what it does, at once, `kill` ends an engine that does not stop: any
        thread calls them. Raises InterruptedRunError for SIGTERM and SIGHUP, with the terminal as it was.
        """
        self._interface.cancel, self._interface.kill = cancel, kill
        worker = threading.Thread(target=self._work, args=(take,), name="chat", daemon=True)
        with self._signals_handled():
            worker.start()
            self._running.set()
            try:
                self._interface.run()
            except EOFError:
                pass  # the terminal is gone, or the input came to its end
            finally:
                self._running.clear()
                self._over.set()
                self._inputs.put(None)
                self._end(worker, cancel, kill)
        if self._signal:
            raise InterruptedRunError("the chat was ended by a signal", signal_number=self._signal)

    def notice(self, text: str) -> None:
        """A quiet line of our own."""
        self.show(ansi.notice(text))

    def error(self, error: DsmoeError) -> None:
        """What went wrong, without ending the chat."""
        self.show(ansi.error_message(error))

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        """Rows of a name, a value or explanation, and so on."""
        self.show(ansi.table(rows, self.width))

    def show(self, renderable: RenderableType) -> None:
        """Anything that Rich can draw, made of safe text."""
        lines = ansi.render_lines(renderable, self.width, colour=self.colour)
        text = "".join(f"{line}\n" for line in lines)
        if self._running.is_set():
            self._interface.mailbox.post(lambda: self._interface.stage.print(text))
        else:
            self._interface.print_now(text)

    def live(self, renderable: RenderableType | None) -> None:
        """What is drawn below the running reply, in place of what was; None takes it away."""
        self._interface.mailbox.post(lambda: self._interface.stage.show_panel(renderable))

    def echo(self, message: str) -> None:
        """A message that was not typed into the input, shown as one that was."""
        self._interface.mailbox.post(lambda: self._interface.stage.echo(message))

    @contextmanager
    def reply(self, after: str = "") -> Iterator[ReplyView]:
        """A reply that begins, going on with `after`; it is complete on the screen when the context ends."""
        text = MarkdownStream(colour=self.colour, after=after) if self._markdown else RawText()
        stage = self._interface.stage
        self._interface.mailbox.post(lambda: self._interface.begin_reply(text))
        try:
            yield _View(self._interface)
        finally:
            self._call(stage.finish, None)

    def confirm(self, question: str) -> bool:
        """Ask for yes or no, in place of the input."""
        answer: Future[bool] = Future()
        self._interface.mailbox.post(lambda: self._interface.ask(question, answer))
        return self._wait(answer, False)

    def edit(self, text: str) -> str | None:
        """Have `text` changed in the user's editor; None if nothing was saved. FileError: no editor."""
        result: Future[str | None] = Future()
        self._interface.mailbox.post(lambda: self._interface.edit(text, result))
        return self._wait(result, None)

    def copy(self, text: str) -> str:
        """Put `text` on the clipboard; returns the way it took. FileError if there is none."""
        ways = []
        sequence = osc_52(text)
        if sequence is not None:
            self._call(lambda: self._interface.write(sequence), None)
            ways.append("the terminal (OSC 52)")
        tool = copy_with_tool(text)
        if tool is not None:
            ways.append(tool)
        if not ways:
            raise FileError(
                "this is too long for the terminal's clipboard", remedy="/export FILE writes it to a file"
            )
        return " and ".join(ways)

    def _work(self, take: Callable[[str], bool]) -> None:
        while (text := self._inputs.get()) is not None:
            try:
                goes_on = take(text)
            except BaseException as error:  # noqa: BLE001 - `run` raises it
                self._interface.mailbox.post(lambda error=error: self._interface.fail(error))  # type: ignore[misc]
                return
            self._interface.mailbox.post(lambda goes_on=goes_on: self._interface.idle(goes_on))  # type: ignore[misc]

    def _call(self, action: Callable[[], _T], otherwise: _T) -> _T:
        """Have the drawing thread do it, and wait; `otherwise` if it is over."""
        result: Future[_T] = Future()
        self._interface.mailbox.post(lambda: result.set_result(action()))
        return self._wait(result, otherwise)

    def _wait(self, result: Future[_T], otherwise: _T) -> _T:
        while not self._over.is_set():
            with suppress(TimeoutError):
                return result.result(timeout=0.2)
        return otherwise

    def _end(self, worker: threading.Thread, cancel: Callable[[], None], kill: Callable[[], None]) -> None:
        """The worker may be in a reply still, where the terminal went away under it."""
        for stop in (cancel, kill):
            if worker.is_alive():
                worker.join(0.05)
            if worker.is_alive():
                stop()
                worker.join(_LAST_WAIT)

    @contextmanager
    def _signals_handled(self) -> Iterator[None]:
        def handle(number: int, frame: FrameType | None) -> None:
            self._signal = number
            self._interface.mailbox.urge(self._interface.leave_now)

        before = [signal.signal(number, handle) for number in _SIGNALS]
        try:
            yield
        finally:
            for number, handler in zip(_SIGNALS, before, strict=True):
                signal.signal(number, handler)


class _View:
    """A running reply, for the worker."""

    def __init__(self, interface: Interface) -> None:
        self._interface = interface

    def progress(self, done: int, total: int) -> None:
        """`done` of `total` prompt tokens are read."""
        text = f"reading {done:,} of {total:,} tokens"
        stage = self._interface.stage

        def show() -> None:
            stage.state = text

        self._interface.mailbox.post(show)

    def text(self, piece: str) -> None:
        """More of the reply."""
        if piece:
            self._interface.mailbox.post(piece)

    def note(self, text: str) -> None:
        """A quiet line of our own."""
        self._interface.mailbox.post(lambda: self._interface.stage.note(text))
