"""A request that the engine works on, seen from the event loop of the server."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from typing import TypeAlias, TypeVar

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.interface import ReloadableEngine, Ticket
from dsmoe_local.engine.types import ObserverOptions, Request, TokenEvent
from dsmoe_local.experts.activity import Activity, activity_of
from dsmoe_local.protocol.replies import Delta, ReplyBuilder

T = TypeVar("T")

OBSERVERS = (ObserverOptions("routing"),)
"""What `Generation.activity` needs."""
KILL_SECONDS = 10.0  # for the engine to end a cancelled request

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
    """One request, from its arrival to its end. All methods are called in the event loop.

    `first_seconds` is the time to the first token, once there is one. `builder` is set by `start`.
    """

    builder: ReplyBuilder

    def __init__(self, request: Request, mailbox: Mailbox) -> None:
        self.request = request
        self.first_seconds: float | None = None
        self._mailbox = mailbox
        self._loop = asyncio.get_running_loop()
        self._engine: ReloadableEngine | None = None
        self._executor: Executor | None = None
        self._earlier: asyncio.Future[Activity] | None = None  # the model's activity up to the first token
        self._ticket: Ticket | None = None
        self._kill_timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._ended = False
        self._error: BaseException | None = None
        self._cancelled: asyncio.Future[DsmoeError] = self._loop.create_future()  # its result is the reason

    async def wait_for(self, awaited: Awaitable[T]) -> T:
        """Return the result of `awaited`. If the request is cancelled first, cancel `awaited` and raise the
        reason.
        """
        future = asyncio.ensure_future(awaited)
        try:
            await asyncio.wait((future, self._cancelled), return_when=asyncio.FIRST_COMPLETED)
            self._check()
            return future.result()
        finally:
            future.cancel()

    async def start(self, engine: ReloadableEngine, lead: str, executor: Executor) -> None:
        """Pass the request to the engine. After a crash this waits until the model is loaded again.

        A request that is cancelled meanwhile does not stop that load: the next one would start it again.
        """
        self.builder = ReplyBuilder(self.request, lead)
        self._engine, self._executor = engine, executor
        starting = self._loop.run_in_executor(
            executor, engine.start, self.request, lambda item: self._mailbox.put(self._take, item)
        )
        starting.add_done_callback(self._started)
        await self.wait_for(asyncio.shield(starting))

    def cancel(self, reason: DsmoeError) -> None:
        """End the request, unless it has ended. What waits for it raises `reason`, without waiting for the
        engine.
        """
        if self._ended or self._cancelled.done():
            return
        self._cancelled.set_result(reason)
        self._changed.set()
        self._cancel_ticket()

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """Yield what is new, whenever something is; the list may be empty. Raises the error that ended the
        request.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._check()
            ended = self._ended
            found = self.builder.deltas()
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
            self._check()
        if self._error is not None:
            raise self._error

    async def activity(self) -> Activity:
        """Return the activity of the routed experts from the first token to now. It includes that of other
        replies of the model at the same time. Empty if the model is not observed, or has crashed.
        """
        if self._earlier is None:
            return Activity()
        earlier, now = await self._earlier, await self._observe()
        return now - earlier if now.follows(earlier) else Activity()

    def _observe(self) -> asyncio.Future[Activity]:
        assert self._engine is not None
        return self._loop.run_in_executor(self._executor, _observed, self._engine)

    def _check(self) -> None:
        if self._cancelled.done():
            raise self._cancelled.result()

    def _started(self, starting: asyncio.Future[Ticket]) -> None:
        if starting.cancelled() or starting.exception() is not None:
            return
        self._ticket = starting.result()
        if self._cancelled.done():
            self._cancel_ticket()

    def _cancel_ticket(self) -> None:
        """Cancel the request in the engine. Kill an engine that does not react, so that its slot is freed."""
        if self._ticket is not None and self._engine is not None and not self._ended:
            self._ticket.cancel()
            self._kill_timer = self._loop.call_later(KILL_SECONDS, self._engine.kill)

    def _take(self, item: Item) -> None:
        if isinstance(item, TokenEvent):
            self.builder.add(item)
            if self.first_seconds is None and item.token_id is not None:
                self.first_seconds = item.seconds
                if self._engine is not None and OBSERVERS[0] in self._engine.options.observers:
                    self._earlier = self._observe()
        else:
            self._ended = True
            self._error = _as_error(item)
            if self._kill_timer is not None:
                self._kill_timer.cancel()
        self._changed.set()


def _observed(engine: ReloadableEngine) -> Activity:
    try:
        return activity_of(engine.observe("routing"))
    except EngineError:
        return Activity()


def _as_error(item: BaseException | None) -> BaseException | None:
    if item is None or isinstance(item, DsmoeError):
        return item
    return EngineError(f"internal error: {type(item).__name__}: {item}")
