"""The model of `model` for asyncio: the same methods, awaited."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Mapping,
)
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, Unpack

from dsmoe_local.api.errors import ParametersInErrors
from dsmoe_local.api.model import load_engine
from dsmoe_local.api.options import LoadOptions, ReplyOptions, Warn, warning_at_caller
from dsmoe_local.api.requests import (
    OF_ONE_REQUEST,
    Messages,
    Requests,
    Result,
    Running,
    check_stream,
    id_of,
    most_at_once,
)
from dsmoe_local.engine.interface import Deliver, Ticket
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelInfo, Request, TokenEvent
from dsmoe_local.protocol.replies import Reply


def open_model_async(model: str | Path, **options: Unpack[LoadOptions]) -> Opening:
    """Load a model in a child process, as `open_model` does. Use it as an async context manager, or await it
    and close the model.
    """
    return Opening(model, options, warning_at_caller())


class Opening:
    """A model that is loaded when this is awaited or entered."""

    def __init__(self, model: str | Path, options: LoadOptions, warn: Warn) -> None:
        self._name = model
        self._options = options
        self._warn = warn
        self._model: AsyncModel

    def __await__(self) -> Generator[Any, None, AsyncModel]:
        return self._load().__await__()

    async def __aenter__(self) -> AsyncModel:
        self._model = await self._load()
        return self._model

    async def __aexit__(self, *_: object) -> None:
        await self._model.close()

    async def _load(self) -> AsyncModel:
        stop = threading.Event()
        try:
            return await asyncio.to_thread(
                lambda: AsyncModel(load_engine(self._name, self._options, self._warn, stop))
            )
        except asyncio.CancelledError:
            stop.set()
            raise


class AsyncModel:
    """A loaded model whose methods are awaited; see Model. Cancelling a task cancels its request."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._close = weakref.finalize(self, engine.close)
        self._requests = Requests(engine)

    @property
    def info(self) -> ModelInfo:
        """What was loaded: name, context, placement and so on."""
        return self._engine.info

    async def chat(self, messages: Messages, **options: Unpack[ReplyOptions]) -> Reply:
        """Return the reply to a conversation, or to a single message given as text."""
        return await self._reply(self._requests.chat(messages, options))

    async def complete(self, prompt: str, **options: Unpack[ReplyOptions]) -> Reply:
        """Return the continuation of a text, without the chat template."""
        return await self._reply(self._requests.complete(prompt, options))

    def stream(self, messages: Messages, **options: Unpack[ReplyOptions]) -> AsyncStream:
        """Return an async iterator over the text of the reply to a conversation, as it is generated.

        Leaving the loop early cancels the reply.
        """
        return AsyncStream(
            self, self._engine, self._requests.chat(messages, options, "stream"), self._requests
        )

    async def batch(
        self, requests: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]]
    ) -> AsyncGenerator[Result, None]:
        """Answer many requests, several at once; see `Model.batch`. `requests` may be asynchronous, too."""
        finished: asyncio.Queue[Running | Result | None] = asyncio.Queue()
        put = _into(finished)
        room = asyncio.Semaphore(most_at_once(self._engine))
        running: dict[int, Running] = {}

        async def begin_all() -> None:
            index = -1
            async for line in _lines(requests):
                index += 1
                await room.acquire()
                try:
                    request = self._requests.line(line)
                    run = Running(index, line, self._requests.collector(request), put)
                    running[index] = run
                    run.ticket = await _start(self._engine, request, run.deliver)
                except OF_ONE_REQUEST as error:
                    running.pop(index, None)
                    finished.put_nowait(Result(index, id_of(index, line), line, error=error))
                except BaseException:
                    running.pop(index, None)
                    raise

        beginning = asyncio.create_task(begin_all())
        beginning.add_done_callback(lambda task: finished.put_nowait(None))
        try:
            while not beginning.done() or running or not finished.empty():
                item = await finished.get()
                if item is None:
                    continue
                if isinstance(item, Running):
                    del running[item.index]
                room.release()
                yield item.result() if isinstance(item, Running) else item
            await beginning
        finally:
            beginning.cancel()
            for run in running.values():
                run.cancel()

    def cancel(self) -> None:
        """Cancel all running requests. They raise InterruptedRunError, and streams end."""
        self._engine.cancel_all()

    async def close(self) -> None:
        """End all requests and the child process. May be called twice."""
        await asyncio.to_thread(self._close)

    async def _reply(self, request: Request) -> Reply:
        collector = self._requests.collector(request)
        events = _Events(self._engine, request)
        try:
            async for event in events:
                collector.add(event)
        finally:
            events.close()
        return collector.reply()


class AsyncStream(AsyncIterator[str]):
    """The text of a reply in pieces. `reply` is the whole reply after the last one.

    Closing or forgetting it cancels the reply.
    """

    def __init__(self, model: AsyncModel, engine: EngineClient, request: Request, requests: Requests) -> None:
        check_stream(request)
        self._model = model  # which would end the engine if it was forgotten
        self._collector = requests.collector(request)
        self._events = _Events(engine, request)

    async def __anext__(self) -> str:
        async for event in self._events:
            self._collector.add(event)
            if text := self._collector.new_text():
                return text
        raise StopAsyncIteration

    @property
    def reply(self) -> Reply:
        """The whole reply with its usage. Raises InterruptedRunError if it has not ended."""
        return self._collector.reply()

    async def aclose(self) -> None:
        """Cancel the reply if it is running."""
        self._events.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _Events(AsyncIterator[TokenEvent]):
    """The events of a request, which starts with the first call. Closing or forgetting this cancels it."""

    def __init__(self, engine: EngineClient, request: Request) -> None:
        self._engine = engine
        self._request = request
        self._events: asyncio.Queue[TokenEvent | BaseException | None] = asyncio.Queue()
        self._ticket: Ticket | None = None
        self._over = False

    async def __anext__(self) -> TokenEvent:
        if self._over:
            raise StopAsyncIteration
        try:
            if self._ticket is None:
                self._ticket = await _start(self._engine, self._request, _into(self._events))
            event = await self._events.get()
        except BaseException:
            self.close()
            raise
        if isinstance(event, TokenEvent):
            return event
        self._over = True
        if event is None:
            raise StopAsyncIteration
        with ParametersInErrors():
            raise event

    def close(self) -> None:
        """Cancel the request if it is running, and end the iteration."""
        self._over = True
        if self._ticket is not None:
            self._ticket.cancel()

    def __del__(self) -> None:
        self.close()


async def _start(engine: EngineClient, request: Request, deliver: Deliver) -> Ticket:
    """Start a request in a thread, since a load after a crash takes long. A cancelled task cancels both."""
    abandoned = threading.Event()

    @ParametersInErrors()
    def start() -> Ticket:
        ticket = engine.start(request, deliver)
        if abandoned.is_set():
            ticket.cancel()
        return ticket

    try:
        return await asyncio.to_thread(start)
    except asyncio.CancelledError:
        abandoned.set()
        engine.cancel(request.id)
        raise


def _into(items: asyncio.Queue[Any]) -> Callable[[Any], None]:
    """Return a function that puts an item into a queue from any thread."""
    loop = asyncio.get_running_loop()

    def put(item: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(items.put_nowait, item)

    return put


async def _lines(
    requests: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]],
) -> AsyncIterator[Mapping[str, Any]]:
    if isinstance(requests, AsyncIterable):
        async for line in requests:
            yield line
    else:
        for line in requests:
            yield line
