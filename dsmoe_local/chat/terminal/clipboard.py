"""Text for the clipboard: through the terminal (OSC 52, also over SSH) and through the desktop's tools."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from collections.abc import Iterator

# What terminals take in one sequence; a longer one is dropped, or worse, shown.
OSC_52_LIMIT = 74_994
_SCREEN_LIMIT = 240  # bytes that GNU screen passes through at once
_SECONDS = 5.0

_TOOLS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("TMUX", ("tmux", "load-buffer", "-w", "-")),
    ("WAYLAND_DISPLAY", ("wl-copy",)),
    ("DISPLAY", ("xclip", "-selection", "clipboard")),
    ("DISPLAY", ("xsel", "--clipboard", "--input")),
    ("", ("pbcopy",)),
)
"""The variable that says a tool can work, and the tool."""


def osc_52(text: str) -> str | None:
    """What makes the terminal put `text` on the clipboard; None if it is too long for that."""
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
    """Give `text` to the first tool that takes it; its name, or None."""
    for command in _tools():
        try:
            status = subprocess.run(
                command,
                input=text.encode(errors="replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_SECONDS,
                check=False,
            ).returncode
        except (OSError, subprocess.TimeoutExpired):
            continue
        if status == 0:
            return command[0]
    return None


def _tools() -> Iterator[tuple[str, ...]]:
    for variable, command in _TOOLS:
        if (not variable or os.environ.get(variable)) and shutil.which(command[0]):
            yield command
