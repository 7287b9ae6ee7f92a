"""Values of rows, checked: a damaged database has anything in any column, and SQLite gives it out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from hashlib import blake2b

_MOST = 2**63 - 1
_LATEST = 253_402_000_000.0  # seconds since 1970: the year 9999, the last that Python can show


class DamagedRowError(ValueError):
    """A row that makes no sense; `Database` makes it the error that says so."""


def seal_of(values: Iterable[object]) -> bytes:
    """A digest of a row's values, which tells what was written from what happens to make sense."""
    digest = blake2b(digest_size=16)
    for value in values:
        if isinstance(value, str):
            value = value.encode("utf-8", "surrogateescape")
        content = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(b"%s %d " % (type(value).__name__.encode(), len(content)) + content)
    return digest.digest()


def check_seal(name: str, seal: object, values: Iterable[object]) -> None:
    """DamagedRowError unless the values are what was sealed; without a seal anything goes."""
    if seal is not None and seal != seal_of(values):
        raise DamagedRowError(f"{name} is not what was written")


def integer(name: str, value: object, least: int = 0) -> int:
    """A whole number, of `least` or more."""
    if type(value) is not int or not least <= value <= _MOST:
        raise _wrong(name, value)
    return value


def optional_integer(name: str, value: object, least: int = 0) -> int | None:
    """A whole number, or none."""
    return None if value is None else integer(name, value, least)


def real(name: str, value: object) -> float:
    """A number, 0 or more and finite."""
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
        raise _wrong(name, value)
    return float(value)  # type: ignore[arg-type]


def moment(name: str, value: object) -> float:
    """Seconds since 1970, which can be shown as a date."""
    if (seconds := real(name, value)) > _LATEST:
        raise _wrong(name, value)
    return seconds


def text(name: str, value: object) -> str:
    """A text."""
    # `Database` reads bytes that are no text as half characters.
    if not isinstance(value, str) or not (value.isascii() or _is_whole(value)):
        raise _wrong(name, value)
    return value


def optional_text(name: str, value: object) -> str | None:
    """A text, or none."""
    return None if value is None else text(name, value)


def blob(name: str, value: object, n_bytes: int | None = None) -> bytes:
    """Bytes; as many as `n_bytes`, if that is said."""
    if not isinstance(value, bytes) or n_bytes not in (None, len(value)):
        raise _wrong(name, value)
    return value


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _wrong(name: str, value: object) -> DamagedRowError:
    shown = f"no such {type(value).__name__}" if isinstance(value, str | bytes) else str(value)[:40]
    return DamagedRowError(f"{name} is {shown}")
