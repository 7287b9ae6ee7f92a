"""ggml's tensor types and their sizes, as the `gguf` package lists them. Encoding is dsmoe_quantize's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from dsmoe_local.base.errors import FormatError, UsageError

GgmlType: TypeAlias = GGMLQuantizationType

FLOATS = frozenset({GgmlType.F32, GgmlType.F16, GgmlType.BF16})


def type_name(ggml_type: GgmlType) -> str:
    """The name people use: Q4_K."""
    return ggml_type.name


def parse_type(word: str) -> GgmlType:
    """The ggml type called `word`, in any case. UsageError if there is none."""
    try:
        return GGMLQuantizationType[word.upper()]
    except KeyError as error:
        known = ", ".join(kind.name.lower() for kind in GgmlType)
        raise UsageError(f"{word!r} is not a ggml type", remedy=f"known: {known}") from error


def block_size(ggml_type: GgmlType) -> int:
    """Weights per block: a row must be a multiple of it."""
    return GGML_QUANT_SIZES[ggml_type][0]


def row_bytes(ggml_type: GgmlType, n_columns: int) -> int:
    """Bytes of one row. FormatError where a block does not divide it."""
    weights, n_bytes = GGML_QUANT_SIZES[ggml_type]
    if n_columns % weights:
        raise FormatError(f"{type_name(ggml_type)} holds multiples of {weights} columns, not {n_columns}")
    return n_columns // weights * n_bytes


def tensor_bytes(ggml_type: GgmlType, shape: Sequence[int]) -> int:
    """Bytes of a tensor whose shape is given slowest dimension first, as numpy does."""
    return row_bytes(ggml_type, shape[-1]) * math.prod(shape[:-1])


def bits_per_weight(ggml_type: GgmlType) -> float:
    """Storage cost of one weight, scales included."""
    weights, n_bytes = GGML_QUANT_SIZES[ggml_type]
    return 8 * n_bytes / weights
