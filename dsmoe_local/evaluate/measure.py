"""Sends windows through an engine whose observers score them. What is made of it is `results`' concern."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Started, ignore
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.types import (
    ModelOptions,
    ObserverOptions,
    Request,
    SamplingParameters,
    TextEngine,
    Ticket,
    TokenEvent,
)
from dsmoe_local.evaluate.results import Evaluation, Perplexity, perplexity_of
from dsmoe_local.evaluate.windows import Windows

LOGPROBS = ObserverOptions("logprobs")

_TICK = 0.1  # how long a stop may go unnoticed
_REPORT = 1.0  # seconds between two looks at the perplexity so far
_AHEAD = 2  # the engine never waits for the next window
_LEAST_CELLS = 32  # the smallest cache that an engine takes
_GREEDY = SamplingParameters(temperature=0)


def options_for(options: ModelOptions, n_context: int, *observers: ObserverOptions) -> ModelOptions:
    """How to load a model that reads windows of `n_context` tokens.

    As many windows at once as fill a step: a step is then always full, and with windows of a step or more the
    same in every run. The cache is unified: routing is told apart in one only.
    """
    n_parallel = max(1, options.n_ubatch // n_context)
    return replace(
        options,
        n_context=max(_LEAST_CELLS, n_parallel * (n_context + 1)),
        n_parallel=n_parallel,
        unified=True,
        observers=(LOGPROBS, *observers),
    )


def name_of(engine: TextEngine) -> str:
    """The model's file: all quantizations of a model call themselves the same."""
    return safe_line(engine.info.path.stem, 80)


def measure(
    engine: TextEngine, windows: Windows, listen: Listener = ignore, stop: threading.Event | None = None
) -> Evaluation:
    """Score all windows with an engine loaded as `options_for` says, and give its perplexity.

    Setting `stop` raises InterruptedRunError. Raises EngineError; after an EngineCrashError nothing is left:
    what was seen died with the process.
    """
    began = time.perf_counter()
    _Run(engine, windows, listen, stop or threading.Event()).until_done()
    return Evaluation(
        model=name_of(engine),
        text=windows.text,
        text_digest=windows.text_digest,
        n_context=windows.n_context,
        n_windows=len(windows.tokens),
        seconds=time.perf_counter() - began,
        perplexity=_complete(engine, windows),
    )


def _complete(engine: TextEngine, windows: Windows) -> Perplexity:
    perplexity = perplexity_of(engine.observe(LOGPROBS.name))
    if perplexity.n_scored != windows.n_scored:
        raise EngineError(
            f"the engine scored {perplexity.n_scored} of {windows.n_scored} tokens",
            remedy="try again; its process may have been replaced",
        )
    return perplexity


class _Run:
    """The loop. Events of all windows reach it through one queue, with the window's number."""

    def __init__(self, engine: TextEngine, windows: Windows, listen: Listener, stop: threading.Event) -> None:
        self._engine = engine
        self._windows = windows
        self._listen = listen
        self._stop = stop
        self._inbox: queue.SimpleQueue[tuple[int, TokenEvent | BaseException | None]] = queue.SimpleQueue()
        self._running: dict[int, Ticket] = {}
        self._n_read: dict[int, int] = {}
        # An answer waits for the end of a step: meanwhile a stop must be noticed.
        self._asker = ThreadPoolExecutor(1, "dsmoe-perplexity")
        self._asked: Future[str] | None = None
        self._reported = time.perf_counter()

    def until_done(self) -> None:
        """Read every window."""
        name = name_of(self._engine)
        self._listen(Started(f"measuring {name}", self._windows.n_tokens, unit="tokens"))
        waiting = iter(enumerate(self._windows.tokens))
        most = self._engine.info.n_parallel + _AHEAD
        try:
            while True:
                while len(self._running) < most and (window := next(waiting, None)) is not None:
                    self._begin(*window)
                if not self._running:
                    break
                self._take()
                if self._stop.is_set():
                    raise InterruptedRunError("the measurement was interrupted")
        finally:
            self._asker.shutdown(wait=False, cancel_futures=True)
            for ticket in self._running.values():
                ticket.cancel()
        self._listen(Finished(f"measuring {name}"))

    def _begin(self, number: int, window: tuple[int, ...]) -> None:
        request = Request(f"{number}", window, _GREEDY, max_tokens=1, score_from=self._windows.first)
        self._n_read[number] = 0
        self._running[number] = self._engine.start(request, lambda event: self._inbox.put((number, event)))

    def _take(self) -> None:
        try:
            number, event = self._inbox.get(timeout=_TICK)
        except queue.Empty:
            return
        if isinstance(event, BaseException):
            raise event
        if event is None:
            del self._running[number]
            self._advance(number, self._windows.n_context)
        elif event.progress is not None:
            self._advance(number, event.progress.done)

    def _advance(self, number: int, n_read: int) -> None:
        new, self._n_read[number] = n_read - self._n_read[number], n_read
        self._listen(Advanced(new, self._detail()))

    def _detail(self) -> str:
        """The perplexity so far, when it has been told again."""
        if self._asked is not None:
            if not self._asked.done():
                return ""
            told, self._asked = self._asked.result(), None
            return told
        if time.perf_counter() - self._reported >= _REPORT:
            self._reported = time.perf_counter()
            self._asked = self._asker.submit(self._ask)
        return ""

    def _ask(self) -> str:
        return f"perplexity {perplexity_of(self._engine.observe(LOGPROBS.name)).perplexity.value:.4g}"
