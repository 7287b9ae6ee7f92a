"""The full terminal and its environment: signals, a hanging engine, history, editor, clipboard, codes."""

from __future__ import annotations

import base64
import os
import re
import signal
import stat
from pathlib import Path

import pytest
from support.processes import is_gone
from support.screens import ScreenTerminal, StartChat
from support.terminal import CTRL_C, CTRL_D, ENTER, editor_script, wait_for_file
from support.tmux import Tmux, needs_tmux

CHAT = ["-m", "support.terminal_chat"]


@pytest.mark.parametrize("keys", [CTRL_D, "/exit" + ENTER, "/reply halt" + ENTER + CTRL_D])
def test_leaving(chat: StartChat, keys: str) -> None:
    """Guards: a chat that cannot be left, or leaves the input and the bar on the screen."""
    terminal = chat()
    terminal.send(keys)
    assert terminal.ending() == 0
    assert "left" in terminal.screen_text()
    assert terminal.screen_text().count("SmolLM2") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("reply", ["", "/reply halt"])
def test_signals_end_it_cleanly(chat: StartChat, number: int, reply: str) -> None:
    """Guards: a terminal left without echo, a reply that is lost, exit status 0."""
    terminal = chat()
    if reply:
        terminal.send(reply + ENTER)
        terminal.wait_screen("so it wraps")
    os.kill(terminal.pid, number)
    assert terminal.ending() == 128 + number
    assert ("stopped" in terminal.screen_text()) == bool(reply)
    assert terminal.raw.rstrip().endswith("ended: the chat was ended by a signal")


def test_interrupt_from_outside(chat: StartChat) -> None:
    """Guards: SIGINT, as `kill -INT` sends it, ending the chat in mid-reply."""
    terminal = chat()
    terminal.send("/reply halt" + ENTER)
    terminal.wait_screen("so it wraps")
    os.kill(terminal.pid, signal.SIGINT)
    terminal.wait_screen(r"stopped.*\n\n>\n")


def test_second_interrupt_ends_an_engine_that_hangs(chat: StartChat) -> None:
    """Guards: a chat that waits for ever for an engine that hangs; the first Ctrl-C killing it."""
    terminal = chat("hangs")
    terminal.send("/reply halt" + ENTER)
    terminal.wait_screen("so it wraps")
    terminal.send(CTRL_C)
    terminal.wait_screen("Ctrl-C again")
    assert "killed" not in terminal.screen_text()
    terminal.send(CTRL_C)
    terminal.wait_screen(r"(?s)killed.*stopped.*\n\n>\n")


def test_unexpected_errors_are_raised(chat: StartChat) -> None:
    """Guards: an error in the worker after which nothing is answered any more."""
    terminal = chat()
    terminal.send("/crash" + ENTER)
    assert terminal.ending() == 1
    assert "RuntimeError: nobody expects this" in terminal.text


def test_terminal_is_as_it_was(tmp_path: Path) -> None:
    """Guards: a shell without echo after the chat."""
    code = (
        "import termios, sys\n"
        "from support import terminal_chat\n"
        "before = termios.tcgetattr(0)\n"
        "terminal_chat.main()\n"
        "print('SAME' if termios.tcgetattr(0) == before else 'CHANGED')\n"
    )
    with ScreenTerminal(["-c", code], folder=tmp_path) as terminal:
        terminal.wait_screen("context 0")
        terminal.send("/reply halt" + ENTER)
        terminal.wait_screen("so it wraps")
        terminal.send(CTRL_D)
        assert terminal.ending() == 0
        assert "SAME" in terminal.text


def test_codes_that_are_never_sent(chat: StartChat) -> None:
    """Guards: bracketed paste switched off while something is printed; requests to the terminal."""
    terminal = chat()
    terminal.send("/reply markdown" + ENTER + "/error" + ENTER)
    terminal.wait_screen("do that")
    terminal.send(CTRL_D)
    assert terminal.ending() == 0
    assert terminal.raw.count("\x1b[?2004h") == terminal.raw.count("\x1b[?2004l") == 1
    assert terminal.raw.index("do that") < terminal.raw.index("\x1b[?2004l")
    assert not re.search(r"\x1b\[(?:6n|c|\?u|[0-9;]*t|\?1049h)", terminal.raw)


def test_history_is_private_and_comes_back(chat: StartChat, tmp_path: Path) -> None:
    """Guards: a history that others can read, or that is not kept; a search that does not find."""
    terminal = chat()
    terminal.send("remember me" + ENTER)
    terminal.wait_screen(r"> remember me\n\nremember me\n\n>\n")
    terminal.send("something else" + ENTER)
    terminal.wait_screen(r"> something else\n\nsomething else\n\n>\n")
    terminal.send(CTRL_D)
    assert terminal.ending() == 0
    assert stat.S_IMODE((tmp_path / "history").stat().st_mode) == 0o600
    terminal = chat()
    terminal.send("\x1b[A\x1b[A")
    terminal.wait_screen("(?m)^> remember me$")
    terminal.send(CTRL_C)
    terminal.wait_screen("leaves")
    terminal.send("\x12else")
    terminal.wait_screen(r"> something else\nhistory: else\n")
    terminal.send(ENTER)
    terminal.wait_gone("history:")
    terminal.wait_screen("(?m)^> something else$")


def test_editor(chat: StartChat, tmp_path: Path) -> None:
    """Guards: an editor that gets no text, or whose text does not come back; one that saves nothing."""
    editor = editor_script(tmp_path, 'cp "$1" seen; printf "edited\\nlines\\n" > "$1"')
    terminal = chat(VISUAL=editor)
    terminal.send("half\x07")
    terminal.wait_screen(r"> edited\n  lines\n")
    assert (tmp_path / "seen").read_text(encoding="utf-8") == "half\n"
    terminal.send(ENTER)
    terminal.wait_screen(r"\n\nedited\nlines\n\n>\n")
    terminal.send("/edit" + ENTER)
    terminal.wait_screen("edited: edited lines")
    editor_script(tmp_path, "exit 0")
    terminal.send("/edit" + ENTER)
    terminal.wait_screen("edited: None")
    terminal.send("kept\x18\x05")
    terminal.wait_screen("(?m)^> kept$")


def test_an_editor_that_is_killed(tmp_path: Path) -> None:
    """Guards: a terminal left in the raw mode of an editor that could not restore it."""
    code = (
        "import termios\n"
        "from dsmoe_local.chat.terminal.external import Editor\n"
        "before = termios.tcgetattr(0)\n"
        "print(Editor().edit('text'), 'SAME' if termios.tcgetattr(0) == before else 'CHANGED')\n"
    )
    editor = editor_script(tmp_path, "stty raw -echo\nkill -KILL $$")
    with ScreenTerminal(["-c", code], {"VISUAL": editor}, folder=tmp_path) as terminal:
        terminal.wait_screen("None SAME")


def test_editor_that_does_not_start(chat: StartChat) -> None:
    """Guards: a missing editor ending the chat."""
    terminal = chat(VISUAL="/nowhere/editor")
    terminal.send("kept\x07")
    terminal.wait_screen(r"error: the editor does not start")
    terminal.wait_screen("(?m)^> kept$")


@pytest.mark.parametrize("tmux", [False, True])
def test_clipboard(chat: StartChat, tmux: bool) -> None:
    """Guards: text that does not reach the terminal's clipboard; a sequence that tmux swallows."""
    terminal = chat(**({"TMUX": "/nowhere,1,0"} if tmux else {}))
    terminal.send("/copy 专家 code" + ENTER)
    terminal.wait_screen(r"OSC 52")
    sequence = f"\x1b]52;c;{base64.b64encode('专家 code'.encode()).decode()}\x07"
    wrapped = f"\x1bPtmux;{sequence.replace(chr(27), chr(27) * 2)}\x1b\\"
    assert (wrapped if tmux else sequence) in terminal.raw


@needs_tmux
def test_suspended_and_continued(tmp_path: Path) -> None:
    """Guards: Ctrl-Z that stops nothing, a terminal that is not drawn again, a copy of what was drawn."""
    code = (
        "import os, signal, subprocess, sys\n"
        "def take_terminal():\n"
        "    os.tcsetpgrp(0, os.getpid())\n"
        "    signal.signal(signal.SIGTTOU, signal.SIG_DFL)\n"
        "signal.signal(signal.SIGTTOU, signal.SIG_IGN)\n"
        "command = [sys.executable, '-m', 'support.terminal_chat']\n"
        "child = subprocess.Popen(command, process_group=0, preexec_fn=take_terminal)\n"
        "os.waitpid(child.pid, os.WUNTRACED)\n"
        "os.tcsetpgrp(0, os.getpgrp())\n"
        "input('stopped, Enter goes on')\n"
        "os.tcsetpgrp(0, child.pid)\n"
        "os.killpg(child.pid, signal.SIGCONT)\n"
        "child.wait()\n"
    )
    with Tmux(["-c", code], tmp_path) as tmux:
        tmux.wait_for("context 0/2,048")
        tmux.send("half a line", "C-z")
        tmux.wait_for("help\nstopped, Enter goes on$")
        tmux.send("Enter")
        tmux.wait_for(r"goes on\n\n> half a line\n.*context 0/2,048$")
        tmux.send("x")
        tmux.wait_for("half a linex")


@pytest.mark.parametrize("opened", ["draft\x07", "/edit" + ENTER])
@pytest.mark.parametrize("trap", ["", "trap '' TERM INT"])
def test_signal_while_an_editor_is_open(chat: StartChat, tmp_path: Path, opened: str, trap: str) -> None:
    """Guards: a chat that ends only when its editor does; one that leaves the editor behind."""
    editor = editor_script(tmp_path, f"{trap}\nmkfifo wait\necho $$ > pid\nread line < wait")
    terminal = chat(VISUAL=editor)
    terminal.send(opened)
    wait_for_file(pid := tmp_path / "pid")
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.ending() == 128 + signal.SIGTERM
    assert is_gone(int(pid.read_text(encoding="utf-8")))


_LOADING = (
    "import contextlib, os, time\n"
    "from dsmoe_local.chat.terminal import keys_withheld\n"
    "from support import terminal_chat\n"
    "with {withheld}():\n"
    "    print('loading', flush=True)\n"
    "    while not os.path.exists('go'): time.sleep(0.01)\n"
    "terminal_chat.main()\n"
)


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ("early" + ENTER + "later", r"help\n\n> early\n\nearly\n\n> later\n"),
        ("one\rtwo\rthree\r", r"help\n\n> one\n  two\n  three\n"),
        ("one\ntwo\tx\nthree", r"help\n\n> one\n  two x\n  three\n"),
        ("wrohg\x7f\x7fng", r"help\n\n> wrong\n"),
        ("ab\x1b[Dc", r"help\n\n> acb\n"),
    ],
)
def test_keys_typed_while_a_model_loads(tmp_path: Path, keys: str, shown: str) -> None:
    """Guards: keys that are lost or echoed into the progress of the load, an Enter that does not send, a
    paste whose lines are sent one by one.
    """
    code = _LOADING.format(withheld="keys_withheld")
    with ScreenTerminal(["-c", code], folder=tmp_path) as terminal:
        terminal.wait_screen("loading")
        terminal.send(keys)
        (tmp_path / "go").touch()
        terminal.wait_screen(rf"(?s)loading\n.*{shown}")


def test_enter_typed_before_keys_were_withheld(tmp_path: Path) -> None:
    """Guards: an Enter that the terminal has turned into a line feed, because it was not in raw mode yet."""
    code = _LOADING.format(withheld="contextlib.nullcontext")
    with ScreenTerminal(["-c", code], folder=tmp_path) as terminal:
        terminal.wait_screen("loading")
        terminal.send("early" + ENTER)
        terminal.wait_screen("early")
        (tmp_path / "go").touch()
        terminal.wait_screen(r"> early\n\nearly\n\n>\n")


def test_lines_typed_at_an_editor_that_does_not_read(chat: StartChat, tmp_path: Path) -> None:
    """Guards: a paste while an editor with a window of its own is open, whose lines are sent one by one."""
    editor = editor_script(tmp_path, "mkfifo wait; echo > open; read line < wait; exit 1")
    terminal = chat(VISUAL=editor)
    terminal.send("\x07")
    wait_for_file(tmp_path / "open")
    terminal.send("one\rtwo\r")
    terminal.wait_screen("two")
    (tmp_path / "wait").write_text("\n", encoding="utf-8")
    terminal.wait_screen(r"> one\n  two\n")
