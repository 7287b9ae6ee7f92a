"""The real engine for the child process in tests, with a crash in native code instead of `encode`."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsmoe_local.base.progress import Listener
from dsmoe_local.engine.engine import Engine, load_with_log
from dsmoe_local.engine.interface import Deliver, Ticket
from dsmoe_local.engine.native.library import lib
from dsmoe_local.engine.types import ModelOptions, Prompt, Request, TokenEvent

ABORTING = "support.hosted_native:aborting"
READING_NOTHING = "support.hosted_native:reading_nothing"


def aborting(options: ModelOptions, listen: Listener, stop: threading.Event) -> Engine:
    """Load an engine whose `encode` aborts like a failed GGML_ASSERT."""
    engine = load_with_log(options, listen, stop)

    def encode(prompt: Prompt, **options: Any) -> tuple[int, ...]:
        lib._lib.ggml_abort(b"ggml.c", 7, b"GGML_ASSERT(%s) failed", b"a == b")
        raise AssertionError

    engine.encode = encode  # type: ignore[method-assign]
    return engine


def reading_nothing(options: ModelOptions, listen: Listener, stop: threading.Event) -> Engine:
    """Load an engine whose `encode` reads from a null pointer."""
    engine = load_with_log(options, listen, stop)

    def encode(prompt: Prompt, **options: Any) -> tuple[int, ...]:
        ctypes.string_at(0)
        raise AssertionError

    engine.encode = encode  # type: ignore[method-assign]
    return engine


@dataclass(frozen=True, slots=True)
class _Cancelled:
    """A ticket that tells when its request is cancelled."""

    ticket: Ticket
    event: threading.Event

    def cancel(self) -> None:
        self.ticket.cancel()
        self.event.set()


def _hold(engine: Engine, halts: Callable[[int, TokenEvent], bool]) -> Engine:
    """Let the engine wait until a request is cancelled after an event for which `halts` is true. It is called
    with the number of the request, from 1.
    """
    start, numbers = engine.start, itertools.count(1)

    def start_held(request: Request, deliver: Deliver) -> Ticket:
        number, cancelled = next(numbers), threading.Event()

        def hold(item: TokenEvent | BaseException | None) -> None:
            deliver(item)
            if isinstance(item, TokenEvent) and halts(number, item):
                assert cancelled.wait(60)

        return _Cancelled(start(request, hold), cancelled)

    engine.start = start_held  # type: ignore[method-assign, assignment]
    return engine


def prefill_held(options: ModelOptions, listen: Listener, stop: threading.Event) -> Engine:
    """Load an engine that reads half of its first prompt, then waits until the request is cancelled."""

    def halts(number: int, event: TokenEvent) -> bool:
        progress = event.progress
        return number == 1 and progress is not None and progress.done >= progress.total / 2

    return _hold(load_with_log(options, listen, stop), halts)


def held_at_fiftieth(options: ModelOptions, listen: Listener, stop: threading.Event) -> Engine:
    """Load an engine that answers 49 requests, then waits in each one until it is cancelled."""
    return _hold(load_with_log(options, listen, stop), lambda number, event: number >= 50)
