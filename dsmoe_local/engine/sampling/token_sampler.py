"""Samples the next token of a reply: argmax or llama.cpp's sampler chain, constrained by a grammar."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine import native
from dsmoe_local.engine.errors import NativeError
from dsmoe_local.engine.native.samplers import Candidates
from dsmoe_local.engine.sampling.constraint import CompiledGrammar, Constraint, compiled, vocabulary_of
from dsmoe_local.engine.sampling.likeliest import Logits, TokenIds, likeliest, log_total, near_top
from dsmoe_local.engine.sampling.penalties import Adjustments
from dsmoe_local.engine.tools.support import ToolSupport
from dsmoe_local.engine.types import MAX_SEED, Request, SamplingParameters, TokenLogprob


class Choice(NamedTuple):
    """A sampled token, with `logprob` and `alternatives` as in TokenEvent."""

    token_id: int
    logprob: float | None
    alternatives: tuple[TokenLogprob, ...]


# All requests of a context are sampled in one thread, so they share a buffer: 1.2 MB for 102,400 tokens.
_buffers: WeakKeyDictionary[native.Context, Candidates] = WeakKeyDictionary()


class TokenSampler:
    """Samples the tokens of one reply. Must be closed."""

    def __init__(
        self,
        model: native.Model,
        context: native.Context,
        request: Request,
        seed: int | None,
        prompt_ids: Sequence[int],
        grammar: CompiledGrammar | None,
    ) -> None:
        """Create the sampler chain. `seed` None means 0. `grammar` is the result of `check_request`."""
        sampling = request.sampling
        self._model = model
        self._logprobs = request.logprobs or request.top_logprobs > 0
        self._top_logprobs = request.top_logprobs
        self._adjustments = Adjustments(sampling, request.logit_bias)
        if sampling.repeat_last_n:
            self._adjustments.remember(prompt_ids[-sampling.repeat_last_n :])
        self._constraint = None if grammar is None else Constraint(grammar)
        self._sampler: native.Sampler | None = None
        self._top_k = 0 if sampling.mirostat else sampling.top_k
        if sampling.temperature > 0:
            self._candidates = _buffers.setdefault(context, Candidates())
            self._sampler = native.Sampler(model.n_vocab, sampling, seed or 0)

    def choose(self, logits: Logits, replace: Callable[[int], int | None] = lambda token_id: None) -> Choice:
        """Sample the next token, and update the penalties and the grammar with it.

        `replace` takes the sampled token and may return another one, or the same: the grammar then neither
        restricts nor sees it. `logits` are not changed. Raises NativeError if they are not finite,
        EngineError if the grammar permits no token.
        """
        best = _likeliest_of(logits)
        if self._sampler is None and self._adjustments.keeps_first(best):
            token_id = best
        else:
            token_id = self._pick(self._adjustments.apply(logits))
        if (instead := replace(token_id)) is not None:
            token_id = instead
        elif self._constraint is not None:
            if not self._constraint.permits(token_id):
                width = 1 if self._sampler is None else self._top_k or len(logits)
                adjusted = self._adjustments.apply(logits)
                token_id = self._pick_from(self._constraint.likeliest(adjusted, width), adjusted)
            self._constraint.accept(token_id)
        self._adjustments.remember((token_id,))
        if not self._logprobs:
            return Choice(token_id, None, ())
        return self._with_logprobs(logits, token_id, float(logits[best]))

    def score(self, logits: Logits, token_id: int) -> tuple[TokenLogprob, ...]:
        """Return a token that follows, and the likeliest ones, as in `TokenEvent.alternatives`.

        Raises NativeError if the logits are not finite.
        """
        peak = float(logits[_likeliest_of(logits)])
        _, logprob, alternatives = self._with_logprobs(logits, token_id, peak)
        assert logprob is not None
        return alternatives or (TokenLogprob(token_id, self._model.text_of(token_id), logprob),)

    def _pick(self, logits: Logits) -> int:
        if self._sampler is None:
            return int(logits.argmax())
        if not self._top_k:
            self._candidates.fill(logits)
            return self._sampler.choose(self._candidates)
        return self._pick_from(near_top(logits, min(self._top_k, len(logits))), logits)

    def _pick_from(self, ids: TokenIds, logits: Logits) -> int:
        if self._sampler is None:
            return int(ids[logits[ids].argmax()])
        self._candidates.fill(logits[ids], ids)
        return self._sampler.choose(self._candidates)

    def _with_logprobs(self, logits: Logits, token_id: int, peak: float) -> Choice:
        total = log_total(logits, peak)
        logprob = float(logits[token_id]) - total
        if not self._top_logprobs:
            return Choice(token_id, logprob, ())
        shown = [token_id, *map(int, likeliest(logits, self._top_logprobs))]
        alternatives = (TokenLogprob(i, self._model.text_of(i), float(logits[i]) - total) for i in shown)
        return Choice(token_id, logprob, tuple(alternatives))

    def close(self) -> None:
        """Free the sampler chain."""
        if self._sampler is not None:
            self._sampler.close()


def _likeliest_of(logits: Logits) -> int:
    """Return the index of the highest logit. Raises NativeError if it is not finite."""
    best = int(logits.argmax())
    # argmax returns the index of a NaN if there is one.
    if not np.isfinite(logits[best]):
        raise NativeError("the model computes NaN or infinity", remedy="check the file: dsmoe inspect")
    return best


def choose_seed(sampling: SamplingParameters) -> int | None:
    """Return the request's seed, or a random one; None if sampling is greedy."""
    if sampling.temperature <= 0:
        return None
    return secrets.randbelow(MAX_SEED + 1) if sampling.seed is None else sampling.seed


def is_constrained(request: Request) -> bool:
    """Return True if the request has a grammar, schema or tools, whose compilation may take seconds."""
    return request.grammar is not None or request.json_schema is not None or request.tools is not None


def check_request(
    model: native.Model, request: Request, tools: ToolSupport | None = None
) -> CompiledGrammar | None:
    """Compile the request's grammar, schema or tools, if any. This is too slow for the engine's thread.

    `tools` says how the model writes calls. Without a chat template it is None, and encoding refuses the
    request.

    Raises UsageError if a biased token id is not in the vocabulary, or the grammar cannot be enforced.
    """
    for token_id, _ in request.logit_bias:
        if not 0 <= token_id < model.n_vocab:
            raise UsageError(
                f"logit_bias: there is no token {token_id}", remedy=f"use ids from 0 to {model.n_vocab - 1}"
            )
    if request.tools is not None:
        if tools is None:
            return None
        vocabulary = vocabulary_of(model, tools.pieces)
        return compiled(vocabulary, None, request.json_schema, (tools.form, request.tools))
    if not is_constrained(request):
        return None
    return compiled(vocabulary_of(model), request.grammar, request.json_schema)
