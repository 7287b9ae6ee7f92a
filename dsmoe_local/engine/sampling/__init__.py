"""Sampling: `TokenSampler` for a reply, `check_request` before it is scheduled, `choose_seed`."""

from dsmoe_local.engine.sampling.check import check_request, is_constrained
from dsmoe_local.engine.sampling.constraint import CompiledGrammar
from dsmoe_local.engine.sampling.token_sampler import Choice, TokenSampler, choose_seed

__all__ = ["Choice", "CompiledGrammar", "TokenSampler", "check_request", "choose_seed", "is_constrained"]
