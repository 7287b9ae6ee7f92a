"""Groups of tensors that get one type: those of a layer that multiply the same vectors. What recipes and the
solver speak of.

A kind is what a group is in every layer; its name is what a recipe file has. `WEIGHTS` says how much an error
in it costs, where nobody has measured it for the model at hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dsmoe_local.model.layout import layer_of

_KINDS: tuple[tuple[str, str], ...] = (
    ("embedding", r"token_embd\.weight"),
    ("output", r"output\.weight"),
    ("attention-query-key", r"blk\.\d+\.attn_[qk]\.weight"),
    ("attention-value", r"blk\.\d+\.attn_v\.weight"),
    ("attention-output", r"blk\.\d+\.attn_output\.weight"),
    ("dense-gate-up", r"blk\.\d+\.ffn_(gate|up)\.weight"),
    ("dense-down", r"blk\.\d+\.ffn_down\.weight"),
    ("shared-gate-up", r"blk\.\d+\.ffn_(gate|up)_shexp\.weight"),
    ("shared-down", r"blk\.\d+\.ffn_down_shexp\.weight"),
    ("routed-gate-up", r"blk\.\d+\.ffn_(gate|up)_exps\.weight"),
    ("routed-down", r"blk\.\d+\.ffn_down_exps\.weight"),
)
_PATTERNS = tuple((kind, re.compile(pattern)) for kind, pattern in _KINDS)

KINDS = tuple(kind for kind, _ in _KINDS)
"""Every kind, in the order of a recipe file."""

WEIGHTS: Mapping[str, float] = MappingProxyType(
    {
        "embedding": 1.0,
        "output": 1.5,
        "attention-query-key": 0.69,
        "attention-value": 0.41,
        "attention-output": 0.29,
        "dense-gate-up": 0.26,
        "dense-down": 0.34,
        "shared-gate-up": 0.29,
        "shared-down": 0.19,
        "routed-gate-up": 0.32,
        "routed-down": 0.37,
    }
)
"""The divergence, in nats, that a relative squared error of 1 in all layers of a kind would cause if it grew
in proportion, as it does while errors are small. The geometric mean of what was measured on two models that
have little in common (docs/quantization.md): what counts is how they compare with each other.
"""


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """The tensors of one kind in one layer; `layer` is None where the model has only one such tensor."""

    kind: str
    layer: int | None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"


def group_of(name: str, tied: bool) -> Group | None:
    """The group of a GGUF tensor; None if no recipe speaks of it. `tied`: the embedding is the output too."""
    kind = next((kind for kind, pattern in _PATTERNS if pattern.fullmatch(name)), None)
    if kind is None:
        return None
    return Group("output" if kind == "embedding" and tied else kind, layer_of(name))
