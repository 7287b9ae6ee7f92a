"""A text changed in the user's own editor. Whoever calls sees to it that the terminal is free for it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from dsmoe_local.base.errors import FileError

_USUAL = ("sensible-editor", "nano", "vim", "vi", "emacs")
_GRACE = 0.5  # seconds for an editor that is to end


class Editor:
    """The user's editor, at work on one text."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False

    def edit(self, text: str) -> str | None:
        """Have `text` changed; None if the editor failed or nothing was saved.

        FileError without an editor, or where there is no room for the text.
        """
        command = _editor()
        try:
            content = self._changed(command, text)
        except OSError as error:
            raise FileError(
                f"the text cannot be given to the editor: {error.strerror or error}",
                where=error.filename or tempfile.gettempdir(),
            ) from error
        try:
            return None if content is None else content.decode().replace("\r\n", "\n").rstrip("\n")
        except UnicodeDecodeError as error:
            raise FileError("the edited text is not UTF-8", remedy="save it as UTF-8") from error

    def end(self) -> None:
        """End the editor, whether it likes it or not: `edit` gives None then. From any thread."""
        self._ended = True
        if (process := self._process) is not None:
            process.terminate()
            killing = threading.Timer(_GRACE, process.kill)
            killing.daemon = True
            killing.start()

    def _changed(self, command: list[str], text: str) -> bytes | None:
        with tempfile.TemporaryDirectory(prefix="dsmoe-", ignore_cleanup_errors=True) as folder:
            path = Path(folder, "message.md")
            path.write_text(f"{text}\n", encoding="utf-8", errors="replace")
            before = path.stat()
            status = self._run([*command, str(path)])
            try:
                after, content = path.stat(), path.read_bytes()
            except OSError:
                return None
        saved = (after.st_mtime_ns, after.st_ino) != (before.st_mtime_ns, before.st_ino)
        return content if status == 0 and saved else None

    def _run(self, command: list[str]) -> int:
        try:
            self._process = subprocess.Popen(command)
        except OSError as error:
            raise FileError(f"the editor does not start: {error.strerror}", where=command[0]) from error
        if self._ended:  # before there was anything to end
            self.end()
        return self._process.wait()


def _editor() -> list[str]:
    for variable in ("VISUAL", "EDITOR"):
        try:
            words = shlex.split(os.environ.get(variable, ""))
        except ValueError:
            words = []
        if words:
            return words
    for name in _USUAL:
        if shutil.which(name):
            return [name]
    raise FileError("there is no editor", remedy="set VISUAL or EDITOR to yours")
