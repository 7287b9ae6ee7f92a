"""An iterator over the events of a request, which every engine's `submit` returns."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

from dsmoe_local.engine.interface import Deliver, Ticket
from dsmoe_local.engine.types import Request, TokenEvent


class EventStream(Iterator[TokenEvent]):
    """Starts a request and iterates over its events. Closing or deleting the iterator cancels the request."""

    def __init__(self, start: Callable[[Request, Deliver], Ticket], request: Request) -> None:
        self._events: queue.SimpleQueue[TokenEvent | BaseException | None] = queue.SimpleQueue()
        self._ticket: Ticket | None = None
        self._over = False
        self._ticket = start(request, self._events.put)

    def __next__(self) -> TokenEvent:
        if self._over:
            raise StopIteration
        try:
            event = self._events.get()
        except BaseException:
            self.close()
            raise
        if isinstance(event, TokenEvent):
            return event
        self._over = True
        if event is None:
            raise StopIteration
        raise event

    def close(self) -> None:
        """Cancel the request if it is running, and end the iteration."""
        self._over = True
        if self._ticket is not None:
            self._ticket.cancel()

    def __del__(self) -> None:
        self.close()
