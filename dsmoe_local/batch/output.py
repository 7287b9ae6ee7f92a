"""The output of a batch. After a kill or a power failure every record is whole and counts once.

For each group of records: the journal gets an entry for each and is synced; the records are appended to the
output, which is synced; then the journal gets a commit mark, and the group counts. The mark is not synced by
itself: the sync of the next group's entries includes it, and `close` syncs the last one. If a power failure
removes a mark, the records before it are still whole.

So the output contains no byte that the journal does not explain, and only what follows the last mark can be
incomplete. `open` truncates both files after the last whole record; any other difference is an error.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError
from dsmoe_local.base.faults import reach
from dsmoe_local.batch import journal
from dsmoe_local.batch.journal import Extent, Header, Settings, Visitor, journal_path
from dsmoe_local.batch.lines import Key

_NOT_SET = "not set"
_MAX_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Record:
    """A line of output to be written. `failure` is its kind of failure, or empty if it has a reply."""

    key: Key
    content: bytes
    failure: str = ""


@dataclass(slots=True)
class _OpenFiles:
    """The descriptors of both files, and up to where the files are valid."""

    output: int
    journal: int
    extent: Extent
    needs_sync: bool = False

    def truncate(self) -> None:
        """Remove what is not valid. The journal comes last: it must explain every byte of the output."""
        _truncate(self.output, self.extent.output)
        _truncate(self.journal, self.extent.journal)


class Output:
    """An output and its journal. The constructor only reads, `open` prepares for writing.

    The caller holds the lock of the output.
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
        """Read the records that exist, unless `restart`.

        `names` gives the text that messages show for a setting whose value is a digest. FileError if the
        output is not that of a batch, was changed, or was started with other settings.
        """
        self.path = out
        self._settings = settings
        self._names = names or {}
        self._restart = restart
        self._loaded: Settings = {}
        self._loaded_before: Settings | None = None  # None: there are no records
        self._extent: Extent | None = None  # None: `open` creates the files
        self._files: _OpenFiles | None = None
        if restart:
            return
        header = _read_header(out)
        if header is None or not header.has_lines:
            return
        self._check_settings(header.settings, settings, header.names)
        self._extent = journal.compare(out, visit)
        self._loaded_before = header.loaded

    @property
    def fingerprint(self) -> str:
        """Identifies the records, all of which are written: the journal's size and checksum."""
        files = self._files
        if files is None:
            raise ValueError("the output is not open")
        return f"{files.extent.journal}-{files.extent.checksum:08x}"

    def require(self, loaded: Settings) -> None:
        """Set the settings that are known once the model is loaded. FileError if they have changed."""
        if self._loaded_before is not None:
            self._check_settings(self._loaded_before, loaded, {})
        self._loaded = loaded

    def _check_settings(self, before: Settings, now: Settings, names_before: Settings) -> None:
        changed = [name for name in {**before, **now} if _shown(before, name) != _shown(now, name)]
        if not changed:
            return
        changes = []
        for name in changed[:_MAX_SHOWN]:
            old, new = _shown({**before, **names_before}, name), _shown({**now, **self._names}, name)
            changes.append(f"{name}: " + (f"{old} then, {new} now" if old != new else f"{new} has changed"))
        if len(changed) > _MAX_SHOWN:
            changes.append(f"and {len(changed) - _MAX_SHOWN} more")
        raise FileError(
            f"the output was started with another {'model' if 'model' in changed else 'setting'}"
            f" ({'; '.join(changes)})",
            where=self.path,
            remedy="use the same as before, or start over: --restart",
        )

    def open(self) -> None:
        """Truncate what a kill left incomplete, or create the files; `restart` replaces them.

        FileError if another program has written the output in the meantime, or the disk fails.
        """
        extent = self._extent
        if extent is None:
            if not self._restart:
                _read_header(self.path)
            extent = _create(self.path, Header(self._settings, self._loaded, self._names))
        flags = os.O_WRONLY | os.O_APPEND
        self._files = files = _OpenFiles(
            os.open(self.path, flags), os.open(journal_path(self.path), flags), extent
        )
        with durable.output_errors(self.path):
            _truncate(files.output, extent.output)
            # What a killed run wrote may only be in the page cache. The journal is truncated after this sync:
            # it must explain every byte that the output may have after a power failure.
            durable.sync(files.output)
            _truncate(files.journal, extent.journal)
            if not extent.committed:
                _commit(files, extent)
            durable.sync(files.journal)
            files.needs_sync = False

    def append(self, records: Sequence[Record]) -> None:
        """Write and sync a group of records: they count when this returns. FileError if the disk fails."""
        files = self._files
        if files is None:
            raise ValueError("the output is not open")
        with durable.output_errors(self.path):
            try:
                _write_group(files, records)
            except OSError:
                # Also after a failed sync: the page cache may show data that never reached the disk.
                files.needs_sync = False
                files.truncate()
                raise

    def close(self) -> None:
        """Sync the last commit mark and close both files."""
        files, self._files = self._files, None
        if files is None:
            return
        try:
            if files.needs_sync:
                with durable.output_errors(self.path):
                    durable.sync(files.journal)
        finally:
            os.close(files.output)
            os.close(files.journal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write_group(files: _OpenFiles, records: Sequence[Record]) -> None:
    entries, checksum = b"", files.extent.checksum
    for record in records:
        line, checksum = journal.entry_line(record.key, record.content, record.failure, checksum)
        entries += line
    _write(files.journal, entries)
    durable.sync(files.journal)
    reach("batch.announced")
    first, *others = (record.content for record in records)
    _write(files.output, first)
    reach("batch.record")
    # In one call: each gives other threads a chance to keep this one waiting.
    _write(files.output, b"".join(others))
    reach("batch.written")
    durable.sync(files.output)
    reach("batch.synced")
    n_bytes = sum(len(record.content) for record in records)
    _commit(files, Extent(files.extent.output + n_bytes, files.extent.journal + len(entries), checksum))


def _commit(files: _OpenFiles, extent: Extent) -> None:
    """Append a commit mark for records that are synced."""
    mark, checksum = journal.mark_line(extent.checksum)
    _write(files.journal, mark)
    reach("batch.committed")
    files.extent = Extent(extent.output, extent.journal + len(mark), checksum)
    files.needs_sync = True


def _truncate(descriptor: int, size: int) -> None:
    if os.fstat(descriptor).st_size != size:
        os.ftruncate(descriptor, size)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _shown(settings: Settings, name: str) -> str:
    value = str(settings.get(name))
    return _NOT_SET if value == str(None) else value


def _read_header(out: Path) -> Header | None:
    """Read the journal's header. FileError if only one of the two files has records."""
    header = journal.read_header(journal_path(out))
    has_lines = header is not None and header.has_lines
    if not out.exists() and has_lines:
        raise FileError(
            "the output is missing, but its journal exists",
            where=out,
            remedy="put it back, or start over: --restart",
        )
    if not has_lines and out.exists() and out.stat().st_size:
        missing = "it has no journal" if header is None else "its journal has no record"
        replaceable = ", or replace it with --restart" if header is not None or _may_be_records(out) else ""
        raise FileError(f"the output exists, but {missing}", where=out, remedy=f"name another{replaceable}")
    return header


def _may_be_records(out: Path) -> bool:
    """Return True if a file starts like an output. --restart replaces no other file."""
    with out.open("rb") as file:
        return file.read(1) in (b"", b"{")


def _create(out: Path, header: Header) -> Extent:
    """Create an empty output and its journal, replacing those that exist."""
    path = journal_path(out)
    if out.exists() and not path.exists() and not _may_be_records(out):
        raise FileError(
            "the output exists, and it is not the output of a batch",
            where=out,
            remedy="name another, or remove it yourself",
        )
    path.unlink(missing_ok=True)
    out.unlink(missing_ok=True)
    os.close(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    durable.sync_folder(out.absolute().parent)
    reach("batch.created")
    line, checksum = journal.header_line(header)
    # A fixed name, so that the next run replaces what a kill leaves behind.
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        file.write(line)
        file.flush()
        durable.sync(file.fileno())
    durable.replace(temporary, path)
    reach("batch.begun")
    return Extent(0, len(line), checksum)
