"""What a checkpoint's tensor is before conversion: a name and a span of bytes in a shard. Reads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsmoe_local.model.ggml import GgmlType


@dataclass(frozen=True, slots=True)
class Dtype:
    """A number format that a checkpoint's weights may have."""

    ggml: GgmlType
    n_bytes: int


DTYPES: Mapping[str, Dtype] = {
    "F32": Dtype(GgmlType.F32, 4),
    "F16": Dtype(GgmlType.F16, 2),
    "BF16": Dtype(GgmlType.BF16, 2),
}
"""By safetensors' names. Others (F64, I8, F8_E4M3, …) are kept as words, and refused when they are needed."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A dense row-major tensor: `n_bytes` from byte `offset` of the file `shard`. `dtype` as in DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    n_bytes: int
