"""Commands run with a config file: writing it, running `chat`, what is complained of, what `config` shows."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from dsmoe_local.base.config_file import config_path
from dsmoe_local.cli.commands import load_command
from dsmoe_local.cli.main import group, run


def write_config(text: str) -> None:
    """The config file."""
    config_path().parent.mkdir(parents=True, exist_ok=True)
    config_path().write_text(text, encoding="utf-8")


def chat(*arguments: str) -> None:
    """Run `dsmoe chat`."""
    load_command("chat").main(list(arguments), "dsmoe-chat", standalone_mode=False)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that fails says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dsmoe", *arguments])
        assert run(group, "dsmoe") in (1, 2)
    return capsys.readouterr().err


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, Any]]:
    """What `dsmoe config` says of every option."""
    load_command("config").main([*arguments, "--json"], standalone_mode=False)
    return {each["key"]: each for each in json.loads(capsys.readouterr().out)["options"]}
