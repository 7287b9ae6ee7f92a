"""The response to a request for replies, which are generated while it is sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

import msgspec
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.text import count, safe_line
from dsmoe_local.engine.types import Request
from dsmoe_local.protocol.errors import describe
from dsmoe_local.protocol.replies import Reply
from dsmoe_local.protocol.writers import Event, ReplyWriter
from dsmoe_local.serve.errors import error_object, error_response, hung_up, status_of
from dsmoe_local.serve.generation import Generation
from dsmoe_local.serve.state import LastExperts, ServerState

_encode = msgspec.json.Encoder().encode


class ReplyResponse:
    """An ASGI application that generates the replies to a client's prompts and sends them."""

    def __init__(
        self,
        state: ServerState,
        model: str,
        requests: Sequence[Request],
        writer: ReplyWriter,
        headers: Mapping[str, str],
        *,
        stream: bool,
    ) -> None:
        self._state = state
        self._model = model
        self._requests = requests
        self._writer = writer
        self._headers = dict(headers)
        self._stream = stream
        self._began = time.perf_counter()
        self._sent_start = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate the reply and send it. An error before the first token becomes a status, a later one an
        event of the stream.
        """
        status, reply = 200, None
        try:
            generation = Generation(self._requests, self._state.mailbox)
            async with _hang_ups(receive, generation), self._state.admitted(self._model, generation):
                if self._stream:
                    reply = await self._send_stream(generation, send)
                else:
                    reply = await self._send_whole(generation, scope, receive, send)
                self._state.metrics.count_reply(reply, generation.first_seconds)
        except DsmoeError as error:
            status = status_of(error)
            if self._sent_start:
                failure = self._writer.failure(error_object(error, scope["path"]))
                await send({"type": "http.response.body", "body": _encoded([failure])})
            else:
                await error_response(error, scope["path"])(scope, receive, send)
            self._state.log(f"{scope['path']}: {safe_line(describe(error)[1], 200)}")
        self._state.metrics.count_request(status)
        self._state.log(self._line(scope["path"], status, reply))

    async def _send_whole(self, generation: Generation, scope: Scope, receive: Receive, send: Send) -> Reply:
        await generation.finish()
        reply = await self._whole_reply(generation)
        await JSONResponse(self._writer.whole(reply), headers=self._headers)(scope, receive, send)
        return reply

    async def _send_stream(self, generation: Generation, send: Send) -> Reply:
        async for deltas in generation.deltas():
            if not self._sent_start:
                await self._start_stream(send)
            body = _encoded(event for delta in deltas for event in self._writer.events(delta))
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
        reply = await self._whole_reply(generation)
        await send(
            {"type": "http.response.body", "body": _encoded(self._writer.end(reply)) + self._writer.done}
        )
        return reply

    async def _whole_reply(self, generation: Generation) -> Reply:
        reply = generation.reply(self._model)
        if self._state.options.experts:
            # Before the end of the response: the client may ask for the experts right after it.
            activity = await generation.wait_for(generation.activity())
            self._state.last_experts = LastExperts(reply.id, reply.model, reply.n_completion_tokens, activity)
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
        return ", ".join(parts)


def _encoded(events: Iterable[Event]) -> bytes:
    """Return server-sent events as bytes."""
    return b"".join(
        (b"event: %b\n" % name.encode() if name else b"") + b"data: " + _encode(data) + b"\n\n"
        for name, data in events
    )


@asynccontextmanager
async def _hang_ups(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """Cancel the request if the client closes the connection before the block ends."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.cancel(hung_up())

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
