"""Parquet as output. pyarrow reads the files; the records in JSON are the oracle."""

from __future__ import annotations

import json
import os
import signal
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from support.batches import (
    GREEDY,
    answer,
    batch,
    records,
    run_batch,
    to_parquet,
    write_lines,
    write_table,
)
from support.fake_engine import FakeEngine
from support.kills import Job, points_of

from dsmoe_local.base.errors import (
    FileError,
    UsageError,
)
from dsmoe_local.base.progress import ignore
from dsmoe_local.batch.job import BatchOptions
from dsmoe_local.batch.journal import journal_path
from dsmoe_local.batch.parquet_output import write_parquet
from dsmoe_local.batch.records import Failure, simple_record
from dsmoe_local.engine.types import CallDelta, FinishReason, TokenLogprob, Usage
from dsmoe_local.protocol.replies import Choice, Reply

N_ROWS = 40


def test_an_empty_table(tmp_path: Path) -> None:
    """Guards: an input without rows that is an error, or has no output."""
    source = write_table(tmp_path / "in.parquet", pa.table({"prompt": pa.array([], pa.string())}))
    options = to_parquet(batch(tmp_path, sources=[source]))
    assert answer(FakeEngine(), options) == []
    assert parquet.read_table(options.parquet).num_rows == 0


def places(records: Path) -> Iterator[tuple[int, int]]:
    """Yield the places of all records, as they are in the file."""
    offset = 0
    with records.open("rb") as file:
        for line in file:
            yield offset, len(line)
            offset += len(line)


def test_rows_have_the_order_of_the_input(tmp_path: Path) -> None:
    """Guards: rows in the order in which replies finish; rows lost or moved by a second run; records without
    a line among the others.
    """
    lines = [{"id": str(n), "prompt": "x" * (1 + n * 7 % 40)} for n in range(30)]
    options = to_parquet(batch(tmp_path, {"id": "old", "prompt": "y"}, *lines[::2]))
    answer(FakeEngine(n_parallel=4), options)
    write_lines(tmp_path / "in.jsonl", lines)
    found = [record["id"] for record in answer(FakeEngine(n_parallel=4), options)]
    expected = [*(line["id"] for line in lines), "old"]
    assert found != expected
    assert sorted(found) == sorted(expected)
    table = parquet.read_table(options.parquet).to_pylist()
    assert [row["id"] for row in table] == expected
    assert [row["text"] for row in table[:-1]] == [line["prompt"] for line in lines]


def everything(name: str, n: int) -> Reply:
    """Return a reply with all that a record can contain."""
    token = TokenLogprob(5, "a", -0.5)
    part = TokenLogprob(6, "\N{REPLACEMENT CHARACTER}", float("-inf"))
    call = CallDelta(0, '{"a": 1}', "call_1", "f")
    choice = Choice("text é", FinishReason.STOP, ((token, (token, part)),), "hm", (call,))
    usage = Usage(3, 1, 4, 0.1, 0.2, None, 2)
    return Reply(name, "m", True, (choice,) * n, (usage,) * n, 1.5)


def test_columns_are_those_of_the_simple_format(tmp_path: Path) -> None:
    """Guards: a part of a record that is missing from the table, or in another row."""
    failure = Failure("c", 3, "invalid_request", "row 3: no", "invalid_request")
    kept = {"label": 3, "source": "web", "none": None}
    found = [
        {**simple_record(outcome), "kept": kept}
        for outcome in (everything("a", 1), everything("b", 2), failure)
    ]
    path = tmp_path / "out.parquet"
    source = write_lines(tmp_path / "out.jsonl", [json.dumps(record) for record in found])
    write_parquet(source, places(source), path, list(kept), "mark", ignore, threading.Event())
    one, first, second, failed = parquet.read_table(path).to_pylist()
    assert one.pop("index") == 0
    assert one == {**found[0], "kept": {"label": "3", "source": "web", "none": None}}
    assert (first["id"], first["index"], second["id"], second["index"]) == ("b", 0, "b", 1)
    for key in ("text", "finish_reason", "reasoning_content", "tool_calls", "logprobs"):
        assert [first[key], second[key]] == found[1][key]
    assert (first["usage"], first["timing"]) == (found[1]["usage"], found[1]["timing"])
    assert (second["usage"], second["timing"], second["kept"]) == (None, None, first["kept"])
    assert {key: value for key, value in failed.items() if value is not None} == {
        "id": "c",
        "index": 0,
        "error": found[2]["error"],
        "kept": one["kept"],
    }


def test_memory_of_a_row_group(tmp_path: Path) -> None:
    """Guards: the records of a whole row group as Python objects, which take ten times as much."""
    record = {**simple_record(everything("a", 1)), "text": "x" * 2000}
    source = tmp_path / "out.jsonl"
    n_records = 4000
    source.write_text((json.dumps(record) + "\n") * n_records)
    tracemalloc.start()
    try:
        stop = threading.Event()
        write_parquet(source, places(source), tmp_path / "out.parquet", [], "mark", ignore, stop)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    metadata = parquet.read_metadata(tmp_path / "out.parquet")
    assert (metadata.num_rows, metadata.num_row_groups) == (n_records, 1)
    assert most < source.stat().st_size / 2


def test_output(tmp_path: Path) -> None:
    """Guards: rows in another order than the records; a table that a second run writes again, or not when
    there are new rows; another program's file replaced.
    """
    lines = [{"id": str(n), "prompt": f"p{n}"} for n in range(20)]
    options = to_parquet(batch(tmp_path, *lines[:12]), ordered=True)
    assert options.parquet is not None
    answer(FakeEngine(n_parallel=4), options)
    before = options.parquet.stat().st_ino
    assert parquet.read_table(options.parquet)["id"].to_pylist() == [str(n) for n in range(12)]
    run_batch(FakeEngine(), options)
    assert options.parquet.stat().st_ino == before
    write_lines(tmp_path / "in.jsonl", lines)
    found = answer(FakeEngine(n_parallel=4), options)
    table = parquet.read_table(options.parquet)
    assert table["text"].to_pylist() == [record["text"] for record in found]
    assert len(found) == 20
    journal_path(options.out).unlink()
    options.out.unlink()
    with pytest.raises(FileError, match=r"journal out\.parquet\.jsonl\.journal does not"):
        run_batch(FakeEngine(), options)
    assert len(answer(FakeEngine(), replace(options, restart=True))) == 20
    write_table(options.parquet, [{"a": 1}])
    with pytest.raises(FileError, match="not the output of a batch"):
        run_batch(FakeEngine(), replace(options, restart=True))


def test_input_and_output_differ(tmp_path: Path) -> None:
    """Guards: a table replaced by the answers to it."""
    options = to_parquet(batch(tmp_path, {"prompt": "a"}))
    answer(FakeEngine(), options)
    assert options.parquet is not None
    with pytest.raises(UsageError, match="same file"):
        run_batch(FakeEngine(), replace(options, sources=[options.parquet]))


def work(source: str, out: str) -> None:
    """The work of a child: Parquet to Parquet."""
    path = Path(out)
    options = BatchOptions([Path(source)], path.with_name(f"{path.name}.jsonl"), GREEDY, "simple", path)
    run_batch(FakeEngine(n_parallel=2), options)


@pytest.mark.parametrize("point", ["batch.written", "batch.complete", *points_of("parquet")])
def test_killed_at_every_point(tmp_path: Path, point: str) -> None:
    """Guards: half a table under its name; rows lost or doubled by a kill; temporary files that stay."""
    rows = [{"id": f"id-{n}", "prompt": f"text {n}"} for n in range(N_ROWS)]
    out = tmp_path / "out.parquet"
    job = Job(work, [str(write_table(tmp_path / "in.parquet", rows, row_group_size=7))], out)
    status, errors = job.run(point)
    assert status == -signal.SIGKILL, errors
    assert not out.exists() or point == "parquet.renamed"
    assert job.run() == (0, "")
    table = parquet.read_table(out)
    assert dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True)) == {
        row["id"]: row["prompt"] for row in rows
    }
    assert table.num_rows == N_ROWS
    assert {path.name for path in tmp_path.iterdir()} == {
        *("in.parquet", "out.parquet", "out.parquet.jsonl", "out.parquet.jsonl.journal")
    }


def test_a_torn_table_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a table that is given its name although the disk has lost a part of it."""
    options = to_parquet(batch(tmp_path, *({"prompt": "a" * n} for n in range(20))))

    part = tmp_path / ".out.parquet.part"

    def lose(descriptor: int) -> None:
        if part.exists() and os.path.samestat(part.stat(), os.fstat(descriptor)):
            os.pwrite(descriptor, bytes(30), 60)

    monkeypatch.setattr("dsmoe_local.batch.parquet_output.durable.sync", lose)
    with pytest.raises(FileError, match="damaged after writing"):
        run_batch(FakeEngine(), options)
    assert not options.parquet or not options.parquet.exists()
    monkeypatch.undo()
    run_batch(FakeEngine(), options)
    assert parquet.read_table(options.parquet).num_rows == len(records(options.out))
