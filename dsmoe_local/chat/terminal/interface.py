"""The full terminal as the thread that reads keys has it: what keys do, and what waits to be sent.

All of it belongs to that thread; others hand it actions through the mailbox.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from prompt_toolkit.application import Application
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
from dsmoe_local.chat import attachments, blocks
from dsmoe_local.chat.terminal.ansi import error_message, render_lines
from dsmoe_local.chat.terminal.completion import Complete
from dsmoe_local.chat.terminal.history import open_history
from dsmoe_local.chat.terminal.jobs import Jobs
from dsmoe_local.chat.terminal.keys import key_bindings
from dsmoe_local.chat.terminal.layout import STYLE, ChatLayout
from dsmoe_local.chat.terminal.lending import Lending
from dsmoe_local.chat.terminal.mailbox import Action, Mailbox
from dsmoe_local.chat.terminal.output import TerminalOutput, habits
from dsmoe_local.chat.terminal.renderer import InlineRenderer
from dsmoe_local.chat.terminal.reply import ReplyText
from dsmoe_local.chat.terminal.stage import Stage
from dsmoe_local.chat.terminal.status import Status, bar, shorten
from dsmoe_local.chat.terminal.threads import await_thread
from dsmoe_local.chat.terminal.waiting import keys_of_open_paste, keys_waiting

_PATIENCE = 1.0  # seconds from the first Ctrl-C to what the second one does
_CANCEL_AGAIN = 0.25  # seconds
_GRACE = 3.0  # seconds that a signal leaves to a running reply
_SILENCE = 0.5  # seconds without a word that are not worth one
_MANY_LINES = 20  # what is more than an input shows at once
_BLOCK_OPEN = f"block open: {blocks.MARK} on a line of its own closes it"
_ESCAPE_SECONDS = 0.1  # what follows an Esc within that time belongs to it


class ChatApplication(Application[None]):
    """One application for the whole chat, drawn below what is printed."""

    def _on_resize(self) -> None:
        assert isinstance(self.renderer, InlineRenderer)
        self.renderer.resized()
        self.invalidate()


class Interface:
    """What is on the screen, and the messages that wait. `send` hands one to the thread that answers."""

    def __init__(
        self,
        *,
        state: Callable[[], Status],
        complete: Complete,
        history_path: Path | None,
        colour: bool,
        send: Callable[[str], None],
    ) -> None:
        self._send = send
        self._colour = colour
        self.cancel: Action = _nothing
        self.kill: Action = _nothing
        self._jobs = Jobs(self._begin)
        self._mark_pasted = False  # what the input begins with is no mark of a block
        self._hint = ""
        self._question: tuple[str, Future[bool]] | None = None
        self._layout = ChatLayout(
            history=open_history(history_path),
            complete=complete,
            state_lines=self._state_lines,
            bar=lambda columns: bar(state(), columns),
            question=lambda: "" if self._question is None else self._question[0],
        )
        self._layout.input.on_text_changed += lambda _: self._typed()
        output = TerminalOutput(gone=self.leave_now)
        self.app = ChatApplication(
            layout=self._layout.layout,
            style=STYLE,
            include_default_pygments_style=False,
            key_bindings=key_bindings(self),
            color_depth=None if colour else ColorDepth.DEPTH_1_BIT,
            erase_when_done=True,
            terminal_size_polling_interval=None,
            output=output,
        )
        self.app.ttimeoutlen = _ESCAPE_SECONDS
        if isinstance(self.app.input, Vt100Input):
            # Bytes that are no text become U+FFFD: prompt_toolkit's halves of characters cannot be stored.
            self.app.input.stdin_reader = PosixStdinReader(self.app.input.fileno(), errors="replace")
        renderer = InlineRenderer(self.app.renderer.style, output, habits())
        self.app.renderer = renderer
        self._renderer = renderer
        self.stage = Stage(renderer.print_above, output.get_size, colour=colour)
        renderer.top = self.stage.top
        self.mailbox = Mailbox(self.stage.feed, self.app.invalidate)
        self._lending = Lending(self.app, self.mailbox, back=self._returned, redraw=self._draw_anew)

    # What runs in the thread that draws.

    def run(self) -> None:
        """Read keys until the user leaves. EOFError: the terminal has gone away."""
        # Raw from now on: an Enter must not become another key before the application begins to read.
        with self.app.input.raw_mode():
            store_typeahead(self.app.input, keys_waiting(self.app.input.fileno()))
            self.app.run(pre_run=self._start_loop, set_exception_handler=False)

    def print_now(self, text: str) -> None:
        """Print lines while nothing is drawn: before and after `run`."""
        self.stage.print(text)
        self._renderer.erase()

    def begin_reply(self, reply: ReplyText) -> None:
        """A reply begins; if nothing comes of it for a while, that is said."""

        def say_so() -> None:
            self.stage.wait_for(reply)
            self.app.invalidate()

        self.stage.begin(reply)
        self._later(_SILENCE, say_so)

    def idle(self, goes_on: bool) -> None:
        """What was sent is dealt with."""
        if not goes_on:
            self._jobs.leave()
        self._jobs.done()
        if self._jobs.leaving:
            self._exit()

    def fail(self, error: BaseException) -> None:
        """End the chat with `error`."""
        if not self.app.is_done:
            self.app.exit(exception=error)

    def ask(self, question: str, answer: Future[bool]) -> None:
        """Ask for yes or no, in place of the input, which is back afterwards."""
        if is_searching():
            stop_search()
        self._layout.answer.reset()
        self._question = (question, answer)
        self._layout.focus()

    def edit(self, text: str, result: Future[str | None]) -> None:
        """Have a text edited, for another thread."""

        async def use() -> None:
            try:
                result.set_result(await self._lending.edit(text))
            except FileError as error:
                result.set_exception(error)

        self._lending.lend(use)

    def write(self, sequence: str) -> None:
        """Write codes for the terminal."""
        self.app.output.write_raw(sequence)
        self.app.output.flush()

    def leave_now(self) -> None:
        """Leave for a signal, or because the terminal is gone: a running reply gets a little time to end."""
        first = not self._jobs.leaving
        self._jobs.leave()
        self.answer(yes=False)
        self._lending.demand()
        if not self._jobs.busy and not self._lending.away:
            self._exit()
        elif first:
            if self._jobs.busy:
                self._cancel_job(self._jobs.number)
                self._later(_GRACE, self._kill_job, self._jobs.number)
            self._later(2 * _GRACE, self._exit)

    # What keys do.

    @property
    def input(self) -> Buffer:
        """The next message."""
        return self._layout.input

    @property
    def asked(self) -> bool:
        """Whether a question waits for an answer."""
        return self._question is not None

    @property
    def away(self) -> bool:
        """Whether keys are another program's."""
        return self._lending.away

    @property
    def n_queued(self) -> int:
        """How many messages wait for the reply to end."""
        return self._jobs.n_waiting

    @property
    def block_is_open(self) -> bool:
        """Whether the input is a block that is not closed yet."""
        return not self._mark_pasted and blocks.is_open(self.input.text)

    def paste(self, text: str) -> None:
        """Text that was pasted into the input."""
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        before = self.input.document.text_before_cursor
        begins = not before and text.startswith(blocks.MARK)
        if not (before + text).startswith("/"):  # what a command takes is not searched for files
            text = attachments.escaped(text, before=before)
        self.input.insert_text(text)
        self._mark_pasted |= begins

    def enter(self) -> None:
        """Send the input, or have it wait for its turn."""
        if self._mark_pasted and blocks.content(self.input.text) is not None:
            self.input.document = Document(blocks.quoted(self.input.text))
        text = self.input.text
        if text.strip():
            self.input.append_to_history()
        self._empty_input()
        self._hint = ""
        self._jobs.add(text)

    def answer_typed(self) -> None:
        """Answer with what was typed: y or yes is yes."""
        self.answer(yes=self._layout.answer.text.strip().lower() in ("y", "yes"))

    def answer(self, yes: bool) -> None:
        """Answer the question, if there is one."""
        if self._question is not None:
            question, answer = self._question
            self._question = None
            self._layout.focus()
            self.stage.print(f"{safe_line(question)} {'yes' if yes else 'no'}\n")
            answer.set_result(yes)

    def interrupt(self) -> None:
        """Ctrl-C: say no; stop the reply, and what waits is to be edited; end an engine that does not stop;
        clear the input.
        """
        if self.asked:
            self.answer(yes=False)
        elif self._jobs.busy:
            self._stop()
        else:
            self._empty_input()
            self._hint = "Ctrl-D or /exit leaves"

    def leave(self) -> None:
        """Ctrl-D: leave, once the running reply is stopped and kept."""
        self._jobs.leave()
        if not self._jobs.busy:
            self._exit()
        elif self._jobs.stopping_since is None:
            self._stop()

    def complete(self) -> None:
        """Tab."""
        self._layout.complete()

    def take_back(self) -> None:
        """The last message that waits becomes the input again."""
        self.input.document = Document(self._jobs.take_back())

    def open_editor(self) -> None:
        """Have the input edited."""

        async def use() -> None:
            try:
                text = await self._lending.edit(self.input.text)
            except FileError as error:
                columns = self.app.output.get_size().columns
                lines = render_lines(error_message(error), columns, colour=self._colour)
                self.stage.print("".join(f"{line}\n" for line in lines), gap=True)
            else:
                if text is not None:
                    self.input.document = Document(text)

        self._lending.lend(use)

    def suspend(self) -> None:
        """Ctrl-Z: stop, as a job of the shell; drawn again when it goes on."""
        self._lending.lend(self._lending.stop_as_job)

    def clear_screen(self) -> None:
        """Ctrl-L."""
        self._renderer.clear()

    # The rest is nobody else's.

    def _begin(self, text: str) -> None:
        if text.strip():
            self.stage.echo(text)
        self._send(text)

    def _typed(self) -> None:
        self._hint = ""
        if not self.input.text.startswith(blocks.MARK):
            self._mark_pasted = False

    def _empty_input(self) -> None:
        self.input.reset()
        self._mark_pasted = False
        # Now, not with the next drawing: the next key may be Up.
        self.input.load_history_if_not_yet_loaded()

    def _stop(self) -> None:
        jobs, now = self._jobs, time.monotonic()
        if jobs.stopping_since is None:
            jobs.stopping_since = now
            if jobs.n_waiting:
                self.input.document = Document(jobs.take_all_back(self.input.text))
            self._cancel_job(jobs.number)
        else:
            # Pressed twice in a hurry, it means the same as once if once is enough.
            wait = max(0.0, jobs.stopping_since + _PATIENCE - now)
            self._later(wait, self._kill_job, jobs.number)

    def _cancel_job(self, job: int) -> None:
        """In this thread, where no other job can begin meanwhile, and as long as this one has not ended:
        it may not have begun what there is to cancel.
        """
        if self._jobs.busy and self._jobs.number == job:
            self.cancel()
            self._later(_CANCEL_AGAIN, self._cancel_job, job)

    def _kill_job(self, job: int) -> None:
        if self._jobs.busy and self._jobs.number == job:
            self._in_thread(self.kill)

    def _exit(self) -> None:
        if self.app.is_running and not self.app.is_done:
            self.app.exit()

    def _state_lines(self, columns: int) -> list[str]:
        jobs = self._jobs
        silent = jobs.leaving or jobs.stopping_since is not None
        lines = [self.stage.state] if self.stage.state and not silent else []
        lines += jobs.lines()
        if self._hint:
            lines.append(self._hint)
        if self.block_is_open:
            lines.append(_BLOCK_OPEN)
        # A newline at the end of a paste begins no further line.
        n_lines = self.input.text.removesuffix("\n").count("\n") + 1
        if n_lines > _MANY_LINES:
            lines.append(f"{n_lines} lines")
        return [shorten(line, columns) for line in lines]

    def _start_loop(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_exception)
        self._lending.start()
        self.mailbox.start(loop)

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.fail(context.get("exception") or RuntimeError(str(context.get("message"))))

    def _draw_anew(self) -> None:
        self._renderer.reset()
        self.app.invalidate()

    def _returned(self) -> None:
        if isinstance(self.app.input, Vt100Input):
            self.app.key_processor.feed_multiple(keys_of_open_paste(self.app.input))
            self.app.key_processor.process_keys()
        if self._jobs.leaving and not self._jobs.busy:
            self._exit()
        self.app.invalidate()

    def _later(self, seconds: float, function: Callable[..., object], *arguments: object) -> None:
        asyncio.get_running_loop().call_later(seconds, function, *arguments)

    def _in_thread(self, function: Action) -> None:
        """What may wait for the engine never keeps the keys waiting."""

        async def work() -> None:
            await await_thread(function)

        self.app.create_background_task(work())


def _nothing() -> None:
    return None
