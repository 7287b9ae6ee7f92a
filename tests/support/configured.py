"""Helpers to run commands with a config file: write it, run `chat`, get errors, get what `config` shows."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from dsmoe_local.base.config_file import config_path
from dsmoe_local.cli.commands import load_command
from dsmoe_local.cli.main import group, run


def write_config(text: str) -> None:
    """Write the config file."""
    config_path().parent.mkdir(parents=True, exist_ok=True)
    config_path().write_text(text, encoding="utf-8")


def chat(*arguments: str) -> None:
    """Run `dsmoe chat`."""
    load_command("chat").main(list(arguments), "dsmoe-chat", standalone_mode=False)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str, status: int | None = None) -> str:
    """Return the error message of a command that fails, with 1 or 2 or the given exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dsmoe", *arguments])
        returned = run(lambda: group, "dsmoe")
    error = capsys.readouterr().err
    assert returned in ((1, 2) if status is None else (status,)), error
    return error


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, Any]]:
    """Return what `dsmoe config` says about every option, by key."""
    load_command("config").main([*arguments, "--json"], standalone_mode=False)
    return {each["key"]: each for each in json.loads(capsys.readouterr().out)["options"]}
