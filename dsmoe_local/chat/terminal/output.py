"""The way to the terminal: writes that survive its going away, and what is known of its habits."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from prompt_toolkit.data_structures import Size
from prompt_toolkit.output.vt100 import Vt100_Output

_USUAL_SIZE = os.terminal_size((80, 24))
# Values of TERM for terminals that cut lines off when the window gets narrower. Others wrap them anew.
_RIGID = ("linux", "st", "st-256color", "vt100", "vt220", "screen", "screen-256color")


def terminal_size() -> Size:
    """The size of the terminal on standard output, a usual one if it tells none."""
    try:
        found = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        found = _USUAL_SIZE
    return Size(rows=found.lines or _USUAL_SIZE.lines, columns=found.columns or _USUAL_SIZE.columns)


@dataclass(frozen=True, slots=True)
class Habits:
    """What a terminal does with its lines when its width changes.

    `reflows`: it wraps them anew. `keeps_empty_rows`: where they take more rows then, the first ones leave
    the screen, even if the last ones are empty.
    """

    reflows: bool = True
    keeps_empty_rows: bool = False


def habits() -> Habits:
    """Those of the terminal that the environment tells of."""
    if os.environ.get("TMUX"):
        return Habits(keeps_empty_rows=True)
    rigid = os.environ.get("STY") or os.environ.get("XTERM_VERSION")
    return Habits(reflows=not rigid and os.environ.get("TERM", "") not in _RIGID)


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
