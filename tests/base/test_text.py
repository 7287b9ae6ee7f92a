"""What a terminal could obey must come out inert."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.text import safe_file_line, safe_file_text, safe_line, safe_text, whole_characters

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


REORDERS = {"LRE", "RLE", "PDF", "LRO", "RLO"}
OPENS = {"LRI", "RLI", "FSI"}


@pytest.mark.parametrize(
    "text", ["\u05d0\u200f! (C++\u200e)", "\u0627\u061c, \u2067abc\u2069 \u2068\u2066x\u2069\u2069"]
)
def test_files_keep_what_hebrew_and_arabic_need(text: str) -> None:
    """Guards: exports with replacement characters in place of the marks of right-to-left text."""
    assert safe_file_text(text) == text
    assert safe_file_line(text) == text
    assert "\ufffd" in safe_text(text)


def test_an_isolate_is_closed_within_its_line() -> None:
    """Guards: an isolate that reorders what follows it, or is closed by what belongs to another line."""
    assert safe_file_text("\u2067a\n\u2069b \u2066c\u2069") == "\ufffda\n\ufffdb \u2066c\u2069"
    assert safe_file_text("\u2067a\u2028b\u2069") == "\ufffda\nb\ufffd"
    assert safe_file_line("\u2067" + "x" * 300 + "\u2069", 10) == "\ufffd" + "x" * 8 + "…"


@given(
    st.text(
        st.sampled_from(
            "a\u05d0\n\u2028\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\x1b\x9b"
        )
    )
)
def test_nothing_in_a_file_reorders_what_is_around_it(text: str) -> None:
    """Guards: source code or a link that reads otherwise than it is. The oracle is Unicode's own table."""
    for line in safe_file_text(text).split("\n"):
        depth = 0
        for character in line:
            kind = unicodedata.bidirectional(character)
            assert kind not in REORDERS
            assert unicodedata.category(character) != "Cc"
            depth += (kind in OPENS) - (kind == "PDI")
            assert depth >= 0
        assert depth == 0
    assert safe_file_text(safe_file_text(text)) == safe_file_text(text)


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


def test_no_control_character_is_left() -> None:
    """Guards: one code that a range of controls leaves out."""
    controls = [*range(0x20), *range(0x7F, 0xA0)]
    shown = safe_text("".join(map(chr, controls)))
    assert [character for character in shown if ord(character) in controls] == ["\t", "\n"]
