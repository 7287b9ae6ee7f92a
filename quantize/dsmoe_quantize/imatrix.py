"""Importance matrices: the importance of each column of each matrix, from activations of the model.

Sums of squares and counts are kept as collected; `Imatrix.importance` turns them into what kernels take.
`imatrix_file` reads and writes files, `dsmoe_local.evaluate.importance` collects.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.gguf_file import Field

MIN_TOKENS = 64
"""The statistics of an expert that received fewer tokens are blended with the mean of its layer."""
MIN_IMPORTANCE = np.float32(1e-6)
"""The least importance of a column, relative to its matrix's mean. Kernels would zero columns without any."""

_MAX_TEXT = 127  # the length to which llama.cpp cuts names in the metadata


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """The statistics of one tensor.

    Sums of squared activations, shape (n_matrices, n_columns), and the number of vectors, shape (n_matrices).
    There is one row for all matrices, (1, n_matrices * n_columns), if they have one count: for the heads of
    MLA's projections, and in the legacy format.
    """

    sums: NDArray[np.float32]
    counts: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Imatrix:
    """The statistics of a model's tensors.

    They come from `n_chunks` chunks of `chunk_size` tokens of the texts `datasets`.

    A `chunk_size` of 0 means the legacy format: its counts are of chunks, not tokens, and the same for all
    experts. `run` is the record that this project's collector keeps in the file to resume a run.
    """

    entries: Mapping[str, Statistics]
    datasets: tuple[str, ...]
    n_chunks: int
    chunk_size: int
    name: str = ""
    run: Mapping[str, object] = field(default_factory=dict)

    @property
    def is_legacy(self) -> bool:
        """True for the legacy format, whose counts are not those of tokens."""
        return self.chunk_size == 0

    def digest(self) -> str:
        """Return a digest of everything that affects encoded weights."""
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(name.encode() + entry.sums.tobytes() + entry.counts.tobytes())
        return digest.hexdigest()

    def importance(self, name: str, shape: Sequence[int]) -> NDArray[np.float32] | None:
        """Return the importance of each column, shape (n_matrices, n_columns), or None if it is unknown.

        It is the mean square s/n of the column's activations: their sum of squares s over n tokens. For an
        expert with n < N = MIN_TOKENS it is (s + (N - n) m) / N, where m is the mean square over all tokens
        of the layer's experts. So an expert that was never chosen has m.

        Raises UsageError if the shape is not that of the tensor in the statistics.
        """
        entry = self.entries.get(name)
        if entry is None or not entry.counts.any():
            return None
        n_matrices, n_columns = shape[0] if len(shape) > 2 else 1, shape[-1]
        if entry.sums.size != n_matrices * n_columns or len(entry.counts) not in (1, n_matrices):
            raise UsageError(
                f"the importance matrix is of another model: it has {entry.sums.size} columns,"
                f" the tensor has {n_matrices * n_columns}",
                where=name,
                remedy="collect one from this model: dsmoe imatrix",
            )
        sums = entry.sums.reshape(n_matrices, n_columns)
        means: NDArray[np.float32] = sums / np.maximum(entry.counts, 1).astype(np.float32)[:, None]
        if len(entry.counts) > 1:
            _blend_rare_experts(means, sums, entry.counts)
        np.maximum(means, MIN_IMPORTANCE * _level(means), out=means)
        return means


def _blend_rare_experts(
    means: NDArray[np.float32], sums: NDArray[np.float32], counts: NDArray[np.int64]
) -> None:
    """Replace the means of experts with fewer than MIN_TOKENS tokens; see `Imatrix.importance`."""
    cold = counts < MIN_TOKENS
    if cold.any():
        layer = sums.sum(0, dtype=np.float64) / counts.sum()
        missing = (MIN_TOKENS - counts[cold])[:, None]
        means[cold] = (sums[cold] + missing * layer) / MIN_TOKENS


def _level(means: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mean of each matrix; where it is 0, that of all matrices."""
    level: NDArray[np.float32] = means.mean(1, keepdims=True)
    level[level == 0] = means.mean() or 1
    return level


def merged(parts: Sequence[Imatrix]) -> Imatrix:
    """Merge matrices that were collected from several texts, by adding sums and counts.

    Raises UsageError if they are of different models, or one has the legacy format.
    """
    if old := next((part for part in parts if part.is_legacy), None):
        raise UsageError(
            "an importance matrix in the legacy format cannot be merged: it has no counts per expert",
            where=safe_line(old.name),
            remedy="collect it again, as GGUF",
        )
    for at, part in enumerate(parts):
        # Each may have tensors that another lacks, the output for example.
        others = {name for other in (*parts[:at], *parts[at + 1 :]) for name in other.entries}
        if others and not part.entries.keys() & others:
            raise UsageError(
                "an importance matrix is of another model: it has no tensor in common with the others",
                where=safe_line(part.name),
                remedy="merge matrices of one model",
            )
    entries: dict[str, Statistics] = {}
    for part in parts:
        for name, entry in part.entries.items():
            entries[name] = _sum(name, entries[name], entry) if name in entries else entry
    size = parts[0].chunk_size
    n_tokens = sum(part.n_chunks * part.chunk_size for part in parts)
    return Imatrix(
        entries,
        tuple(dict.fromkeys(name for part in parts for name in part.datasets)),
        n_tokens // size,
        size,
    )


def _sum(name: str, first: Statistics, second: Statistics) -> Statistics:
    if first.sums.shape != second.sums.shape or first.counts.shape != second.counts.shape:
        raise UsageError(
            f"the importance matrices are of different models: {first.sums.shape} and {second.sums.shape}",
            where=safe_line(name),
            remedy="merge matrices of one model",
        )
    sums = np.add(first.sums, second.sums, dtype=np.float64).astype(np.float32)
    return Statistics(sums, first.counts + second.counts)


def metadata_of_use(imatrix: Imatrix) -> dict[str, Field]:
    """Return the metadata of a file that was quantized with the matrix, as llama.cpp's tool writes it."""
    found = {"quantize.imatrix.file": Field(safe_line(imatrix.name, _MAX_TEXT), GGUFValueType.STRING)}
    if imatrix.datasets:
        dataset = safe_line(imatrix.datasets[0], _MAX_TEXT)
        found["quantize.imatrix.dataset"] = Field(dataset, GGUFValueType.STRING)
    found["quantize.imatrix.entries_count"] = Field(len(imatrix.entries), GGUFValueType.UINT32)
    if imatrix.n_chunks:
        found["quantize.imatrix.chunks_count"] = Field(imatrix.n_chunks, GGUFValueType.UINT32)
    return found


def is_plausible(values: NDArray[np.float32]) -> bool:
    """True if all values are finite and not negative, as sums of squares and counts must be."""
    return bool(np.isfinite(values).all()) and float(values.min(initial=math.inf)) >= 0
