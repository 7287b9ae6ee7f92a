"""The process replaced and killed on request, on fakes: whoever waits is told, and what follows works."""

from __future__ import annotations

import os
import signal
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
from dsmoe_local.engine.process.child import Child
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import FinishReason, ModelOptions, ObserverOptions, Request, TokenEvent

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
    """Guards: two models at once; options that are lost after a crash; progress that is not reported."""
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
    """Guards: a load that cannot be cancelled, and blocks requests."""
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
    """Guards: a kill during a slow load of a cache that is treated like a crash."""
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


CALLS: dict[str, Callable[[EngineClient], object]] = {
    "submit": lambda client: client.submit(Request("r", "abc")),
    "encode": lambda client: client.encode("ab"),
    "decode": lambda client: client.decode((98,)),
    "load_cache": lambda client: client.load_cache(Path("no such file"), (1,)),
    "set_observers": lambda client: client.set_observers(()),
    "reload": lambda client: client.reload(replace(OPTIONS, n_context=3), stop=threading.Event()),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("end", [EngineClient.kill, EngineClient.cancel_all])
def test_every_load_can_be_given_up(name: str, end: Callable[[EngineClient], None]) -> None:
    """Guards: Ctrl-C that waits minutes for a model, because a call loads it that has no name."""
    with load() as client:
        started = dead_and_loading_for_ever(client)
        wait = in_thread(lambda: CALLS[name](client))
        assert started.wait(60)
        end(client)
        assert isinstance(wait(), InterruptedRunError)
        client._latest().options = OPTIONS
        assert answer(client) == "abc"


def test_what_needs_no_process_loads_none(tmp_path: Path) -> None:
    """Guards: minutes of loading for what died with the process anyway."""
    with load() as client:
        dead_and_loading_for_ever(client)
        assert client.save_cache(tmp_path / "state", (1,)) == 0
        with pytest.raises(EngineKilledError):
            client.observe("loaded")
        assert not client.alive


def test_who_waits_for_anothers_load_can_leave_alone() -> None:
    """Guards: a request that cannot be cancelled, since another one loads the model."""
    with load() as client:
        started = dead_and_loading_for_ever(client)
        first = in_thread(lambda: client.submit(Request("first", "abc")))
        assert started.wait(60)
        second = in_thread(lambda: client.submit(Request("second", "abc")))
        while "second" not in client._starts:
            pass
        client.cancel("second")
        assert isinstance(second(), InterruptedRunError)
        assert "first" in client._starts
        client.cancel("first")
        assert isinstance(first(), InterruptedRunError)


@pytest.mark.parametrize("end", [EngineClient.kill, EngineClient.cancel_all])
@pytest.mark.parametrize("how", ["reload", "encode"])
def test_an_end_that_comes_before_the_load(
    how: str, end: Callable[[EngineClient], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a second Ctrl-C that is lost while the old process is being closed."""
    with load() as client:
        pid = client.pid
        if how == "encode":
            client.kill()
        for name in ("close", "kill"):
            ending = getattr(Child, name)

            def interrupted(child: Child, ending: Callable[[Child], None] = ending) -> None:
                ending(child)
                end(client)

            monkeypatch.setattr(Child, name, interrupted)
        with pytest.raises(InterruptedRunError):
            CALLS[how](client)
        monkeypatch.undo()
        assert (client.pid, client.options) == (pid, OPTIONS), "no other process was started"
        assert answer(client) == "abc"
        assert client.observe("loaded")["n_context"] == 77


def test_a_reload_that_was_given_up_before_its_turn() -> None:
    """Guards: a healthy process closed for a load that has been cancelled."""
    with load() as client:
        with client._starting:
            wait = in_thread(lambda: client.reload(OPTIONS))
            while not client._calls:
                pass
            client.cancel_all()
        assert isinstance(wait(), InterruptedRunError)
        assert client.alive


def test_an_end_is_of_what_was_asked_before() -> None:
    """Guards: a kill that also ends what comes after it."""
    with load() as client:
        client.kill()
        client.cancel_all()
        assert client.encode("ab") == (98, 99)
        client.reload(replace(OPTIONS, n_context=55))
        assert client.observe("loaded")["n_context"] == 55


def test_everything_that_runs_is_cancelled() -> None:
    """Guards: a reply that cannot be cancelled while it is being started."""
    with load(factory=hosted.STEPPING) as client:
        streams = [client.submit(Request(name, "abc")) for name in "xyz"]
        for stream in streams:
            assert text([next(stream) for _ in range(3)]) == "abc"
        # Of these, each ends only once it is cancelled.
        client.cancel_all()
        for stream in streams:
            assert [event.finish_reason for event in stream] == [FinishReason.STOP]
        assert client.alive


def test_whether_the_process_is_there() -> None:
    """Guards: a chat that does not say that the model is loaded again, or says so where it is not."""
    with load() as client:
        assert client.alive
        with pytest.raises(EngineCrashError):
            answer(client, "signal SIGKILL")
        assert not client.alive
        assert answer(client) == "abc"
        assert client.alive
        client.kill()
        assert not client.alive, "at once, though the process may not be gone yet"
        assert client.encode("ab") == (98, 99)
        assert client.alive
        seen: list[bool] = []
        client.reload(OPTIONS, lambda _: seen.append(client.alive))
        assert set(seen) == {False}
        assert client.alive
        with pytest.raises(OutOfMemoryError):
            client.reload(replace(OPTIONS, n_context=1))
        assert not client.alive
    assert not client.alive


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


@pytest.mark.parametrize("how", ["close", "kill", "crash"])
def test_a_save_whose_process_ends(how: str, tmp_path: Path) -> None:
    """Guards: half a file that is left behind, or a chat that waits for it for ever."""
    path = tmp_path / "half"
    with load() as client:
        wait = in_thread(lambda: client.save_cache(path, (1, 2)))
        while not path.exists():
            pass
        pid = client.pid
        ends: dict[str, Callable[[], object]] = {
            "close": client.close,
            "kill": client.kill,
            "crash": lambda: os.kill(pid, signal.SIGKILL),
        }
        ends[how]()
        result = wait()
        assert not path.exists()
        if how == "close":
            assert isinstance(result, EngineError)
            assert "closed" in str(result)
        else:
            assert result == 0
            assert answer(client) == "abc"


def test_a_file_that_was_there_is_nobodys_to_remove(tmp_path: Path) -> None:
    """Guards: a file of the user's that goes with a process that had not even looked at it."""
    path = tmp_path / "half"
    path.write_bytes(b"mine")
    with load() as client:
        assert client.save_cache(path, (1, 2)) == 0
        assert path.read_bytes() == b"mine"
    with pytest.raises(EngineError, match="closed"):
        client.save_cache(path, (1, 2))


def test_observers_belong_to_the_model_they_were_set_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: options that tell of observers which a model loaded meanwhile has not."""
    routing = (ObserverOptions("routing"),)
    wanted = replace(OPTIONS, n_context=55)
    with load() as client:
        exchanging: Callable[..., Any] = Child.call

        def overtaken(child: Child, *call: Any) -> None:
            exchanging(child, *call)
            monkeypatch.undo()
            client.reload(wanted)

        monkeypatch.setattr(Child, "call", overtaken)
        client.set_observers(routing)
        assert client.options == wanted
        assert client.observe("loaded")["observers"] == []


def test_refused_observers_do_not_come_back() -> None:
    """Guards: observers in the options that no process has had."""
    with load(replace(OPTIONS, n_context=4)) as client:
        stream = client.submit(Request("r", "abcdef"))
        next(stream)
        with pytest.raises(EngineError, match="while requests are running"):
            client.set_observers((ObserverOptions("routing"),))
        assert client.options.observers == ()


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
