"""Read the body of a request, within limits of size and time."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request

from dsmoe_local.base.sizes import format_size
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.strict_json import strict_object
from dsmoe_local.serve.errors import ServeError, too_slow
from dsmoe_local.serve.options import ServeOptions

_LARGE = 256 << 10  # bytes that take milliseconds to parse
_MAX_DROPPED = 64 << 20  # bytes


async def read_object(request: Request, options: ServeOptions) -> dict[str, Any]:
    """Return the JSON object in the body. Raises ServeError, RequestError, ClientDisconnect."""
    if "json" not in request.headers.get("content-type", "json").lower():
        # A web page can send other types to another site without asking that site first.
        raise ServeError(
            415, "not_json", "the body is not JSON", remedy="send it with content-type: application/json"
        )
    raw = await _read(request, options)
    if not raw.strip():
        raise RequestError("the body is empty", remedy="send a JSON object")
    if len(raw) > _LARGE:
        # Other requests go on meanwhile.
        return await asyncio.to_thread(strict_object, raw)
    return strict_object(raw)


async def _read(request: Request, options: ServeOptions) -> bytes:
    """Return the body.

    Of a body that is too large, more is read and dropped: most clients read the response only after they have
    sent everything.
    """
    limit = options.max_body
    length = request.headers.get("content-length", "")
    is_too_large = length.isdigit() and int(length) > limit
    if is_too_large and "expect" in request.headers:
        raise _too_large(limit)  # this client waits for a word before it sends the body
    parts: list[bytes] = []
    n_bytes = 0
    try:
        async with asyncio.timeout(options.body_seconds):
            async for part in request.stream():
                n_bytes += len(part)
                is_too_large = is_too_large or n_bytes > limit
                if not is_too_large:
                    parts.append(part)
                elif n_bytes > limit + _MAX_DROPPED:
                    break
    except TimeoutError:
        if not is_too_large:
            raise too_slow(f"the body did not arrive within {options.body_seconds:g} seconds") from None
    if is_too_large:
        raise _too_large(limit)
    return b"".join(parts)


def _too_large(limit: int) -> ServeError:
    # The body may not be read to its end: the connection cannot be used again.
    return ServeError(
        413,
        "body_too_large",
        f"the body is larger than {format_size(limit)}",
        headers={"connection": "close"},
    )
