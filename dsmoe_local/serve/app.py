"""The ASGI application: routes, checks around them, and errors."""

from __future__ import annotations

import sys
import traceback
from typing import cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.text import safe_line
from dsmoe_local.protocol.errors import describe
from dsmoe_local.protocol.requests import ENDPOINTS
from dsmoe_local.serve import endpoints, page
from dsmoe_local.serve.bodies import BodyReader
from dsmoe_local.serve.completions import TRANSLATED, complete
from dsmoe_local.serve.errors import ServeError, error_response
from dsmoe_local.serve.guard import HostGuard, KeyGuard
from dsmoe_local.serve.options import ServeOptions
from dsmoe_local.serve.state import ServerState

ROUTES = (
    *(Route(url, complete, methods=["POST"]) for url in (*ENDPOINTS, *TRANSLATED)),
    Route("/v1/messages/count_tokens", endpoints.count_tokens, methods=["POST"]),
    Route("/v1/models", endpoints.list_models),
    Route("/v1/models/{name:path}", endpoints.show_model),
    Route("/v1/experts/last", endpoints.last_experts),
    Route("/health", endpoints.health),
    Route("/metrics", endpoints.metrics),
    Route("/tokenize", endpoints.tokenize, methods=["POST"]),
    Route("/detokenize", endpoints.detokenize, methods=["POST"]),
    Route("/", page.show),
)


def create_app(state: ServerState) -> Starlette:
    """Return the application that serves `state`."""
    app = Starlette(
        routes=ROUTES,
        middleware=_middleware(state.options),
        exception_handlers={
            DsmoeError: _on_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_bug,
        },
    )
    app.state.server = state
    return app


def _middleware(options: ServeOptions) -> list[Middleware]:
    """Return what a request passes through, the outermost first."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=options.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["warning", "retry-after"],
    )
    return [
        Middleware(BodyReader, options=options),
        Middleware(HostGuard, options=options),
        *([cors] if options.cors_origins else []),
        Middleware(KeyGuard, api_key=options.api_key),
    ]


async def _on_error(http: Request, error: Exception) -> Response:
    state: ServerState = http.app.state.server
    response = error_response(cast(DsmoeError, error), http.url.path)
    state.metrics.count_request(response.status_code)
    _, message = describe(cast(DsmoeError, error))
    state.log(f"{safe_line(http.url.path, 60)} {response.status_code}: {safe_line(message, 200)}")
    return response


async def _on_http_error(http: Request, error: Exception) -> Response:
    """Return the response for a path or a method that does not exist."""
    missing = cast(HTTPException, error)
    paths = [route.path for route in ROUTES if "{" not in route.path]
    what = f"there is no {http.method} {safe_line(http.url.path, 60)}"
    if missing.status_code == 405:
        allowed = ", ".join(sorted((missing.headers or {})["Allow"].split(", ")))
        error = ServeError(405, "method_not_allowed", what, remedy=f"use {allowed}", headers=missing.headers)
        return await _on_error(http, error)
    # The base URL lacks /v1, or has it twice, since Anthropic's clients add it.
    asked = http.url.path
    near = next((path for path in paths if path.endswith(asked) or asked == f"/v1{path}"), None)
    remedy = f"did you mean {near}?" if near else f"use one of {', '.join(paths)}"
    return await _on_error(http, ServeError(404, "not_found", what, remedy=remedy))


async def _on_disconnect(http: Request, error: Exception) -> Response:
    """Return a response that nobody gets: the client hung up before it had sent its body."""
    return Response(status_code=499)


async def _on_bug(http: Request, error: Exception) -> Response:
    # The traceback has no values of variables, so no text of the request.
    traceback.print_exception(error, file=sys.stderr)
    return error_response(DsmoeError(f"internal error: {type(error).__name__}"), http.url.path)
