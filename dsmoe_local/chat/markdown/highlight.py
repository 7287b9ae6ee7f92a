"""Source code highlighted line by line, as it is written: the colours of a line depend on those before it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from functools import lru_cache
from typing import Any

from pygments.lexer import ExtendedRegexLexer, Lexer, LexerContext, RegexLexer
from pygments.lexers import get_lexer_by_name
from pygments.lexers.data import YamlLexer, YamlLexerContext
from pygments.token import Token
from pygments.util import ClassNotFound

from dsmoe_local.chat.markdown.blocks import Span, Spans

_LONGEST = 1000
"""Characters of a line; a longer one is data, and the lexers' expressions are not made for it."""

_COMMENTS = {"/*": "*/", "<!--": "-->", "{-": "-}", "(*": "*)"}
"""Comments of several lines, which most lexers read as a whole or not at all."""

_STYLES = {
    Token.Comment: "comment",
    Token.Comment.Preproc: "keyword",
    Token.Comment.PreprocFile: "string",
    Token.Keyword: "keyword",
    Token.Keyword.Constant: "number",
    Token.Keyword.Type: "type",
    Token.Operator.Word: "keyword",
    Token.Name.Builtin: "type",
    Token.Name.Class: "definition",
    Token.Name.Decorator: "type",
    Token.Name.Exception: "type",
    Token.Name.Function: "definition",
    Token.Name.Attribute: "type",
    Token.Name.Tag: "keyword",
    Token.Literal.String: "string",
    Token.Literal.Number: "number",
    Token.Generic.Deleted: "deleted",
    Token.Generic.Inserted: "string",
    Token.Generic.Heading: "definition",
    Token.Generic.Subheading: "type",
    Token.Generic.Prompt: "comment",
}


def knows_language(name: str) -> bool:
    """Whether `name` is a language that can be highlighted, or says that there is none."""
    return _lexer(name.lower()) is not None


class Highlighter:
    """Takes the lines of one block of code in order. An unknown language gives plain text."""

    def __init__(self, language: str) -> None:
        self._lexer: Any = _lexer(language.lower())
        self._context: Any = _context(self._lexer)
        self._before = "\n"
        self._closes = ""  # what ends the comment that a line before began

    def copy(self) -> Highlighter:
        """One that goes on from the same place."""
        other = Highlighter("")
        other._lexer, other._context = self._lexer, deepcopy(self._context)
        other._before, other._closes = self._before, self._closes
        return other

    def line(self, text: str) -> Spans:
        """The next line, without its newline."""
        if self._lexer is None or len(text) > _LONGEST:
            return (("", text),) if text else ()
        return tuple(_merged(self._styled(text)))

    def _styled(self, text: str) -> Iterator[Span]:
        if self._closes:
            end = text.find(self._closes)
            if end < 0:
                yield "comment", text
                return
            end += len(self._closes)
            yield "comment", text[:end]
            text, self._closes = text[end:], ""
        opening = self._opening(text)
        if opening is None:
            yield from self._lex(text)
            return
        yield from self._lex(text[:opening])
        yield "comment", text[opening:]

    def _opening(self, text: str) -> int | None:
        """Where in `text` a comment begins that it does not end; its end is noted."""
        for opens, closes in _COMMENTS.items():
            place = text.rfind(opens)
            if place < 0 or closes in text[place + len(opens) :]:
                continue
            *_, (style, last) = self.copy()._lex(f"{text}{closes}")
            if style == "comment" and last.startswith(opens):
                place = len(text) + len(closes) - len(last)
                self._closes = closes
                return place
        return None

    def _lex(self, text: str) -> list[Span]:
        """The styles of `text`, which is the rest of a line. It comes out whole, whatever the lexer does."""
        line, before = f"{text}\n", self._before
        self._before = line
        tokens: list[tuple[int, Any, str]] = []
        try:
            if self._context is None:
                tokens.extend(self._lexer.get_tokens_unprocessed(line))
            else:
                context = self._context
                context.text, context.pos, context.end = before + line, len(before), len(before + line)
                # Of the ways to run a lexer of regular expressions, this one keeps its state.
                with suppress(_EndOfLineError):
                    tokens.extend(ExtendedRegexLexer.get_tokens_unprocessed(self._lexer, context=context))
        except Exception:  # noqa: BLE001 - lexers of hundreds of languages, run in a way of our own
            self._context = None
            return [("", text)]
        spans = [(_style(kind), value) for _, kind, value in tokens if value]
        if "".join(value for _, value in spans) != line:
            return [("", text)]
        style, value = spans.pop()
        spans.append((style, value.removesuffix("\n")))
        return [span for span in spans if span[1]]


class _EndOfLineError(Exception):
    """The line is read."""


class _Line:
    """Ends the reading of a line before rules that match nothing are tried at its end: what they mean depends
    on the line that follows.
    """

    pos: int
    _end = 0

    @property
    def end(self) -> int:
        if self.pos >= self._end:
            raise _EndOfLineError
        return self._end

    @end.setter
    def end(self, end: int) -> None:
        self._end = end


class _Context(_Line, LexerContext):
    pass


class _YamlContext(_Line, YamlLexerContext):
    pass


def _context(lexer: Lexer | None) -> LexerContext | None:
    """What a lexer keeps from line to line; None for those that keep nothing."""
    if isinstance(lexer, YamlLexer):
        return _YamlContext("", 0)  # type: ignore[no-untyped-call]
    return _Context("", 0) if isinstance(lexer, RegexLexer) else None


def _merged(spans: Iterator[Span]) -> Iterator[Span]:
    style, text = "", ""
    for next_style, next_text in spans:
        if next_style != style and text.strip() and next_text.strip():
            yield style, text
            style, text = next_style, next_text
        else:
            style, text = style if text.strip() else next_style, text + next_text
    if text:
        yield style, text


@lru_cache(maxsize=64)
def _lexer(name: str) -> Lexer | None:
    if not re.fullmatch(r"[\w+#.-]{1,40}", name):
        return None
    try:
        return get_lexer_by_name(name)
    except ClassNotFound:
        return None


@lru_cache(maxsize=1024)
def _style(kind: Any) -> str:  # noqa: ANN401 - Pygments has no types
    while kind is not None:
        if kind in _STYLES:
            return _STYLES[kind]
        kind = kind.parent
    return ""
