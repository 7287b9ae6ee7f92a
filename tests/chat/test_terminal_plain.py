"""The plain terminal: lines, blocks, pastes and signals in, lines out."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.processes import is_gone
from support.terminal import CTRL_C, CTRL_D, ENTER, Terminal, editor_script, wait_for_file

CHAT = ["-m", "support.terminal_chat"]
Start = Callable[..., Terminal]


@pytest.fixture(params=["dumb", "xterm-256color"])
def chat(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """Start chats on a dumb terminal, and with --plain on one that can more."""
    plain = () if request.param == "dumb" else ("plain",)
    with ExitStack() as started:

        def start(*arguments: str, **environment: str) -> Terminal:
            values = {"TERM": request.param, "VISUAL": "", **environment}
            terminal = Terminal([*CHAT, *plain, *arguments], values, columns=40, folder=tmp_path)
            started.enter_context(terminal)
            terminal.wait_for(r"/help\n> ")
            return terminal

        yield start


def test_a_chat(chat: Start) -> None:
    """Guards: escape codes for screen readers, replies that are wrapped or drawn."""
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
    # Only bracketed paste, and not even that on a dumb terminal.
    assert set(re.findall("\x1b.?[^a-z]*.?", terminal.raw)) <= {"\x1b[?2004h", "\x1b[?2004l"}


def test_interruption(chat: Start) -> None:
    """Guards: Ctrl-C that ends the chat, in a reply or at the prompt."""
    terminal = chat()
    terminal.send("/reply halt" + ENTER)
    terminal.wait_for("so it wraps.")
    terminal.send(CTRL_C)
    terminal.wait_for(r"stopped: /continue continues it\]\n> ")
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
    """Guards: a history that readline does not get."""
    for keys in ("remember me", "\x1b[A"):
        environment = {"TERM": "xterm-256color"}
        with Terminal([*CHAT, "plain"], environment, folder=tmp_path) as terminal:
            terminal.wait_for(r"/help\n> ")
            terminal.send(keys + ENTER)
            terminal.wait_for(r"remember me\nremember me\n> ")
            terminal.send(CTRL_D)
            assert terminal.ending() == 0


def test_a_paste_names_no_files(chat: Start, tmp_path: Path) -> None:
    """Guards: files that pasted code attaches."""
    (tmp_path / "a.txt").touch()
    terminal = chat()
    terminal.send("import x" + ENTER + "@a.txt" + ENTER)
    terminal.wait_for(r"attaches no files.*\nimport x\n\\@a\.txt\n> ")


def test_blocks(chat: Start) -> None:
    """Guards: a block sent line by line, or with its marks; a docstring that opens one."""
    terminal = chat()
    terminal.send('"""' + ENTER)
    terminal.wait_for(r'"""\n  ')
    terminal.send("/exit" + ENTER)
    terminal.wait_for(r"/exit\n  ")
    terminal.send('"""' + ENTER)
    terminal.wait_for(r'"""\n/exit\n> ')
    terminal.send('"""Return the sum.' + ENTER)
    terminal.wait_for(r'sum\.\n"""Return the sum\.\n> ')
    terminal.send('""""""' + ENTER)
    terminal.wait_for(r'""""""\n> ')


@pytest.mark.parametrize("text", ["one\rtwo\rthree", '"""\rone\r"""\rtwo', '"""\rone\rtwo', '"""\rone\r"""'])
def test_what_comes_at_once_is_one_input(chat: Start, text: str) -> None:
    """Guards: the lines of a paste sent one by one; quotes in it that open a block or are lost."""
    terminal = chat()
    terminal.send(text + ENTER)
    lines = text.replace("\r", "\n")
    terminal.wait_for(rf"\n{lines}\n> ")


def test_lines_typed_amid_a_reply_are_one_input(chat: Start) -> None:
    """Guards: a paste during a reply whose lines are sent one by one."""
    terminal = chat()
    terminal.send("/reply halt" + ENTER)
    terminal.wait_for("so it wraps.")
    terminal.send("one\rtwo\rthree\r")
    terminal.wait_for("three")
    os.kill(terminal.pid, signal.SIGINT)
    terminal.wait_for(r"stopped: /continue continues it\](?s:.*)[\n ]one\ntwo\nthree\n> ")


def test_lines_typed_at_an_editor_are_one_input(chat: Start, tmp_path: Path) -> None:
    """Guards: a paste while an editor with a window of its own is open, whose lines are sent one by one."""
    terminal = chat(VISUAL=editor_script(tmp_path, "mkfifo wait; echo > open; read line < wait; exit 1"))
    terminal.send("/edit" + ENTER)
    wait_for_file(tmp_path / "open")
    terminal.send("one\rtwo\r")
    terminal.wait_for("two")
    (tmp_path / "wait").write_text("\n", encoding="utf-8")
    terminal.wait_for(r"edited: None(?s:.*)[\n ]one\ntwo\n> ")


def test_marked_pastes(tmp_path: Path) -> None:
    """Guards: a bracketed paste that sends itself, tabs in it that complete."""
    with Terminal([*CHAT, "plain"], {"TERM": "xterm-256color"}, folder=tmp_path) as terminal:
        terminal.wait_for(r"/help\n> ")
        terminal.paste("one\ttwo\rthree\r")
        terminal.wait_for("three")
        terminal.send("four" + ENTER)
        terminal.wait_for(r"\none\ttwo\nthree\nfour\n> ")
        terminal.paste('"""\ra docstring\r')
        terminal.send(ENTER)
        terminal.wait_for(r'\n"""\na docstring\n> ')


def test_bytes_that_are_no_text(chat: Start) -> None:
    """Guards: a byte that is not UTF-8 ending the chat."""
    terminal = chat()
    os.write(terminal.master, b"caf\xe9 au lait\r")
    terminal.wait_for("\ncaf.{1,2} au lait\n> ")


def test_interruption_is_the_editors(chat: Start, tmp_path: Path) -> None:
    """Guards: Ctrl-C for the editor that also reaches the engine or the chat."""
    # A signal ends `read`, if it has begun.
    script = "trap 'echo > caught' INT\nmkfifo wait\necho > open\nuntil read line < wait; do :; done\nexit 1"
    terminal = chat("hangs", VISUAL=editor_script(tmp_path, script))
    terminal.send("/edit" + ENTER)
    wait_for_file(tmp_path / "open")
    terminal.send(CTRL_C)
    wait_for_file(tmp_path / "caught")
    (tmp_path / "wait").write_text("\n", encoding="utf-8")
    terminal.wait_for(r"edited: None\n> ")
    assert "hung" not in terminal.text
    assert "leaves" not in terminal.text


def test_signal_while_an_editor_is_open(chat: Start, tmp_path: Path) -> None:
    """Guards: a chat that ends only when its editor does; one that leaves the editor behind."""
    script = "trap '' TERM\nmkfifo wait\necho $$ > pid\nread line < wait"
    terminal = chat(VISUAL=editor_script(tmp_path, script))
    terminal.send("/edit" + ENTER)
    wait_for_file(pid := tmp_path / "pid")
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.ending() == 128 + signal.SIGTERM
    assert is_gone(int(pid.read_text(encoding="utf-8")))


def test_output_that_nobody_reads_any_more(tmp_path: Path) -> None:
    """Guards: a traceback when the terminal goes away during a reply; a reply that is lost."""
    chat = subprocess.Popen(
        [sys.executable, *CHAT, "plain"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb"},
        cwd=tmp_path,
        text=True,
    )
    with chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        assert chat.stderr is not None
        chat.stdin.write("/reply long 0.05\n")
        chat.stdin.flush()
        while "1. a line" not in chat.stdout.readline():
            pass
        chat.stdout.close()
        assert chat.wait(60) == 128 + signal.SIGHUP
        assert chat.stderr.read() == ""
