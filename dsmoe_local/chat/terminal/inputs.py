"""The history of inputs, for Up and Ctrl-R, and the queue of inputs that wait for the running reply."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from dsmoe_local.base.durable import locked, write_file
from dsmoe_local.base.errors import LockedError
from dsmoe_local.chat import blocks

MAX_BYTES = 1 << 20
"""A file of twice this size is cut down to its newest inputs, at most this many bytes of them."""
_ENTRY = b"\n# "  # begins an input; the lines of the input itself begin with a plus sign
_MAX_WAITING_SHOWN = 3


class _BoundedHistory(FileHistory):
    """A FileHistory of limited size. If the disk is full the input is lost, but the chat goes on."""

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
            _cut(Path(os.fsdecode(self.filename)))
        except OSError:
            return


def open_history(path: Path | None) -> History:
    """Return the history at `path`, which gets mode 0600; one in memory without a path, or if it cannot be
    written.
    """
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600))
        path.chmod(0o600)
        _cut(path)
    except OSError:
        return InMemoryHistory()
    return _BoundedHistory(str(path))


def _cut(path: Path) -> None:
    """Remove the oldest inputs from a file that has become too large."""
    if path.stat().st_size <= 2 * MAX_BYTES:
        return
    # The file may be a symbolic link, which has to stay one.
    path = path.resolve()
    try:
        with locked(path):
            content = path.read_bytes()
            start = content.find(_ENTRY, max(0, len(content) - MAX_BYTES))
            # If even the last input is too large, nothing is kept.
            write_file(path, content[start:] if start >= 0 else b"", 0o600)
    except LockedError:
        return  # another chat is cutting it


class MessageQueue:
    """Messages that are answered one after the other. `begin` is called with each in its turn."""

    def __init__(self, begin: Callable[[str], None]) -> None:
        self._begin = begin
        self.busy = False  # a message is being answered
        self.number = 0  # of that message, or the last one
        self.leaving = False
        self.stopping_since: float | None = None
        self.waiting: list[str] = []

    def add(self, text: str) -> None:
        """Begin a message, or let it wait. While the chat ends it is dropped."""
        if not self.busy:
            self.busy = True
            self.number += 1
            self._begin(text)
        elif text.strip() and not self.leaving:
            self.waiting.append(text)

    def done(self) -> None:
        """The message has been answered: begin the next one."""
        self.busy, self.stopping_since = False, None
        if self.waiting and not self.leaving:
            self.add(self.waiting.pop(0))

    def take_all(self, draft: str) -> str:
        """Remove all that wait, and return them together with `draft` as one text."""
        texts = [*self.waiting, *([draft] if draft else [])]
        self.waiting.clear()
        if len(texts) > 1:
            # In the middle of a text the marks of a block mean nothing.
            texts = [text if (inner := blocks.content(text)) is None else inner for text in texts]
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
            lines = ["stopping …  Ctrl-C again ends the engine; it starts anew with the next message"]
        lines += [f"queued: {text.strip()}" for text in self.waiting[:_MAX_WAITING_SHOWN]]
        if len(self.waiting) > _MAX_WAITING_SHOWN:
            lines.append(f"queued: {len(self.waiting) - _MAX_WAITING_SHOWN} more")
        return lines
