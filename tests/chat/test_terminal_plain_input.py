"""What the plain terminal makes of lines, blocks, pastes and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.processes import is_gone
from support.terminal import CTRL_C, ENTER, Terminal, editor_script, wait_for_file

from dsmoe_local.chat.terminal.external import Editor
from dsmoe_local.chat.terminal.signals import Interrupts

CHAT = ["-m", "support.terminal_chat"]
KINDS = ("dumb", "xterm-256color")
Start = Callable[..., Terminal]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """TERM of a terminal that can only print, and of one that can more, used with --plain."""
    return str(request.param)


@pytest.fixture
def chat(kind: str, tmp_path: Path) -> Iterator[Start]:
    """Starts chats, in a folder of their own."""
    started: list[Terminal] = []

    def start(*arguments: str, **environment: str) -> Terminal:
        values = {"TERM": kind, "VISUAL": "", **environment}
        terminal = Terminal([*CHAT, "plain", *arguments], values, folder=tmp_path)
        started.append(terminal)
        terminal.wait_for(r"/help\n> ")
        return terminal

    yield start
    for terminal in started:
        terminal.__exit__(None, None, None)


def test_a_paste_names_no_files(chat: Start, tmp_path: Path) -> None:
    """Guards: files that pasted code attaches."""
    (tmp_path / "a.txt").touch()
    terminal = chat()
    terminal.send("import x" + ENTER + "@a.txt" + ENTER)
    terminal.wait_for(r"import x\n\\@a\.txt\n> ")


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
    """Guards: a paste amid a reply whose lines are sent one by one, in a row that nobody can stop."""
    terminal = chat()
    terminal.send("/reply halt" + ENTER)
    terminal.wait_for("so it wraps.")
    terminal.send("one\rtwo\rthree\r")
    terminal.wait_for("three")
    os.kill(terminal.pid, signal.SIGINT)
    terminal.wait_for(r"stopped: /continue goes on\](?s:.*)[\n ]one\ntwo\nthree\n> ")


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
    """Guards: a paste that sends itself, with a terminal that says what a paste is; tabs that complete."""
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
    """Guards: a key of another encoding that ends the chat."""
    terminal = chat()
    os.write(terminal.master, b"caf\xe9 au lait\r")
    terminal.wait_for("\ncaf.{1,2} au lait\n> ")


def test_interruption_is_the_editors(chat: Start, tmp_path: Path) -> None:
    """Guards: Ctrl-C, with which people leave a mode of their editor, that reaches the engine or the chat."""
    script = "trap 'echo > caught' INT\nmkfifo wait\necho > open\nread line < wait\nread line < wait\nexit 1"
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
    assert terminal.ending(seconds=20) == 128 + signal.SIGTERM
    assert is_gone(int(pid.read_text(encoding="utf-8")))


def test_output_that_nobody_reads_any_more(tmp_path: Path) -> None:
    """Guards: a traceback in mid-reply where the terminal went away; a reply that is not ended in order."""
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
        assert chat.wait(20) == 128 + signal.SIGHUP
        assert chat.stderr.read() == ""


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_signals_raise_only_while_a_line_is_read() -> None:
    """Guards: a KeyboardInterrupt anywhere between two inputs, which ends the chat."""
    interrupts = Interrupts()
    with interrupts.handled():
        _interrupt()
        with pytest.raises(KeyboardInterrupt), interrupts.reading():
            pytest.fail("a Ctrl-C before the line was forgotten")
        with pytest.raises(KeyboardInterrupt), interrupts.reading():
            _interrupt()
        _interrupt()
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.ended_by == signal.SIGTERM
        with pytest.raises(EOFError), interrupts.reading():
            pytest.fail("a SIGTERM before the line was forgotten")


def test_ignored_signals_stay_ignored() -> None:
    """Guards: `nohup` without effect, a background job that Ctrl-C for another program ends."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts().handled():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_job_is_cancelled_in_another_thread() -> None:
    """Guards: a signal handler that waits for a lock which the code it interrupts holds."""
    interrupts = Interrupts()
    held, done = threading.Lock(), threading.Event()
    seen: list[str] = []

    def cancel() -> None:
        with held:
            seen.append("cancel")
            done.set()

    def kill() -> None:
        seen.append("kill")
        done.set()

    with interrupts.handled():
        with interrupts.job(cancel, kill):
            with held:
                _interrupt()
            assert done.wait(20)
            done.clear()
            # Cancelled again: the first time there may have been nothing to cancel yet.
            assert done.wait(20)
            assert set(seen) == {"cancel"}
            _interrupt()
            while "kill" not in seen:
                assert done.wait(20)
        with interrupts.job(cancel, kill), interrupts.editing(Editor()):
            seen.clear()
            _interrupt()
    assert not seen


def test_a_job_that_is_over_is_not_cancelled() -> None:
    """Guards: Ctrl-C at the end of a reply that stops the next one."""
    interrupts = Interrupts()
    begun, go_on = threading.Event(), threading.Event()
    seen: list[str] = []

    def slow() -> None:
        begun.set()
        go_on.wait(20)

    with interrupts.handled():
        with interrupts.job(slow, lambda: seen.append("kill")):
            _interrupt()
            begun.wait(20)
            # The watcher is in `slow`, so the second Ctrl-C is noticed after the job.
            _interrupt()
            go_on.set()
        with interrupts.job(lambda: seen.append("next"), lambda: seen.append("next")):
            threading.Event().wait(0)
    assert "next" not in seen


def _wait_after(ready: threading.Event) -> None:
    ready.set()
    # Not in pieces: a signal that interrupts this thread must end the wait.
    never = threading.Lock()
    never.acquire()
    assert not never.acquire(timeout=20)
    pytest.fail("the signal was not handled")


def test_a_signal_that_comes_to_another_thread() -> None:
    """Guards: a wait that goes on, since the signal interrupted another thread than the one that waits."""
    interrupts = Interrupts()
    with interrupts.handled():
        ready = threading.Event()

        def send() -> None:
            ready.wait(20)
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

        sender = threading.Thread(target=send)
        sender.start()
        with pytest.raises(EOFError), interrupts.reading():
            _wait_after(ready)
        sender.join()
    assert interrupts.ended_by == signal.SIGTERM


def _forget_and_wait() -> None:
    with suppress(EOFError):
        signal.raise_signal(signal.SIGTERM)
    _wait_after(threading.Event())


def test_an_exception_that_is_swallowed_comes_again() -> None:
    """Guards: SIGTERM at the moment in which input() drops exceptions."""
    interrupts = Interrupts()
    with interrupts.handled(), pytest.raises(EOFError), interrupts.reading():
        _forget_and_wait()
