"""A server in a thread, on a free port of this computer."""

from __future__ import annotations

import asyncio
import http.client
import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_local.engine.interface import ReloadableEngine
from dsmoe_local.engine.types import SamplingParameters
from dsmoe_local.protocol.requests import RequestDefaults
from dsmoe_local.serve.models import ModelSource, ServedModel
from dsmoe_local.serve.options import ServeOptions
from dsmoe_local.serve.server import listen, serve

DEFAULTS = RequestDefaults(SamplingParameters(temperature=0))
HELLO = [{"role": "user", "content": "hi"}]


def _refuse(path: Path) -> ReloadableEngine:
    raise AssertionError(f"{path} must not be loaded")


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that can be ahead of the clock. `ahead` is in seconds."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


NO_OTHERS = ModelSource(known=dict, load=_refuse, fits=lambda path: True)


@dataclass(slots=True)
class Answer:
    """The response to a request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error: dict[str, Any] = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error


@dataclass(slots=True)
class Serving:
    """A running server. `stop` does what SIGTERM does."""

    port: int
    thread: threading.Thread
    stop: Callable[[], None]
    log: list[str]
    _loop: _Loop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def skip(self, seconds: float) -> None:
        """Let the server's time limits run out as if this time had passed.

        So a test can have limits that no slow machine reaches by chance.
        """
        moved = threading.Event()

        def move() -> None:
            self._loop.ahead += seconds
            moved.set()

        self._loop.call_soon_threadsafe(move)
        assert moved.wait(60)

    def connect(self) -> socket.socket:
        """Return a new connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def send(self, path: str, body: object = None, method: str = "", **headers: str) -> Answer:
        """Send a request: POST if it has a body. In the names of headers, _ stands for -."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            if raw is not None:
                names = {"content-type": "application/json", **names}
            connection.request(method or ("GET" if raw is None else "POST"), path, raw, names)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())

    def chat(self, **body: Any) -> Answer:
        """Ask for a reply."""
        return self.send("/v1/chat/completions", {"messages": HELLO, **body})


@contextmanager
def serving(
    engine: ReloadableEngine, *, send_buffer: int = 0, source: ModelSource = NO_OTHERS, **options: Any
) -> Iterator[Serving]:
    """Serve an engine under the name `fake` until the block ends. `send_buffer`: bytes that the system holds
    for a client that does not read.
    """
    listener = listen("127.0.0.1", 0)
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    port = listener.getsockname()[1]
    log: list[str] = []
    loop = _Loop()
    started: queue.SimpleQueue[Callable[[], None] | BaseException] = queue.SimpleQueue()

    def run() -> None:
        async def main() -> None:
            def tell(stop: Callable[[], None]) -> None:
                started.put(lambda: loop.call_soon_threadsafe(stop))  # type: ignore[arg-type]

            await serve(ServedModel.of("fake", engine), source, settings, listener, log.append, tell)

        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(main())
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            started.put(error)

    settings = ServeOptions(**{"defaults": DEFAULTS, "grace": 0.0, **options})
    thread = threading.Thread(target=run, name="test-server", daemon=True)
    thread.start()
    stop = started.get(timeout=60)
    if isinstance(stop, BaseException):
        raise stop
    try:
        yield Serving(port, thread, stop, log, loop)
    finally:
        if thread.is_alive():
            stop()
            thread.join(60)
        assert not thread.is_alive()
        assert started.empty(), started.get()


class Gate:
    """A gate for FakeEngine: each token waits until it is let through."""

    def __init__(self) -> None:
        self._tokens = threading.Semaphore(0)
        self._is_open = threading.Event()
        self.waiting = threading.Semaphore(0)
        """Released each time a token waits."""

    def __call__(self, index: int) -> None:
        self.waiting.release()
        if not self._is_open.is_set():
            assert self._tokens.acquire(timeout=60)

    def let(self, n: int = 1) -> None:
        """Let tokens through."""
        self._tokens.release(n)

    def open(self) -> None:
        """Let all tokens through from now on."""
        self._is_open.set()
        self._tokens.release(10_000)

    def wait(self) -> None:
        """Wait until a token waits that was not waited for yet."""
        assert self.waiting.acquire(timeout=60)
