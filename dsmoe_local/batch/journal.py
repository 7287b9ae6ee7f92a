"""The journal of a batch's output: its lines, and how it is compared with the output. Writes no files.

Each line is a CRC-32 and a JSON value. The first value is the header. Each record that is about to be written
has an entry, and each group of records that is on the disk is followed by a commit mark. The CRC-32 covers
all values so far, so a line that was changed, moved, duplicated or removed is detected.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dsmoe_local.base.errors import FileError
from dsmoe_local.batch.lines import Key

Settings = Mapping[str, Any]
Visitor = Callable[[Key, str], None]
"""Called with the key of each finished record and its kind of failure (empty: it has a reply)."""

_VERSION = 3
_NAME = "dsmoe_batch"
_FIELDS = ("settings", "loaded", "names")  # of the header, next to the version
_MARK = "committed"
_KEY = re.compile("[0-9a-f]{32}")
_encode = json.JSONEncoder(separators=(",", ":")).encode
_CHECKSUM = 9  # characters of a line before its value
_MAX_LINE = 16 << 20


@dataclass(frozen=True, slots=True)
class Header:
    """What a journal starts with. `has_lines`: more lines follow it.

    The records depend on `settings` and on `loaded`, the settings that are known once the model is loaded.
    `names` gives the text that messages show for a setting whose value is a digest.
    """

    settings: Settings
    loaded: Settings
    names: Settings
    has_lines: bool = False


@dataclass(frozen=True, slots=True)
class Extent:
    """Up to where the output and its journal are valid, in bytes, and the CRC-32 of the journal's last line.

    `committed` is False if the last valid record has no commit mark.
    """

    output: int = 0
    journal: int = 0
    checksum: int = 0
    committed: bool = True


def journal_path(out: Path) -> Path:
    """Return the path of the journal of the output `out`."""
    return out.with_name(f"{out.name}.journal")


def header_line(header: Header) -> tuple[bytes, int]:
    """Return the first line of a journal, and its checksum."""
    values = {"settings": header.settings, "loaded": header.loaded, "names": header.names}
    return _line({_NAME: _VERSION, **values}, 0)


def entry_line(key: Key, content: bytes, failure: str, checksum: int) -> tuple[bytes, int]:
    """Return the line of a record, and its checksum. `checksum` is that of the line before."""
    entry = (f"{key.id:016x}{key.content:016x}", len(content), zlib.crc32(content), failure)
    return _line(entry, checksum)


def mark_line(checksum: int) -> tuple[bytes, int]:
    """Return a commit mark, and its checksum. `checksum` is that of the line before."""
    return _line(_MARK, checksum)


def _line(value: object, checksum: int) -> tuple[bytes, int]:
    text = _encode(value).encode()
    checksum = zlib.crc32(text, checksum)
    return b"%08x %b\n" % (checksum, text), checksum


def _valid_lines(file: BinaryIO) -> Iterator[tuple[Any, int, int]]:
    """Yield the value of each line, the offset of its end, and its checksum, up to the first invalid line.

    `file` is then positioned at that line.
    """
    end = checksum = 0
    while raw := file.readline(_MAX_LINE):
        text = raw[_CHECKSUM:-1]
        checksum = zlib.crc32(text, checksum)
        if raw != b"%08x %b\n" % (checksum, text):
            break
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            break
        end += len(raw)
        yield value, end, checksum
    file.seek(end)


def read_header(journal: Path) -> Header | None:
    """Read the header of a journal; None if there is no journal.

    FileError if it is damaged or of another version.
    """
    try:
        with journal.open("rb") as file:
            first, end, _ = next(_valid_lines(file), (None, 0, 0))
            file.seek(end)
            has_lines = bool(file.read(1))
    except FileNotFoundError:
        return None
    values: dict[str, Any] = first if isinstance(first, dict) else {}
    version = values.get(_NAME)
    if version not in (None, _VERSION):
        raise FileError(
            "another version of dsmoe-batch wrote the journal",
            where=journal,
            remedy="finish the batch with that version, or start over: --restart",
        )
    if version is None or values.keys() != {_NAME, *_FIELDS}:
        raise _damaged(journal)
    settings, loaded, names = (values[name] for name in _FIELDS)
    if not all(isinstance(part, dict) for part in (settings, loaded, names)):
        raise _damaged(journal)
    return Header(settings, loaded, names, has_lines=has_lines)


def compare(out: Path, visit: Visitor) -> Extent:
    """Compare an output with its journal, record by record. Return up to where both are valid.

    After a kill the records of the last group may be incomplete, and so may its entries. Every other
    difference is refused with FileError: a committed record that is not whole, output that has no entry, and
    damaged lines before a commit mark.
    """
    journal = journal_path(out)
    extent = Extent()
    n_committed = n_announced = 0  # bytes of output
    with out.open("rb") as output, journal.open("rb") as file:
        n_bytes = os.fstat(output.fileno()).st_size
        for value, end, checksum in _valid_lines(file):
            is_whole = extent.output == n_announced
            if isinstance(value, list):
                key, length, content_checksum, failure = _entry(value, journal)
                n_announced += length
                if (
                    is_whole
                    and n_announced <= n_bytes
                    and zlib.crc32(output.read(length)) == content_checksum
                ):
                    visit(key, failure)
                    extent = Extent(n_announced, end, checksum, committed=False)
                continue
            # The header or a commit mark: all records before it must be whole.
            if not is_whole:
                raise _changed(out)
            n_committed = n_announced
            extent = Extent(n_announced, end, checksum)
        # A kill leaves part of a line here, without a line end. A power failure may leave zeros.
        is_empty, has_line_end, has_mark = True, False, False
        while raw := file.readline(_MAX_LINE):
            is_empty = False
            has_line_end = has_line_end or raw.endswith(b"\n")
            has_mark = has_mark or raw[_CHECKSUM:] == f'"{_MARK}"\n'.encode()
    is_whole = extent.output == n_announced
    if n_bytes > n_announced or has_mark or (has_line_end and not is_whole and n_bytes > n_committed):
        raise _changed(out) if is_empty else _damaged(journal)
    return extent


def _entry(value: list[Any], journal: Path) -> tuple[Key, int, int, str]:
    """Return a record's key, its length in bytes, its CRC-32 and its kind of failure."""
    match value:
        case [str(key), int(length), int(checksum), str(failure)] if _KEY.fullmatch(key) and length >= 0:
            return Key(int(key[:16], 16), int(key[16:], 16)), length, checksum, failure
    raise _damaged(journal)


def _damaged(journal: Path) -> FileError:
    return FileError(
        "the journal is damaged", where=journal, remedy="restore it from a copy, or start over: --restart"
    )


def _changed(out: Path) -> FileError:
    return FileError(
        "the output does not match its journal",
        where=out,
        remedy="restore it from a copy, or start over: --restart",
    )
