"""JSON's own texts as nodes: strings, literals, numbers within bounds, any value. No schemas here.

What these permit is a part of what JSON does, chosen so that every reader takes it for the same value: no
surrogates, no numbers beyond what a double holds, no endless blanks.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.grammar.nodes import (
    MAX_CHARACTER,
    NOTHING,
    Characters,
    Choice,
    Node,
    Repeat,
    Rule,
    Text,
    characters,
    choice,
    intersect,
    optional,
    sequence,
)

_DIGIT = characters([(ord("0"), ord("9"))])
_NON_ZERO = characters([(ord("1"), ord("9"))])
_HEX = characters([(ord("0"), ord("9")), (ord("a"), ord("f")), (ord("A"), ord("F"))])
PLAIN = characters([(0x20, 0x21), (0x23, 0x5B), (0x5D, MAX_CHARACTER)])
_SHORT_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}

INTEGER_DIGITS = 15
"""Every whole number of so many digits is exact in a double."""
FRACTION_DIGITS = 15
_FRACTION_WITHIN = 6  # between bounds, unless they have more themselves

# One blank, or a new line and its indentation: models left alone write blanks without end.
SPACE = Repeat(choice(Text(" "), sequence(Text("\n"), Repeat(Text(" "), 0, 32))), 0, 1)
COMMA = sequence(Text(","), SPACE)
COLON = sequence(Text(":"), SPACE)


def written_characters(wanted: Characters) -> Node:
    """One of the characters as a JSON string writes it: as itself, else by its short escape."""
    plain = intersect(wanted, PLAIN)
    ways: list[Node] = [plain] if plain.ranges else []
    for char, escape in _SHORT_ESCAPES.items():
        if any(low <= ord(char) <= high for low, high in wanted.ranges):
            ways.append(Text(escape))
    return Choice(tuple(ways)) if len(ways) != 1 else ways[0]


def string_of(content: Node) -> Node:
    """A string with that content, which is written with its escapes."""
    return sequence(Text('"'), content, Text('"'))


def literal(value: Any) -> Node:  # noqa: ANN401 - any JSON value
    """Exactly this value."""
    return Text(json.dumps(value, ensure_ascii=_has_surrogates(value), separators=(", ", ": ")))


def _has_surrogates(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return any("\ud800" <= char <= "\udfff" for char in json.dumps(value, ensure_ascii=False))


def _any_character() -> Node:
    # \u of a surrogate is half a character, and two of them count as one.
    low_half = characters([(ord("0"), ord("7"))])
    below_d = intersect(_HEX, characters([(ord("D"), ord("D")), (ord("d"), ord("d"))], negated=True))
    no_surrogate = choice(sequence(below_d, _HEX), sequence(characters([(68, 68), (100, 100)]), low_half))
    escape = choice(
        characters((ord(c), ord(c)) for c in '"\\/bfnrt'), sequence(Text("u"), no_surrogate, _HEX, _HEX)
    )
    return choice(PLAIN, sequence(Text("\\"), escape))


def members(separated: Node, item: Node) -> Node:
    """Items with the separator between them, or nothing."""
    return optional(sequence(item, Repeat(sequence(separated, item), 0, None)))


def object_of(content: Node) -> Node:
    """An object with these members."""
    return sequence(Text("{"), SPACE, content, SPACE, Text("}"))


def array_of(content: Node) -> Node:
    """An array with these items."""
    return sequence(Text("["), SPACE, content, SPACE, Text("]"))


def member(key: Node, value: Node) -> Node:
    """A key and its value."""
    return sequence(key, SPACE, COLON, value)


SEPARATOR = sequence(SPACE, COMMA)
CHARACTER = Rule("json-character")
STRING = Rule("json-string")
ANY_VALUE = Rule("json-value")
ANY_OBJECT = Rule("json-object")
ANY_ARRAY = Rule("json-array")
INTEGER = Rule("json-integer")
NUMBER = Rule("json-number")
BOOLEAN = choice(Text("true"), Text("false"))
NULL = Text("null")

_WHOLE = choice(Text("0"), sequence(_NON_ZERO, Repeat(_DIGIT, 0, INTEGER_DIGITS - 1)))
_EXPONENT = sequence(
    characters([(ord("e"), ord("e")), (ord("E"), ord("E"))]),
    optional(choice(Text("+"), Text("-"))),
    Repeat(_DIGIT, 1, 2),
)
RULES: dict[str, Node] = {
    "json-character": _any_character(),
    "json-string": string_of(Repeat(CHARACTER, 0, None)),
    "json-integer": sequence(optional(Text("-")), _WHOLE),
    "json-number": sequence(
        INTEGER, optional(sequence(Text("."), Repeat(_DIGIT, 1, FRACTION_DIGITS))), optional(_EXPONENT)
    ),
    "json-object": object_of(members(SEPARATOR, member(STRING, ANY_VALUE))),
    "json-array": array_of(members(SEPARATOR, ANY_VALUE)),
    "json-value": choice(ANY_OBJECT, ANY_ARRAY, STRING, NUMBER, BOOLEAN, NULL),
}
"""The rules that the nodes above refer to."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Between which numbers a number is; None: no bound."""

    low: Decimal | None = None
    high: Decimal | None = None
    low_excluded: bool = False
    high_excluded: bool = False


def number_within(bounds: Bounds, *, whole: bool) -> Node:
    """A number within bounds, written without exponent; `whole`: an integer.

    UsageError if the bounds leave no number, or none of a size that is exact.
    """
    if bounds == Bounds():
        return INTEGER if whole else NUMBER
    places = min(max(_places(bounds), _FRACTION_WITHIN), FRACTION_DIGITS)
    # Short fractions too, or 0.5 could only be written 0.500000.
    lengths = [0] if whole else range(places + 1)
    ways = [node for digits in lengths if (node := _with_places(bounds, digits)) is not None]
    if not ways:
        raise UsageError("no number is within the bounds")
    return choice(*ways)


def _places(bounds: Bounds) -> int:
    given = (bound for bound in (bounds.low, bounds.high) if bound is not None)
    return max((-int(bound.normalize().as_tuple().exponent) for bound in given), default=0)


def _with_places(bounds: Bounds, places: int) -> Node | None:
    """The numbers with exactly so many digits behind the point; they are counted in units of the last one."""
    scale = Decimal(10) ** places
    largest = 10**INTEGER_DIGITS * int(scale) - 1
    low, high = -largest, largest
    if bounds.low is not None:
        low = max(low, math.ceil(bounds.low * scale))
        low += bounds.low_excluded and low == bounds.low * scale
    if bounds.high is not None:
        high = min(high, math.floor(bounds.high * scale))
        high -= bounds.high_excluded and high == bounds.high * scale
    ways: list[Node] = []
    if low < 0 and low <= high:
        # No minus zero: it is within no bound that excludes what is below zero.
        ways.append(sequence(Text("-"), _digits_between(max(1, -high), -low, places)))
    if high >= 0 and low <= high:
        ways.append(_digits_between(max(0, low), high, places))
    return choice(*ways) if ways else None


def _digits_between(low: int, high: int, places: int) -> Node:
    """The numbers from `low` to `high`, in units of the last of `places` digits behind the point."""
    ways: list[Node] = []
    for length in range(max(len(str(low)), places + 1), max(len(str(high)), places + 1) + 1):
        first = max(low, 10 ** (length - 1) if length > places + 1 else 0)
        last = min(high, 10**length - 1)
        if first <= last:
            ways.append(_between(_pointed(first, length, places), _pointed(last, length, places)))
    return choice(*ways)


def _pointed(value: int, length: int, places: int) -> str:
    digits = str(value).zfill(length)
    return f"{digits[:-places]}.{digits[-places:]}" if places else digits


def _between(low: str, high: str) -> Node:
    """The texts of digits between two of the same length; a point stands at the same place in all of them."""
    if low == high:
        return Text(low) if low else NOTHING
    if low[0] == high[0]:
        return sequence(Text(low[0]), _between(low[1:], high[1:]))
    first, last = ord(low[0]), ord(high[0])
    rest_low, rest_high = low[1:], high[1:]
    least, most = _filled(rest_low, "0"), _filled(rest_high, "9")
    ways: list[Node] = []
    if rest_low != least:
        ways.append(sequence(Text(chr(first)), _between(rest_low, _filled(rest_low, "9"))))
        first += 1
    if rest_high != most:
        ways.append(sequence(Text(chr(last)), _between(_filled(rest_high, "0"), rest_high)))
        last -= 1
    if first <= last:
        free = [Text(".") if char == "." else _DIGIT for char in rest_low]
        ways.append(sequence(characters([(first, last)]), *free))
    return choice(*ways)


def _filled(digits: str, digit: str) -> str:
    return "".join("." if char == "." else digit for char in digits)
