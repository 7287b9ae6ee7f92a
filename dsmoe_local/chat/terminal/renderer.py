"""Draws a prompt_toolkit layout below a conversation that scrolls, with lines of our own on top of it.

prompt_toolkit's renderer asks the terminal where its cursor is, switches bracketed paste off for whatever is
printed above it, and takes a resized terminal for one that does not wrap. This one knows what is where.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from prompt_toolkit.application import Application
from prompt_toolkit.data_structures import Size
from prompt_toolkit.layout import Layout
from prompt_toolkit.layout.mouse_handlers import MouseHandlers
from prompt_toolkit.layout.screen import Screen, WritePosition
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.renderer import Renderer
from prompt_toolkit.styles import BaseStyle

from dsmoe_local.chat.cells import is_certain
from dsmoe_local.chat.terminal.frame import Frame, paint, rows_printed, rows_taken, wipe
from dsmoe_local.chat.terminal.output import Habits

Top = Callable[[int, int], Sequence[str]]
"""Gives the lines above the layout, for so many columns and at most so many rows."""

# None of these takes a cell. Directions of writing would reorder the line around them. What joins characters
# does so in some terminals only, and the cursor goes through them one by one.
_DIRECTIONS = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_JOINERS = (0x200D, 0xFE0E, 0xFE0F)
_INVISIBLE = dict.fromkeys((*_DIRECTIONS, *_JOINERS), "")
_SECONDS_TO_SETTLE = 0.05
_RESET = "\x1b[0m"
_SET_UP, _SET_DOWN = "\x1b[?1l\x1b[?2004h", "\x1b[?2004l"


class InlineRenderer(Renderer):
    """Keeps the lines of the layout, and those that `top` gives, at the end of what is printed."""

    def __init__(self, style: BaseStyle, output: Vt100_Output, habits: Habits) -> None:
        self.top: Top = _no_lines
        self._habits = habits
        self._rows_kept = 0  # rows that the frame takes at least
        self._frame: Frame | None = None
        self._above: list[str] = []
        self._set_up = False
        self._new_size: tuple[Size, float] | None = None  # not drawn for yet, and since when it is known
        self._looks: dict[str, tuple[str, bool]] = {}
        super().__init__(style, output)

    def print_above(self, text: str) -> None:
        """Lines, each with its newline, that go above the frame the next time it is drawn."""
        self._above.append(text)

    def resized(self) -> None:
        """The window has changed, though perhaps back to the size that it had: what it cut off is gone."""
        if self._frame is not None:
            self._frame = replace(self._frame, rows=0)

    def render(self, app: Application[object], layout: Layout, is_done: bool = False) -> None:
        """Draw what changed; what is to be printed goes out in the same write."""
        size = self.output.get_size()
        if self._is_changing(size):
            asyncio.get_running_loop().call_later(_SECONDS_TO_SETTLE, app.invalidate)
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

    def _draw(self, screen: Screen, height: int, size: Size, layout: Layout, depth: ColorDepth) -> None:
        top = [line.replace("\t", "    ") for line in self.top(size.columns, size.rows - height)]
        lines = [self._line(screen, row, size.columns, depth) for row in range(height)]
        above = "".join(self._above)
        self._above.clear()
        top = [""] * self._rows_missing(len(top) + height, above, size) + top
        cursor = screen.get_cursor_position(layout.current_window)
        row = len(top) + cursor.y
        frame = Frame((*top, *lines), size.columns, size.rows, row, cursor.x, screen.show_cursor)
        if not self._set_up:
            self.output.write_raw(_SET_UP)
            self._set_up = True
        self.output.write_raw(paint(self._frame, frame, above, reflows=self._habits.reflows))
        self._frame = frame
        self.output.flush()

    def _is_changing(self, size: Size) -> bool:
        """Whether the window has only just got this size: in another, what is written now is misplaced."""
        frame, now = self._frame, time.monotonic()
        if frame is None or (frame.columns, frame.rows) == (size.columns, size.rows):
            self._new_size = None
        elif self._new_size is None or self._new_size[0] != size:
            self._new_size = (size, now)
        return self._new_size is not None and now < self._new_size[1] + _SECONDS_TO_SETTLE

    def _rows_missing(self, height: int, above: str, size: Size) -> int:
        """The empty rows to draw, so that lines which were wrapped leave no empty rows below the frame.

        Where such rows stay for good, each change of the width would move the frame up, and out of sight.
        """
        before = self._frame
        if before is not None and before.columns != size.columns and self._habits.keeps_empty_rows:
            self._rows_kept = rows_taken(before, size.columns)
        self._rows_kept = max(0, self._rows_kept - rows_printed(above, size.columns))
        if self._rows_kept <= height:
            self._rows_kept = 0
        return max(0, min(self._rows_kept, size.rows) - height)

    def _line(self, screen: Screen, row: int, columns: int, depth: ColorDepth) -> str:
        """A row of the screen with its styles, without the spaces at its end."""
        cells = screen.data_buffer[row]
        parts: list[str] = []
        last, column, end = _RESET, 0, 0
        while column < columns:
            cell = cells[column]
            code, shows_spaces = self._look(cell.style, depth)
            if code != last:
                parts.append(code)
                last = code
            char = cell.char.translate(_INVISIBLE)
            column += cell.width or 1
            # Wherever the terminal's cursor is after this, what follows has its place.
            parts.append(char if is_certain(char) else f"{char}\x1b[{column + 1}G")
            if cell.char != " " or shows_spaces:
                end = len(parts)
        line = "".join(parts[:end])
        return f"{line}{_RESET}" if "\x1b" in line else line

    def _look(self, style: str, depth: ColorDepth) -> tuple[str, bool]:
        """The code of a style, and whether a space in it can be seen."""
        look = self._looks.get(style)
        if look is None:
            attributes = self.style.get_attrs_for_style_str(style)
            paper = io.StringIO()
            pen = Vt100_Output(paper, lambda: Size(1, 1))
            pen.set_attributes(attributes, depth)
            pen.flush()
            shows_spaces = bool(attributes.bgcolor or attributes.underline or attributes.reverse)
            look = self._looks[style] = (paper.getvalue(), shows_spaces)
        return look

    def erase(self, leave_alternate_screen: bool = True) -> None:
        """Take the frame off the screen; what was to be printed is."""
        self.output.write_raw(wipe(self._frame, self.output.get_size().columns, reflows=self._habits.reflows))
        self.output.write_raw("".join(self._above).replace("\n", "\r\n"))
        self._above.clear()
        self.reset(leave_alternate_screen=leave_alternate_screen)

    def reset(self, _scroll: bool = False, leave_alternate_screen: bool = True) -> None:
        """Forget what is on the screen: the frame is drawn anew where the cursor is."""
        self._frame, self._rows_kept = None, 0
        if self._set_up:
            self.output.write_raw(_SET_DOWN)
            self._set_up = False
        super().reset(_scroll, leave_alternate_screen)

    def clear(self) -> None:
        """Clear the screen; the frame is drawn at its top."""
        self.output.write_raw(wipe(self._frame, self.output.get_size().columns, reflows=self._habits.reflows))
        self.output.write_raw("\x1b[H\x1b[2J")
        self._frame, self._rows_kept = None, 0


def _no_lines(columns: int, rows: int) -> Sequence[str]:
    return ()
