"""Brackets without end: the thread that draws replies reads keys, too."""

from __future__ import annotations

import cProfile
import pstats

import pytest

from dsmoe_local.chat.markdown.inline import inline_spans
from dsmoe_local.chat.markdown.parser import parse_inline


def _work(source: str) -> int:
    profile = cProfile.Profile()
    profile.runcall(parse_inline, source)
    return pstats.Stats(profile).total_calls  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("brackets", ["[", "![", "[a", "[ "])
def test_work_grows_with_the_length(brackets: str) -> None:
    """Guards: seconds without a key, since each bracket is looked behind for its end: the square of them."""
    parse_inline("warm [up](there)"), parse_inline("[" * 50)
    assert _work(brackets * 2000) < 5 * _work(brackets * 500)
    assert _work(brackets * 2000 + "]" * 2000) < 5 * _work(brackets * 500 + "]" * 500)
    assert "".join(text for _, text in inline_spans(brackets * 2000)) == brackets * 2000


def test_links_stay() -> None:
    """Guards: links lost among many brackets that are closed."""
    spans = inline_spans("[1] " * 100 + "[text](address)" + "[" * 15)
    assert ("address", " (address)") in spans
