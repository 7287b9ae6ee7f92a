"""The chat and the engine's process: a crash in the middle of a reply, signals while the model loads."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from support import hosted
from support.models import smollm2
from support.processes import children_of
from support.screens import ScreenTerminal
from support.terminal import CTRL_C, CTRL_D, ENTER

from dsmoe_local.base.paths import data_folder
from dsmoe_local.chat.store.sessions import SessionStore

CHAT = "from dsmoe_local.cli.main import chat; chat()"
HANGING = f"from dsmoe_local.engine.process import client; client.NATIVE = '{hosted.HALTING}'; {CHAT}"
SLOW = f"from dsmoe_local.engine.process import client; client.NATIVE = '{hosted.NEVER_LOADED}'; {CHAT}"


def test_chat_goes_on_after_a_crash() -> None:
    """Guards: a crash of llama.cpp that ends the chat, or loses what was said."""
    with ScreenTerminal(["-c", CHAT, str(smollm2()), "--temp", "0", "-c", "2048"], lines=60) as terminal:
        terminal.wait_screen(r"context 0/2,048", 60)
        terminal.send("Tell me a very long story." + ENTER)
        terminal.wait_screen(r"story\.\n\n\S+ \S+", 60)
        (engine,) = children_of(terminal.pid)
        os.kill(engine, signal.SIGKILL)
        terminal.wait_screen(r"the engine was killed by SIGKILL")
        terminal.send("/continue" + ENTER)
        terminal.wait_screen(r"loading the model again\n\n\S+ \S+", 60)
        assert children_of(terminal.pid) != [engine]
        terminal.send(CTRL_C)
        terminal.wait_screen("stopped")
        terminal.send(CTRL_D)
        assert terminal.ending() == 0


def test_killed_chat_has_the_reply_so_far() -> None:
    """Guards: minutes of a reply lost with `kill -9`; a reply that is cut off without a word, or answered
    anew.
    """
    arguments = ["-c", CHAT, str(smollm2()), "--temp", "0", "-c", "2048"]
    with ScreenTerminal(arguments, lines=60) as terminal:
        terminal.wait_screen(r"context 0/2,048", 60)
        terminal.send("Tell me a very long story." + ENTER)
        terminal.until(lambda shown: bool(drafts()), 60)
        os.kill(terminal.pid, signal.SIGKILL)
    (draft,) = drafts()
    with ScreenTerminal([*arguments, "--continue", "-n", "2"], lines=60) as terminal:
        terminal.wait_screen(r"stopped: /continue continues it", 60)
        terminal.send("/continue" + ENTER)
        terminal.wait_screen("cut at max_tokens", 120)
        terminal.send(CTRL_D)
        assert terminal.ending() == 0
    store = SessionStore.open(data_folder() / "sessions")
    latest = store.latest()
    assert latest is not None
    *_, reply = latest.load("").turns
    store.close()
    assert reply.content.startswith(draft)
    assert len(reply.content) > len(draft)
    assert drafts() == []


def drafts() -> list[str]:
    """The replies in the database that are not finished."""
    connection = sqlite3.connect(data_folder() / "sessions" / "sessions.db")
    try:
        return [content for (content,) in connection.execute("SELECT content FROM draft")]
    finally:
        connection.close()


def test_second_interruption_ends_an_engine_that_hangs() -> None:
    """Guards: an engine that does not answer taking the chat with it."""
    with ScreenTerminal(["-c", HANGING, str(smollm2())], lines=60) as terminal:
        terminal.wait_screen(r"context 0/", 60)
        terminal.send("hello" + ENTER)
        terminal.wait_screen(r"hello\n\n\S{3}")  # a Ctrl-C before it halts would stop it in peace
        (engine,) = children_of(terminal.pid)
        terminal.send(CTRL_C)
        terminal.wait_screen("Ctrl-C")
        terminal.send(CTRL_C)
        terminal.wait_screen("error: the engine was killed")
        with pytest.raises(ProcessLookupError):
            os.kill(engine, 0)
        terminal.send(CTRL_D)
        assert terminal.ending() == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_while_the_model_loads(number: signal.Signals, status: int) -> None:
    """Guards: a load that cannot be given up, and a process that goes on with it."""
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(smollm2()), "-p", "x"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stderr is not None
    engine = int(child.stderr.readline().removeprefix(b"note: "))
    child.send_signal(number)
    out, errors = child.communicate(timeout=60)
    assert (child.returncode, out, errors) == (status, b"", b"error: loading was interrupted\n")
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)


def test_a_load_that_fails_does_not_wait_for_the_check_of_the_database(tmp_path: Path) -> None:
    """Guards: a chat that ends only when a large database is checked."""
    endless = (
        "import threading\n"
        "from dsmoe_local.chat.store.sessions import SessionStore\n"
        "from dsmoe_local.cli.main import chat\n"
        "SessionStore.problems = lambda self, stop=threading.Event(): stop.wait() and []\n"
        "chat()"
    )
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with ScreenTerminal(["-c", endless, str(broken)]) as terminal:
        terminal.wait_screen("error: ", 60)
        assert terminal.ending() == 1
