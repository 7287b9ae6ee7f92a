"""Times workloads through an engine. What is made of the times is `results`' concern.

The clock is the engine's own, which tells its caller of several tokens at once. Prompts are random tokens, as
in llama-bench. Replies are sampled from the model: of the likeliest tokens alone it would soon repeat itself,
and with them the experts that it reads.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Started, ignore
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.types import (
    FinishReason,
    ModelOptions,
    Request,
    SamplingParameters,
    TextEngine,
    TokenEvent,
    Usage,
)
from dsmoe_local.evaluate.measure import name_of
from dsmoe_local.evaluate.speed.workload import Workload, context_for
from dsmoe_local.evaluate.windows import bos_token

_TICK = 0.2  # seconds between two looks at what is done: to be woken for each token would slow it down
_SAMPLING = SamplingParameters(temperature=1.0, top_k=40, top_p=1.0, min_p=0.0)
_BAN = -1000.0
_SEED = 1


@dataclass(frozen=True, slots=True)
class Timed:
    """A workload, and the seconds that each repetition took. `began` is UTC."""

    workload: Workload
    seconds: tuple[float, ...]
    began: datetime


def options_for(options: ModelOptions, workloads: Sequence[Workload]) -> ModelOptions:
    """How to load a model for these workloads: one sequence, and no more context than they need or
    `options` ask for.
    """
    # A stream of its own keeps nothing of earlier prompts that attention would look at.
    n_context = context_for(workloads, options.n_context or 0)
    return replace(options, n_context=n_context, n_parallel=1, unified=False, observers=())


def time_workloads(
    engine: TextEngine,
    workloads: Sequence[Workload],
    repetitions: int,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> tuple[Timed, ...]:
    """Time each workload so often, after a time that does not count.

    The engine must be loaded as `options_for` says, and idle. Setting `stop` raises InterruptedRunError.
    Raises EngineError.
    """
    timer = Timer(engine, listen, stop)
    stage = f"measuring {name_of(engine)}"
    total = sum(workload.n_tokens for workload in workloads) * (repetitions + 1)
    listen(Started(stage, total, unit="tokens"))
    timed = []
    for workload in workloads:
        began = datetime.now(UTC)
        seconds = [timer.time(workload) for _ in range(repetitions + 1)]
        timed.append(Timed(workload, tuple(seconds[1:]), began))
    listen(Finished(stage))
    return tuple(timed)


@dataclass(slots=True)
class _Reply:
    """When a reply's tokens were there, in seconds since it was asked for. Filled in the client's thread,
    which must not wait for ours.
    """

    moments: list[float] = field(default_factory=list)
    n_read: int = 0
    usage: Usage | None = None
    ended_by: int | None = None
    error: BaseException | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def take(self, event: TokenEvent | BaseException | None) -> None:
        if not isinstance(event, TokenEvent):
            self.error = event
            self.over.set()
            return
        if event.progress is not None:
            self.n_read = event.progress.done
        if event.token_id is not None:
            self.moments.append(event.seconds)
        if event.finish_reason is not None:
            self.usage = event.usage
            self.ended_by = event.token_id if event.finish_reason is FinishReason.STOP else None


class Timer:
    """Times one model's workloads, one after the other.

    The engine must be loaded as `options_for` says, and idle. `time` raises InterruptedRunError once `stop`
    is set, and EngineError.
    """

    def __init__(
        self, engine: TextEngine, listen: Listener = ignore, stop: threading.Event | None = None
    ) -> None:
        self._engine = engine
        self._listen = listen
        self._stop = stop or threading.Event()
        # Of every text that has one, or, for want of one, any.
        self._start = bos_token(engine) or 0
        self._random = random.Random(_SEED)  # noqa: S311 - no secrets
        self._numbers = itertools.count()
        self._bans: dict[int, float] = {}
        self._label = ""

    def time(self, workload: Workload) -> float:
        """Seconds that it took, once."""
        self._label = workload.label
        number = next(self._numbers)
        depth = self._behind(workload.n_depth)
        if workload.n_depth:
            self._reply(depth, 1, number)
        if workload.n_gen:
            return self._time_reply(depth or (self._start,), workload, number)
        prompt = (*depth, *self._fresh(workload.n_prompt, number))
        reply = self._reply(prompt, 1, number, advance=workload.n_prompt)
        _check_read(reply, workload.n_prompt)
        return reply.moments[0]

    def _time_reply(self, prompt: tuple[int, ...], workload: Workload, number: int) -> float:
        # Its first token is the prompt's doing.
        wanted = workload.n_gen + 1
        while True:
            reply = self._reply(prompt, wanted, number, advance=workload.n_gen)
            _check_read(reply, 1)
            if reply.ended_by is None:
                break
            # What ends a reply is only known once it does. No model has many such tokens.
            self._bans[reply.ended_by] = _BAN
            self._listen(Advanced(-workload.n_gen))
        if len(reply.moments) != wanted:
            raise EngineError(f"a reply has {len(reply.moments)} tokens, {wanted} were asked for")
        return reply.moments[-1] - reply.moments[0]

    def _reply(self, prompt: tuple[int, ...], n_new: int, number: int, advance: int = 0) -> _Reply:
        """A reply, once it is over, told as progress of at most `advance` tokens."""
        reply = _Reply()
        request = Request(
            f"speed-{number}",
            prompt,
            replace(_SAMPLING, seed=number),
            max_tokens=n_new,
            logit_bias=tuple(self._bans.items()),
        )
        # Short replies are over before the first look below.
        self._go_on()
        ticket = self._engine.start(request, reply.take)
        told = 0
        while not reply.over.wait(_TICK):
            if self._stop.is_set():
                ticket.cancel()
            self._go_on()
            done = min(advance, len(reply.moments) if n_new > 1 else reply.n_read)
            self._listen(Advanced(max(0, done - told), self._label))
            told = max(told, done)
        if reply.error is not None:
            raise reply.error
        if reply.usage is None or not reply.moments:
            raise EngineError("a reply ended without a token")
        self._listen(Advanced(advance - told, self._label))
        return reply

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise InterruptedRunError("the measurement was interrupted")

    def _behind(self, n_depth: int) -> tuple[int, ...]:
        """A context, the same one for each repetition: only the first has to read it."""
        generator = random.Random(_SEED)  # noqa: S311 - no secrets
        ids = [generator.randrange(self._engine.info.n_vocab) for _ in range(n_depth)]
        return (self._start, *ids[1:]) if ids else ()

    def _fresh(self, count: int, number: int) -> tuple[int, ...]:
        """Random tokens. The first is never the one that the cache has in its place: nothing is read for
        nothing.
        """
        n_vocab = self._engine.info.n_vocab
        first = (self._start + 1 + number % (n_vocab - 1)) % n_vocab
        return (first, *(self._random.randrange(n_vocab) for _ in range(count - 1)))


def _check_read(reply: _Reply, n_tokens: int) -> None:
    """EngineError unless so many tokens of the prompt were computed: else another thing was timed."""
    assert reply.usage is not None
    n_read = reply.usage.prompt_tokens - reply.usage.cached_tokens
    if n_read != n_tokens:
        raise EngineError(
            f"the engine computed {n_read} tokens of a prompt, {n_tokens} were to be timed",
            remedy="try again; its process may have been replaced",
        )
