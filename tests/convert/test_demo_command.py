"""`dsmoe demo` as people run it: in a process of its own, without a terminal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dsmoe_local.base.paths import demo_folder
from dsmoe_local.model.gguf_model import read_model


def dsmoe(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "from dsmoe_local.cli.main import dsmoe; dsmoe()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.DEVNULL,
        # Threads that wait by spinning starve each other where the cores are shared.
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_demo_answers_and_then_is_there() -> None:
    """`make demo` in CI must end by itself, with the answer alone on stdout; the second run makes nothing."""
    first = dsmoe("demo", "--chat")
    assert first.returncode == 0, first.stderr
    assert "gravity" in first.stdout.lower()
    assert "routed" not in first.stdout
    assert "12 of them active" in first.stderr
    before = {path: path.stat().st_mtime_ns for path in demo_folder().iterdir()}
    for kind in ("q8", "q4"):
        file, hp = read_model(demo_folder() / f"demo-{kind}.gguf")
        assert (hp.n_routed_experts, hp.n_experts_per_token, hp.n_shared_experts) == (14, 12, 2)
        assert hp.tied_embeddings
        assert file.get("tokenizer.ggml.pre") == "smollm"
        assert file.get("tokenizer.chat_template")
    second = dsmoe("demo")
    assert second.returncode == 0, second.stderr
    assert "already made" in second.stdout
    assert "benchmarks/demo_quality.py" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in demo_folder().iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--active-experts", "15"), "error: 15 active experts are impossible"),
        (("--active-experts", "x"), "error: Invalid value"),
        (("--out", "/dev/null"), "error: "),
    ],
)
def test_wrong_arguments_are_one_short_error(arguments: tuple[str, ...], message: str) -> None:
    """A traceback, or a model that llama.cpp aborts on, helps nobody."""
    run = dsmoe("demo", *arguments)
    assert run.returncode in (1, 2)
    assert run.stderr.startswith(message)
    assert len(run.stderr.splitlines()) <= 3
    assert not run.stdout
