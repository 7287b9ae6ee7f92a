"""Read a checkpoint's tensors by rows, in GGUF's order: experts stacked, rows of heads split or permuted.

Rows are read from the shards when the encoder asks for them.
"""

from __future__ import annotations

import math

import numpy as np

from dsmoe_convert.checkpoint import Checkpoint
from dsmoe_convert.fp8 import Fp8Rows
from dsmoe_convert.shards import DTYPES, FP8, ShardSource, StoredTensor
from dsmoe_local.model.architectures.table import Order
from dsmoe_local.model.ggml import GgmlType, row_bytes
from dsmoe_local.model.layout import RowBlocks, TensorSpec
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
        part, row = divmod(first_row, self._rows)
        raw = scratch[: n_rows * self._row_bytes]
        self._shards.read_into(self._parts[part], row * self._row_bytes, raw.data)
        return raw


class BlockRows:
    """Rows of a source that consists of blocks, of which a part is taken and reordered. A RowSource."""

    def __init__(self, inner: RowSource, blocks: RowBlocks, n_columns: int, value_bytes: int) -> None:
        """`n_columns` are those of the source, and `value_bytes` the size of one of its values."""
        self.type: GgmlType = inner.type
        self._inner = inner
        self._blocks = blocks
        self._value = value_bytes
        self._row_bytes = n_columns * value_bytes
        # Rows that a block becomes.
        self._size = n_columns if blocks.order is Order.TRANSPOSED else blocks.n_rows

    def read(self, first_row: int, n_rows: int, scratch: Bytes) -> Bytes:
        """See RowSource. Rows that are reordered are read by whole blocks."""
        blocks = self._blocks
        first, end = first_row // self._size, -(-(first_row + n_rows) // self._size)
        if blocks.order is Order.PLAIN:
            row = first * blocks.n_source_rows + blocks.first + first_row - first * self._size
            return self._inner.read(row, n_rows, scratch)
        n_bytes = blocks.n_rows * self._row_bytes
        read = np.empty((end - first, n_bytes), np.uint8)
        for block, target in zip(range(first, end), read, strict=True):
            target[:] = self._inner.read(block * blocks.n_source_rows + blocks.first, blocks.n_rows, target)
        rows = self._ordered(read).reshape(-1)
        size = n_bytes // self._size
        start = (first_row - first * self._size) * size
        return rows[start : start + n_rows * size]

    def _ordered(self, read: Bytes) -> Bytes:
        """Return blocks, shape (n, bytes), with their rows in the order of the GGUF file."""
        if self._blocks.order is Order.PAIRS:
            return read.reshape(len(read), 2, -1, self._row_bytes).swapaxes(1, 2)
        return read.reshape(len(read), self._blocks.n_rows, -1, self._value).swapaxes(1, 2)


def rows_of(checkpoint: Checkpoint, spec: TensorSpec) -> RowSource:
    """Return the source of a tensor's rows. `check_tensors` must have checked the checkpoint."""
    parts = tuple(checkpoint.tensors[source] for source in spec.sources)
    rows: RowSource = StackedRows(checkpoint.shards, parts)
    if checkpoint.scales and parts[0].dtype == FP8:
        rows = Fp8Rows(rows, checkpoint.shards, parts[0].shape, checkpoint.scales, spec.sources)
    if spec.blocks is None:
        return rows
    return BlockRows(rows, spec.blocks, parts[0].shape[-1], row_bytes(rows.type, 1))


def source_position(spec: TensorSpec, index: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the checkpoint's name and index of the weight at `index` of a tensor in the GGUF file."""
    if len(spec.sources) > 1:
        return spec.sources[index[0]], index[1:]
    if spec.blocks is None:
        return spec.sources[0], index
    blocks = spec.blocks
    *_, row, column = index
    block = index[0] if len(index) == 3 else row // blocks.n_rows
    row = row if len(index) == 3 else row % blocks.n_rows
    if blocks.order is Order.TRANSPOSED:
        row, column = column, row
    if blocks.order is Order.PAIRS:
        pair, half = divmod(row, 2)
        row = half * (blocks.n_rows // 2) + pair
    row += blocks.first
    if spec.is_fused:
        return spec.sources[0], (block, row, column)
    return spec.sources[0], (block * blocks.n_source_rows + row, column)
