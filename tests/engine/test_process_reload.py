"""The process replaced and killed on request, on fakes: whoever waits is told, and what follows works."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import hosted

from dsmoe_local.base import progress
from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.engine.errors import EngineCrashError, EngineError, EngineKilledError, OutOfMemoryError
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions, ObserverOptions, Request, TokenEvent

OPTIONS = ModelOptions(Path("fake.gguf"), n_context=77)


def load(options: ModelOptions = OPTIONS, factory: str = hosted.CHOOSY) -> EngineClient:
    return EngineClient.load(options, factory=factory)


def text(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def answer(client: EngineClient, prompt: str = "abc") -> str:
    return text(list(client.submit(Request("r", prompt, max_tokens=3))))


def in_thread(function: Callable[[], object]) -> Callable[[], object]:
    """Start it; the returned function waits for what it returned or raised."""
    result: list[object] = []

    def run() -> None:
        try:
            result.append(function())
        except Exception as error:  # noqa: BLE001 - looked at by the test
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def wait() -> object:
        thread.join(60)
        return result[0]

    return wait


def dead_and_loading_for_ever(client: EngineClient) -> threading.Event:
    """Kill it; the next load has no end. Set once there is one."""
    # The same process, as it will be loaded next time.
    client._latest().options = replace(OPTIONS, n_context=3)
    client.kill()
    started = threading.Event()
    starting = client._start_child

    def tell(options: ModelOptions, listen: progress.Listener, *more: Any) -> Any:
        return starting(options, lambda _: started.set(), *more)

    client._start_child = tell  # type: ignore[method-assign, assignment]
    return started


def test_another_model_takes_the_place() -> None:
    """Guards: two models at once; options that are forgotten after a crash; progress that nobody hears."""
    with load() as client:
        first = client.pid
        heard: list[progress.Event] = []
        wanted = replace(OPTIONS, n_context=55, n_experts_per_token=2)
        client.reload(wanted, heard.append)
        assert progress.Note("context of 55") in heard
        assert client.options == wanted
        assert client.pid != first
        assert client.observe("loaded")["n_context"] == 55
        with pytest.raises(EngineCrashError):
            answer(client, "signal SIGKILL")
        assert answer(client) == "abc"
        assert client.observe("loaded")["n_context"] == 55
        assert client.crashes == 1


@pytest.mark.parametrize(("n_context", "kind"), [(1, OutOfMemoryError), (2, EngineCrashError)])
def test_a_load_that_fails_leaves_the_old_options(n_context: int, kind: type[Exception]) -> None:
    """Guards: a chat that is of no use after a context that does not fit; a load counted as a crash."""
    with load() as client:
        with pytest.raises(kind):
            client.reload(replace(OPTIONS, n_context=n_context))
        assert client.options == OPTIONS
        assert client.info.name == "fake"
        assert answer(client) == "abc"
        assert client.observe("loaded")["n_context"] == 77
        assert client.crashes == 0


def test_a_reload_can_be_given_up() -> None:
    """Guards: a load that a person regrets, and has to wait for; requests that it keeps waiting."""
    with load() as client:
        stop = threading.Event()
        with pytest.raises(InterruptedRunError):
            client.reload(replace(OPTIONS, n_context=3), lambda _: stop.set(), stop)
        assert answer(client) == "abc"
        with pytest.raises(InterruptedRunError):
            client.reload(replace(OPTIONS, n_context=3), lambda _: client.kill())
        assert answer(client) == "abc"
        assert client.crashes == 0


def test_running_requests_end_with_their_model() -> None:
    """Guards: a reply that waits for ever for a process that was replaced."""
    with load(replace(OPTIONS, n_context=4)) as client:
        stream = client.submit(Request("r", "abcdef"))
        assert text([next(stream) for _ in range(3)]) == "abc"
        client.reload(OPTIONS)
        with pytest.raises(EngineError, match="closed"):
            next(stream)
        assert answer(client) == "abc"


def test_killed_while_a_thread_waits_for_a_reply() -> None:
    """Guards: a chat that hangs with its engine; a next message that finds the process not yet gone."""
    with load(replace(OPTIONS, n_context=4)) as client:
        for number in (1, 2, 3):
            stream = client.submit(Request("r", "abcdef"))
            assert text([next(stream) for _ in range(3)]) == "abc"
            wait = in_thread(lambda stream=stream: next(stream))  # type: ignore[misc]
            client.kill()
            error = wait()
            assert isinstance(error, EngineKilledError)
            assert len(str(error).splitlines()) <= 3
            assert client.encode("ab") == (98, 99)
            assert client.crashes == number


def test_killed_in_the_middle_of_a_call() -> None:
    """Guards: a person who ends a load of a state that takes too long, and finds the chat going on."""
    with load() as client:
        client.kill()
        with pytest.raises(EngineCrashError):
            client.observe("loaded")
        client.kill()
        assert answer(client) == "abc"
        client.kill()
    client.kill()
    with pytest.raises(EngineError, match="closed"):
        client.submit(Request("r", "x"))


def test_a_load_after_a_crash_can_be_killed() -> None:
    """Guards: a process that hangs while it loads, and that nothing ends."""
    with load(replace(OPTIONS, n_context=4)) as client:
        started = dead_and_loading_for_ever(client)
        wait = in_thread(lambda: client.encode("ab"))
        assert started.wait(60)
        client.kill()
        assert isinstance(wait(), InterruptedRunError)
        client._latest().options = OPTIONS
        assert client.encode("ab") == (98, 99)


def test_cache_files_through_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: paths that mean something else there; a file that kills the process, and the chat with it."""
    monkeypatch.chdir(tmp_path)
    with load() as client:
        assert answer(client) == "abc"
        monkeypatch.chdir(tmp_path.parent)
        inside = Path(tmp_path.name) / "state"
        held = client.encode("abcabc")
        assert client.save_cache(inside, held) == 6
        assert (tmp_path / "state").exists()
        assert client.load_cache(inside, held) == 6
        (tmp_path / "bad").write_text("die")
        assert client.load_cache(tmp_path / "bad", held) == 0
        assert client.save_cache(tmp_path / "after", held) == 0
        assert answer(client) == "abc"
        assert client.crashes == 1
        assert client.decode(held) == tuple("abcabc")


def test_observers_are_those_of_the_next_process_too() -> None:
    """Guards: observers that are gone after a crash; ones that were refused and come back."""
    with load() as client:
        client.set_observers((ObserverOptions("routing", (("trace", 4),)),))
        assert client.options.observers == (ObserverOptions("routing", (("trace", 4),)),)
        client.kill()
        assert answer(client) == "abc"
        assert client.observe("loaded")["observers"] == ["routing"]
        client.set_observers(())
        assert client.observe("loaded")["observers"] == []
