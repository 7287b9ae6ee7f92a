"""Markdown as it looks: widths, wrapping, tables, colours, hostile text, syntax highlighting."""

from __future__ import annotations

import cProfile
import pstats
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pygments import lex
from pygments.lexers import get_lexer_by_name
from rich.text import Text
from wcwidth import wcswidth

from dsmoe_local.chat.markdown.code import _syntax_style, highlight
from dsmoe_local.chat.markdown.parser import parse_inline
from dsmoe_local.chat.markdown.stream import MarkdownStream, render_markdown
from dsmoe_local.chat.markdown.text import inline_text, to_ansi, wrap

STYLES = re.compile(r"\x1b\[([0-9;]*)m")


def drawn(source: str, width: int = 40) -> str:
    text = render_markdown(source, width, colour=True).plain
    return f"{text}\n" if text else ""


def live(source: str, width: int = 40, height: int = 10) -> str:
    stream = MarkdownStream(colour=True)
    stream.feed(source, width)
    return STYLES.sub("", "\n".join(stream.lines(width, height)))


def codes_of(ansi: str) -> set[str]:
    return {code for match in STYLES.findall(ansi) for code in match.split(";")}


PAGE = """\
# 标题 Title

A paragraph with **bold**, *italics*, `code`, ~~gone~~ and a [link](https://e.org/a), <https://e.org>.
**注意：**请看“引号”里的内容，不要把整段移到下一行。

1. First
2. Second:
   ```python
   def f():
       return 1
   ```
   - nested
     - deeper
> Quote that is long enough to be wrapped here
>
> - in it

| Name | 值 | Note |
|:-----|---:|:----:|
| alpha | 12 | a **b** |
| 中文 | 3 | 😀 |
***
<b>\\(a_1*b*c\\)</b> &amp;
"""

DRAWN = """\
标题 Title

A paragraph with bold, italics, code,
gone and a link (https://e.org/a),
https://e.org.
注意：请看“引号”里的内容，不要把整段移到
下一行。

1. First
2. Second:

def f():
    return 1

   • nested
     ◦ deeper
│ Quote that is long enough to be
│ wrapped here
│
│ • in it

Name   值  Note
───────────────
alpha  12  a b
中文    3   😀

────────────────────────────────────────

<b>\\(a_1*b*c\\)</b> &amp;
"""


def test_page() -> None:
    """Guards: anything that changes how a reply looks without somebody having looked at it."""
    assert drawn(PAGE) == DRAWN
    stream = MarkdownStream(colour=True)
    assert STYLES.sub("", stream.feed(PAGE, 40) + stream.finish(40)) == DRAWN


def test_colours_are_left_out() -> None:
    """Guards: colours under NO_COLOR; colours that vanish on a dark or a light terminal; backgrounds."""
    page = PAGE + "```diff\n- a\n+ b\n```\n```c\n/* x */ int f(void) { return 'a'; } // 1\n```\n"
    attributes = {"0", "1", "2", "3", "4", "9", ""}
    plain, coloured = (
        codes_of(to_ansi(render_markdown(page, 40, colour=colour), colour=colour)) for colour in (False, True)
    )
    assert plain <= attributes
    assert {"32", "35", "36"} <= coloured <= attributes | {"31", "32", "35", "36"}


HOSTILE = ["\x1b[2J", "\x1b]0;x\x07", "\x9b31m", "\u202e", "\x00", "\x7f", "\u2067", "\x08"]
AROUND = ["{}", "`{}`", "# {}", "- {}", "> {}", "    {}", "[{}]({} '{}')", "<x:{}>", "![{}]({})"]
AROUND += ["```{}\n{}\n```", "|{}|\n|-|\n|{}|"]


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("around", AROUND)
def test_nothing_foreign_reaches_the_terminal(hostile: str, around: str) -> None:
    """Guards: escape codes and bidi controls of a reply obeyed by the terminal, wherever in the Markdown."""
    for text in (hostile, f"&#{ord(hostile[0])};", f"\\{hostile}", f"&#x{ord(hostile[0]):x};"):
        source = around.replace("{}", text)
        for shown in (drawn(source), live(source)):
            assert not set(hostile[0]) & set(shown)
            assert all(character.isprintable() or character in "\n\t\u200d" for character in shown)


def test_markup_of_rich_is_text() -> None:
    """Guards: text in square brackets swallowed or obeyed."""
    assert drawn("[red]x[/red] [link=file:///]y[/]") == "[red]x[/red] [link=file:///]y[/]\n"


CHARACTERS = [*"ab, .-中文。，（）“”한글", "e\u0301", "👍🏽", "👩‍💻", "❤️", "😀"]


some_text = st.lists(st.sampled_from(CHARACTERS), max_size=30).map("".join)


@settings(max_examples=300)
@given(some_text, some_text, st.integers(4, 30))
def test_wrapping_keeps_text_and_width(text: str, strong: str, width: int) -> None:
    """Guards: characters lost at the ends of lines, lines too wide, characters torn apart."""
    lines = [line.plain for line in wrap(Text.assemble(text, (strong, "bold")), width, fold=True)]
    text += strong
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(wcswidth(line) <= width for line in lines)
    assert not any(line.startswith(("\u0301", "\u200d", "🏽")) for line in lines[1:])


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("看这里，好吗？", 6, ["看这", "里，好", "吗？"]),
        ("他说（你好）了", 6, ["他说", "（你", "好）了"]),
        ("use 模型 now", 8, ["use 模型", "now"]),
        ("한국어 문장", 8, ["한국어", "문장"]),
        ("https://example.com/long x", 10, ["https://example.com/long", "x"]),
        ("a  b", 10, ["a  b"]),
        ("one two", 3, ["one", "two"]),
    ],
)
def test_where_lines_end(text: str, width: int, lines: list[str]) -> None:
    """Guards: Chinese punctuation at the wrong end of a line, Korean words torn, addresses that cannot be
    copied.
    """
    assert [line.plain for line in wrap(Text(text), width, fold=False)] == lines


def test_lines_of_the_source_stay_unless_broken_to_fit() -> None:
    """Guards: verses and addresses run together; text broken at 80 columns broken again at 60."""
    verse = "Roses are red\nviolets are blue\n"
    assert drawn(verse) == verse
    sentence = "word " * 12 + "that was broken here\n" + "and goes on"
    assert drawn(sentence, 100) == sentence.replace("\n", " ") + "\n"
    rows = "**One:** " + "word " * 12 + "end.\n**Two:** more\n"
    assert drawn(rows, 100) == rows.replace("*", "")
    assert drawn("word " * 12 + "end  \nnext", 100) == "word " * 12 + "end\nnext\n"


TABLE = "| 名称 Name | Value | A longer column of text |\n|---|--:|:-:|\n"
TABLE += "| 中文 | 1 | some words that need room |\n| `code` **b** | 12345 | 😀<br>two |\n"


@pytest.mark.parametrize("width", [12, 20, 30, 40, 60, 100])
def test_tables_fit(width: int) -> None:
    """Guards: rows that wrap in the terminal and columns that do not line up, with wide characters."""
    rows = drawn(TABLE, width).splitlines()
    assert all(wcswidth(row) <= width for row in rows)
    text = "".join(rows)
    for word in ("名称", "Name", "Value", "中文", "12345", "code", "b", "😀", "two"):
        assert word in text or width < 30
    if width == 100:
        # As a column of numbers at the right and a centred one.
        assert rows[0] == "名称 Name  Value   A longer column of text"
        assert rows[2] == "中文           1  some words that need room"


def test_tables_without_room_become_lists() -> None:
    """Guards: columns of one letter each in a narrow window."""
    table = "|a1|b1|c1|d1|e1|\n|-|-|-|-|-|\n|alpha|beta gamma|delta|epsilon|eta|\n|1|2|3|4|5|\n"
    rows = drawn(table, 20).splitlines()
    assert rows[:2] == ["a1: alpha", "b1: beta gamma"]
    assert rows[5] == "─" * 20
    assert rows[-1] == "e1: 5"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("a **bo", "a bo"),
        ("a `co", "a co"),
        ("a **", "a"),
        ("*", ""),
        ("-", ""),
        ("- a\n- b", "• a\n• b"),
        ("> a", "│ a"),
        ("one\n\ntwo", "\ntwo"),
        ("| a | b |\n|---|---|\n| 1", "a  b\n────\n1"),
        ("```py\ndef f():\n    ret", "    ret"),
        ("```py\ndef", "def"),
        ("```\nx\n``", ""),
        ("text\n=", "text"),
        ("1. a\n\n   b", "1. a\n\n   b"),
        ("", ""),
    ],
)
def test_open_part(source: str, shown: str) -> None:
    """Guards: marks that flash up before they are complete; a margin missing or a line shown twice."""
    assert live(source) == shown


def test_open_part_of_a_long_block_is_its_end() -> None:
    """Guards: the beginning of a long paragraph or table shown where its end should be."""
    assert live("word\n" * 500 + "last", height=3) == "word\nword\nlast"
    assert live("很长" * 5000 + "完", height=2).endswith("完")
    rows = live("| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 500 + "| x | y |", height=4).split("\n")
    assert rows == ["1  2", "1  2", "1  2", "x  y"]
    assert live("- " + "word " * 3000 + "end", height=2).split()[-1] == "end"


LANGUAGES = {
    "python": Path(__file__).read_text(encoding="utf-8"),
    "c": '#include <stdio.h>\n/* a\n * b */\nint main(void) {\n  printf("%d\\n", 1); // x\n  return 0;\n}\n',
    "java": '/**\n * Doc\n */\npublic class A { String s = "/*"; }\n',
    "js": "/* a\n b */\nconst s = `one\n${two}\nthree`;\nfunction f() { return /x/; }\n",
    "yaml": "a: 1\nb:\n  - text: |\n      one\n      two\n  - c: 'd'\n# end\n",
    "html": "<!-- a\n b -->\n<p class='x'>text</p>\n",
    "json": '{"a": [1, true,\n null], "b": "c"}\n',
    "rust": 'fn main() {\n    /* a\n b */\n    let x: u32 = 1;\n    println!("{}", x);\n}\n',
    "go": 'package main\n\n/* a\nb */\nfunc main() { x := "y" }\n',
    "diff": "--- a\n+++ b\n@@ -1 +1 @@\n-a\n+b\n",
    "css": "/* a\n b */\np { color: red; }\n",
    "toml": "[a]\nb = 1 # c\n",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_highlighting_by_line_is_that_of_the_whole(language: str) -> None:
    """Guards: strings and comments of several lines that end with their first. Pygments is the oracle."""
    code = LANGUAGES[language]
    expected = Text()
    expected.append_tokens(
        (text, _syntax_style(kind)) for kind, text in lex(code, get_lexer_by_name(language, stripnl=False))
    )
    stream, got = MarkdownStream(colour=True), []
    for line in f"~~~~~~{language}\n{code}~~~~~~\n".splitlines(keepends=True):
        got += stream.read(line, 80)
    assert [to_ansi(line, colour=True) for line in got] == [
        to_ansi(line, colour=True) for line in expected.split("\n")
    ]


OTHERS = ["php", "ruby", "bash", "console", "erb", "html+jinja", "markdown", "lua", "perl", "sql", "haskell"]
OTHERS += ["tex", "unknown", "../x", "[red]"]


@settings(max_examples=40)
@pytest.mark.parametrize("language", OTHERS)
@given(st.lists(st.text(st.sampled_from("ab '\"`/*<!->{}()[]%$#\\=|:;?1_\t"), max_size=30), max_size=6))
def test_highlighting_changes_no_character(language: str, lines: list[str]) -> None:
    """Guards: characters that a lexer drops, or an error of one that ends the chat."""
    assert [line.plain for line in highlight(lines, language)] == lines


def test_blank_lines_of_nested_code_stay() -> None:
    """Guards: two blank lines of code in a list that become one."""
    assert drawn("- x\n  ```\n  a\n\n\n  b\n  ```\n") == "• x\n\na\n\n\nb\n"


def test_long_lines_of_code_are_not_parsed() -> None:
    """Guards: minutes spent on a line of data, and colours lost below it."""
    data, code = highlight(["'" * 2000, "return 1"], "python")
    assert not data.spans
    assert code.spans


def _work(source: str) -> int:
    profile = cProfile.Profile()
    profile.runcall(parse_inline, source)
    return pstats.Stats(profile).total_calls  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("brackets", ["[", "![", "[a", "[ "])
def test_work_grows_with_the_number_of_brackets(brackets: str) -> None:
    """Guards: seconds without a key, since the end of each bracket is looked for: the square of them."""
    parse_inline("warm [up](there)"), parse_inline("[" * 50)
    assert _work(brackets * 2000) < 5 * _work(brackets * 500)
    assert _work(brackets * 2000 + "]" * 2000) < 5 * _work(brackets * 500 + "]" * 500)
    assert inline_text(brackets * 2000).plain == brackets * 2000


def test_links_stay() -> None:
    """Guards: links lost among many brackets that are closed."""
    assert "text (address)" in inline_text("[1] " * 100 + "[text](address)" + "[" * 15).plain
