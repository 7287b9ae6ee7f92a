"""What a terminal could obey must come out inert."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.text import safe_line, safe_text, whole_characters

HOSTILE = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\x1b]52;c;cm0gLXJm\x1b\\",
    "\x9b31m",
    "\x90q\x9c",
    "a\u202eb",
    "\u2066x\u2069",
    "\ud800",
    "x\ry",
    "\x08\x08",
    "\x00\x7f",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_a_terminal_obeys_survives(text: str) -> None:
    """Guards against escape sequences, C1, bidi overrides and lone surrogates reaching the screen."""
    safe = safe_text(text)
    safe.encode("utf-8")
    assert not any(
        ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 or 0x202A <= ord(char) <= 0x2069 for char in safe
    )


def test_ordinary_text_is_untouched() -> None:
    """Guards against damaging what people write: CJK, emoji with joiners, tabs, newlines."""
    text = "深度求索 👩‍💻 café\tx\n[bold]not markup[/bold]"
    assert safe_text(text) == text


@given(st.text())
def test_pieces_of_a_stream_give_the_same_as_the_whole(text: str) -> None:
    """Guards against state between characters: streamed pieces are made safe one by one."""
    assert "".join(safe_text(char) for char in text) == safe_text(text)


def test_half_characters_have_no_encoding() -> None:
    """Guards: a pasted half of a pair that ends the program, or two that belong together torn apart."""
    assert whole_characters("a\ud83db\udc00") == "a\ufffdb\ufffd"
    assert whole_characters("\ud83d\ude00é") == "\N{GRINNING FACE}é"


def test_a_line_is_one_short_line() -> None:
    """Guards against names with newlines that fake further lines of a message."""
    assert safe_line("a\nerror: b\tc\u2028d") == "a error: b c d"
    assert len(safe_line("x" * 1000)) == 200


def test_an_error_is_three_safe_lines_at_most() -> None:
    """Guards messages against text from files: each part of an error is one safe line."""
    error = DsmoeError("a\x1b[2J\nb", where="c\nd", remedy="e\u2028f")
    assert str(error) == "a␛[2J b\nc d\ne f"
