"""Perplexity from a mean negative log-likelihood."""

from __future__ import annotations

import math

_MOST_NLL = 600.0
"""Beyond it there is no perplexity to speak of, and its standard error may not fit into a float."""


def perplexity(nll: float) -> float:
    """exp(nll), finite for every mean in nats."""
    return math.exp(min(nll, _MOST_NLL))
