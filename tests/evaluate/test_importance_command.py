"""The command `dsmoe imatrix`: output, files, kills at every fault point, merging, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.imatrices import random_imatrix
from support.kills import points_of
from support.models import tiny_model
from support.tiny_gguf import DENSE, MOE, write_tiny

from dsmoe_local.base.errors import UsageError
from dsmoe_local.cli.commands import load_command
from dsmoe_local.evaluate.text import built_in
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_quantize.imatrix_file import read_imatrix, write_imatrix

OPTIONS = ("-t", "1", "-c", "64", "-ub", "64")
CODE = "from dsmoe_local.cli.main import dsmoe; dsmoe()"


def dsmoe(
    *arguments: str | Path,
    command: str = "imatrix",
    folder: Path | None = None,
    fault: str = "",
    text: str = "",
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE, command, *map(str, arguments)],
        capture_output=True,
        text=True,
        input=text,
        cwd=folder,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "DSMOE_FAULT": fault},
    )


def as_json(*arguments: str | Path, **more: Any) -> dict[str, Any]:
    done = dsmoe(*arguments, "--json", **more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(built_in().content[1000:1600])
    return path


def test_what_is_written_and_printed(text: Path, tmp_path: Path) -> None:
    """Guards: another default name, JSON mixed with progress, a text from standard input read otherwise, a
    report of other counts than those in the file.
    """
    found = as_json(tiny_model(), "--text", text, *OPTIONS, folder=tmp_path)
    out = tmp_path / "tiny.imatrix.gguf"
    assert found["file"] == out.name
    imatrix = read_imatrix(out)
    assert found["n_windows"] == imatrix.n_chunks > 5
    assert (found["n_context"], found["texts"]) == (64, ["text.txt"])
    assert found["n_tensors"] == len(imatrix.entries)
    for layer in found["coverage"]["layers"]:
        entry = imatrix.entries[f"blk.{layer['layer']}.ffn_down_exps.weight"]
        assert layer["counts"] == entry.counts.tolist()
    assert found["coverage"]["tokens"] == 64 * found["n_windows"]
    assert found["perplexity"] > 1
    assert found["tokens_per_second"] > 0
    piped = as_json("-m", tiny_model(), "--text", "-", "-o", tmp_path / "b", *OPTIONS, text=text.read_text())
    assert piped["coverage"] == found["coverage"]
    shown = dsmoe("--show", out)
    assert shown.returncode == 0
    for words in ("text.txt: ", "windows of 64 tokens", "saw fewer than 64 tokens", "coldest experts"):
        assert words in shown.stdout
    assert as_json("--show", out)["coverage"] == found["coverage"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "text.txt", out.name]


def test_the_built_in_text(tmp_path: Path) -> None:
    """Guards: a licence that nobody is told, --chunks ignored, a dense model refused or with experts."""
    done = dsmoe(tiny_model(), "--chunks", "2", "-o", tmp_path / "a", *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "2 windows of 64" in done.stdout
    assert "PSF" in done.stdout
    dense = write_tiny(tmp_path / "dense.gguf", DENSE)
    done = dsmoe(dense, "--chunks", "2", "-o", tmp_path / "b", *OPTIONS)
    if "tokens" not in done.stderr:
        assert done.returncode == 0, done.stderr
        assert "experts" not in done.stdout


def test_killed_at_every_point(text: Path, tmp_path: Path) -> None:
    """Guards: a half file under the final name, windows counted twice after a kill, files left behind."""
    arguments = (tiny_model(), "--text", text, "--save-every", "2", *OPTIONS)
    expected = tmp_path / "expected"
    assert dsmoe(*arguments, "-o", expected).returncode == 0
    points = [
        f"{point}:{n}" for point in points_of("imatrix") for n in (1, 2) if n == 1 or "complete" not in point
    ]
    assert len(points) == 5
    for point in points:
        folder = tmp_path / point
        folder.mkdir()
        out = folder / "out"
        assert dsmoe(*arguments, "-o", out, fault=point).returncode == -signal.SIGKILL
        assert not out.exists()
        done = dsmoe(*arguments, "-o", out)
        assert done.returncode == 0, done.stderr
        assert ("continuing" in done.stderr) == (point != "imatrix.written:1")
        assert [path.name for path in folder.iterdir()] == ["out"]
        found, whole = read_imatrix(out), read_imatrix(expected)
        assert found.n_chunks == whole.n_chunks
        for name, entry in whole.entries.items():
            assert found.entries[name].counts.tolist() == entry.counts.tolist()
            np.testing.assert_allclose(found.entries[name].sums, entry.sums, rtol=1e-5)


def test_ctrl_c(tmp_path: Path) -> None:
    """Guards: a traceback, a status that says all went well, windows that were read lost."""
    out = tmp_path / "out"
    text = tmp_path / "text"
    text.write_text(built_in().content * 100)  # minutes of work
    arguments = (tiny_model(), "--text", text, "--save-every", "1", "-o", out, *OPTIONS)
    child = subprocess.Popen(
        [sys.executable, "-c", CODE, "imatrix", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    part = tmp_path / ".out.part"
    while child.poll() is None and not part.exists():
        os.sched_yield()
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=60)
    assert (child.returncode, output) == (130, "")
    assert "windows are kept" in errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.part", "text"]
    assert read_imatrix(part).n_chunks >= 1


def test_merge_and_use(text: Path, tmp_path: Path) -> None:
    """Guards: the way from a text to a quantized file, and what the file says of it."""
    for name, characters in (("a", slice(0, 400)), ("b", slice(400, None))):
        half = tmp_path / f"{name}.txt"
        half.write_text(text.read_text()[characters])
        assert dsmoe(tiny_model(), "--text", half, "-o", tmp_path / name, *OPTIONS).returncode == 0
    total = tmp_path / "total.imatrix.gguf"
    found = as_json("--merge", tmp_path / "a", tmp_path / "b", "-o", total)
    assert found["texts"] == ["a.txt", "b.txt"]
    both = [read_imatrix(tmp_path / name) for name in "ab"]
    assert found["n_windows"] == sum(each.n_chunks for each in both)
    out = tmp_path / "q.gguf"
    done = dsmoe(tiny_model(), out, "--type", "q4_0", "--imatrix", total, command="quantize")
    assert done.returncode == 0, done.stderr
    assert "has nothing about" in done.stderr
    said = read_gguf(out)
    assert said.get("quantize.imatrix.file") == total.name
    assert said.get("quantize.imatrix.dataset") == "a.txt"
    assert said.get("quantize.imatrix.entries_count") == found["n_tensors"]
    assert said.get("quantize.imatrix.chunks_count") == found["n_windows"]
    plain = tmp_path / "plain.gguf"
    assert dsmoe(tiny_model(), plain, "--type", "q4_0", command="quantize").returncode == 0
    assert plain.read_bytes()[-10000:] != out.read_bytes()[-10000:]


def test_what_is_refused(text: Path, tmp_path: Path) -> None:
    """Guards: tracebacks, a model loaded before a refusal, results written over."""
    taken = tmp_path / "taken"
    taken.write_text("precious")
    matrix = tmp_path / "matrix"
    assert dsmoe(tiny_model(), "--text", text, "-o", matrix, *OPTIONS).returncode == 0
    for arguments, status, words in (
        ((tiny_model(), "-o", taken), 1, "exists already"),
        ((tiny_model(), "-o", tmp_path / "no" / "out"), 1, "folder does not exist"),
        ((tiny_model(), "-c", "8"), 2, "out of range"),
        ((tiny_model(), "--text", text, "-c", "200000", "-o", tmp_path / "x"), 2, "too few for a window"),
        ((tiny_model(), tiny_model()), 2, "2 models are named"),
        (("--merge", matrix, "-o", tmp_path / "x"), 2, "--merge needs"),
        (("--merge", matrix, matrix), 2, "-o"),
        (("--merge", "--show", matrix), 2, "exclude each other"),
        (("--show",), 2, "--show takes one file"),
        (("--show", taken), 1, "not a usable importance matrix"),
        (("--show", tiny_model()), 1, "another kind of GGUF"),
        (("--merge", matrix, tmp_path / "none", "-o", tmp_path / "x"), 1, "cannot read"),
    ):
        done = dsmoe(*arguments, folder=tmp_path)
        assert (done.returncode, done.stdout) == (status, ""), (arguments, done.stderr)
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    done = dsmoe(tiny_model(), "--imatrix", taken, "--type", "q8", command="quantize", folder=tmp_path)
    assert done.returncode == 1
    assert "not a usable importance matrix" in done.stderr
    assert taken.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["matrix", "taken", "text.txt"]
    assert dsmoe(tiny_model(), "--text", text, "-o", taken, "--force", *OPTIONS).returncode == 0
    assert read_imatrix(taken).n_chunks > 5


def test_options_without_effect_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: --chunks taken for a part of what is shown or merged; a variable for other runs in the way."""
    matrix = tmp_path / "matrix"
    write_imatrix(random_imatrix(MOE), matrix)
    merging = ("--merge", matrix, matrix, "-o", tmp_path / "out")

    def run(*arguments: str | Path) -> None:
        load_command("imatrix").main([*map(str, arguments)], standalone_mode=False)

    for arguments, words in (
        (("--show", matrix, "-o", tmp_path / "out"), "--output has no effect with --show"),
        (("--show", matrix, "--force"), "--force has no effect with --show"),
        (("--show", matrix, "-m", tiny_model()), "--model has no effect with --show"),
        (("--show", matrix, "--text", matrix), "--text has no effect with --show"),
        ((*merging, "--chunks", "2"), "--chunks has no effect with --merge"),
        ((*merging, "-c", "64"), "--ctx-size has no effect with --merge"),
        ((*merging, "--process-output"), "--process-output has no effect with --merge"),
    ):
        with pytest.raises(UsageError, match=words):
            run(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["matrix"]
    monkeypatch.setenv("DSMOE_CHUNKS", "2")
    run("--show", matrix, "--json")
    run(*merging, "--force", "--json")
    found = [json.loads(line)["n_windows"] for line in capsys.readouterr().out.splitlines()]
    assert found == [12, 24]
