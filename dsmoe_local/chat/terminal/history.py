"""What was typed in earlier chats, for Up and Ctrl-R: a file of bounded size that only its owner can read."""

from __future__ import annotations

import os
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from dsmoe_local.base.durable import locked, write_file
from dsmoe_local.base.errors import LockedError

MAX_BYTES = 1 << 20
"""So much is kept of it when it has become twice as large: the latest inputs, whole ones."""
_ENTRY = b"\n# "  # how an input begins; its own lines begin with a plus sign


class PrivateHistory(FileHistory):
    """The file; a disk that takes no more of it ends nothing."""

    def store_string(self, string: str) -> None:
        """Append an input."""
        try:
            super().store_string(string)
            _bound(Path(os.fsdecode(self.filename)))
        except OSError:
            return


def open_history(path: Path | None) -> History:
    """The history at `path`, made with mode 0600; in memory without a path, or where none can be written."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600))
        path.chmod(0o600)
        _bound(path)
    except OSError:
        return InMemoryHistory()
    return PrivateHistory(str(path))


def _bound(path: Path) -> None:
    """Drop the oldest inputs of a file that has grown too large."""
    if path.stat().st_size <= 2 * MAX_BYTES:
        return
    # Through a link, as people keep such files elsewhere: the link stays.
    path = path.resolve()
    try:
        with locked(path):
            content = path.read_bytes()
            start = content.find(_ENTRY, max(0, len(content) - MAX_BYTES))
            # The last input alone may be too large.
            write_file(path, content[start:] if start >= 0 else b"", 0o600)
    except LockedError:
        return  # Another chat is doing it.
