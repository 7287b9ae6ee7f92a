"""The renderer of the full terminal: it keeps a prompt_toolkit layout below a conversation that scrolls.

It replaces prompt_toolkit's own renderer, which asks the terminal for the cursor's position, switches
bracketed paste off while something is printed above the layout, and expects a resized terminal to truncate
lines.
"""

from __future__ import annotations

import asyncio
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from prompt_toolkit.application import Application
from prompt_toolkit.data_structures import Size
from prompt_toolkit.layout import Layout
from prompt_toolkit.layout.mouse_handlers import MouseHandlers
from prompt_toolkit.layout.screen import Screen, WritePosition
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.renderer import Renderer
from prompt_toolkit.styles import BaseStyle

from dsmoe_local.base.text import BIDI_CONTROLS
from dsmoe_local.chat.cells import is_certain
from dsmoe_local.chat.terminal.frame import Frame, paint, print_lines, rows_printed, rows_taken, wipe
from dsmoe_local.chat.terminal.screen import terminal_size

LiveLines = Callable[[int, int], Sequence[str]]
"""Returns the lines above the layout, for a number of columns and at most a number of rows."""

# Characters without a width, which are left out. Bidi controls would reorder the line around them. Joiners
# have an effect in some terminals only, and the cursor stops at each part.
_JOINERS = (0x200D, 0xFE0E, 0xFE0F)
_INVISIBLE = dict.fromkeys((*BIDI_CONTROLS, *_JOINERS), "")
_SETTLE_SECONDS = 0.05  # without a further change of the size until the next drawing
_RESET = "\x1b[0m"
# Normal cursor keys, and bracketed paste.
_SET_UP, _SET_DOWN = "\x1b[?1l\x1b[?2004h", "\x1b[?2004l"

# How to recognize a terminal that rewraps its lines when the window becomes narrower: by the beginning of
# TERM, which is passed on over ssh, or, if TERM is xterm's, by TERM_PROGRAM or another variable.
_REFLOWING_TERMS = ("xterm-kitty", "xterm-ghostty", "alacritty", "foot", "wezterm", "contour")
_REFLOWING_PROGRAMS = ("Apple_Terminal", "iTerm.app", "WezTerm", "ghostty", "vscode")
_REFLOWING_VARIABLES = (
    "VTE_VERSION",
    "KONSOLE_VERSION",
    "KITTY_WINDOW_ID",
    "WT_SESSION",
    "ALACRITTY_WINDOW_ID",
)


@dataclass(frozen=True, slots=True)
class ResizeBehaviour:
    """What a terminal does with its lines when its width changes.

    `reflows`: it is known to rewrap them. `keeps_empty_rows`: if they then take more rows, the first rows
    scroll out even if the last rows are empty.
    """

    reflows: bool = False
    keeps_empty_rows: bool = False


def resize_behaviour() -> ResizeBehaviour:
    """Return the behaviour of the terminal that the environment describes."""
    value = os.environ.get
    term = value("TERM", "")
    # xterm and GNU screen truncate lines. They also inherit the variables of the terminal that they run in.
    truncates = bool(value("STY") or (value("XTERM_VERSION") and term.startswith("xterm")))
    if term.startswith("tmux") or (value("TMUX") and not truncates):
        return ResizeBehaviour(reflows=True, keeps_empty_rows=True)
    named = value("TERM_PROGRAM") in _REFLOWING_PROGRAMS or any(map(value, _REFLOWING_VARIABLES))
    known = term.startswith(_REFLOWING_TERMS) or (term.startswith("xterm") and named)
    return ResizeBehaviour(reflows=known and not truncates)


class TerminalOutput(Vt100_Output):
    """Standard output. If the terminal is closed, it calls `hung_up` once and writes nothing more."""

    def __init__(self, hung_up: Callable[[], None]) -> None:
        super().__init__(sys.stdout, _size, term=os.environ.get("TERM"), enable_cpr=False)
        self._hung_up = hung_up
        self._is_gone = False

    def flush(self) -> None:
        """Write the buffer in one piece."""
        if self._is_gone:
            self._buffer = []
            return
        try:
            super().flush()
        except OSError:
            self._is_gone = True
            self._hung_up()


def _size() -> Size:
    columns, rows = terminal_size()
    return Size(rows=rows, columns=columns)


class InlineApplication(Application[None]):
    """An application with an InlineRenderer, which it tells about a resize."""

    def _on_resize(self) -> None:
        assert isinstance(self.renderer, InlineRenderer)
        self.renderer.resized()
        self.invalidate()


class InlineRenderer(Renderer):
    """Draws the layout, with `live_lines` above it, below everything that is printed."""

    def __init__(self, style: BaseStyle, output: Vt100_Output, behaviour: ResizeBehaviour) -> None:
        self.live_lines: LiveLines = lambda columns, rows: ()
        self._behaviour = behaviour
        self._min_rows = 0  # of the frame, see _padding_rows
        self._frame: Frame | None = None  # on the screen
        self._above: list[str] = []
        self._set_up = False
        self._new_size: tuple[Size, float] | None = None  # a size not drawn yet, and when it was first seen
        self._style_codes: dict[str, tuple[str, bool]] = {}
        super().__init__(style, output)

    def print_above(self, text: str) -> None:
        """Print lines, each with its newline, above the frame at the next drawing."""
        self._above.append(text)

    def resized(self) -> None:
        """Draw everything again, even if the window is back to its old size: truncated text is lost."""
        if self._frame is not None:
            self._frame = replace(self._frame, rows=0)

    def render(self, app: Application[object], layout: Layout, is_done: bool = False) -> None:
        """Draw what has changed, and print the queued lines, in one write."""
        size = self.output.get_size()
        if self._is_changing(size):
            asyncio.get_running_loop().call_later(_SETTLE_SECONDS, app.invalidate)
            return
        screen, handlers = Screen(), MouseHandlers()
        screen.show_cursor = False
        height = min(layout.container.preferred_height(size.columns, size.rows).preferred, size.rows)
        layout.container.write_to_screen(
            screen,
            handlers,
            WritePosition(0, 0, size.columns, height),
            parent_style="",
            erase_bg=False,
            z_index=None,
        )
        screen.draw_all_floats()
        self.mouse_handlers = handlers
        self._last_screen = screen
        self._draw(screen, height, size, layout, app.color_depth)
        layout.visible_windows = screen.visible_windows

    def erase(self, leave_alternate_screen: bool = True) -> None:
        """Remove the frame from the screen, and print the queued lines."""
        self._wipe()
        if self._above:
            self.output.write_raw(f"\r{print_lines(''.join(self._above))}")
            self._above.clear()
        self.reset(leave_alternate_screen=leave_alternate_screen)

    def reset(self, _scroll: bool = False, leave_alternate_screen: bool = True) -> None:
        """Forget what is on the screen: the next frame is drawn at the cursor."""
        self._frame, self._min_rows = None, 0
        if self._set_up:
            self.output.write_raw(_SET_DOWN)
            self._set_up = False
        super().reset(_scroll, leave_alternate_screen)

    def clear(self) -> None:
        """Clear the screen: the next frame is drawn at its top."""
        self._wipe()
        self.output.write_raw("\x1b[H\x1b[2J")
        self._frame, self._min_rows = None, 0

    def _wipe(self) -> None:
        columns = self.output.get_size().columns
        self.output.write_raw(wipe(self._frame, columns, reflows=self._behaviour.reflows))

    def _draw(self, screen: Screen, height: int, size: Size, layout: Layout, depth: ColorDepth) -> None:
        live = self.live_lines(size.columns, size.rows - height)
        top = [line.replace("\t", "    ") for line in live]
        above = "".join(self._above)
        self._above.clear()
        top = [""] * self._padding_rows(len(top) + height, above, size) + top
        lines = [self._line(screen, row, size.columns, depth) for row in range(height)]
        cursor = screen.get_cursor_position(layout.current_window)
        row = len(top) + cursor.y
        frame = Frame((*top, *lines), size.columns, size.rows, row, cursor.x, screen.show_cursor)
        if not self._set_up:
            self.output.write_raw(_SET_UP)
            self._set_up = True
        self.output.write_raw(paint(self._frame, frame, above, reflows=self._behaviour.reflows))
        self._frame = frame
        self.output.flush()

    def _is_changing(self, size: Size) -> bool:
        """Return True if the window got this size a moment ago: it may change again before it is drawn."""
        frame, now = self._frame, time.monotonic()
        if frame is None or (frame.columns, frame.rows) == (size.columns, size.rows):
            self._new_size = None
        elif self._new_size is None or self._new_size[0] != size:
            self._new_size = (size, now)
        return self._new_size is not None and now < self._new_size[1] + _SETTLE_SECONDS

    def _padding_rows(self, height: int, above: str, size: Size) -> int:
        """Return how many empty rows to draw above the frame.

        In a narrower window the wrapped lines of the last frame take more rows, and a smaller frame would
        leave empty ones below it. A terminal that keeps those rows would move the frame up with each change
        of the width, until it is off the screen.
        """
        before = self._frame
        if before is not None and before.columns != size.columns and self._behaviour.keeps_empty_rows:
            self._min_rows = rows_taken(before, size.columns)
        self._min_rows = max(0, self._min_rows - rows_printed(above, size.columns))
        if self._min_rows <= height:
            self._min_rows = 0
        return max(0, min(self._min_rows, size.rows) - height)

    def _line(self, screen: Screen, row: int, columns: int, depth: ColorDepth) -> str:
        """Return a row of the screen with its styles, without trailing spaces."""
        cells = screen.data_buffer[row]
        parts: list[str] = []
        last, column, end = _RESET, 0, 0
        while column < columns:
            cell = cells[column]
            code, shows_spaces = self._style_code(cell.style, depth)
            if code != last:
                parts.append(code)
                last = code
            char = cell.char.translate(_INVISIBLE)
            column += cell.width or 1
            # Where terminals disagree about the width of a character, go to the next column explicitly.
            parts.append(char if is_certain(char) else f"{char}\x1b[{column + 1}G")
            if cell.char != " " or shows_spaces:
                end = len(parts)
        line = "".join(parts[:end])
        return f"{line}{_RESET}" if "\x1b" in line else line

    def _style_code(self, style: str, depth: ColorDepth) -> tuple[str, bool]:
        """Return the escape code of a style, and whether a space in this style is visible."""
        known = self._style_codes.get(style)
        if known is None:
            attributes = self.style.get_attrs_for_style_str(style)
            text = io.StringIO()
            output = Vt100_Output(text, lambda: Size(1, 1))
            output.set_attributes(attributes, depth)
            output.flush()
            shows_spaces = bool(attributes.bgcolor or attributes.underline or attributes.reverse)
            known = self._style_codes[style] = (text.getvalue(), shows_spaces)
        return known
