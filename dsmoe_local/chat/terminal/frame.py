"""Paint the lines below the conversation: pure functions that return escape codes.

A frame is painted in place: only changed lines are written. Text printed above the frame overwrites it, and
the frame is painted again below, so that no line of it reaches the scrollback. The terminal is never asked
for the position of its cursor, which the last frame has set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsmoe_local.chat.cells import is_certain, most_cells, sized

_CODES = re.compile(r"\x1b\[[0-9;:]*[mG]")
# Synchronized updates: the terminal shows the whole update at once. Others ignore the code.
_BEGIN, _END = "\x1b[?2026h\x1b[?25l", "\x1b[?2026l"
_SHOW_CURSOR = "\x1b[?25h"
_SAVE_CURSOR, _RESTORE_CURSOR = "\x1b7", "\x1b8"
_WRAP, _NO_WRAP = "\x1b[?7h", "\x1b[?7l"
_ERASE_LINE, _ERASE_DOWN = "\x1b[K", "\x1b[J"


@dataclass(frozen=True, slots=True)
class Frame:
    """Lines with their styles, drawn for a window of `columns` and `rows`, and the position of the cursor.

    `rows` is 0 if the window has been resized since, so that its contents are unknown.
    """

    lines: tuple[str, ...]
    columns: int
    rows: int
    row: int = 0  # of the cursor, counted from the first line
    column: int = 0
    shows_cursor: bool = True


def without_styles(line: str) -> str:
    """Return `line` without the codes for styles and columns."""
    return _CODES.sub("", line)


def width_of(line: str) -> int:
    """Return the most cells that a line with styles may take."""
    return most_cells(without_styles(line))


def paint(old: Frame | None, new: Frame, above: str = "", *, reflows: bool = False) -> str:
    """Return the codes that replace `old` by `new` on the screen, and print the lines of `above` above it.

    `above` is empty or ends with a newline. Its lines may be wider than the terminal. `reflows`: see `wipe`.
    """
    return "".join(_paint(old, new, above, reflows=reflows))


def wipe(frame: Frame | None, columns: int, *, reflows: bool = False) -> str:
    """Return the codes that erase a frame from a terminal that is now `columns` wide.

    The cursor ends where the frame began. `reflows`: the terminal is known to rewrap lines when its width
    changes. Otherwise some rows of the frame may stay: a wrong guess would erase lines of the conversation.
    """
    if frame is None:
        return ""
    above = _rows_to_cursor(frame, columns, reflows=reflows)
    below = rows_taken(frame, columns) - _rows_to_cursor(frame, columns, reflows=True)
    # Row by row, because tmux moves a screen that is erased as a whole into its scrollback. The cursor is
    # saved and restored, because there may be fewer rows below it in a window that has lost height.
    erase = _down(1).join([_ERASE_LINE] * (above + below))
    return f"\r{_up(above)}{_SAVE_CURSOR}{erase}{_RESTORE_CURSOR}"


def print_lines(text: str) -> str:
    """Return the codes that print lines, each over the content of its row."""
    lines = text.removesuffix("\n").split("\n") if text else []
    # Erase before writing: after a full line the code would erase its last cell.
    return "".join(f"{_ERASE_LINE}{line}\r\n" for line in lines)


def rows_taken(frame: Frame, columns: int) -> int:
    """Return the most rows that a frame takes on a terminal that is now `columns` wide."""
    if columns >= frame.columns:
        return len(frame.lines)
    return sum(_rows_of(line, columns) for line in frame.lines)


def rows_printed(text: str, columns: int) -> int:
    """Return the rows that printed lines take."""
    return sum(_rows_of(line, columns) for line in text.removesuffix("\n").split("\n")) if text else 0


def _paint(old: Frame | None, new: Frame, above: str, *, reflows: bool) -> Iterator[str]:
    if old == new and not above:
        return
    yield _BEGIN
    if old is not None and (old.columns, old.rows) != (new.columns, new.rows):
        # The window has been resized, so the lines that are still on the screen are unknown.
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
    """Write lines over the frame. The terminal wraps long ones, so that they can be copied as one line."""
    if any("\t" in line or width_of(line) > columns for line in above.split("\n")):
        # How many rows these take depends on the terminal, so the frame is erased first.
        yield wipe(old, columns)
        yield "\r"
    else:
        yield f"\r{_up(old.row if old else 0)}"
    yield print_lines(above)


def _write_all(lines: Sequence[str]) -> Iterator[str]:
    yield _NO_WRAP
    for line in lines[:-1]:
        yield f"{_ERASE_LINE}{line}\r\n"
    # The last frame may have had more lines.
    yield f"{_ERASE_DOWN}{lines[-1]}\r{_up(len(lines) - 1)}{_WRAP}"


def _write_changes(old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    """Write the lines that changed. The cursor is in the first line, before and after."""
    row = 0
    yield _NO_WRAP
    for number, (before, line) in enumerate(zip(old, new, strict=False)):
        if before != line:
            yield f"\r{_down(number - row)}{_ERASE_LINE}{line}"
            row = number
    if len(new) > len(old):
        yield _down(len(old) - 1 - row)
        # On the last row of the screen only a line feed scrolls.
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
    """Return the rows from the frame's first one to the cursor, on a terminal that is now `columns` wide."""
    # A wider terminal joins no lines, because each of them ends with a line feed.
    if not reflows or columns >= frame.columns or not all(map(is_certain, frame.lines[: frame.row + 1])):
        return frame.row
    before = sum(_rows_of(line, columns) for line in frame.lines[: frame.row])
    line = without_styles(frame.lines[frame.row]) if frame.lines else ""
    # In some terminals, a cursor behind the end of a full line stays in that row.
    return before + _rows_of(line[: _index(line, frame.column)], columns) - 1


def _rows_of(line: str, columns: int) -> int:
    """Return the rows that a wrapped line takes. A wide character is never split between two rows."""
    rows, used = 1, 0
    for _, size in sized(without_styles(line)):
        if used + size > columns:
            rows, used = rows + 1, 0
        used += size
    return rows


def _index(line: str, column: int) -> int:
    """Return the index of the character at a column, or the length of the line."""
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
