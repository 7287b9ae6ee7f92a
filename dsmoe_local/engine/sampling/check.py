"""What a request asks of sampling that a model cannot do, found before the request is scheduled."""

from __future__ import annotations

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine import native
from dsmoe_local.engine.sampling.constraint import CompiledGrammar, compiled, vocabulary_of
from dsmoe_local.engine.types import Request


def is_constrained(request: Request) -> bool:
    """Whether the request has a grammar or schema to compile, which may take seconds."""
    return request.grammar is not None or request.json_schema is not None


def check_request(model: native.Model, request: Request) -> CompiledGrammar | None:
    """Compile the request's grammar or schema, for its token samplers. Too slow for the engine's thread.

    Raises UsageError: a biased token id beyond the vocabulary, a grammar or schema that cannot be enforced.
    """
    for token_id, _ in request.logit_bias:
        if not 0 <= token_id < model.n_vocab:
            raise UsageError(
                f"logit_bias: there is no token {token_id}", remedy=f"ids go from 0 to {model.n_vocab - 1}"
            )
    if not is_constrained(request):
        return None
    return compiled(vocabulary_of(model), request.grammar, request.json_schema)
