"""Run the server until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.serve.app import create_app
from dsmoe_local.serve.connection import connection_type
from dsmoe_local.serve.models import Log, ModelSource, ServedModel
from dsmoe_local.serve.options import ServeOptions
from dsmoe_local.serve.state import ServerState

_BACKLOG = 2048
_CLEANUP_SECONDS = 5  # for cancelled requests to send their last event
_KEEP_ALIVE_SECONDS = 30


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address. Port 0 takes a free one. Raises DsmoeError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise DsmoeError(f"{host} is not an address of this computer: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise DsmoeError(
            f"{host}:{port} cannot be used: {error.strerror}", remedy="name another one with --port or --host"
        ) from error
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `serve`: uvicorn would raise them again after it has ended."""
        yield


async def serve(
    first: ServedModel,
    source: ModelSource,
    options: ServeOptions,
    listener: socket.socket,
    log: Log,
    started: Callable[[Callable[[], None]], None] = lambda stop: None,
) -> None:
    """Serve models until SIGINT or SIGTERM, and free them.

    `started` is called once requests are accepted, with a function that does what a signal does: no more
    requests are accepted, and running ones may go on for `grace` seconds, or until the second call. They are
    then cancelled.
    """
    loop = asyncio.get_running_loop()
    state = ServerState(first, source, options, log)
    server = _Uvicorn(_config(state))

    def stop() -> None:
        if state.draining:
            state.end_all()
            return
        state.draining = True
        server.should_exit = True
        loop.call_later(options.grace, state.end_all)
        if state.n_active:
            replies = "1 reply" if state.n_active == 1 else f"{state.n_active} replies"
            log(f"shutting down: waiting up to {options.grace:g} s for {replies}; Ctrl-C again ends at once")

    with _signals_calling(stop):
        started(stop)
        try:
            await server.serve([listener])
        finally:
            await state.close()


def _config(state: ServerState) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(state),
        http=connection_type(state.options.stall_seconds),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(state.options.grace) + _CLEANUP_SECONDS,
    )


@contextlib.contextmanager
def _signals_calling(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` for SIGINT and SIGTERM. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
