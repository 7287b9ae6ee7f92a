"""Read the body of a request, within limits of size and time."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.strict_json import strict_object
from dsmoe_local.serve.errors import ServeError, too_slow
from dsmoe_local.serve.options import ServeOptions

_LARGE = 256 << 10  # bytes that take milliseconds to parse
_MAX_DROPPED = 64 << 20  # bytes


async def read_object(request: Request, options: ServeOptions) -> dict[str, Any]:
    """Return the JSON object in the body. Raises ServeError, RequestError, ClientDisconnect."""
    content_type = request.headers.get("content-type", "json")
    if "json" not in content_type.lower():
        raise ServeError(
            415,
            "not_json",
            f"the content-type is {safe_line(content_type, 60)!r}, which web pages of any site can send",
            remedy="send the header content-type: application/json "
            "(curl: -H 'content-type: application/json')",
        )
    raw = await _read(request, options)
    if not raw.strip():
        raise RequestError("the body is empty", remedy="send a JSON object")
    if len(raw) > _LARGE:
        # Other requests go on meanwhile.
        return await asyncio.to_thread(strict_object, raw)
    return strict_object(raw)


async def _read(request: Request, options: ServeOptions) -> bytes:
    """Return the body. Raises ServeError as soon as it turns out to be too large or too slow."""
    limit = options.max_body
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    n_bytes = 0
    try:
        async with asyncio.timeout(options.body_seconds):
            async for part in request.stream():
                n_bytes += len(part)
                if n_bytes > limit:
                    raise _too_large(limit)
                parts.append(part)
    except TimeoutError:
        raise too_slow(f"the body did not arrive within {options.body_seconds:g} seconds") from None
    return b"".join(parts)


def _too_large(limit: int) -> ServeError:
    # The body may not be read to its end: the connection cannot be used again.
    return ServeError(
        413,
        "body_too_large",
        f"the body is larger than {format_size(limit)}",
        headers={"connection": "close"},
    )


class BodyReader:
    """Reads and drops what is left of a request's body before the response to it begins.

    Most clients read the response only after they have sent everything, and closing a connection with data
    that was not read resets it: the client would not see why it was refused.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self._app = app
        self._seconds = options.body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        # A client that expects 100-continue waits for a word before it sends the body.
        is_read = scope["type"] != "http" or "expect" in Headers(scope=scope)

        async def receive_part() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or not message.get("more_body", False)
            return message

        async def send_after_body(message: Message) -> None:
            nonlocal is_read
            if not is_read:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._seconds):
                        n_bytes = 0
                        while not is_read and n_bytes < _MAX_DROPPED:
                            n_bytes += len((await receive_part()).get("body", b""))
                is_read = True
            await send(message)

        await self._app(scope, receive_part, send_after_body)
