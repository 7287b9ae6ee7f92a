"""The full terminal in the UI thread: actions of keys, drawing, and queued messages.

Other threads reach it only through `ChatUI.post`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from prompt_toolkit.application import in_terminal
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.document import Document
from prompt_toolkit.filters import is_searching
from prompt_toolkit.input.posix_utils import PosixStdinReader
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.search import stop_search

from dsmoe_local.base.errors import FileError
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat import attachments, multiline
from dsmoe_local.chat.markdown.stream import MarkdownStream
from dsmoe_local.chat.terminal import ansi
from dsmoe_local.chat.terminal.display import Display
from dsmoe_local.chat.terminal.external import Editor
from dsmoe_local.chat.terminal.input import MessageQueue, close_open_paste, open_history, read_typeahead
from dsmoe_local.chat.terminal.layout import STYLE, ChatLayout, shorten
from dsmoe_local.chat.terminal.renderer import (
    InlineApplication,
    InlineRenderer,
    TerminalOutput,
    resize_behaviour,
)
from dsmoe_local.chat.terminal.screen import Completer, Status

_SECONDS_BETWEEN_REDRAWS = 0.05  # after `post`; keys are drawn at once
_SECONDS_BETWEEN_INTERRUPTS = 1.0  # the second Ctrl-C takes effect only this long after the first
_CANCEL_AGAIN_SECONDS = 0.25
_SIGNAL_GRACE_SECONDS = 3.0  # for a running reply, after a signal that ends the chat
_SILENT_SECONDS = 0.5  # without any text until the wait for a reply is announced
_ESCAPE_SECONDS = 0.1  # within which Esc and the next characters are one key
_MANY_LINES = 20  # with more lines, their number is shown
_BLOCK_OPEN = f"block open: {multiline.MARK} on a line of its own closes it"
_PASTED_AT = "pasted text attaches no files: delete the \\ before @ to attach one"

Action = Callable[[], None]


class ChatUI:
    """The application, its layout and its state. `submit` hands a message to the thread that answers.

    `keys` sets the key bindings of `app`.
    """

    def __init__(
        self,
        *,
        status: Callable[[], Status],
        complete: Completer,
        history_path: Path | None,
        colour: bool,
        submit: Callable[[str], None],
    ) -> None:
        self._submit = submit
        self._thread = threading.get_ident()
        self.messages = MessageQueue(self._begin)
        self._mark_is_pasted = False  # the input begins with a pasted mark, which opens no block
        self._hint = ""
        self._question: tuple[str, Future[bool]] | None = None
        self._n_suspensions = 0
        self._redraw_is_due = False
        self._drawn_at = 0.0
        self._editor: Editor | None = None
        self.layout = ChatLayout(
            history=open_history(history_path),
            complete=complete,
            state_lines=self._state_lines,
            status=status,
            question=lambda: "" if self._question is None else self._question[0],
        )
        self.layout.input.on_text_changed += lambda _: self._input_changed()
        output = TerminalOutput(hung_up=self.leave_now)
        self.app = InlineApplication(
            layout=self.layout.layout,
            style=STYLE,
            include_default_pygments_style=False,
            color_depth=None if colour else ColorDepth.DEPTH_1_BIT,
            erase_when_done=True,
            terminal_size_polling_interval=None,
            output=output,
        )
        self.app.ttimeoutlen = _ESCAPE_SECONDS
        if isinstance(self.app.input, Vt100Input):
            # prompt_toolkit keeps bytes that are not UTF-8 as surrogates, which cannot be stored.
            self.app.input.stdin_reader = PosixStdinReader(self.app.input.fileno(), errors="replace")
        self.renderer = InlineRenderer(self.app.renderer.style, output, resize_behaviour())
        self.app.renderer = self.renderer
        self.display = Display(self.renderer.print_above, output.get_size, colour=colour)
        self.renderer.live_lines = self.display.live_lines

    def post(self, action: Action) -> None:
        """Run `action` in the UI thread and redraw. May be called from any thread.

        While the application does not run, the action runs at once if this is the UI thread, and is dropped
        otherwise.
        """

        def run() -> None:
            action()
            self._redraw_soon()

        loop = self.app.loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop has just been closed
                loop.call_soon_threadsafe(run)
        elif threading.get_ident() == self._thread:
            action()
            self.renderer.erase()  # writes what was printed

    def run(self, cancel: Action, kill: Action) -> None:
        """Read keys until the user leaves. Raises EOFError if the terminal is closed.

        See Terminal.run for `cancel` and `kill`.
        """
        self._cancel_reply, self._kill_engine = cancel, kill
        # In raw mode from now on, so that an Enter typed before the application starts stays an Enter.
        with self.app.input.raw_mode():
            store_typeahead(self.app.input, read_typeahead(self.app.input.fileno()))
            self.app.run(pre_run=self._start, set_exception_handler=False)

    # Called through `post`.

    def begin_reply(self, reply: MarkdownStream) -> None:
        """Begin a reply. If it shows nothing for a while, announce the wait."""

        def announce() -> None:
            self.display.announce_wait(reply)
            self.app.invalidate()

        self.display.begin_reply(reply)
        self._later(_SILENT_SECONDS, announce)

    def message_done(self, *, goes_on: bool) -> None:
        """Begin the next message after one has been answered, or leave."""
        if not goes_on:
            self.messages.leave()
        self.messages.done()
        self._exit_if_idle()

    def fail(self, error: BaseException) -> None:
        """End the application with an exception."""
        if not self.app.is_done:
            self.app.exit(exception=error)

    def ask(self, question: str, answer: Future[bool]) -> None:
        """Ask for yes or no in place of the input."""
        if is_searching():
            stop_search()
        self.layout.answer.reset()
        self._question = (question, answer)
        self.layout.focus()

    def edit(self, text: str, result: Future[str | None]) -> None:
        """Open a text in the editor."""

        async def use() -> None:
            try:
                result.set_result(await self._run_editor(text))
            except FileError as error:
                result.set_exception(error)

        self._suspend_during(use)

    def write(self, sequence: str) -> None:
        """Write an escape sequence to the terminal."""
        self.app.output.write_raw(sequence)
        self.app.output.flush()

    def leave_now(self) -> None:
        """Leave because of a signal or a closed terminal. A running reply gets some time to end."""
        first = not self.messages.leaving
        self.messages.leave()
        self.answer(yes=False)
        if self._editor is not None:
            self._editor.end()
        self._exit_if_idle()
        if first and self.app.is_running:
            self._cancel(self.messages.number)
            self._later(_SIGNAL_GRACE_SECONDS, self._kill, self.messages.number)
            self._later(2 * _SIGNAL_GRACE_SECONDS, self._exit)

    # Used by key bindings.

    @property
    def input(self) -> Buffer:
        """The buffer of the next message."""
        return self.layout.input

    @property
    def is_asking(self) -> bool:
        """True while a question waits for its answer."""
        return self._question is not None

    @property
    def is_suspended(self) -> bool:
        """True while the terminal belongs to the editor or the shell."""
        return self._n_suspensions > 0

    @property
    def block_is_open(self) -> bool:
        """True if the input is a block without its closing mark."""
        return not self._mark_is_pasted and multiline.is_open(self.input.text)

    def paste(self, text: str) -> None:
        """Insert pasted text. In a message it attaches no files."""
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        before = self.input.document.text_before_cursor
        begins_with_mark = not before and text.startswith(multiline.MARK)
        is_command = (before + text).startswith("/")
        escaped = text if is_command else attachments.escaped(text, before=before)
        self.input.insert_text(escaped)
        self._mark_is_pasted |= begins_with_mark
        if escaped != text:
            self._hint = _PASTED_AT

    def enter(self) -> None:
        """Submit the input, or queue it while a reply is running."""
        if self._mark_is_pasted and multiline.content(self.input.text) is not None:
            self.input.document = Document(multiline.quoted(self.input.text))
        text = self.input.text
        if text.strip():
            self.input.append_to_history()
        self._clear_input()
        self._hint = ""
        self.messages.add(text)

    def answer_typed(self) -> None:
        """Answer the question with what was typed: y and yes mean yes."""
        self.answer(yes=self.layout.answer.text.strip().lower() in ("y", "yes"))

    def answer(self, *, yes: bool) -> None:
        """Answer the question, if there is one."""
        if self._question is not None:
            question, answer = self._question
            self._question = None
            self.layout.focus()
            self.display.print(f"{safe_line(question)} {'yes' if yes else 'no'}\n")
            answer.set_result(yes)

    def interrupt(self) -> None:
        """Ctrl-C: answer no, or stop the reply (twice: end the engine), or clear the input."""
        if self.is_asking:
            self.answer(yes=False)
        elif self.messages.busy:
            self._stop()
        else:
            self._clear_input()
            self._hint = "Ctrl-D or /exit leaves"

    def leave(self) -> None:
        """Ctrl-D: stop the running reply, then leave."""
        self.messages.leave()
        if self.messages.busy and self.messages.stopping_since is None:
            self._stop()
        self._exit_if_idle()

    def take_back(self) -> None:
        """Make the last queued message the input again."""
        self.input.document = Document(self.messages.waiting.pop())

    def open_editor(self) -> None:
        """Open the input in the editor."""

        async def use() -> None:
            try:
                text = await self._run_editor(self.input.text)
            except FileError as error:
                self.display.print(self.display.render(ansi.error_message(error)), gap=True)
            else:
                if text is not None:
                    self.input.document = Document(text)

        self._suspend_during(use)

    def suspend(self) -> None:
        """Ctrl-Z: stop the process until the shell continues the job.

        Application.suspend_to_background does not report when the process is continued.
        """

        async def use() -> None:
            os.kill(0, signal.SIGTSTP)

        self._suspend_during(use)

    def clear_screen(self) -> None:
        """Ctrl-L: clear the screen."""
        self.renderer.clear()

    def continued(self) -> None:
        """Handle SIGCONT: the shell may have printed something since the process was stopped."""
        if not self.is_suspended:
            self.post(self.renderer.reset)

    # Internals.

    def _start(self) -> None:
        # prompt_toolkit's own handler would print the exception and go on.
        asyncio.get_running_loop().set_exception_handler(self._on_exception)
        self._exit_if_idle()  # a signal may have arrived before

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.fail(context.get("exception") or RuntimeError(str(context.get("message"))))

    def _redraw_soon(self) -> None:
        # prompt_toolkit's min_redraw_interval would also delay keys.
        if not self._redraw_is_due:
            self._redraw_is_due = True
            self._later(self._drawn_at + _SECONDS_BETWEEN_REDRAWS - time.monotonic(), self._redraw)

    def _redraw(self) -> None:
        self._redraw_is_due, self._drawn_at = False, time.monotonic()
        self.app.invalidate()

    def _begin(self, text: str) -> None:
        if text.strip():
            self.display.echo(text)
        self._submit(text)

    def _input_changed(self) -> None:
        self._hint = ""
        if not self.input.text.startswith(multiline.MARK):
            self._mark_is_pasted = False

    def _clear_input(self) -> None:
        self.input.reset()
        self._mark_is_pasted = False
        # prompt_toolkit loads the history with the next redraw, which is too late if the next key is Up.
        self.input.load_history_if_not_yet_loaded()

    def _stop(self) -> None:
        messages, now = self.messages, time.monotonic()
        if messages.stopping_since is None:
            messages.stopping_since = now
            if messages.waiting:
                self.input.document = Document(messages.take_all(self.input.text))
            self._cancel(messages.number)
        else:
            # Two presses in quick succession kill the engine only if cancelling does not help.
            delay = max(0.0, messages.stopping_since + _SECONDS_BETWEEN_INTERRUPTS - now)
            self._later(delay, self._kill, messages.number)

    def _is_running(self, number: int) -> bool:
        return self.messages.busy and self.messages.number == number

    def _cancel(self, number: int) -> None:
        """Cancel this message repeatedly until it ends: the worker may not have begun the reply yet."""
        if self._is_running(number):
            self._cancel_reply()
            self._later(_CANCEL_AGAIN_SECONDS, self._cancel, number)

    def _kill(self, number: int) -> None:
        if self._is_running(number):
            # In a thread, since `kill` may wait for the engine.
            threading.Thread(target=self._kill_engine, daemon=True).start()

    def _suspend_during(self, use: Callable[[], Awaitable[None]]) -> None:
        """Hand the terminal over to another program while `use` runs."""
        # Counted from now on, so that keys read together with this one do nothing.
        self._n_suspensions += 1

        async def suspend() -> None:
            try:
                async with in_terminal():
                    await use()
            finally:
                self._n_suspensions -= 1
                self._resume()

        self.app.create_background_task(suspend())

    def _resume(self) -> None:
        if isinstance(self.app.input, Vt100Input):
            self.app.key_processor.feed_multiple(close_open_paste(self.app.input))
            self.app.key_processor.process_keys()
        self._exit_if_idle()
        self.app.invalidate()

    async def _run_editor(self, text: str) -> str | None:
        self._editor = editor = Editor()
        try:
            return await asyncio.get_running_loop().run_in_executor(None, editor.edit, text)
        finally:
            self._editor = None

    def _exit_if_idle(self) -> None:
        if self.messages.leaving and not self.messages.busy and not self.is_suspended:
            self._exit()

    def _exit(self) -> None:
        if self.app.is_running and not self.app.is_done:
            self.app.exit()

    def _later(self, seconds: float, function: Callable[..., object], *arguments: object) -> None:
        asyncio.get_running_loop().call_later(seconds, function, *arguments)

    def _state_lines(self, columns: int) -> list[str]:
        messages = self.messages
        stopping = messages.leaving or messages.stopping_since is not None
        lines = [] if stopping or not self.display.activity else [self.display.activity]
        lines += messages.state_lines()
        if self._hint:
            lines.append(self._hint)
        if self.block_is_open:
            lines.append(_BLOCK_OPEN)
        # A newline at the end of a paste does not count as another line.
        n_lines = self.input.text.removesuffix("\n").count("\n") + 1
        if n_lines > _MANY_LINES:
            lines.append(f"{n_lines} lines")
        return [shorten(line, columns) for line in lines]
