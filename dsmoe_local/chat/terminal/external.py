"""The user's editor and the clipboard: external programs, and the terminal's own clipboard (OSC 52)."""

from __future__ import annotations

import base64
import os
import shlex
import shutil
import subprocess
import tempfile
import termios
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dsmoe_local.base.errors import FileError, file_errors

_GRACE_SECONDS = 2.0  # for an editor to end after SIGTERM
_DEFAULT_EDITORS = ("sensible-editor", "nano", "vim", "vi", "emacs")

# Terminals drop a longer sequence, or show it as text.
OSC_52_LIMIT = 74_994
_SCREEN_LIMIT = 240  # bytes of a sequence that GNU screen passes on at once
_TOOL_SECONDS = 5.0
_CLIPBOARD_TOOLS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("TMUX", ("tmux", "load-buffer", "-w", "-")),
    ("WAYLAND_DISPLAY", ("wl-copy",)),
    ("DISPLAY", ("xclip", "-selection", "clipboard")),
    ("DISPLAY", ("xsel", "--clipboard", "--input")),
    ("", ("pbcopy",)),
)
"""The environment variable that a tool needs, and its command."""


class Editor:
    """One run of the user's editor.

    prompt_toolkit's Buffer.open_in_editor does not report why an editor failed, and cannot be stopped.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False

    def edit(self, text: str) -> str | None:
        """Return the edited `text`, or None if the editor failed or nothing was saved.

        Nothing else may use the terminal meanwhile. FileError if there is no editor, or the text cannot be
        written or read.
        """
        command = _editor_command()
        try:
            content = self._edit_file(command, text)
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
        """End the editor: with SIGTERM, and with SIGKILL if that does not help. From any thread."""
        if not self._ended:
            self._ended = True
            if self._process is not None:
                self._terminate(self._process)

    def _terminate(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        kill = threading.Timer(_GRACE_SECONDS, process.kill)
        kill.daemon = True
        kill.start()

    def _edit_file(self, command: list[str], text: str) -> bytes | None:
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
        before = termios.tcgetattr(0) if os.isatty(0) else None
        with file_errors("the editor does not start", command[0], "set VISUAL or EDITOR to another one"):
            process = self._process = subprocess.Popen(command)
        if self._ended:  # `end` was called before the process existed
            self._terminate(process)
        status = process.wait()
        if status < 0 and before is not None:
            # An editor killed by a signal may leave the terminal in raw mode.
            with suppress(termios.error):  # the terminal has been closed
                termios.tcsetattr(0, termios.TCSADRAIN, before)
        return status


def _editor_command() -> list[str]:
    for variable in ("VISUAL", "EDITOR"):
        try:
            command = shlex.split(os.environ.get(variable, ""))
        except ValueError:
            command = []
        if command:
            return command
    for name in _DEFAULT_EDITORS:
        if shutil.which(name):
            return [name]
    raise FileError("there is no editor", remedy="set VISUAL or EDITOR to yours")


def osc_52(text: str) -> str | None:
    """Return the sequence that makes the terminal copy `text`, also over SSH; None if it is too long."""
    content = text.encode(errors="replace")
    if len(content) > OSC_52_LIMIT:
        return None
    sequence = f"\x1b]52;c;{base64.b64encode(content).decode()}\x07"
    if os.environ.get("TMUX"):
        doubled = sequence.replace("\x1b", "\x1b\x1b")
        return f"\x1bPtmux;{doubled}\x1b\\"
    if os.environ.get("STY"):
        return "".join(
            f"\x1bP{sequence[start : start + _SCREEN_LIMIT]}\x1b\\"
            for start in range(0, len(sequence), _SCREEN_LIMIT)
        )
    return sequence


def copy_with_tool(text: str) -> str | None:
    """Copy `text` with the first clipboard tool that works and return its name, or None."""
    for command in _available_tools():
        try:
            status = subprocess.run(
                command,
                input=text.encode(errors="replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_TOOL_SECONDS,
                check=False,
            ).returncode
        except (OSError, subprocess.TimeoutExpired):
            continue
        if status == 0:
            return command[0]
    return None


def _available_tools() -> Iterator[tuple[str, ...]]:
    for variable, command in _CLIPBOARD_TOOLS:
        if (not variable or os.environ.get(variable)) and shutil.which(command[0]):
            yield command
