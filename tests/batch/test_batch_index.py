"""The index of an input: ids that tell records apart, lines found again, little memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support.batches import GREEDY, write_lines

from dsmoe_local.base.errors import FormatError, InterruptedRunError
from dsmoe_local.base.progress import ignore
from dsmoe_local.batch import index as module
from dsmoe_local.batch.index import Index, build_index
from dsmoe_local.batch.lines import Key, hash64, key_of
from dsmoe_local.batch.sources import InputForm, Source


def build(folder: Path, *lines: str | dict[str, Any], stop: threading.Event | None = None) -> Index:
    source = Source(write_lines(folder / "in.jsonl", lines), InputForm())
    try:
        return build_index(source, GREEDY, ignore, stop or threading.Event())
    finally:
        source.close()


def test_ids_are_unique(tmp_path: Path) -> None:
    """Guards: two records that nobody can tell apart, found after hours."""
    with pytest.raises(FormatError, match="line-2") as refusal:
        build(tmp_path, {"id": "a", "prompt": "x"}, {"prompt": "y"}, {"custom_id": "line-2", "prompt": "z"})
    assert "lines 2 and 3" in str(refusal.value)


def test_equal_hashes_are_no_equal_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an input refused because two different ids have one hash; the wrong line found by it."""
    monkeypatch.setattr(module, "key_of", lambda line, raw: Key(7, hash64(raw)))
    index = build(tmp_path, {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"})
    assert index.find(7) == [0, 1]
    assert index.find(8) == index.find(6) == []


def test_keys_are_of_what_a_line_says(tmp_path: Path) -> None:
    """Guards: a line done again because it was written with other spaces; a changed one taken for done."""
    path = write_lines(
        tmp_path / "in.jsonl",
        [
            '{"id": "a", "prompt": "x", "seed": 1}',
            '{"seed":1,"prompt":"\\u0078","id":"a"}',
            '{"id": "a", "prompt": "x", "seed": 2}',
            '{"id": "b", "prompt": "x", "seed": 1}',
        ],
    )
    source = Source(path, InputForm())
    first, same, changed, other = (key_of(source.line(1, raw), raw) for _, raw in source.spans())
    source.close()
    assert first == same
    assert (first.id, first.content) != (changed.id, changed.content)
    assert first.id == changed.id != other.id


def test_reading_can_be_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: Ctrl-C that waits until gigabytes are read."""
    monkeypatch.setattr(module, "_REPORT", 1)
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedRunError):
        build(tmp_path, {"prompt": "a"}, stop=stop)


_MEASURE = """
import resource, sys, threading
from pathlib import Path
from dsmoe_local.base.progress import ignore
from dsmoe_local.batch.index import build_index
from dsmoe_local.batch.job import BatchOptions, prepared
from dsmoe_local.batch.requests import BatchDefaults
from dsmoe_local.batch.sources import InputForm, Source
from dsmoe_local.engine.types import SamplingParameters
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
options = BatchOptions(Path(sys.argv[1]), Path(sys.argv[2]), BatchDefaults(SamplingParameters()))
with prepared(options) as job:
    n = len(job.order)
print(n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before) / n)
"""


def test_memory_of_a_line(tmp_path: Path) -> None:
    """Guards: an index that keeps texts, or objects, so that a million lines do not fit."""
    n_lines = 60_000
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
    assert float(per_line) <= 300
