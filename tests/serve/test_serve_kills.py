"""The engine's process is killed again and again while many clients ask: every request gets an answer."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from support.models import tiny_model
from support.serving import HELLO, Serving, serving

from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions

_N_CLIENTS = 12
_HOST = b"dsmoe_local.engine.process.host"


def engine_processes() -> list[int]:
    """Return the engine processes of this process, also those that still load their model."""
    tasks = Path("/proc/self/task").glob("*/children")
    found = itertools.chain.from_iterable(_content(task).split() for task in tasks)
    return [int(pid) for pid in found if _HOST in _content(Path(f"/proc/{int(pid)}/cmdline"))]


def _content(path: Path) -> bytes:
    """Return the content of a file in /proc. It is empty if its thread or process ends meanwhile."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def ask(server: Serving, number: int) -> str:
    """Send one request. Return the status or the error of its answer. AssertionError if it is incomplete."""
    stream = bool(number % 2)
    body = {"messages": HELLO, "max_tokens": random.Random(number).randrange(1, 40), "stream": stream}
    answer = server.chat(**body, n=1 + number % 3 // 2)
    if answer.status != 200:
        return str(answer.error["code"])
    if not stream:
        assert answer.json["usage"]["completion_tokens"] > 0
        return "200"
    last = answer.body.split(b"\n\n")[-2].removeprefix(b"data: ")
    return "200" if last == b"[DONE]" else str(json.loads(last)["error"]["code"])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("n_kills", [6, pytest.param(100, marks=pytest.mark.soak)])
def test_kills_under_load(n_kills: int) -> None:
    """Guards: a request that waits for ever for an engine that is gone; a slot, a thread or a descriptor that
    each crash costs; a server that gives up.
    """
    options = ModelOptions(tiny_model(), n_context=1024, n_parallel=4, n_threads=1)
    found: Counter[str] = Counter()
    answered = threading.Semaphore(0)
    numbers = itertools.count()
    stop = threading.Event()

    def client(_: int) -> None:
        while not stop.is_set():
            found[ask(server, next(numbers))] += 1
            answered.release()

    rng = random.Random(n_kills)
    with EngineClient.load(options) as engine, serving(engine) as server:
        n_descriptors = len(os.listdir("/proc/self/fd"))
        with ThreadPoolExecutor(_N_CLIENTS) as pool:
            clients = [pool.submit(client, number) for number in range(_N_CLIENTS)]
            try:
                for _ in range(n_kills):
                    for _ in range(rng.randrange(3 * _N_CLIENTS)):
                        assert answered.acquire(timeout=60), "no request is answered any more"
                    while not (alive := engine_processes()):
                        pass  # the next one is being started
                    with suppress(ProcessLookupError):  # the one before may still have been there
                        os.kill(rng.choice(alive), signal.SIGKILL)
            finally:
                stop.set()
            for each in clients:
                each.result(60)
        assert set(found) == {"200", "engine_crash_error"}
        assert found["engine_crash_error"] >= n_kills / 2
        assert server.chat(max_tokens=3).status == 200
        assert server.send("/health").json == {"status": "ok", "running": 0, "queued": 0}
        while len(os.listdir("/proc/self/fd")) > n_descriptors:
            pass  # the last connections are being closed
