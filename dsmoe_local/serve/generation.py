"""The requests that the engine works on for a client, seen from the event loop of the server."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import TypeAlias, TypeVar

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.interface import ReloadableEngine, Ticket
from dsmoe_local.engine.types import ObserverOptions, Request, TokenEvent
from dsmoe_local.experts.activity import Activity, activity_of
from dsmoe_local.protocol.replies import Delta, Reply, ReplyBuilder, joined_replies

T = TypeVar("T")

OBSERVERS = (ObserverOptions("routing"),)
"""What `Generation.activity` needs."""
KILL_SECONDS = 10.0  # for the engine to end a cancelled request; without a limit if it has workers
ACTIVITY_SECONDS = 2.0  # the longest that a finished reply waits for its activity

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
    """What a client has asked for, from its arrival to its end. All methods are called in the event loop.

    There are several requests if there are several prompts. `n` is the number of replies to all of them.
    `first_seconds` is the time to the first token, once there is one.
    """

    def __init__(self, requests: Sequence[Request], mailbox: Mailbox) -> None:
        self.n = sum(request.n for request in requests)
        self.first_seconds: float | None = None
        self._requests = tuple(requests)
        self._builders: list[ReplyBuilder] = []
        self._n_open = len(requests)
        self._mailbox = mailbox
        self._loop = asyncio.get_running_loop()
        self._engine: ReloadableEngine | None = None
        self._executor: Executor | None = None
        self._earlier: asyncio.Future[Activity] | None = None  # the model's activity up to the first token
        self._tickets: list[Ticket] = []
        self._kill_timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
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
        """Pass the requests to the engine. After a crash this waits until the model is loaded again.

        A request that is cancelled meanwhile does not stop that load: the next one would start it again.
        """
        self._builders = [ReplyBuilder(request, lead) for request in self._requests]
        self._engine, self._executor = engine, executor
        starting = self._loop.run_in_executor(executor, self._start_all, engine)
        starting.add_done_callback(self._started)
        await self.wait_for(asyncio.shield(starting))

    def _start_all(self, engine: ReloadableEngine) -> list[Ticket]:
        """Start all requests, or none. Runs in a thread."""
        tickets: list[Ticket] = []
        try:
            for request, builder in zip(self._requests, self._builders, strict=True):
                take = partial(self._take, builder)
                tickets.append(engine.start(request, partial(self._mailbox.put, take)))
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return tickets

    def cancel(self, reason: DsmoeError) -> None:
        """End the requests. What waits for them, or for their activity, raises `reason`, without waiting for
        the engine.
        """
        if self._cancelled.done():
            return
        self._cancelled.set_result(reason)
        self._changed.set()
        self._cancel_tickets()

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """Yield what is new, whenever something is; the list may be empty. Raises the error that ended a
        request.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._check()
            ended = not self._n_open
            found = self._new_deltas()
            if found or not ended or self._error is None:
                yield found
            if ended and self._error is not None:
                raise self._error
            if ended:
                return

    def _new_deltas(self) -> list[Delta]:
        """Return what is new. Replies to the second prompt have indices after those to the first one."""
        found: list[Delta] = []
        offset = 0
        for request, builder in zip(self._requests, self._builders, strict=True):
            found += [replace(delta, index=offset + delta.index) for delta in builder.deltas()]
            offset += request.n
        return found

    def reply(self, model: str) -> Reply:
        """Return the replies of the model with this name, after the end."""
        replies = []
        for builder in self._builders:
            reply = builder.reply(model)
            # A cancelled request has raised the reason before.
            assert reply is not None
            replies.append(reply)
        return joined_replies(replies)

    async def finish(self) -> None:
        """Wait for the end of the requests. Raises the error that ended one of them."""
        while self._n_open:
            await self._changed.wait()
            self._changed.clear()
            self._check()
        if self._error is not None:
            raise self._error

    async def activity(self) -> Activity:
        """Return the activity of the routed experts from the first token to now. It includes that of other
        replies of the model at the same time. Empty if the model is not observed, has crashed, or does not
        answer within ACTIVITY_SECONDS.
        """
        if self._earlier is None:
            return Activity()
        try:
            async with asyncio.timeout(ACTIVITY_SECONDS):
                earlier, now = await self._earlier, await self._observe()
        except TimeoutError:
            return Activity()
        return now - earlier if now.follows(earlier) else Activity()

    def _observe(self) -> asyncio.Future[Activity]:
        assert self._engine is not None
        return self._loop.run_in_executor(self._executor, _observed, self._engine)

    def _check(self) -> None:
        if self._cancelled.done():
            raise self._cancelled.result()

    def _started(self, starting: asyncio.Future[list[Ticket]]) -> None:
        if starting.cancelled() or starting.exception() is not None:
            return
        self._tickets = starting.result()
        if self._cancelled.done() or self._error is not None:
            self._cancel_tickets()

    def _cancel_tickets(self) -> None:
        """Cancel the requests in the engine. Kill an engine that does not react, so that slots are freed.

        An engine with workers is not killed here: it ends a request between two steps only, and a step may
        take minutes. Its client ends it if it hangs.
        """
        if self._tickets and self._engine is not None and self._n_open and self._kill_timer is None:
            for ticket in self._tickets:
                ticket.cancel()
            if not self._engine.options.workers:
                self._kill_timer = self._loop.call_later(KILL_SECONDS, self._engine.kill)

    def _take(self, builder: ReplyBuilder, item: Item) -> None:
        if isinstance(item, TokenEvent):
            builder.add(item)
            if self.first_seconds is None and item.token_id is not None:
                self.first_seconds = item.seconds
                if self._engine is not None and OBSERVERS[0] in self._engine.options.observers:
                    self._earlier = self._observe()
        else:
            self._n_open -= 1
            if self._error is None and item is not None:
                # A reply to some of the prompts would be useless.
                self._error = _as_error(item)
                self._cancel_tickets()
            if not self._n_open and self._kill_timer is not None:
                self._kill_timer.cancel()
        self._changed.set()


def _observed(engine: ReloadableEngine) -> Activity:
    try:
        return activity_of(engine.observe("routing"))
    except EngineError:
        return Activity()


def _as_error(item: BaseException) -> BaseException:
    if isinstance(item, DsmoeError):
        return item
    return EngineError(f"internal error: {type(item).__name__}: {item}")
