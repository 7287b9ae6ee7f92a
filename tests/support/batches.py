"""Batches for tests: files of lines, runs, and their records; and outputs that are written without a run."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from dsmoe_local.base.progress import Listener, ignore
from dsmoe_local.batch.input_form import InputForm
from dsmoe_local.batch.job import BatchOptions, prepared
from dsmoe_local.batch.lines import Key
from dsmoe_local.batch.output import Output, Record
from dsmoe_local.batch.requests import request_of
from dsmoe_local.batch.run import run
from dsmoe_local.batch.sources import Source
from dsmoe_local.batch.summary import BatchSummary
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.types import Request, SamplingParameters
from dsmoe_local.protocol.requests import RequestDefaults

GREEDY = RequestDefaults(SamplingParameters(temperature=0))
OUTPUT_SETTINGS = {"model": "7 bytes abc", "temperature": "0.8"}


def write_lines(path: Path, lines: Iterable[str | bytes | dict[str, Any]]) -> Path:
    """Write a file of lines, each with a line end."""
    raw = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in raw))
    return path


def write_table(path: Path, rows: Sequence[dict[str, Any]] | pa.Table, **options: Any) -> Path:
    """Write a Parquet file. What a row lacks is null."""
    if isinstance(rows, pa.Table):
        table = rows
    else:
        names = dict.fromkeys(name for row in rows for name in row)
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
    parquet.write_table(table, path, **options)
    return path


def to_parquet(options: BatchOptions, **changes: Any) -> BatchOptions:
    """Return a batch whose records become a Parquet file."""
    path = options.out.with_name("out.parquet")
    return replace(options, out=path.with_name("out.parquet.jsonl"), parquet=path, **changes)


def batch(folder: Path, *lines: str | bytes | dict[str, Any], **options: Any) -> BatchOptions:
    """Return a batch of these lines, in the simple format unless `options` say otherwise."""
    source = write_lines(folder / "in.jsonl", lines)
    return replace(BatchOptions([source], folder / "out.jsonl", GREEDY, form="simple"), **options)


def run_batch(
    engine: TextEngine,
    options: BatchOptions,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> BatchSummary:
    """Prepare and run a batch, and return its summary."""
    with prepared(options, listen, stop) as job:
        return run(engine, job, listen, stop)


def answer(engine: TextEngine, options: BatchOptions, listen: Listener = ignore) -> list[dict[str, Any]]:
    """Run a batch and return its records."""
    run_batch(engine, options, listen)
    return records(options.out)


def records(path: Path) -> list[dict[str, Any]]:
    """Return the records of an output, whose last line must be whole."""
    content = path.read_bytes()
    assert content.endswith(b"\n") or not content
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


def by_id(found: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return records by their ids, which must differ."""
    listed = list(found)
    named = {record.get("custom_id", record["id"]): record for record in listed}
    assert len(named) == len(listed)
    return named


def requests(
    path: Path, form: InputForm | None = None, defaults: RequestDefaults = GREEDY
) -> list[Callable[[], Request]]:
    """Return a function for each line of a file. It makes the request, or raises the line's error."""
    source = Source(path, form or InputForm())
    try:
        found = [source.line(span.number, raw) for span, raw in source.spans()]
    finally:
        source.close()
    return [lambda line=line: request_of(line, defaults) for line in found]  # type: ignore[misc]


def record(number: int) -> Record:
    """Return a record whose key, length and failure depend on its number."""
    content = b'{"id": %d, "text": "%b"}\n' % (number, b"word " * (number % 4))
    return Record(Key(number, 2**64 - number), content, "not_json" if number == 3 else "")


def content_of(numbers: Iterable[int]) -> bytes:
    """Return an output with these records."""
    return b"".join(record(number).content for number in numbers)


def open_output(out: Path) -> Output:
    """Open an output for more records."""
    output = Output(out, OUTPUT_SETTINGS, lambda key, failure: None)
    output.open()
    return output


def write_groups(out: Path, groups: Iterable[Sequence[int]]) -> None:
    """Write an output with these groups of records."""
    with open_output(out) as output:
        for group in groups:
            output.append([record(number) for number in group])


def found_in(
    out: Path, *more: int, settings: dict[str, str] = OUTPUT_SETTINGS, restart: bool = False
) -> list[int]:
    """Return the numbers of the records in an output, after which `more` are appended to it."""
    found: list[int] = []

    def visit(key: Key, failure: str) -> None:
        assert (key, failure) == (record(key.id).key, record(key.id).failure)
        found.append(key.id)

    with Output(out, settings, visit, restart=restart) as output:
        output.open()
        if more:
            output.append([record(number) for number in more])
    return found
