"""The lines below the conversation and how they get onto a terminal: pure functions that give escape codes.

A frame is painted in place: only what changed is written, what is printed above it goes where it was, and no
line of it ever reaches the scrollback. Nobody asks where the terminal's cursor is: it is where the last
frame left it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsmoe_local.chat.cells import is_certain, most_cells, sized

_CODES = re.compile(r"\x1b\[[0-9;:]*[mG]")
# A terminal that knows synchronized updates shows all of one at once; others ignore the code.
_BEGIN, _END = "\x1b[?2026h\x1b[?25l", "\x1b[?2026l"
_SHOW_CURSOR = "\x1b[?25h"
_SAVE_CURSOR, _RESTORE_CURSOR = "\x1b7", "\x1b8"
_WRAP, _NO_WRAP = "\x1b[?7h", "\x1b[?7l"
_ERASE_LINE, _ERASE_DOWN = "\x1b[K", "\x1b[J"


@dataclass(frozen=True, slots=True)
class Frame:
    """Lines with their styles, for a window of `columns` and `rows`; where in them the cursor is.

    `rows` 0: the window has changed since, and so may what it shows.
    """

    lines: tuple[str, ...]
    columns: int
    rows: int
    row: int = 0  # of the cursor, among the lines
    column: int = 0
    shows_cursor: bool = True


def without_styles(line: str) -> str:
    """`line` without the codes that colour it, or go to a column."""
    return _CODES.sub("", line)


def width_of(line: str) -> int:
    """The most cells that a line with styles may take."""
    return most_cells(without_styles(line))


def paint(old: Frame | None, new: Frame, above: str = "", *, reflows: bool = False) -> str:
    """What makes a terminal that shows `old` show `new`, with the lines of `above` before it.

    `above` ends with a newline; its lines may be longer than the terminal is wide. `reflows`: see `wipe`.
    """
    return "".join(_paint(old, new, above, reflows=reflows))


def wipe(frame: Frame | None, columns: int, *, reflows: bool = False) -> str:
    """What takes a frame off a terminal that is `columns` wide now, with the cursor where the frame began.

    `reflows`: the terminal is known to wrap lines anew when its width changes. Where that is not known, some
    rows of the frame may stay on the screen: a wrong guess would erase lines of the conversation above it.
    """
    if frame is None:
        return ""
    above = _rows_to_cursor(frame, columns, reflows=reflows)
    below = rows_taken(frame, columns) - _rows_to_cursor(frame, columns, reflows=True)
    # Row by row: what is erased as a whole, from the first row on, some terminals keep in their scrollback.
    # The way back is remembered, not counted: a window that got lower may have fewer rows below.
    erase = _down(1).join([_ERASE_LINE] * (above + below))
    return f"\r{_up(above)}{_SAVE_CURSOR}{erase}{_RESTORE_CURSOR}"


def rows_taken(frame: Frame | None, columns: int) -> int:
    """The most rows that a frame takes on a terminal that is `columns` wide now."""
    if frame is None or columns >= frame.columns:
        return 0 if frame is None else len(frame.lines)
    return sum(_rows_of(line, columns) for line in frame.lines)


def rows_printed(text: str, columns: int) -> int:
    """The rows that whole lines take."""
    return sum(_rows_of(line, columns) for line in text.removesuffix("\n").split("\n")) if text else 0


def _paint(old: Frame | None, new: Frame, above: str, *, reflows: bool) -> Iterator[str]:
    if old == new and not above:
        return
    yield _BEGIN
    if old is not None and (old.columns, old.rows) != (new.columns, new.rows):
        # In a lower window some terminals drop what is below the cursor.
        yield wipe(old, new.columns, reflows=reflows)
        old = None
    if old is None or above:
        yield from _print(old, above, new.columns)
        yield from _write_all(new.lines)
    else:
        yield f"\r{_up(old.row)}"
        yield from _write_changes(old.lines, new.lines)
    yield _place_cursor(new)
    yield _END


def _print(old: Frame | None, above: str, columns: int) -> Iterator[str]:
    """Lines written over the frame. The terminal wraps the long ones, so that a copy has them whole."""
    lines = above.removesuffix("\n").split("\n") if above else []
    if any("\t" in line or width_of(line) > columns for line in lines):
        # Which rows these take is the terminal's business.
        yield wipe(old, columns)
        yield "\r"
    else:
        yield f"\r{_up(old.row if old else 0)}"
    # Erased first: at the end of a full line its last cell would go.
    yield "".join(f"{_ERASE_LINE}{line}\r\n" for line in lines)


def _write_all(lines: Sequence[str]) -> Iterator[str]:
    yield _NO_WRAP
    for line in lines[:-1]:
        yield f"{_ERASE_LINE}{line}\r\n"
    # Below it there may be more of what was there.
    yield f"{_ERASE_DOWN}{lines[-1]}\r{_up(len(lines) - 1)}{_WRAP}"


def _write_changes(old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    """From the first line and back to it."""
    row = 0
    yield _NO_WRAP
    for number, (before, line) in enumerate(zip(old, new, strict=False)):
        if before != line:
            yield f"\r{_down(number - row)}{_ERASE_LINE}{line}"
            row = number
    if len(new) > len(old):
        yield _down(len(old) - 1 - row)
        # Only a line feed scrolls the screen where it is full.
        yield "".join(f"\r\n{_ERASE_LINE}{line}" for line in new[len(old) :])
        row = len(new) - 1
    elif len(new) < len(old):
        yield f"\r{_down(len(new) - row)}{_ERASE_DOWN}"
        row = len(new)
    yield f"\r{_up(row)}{_WRAP}"


def _place_cursor(frame: Frame) -> str:
    right = f"\x1b[{frame.column}C" if frame.column else ""
    return f"{_down(frame.row)}{right}{_SHOW_CURSOR if frame.shows_cursor else ''}"


def _rows_to_cursor(frame: Frame, columns: int, *, reflows: bool) -> int:
    """How many rows the cursor is below the frame's first one, on a terminal that is `columns` wide now."""
    # Every line ends with a line feed, so a wider terminal joins none.
    if not reflows or columns >= frame.columns or not all(map(is_certain, frame.lines[: frame.row + 1])):
        return frame.row
    before = sum(_rows_of(line, columns) for line in frame.lines[: frame.row])
    line = without_styles(frame.lines[frame.row]) if frame.lines else ""
    # A cursor behind the last character of its line makes no further row everywhere.
    return before + _rows_of(line[: _index(line, frame.column)], columns) - 1


def _rows_of(line: str, columns: int) -> int:
    """The rows that a terminal makes of a line. A wide character of which half fits goes to the next."""
    rows, used = 1, 0
    for _, size in sized(without_styles(line)):
        if used + size > columns:
            rows, used = rows + 1, 0
        used += size
    return rows


def _index(line: str, column: int) -> int:
    """The index of the character at a column, or the end of the line."""
    used = 0
    for index, (_, size) in enumerate(sized(line)):
        if used >= column:
            return index
        used += size
    return len(line)


def _up(rows: int) -> str:
    return f"\x1b[{rows}A" if rows > 0 else ""


def _down(rows: int) -> str:
    return f"\x1b[{rows}B" if rows > 0 else ""
