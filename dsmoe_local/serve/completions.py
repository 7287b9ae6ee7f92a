"""The endpoints that generate replies: OpenAI's completions, and what is translated to them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest

from dsmoe_local.base.text import safe_line
from dsmoe_local.protocol import anthropic, openai_responses
from dsmoe_local.protocol.chunks import CompletionWriter
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.requests import check_endpoint, read_requests, unknown_fields
from dsmoe_local.protocol.values import flag, json_object
from dsmoe_local.protocol.writers import ReplyWriter
from dsmoe_local.serve.bodies import read_object
from dsmoe_local.serve.reply_response import ReplyResponse
from dsmoe_local.serve.state import ServerState


@dataclass(frozen=True, slots=True)
class Translation:
    """Another API: how its body becomes that of a chat completion, and what writes its replies, given the
    unique part of their id, the name of the model, and the body.
    """

    chat_body: Callable[[Mapping[str, Any]], dict[str, Any]]
    writer: Callable[[str, str, Mapping[str, Any]], ReplyWriter]


TRANSLATED: Mapping[str, Translation] = {
    "/v1/messages": Translation(
        anthropic.chat_body, lambda name, model, body: anthropic.MessageWriter(name, model)
    ),
    "/v1/responses": Translation(openai_responses.chat_body, openai_responses.ResponseWriter),
}


async def complete(http: HttpRequest) -> ReplyResponse:
    """Handle all endpoints that generate: read the request, and return the response that will generate."""
    state: ServerState = http.app.state.server
    path = http.url.path
    body = await read_object(http, state.options)
    state.log_body(body)
    model = await state.models.resolve(body.get("model"))
    translation = TRANSLATED.get(path)
    translated = body if translation is None else translation.chat_body(body)
    chat = translation is not None or check_endpoint(path, body)
    name = uuid.uuid4().hex
    requests = read_requests(name, translated, state.options.defaults, chat=chat)
    stream = flag("stream", translated.get("stream") or False)
    if translation is None:
        writer: ReplyWriter = _completion_writer(
            name, model, body, chat=chat, stream=stream, logprobs=requests[0].logprobs
        )
    else:
        if requests[0].n > 1:
            raise RequestError("n is not supported", remedy="leave it out", param="n")
        writer = translation.writer(name, model, body)
    return ReplyResponse(state, model, requests, writer, _warning(translated), stream=stream)


def _completion_writer(
    name: str, model: str, body: Mapping[str, Any], *, chat: bool, stream: bool, logprobs: bool
) -> CompletionWriter:
    """Return what writes a completion. RequestError for wrong stream_options."""
    options = json_object("stream_options", body.get("stream_options") or None)
    if options and not stream:
        raise RequestError("stream_options is for stream: true", param="stream_options")
    usage = flag("stream_options.include_usage", options.get("include_usage") or False)
    return CompletionWriter(name, model, chat=chat, usage=usage, logprobs=logprobs)


def _warning(body: Mapping[str, Any]) -> dict[str, str]:
    """Return the header that names the unknown fields of a body, if it has any."""
    unknown = unknown_fields(body)
    if not unknown:
        return {}
    names = ", ".join(safe_line(field, 40).encode("ascii", "replace").decode() for field in unknown[:8])
    return {"warning": f'199 - "unknown fields are ignored: {names.replace(chr(34), "?")}"'}
