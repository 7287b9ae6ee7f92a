"""The life of the engine's process, on fakes: its start, its end, its log, and what it is made of."""

from __future__ import annotations

import _thread
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import hosted
from support.processes import is_gone

from dsmoe_local.base import progress
from dsmoe_local.base.errors import FileError, InterruptedRunError
from dsmoe_local.engine.errors import EngineCrashError, EngineError, OutOfMemoryError
from dsmoe_local.engine.process import child, wire
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.process.spawn import crash_error, spawn_engine
from dsmoe_local.engine.types import (
    FinishReason,
    ModelOptions,
    Request,
    TokenEvent,
)

OPTIONS = ModelOptions(Path("fake.gguf"), n_context=77)


def load(factory: str = hosted.FAKE, **more: Any) -> EngineClient:
    return EngineClient.load(OPTIONS, factory=factory, **more)


def text(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def test_load_tells_its_progress() -> None:
    """Guards: options or progress lost on the way."""
    events: list[progress.Event] = []
    load(listen=events.append).close()
    assert events == [
        progress.Started("loading", 3),
        progress.Advanced(3, "all"),
        progress.Note("context of 77"),
        progress.Finished("loading"),
    ]


@pytest.mark.parametrize("how", ["stop", "Ctrl-C", "listener"])
def test_load_is_given_up(how: str) -> None:
    """Guards: Ctrl-C that waits for a load which hears nothing, and a process that then stays."""
    pids: list[int] = []
    stop = threading.Event()
    table: dict[str, int] = {}
    ends: dict[str, tuple[Callable[[], object], type[BaseException]]] = {
        "stop": (stop.set, InterruptedRunError),
        "Ctrl-C": (_thread.interrupt_main, KeyboardInterrupt),
        "listener": (lambda: table["bug"], KeyError),
    }
    end, expected = ends[how]

    def listen(event: progress.Event) -> None:
        assert isinstance(event, progress.Note)
        pids.append(int(event.text))
        end()

    with pytest.raises(expected):
        load(hosted.NEVER_LOADED, listen=listen, stop=stop)
    assert is_gone(pids[0])


def test_stop_that_was_set_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an interruption just before the load that is forgotten, or starts a process all the same."""
    started: list[object] = []
    monkeypatch.setattr(child, "spawn_engine", lambda: started.append(spawn_engine()))
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedRunError):
        load(stop=stop)
    assert not started


def test_loads_that_fail() -> None:
    """Guards: a load that fails by other errors than in this process, or never ends."""
    with pytest.raises(OutOfMemoryError, match="no room") as refused:
        load(hosted.NOT_LOADED)
    assert str(refused.value) == "no room\nhere\nless"
    with pytest.raises(EngineCrashError, match=r"SIGABRT while it loaded fake\.gguf") as crashed:
        load(hosted.DYING_AT_LOAD)
    assert crashed.value.where == "its log ends: ggml.c:1: GGML_ASSERT(␛[31mfine␛[0m) failed"
    with pytest.raises(EngineError, match="internal error in the engine: KeyError: 'a bug'"):
        load(hosted.BROKEN)
    with pytest.raises(EngineError, match="ModuleNotFoundError"):
        load("support.no_such:thing")


@pytest.mark.parametrize(
    ("last", "remedy"),
    [
        ("  what():  vk::Device::allocateMemory: ErrorOutOfDeviceMemory", "offload less"),
        ("CUDA error: out of memory", "offload less"),
        ("GGML_ASSERT(a == b) failed", "--log-file"),
    ],
)
def test_advice_after_a_crash(last: str, remedy: str) -> None:
    """Guards: a full device that looks like a bug in llama.cpp."""
    error = crash_error(-signal.SIGABRT, ("loaded", last, "in function alloc"), loading=None)
    assert remedy in error.remedy


@pytest.mark.parametrize("factory", [hosted.FAKE, hosted.STUCK, hosted.HALTING])
def test_close(factory: str) -> None:
    """Guards: a close that hangs, leaves the process or a zombie, or cannot be repeated."""
    client = load(factory)
    pid = client.pid
    client.close()
    client.close()
    assert is_gone(pid)
    asked: list[Callable[[], object]] = [
        lambda: client.submit(Request("r", "x")),
        lambda: client.encode("x"),
        lambda: client.info,
    ]
    for ask in asked:
        with pytest.raises(EngineError, match="the engine is closed"):
            ask()


def test_a_forked_process() -> None:
    """Guards: a fork that waits for threads which it does not have, or ends the model of its parent."""
    client = load()

    def use() -> int:
        asked: list[Callable[[], object]] = [
            lambda: next(client.submit(Request("r", "x"))),
            lambda: client.encode("x"),
            lambda: client.info,
            lambda: client.reload(OPTIONS),
        ]
        for ask in asked:
            with pytest.raises(EngineError, match="opened in another process"):
                ask()
        client.cancel_all()
        client.kill()
        client.close()
        return int(client.alive)

    with client:
        stream = client.submit(Request("r", "abc"))
        next(stream)
        pid = os.fork()
        if pid == 0:
            status = 2
            try:
                status = use()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert text(list(stream)) == "bc"
        assert client.alive


def test_close_ends_what_runs() -> None:
    """Guards: a reader that waits for ever for a reply of an engine that was closed."""
    with load(hosted.HALTING) as client:
        os.kill(client.pid, signal.SIGSTOP)  # it cannot even leave by itself
        stream = client.submit(Request("r", "abcdef"))
    with pytest.raises(EngineError, match="closed"):
        next(stream)


def test_log_file_takes_every_line(tmp_path: Path) -> None:
    """Guards: a log that ends with the process whose end it should explain."""
    path = tmp_path / "engine.log"
    with load(log_file=path) as client:
        for word in ("first", "exit 2", "second"):
            stream = client.submit(Request("r", f"print {word}" if word != "exit 2" else word))
            if word == "exit 2":
                with pytest.raises(EngineCrashError):
                    list(stream)
            else:
                list(stream)
        assert "first" not in client.log()
    assert path.read_text().splitlines() == ["first", "second"]
    with pytest.raises(FileError, match="the log cannot be written"):
        load(log_file=tmp_path / "no" / "folder")


def test_events_of_a_step_come_in_one_frame() -> None:
    """Guards: a system call for every token, where sixteen sequences decode at once."""
    process, channel = spawn_engine()
    assert process.stdout is not None
    with channel, channel.makefile("rb") as source, process.stdout:
        channel.sendall(wire.pack(("load", hosted.STEPPING, wire.to_plain(OPTIONS))))
        assert wire.receive(source)[0] == "loaded"  # type: ignore[index]
        channel.sendall(wire.pack(("start", 5, wire.to_plain(Request("r", "abc")))))
        frame = wire.receive(source)
        assert frame is not None
        assert [event[:2] for event in frame[1]] == [[5, "a"], [5, "b"], [5, "c"]]
        channel.sendall(wire.pack(("cancel", 5)))
        frame = wire.receive(source)
        assert frame is not None
        assert frame[0] == "events"
        assert frame[1][0][6] == FinishReason.STOP
        assert frame[1][1] == [5, None]
    # Closing the socket is what the death of a client looks like.
    assert process.wait() == 0


PARENT = f"""
import sys, time
from support import hosted
from support.processes import is_gone
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions, Request
from pathlib import Path
client = EngineClient.load(ModelOptions(Path("x")), factory="{hosted.STUCK}")
print(client.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux's pidfd_open")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_child_of_a_parent_that_is_killed(number: signal.Signals) -> None:
    """Guards: a model that stays in memory after its user's program was killed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert parent.stdout is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    try:
        parent.send_signal(number)
        parent.communicate()
        assert select.select([child], [], [], 60)[0]  # readable once the process is over
    finally:
        os.close(child)


@pytest.mark.skipif(sys.platform != "linux", reason="a signal that only Linux sends")
def test_child_dies_where_its_socket_stays_open() -> None:
    """Guards: a fork of the client's process that keeps the socket, and so the child, alive."""
    started: list[tuple[subprocess.Popen[bytes], socket.socket]] = []

    def start() -> None:
        process, channel = spawn_engine()
        channel.sendall(wire.pack(("load", hosted.FAKE, wire.to_plain(OPTIONS))))
        channel.recv(1)  # it is up
        started.append((process, channel))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    process, channel = started[0]
    assert process.stdout is not None
    with channel, process.stdout:
        assert process.wait() == -signal.SIGKILL


def test_neither_side_imports_what_it_does_not_need() -> None:
    """Guards: the memory of numpy and llama.cpp in the parent, and of the screen's libraries in the child."""
    code = f"""
import sys
from pathlib import Path
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
with EngineClient.load(ModelOptions(Path("x")), factory="{hosted.FAKE}") as client:
    print(*sys.modules)
    print(*client.observe("modules")["modules"])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    ours, theirs = (
        {name.partition(".")[0] for name in line.split()} | set(line.split())
        for line in done.stdout.splitlines()
    )
    assert not ours & {"numpy", "llama_cpp", "dsmoe_local.engine.process.host", "asyncio"}
    assert not theirs & {"click", "rich", "prompt_toolkit", "dsmoe_local.engine.process.client"}


def test_modules_in_the_working_folder_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a folder with a json.py of its own that takes over, or breaks, the engine's process."""
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with load() as client:
        assert text(list(client.submit(Request("r", "fine")))) == "fine"
