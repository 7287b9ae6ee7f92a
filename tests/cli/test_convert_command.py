"""`dsmoe convert` as a program: output names, messages, exit codes, interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from support import llama_oracle
from support.checkpoints import write_checkpoint
from support.configured import complaint

from dsmoe_local.base.errors import PIP
from dsmoe_local.cli.convert import command
from dsmoe_local.model.gguf_model import read_model

SCRIPT = "from dsmoe_local.cli.main import convert; convert()"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(command, [*arguments], catch_exceptions=False)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((), "tiny-BF16.gguf"),
        (("--type", "Q4"), "tiny-q4.gguf"),
        (("--type", "q8_0"), "tiny-Q8_0.gguf"),
        (("--type", "q4_k_m"), "tiny-Q4_K_M.gguf"),
        (("--type", "q8_0", "--pure"), "tiny-Q8_0.gguf"),
    ],
)
def test_default_output(arguments: tuple[str, ...], name: str, checkpoint: Path) -> None:
    """Guards: a file that appears somewhere else, or under a name that hides its type."""
    invoke("tiny", *arguments)
    assert read_model(checkpoint.parent / name)[1].name == "tiny"


@pytest.mark.parametrize(
    ("file", "told"),
    [("model.gguf", "to quantize one, use dsmoe-quantize"), ("a.txt", "name the folder with config.json")],
)
def test_a_folder_without_a_checkpoint(
    file: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: "cannot read config.json" for the wrong folder, or a folder of GGUF files."""
    (tmp_path / file).touch()
    said = complaint(capsys, "convert", str(tmp_path))
    assert "is not a checkpoint: it has no config.json" in said
    assert told in said


@pytest.mark.parametrize("source", [".", "../tiny", "sub/..", "link", "./"])
def test_a_dry_run_names_what_a_run_writes(
    source: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: `-q8.gguf` for a folder without a name, as `.`; a dry run that shows another name."""
    (checkpoint / "sub").mkdir()
    (checkpoint / "link").symlink_to(checkpoint)
    monkeypatch.chdir(checkpoint)
    shown = invoke(source, "--type", "q8", "--dry-run").output
    before = set(checkpoint.iterdir())
    invoke(source, "--type", "q8")
    (written,) = set(checkpoint.iterdir()) - before
    assert written.name == ("link-q8.gguf" if source == "link" else "tiny-q8.gguf")
    assert f"\n{written.name}: " in shown


def test_a_dry_run_shows_the_output_that_is_named(checkpoint: Path) -> None:
    """Guards: a dry run that shows the default name beside `-o`."""
    assert "\nsome/where.gguf: 38 tensors" in invoke("tiny", "-o", "some/where.gguf", "--dry-run").output


def test_a_name_of_another_family(checkpoint: Path) -> None:
    """Guards: a file that cannot be loaded, since its name makes llama.cpp look for Phi-3's tokens."""
    checkpoint.rename("phi-3-moe")
    invoke("phi-3-moe", "--type", "q8")
    assert read_model(Path("phi-3-moe-q8.gguf"))[0].get("general.name") == "deepseek"
    with llama_oracle.loaded(Path("phi-3-moe-q8.gguf")):
        pass


def test_summary_and_force(checkpoint: Path) -> None:
    """Guards: a run that says nothing at its end, overwrites unasked, or refuses although asked."""
    first = run("tiny", "-o", "out.gguf")
    assert first.returncode == 0, first.stderr
    assert first.stdout == ""
    for word in ("out.gguf", "bits per weight", "peak memory"):
        assert word in first.stderr
    again = run("tiny", "-o", "out.gguf")
    assert again.returncode == 1
    assert "--force" in again.stderr
    assert run("tiny", "-o", "out.gguf", "--force").returncode == 0


def test_dry_run_writes_nothing(checkpoint: Path) -> None:
    """Guards: a dry run that writes, or hides a fallback."""
    result = invoke("tiny", "--type", "q4_k_m", "--dry-run")
    assert "tiny-Q4_K_M.gguf" in result.output
    assert "are not a multiple of 256" in result.output
    assert [path.name for path in checkpoint.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (("nowhere",), 2, "neither a folder nor"),
        (("tiny", "--type", "q9"), 2, "Q4_K_M"),
        (("tiny", "--pre", "nothing"), 2, "pre-tokenizer"),
        (("tiny", "--tensor-type", "x"), 2, "REGEX=TYPE"),
        (("tiny", "-o", "no/such/folder.gguf"), 1, "folder"),
        (("tiny", "--threads", "0"), 2, "threads"),
        (("tiny", "--type", ""), 2, "'' is not a type"),
        (("tiny", "--output-type", ""), 2, "'' is not a type"),
        (("tiny", "--pre", ""), 2, "pre-tokenizer"),
        (("tiny", "--revision", ""), 2, "--revision is empty"),
        ((), 2, "SRC"),
    ],
)
def test_errors(
    arguments: tuple[str, ...],
    status: int,
    word: str,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards: a traceback, a wrong exit status, or an error of more than three lines."""
    error = complaint(capsys, "convert", *arguments, status=status)
    assert word in error
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 3
    assert [path.name for path in checkpoint.parent.iterdir()] == ["tiny"]


def test_bin_files_without_torch(checkpoint: Path) -> None:
    """Guards: a traceback, or a file that is said to be damaged, where torch is not installed."""
    write_checkpoint(checkpoint.parent / "old", form="bin")
    code = f"import sys; sys.modules['torch'] = None; {SCRIPT}"
    command = [sys.executable, "-c", code, "old", "--allow-pickle"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    install = f"{PIP} install 'dsmoe-local[pickle]'"
    assert done.stderr == f"error: torch is needed for .bin files: {install}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption(number: signal.Signals, checkpoint: Path) -> None:
    """Guards: Ctrl-C that is slow, leaves half a file or has the exit status of a failure."""
    code = (
        "import os, sys\n"
        "from dsmoe_quantize.write import pipeline\n"
        "write = pipeline._Run._do\n"
        "def slow(self, task, encoder):\n"
        "    os.write(1, b'.')\n"
        "    self._stop.wait(300)\n"
        "    write(self, task, encoder)\n"
        f"pipeline._Run._do = slow\n{SCRIPT}"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, "tiny", "-o", "out.gguf"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.read(1)
    os.kill(child.pid, number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + number, errors
    assert b"same command" in errors
    assert not Path("out.gguf").exists()
    assert run("tiny", "-o", "out.gguf").returncode == 0
