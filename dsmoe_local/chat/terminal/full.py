"""The full terminal: replies are drawn as Markdown while they arrive, above an input that is always visible.

The thread that calls `run`, the UI thread, reads keys and draws. The worker thread answers messages and calls
the methods of Screen, which pass everything on to the UI thread.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dsmoe_local.base.errors import DsmoeError, FileError, InterruptedRunError
from dsmoe_local.base.signals import handling
from dsmoe_local.base.text import count
from dsmoe_local.chat.markdown.stream import MarkdownStream
from dsmoe_local.chat.terminal import ansi
from dsmoe_local.chat.terminal.external import copy_with_tool, osc_52
from dsmoe_local.chat.terminal.keys import key_bindings
from dsmoe_local.chat.terminal.screen import (
    Completer,
    ReplyView,
    Status,
    no_completions,
    terminal_size,
    wants_colour,
)
from dsmoe_local.chat.terminal.ui import ChatUI

if TYPE_CHECKING:
    from rich.console import RenderableType

_WORKER_SECONDS = 3.0  # for the worker to end after `cancel`, and again after `kill`

_T = TypeVar("_T")


class FullTerminal:
    """A Terminal that draws. `status` and `complete` are called in the UI thread."""

    plain = False

    def __init__(
        self,
        status: Callable[[], Status],
        complete: Completer = no_completions,
        history_path: Path | None = None,
    ) -> None:
        self.colour = wants_colour()
        self._inputs: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._ended_by = 0
        self._over = threading.Event()
        self._ui = ChatUI(
            status=status,
            complete=complete,
            history_path=history_path,
            colour=self.colour,
            submit=self._inputs.put,
        )
        self._ui.app.key_bindings = key_bindings(self._ui)

    @property
    def width(self) -> int:
        return terminal_size().columns

    @property
    def height(self) -> int:
        return terminal_size().lines

    def run(self, take: Callable[[str], bool], cancel: Callable[[], None], kill: Callable[[], None]) -> None:
        worker = threading.Thread(target=self._work, args=(take,), name="chat", daemon=True)
        handlers: dict[int, Callable[[int], None]] = {
            signal.SIGTERM: self._on_end,
            signal.SIGHUP: self._on_end,
            signal.SIGCONT: lambda _: self._ui.continued(),
        }
        with handling(handlers):
            worker.start()
            try:
                self._ui.run(cancel, kill)
            except EOFError:
                pass  # the terminal has been closed
            finally:
                self._over.set()
                self._inputs.put(None)
                # If the terminal was closed, the worker may still be answering.
                for stop in (cancel, kill):
                    worker.join(0.05)
                    if worker.is_alive():
                        stop()
                        worker.join(_WORKER_SECONDS)
        if self._ended_by:
            raise InterruptedRunError("the chat was ended by a signal", signal_number=self._ended_by)

    def notice(self, text: str) -> None:
        self.show(ansi.notice(text))

    def error(self, error: DsmoeError) -> None:
        self.show(ansi.error_message(error))

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        self.show(ansi.table(rows, self.width))

    def show(self, renderable: RenderableType) -> None:
        text = self._ui.display.render(renderable)
        self._ui.post(lambda: self._ui.display.print(text))

    def live(self, renderable: RenderableType | None) -> None:
        self._ui.post(lambda: self._ui.display.set_panel(renderable))

    def echo(self, message: str) -> None:
        self._ui.post(lambda: self._ui.display.echo(message))

    @contextmanager
    def reply(self, after: str = "") -> Iterator[ReplyView]:
        reply = MarkdownStream(colour=self.colour, after=after)
        self._ui.post(lambda: self._ui.begin_reply(reply))
        try:
            yield _FullReply(self._ui)
        finally:
            self._call(self._ui.display.finish_reply, None)

    def confirm(self, question: str) -> bool:
        answer: Future[bool] = Future()
        self._ui.post(lambda: self._ui.ask(question, answer))
        return self._wait(answer, False)

    def edit(self, text: str) -> str | None:
        result: Future[str | None] = Future()
        self._ui.post(lambda: self._ui.edit(text, result))
        return self._wait(result, None)

    def copy(self, text: str) -> str:
        ways = []
        sequence = osc_52(text)
        if sequence is not None:
            self._call(lambda: self._ui.write(sequence), None)
            ways.append("the terminal (OSC 52)")
        tool = copy_with_tool(text)
        if tool is not None:
            ways.append(tool)
        if not ways:
            raise FileError(
                "this is too long for the terminal's clipboard", remedy="/export FILE writes it to a file"
            )
        return " and ".join(ways)

    def _on_end(self, number: int) -> None:
        self._ended_by = number
        self._ui.post(self._ui.leave_now)

    def _work(self, take: Callable[[str], bool]) -> None:
        while (text := self._inputs.get()) is not None:
            try:
                goes_on = take(text)
            except BaseException as error:  # noqa: BLE001 - `run` raises it
                self._ui.post(lambda error=error: self._ui.fail(error))  # type: ignore[misc]
                return
            self._ui.post(lambda goes_on=goes_on: self._ui.message_done(goes_on=goes_on))  # type: ignore[misc]

    def _call(self, action: Callable[[], _T], otherwise: _T) -> _T:
        """Run `action` in the UI thread and return its result, or `otherwise` if that thread has ended."""
        result: Future[_T] = Future()
        self._ui.post(lambda: result.set_result(action()))
        return self._wait(result, otherwise)

    def _wait(self, result: Future[_T], otherwise: _T) -> _T:
        while not self._over.is_set():
            with suppress(TimeoutError):
                return result.result(timeout=0.2)
        return otherwise


class _FullReply:
    """A ReplyView. Its methods are called by the worker."""

    def __init__(self, ui: ChatUI) -> None:
        self._ui = ui

    def progress(self, done: int, total: int) -> None:
        self._ui.post(lambda: setattr(self._ui.display, "activity", f"reading {done:,} of {total:,} tokens"))

    def reasoning(self, piece: str) -> None:
        if piece:
            self._ui.post(lambda: self._ui.display.feed_reasoning(piece))

    def reasons(self, n_tokens: int) -> None:
        self._ui.post(lambda: setattr(self._ui.display, "activity", f"thinking: {count(n_tokens, 'token')}"))

    def reasoned(self, summary: str) -> None:
        self._ui.post(lambda: self._ui.display.end_reasoning(summary))

    def text(self, piece: str) -> None:
        if piece:
            self._ui.post(lambda: self._ui.display.feed(piece))

    def note(self, text: str) -> None:
        self._ui.post(lambda: self._ui.display.note(text))
