"""Sampling: `check_request` before a request is scheduled, `TokenSampler` for each of its replies."""

from dsmoe_local.engine.sampling.constraint import CompiledGrammar
from dsmoe_local.engine.sampling.token_sampler import (
    Choice,
    TokenSampler,
    check_request,
    choose_seed,
    is_constrained,
)

__all__ = ["Choice", "CompiledGrammar", "TokenSampler", "check_request", "choose_seed", "is_constrained"]
