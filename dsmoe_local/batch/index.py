"""The index of a batch: the offset of each input line, which lines have a record, and the order of the work.

It is a private SQLite database that is discarded after the run. It holds offsets, hashes and costs, no text.
SQLite keeps it in memory while it is small and moves it to a temporary file when it grows, so memory does not
depend on the number of lines.
"""

from __future__ import annotations

import itertools
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dsmoe_local.base.errors import DsmoeError, FileError, FormatError, InterruptedRunError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Note, Started
from dsmoe_local.base.text import count, safe_line
from dsmoe_local.batch.lines import Key, Line
from dsmoe_local.batch.requests import model_named, request_of
from dsmoe_local.batch.sources import Sources, Span
from dsmoe_local.batch.workload import (
    HASH_BYTES,
    PREFIX_LENGTHS,
    WorkloadMeter,
    cost,
    prefix_hashes,
    shared_bytes,
)
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.requests import RequestDefaults

_REPORT_BYTES = 1 << 20
_BLOCK = 256  # rows that are read at once: each query hands the GIL to other threads
_BUFFERED = 1024  # rows that are inserted at once
# `position` is the index of a line in the input, from 0; `record` the number of its record, from 1, or NULL.
# `task` is the index of a line without a record in the order of the work, from 0; `shared` the bytes of its
# prefix that it shares with the task before. The transaction is never committed: nothing outlives the
# connection.
_SCHEMA = """
PRAGMA journal_mode = OFF;
CREATE TABLE line (
    position INTEGER PRIMARY KEY,
    number INTEGER, offset INTEGER, length INTEGER,
    id BLOB, content BLOB,
    prefixes BLOB, cost INTEGER,
    record INTEGER
);
CREATE TABLE record (number INTEGER PRIMARY KEY, id BLOB, content BLOB, failure TEXT, n_bytes INTEGER);
CREATE TABLE work (task INTEGER PRIMARY KEY, position INTEGER, shared INTEGER);
BEGIN;
"""
_ADD_LINE = "INSERT INTO line VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL)"
_ADD_WORK = "INSERT INTO work VALUES (?, ?, ?)"
_ADD_RECORD = "INSERT INTO record (id, content, failure, n_bytes) VALUES (?, ?, ?, ?)"
_CHANGED = """
SELECT line.number, offset, length FROM record JOIN line ON line.id = record.id WHERE NOT EXISTS (
    SELECT 1 FROM line AS same WHERE same.id = record.id AND same.content = record.content
) ORDER BY position LIMIT 1
"""
_FOREIGN = "SELECT count(*) FROM record WHERE NOT EXISTS (SELECT 1 FROM line WHERE line.id = record.id)"
# Lines that were corrected, and got another id, no longer count as failed.
_FAILURES = """
SELECT failure, count(*) FROM line JOIN record ON record.number = line.record
WHERE failure != '' GROUP BY failure
"""
# The lines that have a record come first, and their records are in the same order.
_IN_ORDER = """
SELECT NOT EXISTS (
    SELECT 1 FROM (SELECT record, lag(record, 1, 0) OVER (ORDER BY position) AS before FROM line)
    WHERE record IS NOT NULL AND (record > before) IS NOT TRUE
)
"""
# Lines with a common prefix form a group, in which lines with a longer common prefix form a group, and so on.
# Groups, and lines within an innermost group, are sorted by falling cost, so that the last replies are short.
_GROUPS = ", ".join(
    f"max(cost) OVER (PARTITION BY substr(prefixes, 1, {n})) DESC, substr(prefixes, 1, {n})"
    for n in range(HASH_BYTES, len(PREFIX_LENGTHS) * HASH_BYTES + 1, HASH_BYTES)
)
_LEFT = "SELECT position, prefixes, length FROM line WHERE record IS NULL ORDER BY"
_ENTRIES = """
SELECT shared, number, offset, length, id, content FROM work JOIN line USING (position)
WHERE task BETWEEN ? AND ? ORDER BY task
"""
# Where the records are in the output, in the order of the input; those without a line come last.
_RECORDS = """
SELECT offset, n_bytes FROM (
    SELECT number, n_bytes, sum(n_bytes) OVER (ORDER BY number) - n_bytes AS offset FROM record
) AS stored LEFT JOIN (SELECT position, record FROM line) AS own ON own.record = stored.number
ORDER BY position IS NULL, position, number
"""
# The hashes that several lines have, in the order of the first of these lines.
_REPEATED = "SELECT id FROM line GROUP BY id HAVING count(*) > 1 ORDER BY min(position)"
_LINES_OF = "SELECT number, offset, length FROM line WHERE id = ? ORDER BY position"
# The errors of a full, missing or failing disk.
_DISK_ERRORS = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR}


@dataclass(frozen=True, slots=True)
class Resumed:
    """How the records of earlier runs relate to the input.

    `changed_line` is the place of a line that has changed since its record was written, if there is one.
    `n_foreign` records have no line in the input. `failures` counts the lines whose record has no reply, by
    kind. `in_order`: the records are those of the input's first lines, in the order of the input.
    """

    changed_line: Span | None
    n_foreign: int
    failures: Mapping[str, int]
    in_order: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """The work that is left: `n_lines` lines without a record. `shared_bytes` estimates how many bytes of
    their prompts belong to a prefix that a prompt shares with the one before it.
    """

    n_lines: int
    shared_bytes: int


class Index:
    """The lines of an input, and the records of earlier runs.

    `model_named` is a model that a line asks for; `workload` covers all lines. Methods raise FileError if
    SQLite fails, for example because there is no room for temporary files.
    """

    def __init__(self) -> None:
        self.model_named = ""
        self.workload = WorkloadMeter()
        self._n_lines = 0
        self._buffer: list[tuple[object, ...]] = []
        self._block: dict[int, tuple[Span, Key]] = {}
        # Several threads may use the connection, one after the other.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        with _explained():
            self._database.executescript(_SCHEMA)

    def __len__(self) -> int:
        return self._n_lines

    def close(self) -> None:
        """Discard the index."""
        self._database.close()

    def add(self, span: Span, key: Key, prefixes: bytes, cost: int) -> None:
        """Append a line. `finish` must follow the last one."""
        place = (self._n_lines, span.number, span.offset, span.length)
        self._append(_ADD_LINE, *place, *_blobs(key), prefixes, cost)
        self._n_lines += 1

    def finish(self) -> None:
        """End the list of lines."""
        self._insert(_ADD_LINE)
        self._execute("CREATE INDEX line_by_id ON line (id)")

    def equal_hashes(self) -> Iterator[Iterator[Span]]:
        """Yield the lines of each id hash that occurs more than once, without reading all of them first."""
        for (id_hash,) in self._rows(_REPEATED):
            yield (Span(*row) for row in self._rows(_LINES_OF, id_hash))

    def forget_records(self) -> None:
        """Remove all records, so that others can be added."""
        self._execute("DELETE FROM record")

    def add_record(self, key: Key, failure: str = "", n_bytes: int = 0) -> None:
        """Append a record that is written, with its kind of failure if it has no reply, and its size.

        `resume` must follow the last one.
        """
        self._append(_ADD_RECORD, *_blobs(key), failure, n_bytes)

    def resume(self) -> Resumed:
        """End the list of records and mark the lines that have one."""
        self._insert(_ADD_RECORD)
        self._execute(
            "UPDATE line SET record = record.number FROM record"
            " WHERE record.id = line.id AND record.content = line.content"
        )
        changed = next((Span(*row) for row in self._rows(_CHANGED)), None)
        n_foreign, in_order = (value for query in (_FOREIGN, _IN_ORDER) for (value,) in self._rows(query))
        return Resumed(changed, n_foreign, dict(self._rows(_FAILURES)), bool(in_order))

    def records(self) -> Iterator[tuple[int, int]]:
        """Yield the offset and the size of each record, in the order of the input."""
        yield from self._rows(_RECORDS)

    def plan(self, *, ordered: bool) -> Plan:
        """Put the lines without a record in order, for `entry`; `ordered`: in the order of the input."""
        n_lines = n_shared = 0
        last_prefixes, last_length = b"", 0
        for position, prefixes, length in self._rows(
            f"{_LEFT} position" if ordered else f"{_LEFT} {_GROUPS}, cost DESC, position"
        ):
            shared = min(shared_bytes(last_prefixes, prefixes), last_length, length)
            self._append(_ADD_WORK, n_lines, position, shared)
            n_lines += 1
            n_shared += shared
            last_prefixes, last_length = prefixes, length
        self._insert(_ADD_WORK)
        return Plan(n_lines, n_shared)

    def entry(self, task: int) -> tuple[Span, Key]:
        """Return the span and the key of a task's line. Fast if tasks are read in order."""
        if task not in self._block:
            found = zip(itertools.count(task), self._entries(task, _BLOCK))
            self._block = {number: entry for number, (entry, _) in found}
        return self._block[task]

    def group(self, task: int, n_most: int) -> list[tuple[Span, Key]]:
        """Return the entries of a task and those after it, up to `n_most`, but at least half as many.

        The group ends where neighbours have the shortest common prefix.
        """
        found = list(self._entries(task, n_most + 1))
        end = len(found)
        if end > n_most:
            end = min(range(n_most, max(1, n_most // 2) - 1, -1), key=lambda number: found[number][1])
        return [entry for entry, _ in found[:end]]

    def _entries(self, task: int, n_most: int) -> Iterator[tuple[tuple[Span, Key], int]]:
        """Yield the entries of up to `n_most` tasks, each with the bytes shared with the task before."""
        for shared, *span, id_hash, content in self._rows(_ENTRIES, task, task + n_most - 1):
            yield (Span(*span), Key(int.from_bytes(id_hash), int.from_bytes(content))), shared

    def _append(self, statement: str, *values: object) -> None:
        """Add a row with the others of its statement. `_insert` must follow the last one."""
        self._buffer.append(values)
        if len(self._buffer) == _BUFFERED:
            self._insert(statement)

    def _insert(self, statement: str) -> None:
        with _explained():
            self._database.executemany(statement, self._buffer)
        self._buffer.clear()

    def _execute(self, statement: str) -> None:
        with _explained():
            self._database.execute(statement)

    def _rows(self, query: str, *values: object) -> Iterator[Any]:
        # SQLite may fail at any row, so all of them are fetched inside the context.
        with _explained():
            cursor = self._database.execute(query, values)
            while rows := cursor.fetchmany(_BLOCK):
                yield from rows


@contextmanager
def _explained() -> Iterator[None]:
    """Raise SQLite errors as FileError."""
    try:
        yield
    except sqlite3.Error as error:
        # The low byte is the kind of error. The sqlite3 module's own errors have no code.
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DISK_ERRORS:
            raise FileError(
                f"the index of the input cannot be stored: {error}",
                where="the folder for temporary files",
                remedy="free some space, or set TMPDIR to a folder on another disk",
            ) from error
        raise FileError(
            f"SQLite failed while it used the index of the input: {error}",
            where=f"SQLite {sqlite3.sqlite_version}",
            remedy="run the command again; please report the error if it comes back",
        ) from error


def _blobs(key: Key) -> tuple[bytes, bytes]:
    # SQLite's integers are signed, so an unsigned 64-bit hash may not fit.
    return key.id.to_bytes(8), key.content.to_bytes(8)


def build_index(
    sources: Sources, defaults: RequestDefaults, listen: Listener, stop: threading.Event
) -> Index:
    """Read the inputs once. The caller closes the index.

    FormatError if two lines have the same id (their records could not be told apart), if no line can be read,
    or if no line has a field that --keep names. InterruptedRunError if `stop` is set.
    """
    index = Index()
    try:
        _fill(index, sources, defaults, listen, stop)
    except BaseException:
        index.close()
        raise
    return index


def _fill(
    index: Index, sources: Sources, defaults: RequestDefaults, listen: Listener, stop: threading.Event
) -> None:
    listen(Started("reading", sources.n_bytes))
    reported = n_unlimited = 0
    check = _InputCheck()
    for span, line in sources.lines():
        check.add(span, line)
        try:
            request = request_of(line, defaults)
        except DsmoeError:
            # The line becomes an error record without the engine.
            index.add(span, line.key, b"", 0)
        else:
            index.workload.add(request)
            index.add(span, line.key, prefix_hashes(request.prompt), cost(request))
            n_unlimited += request.max_tokens is None and bool(request.json_schema or request.grammar)
        index.model_named = index.model_named or model_named(line)
        if span.offset + span.length - reported >= _REPORT_BYTES:
            listen(Advanced(span.offset + span.length - reported))
            reported = span.offset + span.length
            if stop.is_set():
                raise InterruptedRunError("interrupted: the input was not read to its end")
    check.finish(sources, len(index))
    index.finish()
    _check_ids(sources, index.equal_hashes())
    listen(Finished("reading"))
    if n_unlimited:
        listen(
            Note(
                f"{count(n_unlimited, 'request')} with a schema or grammar but no max_tokens:"
                " a reply may go on until the context is full; -n N limits it"
            )
        )


class _InputCheck:
    """Detects an input that is wrong as a whole. That is one error, not an error record for each line."""

    def __init__(self) -> None:
        self._first_error: tuple[Span, RequestError] | None = None
        self._any_valid = False
        self._missing: set[str] | None = None

    def add(self, span: Span, line: Line) -> None:
        if self._missing is None:
            self._missing = set(line.kept)
        if line.error is None:
            self._any_valid = True
        elif self._first_error is None:
            self._first_error = span, line.error
        if self._missing:
            self._missing -= {name for name, value in line.kept.items() if value is not None}

    def finish(self, sources: Sources, n_lines: int) -> None:
        if self._first_error is not None and not self._any_valid:
            span, error = self._first_error
            raise FormatError(
                f"no line of the input can be read: {error.what}",
                where=f"{sources.place(span)} of {count(n_lines, 'line')}",
                remedy="use --text if each line is a prompt" if error.kind == "not_json" else error.remedy,
            )
        if self._missing:
            raise FormatError(
                f"no line has the field {min(self._missing)!r}, which --keep names",
                where=sources.shown,
                remedy="correct the name, or leave it out of --keep",
            )


def _check_ids(sources: Sources, groups: Iterator[Iterator[Span]]) -> None:
    """FormatError if two lines of a group have the same id. Different ids may have the same hash."""
    for group in groups:
        found: dict[str, Span] = {}
        for span in group:
            line = sources.line(span)
            if line.id in found:
                raise FormatError(
                    f"the id {safe_line(line.id, 60)!r} occurs twice",
                    where=f"{sources.place(found[line.id])} and {line.place}",
                    remedy="give every line its own id, or none",
                )
            found[line.id] = span
