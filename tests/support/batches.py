"""Batches for tests: files of lines, runs of them, and what came out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsmoe_local.base.progress import Listener, ignore
from dsmoe_local.batch.job import BatchOptions
from dsmoe_local.batch.requests import BatchDefaults, request_of
from dsmoe_local.batch.run import run_batch
from dsmoe_local.batch.sources import InputForm, Source
from dsmoe_local.batch.summary import BatchSummary
from dsmoe_local.engine.types import Request, SamplingParameters, TextEngine

GREEDY = BatchDefaults(SamplingParameters(temperature=0))


def write_lines(path: Path, lines: Iterable[str | bytes | dict[str, Any]]) -> Path:
    """A file of lines, each ended."""
    raw = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in raw))
    return path


def batch(folder: Path, *lines: str | bytes | dict[str, Any], **options: Any) -> BatchOptions:
    """A batch of these lines, in the simple form unless said otherwise."""
    source = write_lines(folder / "in.jsonl", lines)
    return replace(BatchOptions(source, folder / "out.jsonl", GREEDY, form="simple"), **options)


def answer(engine: TextEngine, options: BatchOptions, listen: Listener = ignore) -> list[dict[str, Any]]:
    """Run it and read its records."""
    run_batch(engine, options, listen)
    return records(options.out)


def summary_of(engine: TextEngine, options: BatchOptions) -> BatchSummary:
    """Run it and return its summary."""
    return run_batch(engine, options)


def records(path: Path) -> list[dict[str, Any]]:
    """Every record of an output; its last line must be whole."""
    content = path.read_bytes()
    assert content.endswith(b"\n") or not content
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


def by_id(found: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Records by their ids, which must differ."""
    listed = list(found)
    named = {record.get("custom_id", record["id"]): record for record in listed}
    assert len(named) == len(listed)
    return named


def requests(
    path: Path, form: InputForm | None = None, defaults: BatchDefaults = GREEDY
) -> list[Callable[[], Request]]:
    """What each line of a file makes; calling raises what is wrong with it."""
    source = Source(path, form or InputForm())
    try:
        found = [source.line(span.number, raw) for span, raw in source.spans()]
    finally:
        source.close()
    return [lambda line=line: request_of(line, defaults) for line in found]  # type: ignore[misc]
