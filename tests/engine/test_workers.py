"""Models whose layers are on workers: the same text, and a message for each failure."""

from __future__ import annotations

import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.batches import answer, batch, by_id
from support.endless import ENDLESS
from support.models import tiny_model
from support.workers import RunningWorker, service, workers

from benchmarks.support.tools import free_port
from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.progress import Event, Note
from dsmoe_local.engine import workers as module
from dsmoe_local.engine.errors import WorkerError, WorkerLostError
from dsmoe_local.engine.interface import Deliver, Ticket
from dsmoe_local.engine.process import child, spawn
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions, Request, SamplingParameters
from dsmoe_local.engine.workers import Worker, check_workers, parse_worker, unreachable_worker


@pytest.mark.parametrize(
    ("text", "worker"),
    [
        ("10.0.0.2:99", Worker("10.0.0.2", 99)),
        ("desk-top.local", Worker("desk-top.local", 50052)),
        (" host:1=2GiB ", Worker("host", 1, 2 << 30)),
        *(
            (text, None)
            for text in ("", "host:", "host:0", "host:65536", "host:x", "[::1]:5", "a b", "host=")
        ),
        *((text, None) for text in ("http://host:5", "host:5=much", "user@host:5")),
    ],
)
def test_addresses(text: str, worker: Worker | None) -> None:
    """Guards: an address that llama.cpp reads in another way, or that ends the process in its parser."""
    if worker is not None:
        assert parse_worker(text) == worker
    else:
        with pytest.raises(UsageError):
            parse_worker(text)


def hello(version: tuple[int, int, int]) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(struct.pack("<Q4B24x", 28, *version, 0))

    return answer


def sends(greeting: bytes) -> Callable[[socket.socket], None]:
    """A program that says something at once, and then nothing until the client has gone."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(greeting)
        while connection.recv(1000):
            pass

    return answer


def trickles(connection: socket.socket) -> None:
    """Send a byte whenever nothing has come for a while, until the client has gone."""
    connection.settimeout(0.1)
    while True:
        try:
            if not connection.recv(100):
                return
        except TimeoutError:
            connection.sendall(bytes(1))


def closes(connection: socket.socket) -> None:
    connection.recv(1)


@pytest.mark.parametrize(
    ("behaviour", "seconds", "told"),
    [
        (hello((7, 0, 1)), 60, "has version 7.0.1 of llama.cpp's protocol, this machine 7.0.0"),
        (hello((6, 0, 0)), 60, "has version 6.0.0"),
        (
            sends(b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\n\r\n"),
            60,
            "another program listens there",
        ),
        (sends(b"SSH-2.0\r\n"), 0.3, "another program listens there"),
        (sends(b""), 0.3, "if that client is gone, restart the worker"),
        (trickles, 0.3, "does not answer within"),
        (closes, 60, "closes the connection"),
    ],
)
def test_other_programs(
    behaviour: Callable[[socket.socket], None], seconds: float, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: an abort of llama.cpp, or an endless wait, instead of a message."""
    monkeypatch.setattr(module, "_SECONDS", seconds)
    with service(behaviour) as address, pytest.raises(WorkerError) as raised:
        check_workers([parse_worker(address)])
    assert address in raised.value.what
    assert told in raised.value.what


def test_unreachable_workers() -> None:
    """Guards: a process that llama.cpp ends; a message without the address."""
    nobody = f"127.0.0.1:{free_port()}"
    for address, told in ((nobody, "refuses"), ("no.such.host.invalid:1", "cannot be reached")):
        with pytest.raises(WorkerError, match=f"{address}.*{told}"):
            EngineClient.load(options(address))


def test_the_protocol_of_this_build(worker: RunningWorker) -> None:
    """Guards: a version of the protocol that is not that of the installed llama.cpp."""
    check_workers([parse_worker(worker.endpoint)])


def options(*addresses: str, **others: Any) -> ModelOptions:
    settings = {"n_threads": 1, "n_context": 256, "n_ubatch": 8, "n_gpu_layers": -1, **others}
    return ModelOptions(tiny_model(), workers=addresses, **settings)


def text(engine: EngineClient, n_tokens: int = 40) -> str:
    request = Request("r", (0, 5, 6, 7), SamplingParameters(temperature=0), max_tokens=n_tokens)
    return "".join(event.text for event in engine.submit(request))


def endless() -> Request:
    return Request("r", (0, 5, 6, 7), SamplingParameters(temperature=0), **ENDLESS)


@pytest.fixture(scope="module")
def local() -> str:
    with EngineClient.load(options(n_gpu_layers=None)) as engine:
        return text(engine)


@pytest.fixture(scope="module")
def worker() -> Iterator[RunningWorker]:
    with workers(1) as (running,):
        yield running


def test_three_workers(local: str) -> None:
    """Guards: layers in the wrong order or on the wrong machine."""
    notes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    with workers(3) as running:
        sizes = ("600KiB", "600KiB", "1MiB")
        addresses = [f"{each.endpoint}={size}" for each, size in zip(running, sizes, strict=True)]
        for _ in range(2):
            with EngineClient.load(options(*addresses), listen) as engine:
                assert text(engine) == local
                for each in running:
                    assert f"worker {each.endpoint}" in engine.info.placement
        with EngineClient.load(options(*addresses, n_gpu_layers=None), listen) as engine:
            assert text(engine) == local
            assert engine.info.placement.startswith("CPU")
    assert "the workers are not used" in notes[-1]


def test_experts_that_a_worker_has_no_room_for(worker: RunningWorker, local: str) -> None:
    """Guards: all layers sent to a worker that aborts, although its experts fit on this machine."""
    notes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    with EngineClient.load(options(f"{worker.endpoint}=1000KiB"), listen) as engine:
        assert text(engine) == local
        assert "the routed experts of" in engine.info.placement
    assert any("no room for the routed experts" in note and "--n-cpu-moe" in note for note in notes)


@pytest.mark.parametrize("n_kills", [3, pytest.param(20, marks=pytest.mark.soak)])
@pytest.mark.parametrize("n_gpu_layers", [-1, 2])
def test_a_lost_worker(worker: RunningWorker, local: str, n_kills: int, n_gpu_layers: int) -> None:
    """Guards: a chat that ends with its worker; a message without its address; another text after it."""
    with EngineClient.load(options(worker.endpoint, n_gpu_layers=n_gpu_layers)) as engine:
        for n_tokens in range(n_kills):
            events = engine.submit(endless())
            for _ in range(1 + n_tokens):
                next(events)
            worker.kill()
            # While the process is being ended, the system may still accept connections.
            with pytest.raises(WorkerLostError, match=f"{worker.endpoint} (refuses|closes)"):
                list(events)
            with pytest.raises(WorkerError, match=worker.endpoint):
                text(engine)
            worker.start()
            assert text(engine) == local
        assert engine.crashes == n_kills


@pytest.mark.parametrize(
    ("unreachable", "told"),
    [
        ("", "no progress for 0.5 s: the worker {} is too slow, or hangs"),
        ("the worker {} cannot be reached: No route to host", "a worker was lost: the worker {} cannot be"),
    ],
)
def test_a_worker_that_hangs(
    worker: RunningWorker, local: str, unreachable: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a reply that waits forever; a slow worker that is reported as lost."""
    with EngineClient.load(options(worker.endpoint)) as engine:
        if unreachable:
            monkeypatch.setattr(spawn, "unreachable_worker", lambda _: unreachable.format(worker.endpoint))
        events = engine.submit(endless())
        next(events)
        worker.send(signal.SIGSTOP)
        monkeypatch.setattr(child, "SILENT_SECONDS", 0.5)
        monkeypatch.setattr(module, "_SECONDS", 0.5)
        try:
            with pytest.raises(WorkerLostError, match=told.format(worker.endpoint)):
                list(events)
            with pytest.raises(WorkerError, match="does not answer"):
                check_workers([parse_worker(worker.endpoint)])
        finally:
            worker.send(signal.SIGCONT)
        monkeypatch.undo()
        assert text(engine) == local


def test_a_slow_step_that_ends(worker: RunningWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an engine that is killed although a step ended while the workers were asked."""
    went_on = threading.Event()

    def resume(_: object) -> str:
        monkeypatch.setattr(child, "SILENT_SECONDS", 300)
        last = engine._latest()._last_message
        worker.send(signal.SIGCONT)
        while engine._latest()._last_message == last:
            pass  # the step ends
        went_on.set()
        return ""

    with EngineClient.load(options(worker.endpoint)) as engine:
        monkeypatch.setattr(spawn, "unreachable_worker", resume)
        events = engine.submit(endless())
        next(events)
        worker.send(signal.SIGSTOP)
        monkeypatch.setattr(child, "SILENT_SECONDS", 0.5)
        for _ in events:
            if went_on.is_set():
                engine.cancel("r")
        assert went_on.is_set()
        assert engine.crashes == 0


def test_unreachable_worker() -> None:
    """Guards: a worker that accepts connections but computes, reported as lost."""
    nobody = f"127.0.0.1:{free_port()}"
    with service(sends(b"")) as address:
        assert not unreachable_worker([parse_worker(address)])
        found = unreachable_worker([parse_worker(address), parse_worker(nobody)])
    assert found == f"the worker {nobody} refuses connections: nothing listens there"


def test_a_batch_that_loses_its_worker(
    worker: RunningWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: records that are lost, written twice or blamed on their lines."""
    lines = [{"id": str(n), "prompt": f"The quick {n}", "max_tokens": 12} for n in range(30)]
    task = batch(tmp_path, *lines)
    with EngineClient.load(options(worker.endpoint, n_parallel=2, n_context=512)) as engine:
        start, started = engine.start, []

        def kill_at_eighth(request: Request, deliver: Deliver) -> Ticket:
            ticket = start(request, deliver)
            started.append(request)
            if len(started) == 8:
                worker.kill()
            return ticket

        monkeypatch.setattr(engine, "start", kill_at_eighth)
        with pytest.raises(WorkerError, match=worker.endpoint):
            answer(engine, task)
        worker.start()
        found = by_id(answer(engine, task))
    assert len(found) == len(lines)
    assert not any(record["error"] for record in found.values())
