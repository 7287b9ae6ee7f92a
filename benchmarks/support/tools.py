"""Other programs as contenders: llama-bench, llama-batched-bench, and servers over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

_START_SECONDS = 600.0
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.1
_MAX_LOG = 64 << 20


class Failure(SystemExit):
    """A program of llama.cpp's cannot do what it is asked."""


def find_program(folder: Path, name: str) -> Path:
    """A program of the build, in its bin folder or given as that."""
    for path in (folder / name, folder / "bin" / name):
        if path.is_file():
            return path.resolve()
    raise Failure(f"there is no {name} in {folder}")


def finished(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """A program that has run, with what it printed. Failure if it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"{command[0]} failed with exit status {done.returncode}: {done.stderr[-600:]}")
    return done


def llama_bench(
    folder: Path, model: Path, *, n_threads: int, rounds: int, n_prompt: int = 0, n_new: int = 0
) -> float:
    """Tokens a second of a prompt or of decoding one stream, whichever is not 0."""
    command: list[str | Path] = [find_program(folder, "llama-bench"), "-m", model]
    command += ["-p", str(n_prompt), "-n", str(n_new), "-t", str(n_threads), "-r", str(rounds)]
    (test,) = json.loads(finished([*command, "-o", "json"]).stdout)
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
    """Tokens a second of `width` sequences decoded together."""
    command: list[str | Path] = [find_program(folder, "llama-batched-bench"), "-m", model]
    command += ["-c", str(n_context)]
    command += ["-npp", str(n_prompt), "-ntg", str(n_new), "-npl", str(width), "-t", str(n_threads)]
    command += ["--output-format", "jsonl", *(["-kvu"] if unified else [])]
    lines = finished(command).stdout.splitlines()
    return float(json.loads(next(line for line in lines if line.startswith("{")))["speed_tg"])


class Server:
    """A running server on a free port of this computer. `command` is without --host and --port."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        self._name = Path(command[0]).name
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        address = ("--host", "127.0.0.1", "--port", str(self.port))
        self._process = subprocess.Popen([*command, *address], stdout=self._log, stderr=subprocess.STDOUT)
        self.pid = self._process.pid
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        give_up = time.monotonic() + _START_SECONDS
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise Failure(f"{self._name} did not start: {self.log()[-600:]}")
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
        """What the server has printed."""
        return os.pread(self._log.fileno(), _MAX_LOG, 0).decode("utf-8", "replace")

    def throughput(self, prompts: Sequence[Sequence[int]], n_new: int, n_clients: int) -> float:
        """New tokens a second from the first request to the last reply, prompts included.

        A request that the server fails counts no tokens, and `n_failed` counts it.
        """
        self.n_failed = 0
        local = threading.local()

        def ask(prompt: Sequence[int]) -> int:
            if not hasattr(local, "connection"):
                local.connection = http.client.HTTPConnection("127.0.0.1", self.port)
            return self._complete(local.connection, prompt, n_new)

        started = time.perf_counter()
        with ThreadPoolExecutor(n_clients) as pool:
            counts = list(pool.map(ask, prompts))
        seconds = time.perf_counter() - started
        self.n_failed = sum(count == 0 for count in counts)
        return sum(counts) / seconds

    def _complete(self, connection: http.client.HTTPConnection, prompt: Sequence[int], n_new: int) -> int:
        body: dict[str, Any] = {
            "prompt": list(prompt),
            "n_predict": n_new,
            "ignore_eos": True,
            "cache_prompt": True,
            # Greedy in its cheapest form.
            "temperature": 0,
            "top_k": 1,
            "samplers": ["top_k"],
        }
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        if response.status != http.HTTPStatus.OK:
            return 0
        count = int(answer["tokens_predicted"])
        if count != n_new:
            raise Failure(f"llama-server generated {count} tokens, {n_new} were asked for")
        return count

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
    """A server for the length of a `with`."""
    server = Server(command)
    try:
        yield server
    finally:
        server.close()


def serving(folder: Path, model: Path, arguments: Sequence[str]) -> AbstractContextManager[Server]:
    """A llama-server for the length of a `with`. `arguments` are its own; other settings are its defaults."""
    return running([find_program(folder, "llama-server"), "-m", model, *arguments])
