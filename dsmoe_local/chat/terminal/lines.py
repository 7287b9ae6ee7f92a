"""Inputs from a terminal that nothing is drawn on: lines, blocks of them, pastes.

Readline edits them where the terminal can. What is pasted, or was typed ahead, is one input, never several.
"""

from __future__ import annotations

import codecs
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path

from dsmoe_local.chat import attachments, blocks
from dsmoe_local.chat.terminal.completion import Complete
from dsmoe_local.chat.terminal.environment import only_prints
from dsmoe_local.chat.terminal.history import open_history
from dsmoe_local.chat.terminal.signals import Signals

_PASTE_SECONDS = 0.03  # lines that come faster than that were pasted
_READLINE_SETTINGS = (
    "tab: complete",
    # Tabs and line ends of a paste are text then.
    "set enable-bracketed-paste on",
    "set enable-meta-key off",
    "set bell-style none",
)


class LineReader:
    """Reads from standard input. `history_path` None: nothing typed is kept."""

    def __init__(
        self, signals: Signals, write: Callable[[str], None], complete: Complete, history_path: Path | None
    ) -> None:
        self._signals = signals
        self._write = write
        self._is_terminal = sys.stdin.isatty()
        self._history = open_history(history_path)
        self._readline = self._is_terminal and not only_prints() and _start_readline(complete)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._read = ""  # and not given yet; without readline
        if self._readline:
            import readline

            for text in reversed(list(self._history.load_history_strings())):
                if "\n" not in text:
                    readline.add_history(text)

    def input(self) -> str:
        """An input: a line, a block, or a paste. KeyboardInterrupt and EOFError as `line`."""
        text = self.line("> ")
        if "\n" in text or self._waits():
            text = "\n".join([text, *self._waiting()])
            if not text.startswith("/"):
                text = attachments.escaped(text)
            return text if blocks.content(text) is None else blocks.quoted(text)
        while blocks.is_open(text):
            # What waits behind the end of a block belongs to the input, too, and so to the block.
            text = "\n".join([text, self.line("  "), *self._waiting()])
        return text

    def keep(self, text: str) -> None:
        """Keep an input, for the next chat."""
        self._history.append_string(text)

    def line(self, prompt: str = "") -> str:
        """One line, or with readline a whole paste. KeyboardInterrupt: Ctrl-C.

        EOFError: Ctrl-D, a signal that ends the chat, or a terminal that is gone.
        """
        try:
            with self._signals.reading():
                return self._line(prompt)
        except OSError:
            self._signals.hang_up()
            raise EOFError from None

    def _line(self, prompt: str) -> str:
        if self._readline or not self._is_terminal:
            try:
                return input(prompt).rstrip("\n")
            except UnicodeDecodeError as error:
                return error.object.decode(errors="replace")
        self._write(prompt)
        while "\n" not in self._read:
            self._read_more()
        line, _, self._read = self._read.partition("\n")
        return line

    def _read_more(self) -> None:
        data = os.read(sys.stdin.fileno(), 65536)
        if not data and not self._read:
            raise EOFError
        text = self._decoder.decode(data).replace("\r\n", "\n").replace("\r", "\n")
        self._read += text if data else "\n"

    def _waiting(self) -> list[str]:
        """The lines that are there already."""
        lines = []
        while self._waits():
            lines.append(self.line())
        return lines

    def _waits(self) -> bool:
        if not self._is_terminal:
            return False
        return "\n" in self._read or bool(select.select([sys.stdin], [], [], _PASTE_SECONDS)[0])


def _start_readline(complete: Complete) -> bool:
    """Have lines edited by readline, which adds no codes of its own but those around pastes."""
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
    for setting in _READLINE_SETTINGS:
        readline.parse_and_bind(setting)
    return True
