"""What `dsmoe` itself does: help, and errors that no command foresees."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from support.configured import complaint

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.cli import main
from dsmoe_local.cli.commands import COMMANDS, ELSEWHERE, load_command
from dsmoe_local.cli.main import group

SCRIPT = "from dsmoe_local.cli.main import dsmoe; dsmoe()"


def run(*arguments: str, stdout: str = "") -> subprocess.CompletedProcess[str]:
    with Path(stdout or "/dev/null").open("w") as file:
        return subprocess.run(
            [sys.executable, "-c", SCRIPT, *arguments],
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("download", "dsmoe pull"),
        ("list", "dsmoe models"),
        ("cht", "did you mean chat?"),
        ("quantise", "did you mean quantize?"),
        ("\x1b[31m", "dsmoe --help"),
        ("", "dsmoe --help"),
    ],
)
def test_another_programs_word(word: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a word of ollama's, or a typing mistake, without a hint at the command that was meant."""
    lines = complaint(capsys, word, "demo-q4").splitlines()
    assert lines[0].startswith("error: there is no command")
    assert answer in lines[1]
    assert len(lines) == 2
    assert "\x1b" not in lines[0]


def test_what_is_named_elsewhere_is_no_command() -> None:
    """Guards: a hint that hides a command of that name; one that names a command that is not there."""
    assert not COMMANDS.keys() & ELSEWHERE.keys()
    for hint in ELSEWHERE.values():
        assert set(re.findall(r"dsmoe ([a-z]+)", hint)) <= COMMANDS.keys()


def test_no_command_shows_the_whole_help() -> None:
    """Guards: help that is cut to three lines, as if it were an error."""
    done = run()
    assert done.returncode == 2
    assert "Commands:" in done.stderr
    assert "quantize" in done.stderr
    assert "The same as chat." in done.stderr
    assert "error" not in done.stderr


@pytest.mark.parametrize("width", [80, 40])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_has_no_markup_and_fits(name: str, width: int) -> None:
    """Guards: click's `\\b` shown as it is, a placeholder, a paragraph that runs over the edge."""
    command = load_command(name) if name else group
    with click.Context(command, info_name=f"dsmoe {name}", terminal_width=width) as context:
        text = command.get_help(context)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\\]|\{types\}|``|\*\*", text)
    if width == 80:
        assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize(
    ("arguments", "stdout", "words"),
    [
        (("inspect", "deepseekmoe-16b"), "/dev/full", "No space left"),
        (("inspect", "deepseekmoe-16b", "--json"), "/dev/full", "No space left"),
        (("convert", "a" * 300 + "/x"), "", "File name too long"),
    ],
)
def test_the_systems_errors_are_not_called_ours(arguments: tuple[str, ...], stdout: str, words: str) -> None:
    """Guards: a full disk or an impossible name, reported as a bug of this program."""
    if stdout and not Path(stdout).exists():
        pytest.skip("no such device here")
    done = run(*arguments, stdout=stdout)
    assert done.returncode == 1
    assert words in done.stderr
    assert "internal" not in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3


@pytest.mark.parametrize("pattern", ["a{99999999999}", "(" * 5000, "("])
def test_patterns_that_no_regex_engine_takes(
    pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: errors of the `re` module that are not `re.error`."""
    (tmp_path / "x.gguf").touch()
    words = ("quantize", str(tmp_path / "x.gguf"), "--type", "q4", "--tensor-type", f"{pattern}=q8_0")
    assert "not a regular expression" in complaint(capsys, *words, status=2)


def test_an_output_whose_links_lead_in_a_circle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a symlink loop as the output."""
    from support.tiny_gguf import MOE, write_tiny

    source = write_tiny(tmp_path / "tiny.gguf", MOE)
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    error = complaint(capsys, "quantize", str(source), str(tmp_path / "a"), "--type", "q8")
    assert "internal" not in error
    assert "links" in error


@pytest.mark.parametrize("stream", ["<&-", "<&- >&-"])
def test_closed_streams_are_empty(stream: str) -> None:
    """Guards: streams that the shell closed, which Python has as None, reported as a bug of this program."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {stream}', "sh", sys.executable, "-c", SCRIPT, "chat"],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "the prompt is empty" in done.stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt, click.Abort])
def test_ctrl_c_anywhere_is_130(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: an interruption that a script takes for another failure, or a traceback."""

    @click.command
    def command() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["dsmoe"])
    assert main.run(lambda: command, "dsmoe") == 130
    assert capsys.readouterr().err.strip() == "error: interrupted"


def test_ctrl_c_while_an_interrupted_run_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a double Ctrl-C that hides how to continue."""

    @click.command
    def command() -> None:
        try:
            raise InterruptedRunError("interrupted", signal_number=15, remedy="run the same command again")
        finally:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["dsmoe"])
    assert main.run(lambda: command, "dsmoe") == 143
    assert capsys.readouterr().err.endswith("error: interrupted\n  run the same command again\n")
