"""Regular expressions of JSON schemas as nodes, for the inside of a JSON string.

The part that Python's `re` and ECMAScript agree on; what goes beyond it is refused.
"""

from __future__ import annotations

import re

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.grammar.json_values import CHARACTER, written_characters
from dsmoe_local.engine.grammar.nodes import (
    MAX_CHARACTER,
    NOTHING,
    Characters,
    Node,
    Repeat,
    characters,
    choice,
    intersect,
    sequence,
)

MAX_NESTING = 50
MAX_REPETITION = 5_000
_ASCII = characters([(0, 0x7F)])
_DIGITS = characters([(ord("0"), ord("9"))])
_WORD = characters([(ord("0"), ord("9")), (ord("a"), ord("z")), (ord("A"), ord("Z")), (ord("_"), ord("_"))])
_BLANK = characters([(ord(char), ord(char)) for char in " \t\n\r\f"])
_BLANK_ANYWHERE = characters([(9, 13), (28, 32)])


def _ascii_other_than(some: Characters) -> Characters:
    # Beyond ASCII, what is a digit or a letter differs between readers.
    return intersect(_ASCII, characters(some.ranges, negated=True))


_CLASSES = {
    "d": _DIGITS,
    "w": _WORD,
    "s": _BLANK,
    "D": _ascii_other_than(_DIGITS),
    "W": _ascii_other_than(_WORD),
    "S": _ascii_other_than(_BLANK_ANYWHERE),
}
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
_HEX_DIGITS = {"x": 2, "u": 4}
_SIGNS = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_COUNTS = re.compile(r"\{([0-9]{1,5})(,([0-9]{1,5})?)?\}")
_DOT = characters([(ord(char), ord(char)) for char in "\n\r\u2028\u2029"], negated=True)


def pattern_content(pattern: str) -> Node:
    """The strings in which the pattern is found, as a JSON string's content. UsageError: not supported."""
    return _Parser(pattern).whole()


class _Parser:
    """Recursive descent; `_at` is the next character's index."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def whole(self) -> Node:
        """The whole pattern. Each of its outermost alternatives has its own anchors."""
        ways = [self._anchored()]
        while self._next() == "|":
            self._at += 1
            ways.append(self._anchored())
        if self._at < len(self._pattern):
            raise self._error(f"{self._next()} is out of place")
        return choice(*ways)

    def _anchored(self) -> Node:
        anything = Repeat(CHARACTER, 0, None)
        before: Node = anything
        if self._next() == "^":
            self._at += 1
            before = NOTHING
        inner = self._sequence(0)
        after: Node = anything
        if self._next() == "$":
            self._at += 1
            after = NOTHING
        return sequence(before, inner, after)

    def _alternatives(self, depth: int) -> Node:
        if depth > MAX_NESTING:
            raise self._error("groups are nested too deep")
        ways = [self._sequence(depth)]
        while self._next() == "|":
            self._at += 1
            ways.append(self._sequence(depth))
        return choice(*ways)

    def _sequence(self, depth: int) -> Node:
        items: list[Node] = []
        while (char := self._next()) and char not in "|)$":
            items.append(self._repeated(self._item(depth)))
        return sequence(*items) if items else NOTHING

    def _item(self, depth: int) -> Node:
        char = self._next()
        self._at += 1
        if char == "(":
            if self._next() == "?":
                if self._pattern[self._at + 1 : self._at + 2] != ":":
                    raise self._error("only groups (…) and (?:…) are supported")
                self._at += 2
            group = self._alternatives(depth + 1)
            if self._next() != ")":
                raise self._error("a group is not closed, or holds an anchor")
            self._at += 1
            return group
        if char == "[":
            return written_characters(self._set())
        if char == ".":
            return written_characters(_DOT)
        if char == "\\":
            return written_characters(self._escape())
        if char in "*+?^{":
            raise self._error(f"{char} is out of place")
        return written_characters(_one(char))

    def _repeated(self, item: Node) -> Node:
        sign = self._next()
        counts = _COUNTS.match(self._pattern, self._at)
        if sign in _SIGNS:
            self._at += 1
            low, high = _SIGNS[sign]
        elif counts:
            self._at = counts.end()
            low = int(counts[1])
            high = low if counts[2] is None else int(counts[3]) if counts[3] else None
        else:
            return item
        if max(low, high or 0) > MAX_REPETITION or (high is not None and high < low):
            raise self._error(f"repetitions go up to {MAX_REPETITION}, ascending")
        if self._next() == "?":
            self._at += 1  # which of the strings is found first makes no difference here
        if self._next() and self._next() in "*+?":
            raise self._error("a repetition of a repetition")
        return Repeat(item, low, high)

    def _set(self) -> Characters:
        negated = self._next() == "^"
        self._at += negated
        ranges: list[tuple[int, int]] = []
        classes = False
        if self._next() == "]":
            raise self._error("[] is read differently everywhere")
        while self._next() != "]":
            low, is_class = self._set_member()
            classes = classes or is_class
            dash = self._next() == "-" and self._pattern[self._at + 1 : self._at + 2] != "]"
            if not dash:
                ranges += low.ranges
                continue
            self._at += 1
            high, high_is_class = self._set_member()
            if is_class or high_is_class or not low.ranges or not high.ranges or low.ranges > high.ranges:
                raise self._error("a range in [] that has no two ends")
            ranges.append((low.ranges[0][0], high.ranges[0][0]))
        self._at += 1
        whole = characters(ranges, negated=negated)
        return intersect(whole, _ASCII) if negated and classes else whole

    def _set_member(self) -> tuple[Characters, bool]:
        char = self._next()
        if not char:
            raise self._error("[ is not closed")
        self._at += 1
        if char == "[" and self._next() and self._next() in ":.=":
            raise self._error("named classes are not supported")
        if char != "\\":
            return _one(char), False
        is_class = self._next() in _CLASSES
        if self._next() == "b":
            self._at += 1
            return _one("\b"), False
        return self._escape(), is_class

    def _escape(self) -> Characters:
        char = self._next()
        self._at += 1
        if char in _CLASSES:
            return _CLASSES[char]
        if char in _CONTROLS and not (char == "0" and self._next().isdigit()):
            return _one(_CONTROLS[char])
        if char in _HEX_DIGITS:
            digits = self._pattern[self._at : self._at + _HEX_DIGITS[char]]
            if re.fullmatch(f"[0-9A-Fa-f]{{{_HEX_DIGITS[char]}}}", digits):
                self._at += len(digits)
                return _one(chr(int(digits, 16)))
        if not char or char.isalnum():
            raise self._error(f"\\{char} is not supported")
        return _one(char)

    def _next(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _error(self, what: str) -> UsageError:
        return UsageError(f"a pattern cannot be used: {what}", where=safe_line(self._pattern, 100))


def _one(char: str) -> Characters:
    return characters([(ord(char), min(ord(char), MAX_CHARACTER))])
