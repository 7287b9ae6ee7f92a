"""Workers on loopback, as `dsmoe worker` starts them, and other programs behind a port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import pytest

from benchmarks.support.tools import free_port
from support.devices import has_backend

_COMMAND = "from dsmoe_local.cli.main import dsmoe; dsmoe()"


class RunningWorker:
    """A worker that runs until `kill`. `start` starts it again at the same port."""

    def __init__(self) -> None:
        if not has_backend("RPC"):
            pytest.skip("this build of llama.cpp has no RPC backend")
        self.port = free_port()
        self.start()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, "worker", "--port", str(self.port), "-t", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        while True:
            assert self._process.poll() is None, "the worker ended"
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                pass

    def send(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def workers(count: int) -> Iterator[list[RunningWorker]]:
    """Run workers until the block ends."""
    running = [RunningWorker() for _ in range(count)]
    try:
        yield running
    finally:
        for worker in running:
            worker.kill()


@contextmanager
def service(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run a program that passes each connection to `answer` and closes it. Yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            # The client may close a connection that has unread bytes, which resets it.
            with connection, suppress(ConnectionError):
                answer(connection)

    threading.Thread(target=run, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@contextmanager
def counted(running: Sequence[RunningWorker]) -> Iterator[tuple[list[str], list[int]]]:
    """Put a proxy before each worker. Yields their addresses, and a list of the sizes of what passes."""
    sizes: list[int] = []

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while part := source.recv(1 << 16):
                sizes.append(len(part))
                target.sendall(part)
        # The other direction ends, too.
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def connect(worker: RunningWorker, client: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", worker.port)) as server:
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=pass_on, args=(server, client), daemon=True)
            back.start()
            pass_on(client, server)
            back.join()

    with ExitStack() as stack:
        addresses = [stack.enter_context(service(partial(connect, each))) for each in running]
        yield addresses, sizes
