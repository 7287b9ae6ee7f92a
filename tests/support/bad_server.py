"""A server that answers each request as a test wants, also with what is not HTTP."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MODELS = b'{"data": [{"id": "far", "max_model_len": 4096}]}'
Answer = Callable[[socket.socket], None]
"""Answers one request on a connection, which is closed afterwards."""


@dataclass(slots=True)
class BadServer:
    """A running server. `answer` is for chat completions, `models` for the list of models."""

    url: str
    answer: Answer
    models: Answer
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)


def page(raw: bytes, status: str = "200 OK", kind: str = "application/json", *headers: str) -> Answer:
    """Answer with a whole response."""
    lines = [f"HTTP/1.1 {status}", f"content-type: {kind}", f"content-length: {len(raw)}", *headers, "", ""]
    return lambda connection: connection.sendall("\r\n".join(lines).encode() + raw)


def stream(*parts: bytes, then: Callable[[], object] = lambda: None) -> Answer:
    """Answer with a stream whose end is the end of the connection, in these pieces. Then call `then`."""

    def answer(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        for part in parts:
            connection.sendall(part)
        then()

    return answer


def chunk(text: str = "", **more: Any) -> bytes:
    """Return an event with a part of a reply."""
    choice = {"index": 0, "delta": {"content": text} if text else {}, **more}
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


@contextmanager
def bad_server(answer: Answer, models: Answer | None = None) -> Iterator[BadServer]:
    """Serve until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = BadServer(f"http://127.0.0.1:{port}/v1", answer, models or page(MODELS))

        def run() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=_handle, args=(server, connection), daemon=True).start()

        threading.Thread(target=run, daemon=True).start()
        try:
            yield server
        finally:
            # Ends `accept`, which closing alone does not.
            listener.shutdown(socket.SHUT_RDWR)


def _handle(server: BadServer, connection: socket.socket) -> None:
    with connection, connection.makefile("rb") as file:
        lines = itertools.takewhile(lambda line: line not in (b"", b"\r\n"), iter(file.readline, None))
        head = b"".join(lines).decode("latin-1")
        server.heads.append(head)
        length = next(
            (line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length")),
            "0",
        )
        body = file.read(int(length))
        try:
            if head.startswith("GET"):
                server.models(connection)
            elif head.startswith("POST"):
                server.bodies.append(json.loads(body))
                server.answer(connection)
        except OSError:
            pass  # the client has gone
