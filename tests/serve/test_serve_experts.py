"""The experts of the last reply: `/v1/experts/last`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from support.fake_engine import FakeEngine
from support.models import smollm2, tiny_model
from support.serving import HELLO, Serving, serving

from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions, Observation
from dsmoe_local.serve import generation
from dsmoe_local.serve.generation import OBSERVERS


def refused(server: Serving) -> str:
    code: str = server.send("/v1/experts/last").error["code"]
    return code


class Counting(FakeEngine):
    """An engine whose routers have chosen expert 0 for each token, also of the prompt."""

    def __init__(self) -> None:
        super().__init__(lambda prompt: "reply", gate=self._next)
        self.options = replace(self.options, observers=OBSERVERS)
        self.n_tokens = 0
        self.observed = threading.Event()

    def _next(self, index: int) -> None:
        if index == 0:
            self.n_tokens += 100  # the prompt
        if index == 1:
            assert self.observed.wait(60)
        self.n_tokens += 1

    def observe(self, name: str) -> Observation:
        """See TextEngine."""
        layer = {"layer": 1, "tokens": self.n_tokens, "counts": [self.n_tokens, 0], "expert_mass": [0.0, 0.0]}
        sums = ("captured_mass", "captured_mass_deviation", "router_entropy", "routed_norm", "shared_norm")
        self.observed.set()
        layers = [{**layer, "sampled": 0, **dict.fromkeys(sums, 0.0)}]
        return {"n_routed_experts": 2, "gating": "softmax", "n_groups": 1, "layers": layers}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let replies wait for their activity on a busy machine, too."""
    monkeypatch.setattr(generation, "ACTIVITY_SECONDS", 60.0)


@pytest.mark.parametrize("stream", [False, True])
def test_the_last_reply(stream: bool) -> None:
    """Guards: counts of the prompt, or of an earlier reply; a client that asks right after the reply and gets
    the one before.
    """
    engine = Counting()
    with serving(engine, experts=True) as server:
        assert refused(server) == "no_experts"
        for _ in range(2):
            engine.observed.clear()
            sent = server.chat(stream=stream)
            found = server.send("/v1/experts/last").json
            assert found["id"] in sent.body.decode()
            assert (found["model"], found["completion_tokens"]) == ("fake", 5)
            assert found["tokens"] == found["layers"][0]["counts"][0] == 4


@pytest.mark.parametrize(("limit", "status"), [(60.0, 408), (0.05, 200)])
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_does_not_tell(
    stream: bool, limit: float, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a finished reply that waits for its experts forever, and that nothing can end."""
    monkeypatch.setattr(generation, "ACTIVITY_SECONDS", limit)
    go = threading.Event()

    class Silent(Counting):
        def observe(self, name: str) -> Observation:
            assert not self.observed.is_set() or go.wait(60)
            return super().observe(name)

    # A long limit of the request must not end the reply, a short one must.
    with serving(Silent(), experts=True, max_seconds=0.5 if status == 408 else 60.0) as server:
        answer = server.chat(stream=stream)
        if stream:
            assert ("[DONE]" in answer.body.decode()) == (status == 200)
            assert ('"timeout"' in answer.body.decode()) == (status == 408)
        else:
            assert answer.status == status
        assert refused(server) == "no_experts"
        go.set()


def test_a_real_engine() -> None:
    """Guards: counts in another form than the page and docs/experts.md have."""
    options = ModelOptions(tiny_model(), n_parallel=2, n_threads=1, n_context=2048, observers=OBSERVERS)
    with EngineClient.load(options) as engine, serving(engine, experts=True) as server:
        found: dict[str, Any] = {}
        while not found.get("tokens"):
            # The engine may have ended a reply before its first count is taken.
            n_tokens = server.chat().json["usage"]["completion_tokens"]
            found = server.send("/v1/experts/last").json
        assert found["tokens"] <= n_tokens
        for layer in found["layers"]:
            assert sum(layer["counts"]) == 3 * layer["tokens"]


def test_replies_at_the_same_time() -> None:
    """Guards: counts that fail when replies overlap."""
    options = ModelOptions(tiny_model(), n_parallel=4, n_threads=1, n_context=1024, observers=OBSERVERS)
    with EngineClient.load(options) as engine, serving(engine, experts=True) as server:
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda n: server.chat(max_tokens=10 + n), range(16)))
        assert {reply.status for reply in replies} == {200}
        # A reply may end before its first count is taken.
        while not server.send("/v1/experts/last").json.get("tokens"):
            server.chat(max_tokens=500)


def test_no_experts() -> None:
    """Guards: a status 500, or the experts of another model, if there are none."""
    with serving(FakeEngine()) as server:
        server.chat()
        assert refused(server) == "experts_not_observed"
    options = ModelOptions(smollm2(), n_threads=1, n_context=256)
    with EngineClient.load(options) as dense, serving(dense, experts=True) as server:
        assert server.send("/v1/chat/completions", {"messages": HELLO, "max_tokens": 3}).status == 200
        assert refused(server) == "no_experts"
