"""`dsmoe-chat -p`: the answer alone on stdout, errors short, pipes that close, no colour in them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import smollm2, tiny_model
from support.processes import children_of

from dsmoe_local.base.paths import demo_folder

CODE = "from dsmoe_local.cli.main import chat; chat()"


def run(
    *arguments: str, given: str | bytes | None = None, model: Path | None = None
) -> subprocess.CompletedProcess[str]:
    named = [] if model is None else ["-m", str(model)]
    return subprocess.run(
        [sys.executable, "-c", CODE, *named, *arguments],
        input=given if given is None or isinstance(given, str) else given.decode("latin-1"),
        stdin=subprocess.DEVNULL if given is None else None,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
        check=False,
    )


def test_answer_alone_on_stdout() -> None:
    """Guards: logs, statistics or colours in what a script reads."""
    done = run("-p", "Tell me the capital of France.", "--temp", "0", model=smollm2())
    assert done.returncode == 0
    assert "Paris" in done.stdout
    assert done.stdout.endswith("\n")
    assert done.stdout[0].strip()
    assert done.stderr == ""
    assert "\x1b" not in done.stdout


def test_prompt_from_elsewhere(tmp_path: Path) -> None:
    """Guards: a prompt in a pipe or file that differs from the same one typed."""
    greedy = ("--temp", "0", "-n", "8")
    expected = run("-p", "The quick\nbrown fox", *greedy, model=tiny_model()).stdout
    text = "The quick\nbrown fox\n"
    (tmp_path / "prompt.txt").write_text(text)
    found = [run("-f", str(tmp_path / "prompt.txt"), *greedy, model=tiny_model())]
    found += [run(*asked, *greedy, given=text, model=tiny_model()) for asked in ([], ["-p", "-"], ["-"])]
    assert [(done.returncode, done.stdout) for done in found] == [(0, expected)] * 4


def test_what_is_piped_comes_before_the_prompt(tmp_path: Path) -> None:
    """Guards: stdin or a file that is dropped because there is a prompt too, or that follows it."""
    greedy = ("--temp", "0", "-n", "8")
    (tmp_path / "middle.txt").write_text("brown\n")
    expected = run("-p", "The quick\n\nbrown\n\nfox", *greedy, model=tiny_model()).stdout
    done = run(
        "-p", "fox", "-f", str(tmp_path / "middle.txt"), *greedy, given="The quick\n", model=tiny_model()
    )
    assert (done.returncode, done.stdout) == (0, expected)


def test_a_schema_is_kept(tmp_path: Path) -> None:
    """Guards: a schema that does not reach the engine; an answer that is not what it allows."""
    schema = tmp_path / "schema.json"
    schema.write_text(
        '{"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],'
        ' "additionalProperties": false}'
    )
    asked = ("-p", "What is the capital of France?", "--schema", str(schema), "--temp", "0")
    done = run(*asked, "--json", model=smollm2())
    assert done.returncode == 0
    envelope = json.loads(done.stdout)
    assert envelope["value"] == json.loads(envelope["text"]) == {"city": "Paris"}
    assert json.loads(run(*asked, model=smollm2()).stdout) == envelope["value"]
    cut = run(*asked, "-n", "2", model=smollm2())
    assert cut.returncode == 1
    assert "before it was valid JSON" in cut.stderr
    schema.write_text('{"type": "colour"}')
    wrong = run(*asked, model=smollm2())
    assert (wrong.returncode, wrong.stdout) == (2, "")


def test_arguments_that_are_no_text() -> None:
    """Guards: a traceback for bytes that no shell should pass, but does."""
    done = run("-p", os.fsdecode(b"caf\xe9"), model=tiny_model())
    assert done.returncode == 2
    assert "not UTF-8" in done.stderr


def test_statistics_on_stderr_and_json() -> None:
    """Guards: statistics on stdout; a JSON envelope that does not parse."""
    done = run("-p", "fox", "-n", "4", "--stats", "--json", "-s", "3", model=tiny_model())
    envelope = json.loads(done.stdout)
    assert set(envelope) == {"text", "finish_reason", "usage", "model"}
    assert envelope["usage"]["seed"] == 3
    assert re.search(r"prompt \d+ tokens", done.stderr)


def test_reader_that_goes_away() -> None:
    """Guards: a traceback, or a model that goes on, after `| head`."""
    code = f"{sys.executable} -c '{CODE}' -m '{smollm2()}' -p 'Tell a long story.' --temp 0 | head -c 5"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["/bin/sh", "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert len(done.stdout) == 5
    assert done.stderr == ""


def test_output_that_is_closed() -> None:
    """Guards: an answer that goes nowhere, and the exit status of success."""
    code = f"{sys.executable} -c '{CODE}' -m '{tiny_model()}' -p fox -n 4 >&-"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["/bin/sh", "-c", code], stderr=subprocess.PIPE, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr == b"error: Bad file descriptor\n"


def test_engine_that_dies_in_the_middle() -> None:
    """Guards: a crash of llama.cpp as a traceback, a hang, or an exit status of success."""
    child = subprocess.Popen(
        [sys.executable, "-c", CODE, "-m", str(smollm2()), "-p", "Write a very long story.", "--temp", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    child.stdout.read(1)
    (engine,) = children_of(child.pid)
    os.kill(engine, signal.SIGSEGV)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    assert errors.startswith(b"error: the engine was killed by SIGSEGV\n")
    assert len(errors.splitlines()) <= 3


def test_interruption_keeps_what_came() -> None:
    """Guards: Ctrl-C losing the answer so far, or exiting with 0."""
    child = subprocess.Popen(
        [sys.executable, "-c", CODE, "-m", str(smollm2()), "-p", "Write a very long story.", "--temp", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    first = child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert (first + rest).endswith(b"\n")
    assert b"Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["-p", "x", "-f", "/no/such/file"], 1, "cannot be read"),
        (["-f", "/no/such/file"], 1, "cannot be read"),
        (["-p", "x", "-n", "0"], 2, "max_tokens = 0 is out of range\n  from -n\n"),
        (["-p", "x", "--temp", "-1"], 2, "temperature"),
        (["-p", "x", "--top-p", "nan"], 2, "--top-p"),
        (["-p", "x", "-ngl", "some"], 2, "not a number, auto or all"),
        (["-p", "x", "--active-experts", "99"], 2, "out of range"),
        (["-p", "x" * 100_000], 1, "was not sent"),
        (["-p", ""], 2, "empty"),
    ],
)
def test_mistakes_are_short_errors(arguments: list[str], status: int, message: str) -> None:
    """Guards: tracebacks, and exit statuses that scripts cannot tell apart."""
    done = run(*arguments, model=tiny_model())
    assert done.returncode == status
    assert message in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) <= 3
    assert "Traceback" not in done.stderr


def test_no_terminal_and_no_prompt() -> None:
    """Guards: an empty pipe opening a chat that nobody can see."""
    assert run(given="", model=tiny_model()).returncode == 2
    assert run(given=b"\xff".decode("latin-1"), model=tiny_model()).returncode in (0, 1)


def test_model_that_is_not_there() -> None:
    """Guards: no hint at the demo; a traceback for a missing or damaged file."""
    done = run("-p", "x")
    assert done.returncode == 2
    assert "dsmoe demo" in done.stderr
    assert run("-p", "x", model=Path("/no/such.gguf")).returncode == 1
    demo_folder().mkdir(parents=True)
    (demo_folder() / "demo-q4.gguf").symlink_to(tiny_model())
    done = run("-p", "x", "-n", "2")
    assert done.returncode == 0
    assert "using the demo's" in done.stderr
