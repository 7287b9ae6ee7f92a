"""An engine in a child process, on fakes: it dies, hangs or misbehaves, and its client does not."""

from __future__ import annotations

import gc
import inspect
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import hosted
from support.fake_engine import FakeEngine
from support.processes import is_gone

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.engine.errors import EngineCrashError, EngineError, OutOfMemoryError, PromptError
from dsmoe_local.engine.interface import ReloadableEngine, TextEngine
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.process.spawn import SPIN_COUNT, child_environment
from dsmoe_local.engine.types import FinishReason, Message, ModelOptions, Request, TokenEvent

OPTIONS = ModelOptions(Path("fake.gguf"), n_context=77)
SIGNALS = [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL]


def load(factory: str = hosted.FAKE, **more: Any) -> EngineClient:
    return EngineClient.load(OPTIONS, factory=factory, **more)


@pytest.fixture(scope="module")
def client() -> Iterator[EngineClient]:
    with load() as loaded:
        yield loaded


def text(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def test_same_events_as_in_this_process(client: EngineClient) -> None:
    """Guards: an event lost, doubled or changed on its way."""
    request = Request("r", "one\n\u2028é中\N{GRINNING FACE} \x1b[31m", stop=("31",), max_tokens=40)
    expected = list(hosted.Hosted().submit(request))
    got = list(client.submit(request))
    # What the fake remembers of its last reply is its own.
    assert [repr(event) for event in got[:-1]] == [repr(event) for event in expected[:-1]]
    assert (got[-1].text, got[-1].finish_reason) == (expected[-1].text, expected[-1].finish_reason)


def test_client_has_the_interface(client: EngineClient) -> None:
    """Guards: a client that callers cannot hold as any other engine."""
    engine: TextEngine = client
    reloadable: ReloadableEngine = client
    assert reloadable.options == OPTIONS
    for name in [name for name in vars(ReloadableEngine) | vars(TextEngine) if not name.startswith("_")]:
        if not isinstance(vars(EngineClient)[name], property):
            expected = inspect.signature(getattr(ReloadableEngine, name))
            assert inspect.signature(getattr(EngineClient, name)) == expected
    here = FakeEngine(n_context=100_000)
    assert engine.info == here.info
    conversation = (Message("user", "hé"), Message("assistant", "x", (5, 6)), Message("user", "\u2028"))
    assert engine.encode(conversation) == here.encode(conversation)
    assert engine.encode((1, 2, 3)) == (1, 2, 3)
    with pytest.raises(EngineError, match="no observer 'x'"):
        engine.observe("x")
    engine.cancel("unknown")


def test_many_requests_at_once_keep_their_events_apart(client: EngineClient) -> None:
    """Guards: an event delivered to another request."""
    streams = {word: client.submit(Request(word, word)) for word in map(str, range(1000, 1040))}
    for word, events in streams.items():
        seen = list(events)
        assert {event.request_id for event in seen} == {word}
        assert text(seen) == word


@pytest.mark.parametrize("number", SIGNALS)
def test_child_killed_in_the_middle_of_replies(number: signal.Signals) -> None:
    """Guards: a native crash that ends the session, that leaves a stream waiting, or a client that is then
    of no use.
    """
    with load(hosted.HALTING) as client:
        streams = [client.submit(Request(name, "abcdef")) for name in "abc"]
        for stream in streams:
            assert text([next(stream) for _ in range(3)]) == "abc"
        first = client.pid
        os.kill(first, number)
        for stream in streams:
            with pytest.raises(EngineCrashError, match=f"was killed by {number.name}"):
                next(stream)
            assert list(stream) == []
        assert is_gone(first)
        again = list(client.submit(Request("a", "xyz", max_tokens=3)))
        assert text(again) == "xyz"
        assert client.pid != first


def test_child_killed_again_and_again() -> None:
    """Guards: threads, descriptors or requests of a dead child that the next one trips over."""
    with load() as client:
        list(client.submit(Request("r", "warm")))
        gc.collect()  # what earlier tests have left
        before = threading.active_count(), len(os.listdir("/dev/fd"))
        for _ in range(5):
            with pytest.raises(EngineCrashError, match="SIGKILL"):
                list(client.submit(Request("r", "signal SIGKILL")))
            assert text(list(client.submit(Request("r", "next")))) == "next"
        while threading.active_count() > before[0] or len(os.listdir("/dev/fd")) > before[1]:
            pass  # the last reader may be on its way out


def test_child_that_exits_tells_its_status_and_its_last_lines() -> None:
    """Guards: the reason of a crash, which only the log has, lost with the process."""
    with load() as client:
        list(client.submit(Request("p", "print last \x1b[31mwords")))
        with pytest.raises(EngineCrashError, match="exit status 3") as caught:
            list(client.submit(Request("r", "exit 3")))
        assert caught.value.log[-1] == "last ␛[31mwords"
        assert caught.value.where == "its log ends: last ␛[31mwords"
        assert client.log() == caught.value.log
        assert len(str(caught.value).splitlines()) <= 3


def test_thread_of_the_child_that_fails() -> None:
    """Guards: a bug that ends the engine's thread, and requests that then wait for ever."""
    with load() as client:
        with pytest.raises(EngineCrashError, match="exit status 1") as caught:
            list(client.submit(Request("r", "thread")))
        assert caught.value.where == "its log ends: KeyError: 'a bug'"


def test_who_waits_for_an_answer_hears_of_the_crash() -> None:
    """Guards: `encode` waiting for ever for a child that is gone."""
    with load(hosted.HALTING) as client:
        os.kill(client.pid, signal.SIGSTOP)
        results: queue.SimpleQueue[object] = queue.SimpleQueue()

        def encode() -> None:
            try:
                results.put(client.encode("x"))
            except EngineError as error:
                results.put(error)

        waiting = threading.Thread(target=encode)
        waiting.start()
        while not client._latest()._calls:
            pass
        os.kill(client.pid, signal.SIGKILL)
        waiting.join()
        assert isinstance(results.get(), EngineCrashError)
        assert client.encode("x") == (ord("x") + 1,)


def test_observations_die_with_the_child() -> None:
    """Guards: the empty observation of a new child shown as what the old one saw."""
    with load() as client:
        assert client.observe("modules")
        with pytest.raises(EngineCrashError):
            list(client.submit(Request("r", "exit 1")))
        with pytest.raises(EngineCrashError, match="exit status 1"):
            client.observe("modules")


def test_model_that_cannot_be_loaded_again(tmp_path: Path) -> None:
    """Guards: a failed second load taken for the crash, or tried for ever."""
    path = tmp_path / "loaded"
    with EngineClient.load(ModelOptions(path, n_context=1), factory=hosted.ONCE) as client:
        with pytest.raises(EngineCrashError):
            list(client.submit(Request("r", "exit 1")))
        for _ in range(2):
            with pytest.raises(OutOfMemoryError, match="no room any more"):
                client.submit(Request("r", "x"))
        path.unlink()
        assert text(list(client.submit(Request("r", "x")))) == "x"


@pytest.mark.parametrize("how", ["cancel", "all", "kill", "stop", "close"])
def test_second_load_is_given_up(how: str, tmp_path: Path) -> None:
    """Guards: Ctrl-C or closing that waits for a load to finish."""
    stop = threading.Event()
    with EngineClient.load(ModelOptions(tmp_path / "loaded"), stop=stop, factory=hosted.ONCE) as client:
        with pytest.raises(EngineCrashError):
            list(client.submit(Request("r", "exit 1")))
        first = client.pid
        results: queue.SimpleQueue[object] = queue.SimpleQueue()

        def start() -> None:
            try:
                client.start(Request("again", "x"), results.put)
            except (EngineError, InterruptedRunError) as error:
                results.put(error)

        starting = threading.Thread(target=start)
        starting.start()
        while not client._starts:
            pass
        {
            "cancel": lambda: client.cancel("again"),
            "all": client.cancel_all,
            "kill": client.kill,
            "stop": stop.set,
            "close": client.close,
        }[how]()
        starting.join()
        error = results.get()
        assert str(error) == ("the engine is closed" if how == "close" else "loading was interrupted")
        if how != "close":
            assert client.pid == first  # the dead one: the next start tries again


def test_refusals_arrive_as_what_they_are(client: EngineClient) -> None:
    """Guards: a caller that can no longer tell a bad prompt from a broken engine."""
    with pytest.raises(PromptError, match="the context holds 100,000") as caught:
        list(client.submit(Request("r", "x" * 100_000)))
    assert caught.value.exit_code == 1
    with pytest.raises(EngineError, match="cannot be sent"):
        client.encode(b"bytes")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="internal error in the engine: WireError"):
        client.decode(["no id"])  # type: ignore[list-item]
    # The log comes by another way than the answer.
    asked_until = time.monotonic() + 60
    while "Traceback" not in "\n".join(client.log()) and time.monotonic() < asked_until:
        client.encode("x")
    assert "Traceback" in "\n".join(client.log())


def test_numbers_that_are_none_end_their_request_only(client: EngineClient) -> None:
    """Guards: a NaN that kills the engine's thread, and all other requests with it."""
    with pytest.raises(EngineError, match="cannot be sent"):
        list(client.submit(Request("n", "nan")))
    assert text(list(client.submit(Request("n", "fine")))) == "fine"


def test_same_id_twice(client: EngineClient) -> None:
    """Guards: two requests of one id, of which `cancel` finds one; an id that stays taken."""
    stream = client.submit(Request("same", "signal SIGCONT"))  # which never ends
    with pytest.raises(EngineError, match="already running"):
        client.submit(Request("same", "x"))
    del stream
    for _ in range(3):
        list(client.submit(Request("other", "x")))


def test_an_id_is_free_once_its_end_is_delivered(client: EngineClient) -> None:
    """Guards: a batch that starts the same id from its receiver being refused."""
    ends: queue.SimpleQueue[object] = queue.SimpleQueue()

    def deliver(item: TokenEvent | BaseException | None) -> None:
        if item is None:
            client.start(Request("again", "x"), lambda item: ends.put(item) if item is None else None)

    client.start(Request("again", "x"), deliver)
    assert ends.get() is None


def test_cancelling_finds_its_request() -> None:
    """Guards: a cancellation of another request, and one that comes before its request has begun."""
    with load(hosted.STEPPING) as client:
        streams = {name: client.submit(Request(name, "abc")) for name in "xyz"}
        for stream in streams.values():
            assert text([next(stream) for _ in range(3)]) == "abc"
        # Of these, each ends only once it is cancelled.
        for name in "yxz":
            client.cancel(name)
            assert [event.finish_reason for event in streams[name]] == [FinishReason.STOP]
            client.cancel(name)
        os.kill(client.pid, signal.SIGSTOP)
        early = client.submit(Request("x", "abc"))
        client.cancel("x")
        os.kill(client.pid, signal.SIGCONT)
        assert text(list(early)) == "abc"


def test_abandoned_stream_is_cancelled() -> None:
    """Guards: an abandoned reply that keeps running in the child."""
    with load(hosted.STEPPING) as client:
        stream = client.submit(Request("x", "abc"))
        next(stream)
        del stream
        ended: queue.SimpleQueue[object] = queue.SimpleQueue()
        # The same id is free again once the first has ended.
        while True:
            try:
                ticket = client.start(Request("x", "abc"), ended.put)
                break
            except EngineError as error:
                assert "already running" in str(error)  # noqa: PT017
        ticket.cancel()
        while ended.get() is not None:
            pass


def test_receiver_that_fails_loses_its_own_request_only(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: one bug in a caller that ends every stream."""
    heard: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", heard.append)

    def deliver(item: object) -> None:
        raise ValueError("mine")

    client.start(Request("bad", "abc"), deliver)
    assert text(list(client.submit(Request("good", "abc")))) == "abc"
    while not heard:
        pass  # the first event of the other one is on its way
    assert [call.exc_type for call in heard] == [ValueError]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, str(SPIN_COUNT)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_the_user_decides_how_threads_wait(
    variables: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a policy of the user that is overruled, since GOMP_SPINCOUNT goes before OMP_WAIT_POLICY."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert child_environment().get("GOMP_SPINCOUNT") == expected
