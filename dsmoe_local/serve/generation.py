"""A request that the engine works on, seen from the event loop of the server."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import TypeAlias

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.interface import TextEngine, Ticket
from dsmoe_local.engine.types import Request, TokenEvent
from dsmoe_local.protocol.replies import Delta, ReplyBuilder

Item: TypeAlias = TokenEvent | BaseException | None
"""What an engine delivers: see `engine.interface.Deliver`."""


class Mailbox:
    """Hands items of the engine's thread to the event loop. Wakes it once for all items of a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[Callable[[Item], None], Item]] = deque()
        self._is_waking = False

    def put(self, take: Callable[[Item], None], item: Item) -> None:
        """Let the event loop call `take(item)`. Called in the engine's thread."""
        self._items.append((take, item))
        if not self._is_waking:
            self._is_waking = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                # The server has ended and its loop is closed. Nobody waits for the reply.
                self._items.clear()

    def _deliver(self) -> None:
        # Reset first: an item that is added from now on wakes the loop again.
        self._is_waking = False
        while self._items:
            take, item = self._items.popleft()
            take(item)


class Generation:
    """One request. `seconds` is the time limit; all methods are called in the event loop.

    `first_seconds` is the time to the first token, once there is one.
    """

    def __init__(self, engine: TextEngine, request: Request, builder: ReplyBuilder, mailbox: Mailbox) -> None:
        self.request = request
        self.builder = builder
        self.first_seconds: float | None = None
        self._engine = engine
        self._mailbox = mailbox
        self._ticket: Ticket | None = None
        self._changed = asyncio.Event()
        self._ended = False
        self._cancelled = False
        self._error: BaseException | None = None

    async def start(self, executor: Executor) -> None:
        """Pass the request to the engine. After a crash this waits until the model is loaded again."""
        loop = asyncio.get_running_loop()
        self._ticket = await loop.run_in_executor(
            executor, self._engine.start, self.request, lambda item: self._mailbox.put(self._take, item)
        )
        if self._cancelled:
            self._ticket.cancel()

    def cancel(self, reason: DsmoeError | None = None) -> None:
        """End the request. `deltas` then raises `reason`, if there is one."""
        self._error = self._error or reason
        self._cancelled = True
        if self._ticket is None:
            self._engine.cancel(self.request.id)
        elif not self._ended:
            self._ticket.cancel()

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """Yield what is new, whenever something is; the list may be empty. Raises the error that ended the
        request.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            ended = self._ended
            if self._cancelled and not ended:
                continue  # the rest of the reply is of no use
            found = [] if self._cancelled else self.builder.deltas()
            if found or not ended or self._error is None:
                yield found
            if ended and self._error is not None:
                raise self._error
            if ended:
                return

    async def finish(self) -> None:
        """Wait for the end of the request. Raises the error that ended it."""
        while not self._ended:
            await self._changed.wait()
            self._changed.clear()
        if self._error is not None:
            raise self._error

    def _take(self, item: Item) -> None:
        if isinstance(item, TokenEvent):
            self.builder.add(item)
            if self.first_seconds is None and item.token_id is not None:
                self.first_seconds = item.seconds
        else:
            self._ended = True
            self._error = self._error or _as_error(item)
        self._changed.set()


def _as_error(item: BaseException | None) -> BaseException | None:
    if item is None or isinstance(item, DsmoeError):
        return item
    return EngineError(f"internal error: {type(item).__name__}: {item}")
