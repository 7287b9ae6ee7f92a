"""Parquet as input. pyarrow writes the files; JSON lines are the oracle."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from support.batches import (
    GREEDY,
    answer,
    batch,
    by_id,
    run_batch,
    to_parquet,
    write_lines,
    write_table,
)
from support.fake_engine import FakeEngine
from support.mutations import Outcome, damaged_bytes, try_mutants

from dsmoe_local.base.errors import (
    DsmoeError,
    FileError,
    FormatError,
    MissingExtraError,
    NoSpaceError,
    UsageError,
)
from dsmoe_local.base.progress import ignore
from dsmoe_local.batch import parquet_input
from dsmoe_local.batch.input_form import InputForm, parse_template
from dsmoe_local.batch.inputs import opened
from dsmoe_local.batch.lines import Line
from dsmoe_local.batch.requests import request_of


@contextmanager
def lines_of(path: Path, form: InputForm) -> Iterator[Iterator[Line]]:
    """Open an input and yield its lines."""
    with opened([path], form, None, path.parent, ignore, threading.Event()) as sources:
        yield (line for _, line in sources.lines())


CHAT = [{"role": "user", "content": "hé", "name": None}, {"role": "assistant", "content": "b", "name": "c"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
FORMAT = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "required": ["a"]}}}
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompts and options with gaps": [
        {"id": "a", "prompt": "x \u2028", "max_tokens": 5, "temperature": 0.5, "stop": ["a", "b"]},
        {"id": "b", "prompt": "y", "seed": 2**40, "n": 2, "logprobs": True},
        {"id": "c", "prompt": "z", "max_tokens": None},
    ],
    "conversations": [
        {"custom_id": 7, "messages": CHAT, "tools": [TOOL], "tool_choice": "auto"},
        {"custom_id": 8, "messages": CHAT[:1], "response_format": FORMAT},
    ],
    "token ids": [{"id": "a", "prompt": [1, 2, 3]}],
    "bodies": [
        {
            "custom_id": "c",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": CHAT, "metadata": {"k": "v"}, "top_p": 1.0},
        },
        {"custom_id": "d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "p"}},
    ],
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_a_line(tmp_path: Path, name: str) -> None:
    """Guards: a column or a nested field that is lost, or means something else than in JSON."""
    rows = ROWS[name]
    lines = write_lines(tmp_path / "in.jsonl", rows)
    table = write_table(tmp_path / "in.parquet", rows)
    with lines_of(table, InputForm()) as found, lines_of(lines, InputForm()) as expected:
        assert [request_of(line, GREEDY) for line in found] == [request_of(line, GREEDY) for line in expected]


def test_column_types(tmp_path: Path) -> None:
    """Guards: a type of Arrow that stands for text or numbers, and is refused."""
    texts = ["one", "two", None]
    columns = {
        "id": pa.array([1.0, 2.0, None]),  # as pandas stores integers with a gap
        "prompt": pa.array(["p", "q", "r"], pa.large_string()),
        "user": pa.array(texts).dictionary_encode(),
        "max_tokens": pa.array([3, None, 5], pa.uint8()),
        "top_p": pa.array([0.5, 1, None], pa.float32()),
        "temperature": pa.array([Decimal("0.7"), None, Decimal("1.0")]),  # what SQL makes of 0.7
        "logit_bias": pa.array([[(5, -1.5)], None, []], pa.map_(pa.int32(), pa.float32())),
        "stop": pa.array([["a"], None, ["b", "c"]], pa.list_view(pa.string_view())),
        "__index_level_0__": pa.array([7, 8, 9]),
    }
    table = write_table(tmp_path / "in.bin", pa.table(columns), row_group_size=2)
    with lines_of(table, InputForm(keep=("user",))) as found:
        first, second, third = (request_of(line, GREEDY) for line in found)
    assert (first.id, first.max_tokens, first.sampling.top_p, first.sampling.temperature) == (
        "1",
        3,
        0.5,
        0.7,
    )
    assert first.logit_bias == ((5, -1.5),)
    assert (second.id, second.max_tokens, second.stop) == ("2", None, ())
    assert (third.id, third.prompt, third.stop) == ("row-3", "r", ("b", "c"))


def test_decimals(tmp_path: Path) -> None:
    """Guards: integers, which SQL databases export as decimals, rounded to floats: ids that become equal, and
    prompts with other numbers.
    """
    whole = [12345678901234567891, 12345678901234567892]
    columns = {
        "id": pa.array(whole, pa.decimal128(38, 0)),
        "price": pa.array([Decimal("1234567890123456.10"), Decimal("5.00")], pa.decimal128(20, 2)),
        "max_tokens": pa.array([3, 5], pa.decimal128(10, 2)),
    }
    table = write_table(tmp_path / "in.parquet", pa.table({**columns, "prompt": ["p", "q"]}))
    with lines_of(table, InputForm(keep=("price",))) as found:
        lines = list(found)
    assert [(line.id, line.kept["price"]) for line in lines] == [
        (str(whole[0]), "1234567890123456.10"),
        (str(whole[1]), "5.00"),
    ]
    assert [request_of(line, GREEDY).max_tokens for line in lines] == [3, 5]
    with lines_of(table, InputForm(template=parse_template("{id}: {price}"))) as found:
        assert next(found).values == {"prompt": "12345678901234567891: 1234567890123456.10"}


def test_a_file_that_is_not_parquet(tmp_path: Path) -> None:
    """Guards: the words of a library about magic bytes."""
    lines = write_lines(tmp_path / "in.parquet", [{"prompt": "a"}])
    with pytest.raises(FormatError, match="not a Parquet file") as refusal:
        run_batch(FakeEngine(), batch(tmp_path, sources=[lines]))
    assert "rename it to ….jsonl" in refusal.value.remedy


def test_json_as_text(tmp_path: Path) -> None:
    """Guards: schemas with empty objects or values of several types, which Arrow cannot store as structs."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    rows: list[dict[str, Any]] = [
        {"id": "a", "messages": CHAT, "tools": [tool]},
        {"id": "b", "prompt": "[1]", "response_format": FORMAT},
    ]
    stored = [
        {key: json.dumps(value) if isinstance(value, dict | list) else value for key, value in row.items()}
        for row in rows
    ]
    lines = write_lines(tmp_path / "in.jsonl", rows)
    with (
        lines_of(write_table(tmp_path / "in.parquet", stored), InputForm()) as found,
        lines_of(lines, InputForm()) as expected,
    ):
        assert [request_of(line, GREEDY) for line in found] == [request_of(line, GREEDY) for line in expected]
    bad = write_table(tmp_path / "bad.parquet", [{"prompt": "a", "logit_bias": '{"5": NaN}'}])
    (record,) = answer(FakeEngine(), batch(tmp_path, sources=[bad]))
    assert record["error"]["message"] == "row 1: logit_bias is not an object of token ids"


def test_values_of_a_wrong_type_name_row_and_column(tmp_path: Path) -> None:
    """Guards: an error that does not say which of a million rows it means; NaN taken for a number."""
    rows = [{"prompt": "a", "temperature": 0.5}, {"prompt": "b", "temperature": float("nan")}]
    options = batch(tmp_path, sources=[write_table(tmp_path / "in.parquet", rows)])
    found = by_id(answer(FakeEngine(), options))
    assert found["row-1"]["text"] == "a"
    assert found["row-2"]["error"]["message"] == "row 2: temperature is not a number"
    rows = [{"prompt": 5}]
    options = replace(options, sources=[write_table(tmp_path / "other.parquet", rows)], restart=True)
    assert answer(FakeEngine(), options)[0]["error"]["message"] == "row 1: prompt is not text"


_TIME = pa.timestamp("us")


@pytest.mark.parametrize(
    ("columns", "form", "told"),
    [
        ({"prompt": ["a"], "label": [1]}, InputForm(), ("the column 'label' is not a field", "--keep label")),
        ({"q": ["a"]}, InputForm(), ("no column prompt, messages or body", "columns q", "--template '{q}'")),
        ({"prompt": pa.array([0], _TIME)}, InputForm(), ("the column 'prompt' has the type timestamp[us]",)),
        ({"prompt": [b"a"]}, InputForm(), ("the column 'prompt' has the type binary",)),
        (
            {"prompt": ["a"], "metadata": pa.array([{"at": 0}], pa.struct({"at": _TIME}))},
            InputForm(),
            ("the column 'metadata' has the type timestamp[us]",),
        ),
        ({"prompt": ["a"]}, InputForm(keep=("label",)), ("no column 'label'", "its columns are prompt")),
        ({"q": ["a"]}, InputForm(template=parse_template("{word}")), ("no column 'word'",)),
        ({"prompt": ["a"]}, InputForm(text=True), ("--text is for lines of text",)),
        (
            {
                "prompt": ["a", "b"],
                "logit_bias": pa.array([[], [(1, 1.0), (1, 2.0)]], pa.map_("int8", "float")),
            },
            InputForm(),
            ("the column 'logit_bias' has a key twice", "in.parquet, row 2"),
        ),
        (
            {"prompt": pa.array([b"a", b"\xff"]).view(pa.string())},
            InputForm(),
            ("the column 'prompt' has text that is not UTF-8", "in.parquet, row 2"),
        ),
    ],
)
def test_refused_files(
    tmp_path: Path, columns: dict[str, Any], form: InputForm, told: tuple[str, ...]
) -> None:
    """Guards: an error for each row of a table in which a column is wrong; a column that is ignored."""
    options = batch(tmp_path, input=form, sources=[write_table(tmp_path / "in.parquet", pa.table(columns))])
    with pytest.raises((FormatError, UsageError)) as refusal:
        run_batch(FakeEngine(), options)
    assert all(part in str(refusal.value) for part in told)
    assert not options.out.exists()


def test_a_template_reads_only_its_columns(tmp_path: Path) -> None:
    """Guards: a table refused because of a column that nobody asked for."""
    rows = [{"word": "a", "vector": [0.5], "raw": b"\xff", "label": 3}, {"word": "b", "label": 4}]
    form = InputForm(template=parse_template("Define {word}."), keep=("label",), id_field="word")
    with lines_of(write_table(tmp_path / "in.parquet", rows), form) as found:
        assert [(line.id, dict(line.values), dict(line.kept)) for line in found] == [
            ("a", {"prompt": "Define a."}, {"label": 3}),
            ("b", {"prompt": "Define b."}, {"label": 4}),
        ]


def test_several_inputs(tmp_path: Path) -> None:
    """Guards: lines of two files with one id, or read at the place of another file's line."""
    long = [{"prompt": "x" * length} for length in range(9)]
    table = write_table(tmp_path / "b.parquet", [{"prompt": "row"}, {"id": "named", "prompt": None}])
    sources = [
        write_lines(tmp_path / "a.jsonl", long),
        write_lines(tmp_path / "empty.jsonl", []),
        table,
        write_lines(tmp_path / "c.jsonl", ["bad", {"prompt": "end"}]),
    ]
    found = by_id(answer(FakeEngine(n_parallel=2), batch(tmp_path, sources=sources)))
    assert {name: record["text"] for name, record in found.items() if not record["error"]} == {
        **{f"a.jsonl:{n}": "x" * (n - 1) for n in range(1, 10)},
        "b.parquet:1": "row",
        "c.jsonl:2": "end",
    }
    assert found["named"]["error"]["message"] == f"{table}, row 2: the line has no prompt and no messages"
    assert found["c.jsonl:1"]["error"]["message"].startswith(
        f"{tmp_path / 'c.jsonl'}, line 1: not a JSON object"
    )
    write_table(table, [{"prompt": "other"}, {"id": "named", "prompt": None}])
    with pytest.raises(FileError, match="a line has changed") as refusal:
        run_batch(FakeEngine(), batch(tmp_path, sources=sources))
    assert f"{table}, row 1" in str(refusal.value)


def test_pyarrow_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a batch that is answered, and then cannot be written."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    table = tmp_path / "in.parquet"
    table.write_bytes(b"PAR1")
    for options in (to_parquet(batch(tmp_path, {"prompt": "a"})), batch(tmp_path, sources=[table])):
        with pytest.raises(MissingExtraError, match=r"pyarrow is needed.*dsmoe-local\[parquet\]"):
            run_batch(FakeEngine(), options)
        assert not options.out.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_no_space_for_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a full disk reported as a damaged file."""
    full = partial(Path("/dev/full").open, "r+b", 0)
    monkeypatch.setattr("dsmoe_local.batch.inputs.TemporaryFile", lambda **_: full())
    table = write_table(tmp_path / "in.parquet", [{"prompt": "a"}])
    with pytest.raises(NoSpaceError, match="no space for a temporary copy"):
        run_batch(FakeEngine(), batch(tmp_path, sources=[table]))


class _Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """Guards: code in a file, which pyarrow before 14.0.1 ran to restore the type of a column."""
    hostile = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(_Touch(tmp_path / "touched")),
    }
    schema = pa.schema([pa.field("prompt", pa.string(), metadata=hostile)])
    table = write_table(tmp_path / "in.parquet", pa.table({"prompt": ["a"]}, schema))
    assert parquet.read_metadata(table).metadata is not None
    with lines_of(table, InputForm()) as found:
        assert [line.values for line in found] == [{"prompt": "a"}]
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("n_lost", [1, 4, 100, 300])
def test_truncated_files(tmp_path: Path, n_lost: int) -> None:
    """Guards: the rows before the damage taken for all; a traceback."""
    path = write_table(tmp_path / "in.parquet", [{"prompt": f"p{n}"} for n in range(100)])
    path.write_bytes(path.read_bytes()[:-n_lost])
    with pytest.raises(FormatError, match="the Parquet file cannot be read") as refusal:
        run_batch(FakeEngine(), batch(tmp_path, sources=[path]))
    assert len(str(refusal.value).splitlines()) <= 3
    path.write_bytes(b"")
    with pytest.raises(FormatError, match="the Parquet file cannot be read"):
        run_batch(FakeEngine(), batch(tmp_path, sources=[path]))


def mutated_tables(folder: Path, n: int, seed: int) -> Outcome:
    numbers = count()
    whole = write_table(
        folder / "whole.parquet", ROWS["conversations"] * 20, compression="snappy", row_group_size=15
    ).read_bytes()

    def read(rng: random.Random) -> None:
        path = folder / f"{next(numbers)}.parquet"
        path.write_bytes(damaged_bytes(whole, rng))
        try:
            with lines_of(path, InputForm()) as found:
                for line in found:
                    try:
                        request_of(line, GREEDY)
                    except DsmoeError as error:
                        json.dumps(str(error), ensure_ascii=False).encode()
        finally:
            path.unlink()

    return try_mutants(read, n, seed)


def test_mutated_tables(tmp_path: Path) -> None:
    """Guards: damage that ends the process, or an exception that is not explained."""
    outcome = mutated_tables(tmp_path, 300, seed=1)
    assert outcome.refused > 50


@pytest.mark.soak
def test_mutated_tables_soak(tmp_path: Path) -> None:
    """Guards: faults that a few hundred mutations do not find."""
    print(mutated_tables(tmp_path, 50_000, 3))


_MEASURE = """
import sys, threading
from pathlib import Path
import pyarrow as pa
from dsmoe_local.base.progress import ignore
from dsmoe_local.batch.inputs import opened
from dsmoe_local.batch.input_form import InputForm
path = Path(sys.argv[1])
with opened([path], InputForm(), None, path.parent, ignore, threading.Event()) as sources:
    n = sum(1 for _ in sources.lines())
print(n, pa.default_memory_pool().max_memory())
"""


@pytest.mark.parametrize("dictionary", [False, True])
def test_memory_of_a_large_row_group(tmp_path: Path, dictionary: bool) -> None:
    """Guards: a row group that is read as a whole; one prompt stored once and decoded for all rows."""
    n_rows, n_bytes = 60_000, 1000
    rng = random.Random(0)
    texts = [rng.randbytes(n_bytes // 2).hex() for _ in range(1 if dictionary else n_rows)]
    table = pa.table({"prompt": texts * (n_rows // len(texts))})
    path = write_table(tmp_path / "in.parquet", table, row_group_size=n_rows, use_dictionary=dictionary)
    assert parquet.read_metadata(path).num_row_groups == 1
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    n_found, most = map(int, done.stdout.split())
    assert n_found == n_rows
    assert most < n_rows * n_bytes / 8


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_memory_of_long_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dictionary: bool, nested: bool
) -> None:
    """Guards: gigabytes for a file of some kilobytes, because 64 rows of any size are decoded at once."""
    monkeypatch.setattr(parquet_input, "_DECODED_BYTES", 4 << 20)
    prompts = ["x" * (1 << 20)] * 64
    column = [[{"role": "user", "content": prompt}] for prompt in prompts] if nested else prompts
    path = write_table(
        tmp_path / "in.parquet",
        pa.table({"messages" if nested else "prompt": column}),
        use_dictionary=dictionary,
        dictionary_pagesize_limit=64 << 20,
    )
    with path.open("rb") as source:
        file = parquet_input._opened(source)
        found = [
            (batch.num_rows, batch.nbytes)
            for batch in parquet_input._batches(source, file, file.schema_arrow.names)
        ]
    assert sum(n_rows for n_rows, _ in found) == 64
    assert max(n_bytes for _, n_bytes in found) < 5 << 20
