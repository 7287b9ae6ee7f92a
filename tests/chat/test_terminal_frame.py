"""Painting of frames, checked on pyte: no printed line is lost or repeated, no drawn line stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len, set_cell_size
from support.screens import RigidScreen

from dsmoe_local.chat.terminal.frame import Frame, paint, rows_printed, rows_taken, wipe

COLUMNS, ROWS = 20, 8
LINE = st.text("ab 专\N{THUMBS UP SIGN}", max_size=26).map(lambda text: f"x{text}y")
# pyte does not wrap wide characters at the edge as terminals do, so long lines have none.
PRINTED = st.one_of(LINE.map(lambda line: _fit(line)), st.text("ab", min_size=1, max_size=60))
LINES = st.lists(LINE, min_size=1, max_size=ROWS - 1)


class Paper:
    """A terminal that keeps what scrolls out of it."""

    def __init__(self) -> None:
        self.screen = RigidScreen(COLUMNS, ROWS, history=10_000)
        self.stream = pyte.Stream(self.screen)

    def lines(self) -> list[str]:
        rows: Iterable[Mapping[int, Any]] = [
            *self.screen.history.top,
            *(self.screen.buffer[row] for row in range(ROWS)),
        ]
        texts = ["".join(row[column].data for column in range(COLUMNS)).rstrip() for row in rows]
        while texts and not texts[-1]:
            texts.pop()
        return texts


def _fit(line: str) -> str:
    return set_cell_size(line, min(cell_len(line), COLUMNS)).rstrip()


def _wrapped(line: str) -> list[str]:
    if not line.isascii():
        return [line]
    return [line[start : start + COLUMNS] for start in range(0, len(line), COLUMNS)]


STEPS = st.lists(
    st.tuples(LINES, st.integers(0, ROWS), st.lists(PRINTED, max_size=5)), min_size=1, max_size=12
)


@given(STEPS)
def test_what_is_printed_stays_and_what_is_drawn_goes(steps: list[tuple[list[str], int, list[str]]]) -> None:
    """Guards: a frame that leaves lines behind, overwrites printed ones, or shows old contents."""
    paper = Paper()
    before: Frame | None = None
    printed: list[str] = []
    for lines, row, above in steps:
        lines = [_fit(line) for line in lines]
        frame = Frame(tuple(lines), COLUMNS, ROWS, row % len(lines), min(3, COLUMNS - 1))
        paper.stream.feed(paint(before, frame, "".join(f"{line}\n" for line in above)))
        printed += [row for line in above for row in _wrapped(line)]
        assert paper.lines() == [*printed, *lines]
        assert paper.screen.cursor.x == min(3, COLUMNS - 1)
        top = len(paper.screen.history.top)
        assert paper.screen.cursor.y == len(printed) + frame.row - top
        before = frame
    paper.stream.feed(wipe(before, COLUMNS))
    assert paper.lines() == [line for line in printed if printed[-1:] or line]


FAMILY = "\N{WOMAN}\u200d\N{WOMAN}\u200d\N{GIRL}\u200d\N{BOY}"


def test_emoji_that_are_wider_than_counted() -> None:
    """Guards: joined emoji counted as two cells, where a terminal draws four of them and wraps the line: what
    was in the next row stays beside them.
    """
    paper = Paper()
    frame = Frame(("a reply", "", "> what is typed", "the bar at the bottom"[:COLUMNS]), COLUMNS, ROWS, 2, 5)
    paper.stream.feed(paint(None, frame))
    paper.stream.feed(paint(frame, frame, f"{FAMILY * 4}\n{FAMILY * 4}\n"))
    people = FAMILY.replace("\u200d", "")
    rows = [people * 2 + people[:2], people[2:] + people]
    assert paper.lines() == [*rows, *rows, *frame.lines]


@pytest.mark.parametrize(
    "emoji", [FAMILY, "\u26a0\ufe0f", "\N{THUMBS UP SIGN}\U0001f3fd", "\U0001f1e9\U0001f1ea", "\u0915\u093f"]
)
def test_a_frame_that_may_be_wider_than_counted(emoji: str) -> None:
    """Guards: counting rows that the terminal did not make, so that lines of the conversation are erased."""
    frame = Frame((emoji * 8, "> "), COLUMNS, ROWS, 1, 2)
    assert wipe(frame, 5, reflows=True).startswith("\r\x1b[1A\x1b7")


def test_a_cursor_behind_its_line() -> None:
    """Guards: a row counted for a space before the cursor, which tmux leaves at the end of the text."""
    frame = Frame(("x" * 20,), COLUMNS + 1, ROWS, 0, 21)
    assert wipe(frame, 10, reflows=True).startswith("\r\x1b[1A\x1b7")


def test_what_did_not_change_is_not_written() -> None:
    """Guards: all lines written for each key, which flickers and is slow over a network."""
    before = Frame(("first", "second", "third"), COLUMNS, ROWS, 1, 6)
    written = paint(before, Frame(("first", "second!", "third"), COLUMNS, ROWS, 1, 7))
    assert "second!" in written
    assert "first" not in written
    assert "third" not in written
    assert paint(before, before) == ""


def test_an_update_is_one() -> None:
    """Guards: a terminal that shows a frame half painted though it knows synchronized updates."""
    frame = Frame(("line",), COLUMNS, ROWS)
    narrower = Frame(("line",), COLUMNS - 1, ROWS)
    for written in (paint(None, frame), paint(frame, narrower, "text\n")):
        assert written.startswith("\x1b[?2026h")
        assert written.endswith("\x1b[?2026l")


def test_a_frame_is_never_erased_as_a_whole() -> None:
    """Guards: copies of the frame in the scrollback of tmux, which keeps screens erased as a whole."""
    frame = Frame(("one", "two"), COLUMNS, ROWS, 1, 2)
    written = paint(frame, Frame(("three", "four"), COLUMNS, ROWS), "x" * 50 + "\ta\tb\n")
    assert written.index("three") < written.index("\x1b[J") < written.index("four")
    assert "\x1b[J" not in wipe(frame, 10)


@pytest.mark.parametrize(
    ("line", "columns", "rows"),
    [
        ("", 10, 1),
        ("a" * 10, 10, 1),
        ("a" * 11, 10, 2),
        ("专" * 5, 10, 1),
        ("a" + "专" * 5, 10, 2),
        ("专" * 9, 5, 5),
    ],
)
def test_rows_of_a_line_that_is_wrapped_anew(line: str, columns: int, rows: int) -> None:
    """Guards: wide characters at the edge counted as if they could be cut in two."""
    frame = Frame((f"\x1b[1m{line}\x1b[0m",), 20, ROWS)
    assert rows_taken(frame, columns) == rows
    assert rows_taken(frame, 30) == 1
    assert rows_printed(f"{line}\n{line}\n", columns) == 2 * rows
