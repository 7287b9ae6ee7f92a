"""Sampler chains in llama.cpp's own order. Which tokens are sampled when is decided elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dsmoe_local.engine.native.context import Context
from dsmoe_local.engine.native.library import lib
from dsmoe_local.engine.types import SamplingParameters


class Sampler:
    """One request's sampler chain, in llama.cpp's own order."""

    def __init__(self, context: Context, parameters: SamplingParameters, seed: int) -> None:
        self._context = context
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for stage in self._stages(parameters, seed):
            lib.llama_sampler_chain_add(self._chain, stage)

    def _stages(self, p: SamplingParameters, seed: int) -> Iterable[Any]:
        yield lib.llama_sampler_init_penalties(
            self._context.model.n_vocab,
            p.repeat_last_n,
            p.repeat_penalty,
            p.frequency_penalty,
            p.presence_penalty,
        )
        if p.temperature <= 0:
            yield lib.llama_sampler_init_greedy()
            return
        yield lib.llama_sampler_init_top_k(p.top_k)
        yield lib.llama_sampler_init_typical(p.typical_p, 1)
        yield lib.llama_sampler_init_top_p(p.top_p, 1)
        yield lib.llama_sampler_init_min_p(p.min_p, 1)
        yield lib.llama_sampler_init_temp(p.temperature)
        yield lib.llama_sampler_init_dist(seed)

    def accept(self, token_ids: Iterable[int]) -> None:
        """Let the penalties know tokens that were not sampled here."""
        for token_id in token_ids:
            lib.llama_sampler_accept(self._chain, token_id)

    def sample(self, index: int) -> int:
        """Choose from the logits of the batch's token `index` (-1: the last); the choice is accepted."""
        token_id: int = lib.llama_sampler_sample(self._chain, self._context.handle, index)
        return token_id

    def close(self) -> None:
        """Free the chain and its samplers."""
        if self._chain:
            lib.llama_sampler_free(self._chain)
            self._chain = None
