"""Sends windows through an engine whose observers score them: several at once, a stop noticed in time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Listener
from dsmoe_local.engine.types import Request, SamplingParameters, TextEngine, Ticket, TokenEvent
from dsmoe_local.evaluate.windows import Windows

_TICK = 0.1  # how long a stop may go unnoticed
_AHEAD = 2  # the engine never waits for the next window
_GREEDY = SamplingParameters(temperature=0)


class WindowReader:
    """Events of all windows reach one queue, with the window's number, which is its request's id, too.

    Of each window, the tokens behind the one with the index `score_from` are scored. `detail` is asked at
    each bit of progress what to say beside it.
    """

    def __init__(
        self,
        engine: TextEngine,
        windows: Windows,
        score_from: int,
        listen: Listener,
        stop: threading.Event,
        detail: Callable[[], str] = lambda: "",
    ) -> None:
        self._engine = engine
        self._windows = windows
        self._score_from = score_from
        self._listen = listen
        self._stop = stop
        self._detail = detail
        self._inbox: queue.SimpleQueue[tuple[int, TokenEvent | BaseException | None]] = queue.SimpleQueue()
        self._running: dict[int, Ticket] = {}
        self._n_read: dict[int, int] = {}

    def read(self, numbers: Iterable[int]) -> None:
        """Read the windows with these numbers to their ends. Raises InterruptedRunError once the stop is set,
        EngineError.
        """
        waiting = iter(numbers)
        most = self._engine.info.n_parallel + _AHEAD
        try:
            while True:
                while len(self._running) < most and (number := next(waiting, None)) is not None:
                    self._begin(number)
                if not self._running:
                    break
                self._take()
                if self._stop.is_set():
                    raise InterruptedRunError("the measurement was interrupted")
        finally:
            for ticket in self._running.values():
                ticket.cancel()

    def _begin(self, number: int) -> None:
        window = self._windows.tokens[number]
        request = Request(f"{number}", window, _GREEDY, max_tokens=1, score_from=self._score_from)
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
