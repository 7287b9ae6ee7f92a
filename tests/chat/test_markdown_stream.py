"""Markdown in pieces: what is final when, and that it is what the whole document would give."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import cell_len
from rich.text import Text

from dsmoe_local.chat.markdown.parser import parse_blocks
from dsmoe_local.chat.markdown.render import Renderer
from dsmoe_local.chat.markdown.stream import MarkdownStream, render_markdown

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
# markdown-it reads this as a table only if the item is the first of its list.
ITEM_AND_TABLE = re.compile(r"[-+*.)][ \t]+\S.*\|.*\n[ \t>]*\|-")
marks = st.lists(st.sampled_from(MARKS), max_size=3).map("".join)
line = st.builds(str.__add__, marks, st.sampled_from(TEXTS))
document = st.lists(line, max_size=14).map("\n".join)


def plain(ansi: str) -> str:
    return STYLES.sub("", ansi)


def streamed(source: str, cuts: list[int], width: int = 40) -> str:
    stream, out, start = MarkdownStream(colour=True), "", 0
    for end in [*sorted({cut % (len(source) + 1) for cut in cuts}), len(source)]:
        out += stream.feed(source[start:end], width)
        stream.lines(width, 5)
        start = end
    return out + stream.finish(width)


def finished(source: str) -> list[str]:
    return [line.plain for line in MarkdownStream(colour=True).read(source, 40)]


def drawn(source: str, width: int = 40) -> str:
    return render_markdown(source, width, colour=True).plain


@settings(max_examples=200)
@given(document, st.lists(st.integers(0, 2000), max_size=12))
def test_pieces_do_not_matter(source: str, cuts: list[int]) -> None:
    """Guards: lines, marks or colours that depend on where the stream was cut or looked at."""
    assert streamed(source, cuts) == streamed(source, [])


@settings(max_examples=200)
@given(document.filter(lambda source: not ITEM_AND_TABLE.search(source)))
@example("   1.\n   10. ```\n2. -   ```\n* b c")
@example("```\n\t```")
@example("  ```\n\tx\n \ty\n z")
@example("-     -\n    -   ***\n      * b c")
@example("- > \n\n    - * a")
@example("- a\n\n      code\n\n  b\n- c\n\n> q\nlazy\n\n>\n> r")
def test_reading_on_is_reading_all(source: str) -> None:
    """Guards: lists, quotes, numbers or gaps lost where the stream goes on in the middle of them. The oracle
    is one pass of markdown-it over the whole document.
    """
    source += "\n"
    stream = MarkdownStream(colour=False)
    got = [line.plain for row in source.splitlines(keepends=True) for line in stream.read(row, 40)]
    got += [line.plain for line in stream.read_rest(40)]
    tokens, lines = parse_blocks(source), source.split("\n")
    rendered = Renderer(colour=False).render(tokens, lines, 40, number=None, fold=False)
    assert got == [line.plain for line in rendered]


@settings(max_examples=200)
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
    shown = re.findall(r"\w+", drawn(source, 10_000))
    # A number of a list is counted, not copied.
    assert [w for w in shown if not w.isdecimal()] == [w for w in words if not w.isdecimal()]


@settings(max_examples=200)
@given(st.text() | document, st.integers(1, 60), st.integers(1, 6))
def test_open_part_fits(source: str, width: int, height: int) -> None:
    """Guards: a live part that is wider or higher than its place, and leaves its lines in the scrollback."""
    stream = MarkdownStream(colour=True)
    stream.feed(source, width)
    rows = [plain(row) for row in stream.lines(width, height)]
    assert len(rows) <= height
    assert all(cell_len(row) <= max(width, 2) for row in rows)


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("one", []),
        ("one\n", []),
        ("one\n\n", ["one"]),
        ("# head\n", ["head"]),
        ("one\n# head\n", ["one", "", "head"]),
        ("- a\n- b\n", ["• a"]),
        ("- a\n- b\n  - c\n  - d\n- e\n", ["• a", "• b", "  ◦ c", "  ◦ d"]),
        ("```python\nx = 1\ny", ["x = 1"]),
        ("```js\n/* a\n", []),
        ("```js\n/* a\n*/\n", ["/* a", "*/"]),
        ("> one\n\n", ["│ one"]),
        ("one\n---\n", ["one"]),
        ("one\n-", []),
        ("| a | b |\n|---|--:|\n| 1 | 2 |\n", []),
        ("| a | b |\n|---|--:|\n| 1 | 2 |\n\n", ["a  b", "────", "1  2"]),
    ],
)
def test_what_is_finished_when(source: str, lines: list[str]) -> None:
    """Guards: blocks held back that nothing can change, or given away that the next line changes."""
    assert finished(source) == lines


def test_numbers_are_counted_on() -> None:
    """Guards: a list that starts at 1 again behind code, or wherever the stream went on in it."""
    source = "7. a\n7. b\n   ```\n   code\n   ```\n7. c\n   1. x\n   1. y\n\n   more\n7. d\n"
    shown = drawn(source).split()
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
    assert f"\n{drawn(source, 20)}\n".endswith(f"\n{token.content}")


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

    def counting(text: str) -> list[Token]:
        nonlocal n_read
        n_read += len(text)
        return parse_blocks(text)

    monkeypatch.setattr("dsmoe_local.chat.markdown.stream.parse_blocks", counting)
    stream = MarkdownStream(colour=True)
    for row in source.splitlines(keepends=True):
        stream.feed(row, 40)
        before, n_read = n_read, 0
        stream.lines(40, 10)
        assert n_read < 2000
        n_read = before
    stream.finish(40)
    assert n_read < 20 * len(source) + 10_000


def test_the_cost_of_highlighting_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: all code above parsed again with each line."""
    n_read = 0

    def counting(lines: list[str], language: str) -> list[Text]:
        nonlocal n_read
        n_read += len(lines)
        return [Text(line) for line in lines]

    monkeypatch.setattr("dsmoe_local.chat.markdown.code.highlight", counting)
    stream = MarkdownStream(colour=True)
    for row in ["```python\n", *["x = 1\n"] * 2000]:
        stream.feed(row, 40)
    assert n_read < 50 * 2000


def test_returns_end_lines_and_a_stream_can_be_used_again() -> None:
    """Guards: the picture of a carriage return on every line; state of a reply left in the next."""
    stream = MarkdownStream(colour=False)
    out = stream.feed("```\r\na\r\n```\r", 40) + stream.feed("\nb\r\n", 40) + stream.finish(40)
    assert out == "a\n\nb\n"
    assert stream.feed("c", 40) + stream.finish(40) == "c\n"
    assert stream.lines(40, 10) == []


@pytest.mark.parametrize(
    ("before", "rest", "rendered"),
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
        ("7. a\n9. b\n9. c", "d\n", "8. b\n9. cd\n"),
        ("> q\n> r", "s\n> t\n", "│ q\n│ rs\n│ t\n"),
        ("So:\n\n```\nfor x in y:\n", "    total = x\n", "    total = x\n"),
        ("One sentence.\n\nAnother", "      sentence.\n\n    code\n", "sentence.\n\ncode\n"),
        ("One sentence.\n\nAnother sen", "tence.\n\nMore.\n", "tence.\n\nMore.\n"),
        ("```\ncode\n```\n\n", "Text.\n", "Text.\n"),
        ("", "Text.\n", "Text.\n"),
    ],
)
def test_a_reply_that_is_continued(before: str, rest: str, rendered: str) -> None:
    """Guards: the rest of code drawn as prose, without its indents and its stars; prose drawn twice."""
    for pieces in ([rest], list(rest)):
        stream = MarkdownStream(colour=False, after=before)
        assert plain("".join(stream.feed(piece, 60) for piece in pieces) + stream.finish(60)) == rendered


def test_the_open_part_of_a_continued_reply() -> None:
    """Guards: code that is prose until it is finished."""
    stream = MarkdownStream(colour=False, after="```python\nx = 1\nif x *")
    stream.feed(" y * z:", 60)
    assert [plain(line) for line in stream.lines(60, 5)] == ["if x * y * z:"]
