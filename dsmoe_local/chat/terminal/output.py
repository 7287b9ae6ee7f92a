"""The way to the terminal: writes that survive its going away, and what is known of its habits."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from prompt_toolkit.data_structures import Size
from prompt_toolkit.output.vt100 import Vt100_Output

_USUAL_SIZE = os.terminal_size((80, 24))
# What tells of a terminal that wraps lines anew when the window gets narrower: beginnings of TERM, which goes
# along over ssh; where TERM is xterm's, a name in TERM_PROGRAM or a variable that such a terminal sets.
_REFLOWING_TERMS = ("xterm-kitty", "xterm-ghostty", "alacritty", "foot", "wezterm", "contour")
_REFLOWING_PROGRAMS = ("Apple_Terminal", "iTerm.app", "WezTerm", "ghostty", "vscode")
_REFLOWING_VARIABLES = (
    "VTE_VERSION",
    "KONSOLE_VERSION",
    "KITTY_WINDOW_ID",
    "WT_SESSION",
    "ALACRITTY_WINDOW_ID",
)


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

    `reflows`: it is known to wrap them anew. `keeps_empty_rows`: where they take more rows then, the first
    ones leave the screen, even if the last ones are empty.
    """

    reflows: bool = False
    keeps_empty_rows: bool = False


def habits() -> Habits:
    """Those of the terminal that the environment tells of."""
    value = os.environ.get
    term = value("TERM", "")
    # xterm and GNU screen cut lines off. In them the variables of the terminal around them are set as well.
    rigid = bool(value("STY") or (value("XTERM_VERSION") and term.startswith("xterm")))
    if term.startswith("tmux") or (value("TMUX") and not rigid):
        return Habits(reflows=True, keeps_empty_rows=True)
    told = value("TERM_PROGRAM") in _REFLOWING_PROGRAMS or any(map(value, _REFLOWING_VARIABLES))
    known = term.startswith(_REFLOWING_TERMS) or (term.startswith("xterm") and told)
    return Habits(reflows=known and not rigid)


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
