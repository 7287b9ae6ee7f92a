"""Encode rows of one type as rows of another, slab by slab, and check all weights. No files, no threads.

A slab is a few MiB of rows of one matrix. It is processed in pieces that stay in a core's cache between the
three steps (check, convert to f32, encode), so that each weight is read from memory once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dsmoe_local.base.errors import UsageError
from dsmoe_local.model.ggml import FLOATS, GgmlType, Tensor, block_size, row_bytes
from dsmoe_quantize.errors import WeightError
from dsmoe_quantize.write import kernels

Bytes: TypeAlias = NDArray[np.uint8]

SLAB_BYTES = 2 << 20
"""Source bytes read, encoded and written at a time."""
PIECE_WEIGHTS = 128 << 10
"""Weights in a piece: 512 KiB as f32, half of a core's second-level cache."""


class RowSource(Protocol):
    """The weights of one tensor, read by rows. Used by several threads at once.

    Rows are those of the whole tensor: the rows of expert 0, then those of expert 1, and so on.
    """

    @property
    def type(self) -> GgmlType:
        """How the rows are stored."""
        ...

    def read(self, first_row: int, n_rows: int, scratch: Bytes) -> Bytes:
        """Return `n_rows` rows from `first_row` on, all of one expert, as contiguous bytes.

        `scratch` is memory of at least that size. The source may fill it and return a part of it, or return
        memory of its own. Raises FileError or FormatError.
        """
        ...


@dataclass(frozen=True, slots=True)
class TensorJob(Tensor):
    """A tensor to encode in `type` and write. `source` reads its weights.

    `importance` is that of each column of each matrix, shape (n_matrices, n_columns), or None.
    """

    source: RowSource
    importance: NDArray[np.float32] | None = field(default=None, compare=False)

    @property
    def n_columns(self) -> int:
        """Weights per row."""
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        """Rows of all matrices together."""
        return math.prod(self.shape[:-1])

    @property
    def rows_per_matrix(self) -> int:
        """Rows of one expert, or of the tensor if it is a single matrix or vector."""
        return self.shape[-2] if len(self.shape) > 1 else 1

    def importance_at(self, row: int) -> int | None:
        """Return the address of the importance of the columns of the matrix that contains `row`."""
        if self.importance is None:
            return None
        address: int = self.importance[row // self.rows_per_matrix].ctypes.data
        return address


@dataclass(frozen=True, slots=True)
class Slab:
    """Some rows of one matrix of a tensor."""

    first_row: int
    n_rows: int


def check_job(job: TensorJob) -> None:
    """Raise UsageError if no kernel encodes the type, or its blocks do not divide the columns.

    Raises ValueError if the importance has another shape or layout than the job says.
    """
    source, target = job.source.type, job.type
    if job.importance is not None:
        wanted = (job.n_rows // job.rows_per_matrix, job.n_columns)
        if job.importance.shape != wanted or job.importance.dtype != np.float32:
            raise ValueError(f"{job.name}: importance has shape {job.importance.shape}, not {wanted}")
        if not job.importance.flags.c_contiguous:
            raise ValueError(f"{job.name}: importance must be contiguous")
    if source is target:
        return
    if source not in kernels.READABLE or target not in kernels.WRITABLE:
        raise UsageError(
            f"cannot encode {source.name} as {target.name}",
            where=job.name,
            remedy="choose another type for it with --tensor-type",
        )
    if job.n_columns % block_size(target):
        raise UsageError(
            f"{target.name} needs a multiple of {block_size(target)} columns, not {job.n_columns}",
            where=job.name,
            remedy="choose another type for it with --tensor-type",
        )


def slabs(job: TensorJob) -> Iterator[Slab]:
    """Cut a tensor into slabs of about SLAB_BYTES. They have equal sizes within a matrix; none spans two."""
    rows = job.rows_per_matrix
    source_bytes = rows * row_bytes(job.source.type, job.n_columns)
    per_matrix = min(rows, max(1, round(source_bytes / SLAB_BYTES)))
    edges = [rows * part // per_matrix for part in range(per_matrix + 1)]
    for matrix in range(0, job.n_rows, rows):
        for start, end in pairwise(edges):
            yield Slab(matrix + start, end - start)


@dataclass(frozen=True, slots=True)
class _Steps:
    """The steps from one type to another: none for a copy, both if neither type is f32."""

    decode: Callable[[int, int, int], object] | None
    encode: Callable[[int, int, int, int, int | None], int] | None

    @classmethod
    def between(cls, source: GgmlType, target: GgmlType) -> _Steps:
        if source is target:
            return cls(None, None)
        return cls(
            None if source is GgmlType.F32 else kernels.decoder(source),
            None if target is GgmlType.F32 else kernels.encoder(target),
        )


class SlabEncoder:
    """Encodes one slab at a time, in buffers that it reuses. Each thread needs its own."""

    def __init__(self) -> None:
        self._scratch = np.empty(0, np.uint8)
        self._floats = np.empty(0, np.float32)
        self._output = np.empty(0, np.uint8)

    def read(self, job: TensorJob, slab: Slab) -> Bytes:
        """Return the slab in the source's type, in memory that the next call reuses."""
        n_bytes = slab.n_rows * row_bytes(job.source.type, job.n_columns)
        if self._scratch.size < n_bytes:
            self._scratch = np.empty(n_bytes, np.uint8)
        raw = job.source.read(slab.first_row, slab.n_rows, self._scratch)
        if raw.nbytes != n_bytes or not raw.flags.c_contiguous:
            raise ValueError(f"{job.name}: the source returned {raw.nbytes} bytes, not {n_bytes}")
        return raw

    def encode(self, job: TensorJob, slab: Slab, raw: Bytes, stopped: Callable[[], bool]) -> Bytes | None:
        """Return the slab in the job's type, in memory that the next call reuses; None if it was stopped.

        Raises WeightError for a weight that is NaN, infinite, or too large for the type.
        """
        source, target, columns = job.source.type, job.type, job.n_columns
        source_row, target_row = row_bytes(source, columns), row_bytes(target, columns)
        piece_rows = min(slab.n_rows, max(1, PIECE_WEIGHTS // columns))
        steps = _Steps.between(source, target)
        output = raw if source is target else self._room(slab.n_rows * target_row, piece_rows * columns)
        importance = job.importance_at(slab.first_row)
        raw_at, output_at, floats_at = raw.ctypes.data, output.ctypes.data, self._floats.ctypes.data
        for start in range(0, slab.n_rows, piece_rows):
            if stopped():
                return None
            rows = min(piece_rows, slab.n_rows - start)
            piece = raw[start * source_row : (start + rows) * source_row]
            if not usable(piece, source):
                raise not_finite(job, slab.first_row + start, piece)
            source_at, target_at = raw_at + start * source_row, output_at + start * target_row
            if steps.decode:
                decoded_at = floats_at if steps.encode else target_at
                steps.decode(source_at, decoded_at, rows * columns)
                source_at = decoded_at
            if steps.encode:
                steps.encode(source_at, target_at, rows, columns, importance)
                if not usable(output[start * target_row : (start + rows) * target_row], target):
                    raise _too_large(job, slab.first_row + start, piece)
        return output

    def _room(self, n_bytes: int, n_floats: int) -> Bytes:
        """Return an output buffer of exactly `n_bytes`, and grow `_floats` to `n_floats`."""
        if self._output.size < n_bytes:
            self._output = np.empty(n_bytes, np.uint8)
        if self._floats.size < n_floats:
            self._floats = np.empty(n_floats, np.float32)
        return self._output[:n_bytes]


# Signed view, unsigned view, exponent mask (all of its bits are set in NaN and infinity), sign bit.
_EXPONENTS: dict[GgmlType, tuple[type[np.signedinteger], type[np.unsignedinteger], int, int]] = {
    GgmlType.F32: (np.int32, np.uint32, 0x7F800000, 0x80000000),
    GgmlType.F16: (np.int16, np.uint16, 0x7C00, 0x8000),
    GgmlType.BF16: (np.int16, np.uint16, 0x7F80, 0x8000),
}


def usable(raw: Bytes, kind: GgmlType) -> bool:
    """True if all weights are finite, or, for block types, all scales. Copies nothing."""
    if kind not in FLOATS:
        return kernels.validator(kind)(raw.ctypes.data, raw.nbytes)
    signed, unsigned, exponent, sign = _EXPONENTS[kind]
    # The signed maximum belongs to the largest positive weight, the unsigned one to the largest negative.
    return int(raw.view(signed).max()) < exponent and int(raw.view(unsigned).max()) < exponent | sign


def _floats_of(raw: Bytes, kind: GgmlType) -> NDArray[np.float32]:
    if kind is GgmlType.F32:
        return raw.view(np.float32)
    floats = np.zeros(raw.nbytes // row_bytes(kind, block_size(kind)) * block_size(kind), np.float32)
    if kind in kernels.READABLE:
        kernels.decoder(kind)(raw.ctypes.data, floats.ctypes.data, floats.size)
    return floats


def _index(job: TensorJob, first_row: int, at: int) -> tuple[int, ...]:
    flat = first_row * job.n_columns + at
    return tuple(int(position) for position in np.unravel_index(flat, job.shape))


def not_finite(job: TensorJob, first_row: int, piece: Bytes) -> WeightError:
    """Return the error for rows of the source, from `first_row` on, that are not `usable`."""
    floats = _floats_of(piece, job.source.type)
    at = int(np.argmin(np.isfinite(floats)))
    what = "a weight is NaN" if np.isnan(floats[at]) else "a weight is infinite"
    return WeightError(
        what,
        tensor=job.name,
        index=_index(job, first_row, at),
        remedy="the source is damaged: download or train it again",
    )


def _too_large(job: TensorJob, first_row: int, piece: Bytes) -> WeightError:
    floats = _floats_of(piece, job.source.type)
    at = int(np.argmax(np.abs(floats)))
    return WeightError(
        f"the weight {floats[at]:.6g} is too large for {job.type.name}",
        tensor=job.name,
        index=_index(job, first_row, at),
        remedy="choose bf16 or f32 for this tensor with --tensor-type",
    )
