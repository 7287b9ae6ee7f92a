"""The way to the terminal: writes that survive its going away, and what is known of its habits."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from prompt_toolkit.data_structures import Size
from prompt_toolkit.output.vt100 import Vt100_Output

_USUAL_SIZE = os.terminal_size((80, 24))
# Terminals that leave lines as they are when the window gets narrower; all others wrap them anew.
_KEEP_LINES = ("linux", "st", "st-256color", "vt100", "vt220", "screen", "screen-256color")


def terminal_size() -> Size:
    """The size of the terminal on standard output, a usual one if it tells none."""
    try:
        found = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        found = _USUAL_SIZE
    return Size(rows=found.lines or _USUAL_SIZE.lines, columns=found.columns or _USUAL_SIZE.columns)


def reflows() -> bool:
    """Whether the terminal wraps its lines anew when its width changes."""
    if os.environ.get("TMUX"):
        return True
    kept = os.environ.get("STY") or os.environ.get("XTERM_VERSION")
    return not kept and os.environ.get("TERM", "") not in _KEEP_LINES


class TerminalOutput(Vt100_Output):
    """Standard output. Once nobody reads it any more, `gone` is called and nothing more is written."""

    def __init__(self, gone: Callable[[], None]) -> None:
        super().__init__(sys.stdout, terminal_size, term=os.environ.get("TERM"), enable_cpr=False)
        self._when_gone = gone
        self._is_gone = False

    def flush(self) -> None:
        """Write what is collected, in one piece."""
        if self._is_gone:
            self._buffer = []
            return
        try:
            super().flush()
        except OSError:
            self._is_gone = True
            self._when_gone()
