"""Importance matrices: how much each input channel of each matrix matters, from activations that were seen.

Sums of squares and counts are kept raw; what a kernel is given is made here, where a file is read for
quantizing. Files are `imatrix_file`'s concern, collecting `dsmoe_local.evaluate.importance`'s.
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

FEW = 64
"""Tokens below which an expert's own statistics are filled up with its layer's mean."""
FLOOR = np.float32(1e-6)
"""No channel counts less than this share of its matrix's mean: the kernels keep nothing of what is 0."""

_MAX_TEXT = 127  # what llama.cpp keeps of a name in the metadata


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Of one tensor: sums of the squares of what its matrices were multiplied with, shape (n_matrices,
    n_columns), and how many vectors, shape (n_matrices). The old form of the file has one line for all.
    """

    sums: NDArray[np.float32]
    counts: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Imatrix:
    """What was seen of a model, by tensor. `n_chunks` windows of `chunk_size` tokens of texts called
    `datasets`; a size of 0: the file has the old form, whose counts are windows, and of no single expert.

    `run` is what this project's collector says of itself.
    """

    entries: Mapping[str, Statistics]
    datasets: tuple[str, ...]
    n_chunks: int
    chunk_size: int
    name: str = ""
    run: Mapping[str, object] = field(default_factory=dict)

    @property
    def is_old(self) -> bool:
        """Whether the counts are not those of tokens."""
        return self.chunk_size == 0

    def digest(self) -> str:
        """Tells matrices apart by what they make of weights."""
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(name.encode() + entry.sums.tobytes() + entry.counts.tobytes())
        return digest.hexdigest()

    def importance(self, name: str, shape: Sequence[int]) -> NDArray[np.float32] | None:
        """What each channel of each matrix of a tensor counts, shape (n_matrices, n_columns), or None if
        nothing is known. UsageError if the tensor is another than the one that was seen.

        The mean square s/n. An expert with n < FEW is filled up with m, the mean over all tokens of the
        layer's experts: (s + (FEW - n) m) / FEW. So an expert that was never chosen has m, and from FEW on
        its own statistics count alone.
        """
        entry = self.entries.get(name)
        if entry is None or not entry.counts.any():
            return None
        n_matrices, n_columns = shape[0] if len(shape) > 2 else 1, shape[-1]
        if entry.sums.size != n_matrices * n_columns or len(entry.counts) not in (1, n_matrices):
            raise UsageError(
                f"the importance matrix is of another model: {entry.sums.size} channels,"
                f" the tensor has {n_matrices * n_columns}",
                where=name,
                remedy="collect one from this model: dsmoe imatrix",
            )
        sums = entry.sums.reshape(n_matrices, n_columns)
        means: NDArray[np.float32] = sums / np.maximum(entry.counts, 1).astype(np.float32)[:, None]
        if len(entry.counts) > 1:
            _fill_up(means, sums, entry.counts)
        np.maximum(means, FLOOR * _level(means), out=means)
        return means


def _fill_up(means: NDArray[np.float32], sums: NDArray[np.float32], counts: NDArray[np.int64]) -> None:
    cold = counts < FEW
    if cold.any():
        layer = sums.sum(0, dtype=np.float64) / counts.sum()
        missing = (FEW - counts[cold])[:, None]
        means[cold] = (sums[cold] + missing * layer) / FEW


def _level(means: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean of each matrix; where all is 0, that of all matrices."""
    level: NDArray[np.float32] = means.mean(1, keepdims=True)
    level[level == 0] = means.mean() or 1
    return level


def merged(parts: Sequence[Imatrix]) -> Imatrix:
    """One matrix as of all texts together: sums and counts add up. UsageError if they are of different
    models, or one has the old form.
    """
    if old := next((part for part in parts if part.is_old), None):
        raise UsageError(
            "an importance matrix of the old form cannot be merged: it does not say how often an expert was"
            " chosen",
            where=safe_line(old.name),
            remedy="make it again, in GGUF form",
        )
    for at, part in enumerate(parts):
        # Each may know tensors that another does not: with and without the output, for one.
        others = {name for other in (*parts[:at], *parts[at + 1 :]) for name in other.entries}
        if others and not part.entries.keys() & others:
            raise UsageError(
                "an importance matrix is of another model: no tensor in common with the others",
                where=safe_line(part.name),
                remedy="merge those of one model",
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
        )
    sums = np.add(first.sums, second.sums, dtype=np.float64).astype(np.float32)
    return Statistics(sums, first.counts + second.counts)


def metadata_of_use(imatrix: Imatrix) -> dict[str, Field]:
    """What a quantized file says of the matrix it was made with, as llama.cpp's tool writes it."""
    found = {"quantize.imatrix.file": Field(safe_line(imatrix.name, _MAX_TEXT), GGUFValueType.STRING)}
    if imatrix.datasets:
        dataset = safe_line(imatrix.datasets[0], _MAX_TEXT)
        found["quantize.imatrix.dataset"] = Field(dataset, GGUFValueType.STRING)
    found["quantize.imatrix.entries_count"] = Field(len(imatrix.entries), GGUFValueType.UINT32)
    if imatrix.n_chunks:
        found["quantize.imatrix.chunks_count"] = Field(imatrix.n_chunks, GGUFValueType.UINT32)
    return found


def is_plausible(values: NDArray[np.float32]) -> bool:
    """Whether sums of squares, or counts, can be what they say they are."""
    return bool(np.isfinite(values).all()) and float(values.min(initial=math.inf)) >= 0
