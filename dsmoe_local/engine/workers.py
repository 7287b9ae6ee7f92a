"""Workers: other machines that compute layers of a model, with llama.cpp's RPC protocol.

llama.cpp ends the process if it cannot reach a worker, or if another program answers. So each worker is asked
for its version first.
"""

from __future__ import annotations

import re
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import parse_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.errors import WorkerError

DEFAULT_PORT = 50052
"""The default port of llama.cpp's rpc-server."""
PROTOCOL = (7, 0, 0)
"""The version in llama.cpp's header ggml-rpc.h. Its last number changes with the set of operations."""
_SECONDS = 10.0  # for an answer; a worker first frees the memory of its previous client
_HELLO = 14
_LEAST_BYTES = 1 << 20  # of memory at a worker
_CAPABILITIES = 24  # bytes; zeros: TCP only
_ANSWER = struct.Struct(f"<Q4B{_CAPABILITIES}x")  # its size without this field, the version, padding
_CLOSES = "closes the connection: it is ending, has an older version, or is another program"


@dataclass(frozen=True, slots=True)
class Worker:
    """The address of a worker. `n_bytes`: the memory to use there; None: what it reports as free."""

    host: str
    port: int
    n_bytes: int | None = None

    @property
    def endpoint(self) -> str:
        """The address in llama.cpp's form."""
        return f"{self.host}:{self.port}"


def parse_worker(text: str) -> Worker:
    """Return the worker that `HOST`, `HOST:PORT` or `HOST:PORT=SIZE` names. Raises UsageError."""
    match = re.fullmatch(r"([A-Za-z0-9_.-]+)(?::(\d{1,5}))?(?:=(.+))?", text.strip())
    if match is None or not 0 < int(match[2] or DEFAULT_PORT) < 1 << 16:
        raise UsageError(
            f"{safe_line(text, 60)!r} is not a worker",
            remedy="write HOST:PORT, or HOST:PORT=SIZE to limit the memory that is used there",
        )
    size = parse_size(match[3], _LEAST_BYTES) if match[3] else None
    return Worker(match[1], int(match[2] or DEFAULT_PORT), size)


def parse_workers(texts: Sequence[str]) -> dict[str, Worker]:
    """Return workers by endpoint. Raises UsageError for a wrong address, or one that is given twice."""
    workers: dict[str, Worker] = {}
    for worker in map(parse_worker, texts):
        if worker.endpoint in workers:
            raise UsageError(
                f"the worker {worker.endpoint} is named twice", remedy="a worker has one part of the model"
            )
        workers[worker.endpoint] = worker
    return workers


def check_workers(workers: Sequence[Worker]) -> None:
    """Raise WorkerError for the first worker that cannot be used."""
    for worker in workers:
        reason = _obstacle(worker)
        if reason:
            raise WorkerError(
                f"the worker {worker.endpoint} {reason}",
                remedy="start `dsmoe worker` there, or leave it out of --rpc",
            )


def lost_worker(workers: Sequence[Worker]) -> str:
    """Return what is known of a worker that was lost, for a message: its address and the reason."""
    for worker in workers:
        if reason := _obstacle(worker):
            return f"the worker {worker.endpoint} {reason}"
    return f"the connection to a worker ({endpoints(workers)}) broke; it can be reached again"


def unreachable_worker(workers: Sequence[Worker]) -> str:
    """Return which worker accepts no connection, and why; an empty text if all accept one.

    Unlike `check_workers`, this may be asked while a worker serves this machine: it then accepts connections,
    but does not answer.
    """
    for worker in workers:
        try:
            _connect(worker).close()
        except OSError as error:
            return f"the worker {worker.endpoint} {_reason(error)}"
    return ""


def endpoints(workers: Sequence[Worker]) -> str:
    """Return the addresses of workers, for a message."""
    return " or ".join(worker.endpoint for worker in workers)


def _obstacle(worker: Worker) -> str:
    """Return why a worker cannot be used; an empty text if it can. Waits at most _SECONDS."""
    try:
        answer = _greet(worker, time.monotonic() + _SECONDS)
    except OSError as error:
        return _reason(error)
    if len(answer) < _ANSWER.size:
        return _CLOSES
    size, *version, _ = _ANSWER.unpack(answer)
    if size != _ANSWER.size - 8:
        return "is not a worker: another program listens there"
    if tuple(version) != PROTOCOL:
        theirs, ours = (".".join(map(str, each)) for each in (version, PROTOCOL))
        return (
            f"has version {theirs} of llama.cpp's protocol, this machine {ours}: install the same llama.cpp"
        )
    return ""


def _greet(worker: Worker, deadline: float) -> bytes:
    """Return the answer to llama.cpp's first message. It is shorter if the connection is closed.

    Raises OSError, and TimeoutError after `deadline`.
    """
    with _connect(worker) as connection:
        connection.sendall(struct.pack("<BQ", _HELLO, _CAPABILITIES) + bytes(_CAPABILITIES))
        answer = b""
        while len(answer) < _ANSWER.size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            connection.settimeout(left)
            part = connection.recv(_ANSWER.size - len(answer))
            if not part:
                break
            answer += part
    return answer


def _connect(worker: Worker) -> socket.socket:
    """Connect to the IPv4 address that llama.cpp uses. Raises OSError."""
    connection = socket.socket(socket.AF_INET)
    try:
        connection.settimeout(_SECONDS)
        connection.connect((worker.host, worker.port))
    except BaseException:
        connection.close()
        raise
    return connection


def _reason(error: OSError) -> str:
    """Return what an error of a connection says about the worker."""
    if isinstance(error, TimeoutError):
        return (
            f"does not answer within {_SECONDS:g} s: it hangs, another program listens there, or it serves "
            "another client (if that client is gone, restart the worker)"
        )
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return _CLOSES
    if isinstance(error, ConnectionRefusedError):
        return "refuses connections: nothing listens there"
    return f"cannot be reached: {safe_line(error.strerror or str(error), 80)}"
