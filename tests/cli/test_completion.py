"""Completion in real shells, put where the help says, and of what names files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete

from dsmoe_local.cli.commands import COMMANDS, load_command
from dsmoe_local.cli.completion import PROGRAMS
from dsmoe_local.cli.main import group

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ASK = {
    "bash": "source ~/.bashrc; f=$(complete -p {program} | sed 's/.*-F \\([^ ]*\\) .*/\\1/');"
    ' COMP_WORDS=({program} {typed}); COMP_CWORD=1; "$f" {program}; printf "%s\\n" "${{COMPREPLY[@]}}"',
    # What zsh shows needs a terminal: here its function is called, with what shows things replaced.
    "zsh": "source ~/.zshrc; compadd() {{ print -l -- $completions }};"
    " _describe() {{ print -l -- $completions_with_descriptions }};"
    " words=({program} {typed}); CURRENT=2; $_comps[{program}]",
    "fish": "complete --do-complete '{program} {typed}'",
}
TYPED = {
    "dsmoe": ("mod", "models"),
    "dsmoe-convert": ("--low", "--low-disk"),
    "dsmoe-quantize": ("--recipe-", "--recipe-out"),
    "dsmoe-chat": ("--expe", "--experts"),
    "dsmoe-batch": ("--orde", "--ordered"),
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder with all programs in `bin`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / ".config" / "fish" / "conf.d").mkdir(parents=True)
    for program, entry in PROJECT["scripts"].items():
        module, function = entry.split(":")
        script = tmp_path / "bin" / program
        code = f"import sys; from {module} import {function}; sys.argv[0] = '{program}'; {function}()"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
        script.chmod(0o755)
    return tmp_path


def test_all_programs_are_completed() -> None:
    """Guards: a program that the scripts leave out."""
    assert set(PROGRAMS) == set(PROJECT["scripts"]) == set(TYPED)


@pytest.mark.parametrize("shell", ASK)
def test_every_program_in_a_new_shell(shell: str, home: Path) -> None:
    """Guards: a place where the shell looks for one of the programs alone; a shell that has not been made
    ready for completion.
    """
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    environment = {"HOME": str(home), "PATH": f"{home / 'bin'}:/usr/bin:/bin:/usr/local/bin"}

    def run(*words: str) -> str:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        assert not done.stderr
        return done.stdout

    (line,) = re.findall(rf"^ *(dsmoe completion {shell} .*)$", run("dsmoe", "completion", "--help"), re.M)
    run("sh", "-c", line)
    for program, (typed, completed) in TYPED.items():
        found = run(shell, "-c", ASK[shell].format(program=program, typed=typed))
        assert re.split(r"[\t:\n]", found)[0] == completed


def parameters() -> list[tuple[str, click.Parameter]]:
    """Parameters whose value may be a file, by what the help calls it."""
    files = re.compile(r"FILE|DIR|FOLDER|SRC|\.gguf|\.jsonl|MODEL")
    commands = {name: load_command(name) for name in COMMANDS}
    return [
        (name, each)
        for name, command in commands.items()
        for each in command.params
        if files.search(each.make_metavar(click.Context(command)))
    ]


@pytest.mark.parametrize(
    ("name", "parameter"), parameters(), ids=lambda value: str(getattr(value, "name", value))
)
def test_what_may_be_a_file_is_completed_as_one(name: str, parameter: Any) -> None:
    """Guards: Tab that finds no file where one is wanted."""
    words = [name, *(parameter.opts[-1:] if isinstance(parameter, click.Option) else [])]
    found = ShellComplete(group, {}, "dsmoe", "_DSMOE_COMPLETE").get_completions(words, "./")
    assert [(item.type, item.value) for item in found] == [("file", "./")]
