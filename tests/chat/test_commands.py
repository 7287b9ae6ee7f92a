"""Slash commands: what is one, what they say, what help and completion know of them."""

from __future__ import annotations

import pytest

from dsmoe_local.chat.commands import table as commands


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/help", "help"),
        (" /quit ", "exit"),
        ("/set top_k 3", "set"),
        ("/usr/bin is a folder", None),
        ("/home/me", None),
        ("//", None),
        ("hello /help", None),
        ("", None),
    ],
)
def test_only_known_names_are_commands(text: str, expected: str | None) -> None:
    """Guards: a path that cannot be sent; a command sent as a message."""
    parsed = commands.parse(text)
    if expected is None:
        assert parsed is None
    else:
        assert isinstance(parsed, tuple)
        assert parsed[0] is commands.COMMANDS[expected]
    assert commands.parse("/claer") == commands.Unknown("claer", "clear")
    assert commands.parse("/frobnicate") == commands.Unknown("frobnicate", "help")
