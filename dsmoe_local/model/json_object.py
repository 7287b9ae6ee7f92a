"""Read JSON files strictly, with typed access to the values of an object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dsmoe_local.base.errors import FormatError, file_errors
from dsmoe_local.base.text import safe_line

_MAX_BYTES = 16 << 20
_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class JsonObject:
    """Typed, range-checked access to a parsed JSON object. Errors (FormatError) name the file and the key."""

    path: Path
    values: Mapping[str, Any]

    def refuse(self, key: str, accepted: str) -> NoReturn:
        """Raise FormatError for the value of a key."""
        raise FormatError(
            f"{key} = {safe_line(json.dumps(self.values.get(key)), 60)} is not supported",
            where=f"{self.path}: {key}",
            remedy=f"accepted: {accepted}",
        )

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """Return a whole number in a range. Null counts as missing."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """Return a number in a range. Null counts as missing."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            self.refuse(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return the value of a key that is there: true or false."""
        value = self.values[key]
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def word(self, key: str, words: Mapping[object, object]) -> object:
        """Return the meaning of the word that a key has."""
        value = self.values[key]
        if not isinstance(value, str) or value not in words:
            self.refuse(key, " or ".join(json.dumps(word) for word in words))
        return words[value]

    def require(self, required: Mapping[str, tuple[object, ...]]) -> None:
        """Refuse keys with other values than the accepted ones. None stands for a missing key."""
        for key, accepted in required.items():
            value = self.values.get(key)
            if not any(_is_same(value, good) for good in accepted):
                names = [json.dumps(good) for good in accepted if good is not None]
                leave_out = ["leave it out"] if None in accepted else []
                self.refuse(key, " or ".join([*names, *leave_out]))


def _is_same(value: object, other: object) -> bool:
    """Compare as in JSON, where 1 and true differ; in Python they are equal."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def load_json(path: Path, max_bytes: int = _MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object strictly from a file of at most `max_bytes`. Raises FileError or FormatError."""
    with file_errors(f"cannot read {safe_line(path.name, 60)}", path):
        if path.stat().st_size > max_bytes:
            raise FormatError(f"the file exceeds {max_bytes >> 20} MiB", where=path)
        raw = path.read_bytes()
    return strict_json(raw, path)


def strict_json(raw: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object without duplicate keys, NaN or deep nesting.

    Raises FormatError, which names `path`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice!r} occurs twice")
        return result

    def no_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    name = safe_line(path.name, 60)
    try:
        value = json.loads(raw, object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name} is not valid JSON: {safe_line(str(error), 80)}", where=path) from error
    if not isinstance(value, dict):
        raise FormatError(f"{name} must contain a JSON object", where=path)
    if not _is_shallow(value):
        raise FormatError(f"{name} is nested more than {_MAX_DEPTH} levels deep", where=path)
    return value


def _is_shallow(value: object) -> bool:
    """True if the nesting is at most _MAX_DEPTH, so that functions may recurse over the value."""
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        parts = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for part in parts for child in part if isinstance(child, (dict, list))]
        if not level:
            return True
    return False
