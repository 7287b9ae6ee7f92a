"""Parses GBNF, llama.cpp's notation for grammars."""

from __future__ import annotations

import re

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.grammar.nodes import (
    MAX_CHARACTER,
    NOTHING,
    Choice,
    Grammar,
    Node,
    Repeat,
    Rule,
    Sequence,
    Text,
    characters,
)

MAX_NESTING = 50
MAX_REPETITION = 10_000
MAX_OPERATORS = 2  # consecutive repetition operators
_SURROGATE = re.compile("[\ud800-\udfff]")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_NUMBER = re.compile(r"[0-9]{1,9}")
_BLANK = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_BLANK_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_ESCAPES = {
    "t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-", "/": "/",
}  # fmt: skip
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_REPETITIONS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


def parse_gbnf(text: str) -> Grammar:
    """Parse a grammar. Raises UsageError; for a syntax error, `where` is the line and column."""
    if _SURROGATE.search(text):
        raise UsageError(
            "the grammar contains a lone surrogate, which is not a character", remedy="remove it"
        )
    parser = _Parser(text)
    rules = parser.rules()
    if "root" not in rules:
        raise UsageError("the grammar has no rule named root", remedy="add one: root ::= ...")
    return Grammar(rules)


class _Parser:
    """A recursive-descent parser. `_at` is the index of the next character."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def rules(self) -> dict[str, Node]:
        """Parse all rules."""
        rules: dict[str, Node] = {}
        self._skip(_BLANK_LINES)
        while self._at < len(self._text):
            name = self._match(_NAME, "the name of a rule")
            if name in rules:
                raise self._error(f"rule {name} is defined twice")
            self._skip(_BLANK)
            self._expect("::=")
            self._skip(_BLANK_LINES)
            rules[name] = self._alternatives(0)
            if self._at < len(self._text) and self._next() not in "\r\n":
                raise self._error("expected the end of the line")
            self._skip(_BLANK_LINES)
        return rules

    def _alternatives(self, depth: int) -> Node:
        if depth > MAX_NESTING:
            raise self._error(f"groups are nested deeper than {MAX_NESTING}")
        items = [self._sequence(depth)]
        while self._next() == "|":
            self._at += 1
            self._skip(_BLANK_LINES)
            items.append(self._sequence(depth))
        return items[0] if len(items) == 1 else Choice(tuple(items))

    def _sequence(self, depth: int) -> Node:
        items: list[Node] = []
        # Line breaks are permitted anywhere in a group.
        blank = _BLANK_LINES if depth else _BLANK
        while (item := self._item(depth)) is not None:
            self._skip(blank)
            n_operators = 0
            while (times := self._repetition(blank)) is not None:
                item = Repeat(item, *times)
                self._skip(blank)
                n_operators += 1
                if n_operators > MAX_OPERATORS:
                    raise self._error(
                        f"more than {MAX_OPERATORS} repetition operators in a row", remedy="use one"
                    )
            items.append(item)
        return Sequence(tuple(items)) if items else NOTHING

    def _item(self, depth: int) -> Node | None:
        start = self._next()
        if start == '"':
            return self._literal()
        if start == "[":
            return self._set()
        if start == "(":
            self._at += 1
            self._skip(_BLANK_LINES)
            group = self._alternatives(depth + 1)
            self._expect(")")
            return group
        if start == ".":
            self._at += 1
            return characters([(0, MAX_CHARACTER)])
        if start and start in "<!":
            raise self._error("tokens (<...>) are not supported", remedy='write their text: "..."')
        if start and start in "*+?{":
            raise self._error(f"there is nothing to repeat before {start}")
        if _NAME.match(self._text, self._at):
            return Rule(self._match(_NAME, "a name"))
        return None

    def _literal(self) -> Node:
        self._at += 1
        text = ""
        while self._next() != '"':
            text += self._character()
            if _SURROGATE.match(text[-1]):
                raise self._error("a surrogate code point is not a character")
        self._at += 1
        return Text(text)

    def _set(self) -> Node:
        self._at += 1
        negated = self._next() == "^"
        self._at += negated
        ranges: list[tuple[int, int]] = []
        while self._next() != "]":
            low = high = self._character()
            if self._next() == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                high = self._character()
                if high < low:
                    raise self._error("a range of characters must be ascending")
            ranges.append((ord(low), ord(high)))
        self._at += 1
        return characters(ranges, negated=negated)

    def _character(self) -> str:
        char = self._next()
        if not char:
            raise self._error("the grammar ends inside a literal or a character class")
        self._at += 1
        if char != "\\":
            return char
        escape = self._next()
        self._at += 1
        if escape in _ESCAPES:
            return _ESCAPES[escape]
        if escape not in _HEX_DIGITS:
            raise self._error(f"\\{escape} is not a known escape sequence")
        digits = self._text[self._at : self._at + _HEX_DIGITS[escape]]
        written = re.fullmatch(f"[0-9A-Fa-f]{{{_HEX_DIGITS[escape]}}}", digits)
        if not written or int(digits, 16) > MAX_CHARACTER:
            raise self._error(f"\\{escape} requires {_HEX_DIGITS[escape]} hexadecimal digits of a code point")
        self._at += len(digits)
        return chr(int(digits, 16))

    def _repetition(self, blank: re.Pattern[str]) -> tuple[int, int | None] | None:
        sign = self._next()
        if sign in _REPETITIONS:
            self._at += 1
            return _REPETITIONS[sign]
        if sign != "{":
            return None
        self._at += 1
        self._skip(blank)
        low = int(self._match(_NUMBER, "a number"))
        high: int | None = low
        self._skip(blank)
        if self._next() == ",":
            self._at += 1
            self._skip(blank)
            high = None if self._next() == "}" else int(self._match(_NUMBER, "a number"))
            self._skip(blank)
        self._expect("}")
        if max(low, high or 0) > MAX_REPETITION:
            raise self._error(f"an item is repeated more than {MAX_REPETITION:,} times")
        if high is not None and high < low:
            raise self._error(f"{{{low},{high}}}: the maximum is less than the minimum")
        return low, high

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip(self, pattern: re.Pattern[str]) -> None:
        found = pattern.match(self._text, self._at)
        self._at = found.end() if found else self._at

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self._text, self._at)
        if not found:
            raise self._error(f"expected {what}")
        self._at = found.end()
        return found.group()

    def _expect(self, text: str) -> None:
        if not self._text.startswith(text, self._at):
            raise self._error(f"expected {text}")
        self._at += len(text)

    def _error(self, what: str, remedy: str = "") -> UsageError:
        line = self._text.count("\n", 0, self._at) + 1
        column = self._at - (self._text.rfind("\n", 0, self._at) + 1) + 1
        return UsageError(
            f"the grammar cannot be read: {what}", where=f"line {line}, column {column}", remedy=remedy
        )
