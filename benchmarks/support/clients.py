"""HTTP clients that put load on a server. Some hang up or send what a server must refuse."""

from __future__ import annotations

import http.client
import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from benchmarks.support.workloads import sentences

_PATIENCE = 120.0  # seconds without a byte; the server counts as hanging then
_HANG_UPS = ("before its body is sent", "before the reply", "during the reply")
HANG_UP_SHARE, MALFORMED_SHARE, TOO_LONG_SHARE = 0.10, 0.05, 0.02
_N_PREFIXES = 4
_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, slots=True)
class Query:
    """One request, the status of its answer, and the end of its stream.

    `hang_up` is when the client closes the connection, one of `_HANG_UPS`, or empty.
    """

    kind: str
    path: str
    body: bytes
    status: int = 200
    hang_up: str = ""
    end: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response. The seconds count from the request to the first byte of the body, and to the last one."""

    status: int
    body: bytes
    first_seconds: float
    seconds: float

    def n_tokens(self) -> int:
        """Return the number of generated tokens; 0 for a failed request."""
        if self.status != http.HTTPStatus.OK:
            return 0
        events = (line.removeprefix(b"data: ") for line in self.body.splitlines() if b'"usage":{' in line)
        last = json.loads([self.body, *events][-1])
        return int(last["usage"]["completion_tokens"])


class Connection:
    """A connection that is kept alive between requests."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)

    def ask(self, path: str, body: bytes) -> Answer:
        """Send a request and read the whole response."""
        began = time.perf_counter()
        self._connection.request("POST", path, body, {"content-type": "application/json"})
        with self._connection.getresponse() as response:
            parts = [response.read1(1 << 16)]
            first_seconds = time.perf_counter() - began
            while parts[-1]:
                parts.append(response.read1(1 << 16))
        return Answer(response.status, b"".join(parts), first_seconds, time.perf_counter() - began)

    def get(self, path: str) -> bytes:
        """Return the body of a page."""
        self._connection.request("GET", path)
        return self._connection.getresponse().read()

    def hang_up(self, query: Query) -> None:
        """Send a request, or a part of it, and close the connection."""
        connection = self._connection
        connection.putrequest("POST", query.path)
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", str(len(query.body)))
        connection.endheaders()
        if query.hang_up == _HANG_UPS[0]:
            connection.send(query.body[: len(query.body) // 2])
        else:
            connection.send(query.body)
        if query.hang_up == _HANG_UPS[2]:
            connection.getresponse().read1(1)
        connection.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class Mix:
    """Random requests: chats and completions, streamed and whole, many with one of a few shared prefixes, and
    the share of bad ones.
    """

    def __init__(self, n_context: int, seed: int) -> None:
        self._n_context = n_context
        self._random = random.Random(seed)
        self._prefixes = [sentences(120, number) for number in range(_N_PREFIXES)]

    def next(self) -> Query:
        """Return the next request."""
        point = self._random.random()
        if point < HANG_UP_SHARE:
            good, when = self._good(), self._random.choice(_HANG_UPS)
            return Query(f"hangs up {when}", good.path, good.body, hang_up=when)
        if point < HANG_UP_SHARE + MALFORMED_SHARE:
            return self._random.choice(_MALFORMED)
        if point < HANG_UP_SHARE + MALFORMED_SHARE + TOO_LONG_SHARE:
            body = {"prompt": "word " * (self._n_context + self._random.randrange(5000))}
            return Query("too long", _COMPLETION, json.dumps(body).encode(), 400)
        return self._good()

    def _good(self) -> Query:
        choose, text = self._random.choices, self._text()
        body: dict[str, Any] = {"max_tokens": self._random.randrange(8, 48)}
        messages = [{"role": "user", "content": text}]
        (kind,) = choose(list(_GOOD), weights=[weight for weight, *_ in _GOOD.values()])
        _, path, extra, end = _GOOD[kind]
        if path == _COMPLETION:
            body["prompt"] = text
        elif path == "/v1/responses":
            body["input"] = messages
            body["max_output_tokens"] = body.pop("max_tokens")
        else:
            body["messages"] = messages
        return Query(kind, path, json.dumps({**body, **extra}).encode(), end=end)

    def _text(self) -> str:
        own = sentences(self._random.randrange(5, 60), self._random.randrange(200))
        return f"{self._random.choice(self._prefixes)} {own}" if self._random.random() < 0.6 else own


_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
}
_FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": _SCHEMA}}
_DONE = b"data: [DONE]\n\n"
_GOOD: dict[str, tuple[int, str, dict[str, Any], bytes]] = {
    "chat, streamed": (4, _CHAT, {"stream": True}, _DONE),
    "chat, whole": (4, _CHAT, {}, b""),
    "completion, streamed": (3, _COMPLETION, {"stream": True, "temperature": 0}, _DONE),
    "completion, log-probabilities": (1, _COMPLETION, {"logprobs": 3}, b""),
    "chat, two choices": (1, _CHAT, {"n": 2, "stream": True}, _DONE),
    "chat, JSON schema": (1, _CHAT, {"response_format": _FORMAT}, b""),
    "messages, streamed": (1, "/v1/messages", {"stream": True}, b'"type":"message_stop"}\n\n'),
    "responses, whole": (1, "/v1/responses", {}, b""),
}
"""Weight, path, fields, and end of the stream of each kind of request."""
_MALFORMED = tuple(
    Query("malformed", path, body, status)
    for path, body, status in (
        (_CHAT, b'{"messages": [', 400),
        (_CHAT, b"", 400),
        (_CHAT, b"\xff\xfe\x00", 400),
        (_CHAT, b'{"messages": "hi"}', 400),
        (_CHAT, b'{"messages": [{"role": "user", "content": 5}]}', 400),
        (_CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": "hot"}', 400),
        (_CHAT, b'{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}', 400),
        (_CHAT, b'{"messages": [{"role": "user", "content": "a"}], "model": "no"}', 404),
        (_COMPLETION, b'{"prompt": [999999999]}', 400),
        (_COMPLETION, b'{"prompt": {"a": 1}}', 400),
        (_COMPLETION, b'{"prompt": "a", "logit_bias": {"x": 1}}', 400),
        ("/v1/embeddings", b"{}", 404),
    )
)


@dataclass(slots=True)
class Load:
    """The results of a load. `wrong` describes the answers that were not expected."""

    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    first_seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, query: Query, answer: Answer) -> None:
        """Count an answer."""
        self.kinds[query.kind] += 1
        if answer.status != query.status or not answer.body.endswith(query.end):
            self.wrong.append(f"{query.kind}: status {answer.status}, {answer.body[-300:]!r}")
        elif query.end:
            self.first_seconds.append(answer.first_seconds)

    def percentile(self, percent: int) -> float:
        """Return a percentile of the seconds to the first token of streams."""
        return statistics.quantiles(self.first_seconds, n=100)[percent - 1]


def run_load(port: int, n_clients: int, seconds: float, seed: int, n_context: int, n_least: int = 0) -> Load:
    """Send requests of `n_clients` clients for some time, and at least `n_least` each.

    Waits for the last answers.
    """
    load, lock = Load(), threading.Lock()
    began = time.perf_counter()

    def client(number: int) -> None:
        mix, connection, n_sent = Mix(n_context, 1000 * seed + number), Connection(port), 0
        while time.perf_counter() - began < seconds or n_sent < n_least:
            n_sent += 1
            query = mix.next()
            try:
                if query.hang_up:
                    connection.hang_up(query)
                    with lock:
                        load.kinds[query.kind] += 1
                    continue
                answer = connection.ask(query.path, query.body)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                with lock:
                    load.wrong.append(f"{query.kind}: {error!r}")
                continue
            with lock:
                load.add(query, answer)
        connection.close()

    with ThreadPoolExecutor(n_clients) as pool:
        list(pool.map(client, range(n_clients)))
    load.seconds = time.perf_counter() - began
    return load


def throughput(
    port: int, bodies: Sequence[Mapping[str, Any]], n_new: int, n_clients: int
) -> tuple[float, int]:
    """Send completions, at most `n_clients` at a time.

    Returns the generated tokens per second, up to the last answer, and the number of requests that failed,
    which count no tokens. SystemExit if an answer has another number of tokens than `n_new`.
    """

    def ask(body: bytes) -> int:
        with closing(Connection(port)) as connection:
            answer = connection.ask(_COMPLETION, body)
        count = answer.n_tokens()
        if count not in (0, n_new):
            raise SystemExit(f"a reply has {count} tokens, {n_new} were asked for")
        return count

    encoded = [json.dumps(body).encode() for body in bodies]
    began = time.perf_counter()
    with ThreadPoolExecutor(n_clients) as pool:
        counts = list(pool.map(ask, encoded))
    return sum(counts) / (time.perf_counter() - began), counts.count(0)
