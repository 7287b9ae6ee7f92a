"""Errors in the form of OpenAI or Anthropic, with the HTTP status of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from dsmoe_local.base.errors import DsmoeError, InterruptedRunError, UsageError
from dsmoe_local.engine.errors import ContextLengthError, EngineError, PromptError, TemplateError
from dsmoe_local.engine.parameters import FieldError
from dsmoe_local.protocol.errors import RequestError, describe

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    **_TYPES,
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    503: "overloaded_error",
}
_NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients repeat a request after 408 and 5xx otherwise


class ServeError(DsmoeError):
    """The server refuses or ends a request. `code` and `param` are those of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        code: str,
        what: str,
        *,
        remedy: str = "",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(what, remedy=remedy)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})


def too_slow(what: str) -> ServeError:
    """Return the error for a request that takes too long."""
    return ServeError(408, "timeout", what, headers=_NO_RETRY)


def hung_up() -> ServeError:
    """Return the error for a request whose client has gone. Nobody gets it, but it is logged and counted."""
    return ServeError(499, "client_closed_request", "the client hung up")


def shutting_down() -> ServeError:
    """Return the error for requests while the server ends."""
    return ServeError(503, "shutting_down", "the server is shutting down", headers={"retry-after": "5"})


def status_of(error: DsmoeError) -> int:
    """Return the HTTP status of an error."""
    if isinstance(error, ServeError):
        return error.status
    if isinstance(error, RequestError | UsageError | PromptError | TemplateError):
        return 400
    # Crashes, failed loads and full memory: the request itself may be fine.
    return 503 if isinstance(error, EngineError | InterruptedRunError) else 500


def error_object(error: DsmoeError, path: str) -> dict[str, Any]:
    """Return the error object for a request for `path`: Anthropic's, which has OpenAI's keys as well, for
    /v1/messages, and OpenAI's for other paths.
    """
    status = status_of(error)
    code, message = describe(error)
    param = None
    if isinstance(error, ServeError | RequestError):
        param = error.param
    elif isinstance(error, FieldError):
        param = error.field
    if isinstance(error, ServeError):
        code = error.code
    elif isinstance(error, ContextLengthError):
        code = "context_length_exceeded"
    is_anthropic = path.startswith("/v1/messages")
    types, failed = (_ANTHROPIC_TYPES, "api_error") if is_anthropic else (_TYPES, "server_error")
    kind = types.get(status, "invalid_request_error" if status < 500 else failed)
    found: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    if not is_anthropic:
        return {"error": found}
    if isinstance(error, RequestError):
        found["details"] = {"error_code": error.kind}
    return {"type": "error", "error": found}


def error_response(error: DsmoeError, path: str) -> JSONResponse:
    """Return the response for an error of a request for `path`."""
    headers = error.headers if isinstance(error, ServeError) else {}
    return JSONResponse(error_object(error, path), status_of(error), headers)
