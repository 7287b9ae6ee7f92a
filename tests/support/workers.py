"""Workers on loopback, as `dsmoe worker` starts them, and other programs behind a port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from support.devices import free_port, has_backend

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
