"""A text changed in the user's own editor. Whoever calls sees to it that the terminal is free for it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from dsmoe_local.base.errors import FileError

_USUAL = ("sensible-editor", "nano", "vim", "vi", "emacs")


def edit_text(text: str) -> str | None:
    """Have `text` changed; None if the editor failed or nothing was saved. FileError without an editor."""
    command = _editor()
    with tempfile.TemporaryDirectory(prefix="dsmoe-") as folder:
        path = Path(folder, "message.md")
        path.write_text(f"{text}\n", encoding="utf-8", errors="replace")
        before = path.stat()
        try:
            status = subprocess.run([*command, str(path)], check=False).returncode
        except OSError as error:
            raise FileError(f"the editor does not start: {error.strerror}", where=command[0]) from error
        try:
            after, content = path.stat(), path.read_bytes()
        except OSError:
            return None
        if status != 0 or (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino):
            return None
    try:
        return content.decode().replace("\r\n", "\n").rstrip("\n")
    except UnicodeDecodeError as error:
        raise FileError("the edited text is not UTF-8", remedy="save it as UTF-8") from error


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
