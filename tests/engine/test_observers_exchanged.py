"""Replacing the observers of a loaded model keeps the conversation; after an error the old ones stay."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from support.endless import ENDLESS
from support.models import smollm2, tiny_model

from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.engine import idle_operations, native
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import EngineCrashError, EngineError, ModelLoadError, NativeError
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.observe.observer import Observer
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import NO_TEMPLATE, ModelOptions, ObserverOptions, Request, SamplingParameters
from dsmoe_local.evaluate.reference import observer_options

GREEDY = SamplingParameters(temperature=0)
ROUTING = ObserverOptions("routing")
SCORES = ObserverOptions("logprobs")
IDS = tuple(range(20, 120))


def options(**more: Any) -> ModelOptions:
    return ModelOptions(tiny_model(), n_threads=1, chat_template=NO_TEMPLATE, **more)


def reply(engine: TextEngine, prompt: tuple[int, ...] = IDS, count: int = 10, **more: Any) -> list[Any]:
    """Return the ids and log-probabilities of a reply, and the number of cached prompt tokens."""
    events = list(engine.submit(Request("r", prompt, GREEDY, max_tokens=count, logprobs=True, **more)))
    usage = events[-1].usage
    assert usage is not None
    return [*((event.token_id, event.logprob) for event in events), usage.cached_tokens]


def session(engine: Engine) -> Any:
    return engine._require_loaded()


def tokens_seen(engine: TextEngine) -> list[int]:
    return [layer["tokens"] for layer in engine.observe("routing")["layers"]]


def test_switched_on_and_off_in_a_conversation() -> None:
    """Guards: a conversation read again, or that goes on otherwise; a callback that stays when nobody looks;
    counts that are kept.
    """
    with Engine.load(options()) as engine:
        reply(engine, count=1)
        expected = reply(engine)
        assert expected[-1] == len(IDS) - 1
        engine.set_observers((ROUTING,))
        engine.check()
        assert reply(engine) == expected
        seen = tokens_seen(engine)
        assert max(seen) == 10
        engine.set_observers((ROUTING,))
        assert max(tokens_seen(engine)) == 0
        engine.set_observers(())
        assert session(engine).context.options.eval_callback is None
        engine.check()
        assert reply(engine) == expected
        with pytest.raises(EngineError, match="no observer"):
            engine.observe("routing")


def test_several_sequences_and_what_was_parked() -> None:
    """Guards: cells without an owner, which nothing would ever free; sequences that are mixed up."""
    with Engine.load(options(n_parallel=2, n_context=300)) as engine:
        alike = [(*IDS[:60], *range(200 + 20 * number, 220 + 20 * number)) for number in range(3)]
        others = [tuple(range(start, start + 50)) for start in (300, 400)]
        for prompt in (*alike, *others):
            reply(engine, prompt, 2)
        core = engine._core
        assert core is not None
        assert any(held >= 2 for held in core.scheduler.cells.sequences), "nothing is parked"
        engine.set_observers((ROUTING,))
        engine.check()
        assert all(held < 2 for held in core.scheduler.cells.sequences)
        assert [reply(engine, prompt, 2)[-1] for prompt in others] == [49, 49]
        # All cells can still be had.
        assert reply(engine, tuple(range(20, 240)), 30)
        engine.check()


def test_prompts_are_scored_once_somebody_asks() -> None:
    """Guards: more rows of logits than the context has room for."""
    with Engine.load(options()) as engine:
        with pytest.raises(UsageError, match="score_from"):
            reply(engine, count=1, score_from=0)
        engine.set_observers((SCORES, ROUTING))
        reply(engine, count=1, score_from=0)
        assert engine.observe("logprobs")["tokens"] == len(IDS) - 1
        assert min(tokens_seen(engine)) == len(IDS)
        engine.set_observers(())
        with pytest.raises(UsageError, match="score_from"):
            reply(engine, count=1, score_from=0)


def test_deterministic_requests_too() -> None:
    """Guards: stale bookkeeping of the old cache."""
    with Engine.load(options(n_parallel=2, deterministic=True)) as engine:
        expected = reply(engine)[:-1]
        engine.set_observers((ROUTING,))
        engine.check()
        assert reply(engine)[:-1] == expected


def test_what_cannot_be_leaves_all_as_it_was(tmp_path: Path) -> None:
    """Guards: observers that are replaced in part; counts lost because of a misspelt name."""
    with Engine.load(options(observers=(ROUTING,))) as engine:
        reply(engine, count=1)
        expected = reply(engine)
        seen = tokens_seen(engine)
        (tmp_path / "there").write_text("mine")
        taken = observer_options("reference", tmp_path / "there")
        for wrong, kind in (((ObserverOptions("nothing"),), UsageError), ((SCORES, taken), FileError)):
            with pytest.raises(kind):
                engine.set_observers(wrong)
        assert tokens_seen(engine) == seen
        assert reply(engine) == expected
        stream = engine.submit(Request("running", IDS, GREEDY, **ENDLESS))
        next(stream)
        with pytest.raises(EngineError, match="while requests are running"):
            engine.set_observers(())
        engine.cancel("running")
        list(stream)
        engine.set_observers(())
    with Engine.load(ModelOptions(smollm2(), n_context=64, n_threads=1)) as dense:
        with pytest.raises(UsageError):
            dense.set_observers((ROUTING,))
        assert reply(dense, IDS[:10], 2)


def test_files_of_the_old_observers_are_ended(tmp_path: Path) -> None:
    """Guards: a reference that lacks its last records, since nobody closed it."""
    path = tmp_path / "reference"
    reference = observer_options("reference", path)
    with Engine.load(options(observers=(reference,))) as engine:
        reply(engine, count=1, score_from=0)
        engine.set_observers(())
        assert path.exists()


class _OwnObserver(Observer):
    """An observer of the engine itself, like the one that pages experts."""

    reads_graph = True

    def __init__(self) -> None:
        super().__init__()
        self.steps = self.closings = 0

    def before_step(self, rows: object) -> None:
        self.steps += 1

    def close(self) -> None:
        self.closings += 1


def test_the_engines_own_observers_stay() -> None:
    """Guards: experts that are not prefetched any more after the routing was observed."""
    own = _OwnObserver()
    with Engine.load(options()) as engine:
        session(engine).observers._add_own((own,))
        engine.set_observers((ROUTING,))
        engine.set_observers(())
        assert session(engine).context.options.eval_callback is not None
        reply(engine, count=3)
        assert own.steps == 3
        with pytest.raises(UsageError):
            engine.set_observers((ObserverOptions("nothing"),))
        assert own.closings == 0
    assert own.closings == 1


def test_a_successor_that_cannot_be_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a reference that is begun and locked for good, although nobody writes it; the engine's own
    observers closed with it, while the old ones go on.
    """
    own = _OwnObserver()
    reference = observer_options("reference", tmp_path / "reference")

    def refuse() -> None:
        raise NativeError("another layout")

    with Engine.load(options(observers=(SCORES,))) as engine:
        session(engine).observers._add_own((own,))
        # The reference reads no graph: it is open by the time that the engine's own observer is taken in.
        with monkeypatch.context() as patched:
            patched.setattr("dsmoe_local.engine.native.tensors.check_layout", refuse)
            with pytest.raises(NativeError, match="another layout") as caught:
                engine.set_observers((reference,))
        assert not list(tmp_path.glob("*.part"))
        assert own.closings == 0
        reply(engine, count=3, score_from=0)
        assert own.steps > 0
        assert engine.observe("logprobs")["tokens"] == len(IDS) - 1
        engine.set_observers((reference,))
        del caught  # until here, with all that a traceback holds
    assert own.closings == 1


def test_no_room_to_carry_the_cache_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an error, or a cache that is reported but empty, if the folder cannot be written."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(idle_operations, "cache_folder", lambda: tmp_path / "file" / "below")
    with Engine.load(options()) as engine:
        expected = reply(engine)
        engine.set_observers((ROUTING,))
        engine.check()
        assert reply(engine) == expected
        assert expected[-1] == 0


def test_no_memory_for_the_new_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a model without a context, and a conversation that is gone for it."""
    make = native.Context

    def refuse_observed(model: native.Model, wanted: native.ContextOptions) -> native.Context:
        if wanted.eval_callback is not None:
            raise ModelLoadError("no memory")
        return make(model, wanted)

    with Engine.load(options()) as engine:
        reply(engine, count=1)
        expected = reply(engine)
        monkeypatch.setattr(native, "Context", refuse_observed)
        with pytest.raises(ModelLoadError):
            engine.set_observers((ROUTING,))
        engine.check()
        assert reply(engine) == expected
        with pytest.raises(EngineError, match="no observer"):
            engine.observe("routing")


def test_no_memory_at_all_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a null context handed to llama.cpp; callers that wait for ever."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def refuse(*_: object) -> native.Context:
        raise ModelLoadError("no memory")

    with Engine.load(options()) as engine:
        reply(engine, count=1)
        monkeypatch.setattr(native, "Context", refuse)
        with pytest.raises(ModelLoadError):
            engine.set_observers((ROUTING,))
        engine._thread.join()
        with pytest.raises(EngineError, match="closed"):
            engine.submit(Request("r", IDS))


def test_a_process_that_died_comes_back_with_the_observers() -> None:
    """Guards: routing that is not observed any more after a crash."""
    with EngineClient.load(options()) as client:
        expected = reply(client)[:-1]
        client.set_observers((ROUTING,))
        assert client.options == options(observers=(ROUTING,))
        with pytest.raises(UsageError, match="no observer"):
            client.set_observers((ObserverOptions("nothing"),))
        assert client.options == options(observers=(ROUTING,))
        client.kill()
        with pytest.raises(EngineCrashError):
            client.observe("routing")
        assert reply(client)[:-1] == expected
        assert max(tokens_seen(client)) == len(IDS) + 9
        assert client.crashes == 1
