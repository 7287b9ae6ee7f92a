"""Threads beside the engine's process that cannot start, or fail: whoever waits is told, and all ends."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support import hosted

from dsmoe_local.engine.errors import EngineCrashError
from dsmoe_local.engine.process import child
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.process.spawn import spawn
from dsmoe_local.engine.types import ModelOptions, Request

# What is guarded against is waiting for ever.
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Those that are started."""
    found: list[subprocess.Popen[bytes]] = []

    def recorded() -> tuple[subprocess.Popen[bytes], socket.socket]:
        process, channel = spawn()
        found.append(process)
        return process, channel

    monkeypatch.setattr(child, "spawn", recorded)
    return found


def load() -> EngineClient:
    return EngineClient.load(ModelOptions(Path("fake.gguf")), factory=hosted.FAKE)


def fail(*_: object) -> NoReturn:
    """As Python does where memory runs out: no error that a broken message would give."""
    raise MemoryError("none left")


def check_all_has_ended(processes: list[subprocess.Popen[bytes]]) -> None:
    """The processes are reaped, and no thread, pipe or socket is left of them."""
    # Killed, or gone by itself when the socket was closed.
    assert None not in [process.returncode for process in processes]
    for thread in threading.enumerate():
        if thread.name.startswith("dsmoe-"):
            thread.join(30)
            assert not thread.is_alive(), thread.name
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.closed


@pytest.mark.parametrize("name", ["dsmoe-log", "dsmoe-send"])
def test_a_thread_that_cannot_be_started(
    name: str, processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a load that waits for ever for an engine which nobody talks to, and what was started for it."""
    load().close()  # whatever is opened once only is open now
    processes.clear()
    before = len(os.listdir("/dev/fd"))
    start = threading.Thread.start

    def failing(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(EngineCrashError, match=r"internal error .* RuntimeError: can't start") as caught:
        load()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert len(processes) == 1
    check_all_has_ended(processes)
    assert len(os.listdir("/dev/fd")) == before


def test_a_reader_that_fails_at_load(
    processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a load that waits for ever for a message which came and was lost."""
    monkeypatch.setitem(child._TAKE, "loaded", fail)
    with pytest.raises(EngineCrashError, match=r"internal error .* MemoryError: none left"):
        load()
    check_all_has_ended(processes)


@pytest.mark.parametrize("kind", ["answer", "events"])
def test_a_reader_that_fails(
    kind: str, processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: calls and replies that wait for ever for a reader which is gone; a client of no use after."""
    with load() as client:
        with monkeypatch.context() as patched:
            patched.setitem(child._TAKE, kind, fail)
            asked: dict[str, Any] = {
                "answer": lambda: client.encode("x"),
                "events": lambda: list(client.submit(Request("r", "x"))),
            }
            with pytest.raises(EngineCrashError, match=r"internal error .* MemoryError: none left"):
                asked[kind]()
        check_all_has_ended(processes)
        assert "".join(event.text for event in client.submit(Request("r", "fine"))) == "fine"
        assert client.crashes == 1
