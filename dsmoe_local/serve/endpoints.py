"""The other endpoints: models, health, metrics, and the tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dsmoe_local.engine.types import Prompt
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.messages import messages
from dsmoe_local.protocol.values import integer, text
from dsmoe_local.serve.bodies import read_object
from dsmoe_local.serve.state import ServedModel, ServerState

T = TypeVar("T")


async def list_models(http: Request) -> JSONResponse:
    """GET /v1/models."""
    state: ServerState = http.app.state.server
    return JSONResponse({"object": "list", "data": [_model_object(state.model)]})


async def show_model(http: Request) -> JSONResponse:
    """GET /v1/models/NAME."""
    state: ServerState = http.app.state.server
    return JSONResponse(_model_object(state.find(http.path_params["name"])))


def _model_object(model: ServedModel) -> dict[str, Any]:
    info = model.engine.info
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "dsmoe-local",
        # Not OpenAI's: that of vLLM.
        "max_model_len": info.n_context,
    }


async def health(http: Request) -> JSONResponse:
    """GET /health: 200 if requests are taken, also if the model must first be loaded again; else 503."""
    state: ServerState = http.app.state.server
    alive = state.model.engine.alive
    word = "shutting down" if state.draining else "ok" if alive else "the engine is restarted on demand"
    body = {"status": word, "running": state.n_active - state.n_queued, "queued": state.n_queued}
    return JSONResponse(body, 503 if state.draining else 200)


async def metrics(http: Request) -> Response:
    """GET /metrics."""
    state: ServerState = http.app.state.server
    return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def tokenize(http: Request) -> JSONResponse:
    """POST /tokenize: the token ids of `content` (or `prompt`), or of `messages` with the chat template."""
    state: ServerState = http.app.state.server
    body = await read_object(http, state.options)
    prompt = _text_or_messages(body)
    engine = state.find(body.get("model")).engine
    ids = await _call(state, lambda: engine.encode(prompt))
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": engine.info.n_context})


async def detokenize(http: Request) -> JSONResponse:
    """POST /detokenize: the text of `tokens`. Special tokens have their names."""
    state: ServerState = http.app.state.server
    body = await read_object(http, state.options)
    tokens = body.get("tokens")
    if not isinstance(tokens, list):
        raise RequestError("tokens is not a list of token ids", param="tokens")
    ids = [integer("tokens", token) for token in tokens]
    engine = state.find(body.get("model")).engine
    content = await _call(state, lambda: engine.detokenize(ids))
    return JSONResponse({"content": content, "prompt": content})


def _text_or_messages(body: dict[str, Any]) -> Prompt:
    given = [key for key in ("content", "prompt", "messages") if body.get(key) is not None]
    if len(given) != 1:
        raise RequestError("the body needs one of content, prompt and messages")
    (key,) = given
    return messages(key, body[key]) if key == "messages" else text(key, body[key])


async def _call(state: ServerState, call: Callable[[], T]) -> T:
    """Call the engine in a thread: after a crash it first loads the model again."""
    return await asyncio.get_running_loop().run_in_executor(state.executor, call)
