"""What the sync and the async model share: requests from arguments, and replies from events."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from dsmoe_local.api.errors import use_parameters
from dsmoe_local.api.options import check_names
from dsmoe_local.base.errors import DsmoeError, InterruptedRunError, UsageError
from dsmoe_local.engine.errors import EngineCrashError, NativeError, PromptError, TemplateError
from dsmoe_local.engine.interface import TextEngine, Ticket
from dsmoe_local.engine.types import Request, SamplingParameters, TokenEvent
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.fields import HONOURED
from dsmoe_local.protocol.replies import Reply, ReplyBuilder, reply_lead
from dsmoe_local.protocol.requests import RequestDefaults, read_request

Messages: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A conversation as OpenAI has it, {"role": …, "content": …} each; a text is one message of the user."""

OF_ONE_REQUEST = (RequestError, UsageError, PromptError, TemplateError, EngineCrashError, NativeError)
"""Errors that end one request of a batch; others end the batch."""

_NAMES = HONOURED.keys() - {"prompt", "messages"}
_ID_FIELDS = ("custom_id", "id")


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a request in a batch: a `reply`, or the `error` that ended it.

    `index` counts the requests from 0, `id` is that of the request or its index, `request` is as it was
    given.
    """

    index: int
    id: str
    request: Mapping[str, Any]
    reply: Reply | None = None
    error: DsmoeError | None = None

    def __post_init__(self) -> None:
        if self.error is not None:
            use_parameters(self.error)


class Requests:
    """Makes requests for one model, and replies of their events. Callable from any thread."""

    def __init__(self, engine: TextEngine) -> None:
        self._engine = engine
        self._lead = reply_lead(engine)
        self._numbers = itertools.count()

    def chat(self, messages: Messages, options: Mapping[str, Any], function: str = "chat") -> Request:
        """Return the request for the next message of a conversation."""
        check_names(options, _NAMES, function)
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self._read({"messages": [dict(message) for message in messages], **options})

    def complete(self, prompt: str, options: Mapping[str, Any]) -> Request:
        """Return the request for the continuation of a text."""
        check_names(options, _NAMES, "complete")
        return self._read({"prompt": prompt, **options})

    def line(self, line: Mapping[str, Any]) -> Request:
        """Return the request in a line of a batch. Unknown fields are the caller's own data."""
        if not isinstance(line, Mapping):
            raise RequestError("a request of a batch is not a mapping")
        body = line.get("body")
        return self._read(body if isinstance(body, Mapping) else line)

    def collector(self, request: Request) -> Collector:
        """Return what collects the events of a request."""
        return Collector(request, self._lead, self._engine.info.name)

    def _read(self, body: Mapping[str, Any]) -> Request:
        chat = body.get("messages") is not None
        if chat == (body.get("prompt") is not None):
            raise RequestError("a request takes either messages or prompt")
        defaults = RequestDefaults(SamplingParameters())
        plain = {key: _as_json(value) for key, value in body.items()}
        return read_request(f"api-{next(self._numbers)}", plain, defaults, chat=chat)


def _as_json(value: object) -> object:
    """Return a value as JSON has it: lists for tuples, and texts for the token ids of `logit_bias`."""
    if isinstance(value, tuple):
        return list(value)
    return {str(key): each for key, each in value.items()} if isinstance(value, Mapping) else value


class Collector:
    """Collects the events of a request into its reply."""

    def __init__(self, request: Request, lead: str, model: str) -> None:
        self._builder = ReplyBuilder(request, lead)
        self._model = model

    def add(self, event: TokenEvent) -> None:
        """Add an event."""
        self._builder.add(event)

    def new_text(self) -> str:
        """Return what the answer has gained since the last call."""
        return "".join(delta.text for delta in self._builder.deltas())

    def reply(self) -> Reply:
        """Return the reply after the last event. Raises InterruptedRunError if it was cancelled."""
        reply = self._builder.reply(self._model)
        if reply is None:
            raise InterruptedRunError("the request was cancelled")
        return reply


class Running:
    """A running request of a batch. `finished` is called with it once, in the engine's thread, at its end."""

    def __init__(
        self, index: int, line: Mapping[str, Any], collector: Collector, finished: Callable[[Running], None]
    ) -> None:
        self.index = index
        self.ticket: Ticket | None = None
        self._line = line
        self._collector = collector
        self._finished = finished
        self._error: BaseException | None = None

    def deliver(self, event: TokenEvent | BaseException | None) -> None:
        """Add an event; None or an exception ends the request."""
        if isinstance(event, TokenEvent):
            self._collector.add(event)
        else:
            self._error = event
            self._finished(self)

    def cancel(self) -> None:
        """End the request."""
        if self.ticket is not None:
            self.ticket.cancel()

    def result(self) -> Result:
        """Return the result. Raises the error if it is not one of this request alone."""
        if self._error is not None and not isinstance(self._error, OF_ONE_REQUEST):
            raise self._error
        name = id_of(self.index, self._line)
        if self._error is not None:
            return Result(self.index, name, self._line, error=self._error)
        try:
            return Result(self.index, name, self._line, self._collector.reply())
        except InterruptedRunError as error:
            return Result(self.index, name, self._line, error=error)


def check_stream(request: Request) -> None:
    """Raise UsageError for a request of which pieces would be mixed."""
    if request.n > 1:
        raise UsageError("a stream has one reply", remedy="use chat with n, or several streams at once")


def id_of(index: int, line: Mapping[str, Any]) -> str:
    """Return the id of a line of a batch, or its index."""
    names = _ID_FIELDS if isinstance(line, Mapping) else ()
    found = (line[name] for name in names if isinstance(line.get(name), str | int))
    return str(next(found, index))


def most_at_once(engine: TextEngine) -> int:
    """Return how many requests of a batch to start: some wait in the engine, so that it never idles."""
    return engine.info.n_parallel + 2
