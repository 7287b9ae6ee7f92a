"""The lines of a batch's journal: a header, an entry for each announced record, a mark for each commit.

Every line but the header ends with a CRC-32 of what all lines up to there say. So a line that was changed,
moved, doubled or removed is noticed. Opens no files.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from dsmoe_local.batch.lines import Key

Settings = Mapping[str, Any]

_VERSION = 2
_NAME = "dsmoe_batch"
_LONGEST_HEADER = 16 << 20
_LONGEST_LINE = 256
_ENTRY = re.compile(
    rb'(\["([0-9a-f]{16})([0-9a-f]{16})",([1-9]\d{0,17}),(\d{1,10}),"([a-z0-9_]{0,64})"),(\d{1,10})\]\n'
)
_MARK = re.compile(rb'(\["committed"),(\d{1,10})\]\n')


class NoJournalError(ValueError):
    """A file does not begin as a journal does, or not as it once did."""


class OtherVersionError(ValueError):
    """A journal of another version."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a journal begins with. `settings` shape the records; `loaded` are those that are known once the
    model is loaded; `names` are what people call those whose values mean nothing to them.

    `size` and `check` are of the header's lines.
    """

    settings: Settings
    loaded: Settings
    names: Settings
    size: int
    check: int


@dataclass(frozen=True, slots=True)
class Entry:
    """An announced record: its key, length in bytes and CRC-32, and why it failed (empty: it has a reply)."""

    key: Key
    length: int
    checksum: int
    failure: str


@dataclass(frozen=True, slots=True)
class Line:
    """A journal line. `entry` None: a mark, all records announced before it are committed.

    `check` is what the next line's CRC goes on from.
    """

    size: int
    check: int
    entry: Entry | None


def header_lines(settings: Settings, loaded: Settings, names: Settings) -> tuple[bytes, int]:
    """A journal's beginning, its first mark included, and its check."""
    values = {_NAME: _VERSION, "settings": settings, "loaded": loaded, "names": names}
    raw = json.dumps(values, separators=(",", ":")).encode() + b"\n"
    mark, check = mark_line(zlib.crc32(raw))
    return raw + mark, check


def entry_line(entry: Entry, check: int) -> tuple[bytes, int]:
    """The line of a record, and the check after it."""
    key = f"{entry.key.id:016x}{entry.key.content:016x}"
    return _checked(f'["{key}",{entry.length},{entry.checksum},"{entry.failure}"'.encode(), check)


def mark_line(check: int) -> tuple[bytes, int]:
    """The line of a commit, and the check after it."""
    return _checked(b'["committed"', check)


def _checked(words: bytes, check: int) -> tuple[bytes, int]:
    check = zlib.crc32(words, check)
    return b"%b,%d]\n" % (words, check), check


def read_header(file: BinaryIO) -> Header:
    """The header at the beginning of `file`. Raises NoJournalError, OtherVersionError."""
    raw = file.readline(_LONGEST_HEADER)
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise NoJournalError from error
    version = values.get(_NAME) if isinstance(values, dict) else None
    if isinstance(version, int) and version != _VERSION:
        raise OtherVersionError
    mark = _read_line(file.readline(_LONGEST_LINE), zlib.crc32(raw))
    if mark is None or mark.entry is not None:
        raise NoJournalError
    settings, loaded, names = (values.get(name) for name in ("settings", "loaded", "names"))
    if not (isinstance(settings, dict) and isinstance(loaded, dict) and isinstance(names, dict)):
        raise NoJournalError
    return Header(settings, loaded, names, len(raw) + mark.size, mark.check)


def read_lines(file: BinaryIO, check: int) -> Iterator[Line]:
    """The lines from here on, up to the first that is torn or was changed; `file` then stands before it."""
    end = file.tell()
    while (line := _read_line(file.readline(_LONGEST_LINE), check)) is not None:
        end, check = end + line.size, line.check
        yield line
    file.seek(end)


def _read_line(raw: bytes, check: int) -> Line | None:
    """None for what is no line behind `check`."""
    match = _ENTRY.fullmatch(raw) or _MARK.fullmatch(raw)
    if match is None or zlib.crc32(match[1], check) != int(match[match.lastindex or 0]):
        return None
    entry = None
    if match.re is _ENTRY:
        key = Key(int(match[2], 16), int(match[3], 16))
        entry = Entry(key, int(match[4]), int(match[5]), match[6].decode())
    return Line(len(raw), zlib.crc32(match[1], check), entry)


@dataclass(frozen=True, slots=True)
class Rest:
    """What follows the last whole line. A kill leaves part of a line there: no line end, so no mark. A power
    failure may leave zeros.
    """

    is_empty: bool
    has_line_end: bool
    has_mark: bool


def read_rest(file: BinaryIO) -> Rest:
    """What is left of `file`."""
    is_empty, has_line_end, has_mark = True, False, False
    while raw := file.readline(_LONGEST_LINE):
        is_empty = False
        has_line_end = has_line_end or raw.endswith(b"\n")
        has_mark = has_mark or _MARK.fullmatch(raw) is not None
    return Rest(is_empty, has_line_end, has_mark)
