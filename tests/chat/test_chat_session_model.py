"""`dsmoe-chat --continue` in a pseudo-terminal: the session's own model and settings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.models import tiny_model
from support.screens import ScreenTerminal
from support.terminal import CTRL_D, ENTER

from dsmoe_local.base.config_file import config_path
from dsmoe_local.cli.chat import command, settings_given

CHAT = ["-c", "from dsmoe_local.cli.main import chat; chat()"]
TEMPLATE = ("--chat-template", "deepseek-moe")
READY = "context [0-9]+/256"


def test_a_session_goes_on_with_its_model(tmp_path: Path) -> None:
    """Guards: the demo's model, or the configured one, in place of that which a session was held with."""
    model, other = tmp_path / "mine.gguf", tmp_path / "other.gguf"
    for path in (model, other):
        shutil.copy2(tiny_model(), path)
    with ScreenTerminal([*CHAT, str(model), *TEMPLATE]) as terminal:
        terminal.wait_screen(READY, 60)
        terminal.send("/set max_tokens 3" + ENTER)
        terminal.wait_screen("(?m)^max_tokens 3$")
        terminal.send("/set temperature 0.125" + ENTER)
        terminal.wait_screen("(?m)^temperature 0.125$")
        terminal.send("hello" + ENTER)
        terminal.wait_screen("cut at max_tokens")
        terminal.send(CTRL_D)
        assert terminal.ending() == 0
    configured = {"DSMOE_MODEL": str(other)}
    with ScreenTerminal([*CHAT, "--continue", *TEMPLATE], configured) as terminal:
        shown = terminal.wait_screen(READY, 60)
        assert "restored from this session: model mine.gguf, temperature 0.125, max_tokens 3" in shown
    # What the command line says counts more.
    arguments = [*CHAT, "--continue", "-m", str(other), "--temp", "0.5", *TEMPLATE]
    with ScreenTerminal(arguments, columns=250) as terminal:
        shown = terminal.wait_screen(READY, 60)
        assert "restored from this session: max_tokens 3" in shown
        terminal.send("/show" + ENTER)
        terminal.wait_screen(r"file +\S*/other\.gguf")
    model.unlink()
    with ScreenTerminal([*CHAT, "--session", "chat-1", *TEMPLATE], configured) as terminal:
        shown = terminal.wait_screen("(?s)error: .*MODEL", 60)
        assert "the model of the session chat-1 is gone" in shown
        assert terminal.ending() == 2


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], set()),
        (["--temp", "0.5", "-n", "7", "--on-full", "shift"], {"temperature", "max_tokens", "on_full"}),
        (["--preset", "calm"], {"temperature", "top_k"}),
    ],
)
def test_what_the_command_line_gave(
    arguments: list[str], given: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: defaults, variables or the config file that outweigh the settings of a session."""
    path = config_path()
    path.parent.mkdir(parents=True)
    path.write_text("[chat]\nmin-p = 0.3\n[presets.calm]\ntemp = 0.1\ntop-k = 3\n")
    monkeypatch.setenv("DSMOE_TOP_P", "0.5")
    with command.make_context("chat", arguments):
        assert settings_given() == given
