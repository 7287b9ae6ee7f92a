"""What one request does wrong, or takes its time for, is nobody else's concern."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import hosted
from support.fake_engine import FakeEngine
from support.models import tiny_model

from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.engine import cache_file
from dsmoe_local.engine import engine as engine_module
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import PromptError
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.native import Model
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.sampling import check_request
from dsmoe_local.engine.types import (
    FinishReason,
    Message,
    ModelOptions,
    ObserverOptions,
    Prompt,
    Request,
    SamplingParameters,
    TokenEvent,
)
from dsmoe_local.evaluate.reference import observer_options
from dsmoe_local.evaluate.reference_files import PredictionReader, RoutingReader

GREEDY = SamplingParameters(temperature=0)
PATIENCE = 60  # seconds, for what happens at once unless something is wrong
GRAMMAR = 'root ::= "a"+'


def options(**more: Any) -> ModelOptions:
    values = {"n_threads": 1, "n_parallel": 3, "chat_template": "deepseek-moe", **more}
    return ModelOptions(tiny_model(), **values)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(options(observers=(ObserverOptions("logprobs"),))) as loaded:
        yield loaded


def tokens(events: Any) -> list[int | None]:
    return [event.token_id for event in events]


def conversation(*token_ids: int) -> Prompt:
    return (Message("user", "Hello"), Message("assistant", "Hi", token_ids), Message("user", "Go on"))


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": conversation(5, 10_000_000)},
        {"prompt": conversation(5, -1)},
        {"prompt": conversation(640)},
        {"prompt": conversation(2**70)},
        {"prompt": (Message("user", "Hello"), Message("assistant", "Hi", (10_000_000,)))},
        {"prompt": (5, 640)},
        {"prompt": (-1,)},
        {"prompt": conversation(10_000_000), "n": 3},
        {"prompt": conversation(10_000_000), "score_from": 0},
        {"prompt": (5, 10_000_000, 6), "score_from": 0},
        {"prompt": (5,), "logit_bias": ((640, 1.0),)},
        {"prompt": (5,), "logit_bias": ((-1, 1.0),)},
    ],
    ids=str,
)
def test_ids_that_the_vocabulary_lacks_end_their_own_request(engine: Engine, bad: dict[str, Any]) -> None:
    """Guards: llama.cpp ending the process, and every request in it, for an id of another vocabulary that
    came with a message, a prompt, a bias or a text to score.
    """
    assert engine.info.n_vocab == 640
    good = Request("good", "The quick", GREEDY, max_tokens=20)
    expected = tokens(engine.submit(good))
    running = engine.submit(good)
    first = next(running)
    with pytest.raises((PromptError, UsageError), match="token"):
        list(engine.submit(Request("bad", sampling=GREEDY, max_tokens=4, **bad)))
    assert tokens([first, *running]) == expected
    engine.check()


@pytest.mark.parametrize("make", [FakeEngine, lambda: Engine.load(options())], ids=["fake", "real"])
def test_no_ids_that_the_vocabulary_lacks_are_handed_out(make: Any) -> None:
    """Guards: a caller that counts, stores or sends ids which no request can have; a fake that takes more
    than the real engine does.
    """
    engine: TextEngine = make()
    try:
        for prompt in (conversation(10_000_000), conversation(-1), (10_000_000,), (-1,)):
            with pytest.raises(PromptError, match="vocabulary"):
                engine.encode(prompt)
        assert engine.encode(conversation(5, 6))
    finally:
        engine.close()


class Gate:
    """`check_request`, which waits for a grammar until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.opened = threading.Event(), threading.Event()
        self.n_checked = 0
        monkeypatch.setattr(engine_module, "check_request", self._check)

    def _check(self, model: Model, request: Request, *more: Any) -> Any:
        if request.grammar is not None:
            self.begun.set()
            assert self.opened.wait(PATIENCE)
        self.n_checked += 1
        return check_request(model, request, *more)


def test_a_grammar_that_takes_long_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: every request that comes after a large grammar waiting until it is compiled."""
    gate = Gate(monkeypatch)
    with Engine.load(options()) as engine:
        held = engine.submit(Request("held", "x", GREEDY, grammar=GRAMMAR, max_tokens=3))
        assert gate.begun.wait(PATIENCE)
        for name in ("one", "two"):
            assert tokens(engine.submit(Request(name, "x", GREEDY, max_tokens=3)))
        assert engine.encode("x")
        gate.opened.set()
        assert "".join(event.text for event in held) == "aaa"


def test_cancelling_does_not_wait_for_the_intake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a cancelled request, or the one behind it, that waits until a grammar is compiled; an id that
    stays in use that long; the late result of the intake used for the next request with that id.
    """
    gate = Gate(monkeypatch)
    with Engine.load(options()) as engine:
        compiling = engine.submit(Request("a", "x", GREEDY, grammar=GRAMMAR, n=2, max_tokens=3))
        behind = engine.submit(Request("b", "x", GREEDY, grammar=GRAMMAR, max_tokens=3))
        assert gate.begun.wait(PATIENCE)
        for name, stream, count in (("a", compiling, 2), ("b", behind, 1)):
            engine.cancel(name)
            ends = list(stream)
            assert [event.finish_reason for event in ends] == [FinishReason.CANCELLED] * count
            engine.cancel(name)
        again = engine.submit(Request("a", "x", GREEDY, max_tokens=3))
        assert len(tokens(again)) == 4
        constrained = engine.submit(Request("b", "x", GREEDY, grammar=GRAMMAR, max_tokens=3))
        gate.opened.set()
        assert "".join(event.text for event in constrained) == "aaa"
        engine.check()
    assert gate.n_checked == 3, "what was cancelled before its intake began is not compiled"


def test_saving_leaves_the_disk_to_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the next message waiting until hundreds of megabytes are on the medium."""
    replied = threading.Event()
    syncs: list[bool] = []
    with Engine.load(options()) as engine:
        prompt = engine.encode("The quick brown fox jumps over the lazy dog")
        assert tokens(engine.submit(Request("r", prompt, GREEDY, max_tokens=1)))
        monkeypatch.setattr(cache_file, "sync", lambda _: syncs.append(replied.wait(PATIENCE)))
        results: queue.SimpleQueue[int] = queue.SimpleQueue()
        saving = threading.Thread(
            target=lambda: results.put(engine.save_cache(tmp_path / "state", prompt)), daemon=True
        )
        saving.start()
        while not (tmp_path / "state").exists():
            assert saving.is_alive()
        assert tokens(engine.submit(Request("next", "x", GREEDY, max_tokens=3)))
        replied.set()
        saving.join()
    assert syncs == [True]
    assert results.get() == len(prompt)


def test_a_state_that_cannot_be_synced_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a state called saved that the medium has not taken."""

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    with Engine.load(options()) as engine:
        prompt = engine.encode("The quick brown fox")
        assert tokens(engine.submit(Request("r", prompt, GREEDY, max_tokens=1)))
        monkeypatch.setattr(cache_file, "sync", fail)
        assert engine.save_cache(tmp_path / "state", prompt) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["first", "all"])
def test_each_observer_ends_its_file(failing: str, tmp_path: Path) -> None:
    """Guards: the second observer's hours of work lost, since the first one's file could not be ended; an
    error at the end that nobody hears of.
    """
    predictions, choices = tmp_path / "predictions", tmp_path / "choices"
    observers = (
        observer_options("reference", predictions),
        observer_options("routing_reference", choices),
        ObserverOptions("logprobs"),
    )
    engine = Engine.load(options(observers=observers))
    prompt = tuple(range(20, 60))
    assert tokens(engine.submit(Request("r", prompt, GREEDY, max_tokens=1, score_from=0)))
    for path in (predictions, choices) if failing == "all" else (predictions,):
        path.write_text("theirs")
    with pytest.raises(FileError, match="exists already"):
        engine.close()
    engine.close()
    assert engine._loaded is not None
    assert not engine._loaded.model.handle
    assert PredictionReader(predictions.with_name(".predictions.part")).n_tokens == len(prompt) - 1
    written = choices.with_name(".choices.part") if failing == "all" else choices
    assert RoutingReader(written).n_tokens == len(prompt) - 1


@pytest.mark.parametrize("fails_at", ["progress", "token", "end", "cancel", "refusal"])
def test_a_receiver_that_fails_loses_its_own_request_only(
    fails_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: one caller's bug that ends the engine's thread, and with it every request."""
    heard: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", heard.append)
    over = threading.Event()

    def deliver(item: TokenEvent | BaseException | None) -> None:
        if not isinstance(item, TokenEvent):
            over.set()
        elif fails_at == "cancel" and item.finish_reason is None:
            loaded.cancel("bad")
            return
        elif (item.progress is None and fails_at == "progress") or (
            fails_at == "end" and item.finish_reason is None
        ):
            return
        raise ValueError("mine")

    with Engine.load(options(n_ubatch=16)) as loaded:
        good = loaded.submit(Request("good", "The quick", GREEDY, max_tokens=30))
        first = next(good)
        prompt: Prompt = () if fails_at == "refusal" else tuple(range(20, 60))
        loaded.start(
            Request("bad", prompt, GREEDY, max_tokens=3, n=1 if fails_at == "cancel" else 2), deliver
        )
        assert over.wait(PATIENCE)
        assert len(tokens([first, *good])) == 31
        assert tokens(loaded.submit(Request("bad", "x", GREEDY, max_tokens=2)))
        loaded.check()
    assert {call.exc_type for call in heard} == {ValueError}


def test_a_failing_receiver_does_not_hide_the_end_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: requests that wait for ever for an engine that is gone, since another receiver failed first."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    both_are_in, ends = threading.Event(), queue.SimpleQueue[object]()

    def deliver_badly(item: object) -> None:
        raise ValueError("mine")

    def break_down() -> None:
        raise KeyError("a bug")

    with Engine.load(options()) as engine:
        core = engine._core
        assert core is not None
        engine._inbox.put(lambda: None if both_are_in.wait(PATIENCE) else break_down())
        engine.start(Request("bad", "x", GREEDY), deliver_badly)
        engine.start(Request("good", "x", GREEDY), ends.put)
        monkeypatch.setattr(core.scheduler, "plan", break_down)
        both_are_in.set()
        assert isinstance(ends.get(timeout=PATIENCE), KeyError)
        engine._thread.join()


def test_waiting_calls_hold_up_neither_requests_nor_cancellations() -> None:
    """Guards: messages, and the end of a reply, that wait in the engine's process behind what somebody asked
    of an observer, or a state that is written.
    """
    with EngineClient.load(ModelOptions(Path("fake.gguf")), factory=hosted.WAITING) as client:
        answers: queue.SimpleQueue[object] = queue.SimpleQueue()
        for _ in range(3):
            threading.Thread(target=lambda: answers.put(client.observe("cancelled")), daemon=True).start()
        while len(client._latest()._calls) < 3:
            pass
        stream = client.submit(Request("r", "abcdef"))
        assert "".join(next(stream).text for _ in range(3)) == "abc"
        assert client.encode("x") == (ord("x") + 1,)
        client.cancel("r")
        assert [event.finish_reason for event in stream][-1] is FinishReason.CANCELLED
        assert [answers.get(timeout=PATIENCE) for _ in range(3)] == [{"cancelled": True}] * 3
