"""Computes how many tokens of a text chose each expert, from an importance matrix."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsmoe_quantize.imatrix import MIN_TOKENS, Imatrix

_EXPERTS = re.compile(r"^blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight$")
_TOKENS = re.compile(r"^blk\.\d+\.attn_output\.weight$")


@dataclass(frozen=True, slots=True)
class LayerCoverage:
    """How many tokens chose each routed expert of a layer."""

    layer: int
    counts: tuple[int, ...]

    @property
    def n_cold(self) -> int:
        """Number of experts with fewer than MIN_TOKENS tokens, too few for statistics of their own."""
        return sum(count < MIN_TOKENS for count in self.counts)

    @property
    def n_unseen(self) -> int:
        """Number of experts that were never chosen."""
        return self.counts.count(0)

    @property
    def median(self) -> float:
        """Median of the counts."""
        return float(np.median(self.counts))

    @property
    def coldest(self) -> tuple[int, ...]:
        """All experts, the least used first."""
        return tuple(sorted(range(len(self.counts)), key=lambda expert: (self.counts[expert], expert)))


@dataclass(frozen=True, slots=True)
class Coverage:
    """All layers with routed experts. `n_tokens` is the length of the text, 0 if unknown."""

    n_tokens: int
    layers: tuple[LayerCoverage, ...]

    @property
    def n_experts(self) -> int:
        """Number of experts in all layers."""
        return sum(len(layer.counts) for layer in self.layers)

    @property
    def n_cold(self) -> int:
        """Number of cold experts in all layers."""
        return sum(layer.n_cold for layer in self.layers)

    @property
    def n_unseen(self) -> int:
        """Number of unseen experts in all layers."""
        return sum(layer.n_unseen for layer in self.layers)

    def coldest(self, n: int) -> list[tuple[int, int, int]]:
        """Return the `n` least used experts as (count, layer, expert)."""
        every = (
            (count, layer.layer, expert) for layer in self.layers for expert, count in enumerate(layer.counts)
        )
        return sorted(every)[:n]

    def as_json(self) -> dict[str, Any]:
        """Return the fields that docs/imatrix.md describes."""
        return {
            "tokens": self.n_tokens,
            "experts": self.n_experts,
            "cold": self.n_cold,
            "unseen": self.n_unseen,
            "few": MIN_TOKENS,
            "layers": [
                {
                    "layer": layer.layer,
                    "counts": list(layer.counts),
                    "coldest": list(layer.coldest),
                    "median": layer.median,
                    "cold": layer.n_cold,
                    "unseen": layer.n_unseen,
                }
                for layer in self.layers
            ],
        }


def coverage_of(imatrix: Imatrix) -> Coverage:
    """Return the coverage. It has no layers for a dense model, or a file in the legacy format."""
    layers: dict[int, tuple[int, ...]] = {}
    for name, entry in imatrix.entries.items():
        match = _EXPERTS.match(name)
        if match and len(entry.counts) > 1:
            layers[int(match[1])] = tuple(entry.counts.tolist())
    return Coverage(
        _n_tokens(imatrix.entries) if not imatrix.is_legacy else 0,
        tuple(LayerCoverage(layer, layers[layer]) for layer in sorted(layers)),
    )


def _n_tokens(entries: Mapping[str, Any]) -> int:
    return max((int(entry.counts.max()) for name, entry in entries.items() if _TOKENS.match(name)), default=0)
