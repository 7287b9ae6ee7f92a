"""The plain terminal: lines in, lines out, nothing else."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.terminal import CTRL_C, CTRL_D, ENTER, Terminal

CHAT = ["-m", "support.terminal_chat"]
Start = Callable[..., Terminal]


@pytest.fixture(params=["dumb", "xterm-256color"])
def chat(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """Starts chats, on a terminal that can only print and with --plain on one that can more."""
    started: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        plain = ("plain",) if request.param != "dumb" else ()
        terminal = Terminal([*CHAT, *plain, *arguments], {"TERM": request.param}, columns=40, folder=tmp_path)
        started.append(terminal)
        terminal.wait_for(r"/help\n> ")
        return terminal

    yield start
    for terminal in started:
        terminal.__exit__(None, None, None)


def test_a_chat(chat: Start) -> None:
    """Guards: escape codes for those who cannot see them, replies that are wrapped or drawn."""
    terminal = chat()
    terminal.send("/reply markdown" + ENTER)
    terminal.wait_for(r"\n# Experts\n\nA \*\*mixture of experts\*\* has many small networks, and")
    terminal.wait_for(r"compute is not\.\n> ")
    terminal.send("/error" + ENTER)
    terminal.wait_for(r"error: this cannot be\n  here\n  do that\n> ")
    terminal.send("/delete x" + ENTER)
    terminal.wait_for(r"delete x\? \[y/N\] ")
    terminal.send("y" + ENTER)
    terminal.wait_for(r"gone\n> ")
    terminal.send("/exit" + ENTER)
    assert terminal.ending() == 0
    # They tell the terminal to mark pastes; one that can only print gets none.
    assert set(re.findall("\x1b.?[^a-z]*.?", terminal.raw)) <= {"\x1b[?2004h", "\x1b[?2004l"}


def test_interruption(chat: Start) -> None:
    """Guards: Ctrl-C that ends the chat, in a reply or at the prompt."""
    terminal = chat()
    terminal.send("/reply halt" + ENTER)
    terminal.wait_for("so it wraps.")
    terminal.send(CTRL_C)
    terminal.wait_for(r"stopped: /continue goes on\]\n> ")
    terminal.send("half")
    terminal.wait_for("half")
    terminal.send(CTRL_C)
    terminal.wait_for(r"Ctrl-D or /exit leaves\n> ")
    terminal.send(CTRL_D)
    assert terminal.ending() == 0


def test_second_interruption(chat: Start) -> None:
    """Guards: a chat that waits for ever for an engine that hangs."""
    terminal = chat("hangs")
    terminal.send("/reply halt" + ENTER)
    terminal.wait_for("so it wraps.")
    terminal.send(CTRL_C)
    terminal.wait_for("hung")
    terminal.send(CTRL_C)
    terminal.wait_for(r"(?s)killed.*stopped.*\n> ")


def test_long_prompts_are_announced_once(chat: Start) -> None:
    """Guards: progress that a screen reader reads again and again."""
    terminal = chat()
    terminal.send("/prompt" + ENTER)
    terminal.wait_for(r"reading 2,000 tokens\n")
    terminal.send(CTRL_C)
    terminal.wait_for(r"\[stopped\]\n> ")
    assert terminal.text.count("reading") == 1


@pytest.mark.parametrize("busy", [False, True])
def test_signals(chat: Start, busy: bool) -> None:
    """Guards: SIGTERM that is swallowed, or that cuts a reply off."""
    terminal = chat()
    if busy:
        terminal.send("/reply halt" + ENTER)
        terminal.wait_for("so it wraps.")
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.ending() == 128 + signal.SIGTERM
    assert ("stopped" in terminal.text) == busy


def test_history(tmp_path: Path) -> None:
    """Guards: what was typed before not coming back where lines can be edited."""
    for keys in ("remember me", "\x1b[A"):
        environment = {"TERM": "xterm-256color"}
        with Terminal([*CHAT, "plain"], environment, folder=tmp_path) as terminal:
            terminal.wait_for(r"/help\n> ")
            terminal.send(keys + ENTER)
            terminal.wait_for(r"remember me\nremember me\n> ")
            terminal.send(CTRL_D)
            assert terminal.ending() == 0
