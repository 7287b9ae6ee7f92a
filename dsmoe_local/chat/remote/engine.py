"""A model on a server in place of an engine. The server knows the tokens, and keeps the KV cache."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from dsmoe_local.base import progress
from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat.remote.connection import CHECK_URL, Server, ServerError
from dsmoe_local.chat.remote.stream import CompletionStream
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.event_stream import EventStream
from dsmoe_local.engine.interface import Deliver, Ticket
from dsmoe_local.engine.types import (
    FinishReason,
    Message,
    ModelInfo,
    ModelOptions,
    Observation,
    ObserverOptions,
    Prompt,
    Request,
    SamplingParameters,
    TokenEvent,
    Tool,
    Tools,
)

_LAST_SECONDS = 2.0  # for the token counts after the finish reason
_NAMED = 6


class RemoteEngine:
    """A model on a server, as far as a chat needs it (see ReloadableEngine).

    Requests have messages, not token ids. Whatever needs the tokens, the KV cache or the weights raises
    EngineError.
    """

    def __init__(self, server: Server, model: str | None = None) -> None:
        """Raises ServerError if the server cannot be used, UsageError if it does not have the model, or if it
        has several and `model` does not name one.
        """
        self.server = server
        self.crashes = 0
        self.pid = 0
        self.alive = True
        self._numbers = itertools.count()
        self._running: dict[int, _Run] = {}
        self._choose(model)

    def _choose(self, name: str | None) -> None:
        entries = self._entries()
        chosen = name if name is not None else _only(entries)
        # An entry may have a tag, which requests can leave out: llama3:latest.
        entry = entries.get(chosen) or next(
            (each for key, each in entries.items() if key.startswith(f"{chosen}:")), None
        )
        if entry is None and entries:
            raise UsageError(f"the server has no model {safe_line(chosen, 60)!r}", remedy=_named(entries))
        n_context = (entry or {}).get("max_model_len")
        self.model = chosen
        self.options = ModelOptions(Path(chosen))
        self.info = ModelInfo(
            path=Path(chosen),
            name=safe_line(chosen, 80),
            architecture="",
            n_context=n_context if isinstance(n_context, int) else 0,
            n_context_trained=0,
            n_vocab=0,
            n_parameters=0,
            n_bytes=0,
            n_routed_experts=0,
            n_experts_per_token=0,
            n_choosable_experts=0,
            n_threads=0,
            template="that of the server",
            placement=self.server.url,
            server=self.server.url,
        )

    def models(self) -> tuple[str, ...]:
        """Return the names of the server's models. Raises ServerError."""
        return tuple(self._entries())

    def _entries(self) -> dict[str, dict[str, Any]]:
        found = self.server.get("/models")
        entries = found.get("data") if isinstance(found, dict) else None
        if not isinstance(entries, list):
            raise ServerError(
                "the server sends no list of models",
                where=f"{self.server.url}/models",
                remedy=CHECK_URL,
            )
        return {str(each["id"]): each for each in entries if isinstance(each, dict) and "id" in each}

    def submit(self, request: Request) -> Iterator[TokenEvent]:
        return EventStream(self.start, request)

    def start(self, request: Request, deliver: Deliver) -> Ticket:
        """See TextEngine: each request has a connection and a thread of its own."""
        number = next(self._numbers)
        run = _Run(self.server, request, request_body(request, self.model), deliver)
        self._running[number] = run

        def work() -> None:
            try:
                run.work()
            finally:
                del self._running[number]

        threading.Thread(target=work, name="dsmoe-server", daemon=True).start()
        return run

    def cancel(self, request_id: str) -> None:
        for run in list(self._running.values()):
            if run.request.id == request_id:
                run.cancel()

    def cancel_all(self) -> None:
        """See ReloadableEngine: the connections are closed."""
        for run in list(self._running.values()):
            run.cancel()

    def kill(self) -> None:
        self.cancel_all()

    def reload(
        self,
        options: ModelOptions,
        listen: progress.Listener = progress.ignore,
        stop: threading.Event | None = None,
    ) -> None:
        """Use the model of the server whose name is the path of `options`."""
        self._choose(str(options.path))

    def encode(
        self,
        prompt: Prompt,
        *,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: tuple[Tool, ...] = (),
    ) -> tuple[int, ...]:
        _refuse()

    def decode(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        _refuse()

    def detokenize(self, token_ids: Sequence[int]) -> str:
        _refuse()

    def save_cache(self, path: Path, token_ids: tuple[int, ...], start: int = 0) -> int:
        """See TextEngine: there is nothing to save."""
        return 0

    def load_cache(self, path: Path, token_ids: tuple[int, ...]) -> int:
        """See TextEngine: nothing can be loaded."""
        return 0

    def set_observers(self, options: tuple[ObserverOptions, ...]) -> None:
        _refuse()

    def observe(self, name: str) -> Observation:
        _refuse()

    def log(self) -> tuple[str, ...]:
        """See TextEngine: there is no log."""
        return ()

    def close(self) -> None:
        self.cancel_all()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Run:
    """One running request. `cancel` may be called from any thread, and from signal handlers."""

    def __init__(self, server: Server, request: Request, body: dict[str, Any], deliver: Deliver) -> None:
        self.request = request
        self._server = server
        self._body = body
        self._receiver = deliver
        self._socket: socket.socket | None = None
        self._is_over = False

    def cancel(self) -> None:
        """See Ticket. Does not wait for the server."""
        if self._is_over:
            return
        self._is_over = True
        self._receiver(TokenEvent(self.request.id, "", 0.0, finish_reason=FinishReason.CANCELLED))
        self._receiver(None)
        self._hang_up()

    def work(self) -> None:
        """Ask the server, and deliver the reply."""
        stream = CompletionStream(self.request, self._wait_less)
        try:
            with self._server.post_chat(self._body, self._connected) as response:
                is_stream = "event-stream" in response.headers.get("content-type", "event-stream")
                for event in stream.events(response) if is_stream else stream.whole(response):
                    self._deliver(event)
            self._deliver(None)
        except BaseException as error:  # noqa: BLE001 - raised again by the receiver
            self._deliver(
                error if isinstance(error, DsmoeError) else ServerError(f"internal error: {error!r}")
            )
        self._is_over = True

    def _deliver(self, item: TokenEvent | BaseException | None) -> None:
        if not self._is_over:
            self._receiver(item)

    def _connected(self, connection: socket.socket) -> None:
        self._socket = connection
        if self._is_over:
            self._hang_up()

    def _wait_less(self) -> None:
        if self._socket is not None:
            self._socket.settimeout(_LAST_SECONDS)

    def _hang_up(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # the server has closed it already
                self._socket.shutdown(socket.SHUT_RDWR)


def request_body(request: Request, model: str) -> dict[str, Any]:
    """Return the body of a streamed chat completion.

    Only settings that differ from their defaults are in it: for others, the server's defaults apply.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": [_message(item) for item in request.prompt if isinstance(item, Message)],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    for field in fields(SamplingParameters):
        value = getattr(request.sampling, field.name)
        if value != field.default:
            body[field.name] = value
    if request.max_tokens is not None:
        body["max_tokens"] = request.max_tokens
    if request.stop:
        body["stop"] = list(request.stop)
    if request.continue_final_message:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    if request.json_schema is not None:
        schema = {"name": "reply", "schema": json.loads(request.json_schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if request.reasoning_budget is not None:
        body["reasoning_budget"] = request.reasoning_budget
    if request.chat_template_kwargs:
        body["chat_template_kwargs"] = dict(request.chat_template_kwargs)
    if request.tools is not None:
        body |= _tools(request.tools)
    return body


def _message(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def _tools(tools: Tools) -> dict[str, Any]:
    functions = [
        {"name": tool.name, "description": tool.description, "parameters": tool.schema}
        for tool in tools.tools
    ]
    return {"tools": [{"type": "function", "function": function} for function in functions]}


def _only(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the model to use if none is named: the loaded one, or the only one. Raises UsageError."""
    loaded = [name for name, entry in entries.items() if entry.get("loaded") is True]
    names = loaded or list(entries)
    if not names or (len(names) > 1 and not loaded):
        raise UsageError("the model of the server must be named", remedy=_named(entries))
    return names[0]


def _named(entries: Mapping[str, object]) -> str:
    if not entries:
        return "dsmoe-chat --server URL MODEL"
    names = ", ".join(safe_line(name, 60) for name in list(entries)[:_NAMED])
    return f"it has: {names}{', …' if len(entries) > _NAMED else ''}"


def _refuse() -> NoReturn:
    raise EngineError("this needs the model on this computer, not on a server")
