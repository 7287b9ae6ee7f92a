"""Other programs as contenders: llama-bench, llama-batched-bench, and servers over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

_START_SECONDS = 600.0
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.1
_MAX_LOG = 64 << 20


def find_program(folder: Path, name: str) -> Path:
    """Return a program of a build of llama.cpp. `folder` is the build or its bin folder."""
    for path in (folder / name, folder / "bin" / name):
        if path.is_file():
            return path.resolve()
    raise SystemExit(f"there is no {name} in {folder}")


def finished(command: Sequence[str | Path]) -> str:
    """Run a program. Return what it prints. SystemExit if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed with exit status {done.returncode}: {done.stderr[-600:]}")
    return done.stdout


def llama_bench(folder: Path, model: Path, n_threads: int, rounds: int, n_prompt: int, n_new: int) -> float:
    """Return the tokens per second of a prompt or of decoding one stream, whichever is not 0."""
    command: list[str | Path] = [find_program(folder, "llama-bench"), "-m", model]
    command += ["-p", str(n_prompt), "-n", str(n_new), "-t", str(n_threads), "-r", str(rounds)]
    (test,) = json.loads(finished([*command, "-o", "json"]))
    return float(test["avg_ts"])


def llama_batched_bench(
    folder: Path,
    model: Path,
    *,
    n_prompt: int,
    n_new: int,
    width: int,
    n_context: int,
    n_threads: int,
    unified: bool,
) -> float:
    """Return the tokens per second of `width` sequences decoded together."""
    command: list[str | Path] = [find_program(folder, "llama-batched-bench"), "-m", model]
    command += ["-c", str(n_context)]
    command += ["-npp", str(n_prompt), "-ntg", str(n_new), "-npl", str(width), "-t", str(n_threads)]
    command += ["--output-format", "jsonl", *(["-kvu"] if unified else [])]
    lines = finished(command).splitlines()
    return float(json.loads(next(line for line in lines if line.startswith("{")))["speed_tg"])


def free_port() -> int:
    """Return a port where nothing listens.

    It is below those that the system gives to connections: while nothing listens at one of these, attempts to
    connect sooner or later connect to themselves.
    """
    while True:
        port = random.randrange(10_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Server:
    """A running server on a free port of this computer. `command` is without --host and --port."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        self._name = Path(command[0]).name
        self.port = free_port()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        address = ("--host", "127.0.0.1", "--port", str(self.port))
        self._process = subprocess.Popen([*command, *address], stdout=self._log, stderr=subprocess.STDOUT)
        self.pid = self._process.pid

    def wait(self) -> None:
        """Wait until the server answers. SystemExit if it ends instead."""
        give_up = time.monotonic() + _START_SECONDS
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise SystemExit(f"{self._name} did not start: {self.log()[-600:]}")
            time.sleep(_POLL_SECONDS)

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False
        finally:
            connection.close()

    def log(self) -> str:
        """Return what the server has printed."""
        return os.pread(self._log.fileno(), _MAX_LOG, 0).decode("utf-8", "replace")

    def close(self) -> None:
        """End the server."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


@contextmanager
def running(command: Sequence[str | Path]) -> Iterator[Server]:
    """Run a server until the block ends."""
    server = Server(command)
    try:
        server.wait()
        yield server
    finally:
        server.close()


def llama_server(folder: Path, model: Path, *arguments: str) -> AbstractContextManager[Server]:
    """Run llama-server until the block ends."""
    return running([find_program(folder, "llama-server"), "-m", model, *arguments])
