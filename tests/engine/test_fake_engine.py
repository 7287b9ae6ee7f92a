"""The fake engine keeps to the real one's interface, so that tests on it mean something."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_engine import FakeEngine

from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import EngineError, EngineKilledError, PromptError
from dsmoe_local.engine.interface import ReloadableEngine, TextEngine
from dsmoe_local.engine.types import FinishReason, Message, ModelOptions, ObserverOptions, Request


def test_both_engines_have_the_interface() -> None:
    """Guards: the fake drifting from the real engine."""
    accepted: list[TextEngine] = [FakeEngine()]
    reloadable: list[ReloadableEngine] = [FakeEngine()]
    for kind, protocol in ((Engine, TextEngine), (FakeEngine, TextEngine), (FakeEngine, ReloadableEngine)):
        for name, member in vars(protocol).items():
            if not name.startswith("_") and not isinstance(member, property) and name != "start":
                assert inspect.signature(getattr(kind, name)) == inspect.signature(member), name
    assert len(accepted) == len(reloadable)


def test_streams_like_the_real_one() -> None:
    """Guards: events that no real engine would send."""
    engine = FakeEngine(replies=["é!"])
    *tokens, last = engine.submit(Request("r", (Message("user", "q"),), max_tokens=9))
    assert [event.text for event in tokens] == ["", "é", "!"]
    assert last.finish_reason is FinishReason.STOP
    assert last.usage is not None
    assert (last.usage.completion_tokens, last.token_id) == (3, 0)
    with pytest.raises(PromptError):
        list(FakeEngine(template=False).submit(Request("r", (Message("user", "q"),))))
    engine.close()
    with pytest.raises(EngineError):
        engine.submit(Request("r", "q"))


def test_cache_files_of_the_fake(tmp_path: Path) -> None:
    """Guards: tests of what keeps conversations passing without a file, or with that of another one."""
    first, second = FakeEngine(replies=["yes"]), FakeEngine()
    list(first.submit(Request("r", "one two")))
    told = first.encode("one twoyes and")
    assert first.save_cache(tmp_path / "state", told) == len("one twoyes")
    assert second.load_cache(tmp_path / "state", told) == len("one twoyes")
    usage = list(second.submit(Request("r", told)))[-1].usage
    assert usage is not None
    assert usage.cached_tokens == len("one twoyes")
    assert second.load_cache(tmp_path / "state", first.encode("another")) == 0
    second.reload(replace(second.options, n_experts_per_token=2))
    assert second.load_cache(tmp_path / "state", told) == 0
    (tmp_path / "state").write_bytes(b"{")
    assert second.load_cache(tmp_path / "state", told) == 0
    assert second.save_cache(tmp_path / "none", first.encode("zero")) == 0


def test_a_full_context_of_the_fake_shifts() -> None:
    """Guards: a fake that drops other tokens than the real engine does."""
    engine = FakeEngine(replies=["x" * 30], n_context=16)
    events = list(engine.submit(Request("r", "abcdefgh", context_shift=True, n_keep=4)))
    books = list(engine.encode("abcdefgh"))
    for event in events:
        del books[event.dropped_from : event.dropped_from + event.dropped]
        if event.token_id:
            books.append(event.token_id)
        assert len(books) <= 17
    assert {(event.dropped, event.dropped_from) for event in events} == {(0, 0), (6, 4)}
    assert engine.decode(books) == ("a", "b", "c", "d", *"x" * (len(books) - 4))


def test_whether_the_fake_is_there() -> None:
    """Guards: a chat that waits for a model which is loaded, or does not say that it loads one."""
    engine = FakeEngine()
    assert engine.alive
    engine.kill()
    assert not engine.alive
    assert (engine.save_cache(Path("state"), (1,)), engine.alive) == (0, False)
    asked: list[Callable[[], object]] = [
        lambda: list(engine.submit(Request("r", "q"))),
        lambda: engine.encode("q"),
        lambda: engine.decode((1,)),
        lambda: engine.load_cache(Path("state"), (1,)),
        lambda: engine.set_observers(()),
    ]
    for ask in asked:
        ask()
        assert engine.alive
        engine.kill()
    assert engine.crashes == len(asked)
    engine.reload(engine.options)
    assert engine.alive
    engine.close()
    assert not engine.alive


def test_all_requests_of_the_fake_end_at_once() -> None:
    """Guards: tests of a chat that cancels everything, on an engine that goes on."""
    engine = FakeEngine(n_parallel=2)
    streams = [engine.submit(Request(name, "abc")) for name in "ab"]
    for stream in streams:
        next(stream)
    engine.cancel_all()
    assert [[event.finish_reason for event in stream] for stream in streams] == [[FinishReason.CANCELLED]] * 2


def test_half_characters_are_read_as_the_real_one_does() -> None:
    """Guards: a pasted half of a pair that ends a chat in tests, or one that no test shows to be harmless."""
    engine = FakeEngine()
    assert engine.encode("a\ud83db") == engine.encode("a\N{REPLACEMENT CHARACTER}b")
    assert engine.encode("\ud83d\ude00") == engine.encode("\N{GRINNING FACE}")
    assert engine.encode((Message("user", "\udc00"),)) == engine.encode((Message("user", "\ufffd"),))
    assert list(engine.submit(Request("r", "\ud83d")))[-1].finish_reason is FinishReason.STOP


def test_what_ends_the_fake() -> None:
    """Guards: tests of a chat that survives crashes, on an engine that has none."""
    engine = FakeEngine(observations={"routing": {"layers": []}})
    stream = engine.submit(Request("r", "abc"))
    next(stream)
    engine.kill()
    with pytest.raises(EngineKilledError):
        next(stream)
    assert engine.observe("routing") == {"layers": []}
    engine.set_observers(())
    with pytest.raises(EngineError):
        engine.observe("routing")
    engine.set_observers((ObserverOptions("routing"),))
    assert engine.observe("routing") == {"layers": []}
    engine.failures.append(EngineError("no room"))
    smaller = ModelOptions(Path("other.gguf"), n_context=99, n_experts_per_token=2)
    with pytest.raises(EngineError, match="no room"):
        engine.reload(smaller)
    assert engine.options.n_context == 4096
    engine.reload(smaller)
    assert (engine.info.n_context, engine.info.n_experts_per_token) == (99, 2)
    assert (engine.kills, engine.crashes, engine.reloads) == (1, 1, [smaller, smaller])
