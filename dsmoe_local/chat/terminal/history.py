"""What was typed in earlier chats, for Up and Ctrl-R: a file that only its owner can read."""

from __future__ import annotations

import os
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory


class PrivateHistory(FileHistory):
    """The file; a disk that takes no more of it ends nothing."""

    def store_string(self, string: str) -> None:
        """Append an input."""
        try:
            super().store_string(string)
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
    except OSError:
        return InMemoryHistory()
    return PrivateHistory(str(path))
