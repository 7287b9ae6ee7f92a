"""Replies that go on with one that was cut, in the middle of whatever it was."""

from __future__ import annotations

import re

import pytest

from dsmoe_local.chat.terminal.reply import MarkdownText

STYLES = re.compile(r"\x1b\[[0-9;]*m")


def _drawn(after: str, pieces: list[str]) -> str:
    text = MarkdownText(colour=False, after=after)
    return STYLES.sub("", "".join(text.feed(piece, 60) for piece in pieces) + text.finish(60))


@pytest.mark.parametrize(
    ("before", "rest", "drawn"),
    [
        (
            "So:\n\n```python\nfor x in y:\n    to",
            "tal = x * y * 2\n    # add\n```\n\n**Done**.",
            "    total = x * y * 2\n    # add\n\nDone.\n",
        ),
        ("So:\n\n```\n", "a * b * c\n```\nDone.", "a * b * c\n\nDone.\n"),
        ("```py", "thon\na * b * c\n```\n", "a * b * c\n"),
        ("| a | b |\n|--|--|\n| 1 | 2", "2 |\n| 3 | 4 |\n", "a  b\n─────\n1  22\n3  4\n"),
        ("- a\n- b\n    - c", "d\n    - e\n- f\n", "• b\n  ◦ cd\n  ◦ e\n• f\n"),
        ("- a\n\n", "    - e\n- f\n", "  ◦ e\n• f\n"),
        ("> q\n> r", "s\n> t\n", "│ q\n│ rs\n│ t\n"),
        ("So:\n\n```\nfor x in y:\n", "    total = x\n", "    total = x\n"),
        ("One sentence.\n\nAnother", "      sentence.\n\n    code\n", "sentence.\n\ncode\n"),
        ("One sentence.\n\nAnother sen", "tence.\n\nMore.\n", "tence.\n\nMore.\n"),
        ("```\ncode\n```\n\n", "Text.\n", "Text.\n"),
        ("", "Text.\n", "Text.\n"),
    ],
)
def test_a_reply_that_goes_on(before: str, rest: str, drawn: str) -> None:
    """Guards: the rest of code drawn as prose, without its indents and its stars; prose drawn twice."""
    assert _drawn(before, [rest]) == drawn
    assert _drawn(before, list(rest)) == drawn


def test_the_open_part_is_drawn_the_same() -> None:
    """Guards: code that is prose until it is final."""
    text = MarkdownText(colour=False, after="```python\nx = 1\nif x *")
    text.feed(" y * z:", 60)
    assert [STYLES.sub("", line) for line in text.lines(60, 5)] == ["if x * y * z:"]
