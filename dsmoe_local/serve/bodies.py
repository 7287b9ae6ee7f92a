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


async def read_object(request: Request, options: ServeOptions) -> dict[str, Any]:
    """Return the JSON object in the body. Raises ServeError, RequestError, ClientDisconnect."""
    if "json" not in request.headers.get("content-type", "json").lower():
        # A web page can send other types to another site without asking that site first.
        raise ServeError(
            415, "not_json", "the body is not JSON", remedy="send it with content-type: application/json"
        )
    try:
        async with asyncio.timeout(options.body_seconds):
            raw = await _read(request, options.max_body)
    except TimeoutError:
        raise too_slow(f"the body did not arrive within {options.body_seconds:g} seconds") from None
    if not raw.strip():
        raise RequestError("the body is empty", remedy="send a JSON object")
    return strict_object(raw)


async def _read(request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    n_bytes = 0
    async for part in request.stream():
        n_bytes += len(part)
        if n_bytes > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


def _too_large(limit: int) -> ServeError:
    # The rest of the body is not read: the connection cannot be used again.
    return ServeError(
        413,
        "body_too_large",
        f"the body is larger than {format_size(limit)}",
        headers={"connection": "close"},
    )
