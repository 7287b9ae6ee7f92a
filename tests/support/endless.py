"""Replies that go on until a test has done something, however long the test is held up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from dsmoe_local.engine.event_stream import EventStream
from dsmoe_local.engine.interface import Deliver, TextEngine, Ticket
from dsmoe_local.engine.types import Request, TokenEvent

ENDLESS: dict[str, Any] = {"context_shift": True, "logit_bias": ((1, -100.0),)}
"""Fields of a request to one of our tiny models, whose token 1 ends replies: only `cancel` ends this one."""


def held(
    engine: TextEngine, request: Request, halts: Callable[[TokenEvent], bool], go: threading.Event
) -> Iterator[TokenEvent]:
    """Start a request. The thread of the engine waits for `go` after each event for which `halts` is true."""

    def start(request: Request, deliver: Deliver) -> Ticket:
        def hold(item: TokenEvent | BaseException | None) -> None:
            deliver(item)
            if isinstance(item, TokenEvent) and halts(item):
                assert go.wait(60)

        return engine.start(request, hold)

    return EventStream(start, request)
