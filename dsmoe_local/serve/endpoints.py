"""The other endpoints: models, health, metrics, and the tokenizer."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dsmoe_local.engine.reasoning import template_variables
from dsmoe_local.engine.types import Prompt
from dsmoe_local.experts.picture import activity_json
from dsmoe_local.protocol import anthropic
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.messages import messages
from dsmoe_local.protocol.requests import read_request
from dsmoe_local.protocol.tools import offered_tools
from dsmoe_local.protocol.values import integer, text
from dsmoe_local.serve.bodies import read_object
from dsmoe_local.serve.errors import ServeError
from dsmoe_local.serve.state import ServerState


async def list_models(http: Request) -> JSONResponse:
    """GET /v1/models: all models that can be loaded."""
    state: ServerState = http.app.state.server
    names = await state.models.known()
    return JSONResponse({"object": "list", "data": [_model_object(state, name) for name in names]})


async def show_model(http: Request) -> JSONResponse:
    """GET /v1/models/NAME."""
    state: ServerState = http.app.state.server
    return JSONResponse(_model_object(state, await state.models.resolve(http.path_params["name"])))


def _model_object(state: ServerState, name: str) -> dict[str, Any]:
    fields = {"id": name, "object": "model", "created": state.models.created, "owned_by": "dsmoe-local"}
    loaded = next((model for model in state.models.loaded if model.name == name), None)
    # The other fields are not OpenAI's; the context has vLLM's name.
    context = {} if loaded is None else {"max_model_len": loaded.engine.info.n_context}
    return {**fields, "loaded": loaded is not None, **context}


async def last_experts(http: Request) -> JSONResponse:
    """GET /v1/experts/last: the activity of the routed experts during the last finished reply."""
    state: ServerState = http.app.state.server
    if not state.options.experts:
        raise ServeError(
            404, "experts_not_observed", "experts are not observed", remedy="start the server with --experts"
        )
    last = state.last_experts
    if last is None or not last.activity.tokens:
        raise ServeError(
            404,
            "no_experts",
            "the last reply has no experts: there was none, it was too short, or its model is dense",
        )
    about = {"id": last.id, "object": "experts", "model": last.model, "completion_tokens": last.n_tokens}
    return JSONResponse({**about, **activity_json(last.activity)})


async def health(http: Request) -> JSONResponse:
    """GET /health: 200 if requests are accepted, also if a model must be loaded first; else 503."""
    state: ServerState = http.app.state.server
    body = {
        "status": "shutting down" if state.draining else "ok",
        "running": state.n_active - state.n_queued,
        "queued": state.n_queued,
    }
    return JSONResponse(body, 503 if state.draining else 200)


async def metrics(http: Request) -> Response:
    """GET /metrics."""
    state: ServerState = http.app.state.server
    # Not in a thread: the figures are those of the event loop, which changes them.
    return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def tokenize(http: Request) -> JSONResponse:
    """POST /tokenize: the token ids of `content` (or `prompt`), or of `messages` with the chat template."""
    state: ServerState = http.app.state.server
    body = await read_object(http, state.options)
    prompt = _text_or_messages(body)
    offered = offered_tools(body)
    tools = () if offered is None else offered.tools
    ids, n_context = await state.ask_tokenizer(
        await state.models.resolve(body.get("model")),
        lambda engine: (engine.encode(prompt, tools=tools), engine.info.n_context),
    )
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": n_context})


async def count_tokens(http: Request) -> JSONResponse:
    """POST /v1/messages/count_tokens: the number of prompt tokens that the same body of /v1/messages has."""
    state: ServerState = http.app.state.server
    body = await read_object(http, state.options)
    name = await state.models.resolve(body.get("model"))
    chat = anthropic.chat_body({"max_tokens": 1, **body})
    request = read_request("", chat, state.options.defaults, chat=True)
    variables = template_variables(request.chat_template_kwargs, request.reasoning_budget)
    ids = await state.ask_tokenizer(
        name,
        lambda engine: engine.encode(
            request.prompt,
            continue_final_message=request.continue_final_message,
            chat_template_kwargs=variables,
            tools=() if request.tools is None else request.tools.tools,
        ),
    )
    return JSONResponse({"input_tokens": len(ids)})


async def detokenize(http: Request) -> JSONResponse:
    """POST /detokenize: the text of `tokens`. Special tokens have their names."""
    state: ServerState = http.app.state.server
    body = await read_object(http, state.options)
    tokens = body.get("tokens")
    if not isinstance(tokens, list):
        raise RequestError("tokens is not a list of token ids", param="tokens")
    ids = [integer("tokens", token) for token in tokens]
    name = await state.models.resolve(body.get("model"))
    content = await state.ask_tokenizer(name, lambda engine: engine.detokenize(ids))
    return JSONResponse({"content": content, "prompt": content})


def _text_or_messages(body: dict[str, Any]) -> Prompt:
    given = [key for key in ("content", "prompt", "messages") if body.get(key) is not None]
    if len(given) != 1:
        raise RequestError("the body needs one of content, prompt and messages")
    (key,) = given
    return messages(key, body[key]) if key == "messages" else text(key, body[key])
