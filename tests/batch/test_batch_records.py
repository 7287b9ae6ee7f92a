"""Batch input to requests: strict JSON, one mistake one error, ids that tell records apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsmoe_local.base.errors import DsmoeError, FileError, FormatError
from dsmoe_local.batch.records import BatchDefaults, LineError, check_ids, read_lines, request_of
from dsmoe_local.engine.types import Message, SamplingParameters

DEFAULTS = BatchDefaults(SamplingParameters(temperature=0.5), max_tokens=7, stop=("END",))


def write(folder: Path, *lines: str | bytes | dict[str, Any]) -> Path:
    raw = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path = folder / "in.jsonl"
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in raw) + b"\n")
    return path


def test_prompts_messages_ids_and_settings(tmp_path: Path) -> None:
    """Guards: a field that is read but not used."""
    path = write(
        tmp_path,
        {"prompt": "a"},
        {"id": "x", "messages": [{"role": "user", "content": "b"}], "temperature": 0, "stop": "S", "seed": 4},
        {"custom_id": 9, "prompt": [1, 2], "max_tokens": 3, "stop": ["p", "q"], "repetition_penalty": 1.5},
    )
    first, second, third = (request_of(line, DEFAULTS) for line in read_lines(path))
    assert (first.id, first.prompt, first.max_tokens, first.stop) == ("line-1", "a", 7, ("END",))
    assert first.sampling == DEFAULTS.sampling
    assert (second.id, second.prompt, second.stop) == ("x", (Message("user", "b"),), ("S",))
    assert (second.sampling.temperature, second.sampling.seed) == (0, 4)
    assert (third.id, third.prompt, third.max_tokens, third.stop) == ("9", (1, 2), 3, ("p", "q"))
    assert third.sampling.repeat_penalty == 1.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "not JSON"),
        (b'{"prompt": "a"', "not JSON"),
        (b'["prompt"]', "not a JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "a", "temperature": 1e999}', "out of range"),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"id": "\\ud800", "prompt": "a"}', "surrogate"),
        (b'{"id": {}, "prompt": "a"}', "the id"),
        (b'{"id": true, "prompt": "a"}', "the id"),
        (b'{"id": "a", "custom_id": "b", "prompt": "a"}', "differ"),
        (b"{}", "either prompt or messages"),
        (b'{"prompt": "a", "messages": []}', "messages"),
        (b'{"prompt": 5}', "prompt is not text"),
        (b'{"prompt": [1.5]}', "whole number"),
        (b'{"prompt": []}', "prompt is an empty list"),
        (b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}", "temperature is out of range"),
        (b'{"prompt": "a", "top_k": 1' + b"0" * 400 + b"}", "a whole number, 0 = off"),
        (b'{"messages": [{"role": "user"}]}', "role and content"),
        (b'{"messages": [{"role": "user", "content": null}]}', "content is not text"),
        (b'{"prompt": "a", "temprature": 1}', "temprature"),
        (b'{"prompt": "a", "temperature": "hot"}', "temperature is not a number"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        (b'{"prompt": "a", "top_k": 1.5}', "top_k is not a whole number"),
        (b'{"prompt": "a", "stop": [""]}', "stop string"),
        (b"[" * 100_000, "JSON"),
        (b'{"prompt": "a", "seed": ' + b"1" * 10_000 + b"}", "JSON"),
    ],
)
def test_bad_lines(tmp_path: Path, line: bytes, message: str) -> None:
    """Guards: a bad line that ends the run, or passes."""
    path = write(tmp_path, b'{"prompt": "good"}', line)
    assert check_ids(path) == 2
    good, bad = read_lines(path)
    assert request_of(good, DEFAULTS)
    assert bad.number == 2
    with pytest.raises(DsmoeError) as refusal:
        request_of(bad, DEFAULTS)
    assert message in str(refusal.value)


def test_only_newlines_end_lines(tmp_path: Path) -> None:
    """Guards: splitlines, which breaks on U+2028, NEL and form feeds; a BOM or CR taken for text."""
    text = "a\u2028b\u2029c\x85d"
    path = tmp_path / "in.jsonl"
    lines = [
        "\ufeff" + json.dumps({"prompt": text}, ensure_ascii=False),
        "",
        '{"prompt": "x"}\r',
        '{"prompt": "last"}',
    ]
    path.write_bytes("\n".join(lines).encode())
    found = [(line.number, request_of(line, DEFAULTS).prompt) for line in read_lines(path)]
    assert found == [(1, text), (3, "x"), (4, "last")]


def test_ids_are_unique(tmp_path: Path) -> None:
    """Guards: two records that nobody can tell apart, found after hours."""
    path = write(tmp_path, {"id": "a", "prompt": "x"}, {"prompt": "y"}, {"id": "line-2", "prompt": "z"})
    with pytest.raises(FormatError, match="line-2") as refusal:
        check_ids(path)
    assert "lines 2 and 3" in str(refusal.value)


def test_overlong_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: one line eating the memory, or its tail read as lines of their own."""
    monkeypatch.setattr("dsmoe_local.batch.records.MAX_LINE", 100)
    path = write(tmp_path, {"prompt": "a" * 250}, {"prompt": "b"})
    long, short = read_lines(path)
    with pytest.raises(LineError, match="longer"):
        request_of(long, DEFAULTS)
    assert (short.number, request_of(short, DEFAULTS).prompt) == (2, "b")


def test_unreadable_input(tmp_path: Path) -> None:
    """Guards: a traceback for a missing file or a folder."""
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(FileError):
            check_ids(path)
