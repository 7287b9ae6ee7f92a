"""Markdown in pieces: what is final when, and that it is what the whole document would give."""

from __future__ import annotations

import re
from typing import TypeAlias

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import cell_len

from dsmoe_local.chat.markdown.blocks import Block, Kind
from dsmoe_local.chat.markdown.compose import Composer
from dsmoe_local.chat.markdown.leaves import Context, read_leaves
from dsmoe_local.chat.markdown.parser import parse_blocks
from dsmoe_local.chat.markdown.render import render_ansi, render_markdown, render_open
from dsmoe_local.chat.markdown.stream import MarkdownStream, _gaps

Parsed: TypeAlias = tuple[list[Token], dict[tuple[int, int], int]]
STYLES = re.compile(r"\x1b\[[0-9;]*m")

MARKS = ["", "", "  ", "   ", "    ", "- ", "* ", "-   ", "1. ", "2. ", "3) ", "10. ", "> ", ">", "\t", "+\t"]
TEXTS = [
    "",
    "",
    "word",
    "two words",
    "`code`",
    "**bold**",
    "*a **b* c**",
    "**“引”**文字",
    "emoji 👩‍💻 and 🇩🇪",
]
TEXTS += ["```", "```python", "~~~", "def f(): return 'x'", "/* open", "end */", "hard  ", "back\\", "<div>"]
TEXTS += [
    "# head",
    "***",
    "---",
    "===",
    "| a | b |",
    "|--|--|",
    "x | y | z",
    "-",
    "1.",
    "&amp;",
    "\\(a_1 * b\\)",
]
TEXTS += ["[text](address)", "[name]: there"]
marks = st.lists(st.sampled_from(MARKS), max_size=3).map("".join)
line = st.builds(str.__add__, marks, st.sampled_from(TEXTS))
document = st.lists(line, max_size=14).map("\n".join)


def plain(ansi: str) -> str:
    return STYLES.sub("", ansi)


def streamed(source: str, cuts: list[int], width: int = 40) -> str:
    stream, out, start = MarkdownStream(), "", 0
    for end in [*sorted({cut % (len(source) + 1) for cut in cuts}), len(source)]:
        out += "".join(render_ansi(block, width, colour=True) for block in stream.feed(source[start:end]))
        render_open(stream.open, width, 5, colour=True)
        start = end
    return out + "".join(render_ansi(block, width, colour=True) for block in stream.finish())


def final_after(source: str) -> list[Block]:
    return MarkdownStream().feed(source)


def texts(source: str) -> list[str]:
    return [block.source for block in final_after(source)]


@settings(max_examples=200, deadline=None)
@given(document, st.lists(st.integers(0, 2000), max_size=12))
def test_pieces_do_not_matter(source: str, cuts: list[int]) -> None:
    """Guards: lines, marks or colours that depend on where the stream was cut or looked at."""
    assert streamed(source, cuts) == render_markdown(source, 40, colour=True)


@settings(max_examples=200, deadline=None)
@given(document)
@example("1. # h\n1. x | y\n|--|--|")
@example("   1.\n   10. ```\n2. -   ```\n* b c")
@example("-     -\n    -   ***\n      * b c")
@example("- > \n\n    - * a")
@example("- a\n\n      code\n\n  b\n- c\n\n> q\nlazy\n\n>\n> r")
def test_reading_on_is_reading_all(source: str) -> None:
    """Guards: lists, quotes, numbers or gaps lost where the stream goes on in the middle of them. The oracle
    is one pass of markdown-it over the whole document.
    """
    stream = MarkdownStream(highlight=False)
    got = [block for row in source.splitlines(keepends=True) for block in stream.feed(row)]
    got += stream.finish()
    lines = source.removesuffix("\n").split("\n") if source else []
    leaves = read_leaves(lines, Context())
    composer = Composer(highlight=False)
    gaps = _gaps(leaves, lines, None)
    assert got == [b for leaf, gap in zip(leaves, gaps, strict=True) for b in composer.blocks(leaf, gap=gap)]


@settings(max_examples=200, deadline=None)
@given(document)
@example("[a b](c 'd e')\n\n![f](g)\n\n[h]: i\n\n<j@k.de> <http://l>\n```m n\no\n```\n```unknown\n```")
@example("| a |\n|--|\n| b | c | d |\n||||x|\n")
@example("> " * 90 + "deep\n" + "- " * 90 + "deeper")
def test_no_word_is_lost(source: str) -> None:
    """Guards: text that a parser takes for its own: definitions, titles, HTML, cells that are too many, what
    is nested too deep. Only the name of a language that is highlighted is not shown.
    """
    source = source.replace("```python", "```nonsense")
    words = re.findall(r"\w+", source)
    shown = re.findall(r"\w+", plain(render_markdown(source, 10_000, colour=True)))
    # A number of a list is counted, not copied.
    assert [w for w in shown if not w.isdecimal()] == [w for w in words if not w.isdecimal()]


@settings(max_examples=200, deadline=None)
@given(st.text() | document, st.integers(1, 60), st.integers(1, 6))
def test_open_part_fits(source: str, width: int, height: int) -> None:
    """Guards: a live part that is wider or higher than its place, and leaves its lines in the scrollback."""
    stream = MarkdownStream()
    stream.feed(source)
    rows = plain(render_open(stream.open, width, height, colour=True)).split("\n")
    assert len(rows) <= height
    assert all(cell_len(row) <= max(width, 2) for row in rows)


@pytest.mark.parametrize(
    ("source", "final"),
    [
        ("one", []),
        ("one\n", []),
        ("one\n\n", ["one"]),
        ("# head\n", ["head"]),
        ("one\n# head\n", ["one", "head"]),
        ("- a\n- b\n", ["a"]),
        ("- a\n- b\n  - c\n  - d\n", ["a", "b", "c"]),
        ("```python\nx = 1\ny", ["x = 1"]),
        ("1. do\n   ```\n   a\n\n   b\n", ["do", "a", "", "b"]),
        ("> one\n>\n> two\n", ["one"]),
        ("one\n---\n", ["one"]),
        ("one\n-", []),
    ],
)
def test_what_is_final_when(source: str, final: list[str]) -> None:
    """Guards: blocks held back that nothing can change, or given away that the next line changes."""
    assert texts(source) == final


def test_tables_are_final_as_a_whole() -> None:
    """Guards: the head printed as a paragraph before the line below shows that it is a table."""
    table = "| a | b |\n|---|--:|\n| 1 | 2 |\n"
    assert final_after(table) == []
    (block,) = final_after(f"{table}\n")
    assert block.kind is Kind.TABLE
    assert block.rows == (("a", "b"), ("1", "2"))
    assert block.aligned == ("", "right")


def test_numbers_are_counted_on() -> None:
    """Guards: a list that starts at 1 again behind code, or wherever the stream went on in it."""
    source = "7. a\n7. b\n   ```\n   code\n   ```\n7. c\n   1. x\n   1. y\n\n   more\n7. d\n"
    shown = plain(render_markdown(source, 40, colour=False)).split()
    assert [word for word in shown if word.endswith(".")] == ["7.", "8.", "9.", "1.", "2.", "10."]


@pytest.mark.parametrize("margin", ["", "  ", "> ", "- ", "1. > "])
@pytest.mark.parametrize("language", ["python", "", "html", "nonsense"])
def test_code_can_be_copied(margin: str, language: str) -> None:
    """Guards: margins, boxes, padding, wrapped or trimmed lines around code. The oracle is markdown-it."""
    code = [
        "def f():",
        "",
        "\treturn '" + "x" * 100 + "'   ",
        "    # 中文 <b>&amp;</b> **x** [red]",
        "",
        "/* a",
        "*/",
    ]
    hang = re.sub(r"[-1.]", " ", margin)
    source = "\n".join([f"{margin}```{language}", *(hang + row for row in code), f"{hang}```"])
    (token,) = [t for t in MarkdownIt().parse(source) if t.type == "fence"]
    blocks = [b for b in [*final_after(f"{source}\n")] if b.kind is Kind.CODE]
    shown = plain("".join(render_ansi(block, 20, colour=True) for block in blocks))
    shown = shown.removeprefix("nonsense\n")
    assert token.content.split("\n") == shown.lstrip("\n").split("\n")
    assert "".join(f"{block.source}\n" for block in blocks).removeprefix("\n").endswith(token.content)


@pytest.mark.parametrize(
    "source",
    [
        "```python\n" + "x = 1\n" * 600,
        "- item\n" * 600,
        "1. item\n" + "   - inner\n\n" * 300,
        "word word\n" * 600,
        "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 600,
        "> quote\n" * 600,
        "    code\n\n" * 300,
        "\n" * 3000,
        "-\n\n" * 300,
    ],
)
def test_cost_is_linear(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a long block read from its beginning with every line, which takes the square of its length."""
    n_read = 0

    def counting(text: str) -> Parsed:
        nonlocal n_read
        n_read += len(text)
        return parse_blocks(text)

    monkeypatch.setattr("dsmoe_local.chat.markdown.leaves.parse_blocks", counting)
    stream = MarkdownStream()
    for row in source.splitlines(keepends=True):
        stream.feed(row)
        if stream.open and len(row) > 1:
            before, n_read = n_read, 0
            stream.open.blocks(400)
            assert n_read < 2000
            n_read = before
    stream.finish()
    assert n_read < 20 * len(source) + 10_000


def test_returns_end_lines_and_a_stream_can_be_used_again() -> None:
    """Guards: the picture of a carriage return on every line; state of a reply left in the next."""
    stream = MarkdownStream()
    blocks = [*stream.feed("```\r\na\r\n```\r"), *stream.feed("\nb\r\n"), *stream.finish()]
    assert [block.source for block in blocks] == ["a", "b"]
    (block,) = [*stream.feed("c"), *stream.finish()]
    assert block == Block(Kind.TEXT, "c")
    assert not stream.open
