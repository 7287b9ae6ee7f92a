"""The command `dsmoe eval`: output, files, errors."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.models import tiny_model
from support.tiny_gguf import DENSE, write_tiny

from dsmoe_local.base.paths import cache_folder
from dsmoe_local.evaluate.text import built_in
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

# Then the same is computed together in every run.
ONE_AT_ONCE = ("-t", "1", "-c", "64", "-ub", "64")
CODE = "from dsmoe_local.cli.main import dsmoe; dsmoe()"


def dsmoe(*arguments: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, "eval", *ONE_AT_ONCE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=text, timeout=120, check=False)


def as_json(*arguments: str | Path, text: str = "") -> dict[str, Any]:
    done = dsmoe(*arguments, "--json", text=text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(built_in().content[1000:2200])
    return path


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smaller") / "smaller.gguf"
    quantize_file(plan_quantization(tiny_model(), resolve("Q4_0")), out)
    return out


def test_perplexity_alone(text: Path) -> None:
    """Guards: JSON mixed with progress, a text from standard input read otherwise, --chunks ignored."""
    found = as_json(tiny_model(), "--text", text)
    assert found["text"] == "text.txt"
    assert found["n_context"] == 64
    assert found["perplexity"]["n_scored"] == 31 * found["n_windows"]
    assert found["tokens_per_second"] > 0
    assert found["comparison"] is None
    piped = as_json("-m", tiny_model(), "--text", "-", text=text.read_text())
    assert piped["perplexity"]["perplexity"]["value"] == pytest.approx(
        found["perplexity"]["perplexity"]["value"], rel=1e-4
    )
    assert as_json(tiny_model(), "--chunks", "2")["n_windows"] == 2


def test_what_is_printed(text: Path, smaller: Path) -> None:
    """Guards: figures without their errors, layers left out, a licence that nobody is told."""
    done = dsmoe(smaller, "--text", text, "--against", tiny_model())
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        r"perplexity +[\d.,]+ ± ",
        "KL divergence .* at least, .* at most",
        r"50% below [\d.]+, 90%",
    ):
        assert re.search(words, done.stdout), done.stdout
    assert re.search(r"\n +1 +[\d.]+% +[\d.]+% ", done.stdout)
    assert "PSF" not in done.stdout
    assert "PSF" in dsmoe(tiny_model(), "--chunks", "1").stdout


def test_a_reference_is_recorded_kept_and_used_again(text: Path, smaller: Path, tmp_path: Path) -> None:
    """Guards: another result from a kept reference, one that is written over, files that stay behind."""
    kept = tmp_path / "kept"
    recorded = as_json(tiny_model(), "--text", text, "--keep", kept)
    assert recorded["comparison"] is None
    first = as_json(smaller, "--text", text, "--against", tiny_model())
    again = as_json(smaller, "--against", kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "text.txt"]
    for name in ("model", "text", "text_digest", "n_context", "n_windows"):
        assert first[name] == again[name]
    assert again["comparison"] == first["comparison"]
    assert first["comparison"]["divergence"]["kl"]["value"] > 0
    assert 0 < first["comparison"]["routing"]["overlap"] < 1
    for arguments, words in (
        (("--keep", kept), "exists already"),
        (("--against", kept, "--text", "-"), "recorded on another text"),
        (("--against", kept, "-c", "32"), "windows of 64"),
        (("--against", kept, "--keep", tmp_path / "new"), "--keep has no effect"),
    ):
        done = dsmoe(smaller, *arguments, text="other " * 200)
        assert (done.returncode, done.stdout) in ((1, ""), (2, "")), arguments
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


def test_options_of_the_model_alone() -> None:
    """Guards: a reference with fewer experts, too, so that nothing differs."""
    found = as_json(tiny_model(), "--against", tiny_model(), "--active-experts", "1", "--chunks", "3")
    assert found["comparison"]["divergence"]["kl"]["value"] > 1e-3
    assert found["comparison"]["routing"]["same"] == 0


def test_short_errors(text: Path, tmp_path: Path) -> None:
    """Guards: tracebacks, models loaded for what cannot be, and folders that failed runs leave behind."""
    dense = write_tiny(tmp_path / "dense.gguf", DENSE)
    damaged = tmp_path / "damaged"
    shutil.copyfile(text, damaged)
    for arguments, words in (
        ((tiny_model(), "--text", tmp_path / "none"), "cannot be read"),
        ((tiny_model(), "-c", "4"), "out of range"),
        ((tiny_model(), "-c", "256", "--text", "-"), "too few for a window of 256"),
        ((tiny_model(), "--against", damaged), "GGUF"),
        ((dense, "--against", tiny_model(), "--text", text), "tokens, this one has"),
        ((tiny_model(), "--keep", tmp_path / "no" / "kept"), "No such file"),
    ):
        done = dsmoe(*arguments, text="short")
        assert done.returncode in (1, 2), arguments
        assert words in done.stderr, arguments
        assert len(done.stderr.splitlines()) <= 4
        assert "Traceback" not in done.stderr
    assert list((cache_folder() / "eval").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "dense.gguf", "text.txt"]


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    """Guards: a run that goes on, a traceback, or half a reference left behind."""
    text = tmp_path / "text.txt"
    text.write_text(built_in().content * 100)  # minutes of work
    command = [sys.executable, "-c", CODE, "eval", str(tiny_model()), *ONE_AT_ONCE]
    process = subprocess.Popen(
        [
            *command,
            "--text",
            str(text),
            "--keep",
            str(tmp_path / "kept"),
            "--log-file",
            str(tmp_path / "log"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # The model is loaded, and its reference begun.
    while process.poll() is None and not list(cache_folder().glob("eval/*/.predictions.part")):
        pass
    # Meanwhile the name is taken.
    second = dsmoe(tiny_model(), "--text", text, "--keep", tmp_path / "kept")
    assert second.returncode == 1
    assert second.stderr.startswith("error: another run is writing kept\n")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "text.txt"]
    assert list((cache_folder() / "eval").iterdir()) == []
