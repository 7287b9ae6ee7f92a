"""The command `dsmoe bench`: output, also before an error, and errors."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.models import tiny_model
from support.tiny_gguf import DENSE, write_tiny

SMALL = ("-t", "1", "-p", "32", "-n", "8", "-r", "2")
CODE = "from dsmoe_local.cli.main import dsmoe; dsmoe()"


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, "bench", *SMALL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def as_json(*arguments: str | Path) -> list[dict[str, Any]]:
    done = bench(*arguments, "-o", "json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("dense") / "dense.gguf", DENSE)


def test_models_side_by_side(dense: Path) -> None:
    """Guards: options of one model applied to another, a dense model that is refused for them, times that
    exceed what the run took, memory of another process.
    """
    began = time.perf_counter()
    found = as_json(tiny_model(), dense, "--active-experts", "2", "-d", "0,16")
    wall = time.perf_counter() - began
    tests = [(32, 0, 0), (0, 8, 0), (32, 0, 16), (0, 8, 16)]
    assert [(each["n_prompt"], each["n_gen"], each["n_depth"]) for each in found] == tests * 2
    files = [each["model_filename"] for each in found]
    assert files == [str(tiny_model())] * 4 + [str(dense)] * 4
    assert [(each["n_experts_used"], each["n_experts"]) for each in found] == [(2, 8)] * 4 + [(0, 0)] * 4
    assert {len(each["samples_ns"]) for each in found} == {2}
    assert {each["n_threads"] for each in found} == {1}
    timed = sum(sum(each["samples_ns"]) for each in found) / 1e9
    assert 0 < timed + found[0]["load_seconds"] + found[4]["load_seconds"] < wall
    assert all(each["peak_memory"] is None or 20e6 < each["peak_memory"] < 2e9 for each in found)
    assert found[1]["memory_bytes_per_second"] > 0
    assert found[1]["memory_share"] == pytest.approx(
        found[1]["avg_ts"] * found[1]["read_bytes_per_token"] / found[1]["memory_bytes_per_second"], rel=1e-3
    )


def test_forms() -> None:
    """Guards: progress in the result, a form that is not what it is called, several numbers of tokens."""
    done = bench(tiny_model(), "-p", "0", "-n", "4,8,4")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("|")[-3].strip() for line in lines[2:4]] == ["tg4", "tg8"]
    assert lines[4] == ""
    assert any(line.startswith("memory: ") for line in lines)
    done = bench(tiny_model(), "-m", tiny_model(), "-n", "0", "-o", "csv")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [("32", "0")] * 2


def test_kernels_are_compared_and_saved() -> None:
    """Guards: a result that a later load does not use, or that is used without --save."""
    done = bench(tiny_model(), "--kernels", "-o", "json", "-r", "2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["forms"]) == ["repack", "tiled", "plain"]
    assert all(len(each["prompt_ts"]) == len(each["decode_ts"]) == 2 for each in found["forms"].values())
    assert set(found["fastest"].values()) <= set(found["forms"])
    assert "measured" not in as_json(tiny_model())[0]["kernels_reason"]
    done = bench(tiny_model(), "--kernels", "--save", "-r", "1")
    assert done.returncode == 0, done.stderr
    assert "saved in " in done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:5]] == list(found["forms"])
    assert "measured on this machine" in as_json(tiny_model())[0]["kernels_reason"]
    assert as_json(tiny_model(), "--kernels", "plain")[0]["kernels_reason"] == "as requested"


def test_what_is_done_is_shown_before_an_error(dense: Path) -> None:
    """Guards: minutes of measuring that an error in the last model takes away, an error that is no error."""
    done = bench(dense, tiny_model(), "--active-experts", "9", "-o", "json")
    assert done.returncode == 2
    assert "out of range" in done.stderr
    assert [each["model_filename"] for each in json.loads(done.stdout)] == [str(dense)] * 2


def test_short_errors(dense: Path, tmp_path: Path) -> None:
    """Guards: tracebacks, and models measured before a mistake in the command line is told."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(20))
    for arguments, words in (
        ((tiny_model(), "-p", "0", "-n", "0"), "nothing to measure"),
        ((tiny_model(), "-p", "512,x"), "not a list of token counts"),
        ((tiny_model(), "-p", "-5"), "not a list of token counts"),
        ((tiny_model(), "-n", "9999999999"), "out of range"),
        ((tiny_model(), "-r", "0"), "-r"),
        ((tiny_model(), "-o", "xml"), "xml"),
        ((tiny_model(), "--kernels", "-p", "32,64"), "one length of prompts"),
        ((tiny_model(), "--kernels", "-o", "csv"), "no CSV"),
        ((tiny_model(), "--save"), "add --kernels"),
        ((tiny_model(), tmp_path / "none.gguf"), "no such model"),
        ((tiny_model(), broken), "version"),
        ((dense, "--active-experts", "1"), "dense"),
        ((tiny_model(), "-t", "-3"), "out of range"),
    ):
        done = bench(*arguments)
        assert done.returncode in (1, 2), arguments
        assert done.stdout == ""
        assert words in done.stderr, done.stderr
        assert len([line for line in done.stderr.splitlines() if not line.startswith("note:")]) <= 4
        assert "Traceback" not in done.stderr


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    """Guards: a run that goes on, a traceback, half a table, an engine that is left behind."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", CODE, "bench", str(tiny_model()), *SMALL, "-r", "1000000"]
    process = subprocess.Popen(
        [*command, "-o", "json", "--log-file", str(log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # The model is loaded, or about to be.
    while process.poll() is None and not (log.exists() and log.read_text()):
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert "interrupted" in err
    assert "Traceback" not in err
