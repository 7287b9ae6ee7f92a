"""Samples a reply's next token from a row of logits: argmax or llama.cpp's sampler chain, under a grammar."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from dsmoe_local.engine import native
from dsmoe_local.engine.errors import NativeError
from dsmoe_local.engine.native.samplers import Candidates
from dsmoe_local.engine.sampling.constraint import CompiledGrammar, Constraint
from dsmoe_local.engine.sampling.likeliest import Logits, TokenIds, likeliest, log_total, near_top
from dsmoe_local.engine.sampling.penalties import Adjustments
from dsmoe_local.engine.types import MAX_SEED, Request, SamplingParameters, TokenLogprob


class Choice(NamedTuple):
    """A chosen token; the rest as in TokenEvent."""

    token_id: int
    logprob: float | None
    alternatives: tuple[TokenLogprob, ...]


# One thread decodes with a context, so its requests can share the room for candidates: 1.2 MB at 102,400
# tokens.
_rooms: WeakKeyDictionary[native.Context, Candidates] = WeakKeyDictionary()


class TokenSampler:
    """Samples the tokens of one reply. Close it."""

    def __init__(
        self,
        model: native.Model,
        context: native.Context,
        request: Request,
        seed: int | None,
        prompt_ids: Sequence[int],
        grammar: CompiledGrammar | None,
    ) -> None:
        """`seed` None: as 0. `grammar` is what `check_request` returned for the request."""
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
            self._candidates = _rooms.setdefault(context, Candidates())
            self._sampler = native.Sampler(model.n_vocab, sampling, seed or 0)

    def choose(self, logits: Logits) -> Choice:
        """The next token, by its row of logits, which is only read. The choice is final: it is remembered.

        Raises NativeError for NaN or infinite logits, EngineError where the grammar permits no token.
        """
        best = int(logits.argmax())
        # argmax finds a NaN first, wherever it is.
        if not np.isfinite(logits[best]):
            raise NativeError("the model computes NaN or infinity", remedy="check the file: dsmoe inspect")
        if self._sampler is None and self._adjustments.keeps_first(best):
            token_id = best
        else:
            token_id = self._pick(self._adjustments.apply(logits))
        if self._constraint is not None:
            if not self._constraint.permits(token_id):
                width = 1 if self._sampler is None else self._top_k or len(logits)
                adjusted = self._adjustments.apply(logits)
                token_id = self._pick_from(self._constraint.likeliest(adjusted, width), adjusted)
            self._constraint.accept(token_id)
        self._adjustments.remember((token_id,))
        if not self._logprobs:
            return Choice(token_id, None, ())
        return self._with_logprobs(logits, token_id, float(logits[best]))

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
        """Free the chain."""
        if self._sampler is not None:
            self._sampler.close()


def choose_seed(sampling: SamplingParameters) -> int | None:
    """The seed to use, and to report: None where nothing is random."""
    if sampling.temperature <= 0:
        return None
    return secrets.randbelow(MAX_SEED + 1) if sampling.seed is None else sampling.seed
