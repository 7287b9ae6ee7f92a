"""Write the records of a finished batch as a Parquet file. Needs pyarrow.

The records of `--format simple` become rows, in the order of the input. A request with n > 1 has a row for
each reply.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError, InterruptedRunError
from dsmoe_local.base.faults import reach
from dsmoe_local.base.progress import Advanced, Finished, Listener, Started
from dsmoe_local.batch.parquet_input import needs_pyarrow

if TYPE_CHECKING:
    import pyarrow as pa

_MARK = b"dsmoe_batch"
# A row group ends after this many rows, or bytes in Arrow's form.
_GROUP_ROWS = 1 << 16
_GROUP_BYTES = 64 << 20
# The records that are Python objects at once, in bytes of JSON: objects take about ten times as much.
_CHUNK_BYTES = 1 << 20
_VERIFIED_ROWS = 4096  # rows that are decoded at once
# Fields of a record with a value for each reply if there are several.
_OF_A_REPLY = ("text", "finish_reason", "reasoning_content", "tool_calls", "logprobs")
# Fields of a record that the row of the first reply has alone, so that sums over rows are right.
_OF_A_RECORD = ("usage", "timing")


def schema_of(keep: Sequence[str], mark: str = "") -> pa.Schema:
    """Return the columns of an output. `keep` are the names of --keep; `mark` identifies the records."""
    with needs_pyarrow():
        import pyarrow as pa
    text, whole, real = pa.string(), pa.int64(), pa.float64()
    score = {"token": text, "logprob": real, "bytes": pa.list_(pa.uint8())}
    function = pa.struct({"name": text, "arguments": text})
    columns = {
        "id": text,
        "index": whole,
        "text": text,
        "finish_reason": text,
        "reasoning_content": text,
        "tool_calls": pa.list_(pa.struct({"id": text, "type": text, "function": function})),
        "logprobs": pa.list_(pa.struct({**score, "top_logprobs": pa.list_(pa.struct(score))})),
        "usage": pa.struct(
            {
                **dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), whole),
                "completion_tokens_details": pa.struct({"reasoning_tokens": whole}),
            }
        ),
        "timing": pa.struct(
            dict.fromkeys(("seconds", "prompt_seconds", "completion_seconds", "tokens_per_second"), real)
        ),
        "error": pa.struct({"code": text, "message": text, "line": whole}),
    }
    if keep:
        columns["kept"] = pa.struct(dict.fromkeys(keep, text))
    return pa.schema(columns, {_MARK: mark})


def mark_of(path: Path) -> str | None:
    """Return the `mark` that `write_parquet` stored in a file; None if another program wrote the file."""
    with needs_pyarrow():
        import pyarrow as pa
        from pyarrow import parquet
    try:
        metadata = parquet.read_metadata(path).metadata or {}
    except (pa.ArrowException, OSError):
        return None
    mark = metadata.get(_MARK)
    return None if mark is None else mark.decode("utf-8", "replace")


def interrupted() -> InterruptedRunError:
    """Return the error for a Parquet file that is not written to its end."""
    return InterruptedRunError(
        "interrupted: every record is written, but the Parquet file is not complete",
        remedy="run the same command again to continue",
    )


def write_parquet(
    records: Path,
    places: Iterable[tuple[int, int]],
    final: Path,
    keep: Sequence[str],
    mark: str,
    listen: Listener,
    stop: threading.Event,
) -> None:
    """Write `records` as the Parquet file `final`, which appears as a whole and replaces an existing one.

    `places` are the offset and the size of each record, in the order of the rows. FileError or NoSpaceError
    if it cannot be written, InterruptedRunError.
    """
    from pyarrow import parquet

    schema = schema_of(keep, mark)
    temporary = final.with_name(f".{final.name}.part")
    listen(Started(f"writing {final.name}", records.stat().st_size))
    with durable.output_errors(final), ExitStack() as stack:
        stack.callback(temporary.unlink, missing_ok=True)
        file = stack.enter_context(temporary.open("wb"))
        lines = _lines(stack.enter_context(records.open("rb")), places)
        n_rows = 0
        with parquet.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
            for group in _groups(lines, schema, keep, listen, stop):
                writer.write_table(group)
                n_rows += group.num_rows
        file.flush()
        durable.sync(file.fileno())
        _verify(temporary, n_rows)
        reach("parquet.verified")
        durable.replace(temporary, final)
        reach("parquet.renamed")
    listen(Finished(f"writing {final.name}"))


def _verify(path: Path, n_rows: int) -> None:
    """Decode the whole file. FileError if a checksum is wrong or rows are missing."""
    from pyarrow import ArrowException, parquet

    n_found = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(_VERIFIED_ROWS, use_threads=False):
                n_found += batch.num_rows
    except (ArrowException, OSError) as error:
        raise FileError(f"the output is damaged after writing: {error}", where=path) from error
    if n_found != n_rows:
        raise FileError(f"the output has {n_found:,} of {n_rows:,} rows after writing", where=path)


def _lines(records: BinaryIO, places: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the records at these places."""
    for offset, size in places:
        records.seek(offset)
        yield records.read(size)


def _groups(
    lines: Iterator[bytes], schema: pa.Schema, keep: Sequence[str], listen: Listener, stop: threading.Event
) -> Iterator[pa.Table]:
    """Yield the row groups."""
    from pyarrow import concat_tables

    group: list[pa.Table] = []
    for chunk in _chunks(lines, schema, keep, listen, stop):
        group.append(chunk)
        if sum(part.nbytes for part in group) >= _GROUP_BYTES or sum(map(len, group)) >= _GROUP_ROWS:
            yield concat_tables(group)
            group = []
    if group:
        yield concat_tables(group)


def _chunks(
    lines: Iterator[bytes], schema: pa.Schema, keep: Sequence[str], listen: Listener, stop: threading.Event
) -> Iterator[pa.Table]:
    """Yield the rows of all records, a few at a time."""
    from pyarrow import Table

    rows: list[dict[str, Any]] = []
    n_bytes = 0
    for line in lines:
        rows += _rows(json.loads(line), keep)
        n_bytes += len(line)
        if n_bytes >= _CHUNK_BYTES:
            yield Table.from_pylist(rows, schema)
            listen(Advanced(n_bytes))
            rows, n_bytes = [], 0
            if stop.is_set():
                raise interrupted()
    if rows:
        yield Table.from_pylist(rows, schema)
        listen(Advanced(n_bytes))


def _rows(record: Mapping[str, Any], keep: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of a record: one for each reply."""
    texts = record["text"]
    replies = (
        [record]
        if not isinstance(texts, list)
        else [
            {name: record[name][index] for name in _OF_A_REPLY if name in record}
            for index in range(len(texts))
        ]
    )
    rows = [
        {"id": record["id"], "index": index, **{name: reply.get(name) for name in _OF_A_REPLY}}
        for index, reply in enumerate(replies)
    ]
    rows[0] |= {name: record[name] for name in _OF_A_RECORD} | {"error": record["error"]}
    if keep:
        kept = {name: _kept_text(record["kept"][name]) for name in keep}
        rows = [{**row, "kept": kept} for row in rows]
    return rows


def _kept_text(value: Any) -> str | None:  # noqa: ANN401 - JSON
    """Return a kept value as text: text as it is, other values as JSON."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
