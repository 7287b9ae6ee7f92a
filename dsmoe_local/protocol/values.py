"""Check and convert the JSON values of fields.

Each function takes the name of the field, which its messages show, and raises or returns RequestError.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from dsmoe_local.base.text import safe_line
from dsmoe_local.protocol.errors import RequestError


def text(key: str, value: object) -> str:
    """Return a value that must be text."""
    if not isinstance(value, str):
        raise RequestError(f"{key} is not text", param=key)
    return value


def missing(key: str, body: Mapping[str, object]) -> RequestError:
    """Return the error for a body without a field, with the field that may be a misspelling of it."""
    near = difflib.get_close_matches(key, body, n=1)
    found = near and near[0] != key
    remedy = f"the body has {safe_line(near[0], 40)!r}: did you mean {key}?" if found else "set it"
    return RequestError(f"{key} is missing", remedy=remedy, param=key)


def integer(key: str, value: object) -> int:
    """Return a value that must be a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{key} is not a whole number", param=key)
    return value


def number(key: str, value: object) -> float:
    """Return a value that must be a finite number, as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{key} is not a number", param=key)
    try:
        found = float(value)
    except OverflowError as error:
        raise RequestError(f"{key} is out of range", param=key) from error
    if not math.isfinite(found):
        raise RequestError(f"{key} is not a finite number", param=key)
    return found


def flag(key: str, value: object) -> bool:
    """Return a value that must be true or false."""
    if not isinstance(value, bool):
        raise RequestError(f"{key} is neither true nor false", param=key)
    return value


def json_object(key: str, value: object) -> dict[str, Any]:
    """Return a value that must be an object; an empty one for null."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"{key} is not an object", param=key)
    return value
