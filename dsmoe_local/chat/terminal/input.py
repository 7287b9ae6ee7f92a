"""Input of the full terminal: keys typed ahead, open pastes, the history, and queued messages."""

from __future__ import annotations

import os
import re
import select
from collections.abc import Callable
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyPress

from dsmoe_local.base.durable import locked, write_file
from dsmoe_local.base.errors import LockedError
from dsmoe_local.chat import multiline

MAX_HISTORY_BYTES = 1 << 20
"""A file of twice this size is truncated to its newest inputs, at most this many bytes."""
_HISTORY_ENTRY = b"\n# "  # begins an input; the lines of the input itself begin with a plus sign
_MAX_WAITING_SHOWN = 3

_PASTE_END = "\x1b[201~"


def read_typeahead(descriptor: int) -> list[KeyPress]:
    """Return the keys that were typed before the application started. The terminal is in raw mode.

    A single Enter is kept. Several may be the line ends of a paste, so they become newlines and send nothing.
    """
    # Before raw mode the terminal may have turned Enter into a line feed, and Ctrl-D into a NUL.
    text = re.sub("\r\n?", "\n", _read_available(descriptor).replace("\0", ""))
    text = text.replace("\n", "\r") if text.count("\n") == 1 else text.strip("\n").replace("\t", " ")
    keys: list[KeyPress] = []
    parser = Vt100Parser(keys.append)
    parser.feed(text)
    parser.flush()
    return keys


def close_open_paste(source: Vt100Input) -> list[KeyPress]:
    """Return the keys of a paste whose end another program has read; none if no paste is open.

    prompt_toolkit's parser would take all further keys, Ctrl-C too, as part of the paste.
    """
    parser = source.vt100_parser
    if not parser._in_bracketed_paste:
        return []
    parser.feed(_read_available(source.fileno()))
    if parser._in_bracketed_paste:
        parser.feed(_PASTE_END)
    return source.flush_keys()


def _read_available(descriptor: int) -> str:
    read = b""
    while select.select([descriptor], [], [], 0)[0]:
        try:
            piece = os.read(descriptor, 65536)
        except OSError:
            break
        if not piece:
            break
        read += piece
    return read.decode(errors="replace")


class _BoundedHistory(FileHistory):
    """A FileHistory of limited size. An input that cannot be written is not stored."""

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
            _truncate(Path(os.fsdecode(self.filename)))
        except OSError:
            return


def open_history(path: Path | None) -> History:
    """Return the history in the file `path`, which gets mode 0600.

    Without a path, or if the file cannot be written, the history is in memory.
    """
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600))
        path.chmod(0o600)
        _truncate(path)
    except OSError:
        return InMemoryHistory()
    return _BoundedHistory(str(path))


def _truncate(path: Path) -> None:
    """Remove the oldest inputs from a file that has become too large."""
    if path.stat().st_size <= 2 * MAX_HISTORY_BYTES:
        return
    # The file may be a symbolic link, which has to stay one.
    path = path.resolve()
    try:
        with locked(path):
            content = path.read_bytes()
            start = content.find(_HISTORY_ENTRY, max(0, len(content) - MAX_HISTORY_BYTES))
            # If the last input alone is too large, nothing is kept.
            write_file(path, content[start:] if start >= 0 else b"", 0o600)
    except LockedError:
        return  # another chat is truncating it


class MessageQueue:
    """Messages that are answered one after the other. `begin` starts the answer to a message."""

    def __init__(self, begin: Callable[[str], None]) -> None:
        self._begin = begin
        self.busy = False  # a message is being answered
        self.number = 0  # of that message, or the last one
        self.leaving = False
        self.stopping_since: float | None = None
        self.waiting: list[str] = []

    def add(self, text: str) -> None:
        """Begin the message, or queue it while another is answered. While the chat ends, it is dropped."""
        if not self.busy:
            self.busy = True
            self.number += 1
            self._begin(text)
        elif text.strip() and not self.leaving:
            self.waiting.append(text)

    def done(self) -> None:
        """Record that the message has been answered, and begin the next one."""
        self.busy, self.stopping_since = False, None
        if self.waiting and not self.leaving:
            self.add(self.waiting.pop(0))

    def take_all(self, draft: str) -> str:
        """Remove all queued messages, and return them together with `draft` as one text."""
        texts = [*self.waiting, *([draft] if draft else [])]
        self.waiting.clear()
        if len(texts) > 1:
            # Within a text, the marks of a block have no meaning, so they are removed.
            texts = [text if (inner := multiline.content(text)) is None else inner for text in texts]
        return "\n".join(texts)

    def leave(self) -> None:
        """Begin no further message."""
        self.leaving = True
        self.waiting.clear()

    def state_lines(self) -> list[str]:
        """Return the lines that describe the state of the queue."""
        lines = []
        if self.leaving:
            lines = ["leaving …"]
        elif self.stopping_since is not None:
            lines = ["stopping …  Ctrl-C again ends the engine; it starts again with the next message"]
        lines += [f"queued: {text.strip()}" for text in self.waiting[:_MAX_WAITING_SHOWN]]
        if len(self.waiting) > _MAX_WAITING_SHOWN:
            lines.append(f"queued: {len(self.waiting) - _MAX_WAITING_SHOWN} more")
        return lines
