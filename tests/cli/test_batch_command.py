"""`dsmoe-batch` on a real model: exit codes, streams, inputs of every form, signals, and going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from support.batches import by_id, records, write_lines
from support.hosted import HELD_AT_FIFTIETH
from support.models import tiny_model

COMMAND = "from dsmoe_local.cli.main import batch; batch()"
HELD = f"from dsmoe_local.engine.process import client; client.NATIVE = {HELD_AT_FIFTIETH!r}; {COMMAND}"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def words(source: Path | str, out: Path | str, *more: str, code: str = COMMAND) -> list[str]:
    return [
        sys.executable,
        "-c",
        code,
        str(source),
        "-o",
        str(out),
        "-m",
        str(tiny_model()),
        "-t",
        "1",
        *more,
    ]


def run(
    source: Path | str,
    out: Path | str,
    *more: str,
    given: bytes | None = None,
    folder: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        words(source, out, *more),
        input=given,
        stdin=subprocess.DEVNULL if given is None else None,
        capture_output=True,
        env=ENVIRONMENT,
        cwd=folder,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.mark.parametrize("flag", ["-o", "--log-file"])
def test_the_model_is_never_written_over(tmp_path: Path, flag: str) -> None:
    """Guards: -o and -m swapped, which cost the model."""
    source, model = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "model.gguf"
    model.write_bytes(tiny_model().read_bytes())
    done = run(source, tmp_path / "out.jsonl", "-m", str(model), flag, str(model), "--restart")
    assert done.returncode == 2
    assert f"{flag} names the model" in done.stderr
    assert model.read_bytes() == tiny_model().read_bytes()


def test_command(tmp_path: Path) -> None:
    """Guards: an exit status that hides failed lines; output on stdout; a summary no script can read."""
    lines: list[dict[str, Any]] = [
        {"prompt": "The quick", "max_tokens": 4, "temperature": 0},
        {"prompt": "fox " * 300},
    ]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    done = run(source, out, "--parallel", "2")
    assert (done.returncode, done.stdout) == (1, "")
    assert "2 records, 1 line failed (1 with a prompt that is longer than the context);" in done.stderr
    found = by_id(records(out))
    assert found["line-1"]["response"]["body"]["usage"]["completion_tokens"] in range(5)
    assert "context" in found["line-2"]["error"]["message"]
    done = run(source, out, "--json")
    assert done.returncode == 1
    summary = json.loads(done.stderr.splitlines()[-1])
    assert (summary["n_records"], summary["n_failed"], summary["n_resumed"]) == (2, 1, 2)
    done = run(source, out, "--temp", "0.5")
    assert done.returncode == 1
    assert "temperature: 0.8 then, 0.5 now" in done.stderr
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny_model().read_bytes() + b"\0")
    done = run(source, out, "-m", str(other))
    assert done.returncode == 1
    assert f"another model (model: {tiny_model().name} then, other.gguf now)" in done.stderr
    assert "--restart" in done.stderr
    write_lines(source, lines[:1])
    assert run(source, out, "--temp", "0.5", "--restart", "--format", "simple").returncode == 0
    assert set(records(out)[0]) == {"id", "text", "finish_reason", "usage", "timing", "error"}


def test_forms_of_input(tmp_path: Path) -> None:
    """Guards: a pipe, a table or plain lines that are read as something else."""
    out = tmp_path / "out.jsonl"
    done = run("-", out, "--text", "-n", "2", "--ordered", given=b"The\nquick\n\nfox\n")
    assert done.returncode == 0, done.stderr
    assert [record["custom_id"] for record in records(out)] == ["line-1", "line-2", "line-4"]
    assert not out.with_name("out.jsonl.input").exists()
    table = tmp_path / "in.csv"
    table.write_text('id,word\na,"The, quick"\nb,fox\n')
    done = run(table, out, "--restart", "--template", "{word} jumps", "-n", "2")
    assert done.returncode == 0, done.stderr
    assert set(by_id(records(out))) == {"a", "b"}
    names = ("--id-field", "word", "--keep", 'id,"the word"', "--keep", "id")
    table.write_text('id,word,the word\na,"The, quick",1\nb,fox,2\n')
    done = run(table, out, "--restart", "--template", "{word} jumps", "-n", "2", *names)
    assert done.returncode == 0, done.stderr
    found = {name: record["kept"] for name, record in by_id(records(out)).items()}
    assert found == {"The, quick": {"id": "a", "the word": "1"}, "fox": {"id": "b", "the word": "2"}}
    assert run("-", tmp_path / "none.jsonl", given=b"").returncode == 2


def test_parquet_and_several_inputs(tmp_path: Path) -> None:
    """Guards: a table, a URL or a second file that only the library can read; records it lacks."""
    table, more = tmp_path / "in.parquet", write_lines(tmp_path / "more.jsonl", [{"prompt": "fox", "n": 2}])
    parquet.write_table(pa.table({"id": ["a", "b"], "prompt": ["The", "quick"], "source": ["x", "y"]}), table)
    out = tmp_path / "out.parquet"
    done = run(table, out, f"file://{more}", "-n", "2", "--keep", "source")
    assert done.returncode == 0, done.stderr
    assert "3 records;" in done.stderr
    rows = parquet.read_table(out).to_pylist()
    assert {(row["id"], row["index"], row["kept"]["source"]) for row in rows} == {
        *(("a", 0, "x"), ("b", 0, "y"), ("more.jsonl:1", 0, None), ("more.jsonl:1", 1, None))
    }
    assert all(row["usage"]["completion_tokens"] > 0 for row in rows if row["index"] == 0)
    assert run(table, out, f"file://{more}", "-n", "2", "--keep", "source").returncode == 0
    done = run("-", tmp_path / "piped.jsonl", str(more), "-n", "2", given=b'{"prompt": "The"}\n')
    assert done.returncode == 0, done.stderr
    assert set(by_id(records(tmp_path / "piped.jsonl"))) == {"standard input:1", "more.jsonl:1"}
    done = run(table, out, "--restart")
    assert done.returncode == 1
    assert "the column 'source' is not a field of a request" in done.stderr
    assert len(done.stderr.splitlines()) == 3


def test_output_at_a_url(tmp_path: Path) -> None:
    """Guards: an output that is not where the command says."""
    source, there = write_lines(tmp_path / "in.jsonl", [{"prompt": "The"}]), tmp_path / "there"
    there.mkdir()
    done = run(source, f"file://{there}/out.jsonl", "-n", "2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (there / "out.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parallel", "0"], "neither a number from 1 nor auto"),
        (["--parallel", "²"], "neither a number from 1 nor auto"),
        (["--keep", "a,,b"], "not a list of fields"),
        (["--text", "--keep", "a"], "--keep is for lines with fields"),
        (["-n", "0"], "max_tokens = 0 is out of range"),
        (["-r", ""], "stop string is empty"),
        (["--template", "plain"], "names no field"),
        (["--chat"], "--chat is for"),
        (["--max-errors", "-1"], "--max-errors"),
        (["-o", "out.parquet", "--format", "openai"], "a Parquet file has columns of its own"),
        (["-o", "https://host/out.jsonl"], "the output cannot be at a web address"),
    ],
)
def test_refusals(tmp_path: Path, options: list[str], message: str) -> None:
    """Guards: a mistake on the command line that is found after the model was loaded, or never."""
    source, out = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "out.jsonl"
    done = run(source, out, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= 3
    assert not out.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    """Guards: acknowledged records lost by a signal, or written again; a text that a kill has changed."""
    lines = [{"prompt": f"The quick {i}", "max_tokens": 3 + i % 7} for i in range(100)]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    options = ("--deterministic", "--parallel", "2", "--format", "simple")
    command = words(source, out, *options, code=HELD)  # it does not end before the signal comes
    child = subprocess.Popen(command, stderr=subprocess.PIPE, env=ENVIRONMENT)
    while child.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 3):
        pass
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert b"Traceback" not in errors
    assert child.returncode == (-9 if number == signal.SIGKILL else 128 + number), errors
    if number != signal.SIGKILL:
        assert b"records are written" in errors
    content = out.read_bytes()
    kept = content[: content.rfind(b"\n") + 1]
    assert 3 <= kept.count(b"\n") < 100
    assert run(source, out, *options).returncode == 0
    assert out.read_bytes().startswith(kept)
    whole = tmp_path / "whole.jsonl"
    assert run(source, whole, *options).returncode == 0
    assert texts(out) == texts(whole)


def test_deterministic_records_of_one_arithmetic(tmp_path: Path) -> None:
    """Guards: a promise of equal texts kept with other threads; one that cannot be met by stating it."""
    line = {"prompt": "The", "max_tokens": 2}
    source, out = write_lines(tmp_path / "in.jsonl", [line]), tmp_path / "out.jsonl"
    options = ("--deterministic", "--parallel", "2")
    assert run(source, out, *options).returncode == 0
    write_lines(source, [line, {"prompt": "fox", "max_tokens": 3}])
    done = run(source, out, *options, "-t", "2")
    assert done.returncode == 1
    assert "threads: 1 then, 2 now" in done.stderr
    # What was not stated, and what it came to, are the same.
    assert run(source, out, *options, "-c", "512").returncode == 0
    assert len(records(out)) == 2


def texts(path: Path) -> dict[str, str]:
    return {name: record["text"] for name, record in by_id(records(path)).items()}
