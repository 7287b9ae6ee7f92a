"""Parts of the terminals, tested without one: completion, status bar, clipboard, editor."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import cast

import pytest
from rich.cells import cell_len

from dsmoe_local.base.errors import FileError
from dsmoe_local.chat.commands.completion import choices
from dsmoe_local.chat.commands.declare import Chat, Command
from dsmoe_local.chat.terminal import external
from dsmoe_local.chat.terminal.display import DimText
from dsmoe_local.chat.terminal.external import Editor
from dsmoe_local.chat.terminal.layout import shorten, status_bar
from dsmoe_local.chat.terminal.renderer import ResizeBehaviour, resize_behaviour
from dsmoe_local.chat.terminal.screen import Status

NO_CHAT = cast(Chat, None)


def _nothing(chat: Chat, argument: str) -> None:
    return None


NAMES = ("notes on go", "notes", "other")
COMMANDS = {
    "load": Command(
        _nothing, "go on", "NAME", complete=lambda chat, typed: ("notes on go", "notes", "other")
    ),
    "exit": Command(_nothing, "leave", aliases=("quit", "bye")),
    "read": Command(_nothing, "read", "FILE", files=True),
}


def _completed(before: str) -> list[str]:
    return [before[: len(before) - each.replaces] + each.text for each in choices(before, COMMANDS, NO_CHAT)]


@pytest.mark.parametrize(
    ("before", "completed"),
    [
        ("/", ["/load ", "/exit", "/read "]),
        ("/l", ["/load "]),
        ("/q", ["/quit"]),
        ("/x", []),
        ("text /l", []),
        ("/load n", ["/load notes on go", "/load notes"]),
        ("/load notes o", ["/load notes on go", "/load notes other"]),
        ("/exit n", []),
    ],
)
def test_completion_of_commands(before: str, completed: list[str]) -> None:
    """Guards: aliases offered beside the name, names with spaces that end at the first one."""
    assert _completed(before) == completed


def test_completion_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: names with spaces cut in two, hidden files offered, an e-mail address taken for a file; a user,
    a name or a character that does not exist ending the chat.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes").mkdir()
    for name in ("note one.txt", "notes/inner.md", ".hidden", "bad\nname"):
        (tmp_path / name).touch()
    assert _completed("see @no") == ["see @notes/", 'see @"note one.txt"']
    assert _completed('see @"note') == ['see @"notes/', 'see @"note one.txt"']
    assert _completed("/read ~/notes/i") == ["/read ~/notes/inner.md"]
    assert _completed("/read .h") == ["/read .hidden"]
    assert _completed("me@no") == []
    for typed in ("see @~nobody-of-that-name/", "see @a\0b/c", "see @a\ud800b/c", f"/read {'x' * 5000}/y"):
        assert _completed(typed) == []
    assert [each.shown for each in choices("@", COMMANDS, NO_CHAT)] == ["notes/", "note one.txt"]


@pytest.mark.parametrize("columns", range(1, 120, 7))
def test_the_status_bar_fits(columns: int) -> None:
    """Guards: a status bar that is cut off in a narrow window before its most important part."""
    status = Status("DeepSeekMoE 16B", "专家 notes", 3900, 4096, 8.25, "a note")
    text = "".join(part[1] for part in status_bar(status, columns))
    assert "3,900/4,096" in text
    assert cell_len(text) <= max(columns, len("3,900/4,096"))
    assert columns < 115 or "8.2 tokens/s  ·  a note" in text


@pytest.mark.parametrize(
    ("variables", "known", "tmux"),
    [
        ({}, False, False),
        ({"TMUX": "/tmp/s,1,0"}, True, True),
        ({"TERM": "tmux-256color"}, True, True),
        ({"TERM": "screen-256color", "STY": "1"}, False, False),
        ({"VTE_VERSION": "7600"}, True, False),
        ({"VTE_VERSION": "7600", "XTERM_VERSION": "XTerm(390)"}, False, False),
        ({"VTE_VERSION": "7600", "TERM": "st-256color"}, False, False),
        ({"TMUX": "/tmp/s,1,0", "XTERM_VERSION": "XTerm(390)"}, False, False),
        ({"TMUX": "/tmp/s,1,0", "XTERM_VERSION": "XTerm(390)", "TERM": "screen"}, True, True),
        ({"TERM": "xterm-kitty"}, True, False),
        ({"TERM": "alacritty", "XTERM_VERSION": "XTerm(390)"}, True, False),
        ({"TERM_PROGRAM": "iTerm.app"}, True, False),
        ({"TERM": "linux"}, False, False),
    ],
)
def test_terminals_that_are_known_to_wrap(
    variables: dict[str, str], known: bool, tmux: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: an unknown terminal taken for a reflowing one, so that the conversation is erased."""
    environment = {"TERM": "xterm-256color", **variables}
    monkeypatch.setattr(os, "environ", environment)
    assert resize_behaviour() == ResizeBehaviour(reflows=known, keeps_empty_rows=tmux)


def test_shortening() -> None:
    """Guards: a wide character cut in two, a line break in a line."""
    assert shorten("专家专家", 5) == "专家…"
    assert shorten("a\nb", 5) == "a b"


def test_text_too_long_for_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a sequence that the terminal drops, reported as copied."""
    for variable in ("TMUX", "STY"):
        monkeypatch.delenv(variable, raising=False)
    assert external.osc_52("x" * (external.OSC_52_LIMIT + 1)) is None
    monkeypatch.setenv("STY", "1")
    pieces = (external.osc_52("专" * 1000) or "").removesuffix("\x1b\\").split("\x1b\\")
    assert all(piece.startswith("\x1bP") and len(piece) < 250 for piece in pieces)
    joined = "".join(piece.removeprefix("\x1bP") for piece in pieces)
    assert base64.b64decode(joined.removeprefix("\x1b]52;c;").removesuffix("\x07")).decode() == "专" * 1000


def test_clipboard_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a failed tool reported as success, a tool of another desktop."""
    for name, body in (("wl-copy", "exit 1"), ("xclip", f"cat > {tmp_path}/copied"), ("pbcopy", "exit 0")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("TMUX", raising=False)
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    monkeypatch.setenv("DISPLAY", ":0")
    assert external.copy_with_tool("专家") == "xclip"
    assert (tmp_path / "copied").read_text(encoding="utf-8") == "专家"


def test_no_editor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a traceback where no editor is installed."""
    for variable in ("VISUAL", "EDITOR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FileError, match="there is no editor"):
        Editor().edit("text")


@pytest.mark.parametrize("colour", [True, False])
def test_dim_text(colour: bool) -> None:
    """Guards: reasoning that is not dimmed, or is obeyed by the terminal, or is printed twice or never."""
    text = DimText(colour=colour)
    assert text.feed("one two", 80) == ""
    assert text.lines(80, 3) == ["\x1b[2mone two\x1b[0m"]
    assert text.feed(" three\n\nx\x1b[31m", 8) == "\x1b[2mone two\x1b[0m\n\x1b[2mthree\x1b[0m\n\n"
    assert text.lines(4, 1) == ["\x1b[2m1m\x1b[0m"]
    assert text.finish(80).count("\x1b") == 2
    assert text.lines(80, 3) == []
    assert text.finish(80) == ""
