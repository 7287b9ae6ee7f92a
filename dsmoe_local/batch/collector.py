"""Collect the events of a line's request. `deliver` runs in the engine's thread and must be fast."""

from __future__ import annotations

from collections.abc import Callable

from dsmoe_local.batch.lines import Line
from dsmoe_local.engine.types import TokenEvent
from dsmoe_local.protocol.replies import ReplyBuilder


class Collector:
    """Collects the events of one request in `builder`. `finished` is called once, after the last event.

    `line` is the input line of `task`. `alone`: no other request runs at the same time. `n_events` counts the
    steps of the request.
    """

    def __init__(
        self,
        task: int,
        line: Line,
        builder: ReplyBuilder,
        finished: Callable[[Collector], None],
        *,
        alone: bool = False,
    ) -> None:
        self.task = task
        self.line = line
        self.builder = builder
        self.alone = alone
        self.n_events = 0
        self.error: BaseException | None = None
        self._finished = finished

    def deliver(self, event: TokenEvent | BaseException | None) -> None:
        """Add an event; None or an exception ends the request."""
        self.n_events += 1
        if isinstance(event, TokenEvent):
            self.builder.add(event)
        else:
            self.error = event
            self._finished(self)
