"""`dsmoe quantize` as a user runs it: arguments, tables, messages and exit codes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.tiny_gguf import MOE, write_tiny

from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.cli.commands import load_command
from dsmoe_local.cli.quantize import command
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_quantize.errors import RequantizeError
from dsmoe_quantize.policy.types import known_words


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_tiny(tmp_path / "tiny-BF16.gguf", MOE)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(each) for each in arguments])


def test_output_has_a_default_name(source: Path, tmp_path: Path) -> None:
    """Guards: a default name that is not the one in the README."""
    result = invoke(source, "--type", "q4_0")
    assert result.exit_code == 0, result.exception
    assert result.stdout == ""
    assert read_gguf(tmp_path / "tiny-Q4_0.gguf").get("general.file_type") == 2
    assert "bits per weight" in result.stderr
    assert "peak memory" in result.stderr


def test_a_split_output(source: Path, tmp_path: Path) -> None:
    """Guards: a size in another unit, a result that does not name the file to load, work before a refusal."""
    arguments = (source, "--type", "q8_0", "--split-max-size", "2M")
    dry = invoke(*arguments, "--dry-run")
    assert "in 3 files" in dry.stdout
    result = invoke(*arguments)
    assert result.exit_code == 0, result.exception
    assert "tiny-Q8_0-00001-of-00003.gguf" in result.stderr
    assert "in 3 files" in result.stderr
    assert all(path.stat().st_size <= 2_000_000 for path in tmp_path.glob("*-of-00003.gguf"))
    assert isinstance(invoke(*arguments).exception, FileError)
    for size in ("0", "much", "-4G"):
        assert isinstance(invoke(source, "--type", "q8_0", "--split-max-size", size).exception, UsageError)


def test_dry_run_shows_every_tensor(source: Path, tmp_path: Path) -> None:
    """Guards: a dry run that writes, or hides a fallback."""
    result = invoke(source, "--type", "Q4_K_M", "--tensor-type", r"blk\.3\..*=q8_0", "--dry-run")
    assert result.exit_code == 0, result.exception
    file = read_gguf(source)
    assert all(name in result.stdout for name in file.tensors)
    for text in (
        "96 columns are not a multiple of 256, which Q4_K needs",
        "--tensor-type",
        "bits per weight",
        "read per token",
        "more bits in this layer",
        "never quantized",
    ):
        assert text in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize("arguments", [(), ("some/where.gguf",)])
def test_a_dry_run_names_the_output(arguments: tuple[str, ...], source: Path) -> None:
    """Guards: a dry run that leaves open where the file would go."""
    name = arguments[0] if arguments else "tiny-q8.gguf"
    shown = invoke(source, *arguments, "--type", "q8", "--dry-run").stdout
    assert f"\n{name}: " in shown


def test_fallbacks_are_told(source: Path) -> None:
    """Guards: a fallback that only a dry run shows."""
    result = invoke(source, "--type", "q4")
    assert "are not a multiple of 256" in result.stderr


@pytest.mark.parametrize("name", ["convert", "quantize"])
def test_the_help_lists_all_types(name: str) -> None:
    """Guards: a type that only an error message names."""
    shown = CliRunner().invoke(load_command(name), ["--help"]).output
    assert set(known_words()) <= set(re.split(r"[\s,]+", shown))


def test_type_is_required(source: Path) -> None:
    """Guards: a run that guesses the type."""
    result = invoke(source)
    assert isinstance(result.exception, UsageError)
    assert "q4" in str(result.exception)
    assert "Q4_K_M" in str(result.exception)


def test_requantizing_must_be_allowed(source: Path) -> None:
    """Guards: the flag that does nothing."""
    assert invoke(source, "small.gguf", "--type", "q8").exit_code == 0
    assert isinstance(invoke("small.gguf", "x.gguf", "--type", "q4_0").exception, RequantizeError)
    assert invoke("small.gguf", "x.gguf", "--type", "q4_0", "--allow-requantize").exit_code == 0
    shown = invoke("small.gguf", "--type", "q4_0", "--dry-run")
    assert "--allow-requantize" in shown.stdout


def test_force(source: Path) -> None:
    """Guards: the flag that does nothing."""
    assert invoke(source, "out.gguf", "--type", "q8").exit_code == 0
    assert isinstance(invoke(source, "out.gguf", "--type", "q8").exception, FileError)
    assert invoke(source, "out.gguf", "--type", "q4_1", "--force").exit_code == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(source: Path, tmp_path: Path, number: int, status: int) -> None:
    """Guards: a signal that is not obeyed, leaves a half file, or hides how to go on."""
    code = f"""
import itertools, os, sys
from dsmoe_quantize.write import pipeline
reach, numbers = pipeline.reach, itertools.count(1)
def reached(point):
    reach(point)
    if next(numbers) == 20:
        os.kill(os.getpid(), {int(number)})
pipeline.reach = reached
from dsmoe_local.cli.main import quantize
sys.argv = ['dsmoe-quantize', {str(source)!r}, 'out.gguf', '--type', 'iq4_nl', '--threads', '1']
quantize()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == status, run.stderr
    assert "run the same command again" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out.gguf").exists()
    assert invoke(source, "out.gguf", "--type", "iq4_nl").exit_code == 0
    assert invoke(source, "fresh.gguf", "--type", "iq4_nl").exit_code == 0
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


def test_two_outputs_are_refused(source: Path) -> None:
    """Guards: -o, which users of other tools type, being unknown, or one of two names being ignored."""
    result = invoke(source, "a.gguf", "-o", "b.gguf", "--type", "q4_0")
    assert isinstance(result.exception, UsageError)
    assert "two outputs" in str(result.exception)
    assert invoke(source, "-o", "b.gguf", "--type", "q4_0").exit_code == 0
    assert Path("b.gguf").exists()
