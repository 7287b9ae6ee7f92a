"""Reads a text with a model and returns the activity of its experts."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Started
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.observe.logprobs import perplexity
from dsmoe_local.engine.types import FinishReason, ObserverOptions, Request, SamplingParameters
from dsmoe_local.experts.activity import Activity, activity_of

OBSERVERS = (ObserverOptions("routing"), ObserverOptions("logprobs"))
"""With `logprobs`, the last layer computes all tokens, not only those whose logits are needed."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The activity for a text of `n_tokens` tokens, which was read in `n_windows` independent windows.

    `perplexity` is None if no token was scored.
    """

    activity: Activity
    n_tokens: int
    n_windows: int
    perplexity: float | None


def read_tokens(
    engine: TextEngine,
    ids: Sequence[int],
    bos: int | None,
    name: str,
    listen: Listener,
    stop: threading.Event,
) -> Reading:
    """Read `ids` in windows of about equal length that fit the context. Each begins with `bos`, if set.

    `name` is shown in the progress. Raises InterruptedRunError once `stop` is set, and EngineError.
    """
    windows = list(_windows(tuple(ids), () if bos is None else (bos,), engine.info.n_context - 1))
    before, logprobs_before = activity_of(engine.observe("routing")), engine.observe("logprobs")
    listen(Started(f"reading {name}", sum(map(len, windows)), unit="tokens"))
    for number, window in enumerate(windows):
        _read(engine, f"{name} {number}", window, listen, stop)
    listen(Finished(f"reading {name}"))
    after, logprobs = activity_of(engine.observe("routing")), engine.observe("logprobs")
    scored = logprobs["tokens"] - logprobs_before["tokens"]
    nll = logprobs["nll"] - logprobs_before["nll"]
    return Reading(after - before, len(ids), len(windows), perplexity(nll / scored) if scored else None)


def _read(
    engine: TextEngine, request_id: str, window: tuple[int, ...], listen: Listener, stop: threading.Event
) -> None:
    request = Request(request_id, window, SamplingParameters(temperature=0), max_tokens=1, score_from=0)
    read = 0
    is_cancelled = False
    for event in engine.submit(request):
        if stop.is_set():
            engine.cancel(request_id)
        if event.progress is not None:
            listen(Advanced(event.progress.done - read))
            read = event.progress.done
        is_cancelled = event.finish_reason is FinishReason.CANCELLED
    # A short window may have been read before it could be cancelled.
    if is_cancelled or stop.is_set():
        raise InterruptedRunError("interrupted before the end of the text")
    listen(Advanced(max(0, len(window) - read)))


def _windows(ids: tuple[int, ...], bos: tuple[int, ...], limit: int) -> Iterator[tuple[int, ...]]:
    """Yield as few windows as possible, whose lengths differ by at most one."""
    count = -(-len(ids) // max(1, limit - len(bos)))
    for number in range(count):
        yield bos + ids[len(ids) * number // count : len(ids) * (number + 1) // count]
