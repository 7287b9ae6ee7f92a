"""Which types the tensors of a shape get, and what that weighs. Counts bytes; reads and writes no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from dsmoe_local.model.cost import bytes_per_token
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import unquantized
from dsmoe_quantize.policy.choice import TensorChoice, choose_types
from dsmoe_quantize.policy.types import TypeChoice, resolve

_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Size:
    """One type: bytes of the weights, bits for each, and bytes of those that decoding one token reads."""

    type: str
    n_bytes: int
    bits_per_weight: float
    n_bytes_per_token: float


def choices_of(
    hp: Hyperparameters, wanted: str | TypeChoice, *, imatrix: bool = False
) -> Sequence[TensorChoice]:
    """Return the types that the tensors of the shape get in a type, which may be given by its name.

    `imatrix`: weights are encoded with an importance matrix.
    """
    choice = resolve(wanted) if isinstance(wanted, str) else wanted
    return choose_types(unquantized(hp, GgmlType.BF16), hp, choice, imatrix=imatrix)


def size_of(hp: Hyperparameters, wanted: str | TypeChoice, *, imatrix: bool = False) -> Size:
    """Return what a model costs in a type, which may be given by its name."""
    choices = choices_of(hp, wanted, imatrix=imatrix)
    n_bytes = sum(choice.n_bytes for choice in choices)
    n_weights = sum(choice.n_weights for choice in choices)
    name = wanted if isinstance(wanted, str) else wanted.name
    return Size(name, n_bytes, 8 * n_bytes / n_weights, bytes_per_token(hp, choices))


def types_digest(choices: Sequence[TensorChoice]) -> str:
    """Return a digest of the tensors' types, whatever the types are called."""
    lines = "\n".join(sorted(f"{choice.name} {choice.type.name}" for choice in choices))
    return hashlib.sha256(lines.encode()).hexdigest()[:_DIGITS]
