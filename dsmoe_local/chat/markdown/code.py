"""Source code: syntax highlighting, and fenced code blocks that are still being written."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Token
from pygments.util import ClassNotFound
from rich.style import Style
from rich.text import Text

# No backgrounds, and none of white, black, yellow and blue: readable on light and dark terminals alike.
COMMENT = Style(dim=True, italic=True)
_KEYWORD, _TYPE, _STRING = Style(color="magenta"), Style(color="cyan"), Style(color="green")
_BOLD = Style(bold=True)
_STYLES = {
    Token: Style.null(),
    Token.Comment: COMMENT,
    Token.Comment.Preproc: _KEYWORD,
    Token.Comment.PreprocFile: _STRING,
    Token.Keyword: _KEYWORD,
    Token.Keyword.Constant: _TYPE,
    Token.Keyword.Type: _TYPE,
    Token.Operator.Word: _KEYWORD,
    Token.Name.Builtin: _TYPE,
    Token.Name.Class: _BOLD,
    Token.Name.Decorator: _TYPE,
    Token.Name.Exception: _TYPE,
    Token.Name.Function: _BOLD,
    Token.Name.Attribute: _TYPE,
    Token.Name.Tag: _KEYWORD,
    Token.Literal.String: _STRING,
    Token.Literal.Number: _TYPE,
    Token.Generic.Deleted: Style(color="red"),
    Token.Generic.Inserted: _STRING,
    Token.Generic.Heading: _BOLD,
    Token.Generic.Subheading: _TYPE,
    Token.Generic.Prompt: COMMENT,
}

_LONGEST_LINE = 1000  # characters; the lexers' expressions are slow on longer lines
_CONTEXT_LINES = 400  # of code above, which are parsed again to highlight the next line
_MOST_WAITING = 12  # complete lines of code that wait to be highlighted together
_LONGEST_COMMENT = 24  # lines that wait for the end of a comment
_TAB_STOP = 4  # columns, as CommonMark defines
_COMMENTS = (("/*", "*/"), ("<!--", "-->"), ("{-", "-}"), ("(*", "*)"))


def language_of(info: str) -> str:
    """Return the language of a code block with this info string."""
    return (info.split() or [""])[0]


def code_header(info: str) -> list[Text]:
    """Return the line above a code block that shows its info string, unless the highlighting shows it."""
    info = info.strip()
    return [Text(info, COMMENT)] if info and not knows_language(info) else []


def knows_language(name: str) -> bool:
    """Return whether code in the language `name` is highlighted, or needs no highlighting."""
    return _lexer(name.lower()) is not None


def highlight(lines: list[str], language: str) -> list[Text]:
    """Return lines of code, highlighted if the language is known, with exactly the same characters."""
    lexer = _lexer(language.lower())
    if lexer is None or not lines:
        return [Text(line) for line in lines]
    long = [number for number, line in enumerate(lines, 1) if len(line) > _LONGEST_LINE]
    if long:
        first, rest = lines[: long[-1]], lines[long[-1] :]
        return [*(Text(line) for line in first), *highlight(rest, language)]
    code, text = "".join(f"{line}\n" for line in lines), Text()
    try:
        text.append_tokens((value, _syntax_style(kind)) for kind, value in lexer.get_tokens(code))
    except Exception:  # noqa: BLE001 - a bug in one of hundreds of lexers is no reason to end the chat
        text = Text()
    if text.plain != code:
        return [Text(line) for line in lines]
    return list(text.split("\n"))


@lru_cache(maxsize=64)
def _lexer(name: str) -> Lexer | None:
    if not re.fullmatch(r"[\w+#.-]{1,40}", name):
        return None
    try:
        return get_lexer_by_name(name, stripnl=False)
    except ClassNotFound:
        return None


@lru_cache(maxsize=1024)
def _syntax_style(kind: Any) -> Style:  # noqa: ANN401 - Pygments has no types
    style = _STYLES.get(kind)
    return _syntax_style(kind.parent) if style is None else style


@dataclass(slots=True)
class OpenCodeBlock:
    """A fenced code block that is not closed. `n_done` of its lines are finished."""

    marker: str
    indent: int  # of the opening line
    language: str  # empty: not highlighted
    lines: list[str] = field(default_factory=list)
    preview: list[Text] = field(default_factory=list)  # the lines that are not finished
    n_done: int = 0

    def closed_by(self, line: str) -> bool:
        """Return whether this line ends the block."""
        mark = line.strip(" \t")
        expanded = line.expandtabs(_TAB_STOP)
        indent = len(expanded) - len(expanded.lstrip(" "))
        return indent < 4 and len(mark) >= len(self.marker) and set(mark) == {self.marker[0]}

    def add(self, line: str) -> None:
        """Add a line of source."""
        self.lines.append(_without_margin(line, self.indent))
        self.preview += highlight(self.lines[-1:], self.language)

    def take(self, *, final: bool = False) -> list[Text]:
        """Return the lines that are finished now.

        A line may wait for the end of its comment, without which many lexers do not recognize it, or for
        more lines, since each call parses the code above again.
        """
        start, end = self.n_done, len(self.lines)
        if self.language and not final:
            if end - start <= min(start // 8, _MOST_WAITING):
                return []
            if end - start <= _LONGEST_COMMENT:
                end = self._comment_start()
        if end == start:
            return []
        self.n_done = end
        del self.preview[: end - start]
        first = max(0, start - _CONTEXT_LINES)
        return highlight(self.lines[first:end], self.language)[start - first :]

    def open_lines(self, rest: list[str]) -> list[Text]:
        """Return the lines that are not finished, each highlighted without those above."""
        return [*self.preview, *highlight(rest, self.language)]

    def _comment_start(self) -> int:
        """Return the line in which an open comment begins, or the number of lines."""
        text = "\n".join(self.lines[self.n_done :])
        starts = [text.rfind(opens) for opens, closes in _COMMENTS if text.rfind(opens) > text.rfind(closes)]
        return self.n_done + text.count("\n", 0, min(starts)) if starts else len(self.lines)


def _without_margin(line: str, n_columns: int) -> str:
    """Return `line` without up to `n_columns` columns of white space. The rest of a tab becomes spaces."""
    column = n_removed = 0
    while column < n_columns and line[n_removed : n_removed + 1] in (" ", "\t"):
        column += _TAB_STOP - column % _TAB_STOP if line[n_removed] == "\t" else 1
        n_removed += 1
    return " " * max(0, column - n_columns) + line[n_removed:]
