"""Checks of every request before it is read: the Host and Origin headers, and the API key."""

from __future__ import annotations

import hmac
import socket

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dsmoe_local.base.text import safe_line
from dsmoe_local.serve.errors import ServeError, error_response
from dsmoe_local.serve.options import ServeOptions, as_address

_OPEN_PATHS = frozenset({"/", "/health"})
"""Paths that need no API key."""


class HostGuard:
    """Refuses requests of web pages that are not allowed to use the server.

    A page of another site could otherwise reach a server on this computer: with a name that resolves to
    127.0.0.1 (DNS rebinding), or by a form that it sends without asking.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self._app = app
        names = ("localhost", options.host, socket.gethostname(), *options.allowed_hosts)
        self._names = frozenset(name.lower().rstrip(".") for name in names)
        self._origins = frozenset(options.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and (refusal := self._refusal(Headers(scope=scope))):
            await error_response(refusal, scope["path"])(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ServeError | None:
        host = headers.get("host", "").lower()
        name = _without_port(host).rstrip(".")
        if as_address(name) is None and name not in self._names and not name.endswith(".localhost"):
            return ServeError(
                403,
                "host_not_allowed",
                f"the host {safe_line(host, 60)!r} is not allowed",
                remedy="connect to an address, or start the server with --allowed-host NAME",
            )
        origin = headers.get("origin", "").lower()
        if not origin or "*" in self._origins or origin in self._origins:
            return None
        if origin.partition("://")[2] == host:
            return None  # a page of this server
        return ServeError(
            403,
            "origin_not_allowed",
            f"web pages of {safe_line(origin, 60)!r} may not use this server",
            remedy="start the server with --cors-origin ORIGIN to allow it",
        )


class KeyGuard:
    """Refuses requests without the API key, if there is one."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS or self._has_key(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        refusal = ServeError(
            401,
            "invalid_api_key",
            "the API key is missing or wrong",
            remedy="send it as Authorization: Bearer KEY",
            headers={"www-authenticate": "Bearer"},
        )
        await error_response(refusal, scope["path"])(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        if self._key is None:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # Anthropic's clients send x-api-key.
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(given.encode(), self._key)


def _without_port(host: str) -> str:
    """Return the name or address in a Host header."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
