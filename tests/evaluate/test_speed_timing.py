"""Timing workloads: in a fake engine with its own clock, and in a real one whose steps are counted."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.fake_engine import FakeEngine
from support.models import tiny_model

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Event, Finished, Started
from dsmoe_local.engine import native, reply
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import EngineCrashError, EngineError
from dsmoe_local.engine.interface import Deliver, Ticket
from dsmoe_local.engine.types import FinishReason, ModelOptions, Request, TokenEvent, Usage
from dsmoe_local.evaluate.speed.timing import Workload, options_for, time_workloads, workloads_of

READ, STEP = 0.5, 0.25
END = 7


class Clocked(FakeEngine):
    """Reads a prompt in READ seconds and decodes a token in STEP, by its clock: `scale` times as long in its
    first request. A token END that is not banned ends its `ended`th reply after two tokens.
    """

    def __init__(self, *, scale: float = 1.0, ended: Sequence[int] = (), n_cached: int | None = None) -> None:
        super().__init__(n_context=100_000)
        self._scale = scale
        self._ended = ended
        self._n_cached = n_cached
        self._held: tuple[int, ...] = ()
        self.asked: list[Request] = []
        self.cached: list[int] = []

    def start(self, request: Request, deliver: Deliver) -> Ticket:
        prompt, wanted = request.prompt, request.max_tokens
        assert isinstance(prompt, tuple)
        assert wanted is not None
        number, scale = len(self.asked), self._scale if not self.asked else 1.0
        self.asked.append(request)
        ids = tuple(token_id for token_id in prompt if isinstance(token_id, int))
        common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._held, ids, strict=False))
        n_cached = min(sum(1 for _ in common), len(ids) - 1) if self._n_cached is None else self._n_cached
        self._held = ids
        self.cached.append(n_cached)
        early = number in self._ended and dict(request.logit_bias).get(END) != -1000
        count = 2 if early else wanted
        for at in range(count):
            deliver(TokenEvent(request.id, "x", scale * (READ + at * STEP), 3))
        usage = Usage(len(ids), n_cached, count, 0.0, 0.0, 1)
        reason = FinishReason.STOP if early else FinishReason.LENGTH
        deliver(TokenEvent(request.id, "", 99.0, END if early else None, finish_reason=reason, usage=usage))
        deliver(None)
        return Silent()


class Silent:
    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


def test_workloads_are_llama_benchs() -> None:
    """Guards: another name or order than llama-bench's, workloads of nothing, a context that is too small."""
    found = workloads_of([512, 0, 64], [0, 128], [0, 1024])
    assert [each.label for each in found] == [
        "pp512",
        "pp64",
        "tg128",
        "pp512 @ d1024",
        "pp64 @ d1024",
        "tg128 @ d1024",
    ]
    assert workloads_of([0], [0]) == ()
    # Behind the 1,024 a prompt, and room for a token: a model's own context is not exceeded for nothing.
    assert options_for(ModelOptions(Path("x")), found).n_context == 1024 + 512 + 1
    options = options_for(ModelOptions(Path("x"), n_context=4096, n_parallel=8), found)
    assert (options.n_context, options.n_parallel, options.unified) == (4096, 1, False)


def test_the_engines_clock_counts() -> None:
    """Guards: a warm-up that counts, the first token of a reply timed, the wrong number of repetitions."""
    engine = Clocked(scale=100)
    prompt, generated = time_workloads(engine, workloads_of([32], [8]), 3)
    assert prompt.seconds == (READ,) * 3
    assert generated.seconds == (8 * STEP,) * 3
    assert [request.max_tokens for request in engine.asked] == [1] * 4 + [9] * 4
    assert generated.began >= prompt.began


def test_prompts_are_read_in_full() -> None:
    """Guards: prompts of which the cache has a part, the same tokens for all, a depth that is read again."""
    engine = Clocked()
    time_workloads(engine, workloads_of([5], [2], [0, 6]), 4)
    prompts = [request.prompt for request in engine.asked]
    assert all(request.score_from is None for request in engine.asked)
    plain, generated, deep, deep_generated = prompts[:5], prompts[5:10], prompts[10:20], prompts[20:30]
    assert {len(each) for each in plain} == {5}
    assert len(set(plain)) == 5
    assert engine.cached[:5] == [0] * 5
    assert {len(each) for each in generated} == {1}
    # Behind a depth: its tokens once more, which the cache has, and then what is timed.
    assert [len(each) for each in deep] == [6, 11] * 5
    assert len({each[:6] for each in deep}) == 1
    assert len(set(deep[1::2])) == 5
    assert engine.cached[11:20:2] == [6] * 5
    assert {each[:6] for each in deep_generated} == {deep[0]}
    assert [len(each) for each in deep_generated] == [6] * 10


def test_a_reply_that_ends_early_is_timed_again() -> None:
    """Guards: a rate of two tokens, replies that never get long enough, progress beyond the end."""
    heard: list[Event] = []
    engine = Clocked(ended=(1, 3))
    (timed,) = time_workloads(engine, [Workload(0, 8)], 2, heard.append)
    assert timed.seconds == (8 * STEP,) * 2
    # The warm-up, one that ends, the same again without that token, and the last.
    assert [bool(request.logit_bias) for request in engine.asked] == [False, False, True, True]
    assert engine.asked[1].prompt == engine.asked[2].prompt
    assert engine.asked[1].sampling == engine.asked[2].sampling != engine.asked[3].sampling
    started = heard[0]
    assert isinstance(started, Started)
    assert sum(event.amount for event in heard if isinstance(event, Advanced)) == started.total == 24
    assert isinstance(heard[-1], Finished)


def test_what_was_not_computed_is_not_timed() -> None:
    """Guards: a prompt found in the cache, by whatever mistake, that counts as read."""
    with pytest.raises(EngineError, match="computed 3 tokens of a prompt, 32 were to be timed"):
        time_workloads(Clocked(n_cached=29), [Workload(32, 0)], 1)


def test_a_stop_cancels_what_runs() -> None:
    """Guards: a run that goes on, or leaves its request behind."""
    ticket, stop = Silent(), threading.Event()
    engine = Clocked()

    def start(request: Request, deliver: Deliver) -> Ticket:
        stop.set()
        return ticket

    engine.start = start  # type: ignore[method-assign]
    with pytest.raises(InterruptedRunError):
        time_workloads(engine, [Workload(32, 0)], 1, stop=stop)
    assert ticket.cancelled


def test_a_stop_between_short_replies() -> None:
    """Guards: a Ctrl-C that is only looked for while something takes long."""
    stop = threading.Event()
    engine = Clocked()

    def listen(event: Event) -> None:
        if len(engine.asked) == 5:
            stop.set()

    with pytest.raises(InterruptedRunError):
        time_workloads(engine, [Workload(32, 0)], 1000, listen, stop)
    assert len(engine.asked) == 5


def test_a_crash_is_the_callers() -> None:
    """Guards: a crash that is waited for, or timed."""
    engine = Clocked()

    def start(request: Request, deliver: Deliver) -> Ticket:
        deliver(EngineCrashError("gone"))
        return Silent()

    engine.start = start  # type: ignore[method-assign]
    with pytest.raises(EngineCrashError, match="gone"):
        time_workloads(engine, [Workload(0, 8)], 1)


Counted = list[int]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The number of tokens of each native step. On the engine's clock, a step takes exactly one second."""
    steps: Counted = []
    decode: Callable[[native.Context, Sequence[native.Row]], int] = native.Context.decode
    start = time.perf_counter()

    def count(context: native.Context, rows: Sequence[native.Row]) -> int:
        steps.append(sum(len(row.token_ids) for row in rows))
        return decode(context, rows)

    monkeypatch.setattr(native.Context, "decode", count)
    monkeypatch.setattr(reply, "time", SimpleNamespace(perf_counter=lambda: start + len(steps)))
    return steps


def test_steps_of_a_real_engine(counted: Counted) -> None:
    """The timed steps are exactly the native steps.

    Guards: a reply's first token counted as decoded, steps left out, prompts read in part, a depth read for
    each repetition, and times that are those of a caller who is told of many tokens at once.
    """
    options = ModelOptions(tiny_model(), n_threads=1)
    workloads = workloads_of([32], [16], [0, 40])
    with Engine.load(options_for(options, workloads)) as engine:
        _, generated, _, deep = time_workloads(engine, workloads, 2)
    assert generated.seconds == pytest.approx((16, 16))
    assert deep.seconds == pytest.approx((16, 16))
    # Of the depth, the cache has its first token from the replies before.
    assert [step for step in counted if step > 1] == [32, 32, 32, 39, 32, 32, 32]
    # Replies: behind one token, 16 steps. Behind a depth its last token is computed again, once for the depth
    # itself and once for the reply.
    assert counted.count(1) == 3 * 17 + 2 + 3 * 18


@pytest.mark.parametrize(
    "workload", [Workload(40, 0), Workload(0, 40), Workload(40, 0, 8), Workload(0, 40, 8)]
)
def test_the_context_is_just_enough(workload: Workload) -> None:
    """Guards: a reply that the end of the context cuts, or a prompt that it refuses."""
    options = options_for(ModelOptions(tiny_model(), n_threads=1), [workload])
    with Engine.load(options) as engine:
        assert engine.info.n_context == workload.n_context
        assert len(time_workloads(engine, [workload], 1)[0].seconds) == 1
