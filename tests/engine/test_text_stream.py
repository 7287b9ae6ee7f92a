"""Token bytes to text: whole characters, stop strings, whatever the pieces are."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dsmoe_local.engine.reasoning import Parts
from dsmoe_local.engine.text_stream import TextStream


def cut(raw: bytes, places: list[int]) -> list[bytes]:
    borders = [0, *sorted(place % (len(raw) + 1) for place in places), len(raw)]
    return [raw[start:end] for start, end in pairwise(borders)]


def run(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    texts = [stream.feed(piece).answer for piece in pieces]
    return [*texts, stream.finish(cut=False).answer], stream.stopped


@given(st.text(), st.lists(st.integers(0, 200)))
def test_no_piece_ends_in_half_a_character(text: str, places: list[int]) -> None:
    """Guards: emoji and Chinese broken at token borders."""
    texts, _ = run(cut(text.encode("utf-8", "ignore"), places))
    assert "".join(texts) == text.encode("utf-8", "ignore").decode()
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts) or "\N{REPLACEMENT CHARACTER}" in text


@given(st.binary(max_size=60), st.lists(st.integers(0, 60)))
def test_malformed_bytes_are_replaced_as_python_does(raw: bytes, places: list[int]) -> None:
    """Guards: a random model's bytes raising, or vanishing."""
    texts, _ = run(cut(raw, places))
    assert "".join(texts) == raw.decode("utf-8", "replace")


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 30)),
)
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str], places: list[int]) -> None:
    """Guards: a stop string that straddles tokens printed in part, or one that overlaps another missed."""
    texts, stopped = run(cut(text.encode(), places), tuple(stops))
    found = [text.find(stop) for stop in stops if stop in text]
    # Pieces are searched as they come, so a stop that is complete earlier wins.
    assert stopped == bool(found)
    joined = "".join(texts)
    assert text.startswith(joined)
    assert not any(stop in joined for stop in stops)
    if not found:
        assert joined == text


@given(
    st.text("ab🚀", max_size=20),
    st.lists(st.text("ab🚀", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 60)),
)
def test_what_is_held_is_known(text: str, stops: list[str], places: list[int]) -> None:
    """Guards: a reply stored without its last letters, since they might have begun a stop string."""
    stream = TextStream(stops)
    told, read = "", b""
    for piece in cut(text.encode(), places):
        told += stream.feed(piece).answer
        read += piece
        if not stream.stopped:
            assert stream.holds == (told != read.decode(errors="ignore"))


def test_emoji_over_four_tokens() -> None:
    """Guards: the plain case of the first test, readable."""
    assert run([b"a\xf0", b"\x9f", b"\x9a", b"\x80b"])[0] == ["a", "", "", "\N{ROCKET}b", ""]


def test_possible_stop_is_released_when_it_is_none() -> None:
    """Guards: text held back for ever."""
    assert run([b"ab", b"c"], ("abd",))[0] == ["", "abc", ""]
    assert run([b"ab"], ("abd",))[0] == ["", "ab"]


def test_character_cut_in_two_replies() -> None:
    """Guards: a stopped reply ending in U+FFFD, and its continuation beginning with more of them."""
    rocket = "\N{ROCKET}".encode()
    first, second = TextStream(), TextStream()
    assert first.feed(b"a" + rocket[:2]) == Parts("a")
    assert first.finish(cut=True) == Parts()
    second.begin_after(b"a" + rocket[:2])
    assert second.feed(rocket[2:] + b"b").answer == "\N{ROCKET}b"
