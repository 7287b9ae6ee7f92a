"""A model for scripts: replies, streams and batches of one engine in a child process."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, Unpack

from dsmoe_local.api.errors import ParametersInErrors
from dsmoe_local.api.options import LoadOptions, ReplyOptions, Warn, model_options, warning_at_caller
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
from dsmoe_local.base import progress
from dsmoe_local.engine.event_stream import EventStream
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelInfo, Request
from dsmoe_local.model.discovery import note_use
from dsmoe_local.protocol.replies import Reply


def open_model(model: str | Path, **options: Unpack[LoadOptions]) -> Model:
    """Load a model in a child process. `model` is a GGUF file, or a name that `dsmoe models` lists.

    Use it as a context manager, or call `close`. Raises UsageError, FileError or FormatError if there is no
    such model or it cannot be used, EngineError if it cannot be loaded, TypeError for an unknown option.
    """
    return Model(load_engine(model, options, warning_at_caller()))


@ParametersInErrors()
def load_engine(
    model: str | Path, options: LoadOptions, warn: Warn, stop: threading.Event | None = None
) -> EngineClient:
    """Load an engine, and remember the model as a recent one. Raises as `open_model` does.

    Also raises InterruptedRunError once `stop` is set.
    """
    given: dict[str, Any] = {**options}
    log_file = given.pop("log_file", None)
    chosen = model_options(model, given, warn)
    engine = EngineClient.load(
        chosen, progress.ignore, stop, log_file=None if log_file is None else Path(log_file)
    )
    note_use(chosen.path)
    return engine


class Model:
    """A loaded model. All methods may be called from any thread; replies are decoded together.

    If the engine crashes, running requests raise EngineCrashError, and the next one loads the model again.
    Requests raise PromptError for a prompt that does not fit into the context, and UsageError or RequestError
    for a value that is not valid. All of these are DsmoeErrors.
    """

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        # Also called when the model is forgotten, or the program ends.
        self._close = weakref.finalize(self, engine.close)
        self._requests = Requests(engine)

    @property
    def info(self) -> ModelInfo:
        """What was loaded: name, context, placement and so on."""
        return self._engine.info

    def chat(self, messages: Messages, **options: Unpack[ReplyOptions]) -> Reply:
        """Return the reply to a conversation, or to a single message given as text."""
        return self._reply(self._requests.chat(messages, options))

    def complete(self, prompt: str, **options: Unpack[ReplyOptions]) -> Reply:
        """Return the continuation of a text, without the chat template."""
        return self._reply(self._requests.complete(prompt, options))

    def stream(self, messages: Messages, **options: Unpack[ReplyOptions]) -> Stream:
        """Return an iterator over the text of the reply to a conversation, as it is generated.

        Leaving the loop early cancels the reply.
        """
        return Stream(self, self._engine, self._requests.chat(messages, options, "stream"), self._requests)

    def batch(self, requests: Iterable[Mapping[str, Any]]) -> Generator[Result, None, None]:
        """Answer many requests, several at once. Yields results as they finish, not in order.

        A request has `messages` or `prompt`, and may have options and an `id`. It may also be a line of
        OpenAI's batch API. Requests are taken as they are needed. If one fails, its result has an `error`.
        Leaving the loop early cancels the others.
        """
        finished: queue.SimpleQueue[Running] = queue.SimpleQueue()
        running: dict[int, Running] = {}
        lines = enumerate(requests)
        more = True
        try:
            while more or running:
                while more and len(running) < most_at_once(self._engine):
                    index, line = next(lines, (-1, {}))
                    if index < 0:
                        more = False
                        break
                    try:
                        request = self._requests.line(line)
                        run = Running(index, line, self._requests.collector(request), finished.put)
                        run.ticket = self._engine.start(request, run.deliver)
                    except OF_ONE_REQUEST as error:
                        yield Result(index, id_of(index, line), line, error=error)
                    else:
                        running[index] = run
                if running:
                    run = finished.get()
                    del running[run.index]
                    yield run.result()
        finally:
            for run in running.values():
                run.cancel()

    def cancel(self) -> None:
        """Cancel all running requests. They raise InterruptedRunError, and streams end."""
        self._engine.cancel_all()

    def close(self) -> None:
        """End all requests and the child process. May be called twice."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @ParametersInErrors()
    def _reply(self, request: Request) -> Reply:
        collector = self._requests.collector(request)
        for event in self._engine.submit(request):
            collector.add(event)
        return collector.reply()


class Stream(Iterator[str]):
    """The text of a reply in pieces. `reply` is the whole reply after the last one.

    Closing or forgetting it cancels the reply.
    """

    @ParametersInErrors()
    def __init__(self, model: Model, engine: EngineClient, request: Request, requests: Requests) -> None:
        check_stream(request)
        self._model = model  # which would end the engine if it was forgotten
        self._collector = requests.collector(request)
        self._events = EventStream(engine.start, request)

    @ParametersInErrors()
    def __next__(self) -> str:
        for event in self._events:
            self._collector.add(event)
            if text := self._collector.new_text():
                return text
        raise StopIteration

    @property
    def reply(self) -> Reply:
        """The whole reply with its usage. Raises InterruptedRunError if it has not ended."""
        return self._collector.reply()

    def close(self) -> None:
        """Cancel the reply if it is running."""
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
