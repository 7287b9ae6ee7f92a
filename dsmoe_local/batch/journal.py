"""The output and its journal: which records are finished, through kills and power loss. Knows no requests.

A group of records is announced first: the journal gets an entry for each, and is synced. Then the records
are appended to the output, and it is synced. Only then the journal gets a commit mark, and the group counts.
The mark needs no sync of its own: the sync of the next announcement covers it, and `close` syncs the last
one. If a power failure takes a mark, its records are whole all the same.

So the output holds no byte that the journal does not explain, and only what follows the last mark can be
torn. When the files are opened again, both are cut back there to the last whole record. Whatever else is
missing or changed in either file is refused.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError, NoSpaceError
from dsmoe_local.base.faults import reach
from dsmoe_local.batch import journal_lines
from dsmoe_local.batch.journal_lines import Entry, Header, NoJournalError, OtherVersionError, Settings
from dsmoe_local.batch.lines import Key

Visitor = Callable[[Key, str], None]
"""Is told the key of each finished record, and why it failed (empty: it has a reply)."""

_MISSING = "not set"
_MOST_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Record:
    """A line of output on its way to the disk. `failure` says why it has no reply; empty: it has one."""

    key: Key
    content: bytes
    failure: str = ""


@dataclass(frozen=True, slots=True)
class _Extent:
    """What is whole: bytes of both files, and the check of the journal's. `committed`: a mark says so."""

    output: int
    journal: int
    check: int
    committed: bool = True


def journal_path(out: Path) -> Path:
    """Where the journal of `out` lies."""
    return out.with_name(f"{out.name}.journal")


class Output:
    """An output file and its journal. Made, it knows what is finished; `open` makes it ready for more, and
    only then are files touched. The caller holds the lock.
    """

    def __init__(
        self,
        out: Path,
        settings: Settings,
        visit: Visitor,
        *,
        names: Settings | None = None,
        restart: bool = False,
    ) -> None:
        """Read what is there. FileError if it is not ours, was changed, or was begun with other settings.

        `names` are what people call settings whose values mean nothing to them.
        """
        self.path = out
        self._settings = settings
        self._names = names or {}
        self._restart = restart
        self._loaded: Settings = {}
        self._loaded_then: Settings | None = None  # None: there are no records yet
        self._descriptors: tuple[int, int] | None = None
        self._extent: _Extent | None = None  # None: it is yet to be begun
        self._owes_sync = False
        if restart:
            return
        header, has_lines = _read_header(journal_path(out))
        _check_files(out, has_header=header is not None, has_lines=has_lines)
        if header is None or not has_lines:
            return
        self._check_settings(header.settings, settings, header.names)
        self._extent = _recover(out, journal_path(out), header, visit)
        self._loaded_then = header.loaded

    def require(self, loaded: Settings) -> None:
        """Settings that are known once the model is loaded. FileError if there are records of others."""
        if self._loaded_then is not None:
            self._check_settings(self._loaded_then, loaded, {})
        self._loaded = loaded

    def _check_settings(self, then: Settings, now: Settings, names_then: Settings) -> None:
        changed = [name for name in {**then, **now} if _word(then, name) != _word(now, name)]
        if not changed:
            return
        changes = []
        for name in changed[:_MOST_SHOWN]:
            before, after = _word({**then, **names_then}, name), _word({**now, **self._names}, name)
            changes.append(
                f"{name}: " + (f"{before} then, {after} now" if before != after else f"{after} has changed")
            )
        if len(changed) > _MOST_SHOWN:
            changes.append(f"and {len(changed) - _MOST_SHOWN} more")
        raise FileError(
            f"the output was begun with another {'model' if 'model' in changed else 'setting'}"
            f" ({'; '.join(changes)})",
            where=self.path,
            remedy="use what it was begun with, or start over: --restart",
        )

    def open(self) -> None:
        """Cut off what is torn, or begin; what `restart` replaces is removed now.

        FileError if somebody else has written the output meanwhile, or the disk cannot take it.
        """
        if self._extent is None:
            if not self._restart:
                header, has_lines = _read_header(journal_path(self.path))
                _check_files(self.path, has_header=header is not None, has_lines=has_lines)
            self._extent = _begin(self.path, self._settings, self._loaded, self._names)
        flags = os.O_WRONLY | os.O_APPEND
        self._descriptors = os.open(self.path, flags), os.open(journal_path(self.path), flags)
        with _telling(self.path):
            output, journal = self._descriptors
            _cut(output, self._extent.output)
            # What a killed run wrote may be in the page cache alone. The journal is cut after this: it must
            # explain every byte that the output may have after a power failure.
            durable.sync(output)
            _cut(journal, self._extent.journal)
            if not self._extent.committed:
                self._commit(self._extent)
            durable.sync(journal)
            self._owes_sync = False

    def append(self, records: Sequence[Record]) -> None:
        """Write and sync a group: when this returns, it counts. FileError if the disk cannot take it."""
        with _telling(self.path):
            try:
                self._write_group(records)
            except OSError:
                # Also after a failed sync: the kernel may show pages that never reached the disk.
                self._owes_sync = False
                extent, (output, journal) = self._opened()
                _cut(output, extent.output)
                _cut(journal, extent.journal)
                raise

    def _write_group(self, records: Sequence[Record]) -> None:
        extent, (output, journal) = self._opened()
        lines, check = [], extent.check
        for record in records:
            entry = Entry(record.key, len(record.content), zlib.crc32(record.content), record.failure)
            line, check = journal_lines.entry_line(entry, check)
            lines.append(line)
        announcement = b"".join(lines)
        _write(journal, announcement)
        durable.sync(journal)
        reach("batch.announced")
        for record in records:
            _write(output, record.content)
            reach("batch.record")
        reach("batch.written")
        durable.sync(output)
        reach("batch.synced")
        n_bytes = sum(len(record.content) for record in records)
        self._commit(_Extent(extent.output + n_bytes, extent.journal + len(announcement), check))

    def _commit(self, extent: _Extent) -> None:
        """Mark what is synced as finished."""
        _, (_, journal) = self._opened()
        mark, check = journal_lines.mark_line(extent.check)
        _write(journal, mark)
        reach("batch.committed")
        self._extent = _Extent(extent.output, extent.journal + len(mark), check)
        self._owes_sync = True

    def _opened(self) -> tuple[_Extent, tuple[int, int]]:
        if self._extent is None or self._descriptors is None:
            raise ValueError("the output is not open")
        return self._extent, self._descriptors

    def close(self) -> None:
        """Make the last mark durable, and release both files; they stay on the disk."""
        descriptors, self._descriptors = self._descriptors, None
        if descriptors is None:
            return
        try:
            if self._owes_sync:
                with _telling(self.path):
                    durable.sync(descriptors[1])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _telling(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else FileError
        raise kind(f"the output cannot be written: {error.strerror}", where=out) from error


def _cut(descriptor: int, size: int) -> None:
    """Take away what does not count."""
    if os.fstat(descriptor).st_size != size:
        os.ftruncate(descriptor, size)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _word(settings: Settings, name: str) -> str:
    word = settings.get(name, _MISSING)
    return _MISSING if word == str(None) else str(word)


def _check_files(out: Path, *, has_header: bool, has_lines: bool) -> None:
    if not out.exists() and has_lines:
        raise FileError(
            "the output is missing, but its journal is there",
            where=out,
            remedy="put it back, or start over: --restart",
        )
    if not has_lines and out.exists() and out.stat().st_size:
        missing = "its journal knows no record" if has_header else "there is no journal of it"
        replaceable = ", or replace it with --restart" if has_header or _may_be_records(out) else ""
        raise FileError(f"the output exists, but {missing}", where=out, remedy=f"name another{replaceable}")


def _may_be_records(out: Path) -> bool:
    """Whether a file begins like a batch's output: --restart is for those, not for whatever was named."""
    with out.open("rb") as file:
        return file.read(1) in (b"", b"{")


def _begin(out: Path, settings: Settings, loaded: Settings, names: Settings) -> _Extent:
    """New files in the place of those that may be there."""
    journal = journal_path(out)
    if out.exists() and not journal.exists() and not _may_be_records(out):
        raise FileError(
            "the output exists, and no batch wrote it",
            where=out,
            remedy="name another, or remove it yourself",
        )
    journal.unlink(missing_ok=True)
    out.unlink(missing_ok=True)
    os.close(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    durable.sync_folder(out.absolute().parent)
    reach("batch.created")
    header, check = journal_lines.header_lines(settings, loaded, names)
    # One name, whichever process writes it: what a kill leaves is replaced by the next run.
    temporary = journal.with_name(f".{journal.name}.part")
    with temporary.open("wb") as file:
        file.write(header)
        file.flush()
        durable.sync(file.fileno())
    durable.replace(temporary, journal)
    reach("batch.begun")
    return _Extent(0, len(header), check)


def _read_header(journal: Path) -> tuple[Header | None, bool]:
    """The journal's header, None without a journal; and whether anything follows it."""
    try:
        with journal.open("rb") as file:
            header = journal_lines.read_header(file)
            has_lines = bool(file.read(1))
    except FileNotFoundError:
        return None, False
    except NoJournalError as error:
        raise _damaged(journal) from error
    except OtherVersionError as error:
        raise FileError(
            "the journal was written by another version of dsmoe-batch",
            where=journal,
            remedy="finish the batch with that version, or start over: --restart",
        ) from error
    return header, has_lines


def _damaged(journal: Path) -> FileError:
    return FileError(
        "the journal is damaged", where=journal, remedy="put it back from a copy, or start over: --restart"
    )


def _recover(out: Path, journal: Path, header: Header, visit: Visitor) -> _Extent:
    """Compare the output with its journal, record by record. FileError unless all that was committed is
    whole, and nothing is there that was not announced.
    """
    extent = _Extent(0, header.size, header.check)
    n_committed = n_announced = 0
    with out.open("rb") as output, journal.open("rb") as file:
        file.seek(header.size)
        n_bytes = os.fstat(output.fileno()).st_size
        for line in journal_lines.read_lines(file, header.check):
            is_whole = extent.output == n_announced
            if line.entry is None:
                if not is_whole:
                    raise _changed(out)
                n_committed = n_announced
                extent = _Extent(n_announced, extent.journal + line.size, line.check)
                continue
            n_announced += line.entry.length
            if is_whole and n_announced <= n_bytes and _holds(output, line.entry):
                visit(line.entry.key, line.entry.failure)
                extent = _Extent(n_announced, extent.journal + line.size, line.check, committed=False)
        rest = journal_lines.read_rest(file)
    whole = extent.output == n_announced
    if n_bytes > n_announced or rest.has_mark or (rest.has_line_end and not whole and n_bytes > n_committed):
        raise _changed(out) if rest.is_empty else _damaged(journal)
    return extent


def _changed(out: Path) -> FileError:
    return FileError(
        "the output is not what its journal says",
        where=out,
        remedy="put it back as it was, or start over: --restart",
    )


def _holds(output: BinaryIO, entry: Entry) -> bool:
    content = output.read(entry.length)
    return len(content) == entry.length and zlib.crc32(content) == entry.checksum
