"""The plain terminal: lines in, lines out, for screen readers, `--plain` and dumb terminals.

It uses no colours and redraws nothing. The only escape codes are those with which readline recognizes pastes.
Replies are printed as they are. Everything happens in the thread that calls `run`.
"""

from __future__ import annotations

import codecs
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dsmoe_local.base.errors import DsmoeError, FileError, InterruptedRunError
from dsmoe_local.base.text import safe_line, safe_text
from dsmoe_local.chat import attachments, multiline
from dsmoe_local.chat.terminal import ansi
from dsmoe_local.chat.terminal.external import Editor, copy_with_tool
from dsmoe_local.chat.terminal.input import open_history
from dsmoe_local.chat.terminal.screen import (
    Completer,
    ReplyView,
    is_dumb,
    no_completions,
    terminal_size,
)
from dsmoe_local.chat.terminal.signals import Interrupts

if TYPE_CHECKING:
    from rich.console import RenderableType

_LONG_PROMPT = 256  # tokens; fewer are read too fast to announce it
_PASTE_SECONDS = 0.03  # lines that arrive within this time of each other were pasted
_READLINE_SETTINGS = (
    "tab: complete",
    # With it, tabs and line ends in a paste are text.
    "set enable-bracketed-paste on",
    "set enable-meta-key off",
    "set bell-style none",
)


class PlainTerminal:
    """A Terminal that reads and writes lines. Without `history_path`, inputs are not stored."""

    plain = True
    colour = False

    def __init__(self, complete: Completer = no_completions, history_path: Path | None = None) -> None:
        self._interrupts = Interrupts()
        self._lines = LineReader(self._interrupts, self._write, complete, history_path)
        self._is_gone = False

    @property
    def width(self) -> int:
        return terminal_size().columns

    @property
    def height(self) -> int:
        return terminal_size().lines

    def run(self, take: Callable[[str], bool], cancel: Callable[[], None], kill: Callable[[], None]) -> None:
        interrupts = self._interrupts
        with interrupts.handled():
            while not interrupts.ended_by:
                try:
                    text = self._lines.input()
                except KeyboardInterrupt:
                    self._write("\n")
                    self.notice("Ctrl-D or /exit leaves")
                    continue
                except EOFError:
                    self._write("\n")
                    break
                with interrupts.job(cancel, kill):
                    goes_on = not interrupts.ended_by and take(text)
                if not goes_on:
                    break
        if interrupts.ended_by:
            raise InterruptedRunError("the chat was ended by a signal", signal_number=interrupts.ended_by)

    def notice(self, text: str) -> None:
        self._write(f"{safe_line(text, ansi.NOTICE_LIMIT)}\n")

    def error(self, error: DsmoeError) -> None:
        self.show(ansi.error_message(error))

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        for row in rows:
            self._write(f"{'  '.join(safe_line(cell) for cell in row).rstrip()}\n")

    def show(self, renderable: RenderableType) -> None:
        lines = ansi.render_lines(renderable, self.width, colour=False, styles=False)
        self._write("".join(f"{line}\n" for line in lines))

    def live(self, renderable: RenderableType | None) -> None:
        """Do nothing: a panel that is redrawn makes no sense as lines."""

    def echo(self, message: str) -> None:
        self._write("> " + safe_text(message).replace("\n", "\n  ") + "\n")

    @contextmanager
    def reply(self, after: str = "") -> Iterator[ReplyView]:
        view = _PlainReply(self._write)
        try:
            yield view
        finally:
            view.end_line()

    def confirm(self, question: str) -> bool:
        try:
            return self._lines.line(f"{safe_line(question)} [y/N] ").strip().lower() in ("y", "yes")
        except (KeyboardInterrupt, EOFError):
            self._write("\n")
            return False

    def edit(self, text: str) -> str | None:
        editor = Editor()
        with self._interrupts.editing(editor):
            return editor.edit(text)

    def copy(self, text: str) -> str:
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
            # At exit Python would try again to write what is left in the buffer.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
            self._interrupts.hang_up()


class _PlainReply:
    """A ReplyView."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._at_line_start = True
        self._announced = False
        self._reasons = False

    def progress(self, done: int, total: int) -> None:
        """Announce a long prompt, once."""
        if not self._announced and total - done >= _LONG_PROMPT:
            self._announced = True
            self._write(f"reading {total:,} tokens\n")

    def reasoning(self, piece: str) -> None:
        # Without styles, a line before and after it tells it from the answer.
        if not self._reasons:
            self._reasons = True
            self._write("[reasoning]\n")
        self.text(piece)

    def reasons(self, n_tokens: int) -> None:
        """Do nothing: hidden reasoning is announced when it has ended."""

    def reasoned(self, summary: str) -> None:
        self.note(f"[{summary}]")
        self._write("\n")

    def text(self, piece: str) -> None:
        if piece:
            self._write(safe_text(piece))
            self._at_line_start = piece.endswith("\n")

    def note(self, text: str) -> None:
        self.end_line()
        self._write(f"{safe_line(text, ansi.NOTICE_LIMIT)}\n")

    def end_line(self) -> None:
        """Begin a new line, unless the text ends with a newline."""
        if not self._at_line_start:
            self._write("\n")
            self._at_line_start = True


class LineReader:
    """Reads inputs from stdin, with readline if the terminal supports it.

    Lines that are pasted or typed ahead together are one input.
    """

    def __init__(
        self,
        interrupts: Interrupts,
        write: Callable[[str], None],
        complete: Completer,
        history_path: Path | None,
    ) -> None:
        self._interrupts = interrupts
        self._write = write
        self._is_terminal = sys.stdin.isatty()
        self._history = open_history(history_path)
        self._has_readline = self._is_terminal and not is_dumb() and _start_readline(complete)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._unread = ""  # text read without readline and not returned yet
        if self._has_readline:
            import readline

            for text in reversed(list(self._history.load_history_strings())):
                if "\n" not in text:
                    readline.add_history(text)

    def input(self) -> str:
        """Read one input, a line, a block or a paste, and add it to the history. Raises as `line` does."""
        text = self._input()
        if text.strip():
            self._history.append_string(text)
        return text

    def line(self, prompt: str = "") -> str:
        """Read one line; with readline, also a whole paste.

        Raises KeyboardInterrupt for Ctrl-C, and EOFError for Ctrl-D, a signal that ends the chat, or a closed
        terminal.
        """
        try:
            with self._interrupts.reading():
                return self._line(prompt)
        except OSError:
            self._interrupts.hang_up()
            raise EOFError from None

    def _input(self) -> str:
        text = self.line("> ")
        if "\n" in text or self._has_waiting():
            text = "\n".join([text, *self._waiting_lines()])
            if not text.startswith("/"):
                pasted, text = text, attachments.escaped(text)
                if text != pasted:
                    self._write("note: pasted text attaches no files: type @FILE to attach one\n")
            return text if multiline.content(text) is None else multiline.quoted(text)
        while multiline.is_open(text):
            # Lines that already wait after the closing mark belong to this input, and so to the block.
            text = "\n".join([text, self.line("  "), *self._waiting_lines()])
        return text

    def _line(self, prompt: str) -> str:
        if self._has_readline or not self._is_terminal:
            try:
                return input(prompt).rstrip("\n")
            except UnicodeDecodeError as error:
                return error.object.decode(errors="replace")
        self._write(prompt)
        while "\n" not in self._unread:
            self._read_more()
        line, _, self._unread = self._unread.partition("\n")
        return line

    def _read_more(self) -> None:
        data = os.read(sys.stdin.fileno(), 65536)
        if not data and not self._unread:
            raise EOFError
        text = self._decoder.decode(data).replace("\r\n", "\n").replace("\r", "\n")
        self._unread += text if data else "\n"

    def _waiting_lines(self) -> list[str]:
        lines = []
        while self._has_waiting():
            lines.append(self.line())
        return lines

    def _has_waiting(self) -> bool:
        """Return True if another line can be read without waiting."""
        if not self._is_terminal:
            return False
        return "\n" in self._unread or bool(select.select([sys.stdin], [], [], _PASTE_SECONDS)[0])


def _start_readline(complete: Completer) -> bool:
    """Set up readline. Return False if this Python has none."""
    try:
        import readline
    except ImportError:
        return False
    choices: list[str] = []

    def choice(word: str, number: int) -> str | None:
        """Return the completion with this number; readline calls this with 0, 1, … until it returns None."""
        if number == 0:
            before = readline.get_line_buffer()[: readline.get_endidx()]
            begin = readline.get_begidx()
            choices[:] = [
                before[begin : len(before) - each.replaces] + each.text
                for each in complete(before)
                if len(before) - each.replaces >= begin
            ]
        return choices[number] if number < len(choices) else None

    readline.set_completer_delims(" ")
    readline.set_completer(choice)
    readline.set_auto_history(True)
    for setting in _READLINE_SETTINGS:
        readline.parse_and_bind(setting)
    return True
