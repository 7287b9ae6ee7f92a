"""Splits a text into windows of token ids, as llama.cpp's perplexity tool does, and reads them."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from dsmoe_local.base.errors import InterruptedRunError, UsageError
from dsmoe_local.base.progress import Advanced, Listener
from dsmoe_local.engine.interface import TextEngine, Ticket
from dsmoe_local.engine.prompts.encoder import MAX_TOKEN_BYTES
from dsmoe_local.engine.types import Request, SamplingParameters, TokenEvent
from dsmoe_local.evaluate.text import Text

MIN_CONTEXT = 16

# Where a text may be split, best first. No pre-tokenizer joins a letter to one of these characters, so the
# parts have the same tokens as the whole text.
_CUTS = (r"(?<=[^\W\d_])(?=\n)", r"(?<=[^\W\d_])(?=[\s，。])", r"(?=\n)")
_MAX_CHARACTER_BYTES = 4
_POLL_SECONDS = 0.1  # between checks of `stop`
_N_QUEUED = 2  # windows submitted in advance, so that the engine is never idle
_GREEDY = SamplingParameters(temperature=0)


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of equal length. In each, the tokens after the one with the index `first` are scored.

    `text` and `text_digest` identify the text, `vocabulary` the tokenizer.
    """

    tokens: tuple[tuple[int, ...], ...]
    text: str
    text_digest: str
    vocabulary: str

    @property
    def n_context(self) -> int:
        """Tokens per window."""
        return len(self.tokens[0])

    @property
    def first(self) -> int:
        """Index of the token before the first scored one. The first half of a window is only context."""
        return self.n_context // 2

    @property
    def n_tokens(self) -> int:
        """Tokens of all windows."""
        return self.n_context * len(self.tokens)

    @property
    def n_scored(self) -> int:
        """Scored tokens of all windows."""
        return (self.n_context - 1 - self.first) * len(self.tokens)


def cut_windows(engine: TextEngine, text: Text, n_context: int, n_windows: int | None = None) -> Windows:
    """Return the first `n_windows` windows of a text (None: all). An incomplete last window is dropped.

    If the model uses BOS, it replaces the first token of each window, as in llama.cpp. Raises UsageError if
    the text is shorter than a window.
    """
    ids = encode_text(engine, text.content)
    bos = bos_token(engine)
    count = min(len(ids) // n_context, n_windows or len(ids))
    if not count:
        raise UsageError(
            f"the text has {len(ids)} tokens, too few for a window of {n_context}",
            where=text.name,
            remedy="use a longer text, or smaller windows (-c)",
        )
    windows = [tuple(ids[start : start + n_context]) for start in range(0, count * n_context, n_context)]
    if bos is not None:
        windows = [(bos, *window[1:]) for window in windows]
    return Windows(tuple(windows), text.name, text.digest, engine.info.vocabulary)


def encode_text(engine: TextEngine, content: str) -> list[int]:
    """Return the token ids of a text of any length, starting with BOS if the model uses it."""
    bos = bos_token(engine)
    ids: list[int] = []
    for piece in pieces(content, engine.info.n_context * MAX_TOKEN_BYTES):
        part = engine.encode(piece)
        ids += part[1:] if ids and bos is not None else part
    return ids


def bos_token(engine: TextEngine) -> int | None:
    """Return the token that every prompt begins with, or None."""
    firsts = {engine.encode(text)[0] for text in ("a", "1", "\n")}
    return firsts.pop() if len(firsts) == 1 else None


def pieces(content: str, max_bytes: int) -> Iterator[str]:
    """Split a text into pieces of at most `max_bytes`, where possible without changing its tokens."""
    limit = max(1, max_bytes // _MAX_CHARACTER_BYTES)
    start = 0
    while len(content) - start > limit:
        piece = content[start : start + limit]
        # One more character for the look-ahead.
        longer = content[start : start + limit + 1]
        end = next((end for pattern in _CUTS if (end := _last_match(pattern, longer))), len(piece))
        yield content[start : start + end]
        start += end
    yield content[start:]


def _last_match(pattern: str, text: str) -> int:
    return max((match.start() for match in re.finditer(pattern, text)), default=0)


class WindowReader:
    """Reads several windows at once with an engine whose observers score them.

    The id of a request is the number of its window. In each window, the tokens after the index `score_from`
    are scored. `detail` returns the text that is shown with the progress.
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
        self._events: queue.SimpleQueue[tuple[int, TokenEvent | BaseException | None]] = queue.SimpleQueue()
        self._running: dict[int, Ticket] = {}
        self._n_read: dict[int, int] = {}

    def read(self, numbers: Iterable[int]) -> None:
        """Read the windows with these numbers. Raises InterruptedRunError once `stop` is set, EngineError."""
        waiting = iter(numbers)
        limit = self._engine.info.n_parallel + _N_QUEUED
        try:
            while True:
                while len(self._running) < limit and (number := next(waiting, None)) is not None:
                    self._begin(number)
                if not self._running:
                    break
                self._handle_event()
                if self._stop.is_set():
                    raise InterruptedRunError("the measurement was interrupted")
        finally:
            for ticket in self._running.values():
                ticket.cancel()

    def _begin(self, number: int) -> None:
        window = self._windows.tokens[number]
        request = Request(f"{number}", window, _GREEDY, max_tokens=1, score_from=self._score_from)
        self._n_read[number] = 0
        self._running[number] = self._engine.start(request, lambda event: self._events.put((number, event)))

    def _handle_event(self) -> None:
        try:
            number, event = self._events.get(timeout=_POLL_SECONDS)
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
