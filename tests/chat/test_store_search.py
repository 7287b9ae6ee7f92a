"""Searching past turns: Chinese, plain-text queries, what is shown; against Python's own string search."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.stored import holds, talk

from dsmoe_local.chat.store.search import indexed, query, snippet
from dsmoe_local.chat.store.sessions import SessionStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SessionStore]:
    opened = SessionStore.open(tmp_path)
    yield opened
    opened.close()


def found(store: SessionStore, words: str) -> list[int]:
    """The turns found, of the only session."""
    return sorted(hit.turn for hit in store.search(words))


TEXTS = (
    "DeepSeekMoE 是一种混合专家模型。",  # 1
    "モデルの重みを量子化する ﾃｽﾄ",  # 2
    "전문가 혼합 모델은 빠르다",  # 3
    "The café's routers aren't trained: see x_router[12] in STRASSE 5",  # 4
    "straße, CAFÉ, naïve; ＦＵＬＬ width ①",  # 5
    'quotes " AND brackets ( NEAR * ^ : - + {a b} OR NOT',  # 6
    "𠀀𠀁 are rare 々",  # 7
)


@pytest.mark.parametrize(
    ("words", "turns"),
    [
        ("专家", [1]), ("混合", [1]), ("家模", [1]), ("专 家", [1]), ("专模", []), ("deepseekmoe 专家", [1]),
        ("模型 routers", []), ("量子化", [2]), ("重み", [2]), ("モデル", [2]), ("テスト", [2]), ("ﾓﾃﾞﾙ", [2]),
        ("전문가", [3]), ("모델", [3]), ("델은", [3]), ("모델이", []),
        ("cafe", [4, 5]), ("CAFÉ", [4, 5]), ("strasse", [4, 5]), ("straße 5", [4]), ("router", [4]),
        ("aren't", [4]), ("full", [5]), ("ｆｕｌｌ", [5]), ("naive", [5]), ("train", [4]), ("rained", []),
        ("AND", [6]), ('"', []), ('quotes "', [6]), ("( NEAR", [6]), ("NOT quotes", [6]), ("x:quotes", []),
        ("*", []), ("qu*", [6]), ("x_router[12]", [4]), ("router[13]", []), ('"quotes AND"', [6]),
        ("𠀀", [7]), ("𠀁", [7]), ("々", [7]), ("😀", []), ("  ", []), ("\x00", []), ("\ud800", []),
    ],
)  # fmt: skip
def test_what_is_found(store: SessionStore, words: str, turns: list[int]) -> None:
    """Guards: two-character words that nobody finds; operators and quotes obeyed, or an error."""
    store.create("m", "v", "").save(talk(*TEXTS))
    assert found(store, words) == turns


pieces = st.sampled_from(["alpha", "Beta", "beta2", "café", "专家", "混合", "家", "模", "x"])


@settings(max_examples=300)
@given(
    text=st.lists(pieces, max_size=8),
    glue=st.sampled_from([" ", "\n", ", ", "。"]),
    wanted=st.lists(pieces, max_size=3),
)
def test_the_index_finds_what_python_finds(text: list[str], glue: str, wanted: list[str]) -> None:
    """Guards: a text that is transformed in one way for the index, and in another for the query."""
    assert matches(glue.join(text), " ".join(wanted)) == (
        bool(wanted) and all(holds(" ".join(text), word) for word in wanted)
    )


@settings(max_examples=500)
@given(st.text(max_size=40))
@example('"')
@example("a\x00b")
@example("NEAR(a b, 2) ^x {content}: -y")
@example("'' ; DROP TABLE turn")
def test_no_query_is_an_error_and_every_text_finds_itself(text: str) -> None:
    """Guards: what somebody types taken for SQLite's query language."""
    asked = query(text)
    assert (
        matches(text, text)
        or asked is None
        or not any(letter.isascii() and letter.isalnum() for letter in text)
    )


def matches(text: str, words: str) -> bool:
    """Whether an index of the text alone finds the words."""
    asked = query(words)
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute(
            "CREATE VIRTUAL TABLE t USING fts5 (c, tokenize = 'unicode61 remove_diacritics 2')"
        )
        connection.execute("INSERT INTO t VALUES (?)", (indexed(text),))
        return asked is not None and bool(
            connection.execute("SELECT 1 FROM t WHERE t MATCH ?", (asked,)).fetchall()
        )
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("text", "words", "shown"),
    [
        ("short", "short", "short"),
        ("a\n\n  b\tc", "c", "a b c"),
        ("x " * 100 + "needle" + " y" * 100, "needle", "…" + "x " * 12 + "needle " + "y " * 24 + "y…"),
        ("字" * 100 + "专家" + "字" * 100, "专家", "…" + "字" * 24 + "专家" + "字" * 54 + "…"),
        ("x" * 100 + " CAFÉ", "cafe", "…" + "x" * 75 + " CAFÉ"),
        ("z" * 200, "q", "z" * 80 + "…"),
        ("", "q", ""),
    ],
)
def test_snippets(text: str, words: str, shown: str) -> None:
    """Guards: hits shown without the word that was looked for, or over many lines."""
    assert snippet(text, words) == shown


@settings(max_examples=300)
@given(st.text(max_size=300), st.text(max_size=10))
def test_snippets_are_pieces_of_the_text(text: str, words: str) -> None:
    """Guards: places in the folded text taken for places in the text itself."""
    shown = snippet(text, words)
    assert len(shown) <= 82
    assert shown.removeprefix("…").removesuffix("…").strip() in " ".join(text.split())


def test_only_what_a_session_shows_is_found_newest_first(store: SessionStore) -> None:
    """Guards: hits in replies that were undone or made again; a turn of two forks found twice."""
    session = store.create("m", "v", "")
    session.save(talk("needle one", "needle two"))
    session.save(talk("needle one", "needle three"))
    fork = store.fork(session)
    fork.save(talk("needle one", "needle three", "needle four", "needle five"))
    fork.save(talk("needle one", "needle three", "needle four"))
    hits = store.search("needle")
    assert [(hit.session, hit.turn, hit.snippet) for hit in hits] == [
        ("chat-1 2", 3, "needle four"),
        ("chat-1", 2, "needle three"),
        ("chat-1", 1, "needle one"),
    ]
    assert [hit.snippet for hit in store.search("needle", limit=2)] == ["needle four", "needle three"]
    store.delete(session)
    assert [hit.session for hit in store.search("three")] == ["chat-1 2"]
