"""Tensors, and ggml's types and their sizes as the `gguf` package lists them. Nothing is encoded here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from dsmoe_local.base.errors import FormatError, UsageError

GgmlType: TypeAlias = GGMLQuantizationType

FLOATS = frozenset({GgmlType.F32, GgmlType.F16, GgmlType.BF16})


def parse_type(word: str) -> GgmlType:
    """Return the ggml type called `word`, in any case. Raises UsageError if there is none."""
    try:
        return GGMLQuantizationType[word.upper()]
    except KeyError as error:
        known = ", ".join(kind.name.lower() for kind in GgmlType)
        raise UsageError(f"{word!r} is not a ggml type", remedy=f"known: {known}") from error


def block_size(kind: GgmlType) -> int:
    """Return the number of weights in a block. It must divide the number of a tensor's columns."""
    return GGML_QUANT_SIZES[kind][0]


def row_bytes(kind: GgmlType, n_columns: int) -> int:
    """Return the size of one row. Raises FormatError if the block size does not divide `n_columns`."""
    weights, n_bytes = GGML_QUANT_SIZES[kind]
    if n_columns % weights:
        raise FormatError(f"{kind.name} needs a multiple of {weights} columns, not {n_columns}")
    return n_columns // weights * n_bytes


def tensor_bytes(kind: GgmlType, shape: Sequence[int]) -> int:
    """Return the size of a tensor whose shape is given slowest dimension first, as numpy does."""
    return row_bytes(kind, shape[-1]) * math.prod(shape[:-1])


def padded(n_bytes: int, alignment: int) -> int:
    """Return `n_bytes` rounded up to a multiple of the alignment."""
    return -(-n_bytes // alignment) * alignment


def bits_per_weight(kind: GgmlType) -> float:
    """Return the bits that one weight takes, scales included."""
    weights, n_bytes = GGML_QUANT_SIZES[kind]
    return 8 * n_bytes / weights


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a GGUF file. `shape` is slowest dimension first, as numpy has it."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Size of the data, without padding."""
        return tensor_bytes(self.type, self.shape)
