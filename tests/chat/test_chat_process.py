"""The chat and the engine's process: a crash in the middle of a reply, signals while the model loads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from support import hosted
from support.models import smollm2
from support.processes import children_of
from support.terminal import CTRL_C, CTRL_D, ENTER, Terminal

PROMPT = r"context \d+/\d+"
CHAT = "from dsmoe_local.cli.main import chat; chat()"
SLOW = f"from dsmoe_local.engine.process import client; client.NATIVE = '{hosted.NEVER_LOADED}'; {CHAT}"


def test_chat_goes_on_after_a_crash() -> None:
    """Guards: a crash of llama.cpp that ends the chat."""
    with Terminal(["-c", CHAT, str(smollm2()), "--temp", "0", "-c", "2048"]) as terminal:
        terminal.wait_for(PROMPT)
        terminal.send("Tell me a very long story." + ENTER)
        terminal.wait_for(r"story\.\s+\S+ \S+ \S+")
        (engine,) = children_of(terminal.pid)
        os.kill(engine, signal.SIGKILL)
        terminal.wait_for(r"the engine was killed by SIGKILL")
        terminal.wait_for(PROMPT)
        terminal.send("What is my name?" + ENTER)
        terminal.wait_for(r"name\?\n\s*\w+")
        assert children_of(terminal.pid) != [engine]
        terminal.send(CTRL_C)
        terminal.wait_for(PROMPT)
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
