"""/v1/chat/completions and /v1/completions, streamed or not."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.text import count, safe_line
from dsmoe_local.engine.types import Request
from dsmoe_local.protocol.chunks import ChunkWriter
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.replies import Reply
from dsmoe_local.protocol.requests import check_endpoint, read_request, unknown_fields
from dsmoe_local.protocol.responses import response_body
from dsmoe_local.protocol.values import flag
from dsmoe_local.serve.bodies import read_object
from dsmoe_local.serve.errors import error_object, error_response, status_of
from dsmoe_local.serve.generation import Generation
from dsmoe_local.serve.state import ServerState

_encode = msgspec.json.Encoder().encode


async def complete(http: HttpRequest) -> Completion:
    """Handle both endpoints: read the request, and return the response that will generate the reply."""
    state: ServerState = http.app.state.server
    body = await read_object(http, state.options)
    state.log_body(body)
    model = await state.models.resolve(body.get("model"))
    chat = check_endpoint(http.url.path, body)
    name = uuid.uuid4().hex
    request = read_request(name, body, state.options.defaults, chat=chat)
    headers = {}
    if unknown := unknown_fields(body):
        names = ", ".join(safe_line(field, 40).encode("ascii", "replace").decode() for field in unknown[:8])
        headers["warning"] = f'199 - "unknown fields are ignored: {names.replace(chr(34), "?")}"'
    return Completion(state, model, request, _stream_options(body), headers, chat=chat)


@dataclass(frozen=True, slots=True)
class Streaming:
    """How to stream a reply. `usage`: send the token counts as the last chunk."""

    usage: bool


def _stream_options(body: Mapping[str, Any]) -> Streaming | None:
    """Return how to stream; None if the reply is sent as a whole. Raises RequestError."""
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise RequestError("stream_options is not an object", param="stream_options")
    if not flag("stream", body.get("stream") or False):
        if options:
            raise RequestError("stream_options is for stream: true", param="stream_options")
        return None
    return Streaming(flag("stream_options.include_usage", (options or {}).get("include_usage") or False))


class Completion:
    """The response to one request: an ASGI application. The reply is generated while it is sent."""

    def __init__(
        self,
        state: ServerState,
        model: str,
        request: Request,
        streaming: Streaming | None,
        headers: Mapping[str, str],
        *,
        chat: bool,
    ) -> None:
        self._state = state
        self._model = model
        self._request = request
        self._streaming = streaming
        self._headers = dict(headers)
        self._chat = chat
        self._began = time.perf_counter()
        self._sent_start = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate the reply and send it. An error before the first token becomes a status, a later one an
        event of the stream.
        """
        status, reply = 200, None
        try:
            async with self._state.admitted(self._model, self._request) as generation:
                hang_up = asyncio.create_task(_on_hang_up(receive, generation.cancel))
                try:
                    await generation.start(self._state.executor)
                    if self._streaming is None:
                        reply = await self._send_whole(generation, scope, receive, send)
                    else:
                        reply = await self._send_stream(generation, self._streaming, send)
                finally:
                    hang_up.cancel()
                if reply is not None:
                    self._state.metrics.count_reply(reply, generation.first_seconds)
        except DsmoeError as error:
            status = status_of(error)
            if self._sent_start:
                await send({"type": "http.response.body", "body": _event(error_object(error))})
            else:
                await error_response(error)(scope, receive, send)
            self._state.log(f"{scope['path']}: {safe_line(str(error), 200)}")
        self._state.metrics.count_request(status)
        self._state.log(self._line(scope["path"], status, reply))

    async def _send_whole(
        self, generation: Generation, scope: Scope, receive: Receive, send: Send
    ) -> Reply | None:
        await generation.finish()
        reply = generation.builder.reply(self._model)
        if reply is not None:  # otherwise the client has gone
            body = response_body(reply, self._request.id)
            await JSONResponse(body, headers=self._headers)(scope, receive, send)
        return reply

    async def _send_stream(self, generation: Generation, streaming: Streaming, send: Send) -> Reply | None:
        writer = ChunkWriter(
            self._request.id,
            self._model,
            chat=self._chat,
            usage=streaming.usage,
            logprobs=self._request.logprobs,
        )
        async for deltas in generation.deltas():
            if not self._sent_start:
                await self._start_stream(send)
            events = [_event(chunk) for delta in deltas for chunk in writer.chunks(delta)]
            if events:
                await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
        reply = generation.builder.reply(self._model)
        last = writer.last(reply) if reply is not None else None
        end = (_event(last) if last else b"") + b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": end})
        return reply

    async def _start_stream(self, send: Send) -> None:
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would collect the events
            **self._headers,
        }
        pairs = [(key.encode(), value.encode()) for key, value in headers.items()]
        self._sent_start = True
        await send({"type": "http.response.start", "status": 200, "headers": pairs})

    def _line(self, path: str, status: int, reply: Reply | None) -> str:
        """Return the line of the log."""
        parts = [f"{path} {status}", f"{time.perf_counter() - self._began:.2f} s"]
        if reply is not None:
            parts.append(f"{count(reply.n_prompt_tokens, 'prompt token')}, {reply.n_cached_tokens:,} cached")
            parts.append(f"{reply.n_completion_tokens:,} generated")
        elif status == 200:
            parts.append("the client hung up")
        return ", ".join(parts)


def _event(value: object) -> bytes:
    """Return a server-sent event."""
    return b"data: " + _encode(value) + b"\n\n"


async def _on_hang_up(receive: Receive, call: Callable[[], None]) -> None:
    """Call a function when the client closes the connection."""
    with suppress(asyncio.CancelledError):
        while (await receive())["type"] != "http.disconnect":
            pass
        call()
