"""Times workloads with an engine: the prefill of a prompt or the decoding of a reply, after a context.

Times are those of the engine's clock, since its client receives several tokens at once. Prompts are random
tokens, as in llama-bench. Replies are sampled: greedy ones would soon repeat, and so would their experts.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Started, ignore
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.types import (
    MIN_CONTEXT,
    NO_TEMPLATE,
    FinishReason,
    ModelOptions,
    Request,
    SamplingParameters,
    TokenEvent,
    Usage,
)
from dsmoe_local.evaluate.measure import name_of
from dsmoe_local.evaluate.windows import bos_token

_POLL_SECONDS = 0.2  # between updates: waking up for each token would slow the engine down
_SAMPLING = SamplingParameters(temperature=1.0, top_k=40, top_p=1.0, min_p=0.0)
_BAN = -1000.0
_SEED = 1


@dataclass(frozen=True, slots=True)
class Workload:
    """A prompt of `n_prompt` tokens or a reply of `n_gen` tokens. The other number is 0.

    It follows a context of `n_depth` tokens, which are not timed.
    """

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def n_tokens(self) -> int:
        """The number of timed tokens."""
        return self.n_prompt + self.n_gen

    @property
    def n_context(self) -> int:
        """The context length. A reply follows at least one token, and its first token is not timed."""
        return self.n_depth + self.n_prompt + 1 if self.n_prompt else max(self.n_depth, 1) + self.n_gen + 1

    @property
    def label(self) -> str:
        """llama-bench's name: pp512, tg128 @ d1024."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name


def workloads_of(
    n_prompts: Sequence[int], n_gens: Sequence[int], n_depths: Iterable[int] = (0,)
) -> tuple[Workload, ...]:
    """Return all prompts and replies at all depths, in llama-bench's order. Lengths of 0 are ignored."""
    return tuple(
        workload
        for depth in n_depths
        for workload in (
            *(Workload(count, 0, depth) for count in n_prompts if count),
            *(Workload(0, count, depth) for count in n_gens if count),
        )
    )


def options_for(options: ModelOptions, workloads: Sequence[Workload]) -> ModelOptions:
    """Return the options to load a model for these workloads, with one sequence.

    The context is that of `options`, or longer if a workload requires it.
    """
    n_context = max(options.n_context or 0, MIN_CONTEXT, *(workload.n_context for workload in workloads))
    # If the cache is not unified, attention does not read the cells of earlier prompts.
    return replace(
        options, n_context=n_context, n_parallel=1, unified=False, chat_template=NO_TEMPLATE, observers=()
    )


@dataclass(frozen=True, slots=True)
class Timed:
    """The seconds of each repetition of a workload. `began` is in UTC."""

    workload: Workload
    seconds: tuple[float, ...]
    began: datetime


def time_workloads(
    engine: TextEngine,
    workloads: Sequence[Workload],
    repetitions: int,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> tuple[Timed, ...]:
    """Time each workload `repetitions` times, after a warm-up run. Raises the errors of `Timer.time`."""
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
    """Receives the events of a reply. `moments` are the times of its tokens, in seconds since the request.

    `take` runs in the client's thread, and must not block it.
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
    """Times the workloads of one model, one after another.

    The engine must be loaded with `options_for`, and idle. `time` raises InterruptedRunError once `stop` is
    set, and EngineError.
    """

    def __init__(
        self, engine: TextEngine, listen: Listener = ignore, stop: threading.Event | None = None
    ) -> None:
        self._engine = engine
        self._listen = listen
        self._stop = stop or threading.Event()
        # BOS, or any token of a model without BOS.
        self._start = bos_token(engine) or 0
        self._random = random.Random(_SEED)  # noqa: S311 - not for secrets
        self._numbers = itertools.count()
        self._bans: dict[int, float] = {}
        self._label = ""

    def time(self, workload: Workload) -> float:
        """Run the workload once, and return the seconds it took."""
        self._label = workload.label
        number = next(self._numbers)
        context = self._context(workload.n_depth)
        if workload.n_depth:
            self._reply(context, 1, number)
        if workload.n_gen:
            return self._time_reply(context or (self._start,), workload, number)
        prompt = (*context, *self._new_tokens(workload.n_prompt, number))
        reply = self._reply(prompt, 1, number, advance=workload.n_prompt)
        _check_computed(reply, workload.n_prompt)
        return reply.moments[0]

    def _time_reply(self, prompt: tuple[int, ...], workload: Workload, number: int) -> float:
        # The time of the first token is that of the prompt.
        wanted = workload.n_gen + 1
        while True:
            reply = self._reply(prompt, wanted, number, advance=workload.n_gen)
            _check_computed(reply, 1)
            if reply.ended_by is None:
                break
            # Ban the end token and try again. The end tokens are not known in advance, but there are few.
            self._bans[reply.ended_by] = _BAN
            self._listen(Advanced(-workload.n_gen))
        if len(reply.moments) != wanted:
            raise EngineError(
                f"a reply has {len(reply.moments)} tokens, {wanted} were requested", remedy="try again"
            )
        return reply.moments[-1] - reply.moments[0]

    def _reply(self, prompt: tuple[int, ...], n_new: int, number: int, advance: int = 0) -> _Reply:
        """Return a complete reply of `n_new` tokens. The progress advances by `advance` tokens."""
        reply = _Reply()
        request = Request(
            f"speed-{number}",
            prompt,
            replace(_SAMPLING, seed=number),
            max_tokens=n_new,
            logit_bias=tuple(self._bans.items()),
        )
        # A short reply ends before the first check in the loop below.
        self._check_stop()
        ticket = self._engine.start(request, reply.take)
        reported = 0
        while not reply.over.wait(_POLL_SECONDS):
            if self._stop.is_set():
                ticket.cancel()
            self._check_stop()
            done = min(advance, len(reply.moments) if n_new > 1 else reply.n_read)
            self._listen(Advanced(max(0, done - reported), self._label))
            reported = max(reported, done)
        if reply.error is not None:
            raise reply.error
        if reply.usage is None or not reply.moments:
            raise EngineError("a reply ended without a token", remedy="try again")
        self._listen(Advanced(advance - reported, self._label))
        return reply

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise InterruptedRunError("the measurement was interrupted")

    def _context(self, n_depth: int) -> tuple[int, ...]:
        """Return the tokens before the timed ones. They are always the same, so they stay in the cache."""
        generator = random.Random(_SEED)  # noqa: S311 - not for secrets
        ids = [generator.randrange(self._engine.info.n_vocab) for _ in range(n_depth)]
        return (self._start, *ids[1:]) if ids else ()

    def _new_tokens(self, count: int, number: int) -> tuple[int, ...]:
        """Return random tokens. The first is not the one in the cache, so all of them are computed."""
        n_vocab = self._engine.info.n_vocab
        first = (self._start + 1 + number % (n_vocab - 1)) % n_vocab
        return (first, *(self._random.randrange(n_vocab) for _ in range(count - 1)))


def _check_computed(reply: _Reply, n_tokens: int) -> None:
    """Raise EngineError unless exactly `n_tokens` tokens of the prompt were computed."""
    assert reply.usage is not None
    n_computed = reply.usage.prompt_tokens - reply.usage.cached_tokens
    if n_computed != n_tokens:
        raise EngineError(
            f"the engine computed {n_computed} tokens of a prompt, {n_tokens} were to be timed",
            remedy="its process may have been restarted: try again",
        )
