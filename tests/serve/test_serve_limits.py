"""Bad and impatient clients: limits, hang-ups, slow readers, and what they are told."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from select import select
from typing import Any
from unittest.mock import MagicMock

import pytest
import uvicorn
from support.fake_engine import FakeEngine
from support.mutations import damaged_json
from support.serving import HELLO, Gate, Serving, serving
from uvicorn.server import ServerState

from dsmoe_local.engine.interface import Ticket
from dsmoe_local.engine.types import Request
from dsmoe_local.serve import generation
from dsmoe_local.serve.connection import connection_type


class WatchedEngine(FakeEngine):
    """Notes cancelled requests."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.cancelled = threading.Semaphore(0)
        self.on_cancel: Callable[[], None] = lambda: None

    def cancel(self, request_id: str) -> None:
        super().cancel(request_id)
        self.cancelled.release()
        self.on_cancel()


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(FakeEngine(n_parallel=4), max_body=1000) as server:
        yield server


def post(body: bytes, *headers: str, path: str = "/v1/completions") -> bytes:
    """Return a request. Without other headers, its length is that of the body."""
    lines = headers or (f"content-length: {len(body)}",)
    head = "\r\n".join((f"POST {path} HTTP/1.1", "host: localhost", *lines, "connection: close", "", ""))
    return head.encode() + body


def exchange(server: Serving, request: bytes) -> bytes:
    """Send bytes and return everything that comes back."""
    with closing(server.connect()) as connection:
        connection.sendall(request)
        with connection.makefile("rb") as file:
            return file.read()


def exchange_in_no_time(server: Serving, request: bytes) -> bytes:
    """Send bytes at once and return everything that comes back. If nothing comes, time limits run out."""
    parts = []
    with closing(server.connect()) as connection, suppress(ConnectionResetError):
        connection.sendall(request)
        while True:
            if not select([connection], [], [], 0.05)[0]:
                server.skip(30)
            elif part := connection.recv(1 << 16):
                parts.append(part)
            else:
                break
    return b"".join(parts)


def read_until_closed(connection: socket.socket) -> bytes:
    """Return what can be read until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(1 << 20):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (post(b"", "content-length: 1001"), 413, "body_too_large"),
        (post(b"400\r\n" + b" " * 1024 + b"\r\n", "transfer-encoding: chunked"), 413, "body_too_large"),
        (post(b"", "content-length: 1001", "expect: 100-continue"), 413, "body_too_large"),
        (post(b'{"prompt": ', "content-length: 999"), 408, "timeout"),
        (post(b"{}", "content-length: 2", "content-type: text/plain"), 415, "not_json"),
        (post(b""), 400, "invalid_request"),
        (post(b"[]"), 400, "invalid_request"),
    ],
)
def test_bodies(server: Serving, request_bytes: bytes, status: int, code: str) -> None:
    """Guards: a body that fills the memory, or that never ends; a form of a web page taken for JSON."""
    head, _, body = exchange_in_no_time(server, request_bytes).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert json.loads(body)["error"]["code"] == code


def test_the_place_of_a_mistake_in_json(server: Serving) -> None:
    """Guards: a column without its line."""
    answer = server.send("/v1/completions", b'{\n  "prompt": "a",\n  "max_tokens": 1 "n": 2\n}')
    assert answer.status == 400
    assert "a comma or a closing bracket is missing in line 3, column 19" in answer.error["message"]


def test_unknown_fields(server: Serving) -> None:
    """Guards: a mistyped field that has no effect without a word; one that refuses the request."""
    answer = server.chat(temprature=1, **{'x"é\r\n': 2})
    assert answer.status == 200
    assert "temprature" in answer.headers["warning"]
    assert answer.headers["warning"].isascii()
    assert "warning" not in server.chat(temperature=1).headers


@pytest.mark.parametrize(
    ("path", "method", "status", "hint"),
    [
        ("/chat/completions", "POST", 404, "did you mean /v1/chat/completions?"),
        ("/v1/v1/messages", "POST", 404, "did you mean /v1/messages?"),
        ("/v1/embeddings", "POST", 404, "use one of /v1/chat/completions"),
        ("/v1/models", "POST", 405, "there is no POST /v1/models; use GET, HEAD"),
        ("/v1/chat/completions", "GET", 405, "there is no GET"),
    ],
)
def test_wrong_paths(server: Serving, path: str, method: str, status: int, hint: str) -> None:
    """Guards: an error that is not in OpenAI's form; a base URL without /v1 that is not explained."""
    answer = server.send(path, {} if method == "POST" else None)
    assert answer.status == status
    assert hint in answer.error["message"]
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_large_body_and_its_refusal(server: Serving, is_chunked: bool) -> None:
    """Guards: a connection that is reset while the client sends, so that it never reads why."""
    sent = b" " * (4 << 20)
    if is_chunked:
        body = post(b"%x\r\n%s\r\n0\r\n\r\n" % (len(sent), sent), "transfer-encoding: chunked")
    else:
        body = post(sent)
    assert exchange(server, body).startswith(b"HTTP/1.1 413")


def test_a_large_body_is_parsed() -> None:
    """Guards: a mistake that gets lost in the thread that parses large bodies."""
    with serving(FakeEngine(n_context=1 << 20)) as server:
        body = {"prompt": "a", "max_tokens": 1, "metadata": {"text": "x" * (300 << 10)}}
        assert server.send("/v1/completions", body).status == 200
        refused = server.send("/v1/completions", json.dumps(body).encode() + b"}")
        assert "not JSON" in refused.error["message"]


def test_the_queue() -> None:
    """Guards: requests without number that wait; a refusal that does not say when to come back."""
    gate = Gate()
    with serving(FakeEngine(gate=gate), max_queued=1) as server, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(server.chat) for _ in range(2)]
        for _ in running:
            gate.wait()
        assert server.send("/health").json == {"status": "ok", "running": 1, "queued": 1}
        refused = server.chat()
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.error["code"] == "queue_full"
        assert "2 of 2 places for replies are taken, the request needs 1" in refused.error["message"]
        gate.open()
        assert [request.result().status for request in running] == [200, 200]
        assert server.chat(n=2).status == 200


@pytest.mark.parametrize("is_busy", [False, True])
@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": ["a", "b"], "n": 2}, 200),
        ({"prompt": ["a", "b", "c"], "n": 2}, 400),
        ({"prompt": ["a"] * 6}, 400),
        ({"prompt": "a", "n": 6}, 400),
    ],
)
def test_a_request_for_many_replies(body: dict[str, Any], status: int, is_busy: bool) -> None:
    """Guards: a request that fills the queue for everybody else; one that never fits and is told to try
    again.
    """
    gate = Gate()
    with serving(FakeEngine(gate=gate, n_parallel=2), max_queued=3) as server, ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.chat, n=2)
        gate.wait()
        if not is_busy:
            gate.open()
            running.result()
        answer = server.send("/v1/completions", body)
        if status == 400:
            assert (answer.status, answer.error["code"]) == (400, "too_many_replies")
            assert "6 replies" in answer.error["message"]
            assert "5 at once: 2 running and 3 waiting" in answer.error["message"]
        elif is_busy:
            assert answer.status == 429
            assert "2 of 5 places for replies are taken, the request needs 4" in answer.error["message"]
        else:
            assert answer.status == 200
        gate.open()
        assert running.result().status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(stream: bool) -> None:
    """Guards: a request that holds its slot forever; a client that repeats it again and again."""
    gate = Gate()
    engine = WatchedEngine(gate=gate)
    engine.on_cancel = gate.open
    with serving(engine, max_seconds=0.1) as server:
        answer = server.chat(stream=stream)
        assert answer.status == 408
        assert answer.headers["x-should-retry"] == "false"
        assert "0.1 seconds" in answer.error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n_tokens", [0, 3])
def test_a_client_that_hangs_up(stream: bool, n_tokens: int) -> None:
    """Guards: a slot that stays taken, before the first token or after it."""
    gate = Gate()
    engine = WatchedEngine(gate=gate)
    with serving(engine, max_queued=0) as server:
        body = json.dumps({"prompt": "abcdef", "stream": stream}).encode()
        with closing(server.connect()) as connection:
            connection.sendall(post(body))
            for _ in range(n_tokens):
                gate.let()
                gate.wait()
            gate.wait()
            if stream and n_tokens:
                assert connection.recv(1)
        assert engine.cancelled.acquire(timeout=60)
        gate.let()  # one step: the engine sees the cancellation
        gate.open()
        while (answer := server.chat()).status == 429:
            pass  # the last event is on its way
        assert answer.status == 200


def test_a_client_that_gives_up_while_the_model_is_loaded_again() -> None:
    """Guards: a load after a crash that each client ends, so that it never completes; the wrong reason."""
    starting, go = threading.Event(), threading.Event()

    class Reloading(WatchedEngine):
        def start(self, request: Request, deliver: Any) -> Ticket:
            starting.set()
            assert go.wait(60)
            return super().start(request, deliver)

    gate = Gate()
    engine = Reloading(gate=gate)
    with serving(engine, max_seconds=60) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.chat)
        assert starting.wait(60)
        server.skip(60)
        answer = asked.result()
        assert (answer.status, answer.error["code"]) == (408, "timeout")
        assert not engine.cancelled.acquire(blocking=False)
        go.set()
        assert engine.cancelled.acquire(timeout=60)
        gate.open()
        assert len(engine.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_does_not_answer(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a client that waits for an engine that hangs; a slot that stays taken."""
    monkeypatch.setattr(generation, "KILL_SECONDS", 0.05)
    gate = Gate()
    killed = threading.Event()

    class Hanging(FakeEngine):
        def kill(self) -> None:
            super().kill()
            gate.open()
            killed.set()

    with serving(Hanging(gate=gate), max_seconds=60) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.chat, stream=stream)
        gate.wait()
        server.skip(60)
        assert asked.result().status == 408
        assert killed.wait(60)
        assert server.chat(stream=stream).status == 200


def test_a_slow_step_of_workers_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a model that is sent to its workers again because a client hung up during a slow step."""
    monkeypatch.setattr(generation, "KILL_SECONDS", 0)
    gate = Gate()
    engine = WatchedEngine(gate=gate)
    engine.options = replace(engine.options, workers=("127.0.0.1:1",))
    with serving(engine, max_seconds=60) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.chat)
        gate.wait()
        server.skip(60)
        assert asked.result().status == 408
        assert engine.cancelled.acquire(timeout=60)
        gate.open()
        while server.send("/health").json["running"]:
            pass  # the engine's last event is on its way
    assert engine.kills == 0


def test_a_reader_that_stops_reading() -> None:
    """Guards: a stream that grows in memory, or a connection that is never closed."""
    held = threading.Event()
    engine = WatchedEngine(
        lambda prompt: "x" * 9_000,
        n_context=10_000,
        gate=lambda index: None if index < 6_000 or held.wait(60) else pytest.fail("not cancelled"),
    )
    engine.on_cancel = held.set
    with serving(engine, stall_seconds=30, max_seconds=1e9, send_buffer=4096) as server:
        with closing(socket.socket()) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(60)
            connection.connect(("127.0.0.1", server.port))
            # With 20 alternatives for each token it is more than the system's buffers hold.
            connection.sendall(post(b'{"prompt": "a", "stream": true, "logprobs": 20}'))
            while not engine.requests:
                pass  # the request arrives
            while not engine.cancelled.acquire(blocking=False):
                server.skip(30)
            assert b"[DONE]" not in read_until_closed(connection)
        while server.send("/health").json["running"]:
            pass  # the engine's last event is on its way


def test_a_slow_reader_is_kept() -> None:
    """Guards: a client that reads steadily but slowly, and is dropped."""
    loop, transport = MagicMock(), MagicMock()
    connection = connection_type(30.0)(uvicorn.Config(lambda: None), ServerState(), {}, loop)
    transport.get_extra_info.return_value = None
    connection.connection_made(transport)
    transport.get_write_buffer_size.return_value = 3000
    connection.pause_writing()
    for size, aborts in ((2000, 0), (1999, 0), (1999, 1)):
        transport.get_write_buffer_size.return_value = size
        seconds, check = loop.call_later.call_args.args
        check()
        assert (seconds, transport.abort.call_count) == (30.0, aborts)


def test_connections_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: connections that fill the table of descriptors, idle or with half a header."""
    monkeypatch.setattr("dsmoe_local.serve.server._KEEP_ALIVE_SECONDS", 10**9)
    with serving(FakeEngine(), stall_seconds=30) as server:

        def wait_until_closed(connection: socket.socket) -> None:
            while not select([connection], [], [], 0)[0]:
                server.skip(30)
            assert read_until_closed(connection) == b""

        for start in (b"", b"GET /health HT"):
            with closing(server.connect()) as connection:
                connection.sendall(start)
                wait_until_closed(connection)
        kept = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        with closing(server.connect()) as connection:
            connection.sendall(kept)
            head, _, body = connection.recv(1 << 16).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            while not body.endswith(b"}"):
                body += connection.recv(1 << 16)
            connection.sendall(kept[:9])
            wait_until_closed(connection)


def test_random_damage(server: Serving) -> None:
    """Guards: a request that ends the server, or is answered with a traceback."""
    rng = random.Random(1)
    whole = {"model": "fake", "messages": HELLO, "max_tokens": 2, "stream": False, "stop": ["a"]}
    statuses = set()
    for number in range(150):
        if number % 3:
            answer = server.send("/v1/chat/completions", damaged_json(whole, rng))
            statuses.add(answer.status)
            assert answer.status in (200, 400, 404, 413)
            if answer.status != 200:
                assert answer.error["message"]
        else:
            raw = bytearray(post(json.dumps(whole).encode(), path="/v1/chat/completions"))
            for _ in range(rng.randrange(1, 6)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            exchange_in_no_time(server, bytes(raw))
    assert {200, 400} <= statuses
    assert server.chat().status == 200


@pytest.mark.parametrize("asked", [False, True])
def test_the_log(asked: bool) -> None:
    """Guards: texts of requests in the log, of refused ones above all; control characters in it."""
    with serving(FakeEngine(), log_text=asked) as server:
        server.send("/v1/completions", {"prompt": "xyzzy\x1b[31m"})
        server.send("/v1/completions", {"prompt": "xyzzy", "temperature": 900})
        server.send("/v1/completions", b'{"prompt": "xyzzy')
        server.send("/v1/completions", {"prompt": ["xyzzy", "xyzzy"], "n": 2})
        server.send("/v1/completions", {"prompt": "xyzzy" * 1000})
    log = "\n".join(server.log)
    assert ("xyzzy" in log) == asked
    assert "\x1b" not in log
    assert "/v1/completions 200" in log
    assert "temperature = 900" in log


def test_metrics() -> None:
    """Guards: figures of another server in the same process; counters that stay 0."""
    with serving(FakeEngine(n_parallel=2)) as server:
        server.chat()
        server.chat(stream=True)
        server.send("/v1/completions", {"prompt": "x", "max_tokens": -2})
        text = server.send("/metrics").body.decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["dsmoe_prompt_tokens_total"]) == 18
    assert float(values["dsmoe_cached_tokens_total"]) == 9
    assert float(values["dsmoe_generated_tokens_total"]) == 16
    assert float(values['dsmoe_requests_total{status="200"}']) == 2
    assert float(values['dsmoe_requests_total{status="400"}']) == 1
    assert float(values["dsmoe_time_to_first_token_seconds_count"]) == 2
    assert float(values["dsmoe_replies_running"]) == 0


@pytest.mark.parametrize(
    "body", [{"content": "é🚀 x"}, {"prompt": "é🚀 x"}, {"messages": [{"role": "user", "content": "é🚀 x"}]}]
)
def test_the_tokenizer(server: Serving, body: dict[str, Any]) -> None:
    """Guards: characters of several tokens that do not survive; another context than that of requests."""
    answer = server.send("/tokenize", body).json
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 4096
    text = server.send("/detokenize", {"tokens": answer["tokens"]}).json["content"]
    assert text == ("user: é🚀 x\n" if "messages" in body else "é🚀 x")
    assert server.send("/detokenize", {"tokens": [10**9]}).status == 400
    assert server.send("/detokenize", {"tokens": "abc"}).error["param"] == "tokens"
    assert server.send("/tokenize", {"content": "a", "prompt": "b"}).status == 400


def test_many_tokenizer_requests() -> None:
    """Guards: replies that wait for the tokenizer's clients; a wait without end for a server that ends."""
    busy, go = threading.Event(), threading.Event()

    class Slow(FakeEngine):
        def encode(self, *arguments: Any, **options: Any) -> tuple[int, ...]:
            assert not busy.is_set() or go.wait(60)
            return super().encode(*arguments, **options)

    with serving(Slow(), max_queued=0, grace=60.0) as server, ThreadPoolExecutor(8) as pool:
        busy.set()
        asked = [pool.submit(server.send, "/tokenize", {"content": "a"}) for _ in range(8)]
        assert server.chat().status == 200
        go.set()
        assert {request.result().status for request in asked} == {200}
        with closing(server.connect()) as connection:
            connection.sendall(post(b"", "content-length: 16", "expect: 100-continue", path="/tokenize"))
            assert b" 100 " in connection.recv(1 << 10)
            server.stop()
            connection.sendall(b'{"content": "a"}')
            assert b" 503 " in read_until_closed(connection)


def test_figures_are_read_in_the_event_loop() -> None:
    """Guards: figures that another thread changes while they are added up."""
    threads = []

    class Watched(FakeEngine):
        @property
        def pid(self) -> int:
            threads.append(threading.current_thread())
            return super().pid

    with serving(Watched()) as server:
        assert server.send("/metrics").status == 200
        assert threads == [server.thread]


def test_defaults_of_requests() -> None:
    """Guards: options of the command that do not reach requests."""
    engine = FakeEngine()
    with serving(engine) as server:
        server.chat(seed=5)
    (request,) = engine.requests
    assert isinstance(request, Request)
    assert (request.sampling.temperature, request.sampling.seed) == (0, 5)
