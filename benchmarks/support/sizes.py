"""Which types the tensors of a shape get, and what that weighs. Counts bytes; reads and writes no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from dsmoe_local.model.cost import read_fraction
from dsmoe_local.model.ggml import GgmlType, tensor_bytes, type_name
from dsmoe_local.model.gguf_writer import PlannedTensor
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import Role, tensor_specs
from dsmoe_quantize.policy.choice import TensorChoice, choose_types
from dsmoe_quantize.policy.types import TypeChoice, resolve

FLOAT_ROLES = (Role.NORM, Role.ROUTER)
_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Size:
    """One type: bytes of the weights, bits for each, and bytes of those that decoding one token reads."""

    type: str
    n_bytes: int
    bits_per_weight: float
    n_bytes_per_token: float


def unquantized(hp: Hyperparameters) -> list[PlannedTensor]:
    """All tensors as they are before: weights in BF16, norms and routers in F32."""
    return [
        PlannedTensor(spec.name, spec.shape, GgmlType.F32 if spec.role in FLOAT_ROLES else GgmlType.BF16)
        for spec in tensor_specs(hp)
    ]


def choices_of(
    hp: Hyperparameters, wanted: str | TypeChoice, *, imatrix: bool = False
) -> Sequence[TensorChoice]:
    """The types that the tensors of the shape get in a type, or the one of that name. `imatrix`: when they
    are encoded with an importance matrix.
    """
    choice = resolve(wanted) if isinstance(wanted, str) else wanted
    return choose_types(unquantized(hp), hp, choice, imatrix=imatrix)


def size_of(hp: Hyperparameters, wanted: str | TypeChoice, *, imatrix: bool = False) -> Size:
    """What a model costs in a type, or in the one of that name."""
    specs = tensor_specs(hp)
    choices = choices_of(hp, wanted, imatrix=imatrix)
    sizes = [tensor_bytes(choice.type, spec.shape) for choice, spec in zip(choices, specs, strict=True)]
    read = sum(size * read_fraction(hp, spec.role) for size, spec in zip(sizes, specs, strict=True))
    name = wanted if isinstance(wanted, str) else wanted.name
    return Size(name, sum(sizes), 8 * sum(sizes) / sum(spec.n_weights for spec in specs), read)


def types_digest(choices: Sequence[TensorChoice]) -> str:
    """Tells types apart by what tensors get, whatever they are called."""
    lines = "\n".join(sorted(f"{choice.name} {type_name(choice.type)}" for choice in choices))
    return hashlib.sha256(lines.encode()).hexdigest()[:_DIGITS]
