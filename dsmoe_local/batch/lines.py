"""One line of a batch's input: strict JSON, its id, its key, and the errors in it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NoReturn

from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.base.text import safe_line

MAX_LINE = 64 << 20
_MAX_DEPTH = 200
_ID_FIELDS = ("custom_id", "id")
# The json module's messages, and the messages shown instead.
_FAULTS = {
    "Unterminated string starting at": "the string that starts in column {column} is not closed",
    "Invalid control character at": "a tab or control character in column {column}: in a string, write \\t",
    "Invalid \\escape": "the backslash in column {column} is not an escape: write \\\\ for a backslash",
    "Invalid \\uXXXX escape": "\\u in column {column} takes four hexadecimal digits",
    "Expecting value": "a value is missing in column {column}",
    "Expecting property name enclosed in double quotes": "a quoted key is missing in column {column}",
    "Expecting ':' delimiter": "a colon is missing in column {column}",
    "Expecting ',' delimiter": "a comma or a closing bracket is missing in column {column}",
    "Illegal trailing comma before end of object": "one comma too many in column {column}",
    "Illegal trailing comma before end of array": "one comma too many in column {column}",
    "Extra data": "the object is followed by something else in column {column}",
}


class LineError(DsmoeError):
    """A line that is not a valid request. It becomes an error record; the summary counts it under `kind`."""

    def __init__(
        self, what: str, *, where: str | Path = "", remedy: str = "", kind: str = "invalid_request"
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Key:
    """Hashes that identify a line and its record: 64 bits of the id, and 64 bits of the rest of the line."""

    id: int
    content: int


@dataclass(frozen=True, slots=True)
class Line:
    """One input line. `number` counts from 1, `id` is that of its record, `values` are the fields of the
    request (none if there is an `error`), `kept` the fields that are copied to the record.
    """

    number: int
    id: str
    key: Key
    values: Mapping[str, Any]
    error: LineError | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)


def hash64(data: bytes) -> int:
    """Return a 64-bit hash."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def key_of(name: str, raw: bytes, values: Mapping[str, Any], kept: Mapping[str, Any]) -> Key:
    """Return the key of a line with the id `name`. White space and the order of fields do not change it.

    A line without `values` is not valid: its key depends on every byte.
    """
    content = raw
    if values:
        parts = {"values": values, "kept": kept} if kept else values
        content = json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()
    return Key(hash64(name.encode()), hash64(content))


def id_of(number: int, values: Mapping[str, Any], id_field: str | None) -> str:
    """Return a line's id: from the field `id_field`, or else from `id` or `custom_id`, or else `line-N`.

    LineError if `id_field` is missing or the value is not an id.
    """
    found = [field_of(values, id_field)] if id_field else [values.get(name) for name in _ID_FIELDS]
    named = [value for value in found if value is not None and value != ""]
    if not named and id_field:
        raise LineError(f"the id field {safe_line(id_field, 40)!r} is missing", kind="missing_field")
    if not named:
        return f"line-{number}"
    if len(named) > 1 and named[0] != named[1]:
        raise LineError("id and custom_id differ")
    if isinstance(named[0], bool) or not isinstance(named[0], str | int):
        raise LineError("the id is neither text nor a whole number")
    return str(named[0])


def field_of(values: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401 - JSON
    """Return a field of a line or of its body; None if neither has it."""
    body = values.get("body")
    within = values if name in values or not isinstance(body, Mapping) else body
    return within.get(name)


def decoded(raw: bytes) -> str:
    """Decode a line and remove its line ending. LineError if it is not UTF-8."""
    try:
        return raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise LineError(f"not UTF-8 at byte {error.start + 1} of the line", kind="not_utf8") from error


def strict_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object in UTF-8. LineError also for NaN, Infinity and duplicate keys."""
    text = decoded(raw)
    if not text.lstrip().startswith("{"):
        raise LineError("not a JSON object: the line does not start with {", kind="not_json")
    try:
        value: dict[str, Any] = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
        )
    except json.JSONDecodeError as error:
        fault = _FAULTS.get(error.msg, safe_line(f"{error.msg} in column {{column}}", 80))
        raise _not_json(fault.replace("{column}", str(error.colno))) from error
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
            raise LineError("an escape is a lone surrogate, which is not a character") from error
    return value


def _not_json(fault: str) -> LineError:
    return LineError(f"not JSON: {fault}", kind="not_json")


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
        raise LineError(f"the key {safe_line(twice, 40)!r} occurs twice in one object")
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


def describe(error: DsmoeError) -> tuple[str, str]:
    """Return the code and the message of an error record."""
    code = "invalid_request" if isinstance(error, LineError | UsageError) else _code(error)
    return code, "; ".join(safe_line(line, 400) for line in str(error).splitlines())


def kind_of(error: DsmoeError) -> str:
    """Return the kind of failure under which the summary counts a line."""
    return error.kind if isinstance(error, LineError) else describe(error)[0]


def _code(error: DsmoeError) -> str:
    name = type(error).__name__.removesuffix("Error")
    return (
        "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).strip("_") + "_error"
    )
