"""Requests to a server over HTTP. What goes wrong becomes an error that says what to do."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.errors import ContextLengthError, EngineError

CONNECT_SECONDS = 10.0
SILENT_SECONDS = 900.0  # without a byte: a long prompt on a slow computer takes minutes
_MAX_PAGE = 8 << 20  # bytes
_CHAT = "/chat/completions"
CHECK_URL = "check the URL: it is that of OpenAI's API, and often ends with /v1"
TEXT_IS_KEPT = "the text so far is kept; /continue continues it"
_CHECK = "check that the server runs, its address, and a firewall between"
_KEY = "set DSMOE_API_KEY, or use --api-key"


class ServerError(EngineError):
    """The server cannot be reached, refuses a request, or sends what cannot be understood."""


def lost_during_reply(cause: str) -> ServerError:
    """Return the error for a connection that ends within a reply."""
    return ServerError(
        f"the connection to the server was lost during the reply: {cause}", remedy=TEXT_IS_KEPT
    )


@dataclass(frozen=True, slots=True)
class Server:
    """The address of a server's API, such as http://127.0.0.1:8080/v1, and the key that it wants."""

    url: str
    host: str
    port: int | None
    path: str
    is_secure: bool
    api_key: str | None = None

    @classmethod
    def at(cls, text: str, api_key: str | None = None) -> Server:
        """Read an address. Without a path, /v1 is added. Raises UsageError."""
        parts = urlsplit(text if "://" in text else f"http://{text}")
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if parts.scheme not in ("http", "https") or not host or not text.isascii() or not text.isprintable():
            raise UsageError(
                f"{safe_line(text, 80)!r} is not the URL of a server",
                remedy="write it like http://192.168.0.2:8080/v1",
            )
        if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
            raise UsageError("the API key has characters that an HTTP header cannot have", remedy=_KEY)
        path = parts.path.rstrip("/").removesuffix(_CHAT) or "/v1"
        url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"
        return cls(url, host, port, path, parts.scheme == "https", api_key)

    def get(self, page: str) -> Any:  # noqa: ANN401 - JSON
        """Return the JSON of a page. Raises ServerError."""
        with self._response("GET", page, None, lambda sock: None) as response:
            try:
                return _json(response.read(_MAX_PAGE))
            except (OSError, http.client.HTTPException) as error:
                raise self._no_answer(error) from error

    @contextmanager
    def post_chat(
        self, body: Mapping[str, Any], connected: Callable[[socket.socket], None]
    ) -> Iterator[http.client.HTTPResponse]:
        """Ask for a reply. `connected` is called with the socket, which may be shut down to end the reply.

        Raises ServerError, and ContextLengthError if the conversation is too long for the model.
        """
        with self._response("POST", _CHAT, json.dumps(body).encode(), connected) as response:
            yield response

    @contextmanager
    def _response(
        self, method: str, page: str, body: bytes | None, connected: Callable[[socket.socket], None]
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connect()
        try:
            connected(connection.sock)
            headers = {"accept": "application/json, text/event-stream"}
            if body is not None:
                headers["content-type"] = "application/json"
            if self.api_key is not None:
                headers["authorization"] = f"Bearer {self.api_key}"
            try:
                connection.request(method, self.path + page, body, headers)
                response = connection.getresponse()
                if response.status != http.HTTPStatus.OK:
                    raise self._refusal(page, response, response.read(_MAX_PAGE))
            except (OSError, http.client.HTTPException) as error:
                raise self._no_answer(error) from error
            with response:
                yield response
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.is_secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
        except ssl.SSLError as error:
            raise ServerError(
                f"there is no secure connection: {in_words(error)}",
                where=self.url,
                remedy="if the server has no certificate, use http://",
            ) from error
        except OSError as error:
            raise ServerError(
                f"the server cannot be reached: {in_words(error)}", where=self.url, remedy=_CHECK
            ) from error
        connection.sock.settimeout(SILENT_SECONDS)
        return connection

    def _no_answer(self, error: BaseException) -> ServerError:
        return ServerError(f"the server sends no answer: {in_words(error)}", where=self.url, remedy=_CHECK)

    def _refusal(self, page: str, response: http.client.HTTPResponse, raw: bytes) -> EngineError:
        """Return the error for a status other than 200."""
        status, (message, code) = response.status, _reason(raw)
        said = f": {message}" if message else ""
        if status in (401, 403):
            what = "the server refuses the API key" if self.api_key else "the server refuses the request"
            return ServerError(f"{what}{said}", where=self.url, remedy=_KEY)
        if status == 404 and (code == "model_not_found" or "model" in message.lower()):
            return ServerError(f"the server does not have the model{said}", where=self.url)
        if status in (404, 405):
            return ServerError(f"the server has no {page}", where=self.url, remedy=CHECK_URL)
        if status == 429:
            wait = response.getheader("retry-after", "")
            remedy = f"try again in {wait} seconds" if wait.isdigit() else "try again later"
            return ServerError(f"the server is busy{said}", where=self.url, remedy=remedy)
        if 300 <= status < 400:
            target = response.getheader("location", "")
            return ServerError("the server is elsewhere", where=self.url, remedy=f"try --server {target}")
        if status == 400 and (code == "context_length_exceeded" or "context" in message.lower()):
            return ContextLengthError(f"the message was not sent{said}", remedy="shorten it")
        who = "refuses the request" if status < 500 else "failed"
        return ServerError(f"the server {who} with status {status}{said}", where=self.url)


def in_words(error: BaseException) -> str:
    """Return why a connection failed."""
    if isinstance(error, TimeoutError):
        return "nothing came in time"
    if isinstance(error, socket.gaierror):
        return "the name of the computer is not known"
    if isinstance(error, ssl.SSLError):
        return str(error.reason or error)
    if isinstance(error, http.client.RemoteDisconnected | http.client.IncompleteRead | ConnectionResetError):
        return "the connection was closed"
    if isinstance(error, http.client.HTTPException):
        return "what came is not HTTP"
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__


def _json(raw: bytes) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ServerError(
            "the server sends something else than JSON",
            where=safe_line(raw[:80].decode("utf-8", "replace")),
            remedy=CHECK_URL,
        ) from error


def _reason(raw: bytes) -> tuple[str, str]:
    """Return the message and the code of OpenAI's error object, both empty if there is none."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return "", ""
    return error_of(found) or ("", "")


def error_of(value: object) -> tuple[str, str] | None:
    """Return message and code of the error in a JSON value; None if it has none."""
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(error, str):
        return error, ""
    if not isinstance(error, dict):
        return None
    return str(error.get("message") or ""), str(error.get("code") or "")
