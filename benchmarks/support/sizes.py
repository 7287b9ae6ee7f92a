"""The types that the tensors of a shape get, and their bytes. No weights are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from dsmoe_local.model.cost import bytes_per_token
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import unquantized
from dsmoe_quantize.policy.choice import TensorChoice, choose_types
from dsmoe_quantize.policy.types import resolve

_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Size:
    """A type: bytes of all weights, bits per weight, and bytes that are read to decode a token."""

    type: str
    n_bytes: int
    bits_per_weight: float
    n_bytes_per_token: float


def choices_of(hp: Hyperparameters, word: str, *, imatrix: bool = False) -> Sequence[TensorChoice]:
    """Return the types that the tensors of a shape get, with an importance matrix or without."""
    return choose_types(unquantized(hp, GgmlType.BF16), hp, resolve(word), imatrix=imatrix)


def size_of(hp: Hyperparameters, word: str, *, imatrix: bool = False) -> Size:
    """Return the size of a model in a type."""
    choices = choices_of(hp, word, imatrix=imatrix)
    n_bytes = sum(choice.n_bytes for choice in choices)
    n_weights = sum(choice.n_weights for choice in choices)
    return Size(word, n_bytes, 8 * n_bytes / n_weights, bytes_per_token(hp, choices))


def types_digest(choices: Sequence[TensorChoice]) -> str:
    """Return a digest of the tensors' types, whatever the types are called."""
    lines = "\n".join(sorted(f"{choice.name} {choice.type.name}" for choice in choices))
    return hashlib.sha256(lines.encode()).hexdigest()[:_DIGITS]
