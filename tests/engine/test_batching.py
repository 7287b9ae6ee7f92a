"""Many requests in one step on real files: each reply is what it is alone, and no request harms another."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Several
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import llama_oracle
from support.models import family_model, smollm2, tiny_model
from support.tiny_gguf import MOE, write_tiny

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import EngineError, NativeError, PromptError
from dsmoe_local.engine.interface import Deliver
from dsmoe_local.engine.schedule import scheduler
from dsmoe_local.engine.schedule.plan import Sequence
from dsmoe_local.engine.types import FinishReason, ModelOptions, Request, SamplingParameters, TokenEvent
from dsmoe_quantize.policy.choice import Overrides
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

GREEDY = SamplingParameters(temperature=0)
SHARED = "The quick brown fox jumps over the lazy dog. " * 3
PROMPTS = ["dog", "The quick brown fox", "人工智能", SHARED + "a", SHARED + "bc", "x" * 150]


MODELS: Mapping[str, Callable[[], Path]] = {"MHA": tiny_model, "MLA": partial(family_model, "deepseek2")}


@pytest.fixture(params=MODELS)
def path(request: pytest.FixtureRequest) -> Path:
    """A model of each kind of attention, whose KV caches differ."""
    return MODELS[request.param]()


@pytest.fixture(scope="module", params=MODELS)
def unified(request: pytest.FixtureRequest) -> Iterator[Engine]:
    path = MODELS[request.param]()
    with Engine.load(ModelOptions(path, n_parallel=4, n_threads=2)) as engine:
        yield engine
        engine.check()


def requests(prompts: Several[str], count: int = 20, **more: Any) -> list[Request]:
    values: dict[str, Any] = {"sampling": GREEDY, "max_tokens": count, "logprobs": True, **more}
    return [Request(str(number), prompt, **values) for number, prompt in enumerate(prompts)]


def run(engine: Engine, wanted: Several[Request]) -> dict[str, list[TokenEvent] | BaseException]:
    """The events of each request, all of them in flight at once; an error instead."""
    arrived: queue.SimpleQueue[tuple[str, TokenEvent | BaseException | None]] = queue.SimpleQueue()

    def deliver(request_id: str) -> Deliver:
        return lambda event: arrived.put((request_id, event))

    for request in wanted:
        engine.start(request, deliver(request.id))
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in wanted}
    ended: dict[str, list[TokenEvent] | BaseException] = {}
    while len(ended) < len(wanted):
        request_id, event = arrived.get(timeout=120)
        if isinstance(event, TokenEvent):
            events[request_id].append(event)
        else:
            ended[request_id] = events[request_id] if event is None else event
    return ended


def tokens(events: list[TokenEvent] | BaseException, index: int = 0) -> list[tuple[int, float | None]]:
    """Ids and log-probabilities of one reply."""
    assert isinstance(events, list), events
    return [
        (event.token_id, event.logprob)
        for event in events
        if event.token_id is not None and event.index == index
    ]


def ids(events: list[TokenEvent] | BaseException, index: int = 0) -> list[int]:
    return [token_id for token_id, _ in tokens(events, index)]


@pytest.mark.parametrize("n_parallel", [2, 3, 4, 8])
def test_deterministic_replies_do_not_depend_on_what_else_runs(n_parallel: int, path: Path) -> None:
    """Guards: a kernel, a width or a slot that changes the last bits of a reply. Equality is to the bit."""
    options = ModelOptions(path, n_parallel=n_parallel, deterministic=True, n_ubatch=32, n_threads=2)
    wanted = requests(PROMPTS)
    with Engine.load(options) as engine:
        alone = [tokens(run(engine, [request])[request.id]) for request in wanted]
        together = run(engine, wanted)
        reverse = run(engine, wanted[::-1])
        engine.check()
    for request, expected in zip(wanted, alone, strict=True):
        assert tokens(together[request.id]) == expected
        assert tokens(reverse[request.id]) == expected


@pytest.mark.parametrize("n_parallel", [4, 8])
def test_deterministic_with_quantized_experts(n_parallel: int, tmp_path: Path) -> None:
    """Guards: experts that are computed in another way for some numbers of rows. Equality is to the bit."""
    hp = replace(MOE, n_layers=2, n_heads=8, n_kv_heads=8, hidden_size=512, ffn_size=256)
    hp = replace(hp, expert_size=256, shared_expert_size=256)
    source, model = write_tiny(tmp_path / "source.gguf", hp), tmp_path / "model.gguf"
    quantize_file(plan_quantization(source, resolve("q4_k_s"), Overrides(pure=True)), model)
    wanted = requests([f"{number} {SHARED[number : number + 9]}" for number in range(12)], 8)
    options = ModelOptions(
        model, n_context=128 * n_parallel, n_parallel=n_parallel, deterministic=True, n_ubatch=32
    )
    with Engine.load(options) as engine:
        alone = [tokens(run(engine, [request])[request.id]) for request in wanted]
        together = run(engine, wanted)
    assert [tokens(together[request.id]) for request in wanted] == alone


def test_deterministic_on_trained_weights_beyond_a_flash_attention_block() -> None:
    """Guards: attention over more than 512 cells, which is computed in another way at width 1."""
    options = ModelOptions(
        smollm2(), n_context=2048, n_parallel=2, deterministic=True, n_ubatch=256, n_threads=2
    )
    wanted = requests([SHARED * 18 + "The", "The capital of France is"], 10)
    with Engine.load(options) as engine:
        alone = [tokens(run(engine, [request])[request.id]) for request in wanted]
        together = run(engine, wanted)
    assert [tokens(together[request.id]) for request in wanted] == alone


@pytest.mark.any_device
@pytest.mark.parametrize("shared_cells", [True, False])
def test_first_tokens_agree_with_the_bare_loop(shared_cells: bool, path: Path) -> None:
    """Guards: rows, positions or logits of one request given to another."""
    options = ModelOptions(path, n_parallel=4, unified=shared_cells, n_threads=2)
    with Engine.load(options) as engine:
        replies = run(engine, requests(PROMPTS, 8))
        for number, prompt in enumerate(PROMPTS):
            found, encoded = tokens(replies[str(number)]), engine.encode(prompt)
            rows = llama_oracle.logits(path, [*encoded, *(token_id for token_id, _ in found)])
            for place, (token_id, _) in enumerate(found):
                # Float results depend on how steps are composed: a near-tie may fall differently.
                row = rows[len(encoded) - 1 + place]
                assert row[token_id] >= row.max() - 0.05
        engine.check()


@pytest.mark.any_device
def test_shared_beginnings_are_read_once(unified: Engine) -> None:
    """Guards: prompts with one header each reading it again; a copy that holds other cells than it says."""
    prompts = [SHARED + str(number) * 3 for number in range(6)]
    replies = run(unified, requests(prompts, 6))
    cached = []
    for number, prompt in enumerate(prompts):
        events = replies[str(number)]
        assert isinstance(events, list)
        usage = events[-1].usage
        assert usage is not None
        cached.append(usage.cached_tokens)
        expected = llama_oracle.greedy(unified.info.path, unified.encode(prompt), 1)
        assert ids(events)[:1] == expected
    n_shared = len(unified.encode(SHARED))
    assert sum(count >= n_shared - 2 for count in cached) == len(prompts) - 1


def test_n_replies_of_one_prompt(unified: Engine) -> None:
    """Guards: replies that share a seed, an index or a sampler."""
    sampling = SamplingParameters(temperature=1.5, seed=5, top_k=0, top_p=1, min_p=0)
    [events] = run(unified, requests(["fox"], 12, n=3, sampling=sampling)).values()
    assert isinstance(events, list)
    endings = [event for event in events if event.finish_reason is not None]
    assert sorted(event.index for event in endings) == [0, 1, 2]
    assert [event.usage.seed for event in sorted(endings, key=lambda e: e.index) if event.usage] == [5, 6, 7]
    replies = [ids(events, index) for index in range(3)]
    assert len({tuple(reply) for reply in replies}) == 3
    for index in range(3):
        one = SamplingParameters(temperature=1.5, seed=5 + index, top_k=0, top_p=1, min_p=0)
        [again] = run(unified, requests(["fox"], 12, sampling=one)).values()
        assert ids(again)[:4] == replies[index][:4]


def test_cancelling_one_leaves_the_others(unified: Engine) -> None:
    """Guards: an abort that ends, or falsifies, the replies that share the step."""
    undisturbed = run(unified, requests(["dog", "cat"], 40))
    wanted = [*requests(["dog", "cat"], 40), Request("victim", "y" * 200, GREEDY)]
    first, cancelled = threading.Event(), threading.Event()
    arrived: queue.SimpleQueue[tuple[str, TokenEvent | BaseException | None]] = queue.SimpleQueue()
    tickets, numbers = {}, itertools.count()

    def deliver(request_id: str) -> Deliver:
        def put(event: TokenEvent | BaseException | None) -> None:
            arrived.put((request_id, event))
            first.set()
            if request_id == "victim" and next(numbers) >= 40:
                assert cancelled.wait(60)  # before the context is full

        return put

    for request in wanted:
        tickets[request.id] = unified.start(request, deliver(request.id))
    first.wait(60)
    tickets["victim"].cancel()
    cancelled.set()
    found: dict[str, list[TokenEvent]] = {request.id: [] for request in wanted}
    n_open = len(wanted)
    while n_open:
        request_id, event = arrived.get(timeout=60)
        n_open -= event is None
        assert not isinstance(event, BaseException)
        if event is not None:
            found[request_id].append(event)
    assert found["victim"][-1].finish_reason is FinishReason.CANCELLED
    for request_id in ("0", "1"):
        assert ids(found[request_id])[:10] == ids(undisturbed[request_id])[:10]
    unified.check()


def test_a_bad_request_fails_alone(unified: Engine) -> None:
    """Guards: one prompt that is too long taking the whole step with it."""
    replies = run(unified, requests(["dog", "z" * 2000, "cat"], 5))
    assert isinstance(replies["1"], PromptError)
    assert len(ids(replies["0"])) == len(ids(replies["2"])) == 5


def test_a_native_failure_ends_only_its_step(unified: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: cells of a failed step being reused; one failed step that ends the engine."""
    session = unified._require_loaded()
    decode = session.context.decode
    failures = iter([True])

    def fail_once(rows: Any) -> int:
        if next(failures, False):
            raise NativeError("made to fail")
        return decode(rows)

    monkeypatch.setattr(session.context, "decode", fail_once)
    [failed] = run(unified, requests(["dog"], 5)).values()
    assert isinstance(failed, NativeError)
    unified.check()
    [reply] = run(unified, requests(["dog"], 5)).values()
    assert ids(reply) == llama_oracle.greedy(unified.info.path, unified.encode("dog"), 5)


def test_more_requests_than_room_all_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: replies of unstated length that block or starve each other; a preempted one that is lost, or
    whose prompt is read again for all to see.
    """
    monkeypatch.setattr(scheduler, "GROWTH", 32)
    preempted = []
    preempt = scheduler.Scheduler._preempt

    def record(self: scheduler.Scheduler, sequence: Sequence) -> None:
        preempted.append(sequence)
        preempt(self, sequence)

    monkeypatch.setattr(scheduler.Scheduler, "_preempt", record)
    options = ModelOptions(path, n_context=512, n_parallel=4, n_threads=2)
    wanted = requests([f"{number} dog" for number in range(8)], 1)
    wanted = [Request(request.id, request.prompt, GREEDY) for request in wanted]
    with Engine.load(options) as engine:
        replies = run(engine, wanted)
        engine.check()
        n_context = engine.info.n_context
    assert preempted
    for events in replies.values():
        assert isinstance(events, list)
        assert events[-1].finish_reason in (FinishReason.CONTEXT_FULL, FinishReason.STOP)
        progress = [event.progress is not None for event in events]
        assert True not in progress[progress.index(False) :], "a prompt is read again for the reader to see"
        usage = events[-1].usage
        assert usage is not None
        assert usage.prompt_tokens + usage.completion_tokens <= n_context


def test_context_shift_goes_on_where_the_context_ends(path: Path) -> None:
    """Guards: positions that do not follow each other after a shift; a reply that ends all the same."""
    with Engine.load(ModelOptions(path, n_threads=2)) as engine:
        n_context = engine.info.n_context
        bias = tuple((token_id, -100.0) for token_id in range(n_ends(engine)))
        request = Request("s", "dog", GREEDY, n_context * 2, context_shift=True, logit_bias=bias)
        events = list(engine.submit(request))
        engine.check()
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == n_context * 2


def n_ends(engine: Engine) -> int:
    """Ids below this one may end a reply: the control tokens come first in the tiny vocabulary."""
    model = engine._require_loaded().model
    return 1 + max(token_id for token_id in range(model.n_vocab) if model.ends(token_id))


def test_score_from_needs_an_observer(unified: Engine) -> None:
    """Guards: more rows of logits than the context was made for, which aborts the process."""
    [reply] = run(unified, requests([SHARED], 1, score_from=3)).values()
    assert isinstance(reply, UsageError)


def test_deterministic_needs_two_and_no_shared_cells() -> None:
    """Guards: a promise that width 1, or a shared pool, cannot keep."""
    with pytest.raises(UsageError, match="--parallel"):
        Engine.load(ModelOptions(tiny_model(), n_parallel=1, deterministic=True))
    with pytest.raises(UsageError, match="a separate KV cache"):
        Engine.load(ModelOptions(tiny_model(), n_parallel=2, deterministic=True, unified=True))


def test_a_fault_of_our_own_ends_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: callers that wait for ever for an engine whose thread is gone."""
    reported: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    with Engine.load(ModelOptions(tiny_model(), n_threads=1)) as engine:
        core = engine._core
        assert core is not None

        def fail() -> None:
            raise ZeroDivisionError("made to fail")

        monkeypatch.setattr(core.scheduler, "plan", fail)
        [reply] = run(engine, requests(["dog"], 5)).values()
        assert isinstance(reply, ZeroDivisionError)
        with pytest.raises(EngineError, match="closed"):
            engine.submit(Request("after", "x"))
        engine._thread.join()
    assert len(reported) == 1
