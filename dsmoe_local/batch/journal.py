"""The output and its journal: which records are finished, through kills and power loss. Knows no requests.

A group of records is announced first: one journal line each (group, key, length, CRC-32, failed), synced.
Then the records are appended to the output, synced, and count. So the output never holds a byte that the
journal does not explain, and only its last group can be torn: when the files are opened again, both are cut
back to the last record that is whole.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError, NoSpaceError
from dsmoe_local.base.faults import reach
from dsmoe_local.batch.lines import Key

Settings = Mapping[str, Any]
Visitor = Callable[[Key, bool], None]
"""Is told the key of each finished record, and whether it is an error's."""

_VERSION = "dsmoe_batch"
_MISSING = "not set"
_MOST_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Record:
    """A line of output on its way to the disk."""

    key: Key
    content: bytes
    failed: bool


@dataclass(frozen=True, slots=True)
class _Entry:
    """A journal line."""

    group: int
    key: Key
    length: int
    checksum: int
    failed: bool


@dataclass(slots=True)
class _Extent:
    """What is whole: bytes of both files, and the last group."""

    output: int
    journal: int
    group: int = 0


def journal_path(out: Path) -> Path:
    """Where the journal of `out` lies."""
    return out.with_name(f"{out.name}.journal")


class Output:
    """An output file and its journal. Made, it knows what is finished; `open` makes it ready for more, and
    only then are files touched. The caller holds the lock.
    """

    def __init__(self, out: Path, settings: Settings, visit: Visitor, *, restart: bool = False) -> None:
        """Read what is there. FileError if it is not ours, was changed, or was begun with other settings."""
        self.path = out
        self._settings = settings
        self._restart = restart
        self._loaded: Settings = {}
        self._loaded_then: Settings | None = None  # None: there are no records yet
        self._descriptors: tuple[int, int] | None = None
        self._extent: _Extent | None = None  # None: it is yet to be begun
        if restart:
            return
        header = _read_header(journal_path(out))
        _check_files(out, header)
        if header is None or not header.has_entries:
            return
        if header.settings != settings:
            raise _other_settings(out, header.settings, settings)
        self._extent = _recover(out, journal_path(out), header.size, visit)
        self._loaded_then = header.loaded

    def require(self, loaded: Settings) -> None:
        """Settings that are known once the model is loaded. FileError if there are records of others."""
        if self._loaded_then is not None and self._loaded_then != loaded:
            raise _other_settings(self.path, self._loaded_then, loaded)
        self._loaded = loaded

    def open(self) -> None:
        """Cut off what is torn, or begin; what `restart` replaces is removed now.

        FileError if somebody else has written the output meanwhile.
        """
        if self._extent is None:
            if not self._restart:
                _check_files(self.path, _read_header(journal_path(self.path)))
            self._extent = _begin(self.path, self._settings, self._loaded)
        flags = os.O_WRONLY | os.O_APPEND
        self._descriptors = os.open(self.path, flags), os.open(journal_path(self.path), flags)
        self._cut()

    def append(self, records: Sequence[Record]) -> None:
        """Write and sync a group: when this returns, it counts. FileError if the disk cannot take it."""
        extent, (output, journal) = self._opened()
        group = extent.group + 1
        entries = b"".join(_entry_line(group, record) for record in records)
        try:
            self._write(journal, entries)
            durable.sync(journal)
            reach("batch.announced")
            for record in records:
                self._write(output, record.content)
                reach("batch.record")
            reach("batch.written")
            durable.sync(output)
        except OSError as error:
            kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else FileError
            raise kind(f"a record cannot be written: {error.strerror}", where=self.path) from error
        reach("batch.synced")
        n_bytes = sum(len(record.content) for record in records)
        self._extent = _Extent(extent.output + n_bytes, extent.journal + len(entries), group)

    def _opened(self) -> tuple[_Extent, tuple[int, int]]:
        if self._extent is None or self._descriptors is None:
            raise ValueError("the output is not open")
        return self._extent, self._descriptors

    def _write(self, descriptor: int, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError:
            self._cut()
            raise

    def _cut(self) -> None:
        """Take away what does not count."""
        extent, (output, journal) = self._opened()
        for descriptor, size in ((output, extent.output), (journal, extent.journal)):
            if os.fstat(descriptor).st_size != size:
                os.ftruncate(descriptor, size)
                durable.sync(descriptor)

    def close(self) -> None:
        """Release both files; they stay on the disk."""
        for descriptor in self._descriptors or ():
            os.close(descriptor)
        self._descriptors = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_files(out: Path, header: _Header | None) -> None:
    if not out.exists() and header is not None and header.has_entries:
        raise FileError("the output is gone, its journal is there", where=out, remedy="start over: --restart")
    if (header is None or not header.has_entries) and out.exists() and out.stat().st_size:
        missing = "no journal of it" if header is None else "its journal knows no record"
        replaceable = ", or replace it with --restart" if header is not None or _may_be_records(out) else ""
        raise FileError(f"the output exists, and {missing}", where=out, remedy=f"name another{replaceable}")


def _may_be_records(out: Path) -> bool:
    """Whether a file begins like a batch's output: --restart is for those, not for whatever was named."""
    with out.open("rb") as file:
        return file.read(1) in (b"", b"{")


def _begin(out: Path, settings: Settings, loaded: Settings) -> _Extent:
    """New files in the place of those that may be there."""
    journal = journal_path(out)
    if out.exists() and not journal.exists() and not _may_be_records(out):
        raise FileError(
            "the output exists, and is no batch's", where=out, remedy="name another, or remove it yourself"
        )
    journal.unlink(missing_ok=True)
    out.unlink(missing_ok=True)
    os.close(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    durable.sync_folder(out.absolute().parent)
    reach("batch.created")
    words = {_VERSION: 1, "settings": settings, "loaded": loaded}
    header = json.dumps(words, separators=(",", ":")).encode() + b"\n"
    # One name, whichever process writes it: what a kill leaves is replaced by the next run.
    temporary = journal.with_name(f".{journal.name}.part")
    with temporary.open("wb") as file:
        file.write(header)
        file.flush()
        durable.sync(file.fileno())
    durable.replace(temporary, journal)
    reach("batch.begun")
    return _Extent(0, len(header))


@dataclass(frozen=True, slots=True)
class _Header:
    settings: Settings
    loaded: Settings
    size: int
    has_entries: bool


def _read_header(journal: Path) -> _Header | None:
    """None without a journal."""
    try:
        with journal.open("rb") as file:
            raw = file.readline()
            has_entries = bool(file.read(1))
    except FileNotFoundError:
        return None
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise _damaged(journal) from error
    if not raw.endswith(b"\n") or not isinstance(header, dict) or header.get(_VERSION) != 1:
        raise _damaged(journal)
    return _Header(header["settings"], header.get("loaded", {}), len(raw), has_entries)


def _damaged(journal: Path) -> FileError:
    return FileError("the journal is damaged", where=journal, remedy="start over: --restart")


def _other_settings(out: Path, then: Settings, now: Settings) -> FileError:
    names = [name for name in {**then, **now} if _word(then, name) != _word(now, name)]
    changes = [f"{name}: {_word(then, name)} then, {_word(now, name)} now" for name in names]
    if len(changes) > _MOST_SHOWN:
        changes[_MOST_SHOWN:] = [f"and {len(changes) - _MOST_SHOWN} more"]
    return FileError(
        f"begun with another {'model' if any(name.startswith('model') for name in names) else 'setting'}"
        f" ({'; '.join(changes)})",
        where=out,
        remedy="use what it was begun with, or start over: --restart",
    )


def _word(settings: Settings, name: str) -> str:
    word = settings.get(name, _MISSING)
    return _MISSING if word == str(None) else word


def _entry_line(group: int, record: Record) -> bytes:
    key = f"{record.key.id:016x}{record.key.content:016x}"
    fields = [group, key, len(record.content), zlib.crc32(record.content), int(record.failed)]
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _read_entry(raw: bytes) -> _Entry | None:
    """None for what is no entry."""
    try:
        group, key, length, checksum, failed = json.loads(raw)
        return _Entry(group, Key(int(key[:16], 16), int(key[16:], 16)), length, checksum, bool(failed))
    except (ValueError, TypeError):
        return None


def _entries(file: BinaryIO) -> Iterator[tuple[bytes, _Entry | None]]:
    while (raw := file.readline()).endswith(b"\n"):
        yield raw, _read_entry(raw)


def _recover(out: Path, journal: Path, header_size: int, visit: Visitor) -> _Extent:
    """Compare the output with its journal, record by record; FileError where more than a group is wrong."""
    extent = _Extent(0, header_size)
    changed = FileError(
        "the output is not what its journal says", where=out, remedy="put it back, or start over: --restart"
    )
    with out.open("rb") as output, journal.open("rb") as file:
        file.seek(header_size)
        entries = _entries(file)
        for raw, entry in entries:
            if entry is None or not _holds(output, entry):
                # A later group was begun only after this one counted.
                if any(later is not None and later.group > extent.group + 1 for _, later in entries):
                    raise changed
                return extent
            extent = _Extent(extent.output + entry.length, extent.journal + len(raw), entry.group)
            visit(entry.key, entry.failed)
        if output.read(1):
            raise changed
    return extent


def _holds(output: BinaryIO, entry: _Entry) -> bool:
    content = output.read(entry.length)
    return len(content) == entry.length and zlib.crc32(content) == entry.checksum
