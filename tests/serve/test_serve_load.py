"""Many clients at once, good and bad: no slot, thread or descriptor is lost."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from support.fake_engine import FakeEngine
from support.serving import HELLO, Serving, serving

from benchmarks.support.clients import run_load

_N_CLIENTS = 16
_N_REQUESTS = 400


def ask(server: Serving, number: int) -> str:
    """Send one request and return what it was: a hang-up, or its status."""
    rng = random.Random(number)
    body = {"messages": HELLO, "stream": number % 2 == 0, "max_tokens": rng.randrange(1, 9)}
    kind = rng.random()
    if kind < 0.1:
        raw = json.dumps(body).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        request = head + b"content-length: %d\r\n\r\n" % len(raw) + raw
        with closing(server.connect()) as connection:
            connection.sendall(request[: rng.randrange(1, len(request) + 1)])
        return "hung up"
    if kind < 0.15:
        return str(server.send("/v1/chat/completions", b'{"messages": [}').status)
    if kind < 0.17:
        return str(server.send("/v1/completions", {"prompt": "a" * 5000}).status)
    answer = server.chat(**body)
    assert not body["stream"] or answer.body.endswith(b"data: [DONE]\n\n")
    return str(answer.status)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_many_clients() -> None:
    """Guards: a slot that a hang-up keeps; a descriptor or a request that stays after its client has gone."""
    with serving(FakeEngine(n_parallel=4)) as server:
        assert server.chat().status == 200
        n_descriptors = len(os.listdir("/proc/self/fd"))
        with ThreadPoolExecutor(_N_CLIENTS) as pool:
            found = Counter(pool.map(lambda number: ask(server, number), range(_N_REQUESTS)))
        assert set(found) == {"200", "400", "hung up"}
        while server.send("/health").json["running"] or len(os.listdir("/proc/self/fd")) > n_descriptors:
            pass  # the last connections are being closed


def test_the_mixed_load() -> None:
    """Guards: a benchmark that counts correct answers as wrong; an endpoint that fails beside others."""
    with serving(FakeEngine(n_parallel=4)) as server:
        load = run_load(server.port, n_clients=8, seconds=0, seed=1, n_context=4096, n_least=40)
        assert not load.wrong
        assert {"chat, streamed", "malformed", "hangs up during the reply"} <= set(load.kinds)
        assert load.first_seconds
