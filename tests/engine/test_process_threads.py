"""Threads beside the engine's process that cannot start, or fail: whoever waits is told, and all ends."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support import hosted

from dsmoe_local.engine.errors import EngineCrashError
from dsmoe_local.engine.process import child
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.process.spawn import spawn_engine
from dsmoe_local.engine.types import ModelOptions, Request

# What is guarded against is waiting for ever.
pytestmark = pytest.mark.timeout(60)


@dataclass(frozen=True, slots=True)
class Started:
    """The processes that a test has started, and the threads that were there before: other tests' engines."""

    processes: list[subprocess.Popen[bytes]]
    before: frozenset[threading.Thread]

    def check_all_has_ended(self) -> None:
        """The processes are reaped, and no thread, pipe or socket is left of them."""
        # Killed, or gone by itself when the socket was closed.
        assert None not in [process.returncode for process in self.processes]
        for thread in frozenset(threading.enumerate()) - self.before:
            thread.join(30)
            assert not thread.is_alive(), thread.name
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.closed


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """What comes of a test."""
    found = Started([], frozenset(threading.enumerate()))

    def recorded() -> tuple[subprocess.Popen[bytes], socket.socket]:
        process, channel = spawn_engine()
        found.processes.append(process)
        return process, channel

    monkeypatch.setattr(child, "spawn_engine", recorded)
    return found


def load() -> EngineClient:
    return EngineClient.load(ModelOptions(Path("fake.gguf")), factory=hosted.FAKE)


def fail(*_: object) -> NoReturn:
    """As Python does where memory runs out: no error that a broken message would give."""
    raise MemoryError("none left")


@pytest.mark.parametrize("name", ["dsmoe-log", "dsmoe-send"])
def test_a_thread_that_cannot_be_started(
    name: str, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a load that waits for ever for a thread that could not start; a process left behind."""
    load().close()  # whatever is opened once only is open now
    started.processes.clear()
    gc.collect()  # what earlier tests have left
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
    assert len(started.processes) == 1
    started.check_all_has_ended()
    assert len(os.listdir("/dev/fd")) <= before


def test_a_reader_that_fails_at_load(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a load that waits for ever for a message which came and was lost."""
    monkeypatch.setitem(child._TAKE, "loaded", fail)
    with pytest.raises(EngineCrashError, match=r"internal error .* MemoryError: none left"):
        load()
    started.check_all_has_ended()


@pytest.mark.parametrize("kind", ["answer", "events"])
def test_a_reader_that_fails(kind: str, started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
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
        started.check_all_has_ended()
        assert "".join(event.text for event in client.submit(Request("r", "fine"))) == "fine"
        assert client.crashes == 1
