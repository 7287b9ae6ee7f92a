"""Read the rows of a Parquet file as JSON lines, a few at a time. Needs pyarrow."""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dsmoe_local.base.errors import FormatError, InterruptedRunError, MissingExtraError, UsageError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Started
from dsmoe_local.base.text import safe_line
from dsmoe_local.batch.input_form import InputForm
from dsmoe_local.batch.lines import ID_FIELDS
from dsmoe_local.batch.requests import ENVELOPE
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.requests import KNOWN
from dsmoe_local.protocol.strict_json import strict_value

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

SUFFIXES = (".parquet", ".pq")
_MAGIC = b"PAR1"
_MAGICS = (_MAGIC, b"PARE")  # plain; with an encrypted footer, which pyarrow's error explains
_PAGE_BUFFER = 1 << 20
# Rows that are decoded at once, and the bytes that they may take. A single row may take more.
_ROWS = 64
_DECODED_BYTES = 64 << 20
_EXACT = 2**53  # floats below this are exact integers
_PROMPTS = frozenset({"prompt", "messages", "body"})
# Fields that are never text. Arrow cannot store all their values as structs: a text in them is JSON.
_JSON_FIELDS = frozenset(
    {
        *("body", "messages", "tools", "response_format", "structured_outputs"),
        *("logit_bias", "chat_template_kwargs"),
    }
)
# pandas stores the index of a data frame in such columns.
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")


def is_parquet(path: Path, beginning: bytes) -> bool:
    """Return True if a file is a Parquet file by its name or its first bytes."""
    return path.suffix.lower() in SUFFIXES or beginning.startswith(_MAGIC)


@contextmanager
def needs_pyarrow() -> Iterator[None]:
    """Raise MissingExtraError if pyarrow, which the block imports, is not installed."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError("parquet", "pyarrow", "Parquet files") from error


def write_rows(
    source: BinaryIO, shown: str, form: InputForm, target: BinaryIO, listen: Listener, stop: threading.Event
) -> None:
    """Write each row of a Parquet file to `target` as a line of JSON: an object with its columns.

    `shown` is the file's name in messages. Null values are left out. Columns that a template does not use are
    not read. Raises UsageError for a form without fields, MissingExtraError, FormatError if the file is
    damaged or has columns that no request has, OSError, InterruptedRunError.
    """
    if form.text:
        raise UsageError(
            "--text is for lines of text, and a Parquet file has columns",
            where=shown,
            remedy="name the column with the prompt: --template '{column}'",
        )
    source.seek(0)
    beginning = source.read(len(_MAGIC))
    if beginning and beginning not in _MAGICS:
        raise FormatError(
            "the file is not a Parquet file, although its name says so",
            where=shown,
            remedy="if it contains JSON lines or CSV, rename it to ….jsonl or ….csv",
        )
    with needs_pyarrow():
        import pyarrow as pa
    n_rows = 0
    try:
        file = _opened(source)
        columns = _columns(file.schema_arrow, form, shown)
        listen(Started("reading rows", file.metadata.num_rows, unit="rows"))
        for batch in _batches(source, file, columns):
            for row in _rows(batch.select(columns), n_rows, shown):
                values = _as_json(_exact_row(row) if form.template else _request_row(row))
                target.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
            n_rows += batch.num_rows
            listen(Advanced(batch.num_rows))
            if stop.is_set():
                raise InterruptedRunError("interrupted: the input was not read to its end")
    except (pa.ArrowException, OSError, MemoryError, RecursionError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the disk
        place = f"{shown}, after row {n_rows:,}" if n_rows else shown
        reason = safe_line(str(error).partition("\n")[0], 200) or type(error).__name__
        raise FormatError(f"the Parquet file cannot be read: {reason}", where=place) from error
    target.flush()
    listen(Finished("reading rows"))


def _opened(source: BinaryIO, texts_as_dictionaries: Sequence[str] = ()) -> parquet.ParquetFile:
    """Open a Parquet file. The columns `texts_as_dictionaries` are not decoded further than dictionaries."""
    from pyarrow import parquet

    return parquet.ParquetFile(
        source,
        buffer_size=_PAGE_BUFFER,  # reads a column page by page, not as a whole
        pre_buffer=False,
        page_checksum_verification=True,
        arrow_extensions_enabled=False,
        read_dictionary=list(texts_as_dictionaries),
    )


def _batches(source: BinaryIO, file: parquet.ParquetFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of all row groups, a few at a time."""
    leaves = [file.schema.column(index) for index in range(len(file.schema))]
    encoded = _opened(
        source,
        [
            leaf.path
            for leaf in leaves
            if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "DECIMAL"
        ],
    )
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        n_rows = _ROWS
        if group.num_rows and group.total_byte_size > _DECODED_BYTES // _ROWS:
            # A dictionary stores a long prompt once for many rows. This reads the dictionaries with one row.
            n_bytes = group.total_byte_size // group.num_rows
            for first in encoded.iter_batches(1, [number], columns, use_threads=False):
                n_bytes += first.get_total_buffer_size()
                break
            n_rows = min(max(1, _DECODED_BYTES // max(1, n_bytes)), _ROWS)
        yield from file.iter_batches(n_rows, [number], columns, use_threads=False)


def _columns(schema: pa.Schema, form: InputForm, shown: str) -> list[str]:
    """Return the columns to read. FormatError if one is missing, unknown, or of a type that JSON lacks."""
    names = [name for name in schema.names if not _PANDAS_INDEX.fullmatch(name)]
    twice = [name for name, n in Counter(names).items() if n > 1]
    missing = [name for name in form.fields if name not in names and "body" not in names]
    if twice or missing:
        fault = f"the column {twice[0]!r} twice" if twice else f"no column {missing[0]!r}"
        raise FormatError(f"the input has {fault}", where=shown, remedy=f"its columns are {', '.join(names)}")
    if not form.template and not _PROMPTS & set(names):
        column = next(iter(names), "column")
        raise FormatError(
            "the input has no column prompt, messages or body",
            where=f"{shown}, with the columns {', '.join(names)}",
            remedy=f"name the column with the prompt: --template '{{{column}}}'",
        )
    known = {*form.fields, *ID_FIELDS} if form.template else {*form.fields, *ID_FIELDS, *ENVELOPE, *KNOWN}
    unknown = [name for name in names if name not in known]
    if unknown and not form.template:
        raise FormatError(
            f"the column {unknown[0]!r} is not a field of a request",
            where=shown,
            remedy=f"copy it to the records with --keep {unknown[0]}, or leave it out of the file",
        )
    used = [name for name in names if name in known]
    for name in used:
        if fault := _unsupported(schema.field(name).type):
            raise FormatError(
                f"the column {name!r} has the type {fault}, which JSON lacks",
                where=shown,
                remedy="store it as text, numbers, lists or structs",
            )
    return used


def _unsupported(kind: pa.DataType) -> str:
    """Return the name of a type that is not a form of JSON; empty if there is none in `kind`."""
    from pyarrow import types

    scalar = (
        *(types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_decimal),
        *(types.is_string, types.is_large_string, types.is_string_view),
    )
    nested = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)
    if any(is_kind(kind) for is_kind in scalar):
        return ""
    if any(is_kind(kind) for is_kind in nested) or types.is_dictionary(kind):
        return _unsupported(kind.value_type)
    if types.is_struct(kind):
        return next(filter(None, (_unsupported(field.type) for field in kind)), "")
    if types.is_map(kind) and (types.is_string(kind.key_type) or types.is_integer(kind.key_type)):
        return _unsupported(kind.item_type)
    return str(kind)


def _rows(batch: pa.RecordBatch, n_before: int, shown: str) -> list[dict[str, Any]]:
    """Return rows as Python values. FormatError names the row and the column of a value that is damaged."""
    try:
        found: list[dict[str, Any]] = batch.to_pylist(maps_as_pydicts="strict")
    except (UnicodeDecodeError, KeyError) as error:
        for index in range(batch.num_rows):
            for name in batch.schema.names:
                try:
                    batch.column(name)[index].as_py(maps_as_pydicts="strict")
                except (UnicodeDecodeError, KeyError) as fault:
                    told = "a key twice" if isinstance(fault, KeyError) else "text that is not UTF-8"
                    raise FormatError(
                        f"the column {name!r} has {told}", where=f"{shown}, row {n_before + index + 1:,}"
                    ) from error
        raise
    return found


def _exact_row(row: dict[str, Any]) -> dict[str, Any]:
    """Replace decimals with a fraction by text, because floats would round them."""
    return {
        name: f"{value:f}" if isinstance(value, Decimal) and value.as_tuple().exponent != 0 else value
        for name, value in row.items()
    }


def _request_row(row: dict[str, Any]) -> dict[str, Any]:
    """Parse the fields that may be JSON. Other text stays, and the reader of the field refuses it.

    Decimals stay numbers only in the fields of a request.
    """
    exact = _exact_row(row)
    parsed = {name: (row if name in KNOWN else exact)[name] for name in row}
    for name in _JSON_FIELDS & row.keys():
        if isinstance(row[name], str):
            with suppress(RequestError):
                parsed[name] = strict_value(row[name])
    return parsed


def _as_json(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return a value as JSON has it.

    Objects have no null values. Floats without a fraction become integers, because data frames store integers
    with gaps as floats. NaN and Infinity become text, which the reader of the field refuses.
    """
    if isinstance(value, dict):
        return {str(name): _as_json(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_as_json(part) for part in value]
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return int(value) if value.is_integer() and abs(value) < _EXACT else value
    return value
