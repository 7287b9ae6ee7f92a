"""The index of an input: ids, resuming, the order of the work, and little memory."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.batches import GREEDY, write_lines

from dsmoe_local.base.errors import FileError, FormatError, InterruptedRunError
from dsmoe_local.base.progress import Event, Note, ignore
from dsmoe_local.batch import index as module
from dsmoe_local.batch import sources
from dsmoe_local.batch.index import Index, Plan, Resumed, build_index
from dsmoe_local.batch.input_form import InputForm
from dsmoe_local.batch.lines import Key, hash64
from dsmoe_local.batch.sources import Source, Sources, Span
from dsmoe_local.batch.workload import cost, prefix_hashes
from dsmoe_local.engine.types import Message, Prompt, Request


def build(
    folder: Path, *lines: str | dict[str, Any], stop: threading.Event | None = None, listen: Any = ignore
) -> Index:
    with Sources([Source(write_lines(folder / "in.jsonl", lines), InputForm())]) as inputs:
        return build_index(inputs, GREEDY, listen, stop or threading.Event())


def test_ids_are_unique(tmp_path: Path) -> None:
    """Guards: two records that cannot be told apart, noticed after hours."""
    with pytest.raises(FormatError, match="line-2") as refusal:
        build(tmp_path, {"id": "a", "prompt": "x"}, {"prompt": "y"}, {"custom_id": "line-2", "prompt": "z"})
    assert "in.jsonl, line 2 and line 3" in str(refusal.value)


def test_equal_hashes_of_different_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an input refused because two different ids have one hash; the wrong line taken for done."""
    monkeypatch.setattr(sources, "key_of", lambda name, raw, values, kept: Key(7, hash64(name.encode())))
    with closing(build(tmp_path, {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"})) as index:
        index.add_record(Key(7, hash64(b"b")))
        assert index.resume() == Resumed(None, 0, {}, in_order=False)
        assert planned(index, ordered=True) == [0]


def test_an_id_that_all_lines_have_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a wrong --id-field on a large file, which compares every pair of lines before it is refused."""
    spans: list[Span] = []

    def counted(number: int, offset: int, length: int) -> Span:
        spans.append(Span(number, offset, length))
        assert len(spans) <= 2
        return spans[-1]

    monkeypatch.setattr(module, "Span", counted)
    with pytest.raises(FormatError, match="'a' occurs twice") as refusal:
        build(tmp_path, *['{"id": "a", "prompt": "x"}'] * 50_000)
    assert "in.jsonl, line 1 and line 2" in str(refusal.value)
    assert [span.number for span in spans] == [1, 2]


def test_equal_ids_behind_an_equal_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: equal ids that are missed because a line with another id and the same hash is between them."""
    monkeypatch.setattr(sources, "key_of", lambda name, raw, values, kept: Key(7, hash64(name.encode())))
    with pytest.raises(FormatError, match="'a' occurs twice") as refusal:
        build(tmp_path, *({"id": name, "prompt": "x"} for name in "abcad"))
    assert "in.jsonl, line 1 and line 4" in str(refusal.value)


def test_keys_depend_on_the_content_of_a_line(tmp_path: Path) -> None:
    """Guards: a line answered again because its white space differs; a changed line taken for done."""
    path = write_lines(
        tmp_path / "in.jsonl",
        [
            '{"id": "a", "prompt": "x", "seed": 1}',
            '{"seed":1,"prompt":"\\u0078","id":"a"}',
            '{"id": "a", "prompt": "x", "seed": 2}',
            '{"id": "b", "prompt": "x", "seed": 1}',
        ],
    )
    with closing(Source(path, InputForm())) as source:
        first, same, changed, other = (source.line(1, raw).key for _, raw in source.spans())
    assert first == same
    assert (first.id, first.content) != (changed.id, changed.content)
    assert first.id == changed.id != other.id


def test_reading_can_be_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: Ctrl-C that takes effect only after gigabytes are read."""
    monkeypatch.setattr(module, "_REPORT_BYTES", 1)
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedRunError):
        build(tmp_path, {"prompt": "a"}, stop=stop)


def test_constraints_without_a_limit_are_told(tmp_path: Path) -> None:
    """Guards: a schema that allows endless white space, which fills the context of every reply."""
    notes: list[Event] = []
    schema: dict[str, Any] = {"prompt": "a", "json_schema": {"type": "object"}}
    lines = (schema, schema, {**schema, "max_tokens": 9}, {"prompt": "a"}, {"prompt": "a", "n": 0})
    build(tmp_path, *lines, listen=notes.append).close()
    (note,) = (event.text for event in notes if isinstance(event, Note))
    assert note.startswith("2 requests with a schema or grammar but no max_tokens")


def filled(n: int) -> Index:
    index = Index()
    for number in range(n):
        index.add(Span(number + 1, 0, 1), Key(number, 2**64 - 1 - number), b"", 0)
    index.finish()
    assert list(index.equal_hashes()) == []
    return index


def planned(index: Index, *, ordered: bool = False) -> list[int]:
    """Return the positions of the lines that are left, in the order of the work."""
    plan = index.plan(ordered=ordered)
    return [index.entry(turn)[0].number - 1 for turn in range(plan.n_lines)]


@pytest.mark.parametrize(
    ("keys", "expected", "left"),
    [
        ([], Resumed(None, 0, {}, in_order=True), [0, 1, 2, 3]),
        ([0, 1], Resumed(None, 0, {}, in_order=True), [2, 3]),
        ([0, 1, 2, 3], Resumed(None, 0, {}, in_order=True), []),
        ([1], Resumed(None, 0, {}, in_order=False), [0, 2, 3]),
        ([1, 0], Resumed(None, 0, {}, in_order=False), [2, 3]),
        ([0, 9, 8, 1], Resumed(None, 2, {}, in_order=True), [2, 3]),
    ],
)
def test_resuming(keys: list[int], expected: Resumed, left: list[int]) -> None:
    """Guards: a line answered twice, or taken for done; records of other inputs not counted."""
    with closing(filled(4)) as index:
        for number in keys:
            index.add_record(Key(number, 2**64 - 1 - number))
        assert index.resume() == expected
        assert planned(index, ordered=True) == left


def test_changed_lines_are_found() -> None:
    """Guards: an old answer to a new question."""
    with closing(filled(4)) as index:
        for number in (0, 3, 2):
            index.add_record(Key(number, number))
        changed = index.resume().changed_line
        assert changed is not None
        assert changed.number == 1


def test_a_full_disk_is_an_error_in_words() -> None:
    """Guards: a traceback when there is no room for the index's temporary file."""
    with closing(filled(1)) as index:
        index._database.execute("PRAGMA max_page_count = 1")
        with pytest.raises(FileError, match="full") as refusal:
            list(map(index.add_record, [Key(1, 1)] * 100_000))
    assert isinstance(refusal.value.__cause__, sqlite3.Error)
    assert "TMPDIR" in str(refusal.value)


class _FailingRows:
    """Stands in for the database: a query succeeds, but its rows cannot be read."""

    def __init__(self, code: int | None) -> None:
        self._code = code

    def execute(self, query: str, values: tuple[object, ...]) -> _FailingRows:
        return self

    def fetchmany(self, size: int) -> list[Any]:
        error = sqlite3.OperationalError("no next row")
        if self._code is not None:
            error.sqlite_errorcode = self._code
        raise error


@pytest.mark.parametrize(
    ("code", "is_the_disk"),
    [
        (sqlite3.SQLITE_FULL, True),
        (sqlite3.SQLITE_CANTOPEN, True),
        (sqlite3.SQLITE_IOERR_READ, True),
        (sqlite3.SQLITE_CORRUPT, False),
        (sqlite3.SQLITE_ERROR, False),
        (None, False),
    ],
)
def test_an_error_while_rows_are_read(
    monkeypatch: pytest.MonkeyPatch, code: int | None, is_the_disk: bool
) -> None:
    """Guards: a traceback when SQLite fails after a query has begun; free space advised for other errors."""
    with closing(filled(2)) as index, monkeypatch.context() as patch:
        patch.setattr(index, "_database", _FailingRows(code))
        with pytest.raises(FileError, match="no next row") as refusal:
            index.plan(ordered=True)
    assert ("TMPDIR" in str(refusal.value)) is is_the_disk
    assert isinstance(refusal.value.__cause__, sqlite3.Error)


def test_entries_in_any_order() -> None:
    """Guards: a line that is missing at the edge of a block."""
    n_lines = 2 * module._BLOCK + 5
    with closing(filled(n_lines)) as index:
        assert index.plan(ordered=True) == Plan(n_lines, 0)
        turns = [*range(n_lines), 0, n_lines - 1, module._BLOCK, 3]
        for turn in turns:
            assert index.entry(turn) == (Span(turn + 1, 0, 1), Key(turn, 2**64 - 1 - turn))


def index_of(prompts: list[Prompt], limits: list[int] | None = None) -> Index:
    limits = limits or [10] * len(prompts)
    index = Index()
    for at, prompt in enumerate(prompts):
        request = Request(str(at), prompt, max_tokens=limits[at % len(limits)])
        span = Span(at + 1, 0, len(prompt) if isinstance(prompt, str) else 2000)
        index.add(span, Key(at, at), prefix_hashes(prompt), cost(request))
    index.finish()
    return index


def order(prompts: list[Prompt], limits: list[int] | None = None, *, ordered: bool = False) -> list[int]:
    with closing(index_of(prompts, limits)) as index:
        return planned(index, ordered=ordered)


def n_shared(*prompts: Prompt) -> int:
    with closing(index_of(list(prompts))) as index:
        return index.plan(ordered=False).shared_bytes


def test_common_prefixes_come_together() -> None:
    """Guards: a prefix that is evicted before the next line that shares it; inner groups torn apart."""
    outer = ["A" * 100, "B" * 100]
    inner = ["x" * 1000, "y" * 1000]
    prompts: list[Prompt] = [one + two + str(number) for one in outer for two in inner for number in range(5)]
    random.Random(1).shuffle(prompts)
    sequence = [str(prompts[at])[:101] for at in order(prompts)]
    assert sum(before != after for before, after in pairwise(sequence)) == 3
    assert sum(before[0] != after[0] for before, after in pairwise(sequence)) == 1


def test_groups_end_between_prefixes() -> None:
    """Guards: lines of two prefixes in one group, so that a worker reads both; a group without lines."""
    prompts: list[Prompt] = [f"{kind * 300}{number}" for kind in "abc" for number in range(6)]
    with closing(index_of(prompts)) as index:
        index.plan(ordered=False)
        sizes: list[int] = []
        while sum(sizes) < len(prompts):
            sizes.append(len(index.group(sum(sizes), 8)))
        assert sizes == [6, 6, 6]
        assert [span.number for span, _ in index.group(4, 1)] == [index.entry(4)[0].number]
        assert [len(index.group(0, most)) for most in (4, 8, 11, 12, 100)] == [4, 6, 6, 12, 18]


def test_messages_share_a_system_text() -> None:
    """Guards: conversations whose common prefix is not seen."""
    prompts: list[Prompt] = [
        (Message("system", f"{who} " * 50), Message("user", str(number)))
        for number in range(4)
        for who in ("you", "they")
    ]
    assert {at % 2 for at in order(prompts)[:4]} in ({0}, {1})


def test_long_jobs_come_early() -> None:
    """Guards: the longest job started last, running alone while everything else is done."""
    unrelated: list[Prompt] = [f"{number} differs" for number in range(4)]
    assert order(unrelated, [10, 400, 20, 30]) == [1, 3, 2, 0]
    together: list[Prompt] = ["s" * 70 + "a", "other", "s" * 70 + "b", "third"]
    assert order(together, [5, 100, 400, 50]) == [2, 0, 1, 3]
    assert order(together, [5, 100, 400, 50], ordered=True) == [0, 1, 2, 3]
    assert order(["equal"] * 3, [10, 400, 20]) == [1, 2, 0]


def test_shared_bytes_of_the_order() -> None:
    """Guards: a KV cache planned without shared prefixes; more shared bytes than a prompt has."""
    assert n_shared(*("s" * 2000 + str(number) for number in range(5))) == 4 * 1024
    assert n_shared("s" * 30, "s" * 30) == 30
    assert n_shared() == 0


_PROMPTS = st.one_of(
    st.text("ab", max_size=80),
    st.lists(st.integers(-5, 2**70), min_size=1, max_size=3).map(tuple),
    st.lists(st.builds(Message, st.just("user"), st.text("a", max_size=70)), min_size=1, max_size=2).map(
        tuple
    ),
)


@given(st.lists(_PROMPTS, max_size=30), st.lists(st.integers(1, 2**31), min_size=1, max_size=5))
def test_every_line_has_its_turn(prompts: list[Prompt], limits: list[int]) -> None:
    """Guards: a line left out, or taken twice, by the grouping."""
    assert sorted(order(prompts, limits)) == list(range(len(prompts)))


_MEASURE = """
import resource, sys
from pathlib import Path
from dsmoe_local.batch.job import BatchOptions, prepared
from dsmoe_local.protocol.requests import RequestDefaults
from dsmoe_local.engine.types import SamplingParameters
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
options = BatchOptions([Path(sys.argv[1])], Path(sys.argv[2]), RequestDefaults(SamplingParameters()))
with prepared(options) as job:
    n = job.plan.n_lines
print(n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before) / n)
"""


def test_memory_of_a_line(tmp_path: Path) -> None:
    """Guards: an index that keeps texts, or objects, so that a million lines do not fit."""
    n_lines = 20_000
    path = tmp_path / "in.jsonl"
    with path.open("w") as file:
        for number in range(n_lines):
            body = {"id": f"{number:06d}-{'i' * 200}", "prompt": f"{'few shots ' * 100}{number}"}
            file.write(json.dumps(body) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path), str(tmp_path / "out.jsonl")],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    n_found, per_line = done.stdout.split()
    assert int(n_found) == n_lines
    assert float(per_line) <= 250
