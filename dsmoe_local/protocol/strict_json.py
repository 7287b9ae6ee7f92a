"""Strict JSON: UTF-8, no duplicate keys, no NaN, limited depth. The messages say what to change."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, NoReturn

from dsmoe_local.base.text import safe_line
from dsmoe_local.protocol.errors import RequestError

_MAX_DEPTH = 200
# The json module's messages, and the messages shown instead.
_FAULTS = {
    "Unterminated string starting at": "the string that starts in {place} is not closed",
    "Invalid control character at": "a tab or control character in {place}: in a string, write \\t",
    "Invalid \\escape": "the backslash in {place} is not an escape: write \\\\ for a backslash",
    "Invalid \\uXXXX escape": "\\u in {place} takes four hexadecimal digits",
    "Expecting value": "a value is missing in {place}",
    "Expecting property name enclosed in double quotes": "a quoted key is missing in {place}",
    "Expecting ':' delimiter": "a colon is missing in {place}",
    "Expecting ',' delimiter": "a comma or a closing bracket is missing in {place}",
    "Illegal trailing comma before end of object": "one comma too many in {place}",
    "Illegal trailing comma before end of array": "one comma too many in {place}",
    "Extra data": "the object is followed by something else in {place}",
}


def decoded(raw: bytes) -> str:
    """Decode UTF-8 and remove the line ending. RequestError if it is not UTF-8."""
    try:
        return raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"not UTF-8 at byte {error.start + 1}", kind="not_utf8") from error


def strict_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object in UTF-8. RequestError also for NaN, Infinity and duplicate keys."""
    text = decoded(raw)
    if not text.lstrip().startswith("{"):
        raise RequestError("not a JSON object: it does not start with {", kind="not_json")
    value: dict[str, Any] = strict_value(text)
    return value


def strict_value(text: str) -> Any:  # noqa: ANN401 - JSON
    """Parse any JSON value. RequestError also for NaN, Infinity and duplicate keys."""
    try:
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
        )
    except json.JSONDecodeError as error:
        fault = _FAULTS.get(error.msg) or safe_line(error.msg, 60) + " in {place}"
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise _not_json(fault.replace("{place}", f"{line}column {error.colno}")) from error
    except RecursionError as error:
        raise _not_json("nested too deeply") from error
    except ValueError as error:
        raise _not_json("a number has too many digits") from error
    if _is_deeper(value, text):
        raise _not_json("nested too deeply")
    if "\\ud" in text.lower():
        # An escape can be a lone surrogate, which the output could not encode.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RequestError("an escape is a lone surrogate, which is not a character") from error
    return value


def _not_json(fault: str) -> RequestError:
    return RequestError(f"not JSON: {fault}", kind="not_json")


def _refuse_constant(constant: str) -> NoReturn:
    raise _not_json(f"JSON has no {constant}")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _not_json(f"the number {safe_line(text, 20)} is out of range")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise RequestError(f"the key {safe_line(twice, 40)!r} occurs twice in one object")
    return result


def _is_deeper(value: object, text: str) -> bool:
    """True if `value`, parsed from `text`, is nested deeper than _MAX_DEPTH.

    Python's own limit depends on the depth of the call stack: a line could pass once and fail later.
    """
    if text.count("{") + text.count("[") <= _MAX_DEPTH:
        return False
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner = [
            item.values() if isinstance(item, dict) else item
            for item in level
            if isinstance(item, dict | list)
        ]
        level = [part for parts in inner for part in parts]
    return any(isinstance(item, dict | list) for item in level)
