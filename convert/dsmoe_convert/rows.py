"""Read a checkpoint's tensors by rows, in GGUF's order: experts stacked, query and key rows permuted.

Rows are read from the shards when the encoder asks for them.
"""

from __future__ import annotations

import math

import numpy as np

from dsmoe_convert.checkpoint import Checkpoint
from dsmoe_convert.fp8 import Fp8Rows
from dsmoe_convert.shards import DTYPES, FP8, ShardSource, StoredTensor
from dsmoe_local.model.ggml import GgmlType, row_bytes
from dsmoe_local.model.layout import TensorSpec
from dsmoe_quantize.write.encoder import Bytes, RowSource


class StackedRows:
    """The rows of matrices of equal shape, one matrix after another. A RowSource."""

    def __init__(self, shards: ShardSource, parts: tuple[StoredTensor, ...]) -> None:
        self.type: GgmlType = DTYPES[parts[0].dtype].ggml
        self._shards = shards
        self._parts = parts
        # The product is 1 for a vector, which is one row.
        self._rows = math.prod(parts[0].shape[:-1])
        self._row_bytes = parts[0].n_bytes // self._rows

    def read(self, first_row: int, n_rows: int, scratch: Bytes) -> Bytes:
        """See RowSource."""
        part, row = divmod(first_row, self._rows)
        raw = scratch[: n_rows * self._row_bytes]
        self._shards.read_into(self._parts[part], row * self._row_bytes, raw.data)
        return raw


class RotaryRows:
    """The rows of a query or key projection in llama.cpp's order. A RowSource.

    Hugging Face rotates the two halves of a head, llama.cpp adjacent rows, so rows i and i + head_dim / 2 of
    a head become rows 2i and 2i + 1. Whole heads are read and reordered.
    """

    def __init__(self, inner: RowSource, n_rows: int, n_heads: int, row_bytes: int) -> None:
        self.type: GgmlType = inner.type
        self._inner = inner
        self._head_dim = n_rows // n_heads
        self._row_bytes = row_bytes

    def read(self, first_row: int, n_rows: int, scratch: Bytes) -> Bytes:
        """See RowSource. The result is not in `scratch`, into which the heads are read."""
        size = self._head_dim
        first = first_row // size * size
        end = -(-(first_row + n_rows) // size) * size
        needed = (end - first) * self._row_bytes
        if scratch.size < needed:
            scratch = np.empty(needed, np.uint8)
        heads = self._inner.read(first, end - first, scratch)
        pairs = heads.reshape(-1, 2, size // 2, self._row_bytes).swapaxes(1, 2).reshape(-1)
        start = (first_row - first) * self._row_bytes
        return pairs[start : start + n_rows * self._row_bytes]


def rows_of(checkpoint: Checkpoint, spec: TensorSpec) -> RowSource:
    """Return the source of a tensor's rows. `check_tensors` must have checked the checkpoint."""
    parts = tuple(checkpoint.tensors[source] for source in spec.sources)
    rows: RowSource = StackedRows(checkpoint.shards, parts)
    if checkpoint.scales and parts[0].dtype == FP8:
        rows = Fp8Rows(rows, checkpoint.shards, parts[0].shape, checkpoint.scales, spec.sources)
    if not spec.rotary_heads:
        return rows
    return RotaryRows(rows, spec.shape[0], spec.rotary_heads, row_bytes(rows.type, spec.shape[-1]))


def source_position(spec: TensorSpec, index: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the checkpoint's name and index of the weight at `index` of a tensor in the GGUF file."""
    if len(index) == 3:
        return spec.sources[index[0]], index[1:]
    if not spec.rotary_heads:
        return spec.sources[0], index
    head_dim = spec.shape[0] // spec.rotary_heads
    head, row = divmod(index[0], head_dim)
    pair, half = divmod(row, 2)
    return spec.sources[0], (head * head_dim + half * (head_dim // 2) + pair, *index[1:])
