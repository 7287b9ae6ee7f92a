"""Several models: loaded when they are named, unloaded when others need room."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from support.fake_engine import FakeEngine
from support.serving import Gate, serving

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.engine.errors import ModelLoadError
from dsmoe_local.serve.models import ModelSource


class Shelf:
    """Models a, b and c; `broken` cannot be loaded, `slow` once `go` is set. Each replies with its name."""

    def __init__(self, keep: int = 1, idle_seconds: float = 0.0, patience_seconds: float = 60.0) -> None:
        self.loads: list[str] = []
        self.n_closed = 0
        self.closed = threading.Semaphore(0)
        self.go = threading.Event()
        names = ("a", "b", "c", "broken", "slow")
        self.source = ModelSource(
            lambda: {name: Path(name) for name in names},
            self.load,
            self.fits,
            keep,
            idle_seconds,
            patience_seconds,
        )
        self.room = 10
        self.first = self.engine("fake")

    def engine(self, name: str) -> FakeEngine:
        """Return an engine that tells when it is closed."""
        engine = FakeEngine(lambda prompt: f"I am {name}")
        close = engine.close

        def closing() -> None:
            close()
            self.n_closed += 1
            self.closed.release()

        engine.close = closing  # type: ignore[method-assign]
        return engine

    def fits(self, path: Path) -> bool:
        """Return whether less than `room` models are in memory."""
        return 1 + len(self.loads) - self.n_closed < self.room

    def load(self, path: Path) -> FakeEngine:
        """Load a model."""
        self.loads.append(path.name)
        if path.name == "broken":
            raise ModelLoadError("the file is damaged")
        while path.name == "slow" and not self.go.wait(0.01):
            if self.source.stop.is_set():
                raise InterruptedRunError("the load was stopped")
        return self.engine(path.name)


def test_models_on_demand() -> None:
    """Guards: the reply of another model; a model that is loaded for each request, or twice at once."""
    shelf = Shelf(keep=2)
    with serving(shelf.first, source=shelf.source) as server, ThreadPoolExecutor(8) as pool:
        listed = server.send("/v1/models").json["data"]
        assert [model["id"] for model in listed] == ["fake", "a", "b", "c", "broken", "slow"]
        assert [model["loaded"] for model in listed] == [True, *[False] * 5]
        for reply in pool.map(lambda _: server.chat(model="a").json, range(8)):
            assert reply["choices"][0]["message"]["content"] == "I am a"
            assert reply["model"] == "a"
        assert shelf.loads == ["a"]
        assert server.chat().json["choices"][0]["message"]["content"] == "I am fake"
        server.chat(model="b")  # unloads a, which was not used for longer
        assert server.chat(model="fake").json["model"] == "fake"
        server.chat(model="a")
        assert shelf.loads == ["a", "b", "a"]


def test_a_model_in_use_is_not_unloaded() -> None:
    """Guards: a reply that ends because another client names another model."""
    gate = Gate()
    shelf = Shelf()
    shelf.first._gate = gate
    with serving(shelf.first, source=shelf.source) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.chat)
        gate.wait()
        second = pool.submit(server.chat, model="a")
        while server.send("/health").json["queued"] == 0:
            pass  # the second request arrives
        assert shelf.loads == []
        gate.open()
        assert first.result().json["choices"][0]["message"]["content"] == "I am fake"
        assert second.result().json["choices"][0]["message"]["content"] == "I am a"


def test_a_busy_model_makes_room() -> None:
    """Guards: a client that waits for another model as long as somebody uses the loaded one."""
    gate = Gate()
    shelf = Shelf(patience_seconds=0)
    shelf.first._gate = gate
    with serving(shelf.first, source=shelf.source) as server, ThreadPoolExecutor(3) as pool:
        first = pool.submit(server.chat)
        gate.wait()
        second = pool.submit(server.chat, model="a")
        while "fake: new requests wait, because a needs room" not in server.log:
            pass  # the second request arrives
        third = pool.submit(server.chat)
        while server.send("/health").json["queued"] < 2:
            pass  # the third one waits, although its model is loaded and could decode it, too
        assert (len(shelf.first.requests), shelf.loads) == (1, [])
        gate.open()
        replies = [each.result().json["choices"][0]["message"]["content"] for each in (first, second, third)]
    assert replies == ["I am fake", "I am a", "I am fake.gguf"]
    assert shelf.loads == ["a", "fake.gguf"]


def test_a_busy_model_stays_if_nobody_wants_the_other_one() -> None:
    """Guards: requests that wait for a load that was given up."""
    gate = Gate()
    shelf = Shelf(patience_seconds=0)
    shelf.first._gate = gate
    with serving(shelf.first, source=shelf.source, max_seconds=60) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.chat)
        gate.wait()
        with closing(server.connect()) as connection:
            body = b'{"model": "broken", "prompt": "x"}'
            head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
            connection.sendall(head % len(body) + body)
            while "fake: new requests wait, because broken needs room" not in server.log:
                pass  # the request arrives
            second = pool.submit(server.chat)
            while server.send("/health").json["queued"] < 2:
                pass  # the second one waits for it
        gate.open()
        assert first.result().status == second.result().status == 200
        assert server.chat().status == 200


def test_a_model_that_cannot_be_loaded() -> None:
    """Guards: a failed load that blocks the server, or that unloads a model for good."""
    shelf = Shelf()
    with serving(shelf.first, source=shelf.source) as server:
        answer = server.chat(model="broken")
        assert (answer.status, answer.error["code"]) == (503, "model_load_error")
        shelf.source.known()
        assert server.chat(model="b").status == 200
        assert server.chat(model="other").error["code"] == "model_not_found"


def test_idle_models() -> None:
    """Guards: memory that nobody uses; a server without a model afterwards."""
    shelf = Shelf(idle_seconds=0.05)
    with serving(shelf.first, source=shelf.source) as server:
        assert server.chat().status == 200
        assert shelf.closed.acquire(timeout=60)
        assert not server.send("/v1/models").json["data"][0]["loaded"]
        shelf.loads.clear()
        assert server.chat().status == 200
        assert shelf.loads == ["fake.gguf"]


def test_models_within_memory() -> None:
    """Guards: a second model that leaves no memory for the first, so that both are slow."""
    shelf = Shelf(keep=5)
    shelf.room = 2
    with serving(shelf.first, source=shelf.source) as server:
        for name in ("a", "b", "c"):
            assert server.chat(model=name).status == 200
        loaded = [model["id"] for model in server.send("/v1/models").json["data"] if model["loaded"]]
        assert loaded == ["b", "c"]


def test_the_time_limit_includes_the_load() -> None:
    """Guards: a wait without a limit; a load that each impatient client starts again."""
    shelf = Shelf()
    questions: tuple[tuple[str, dict[str, str]], ...] = (
        ("/v1/completions", {"prompt": "x"}),
        ("/tokenize", {"content": "x"}),
    )
    with serving(shelf.first, source=shelf.source, max_seconds=60) as server, ThreadPoolExecutor(1) as pool:
        for path, body in questions:
            asked = pool.submit(server.send, path, {"model": "slow", **body})
            while not (shelf.loads and server.send("/health").json["queued"]):
                pass  # the request waits for the load
            server.skip(60)
            assert asked.result().status == 408
        shelf.go.set()
        while not any(model["loaded"] for model in server.send("/v1/models").json["data"]):
            pass  # the load goes on
        assert server.chat(model="slow").json["choices"][0]["message"]["content"] == "I am slow"
        assert shelf.loads == ["slow"]


def test_a_client_that_hangs_up_while_it_waits_for_room() -> None:
    """Guards: a model that is unloaded for a client that has gone."""
    gate = Gate()
    shelf = Shelf()
    shelf.first._gate = gate
    with serving(shelf.first, source=shelf.source) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.chat)
        gate.wait()
        with closing(server.connect()) as connection:
            body = b'{"model": "a", "prompt": "x"}'
            head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
            connection.sendall(head % len(body) + body)
            while server.send("/health").json["queued"] == 0:
                pass  # the request arrives
        while server.send("/health").json["queued"]:
            pass  # its end is noticed
        gate.open()
        assert first.result().status == 200
        assert server.chat().status == 200
        assert shelf.loads == []
        assert server.chat(model="a").status == 200


def test_the_end_of_the_server_during_a_load() -> None:
    """Guards: a second signal without effect; a traceback; a client that is not told why."""
    shelf = Shelf()
    with serving(shelf.first, source=shelf.source, grace=60.0) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.chat, model="slow")
        while not shelf.loads:
            pass  # the load begins
        server.stop()
        server.stop()
        answer = asked.result()
        assert (answer.status, answer.error["code"]) == (503, "shutting_down")
        server.thread.join(60)
        assert not server.thread.is_alive()


def test_a_model_that_is_deleted_while_its_request_waits() -> None:
    """Guards: an internal error for a file that has gone."""
    lists: Iterator[dict[str, Path]] = iter([{"gone": Path("gone")}, {}, {}])
    source = ModelSource(lambda: next(lists), lambda path: FakeEngine(), lambda path: True, keep=2)
    with serving(FakeEngine(), source=source) as server:
        answer = server.chat(model="gone")
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
