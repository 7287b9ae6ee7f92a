"""One input line: its number, its id, its JSON, and what is wrong with it. What fields mean is `fields`'."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NoReturn

from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.base.text import safe_line

MAX_LINE = 64 << 20


class LineError(DsmoeError):
    """A line that is no request; the others go on."""


@dataclass(frozen=True, slots=True)
class Line:
    """One input line: its number from 1, the id that its record gets, and its content; `error` if it has
    none.
    """

    number: int
    id: str
    values: Mapping[str, Any]
    error: LineError | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """What a finished record is known by: 64 bits of its id, and 64 of everything else the line says."""

    id: int
    content: int


def hash64(data: bytes) -> int:
    """64 bits that stand for `data`."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def key_of(line: Line, raw: bytes) -> Key:
    """The line's key. Spacing and the order of fields do not count; without JSON every byte does."""
    content = raw
    if line.error is None:
        content = json.dumps(line.values, sort_keys=True, separators=(",", ":")).encode()
    return Key(hash64(line.id.encode()), hash64(content))


def named_line(number: int, values: Mapping[str, Any]) -> Line:
    """A line with its id taken out of `values`; `line-N` without one. LineError if the id is none."""
    rest = {key: value for key, value in values.items() if key not in ("id", "custom_id")}
    return Line(number, _id(values) or f"line-{number}", rest)


def _id(values: Mapping[str, Any]) -> str:
    named = [values[key] for key in ("custom_id", "id") if values.get(key) is not None]
    if not named:
        return ""
    if len(named) > 1 and named[0] != named[1]:
        raise LineError("id and custom_id differ")
    if isinstance(named[0], bool) or not isinstance(named[0], str | int):
        raise LineError("the id is neither text nor a whole number")
    return str(named[0])


def decoded(raw: bytes) -> str:
    """The text of a line. LineError if it is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineError(f"not UTF-8 at byte {error.start}") from error


def strict_object(raw: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8, without NaN or Infinity, without a key twice. LineError if it is none."""

    def refuse(constant: str) -> NoReturn:
        raise LineError(f"{constant} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise LineError("a key occurs twice in one object")
        return result

    text = decoded(raw)
    try:
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise LineError(f"not JSON: {safe_line(error.msg, 60)}, column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        raise LineError("not JSON that can be read: too deep, or too long a number") from error
    if not isinstance(value, dict):
        raise LineError("not a JSON object")
    if "\\ud" in text.lower():
        # Escapes can spell half a pair, which no output could hold.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise LineError("half of a surrogate pair is no text") from error
    return value


def describe(error: DsmoeError) -> tuple[str, str]:
    """An error record's code and message."""
    code = "invalid_request" if isinstance(error, LineError | UsageError) else _code(error)
    return code, "; ".join(safe_line(line, 400) for line in str(error).splitlines())


def _code(error: DsmoeError) -> str:
    name = type(error).__name__.removesuffix("Error")
    return (
        "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).strip("_") + "_error"
    )
