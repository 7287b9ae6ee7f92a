"""Measure the error that each type causes in each tensor, by encoding and decoding its weights.

The error of a tensor is the sum of the squared differences of its weights. With an importance matrix each
difference is weighted by its column's importance, and for an expert by how often it is chosen. If differences
are independent, that is the expected squared error of the tensor's output. Divided by the same sum over the
weights themselves (`energy`), it is a relative error, which can be compared between tensors.

Of large tensors only a sample of rows is measured, always the same rows, spread over all experts. Each thread
needs a few hundred KB, whatever the model's size.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Annotated, TypeAlias

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Started, ignore
from dsmoe_local.base.sequences import runs
from dsmoe_local.model.ggml import FLOATS, GgmlType, block_size, row_bytes
from dsmoe_local.model.gguf_file import GgufFile, TensorInfo
from dsmoe_quantize.errors import WeightError
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.policy.choice import may_change
from dsmoe_quantize.quantize import GgufRows, opened
from dsmoe_quantize.write import kernels
from dsmoe_quantize.write.encoder import PIECE_WEIGHTS, Bytes, TensorJob, not_finite, usable
from dsmoe_quantize.write.pipeline import n_cores

Count: TypeAlias = Annotated[int, Meta(ge=1)]
NonNegative: TypeAlias = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
"""Constraints that `sensitivity_file` checks."""

SAMPLE = 1 << 18
"""Default number of weights to measure in each tensor."""
_GOLDEN = (5**0.5 - 1) / 2  # the fractional parts of its first n multiples are spread evenly, for every n

_QUANTIZED = tuple(kind for kind in GgmlType if kind in kernels.WRITABLE - FLOATS)


@dataclass(frozen=True, slots=True)
class TensorErrors:
    """A tensor's weighted error in each type, and its `energy`: sums over the `n_tried` weights measured."""

    n_weights: Count
    n_tried: Count
    energy: NonNegative
    errors: Mapping[GgmlType, NonNegative]

    def __post_init__(self) -> None:
        if self.n_tried > self.n_weights:
            raise ValueError("more weights were measured than there are")


@dataclass(frozen=True, slots=True)
class Probe:
    """One group quantized alone.

    Its relative error, and the KL divergence of the whole model that results: the mean in nats, with its
    standard error.
    """

    error: NonNegative
    kl: NonNegative
    kl_error: NonNegative


@dataclass(frozen=True, slots=True)
class Probes:
    """How `Sensitivity.weights` were measured.

    The text, the windows of it that were read, the types tried, and the results of each group.

    `floor` is the KL divergence, in nats, of the unchanged model from itself. `n_windows_of_text` is the
    number of windows in the whole text, 0 if it is unknown.
    """

    text: str
    text_digest: str
    n_context: Count
    n_windows: Count
    types: tuple[GgmlType, ...]
    floor: NonNegative
    groups: Mapping[str, Mapping[GgmlType, Probe]] = field(default_factory=dict)
    n_windows_of_text: int = 0

    def __post_init__(self) -> None:
        if self.n_windows_of_text and self.n_windows_of_text < self.n_windows:
            raise ValueError("the text has fewer windows than were read")


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The measurements of a model.

    `source`, `imatrix` and `kernels` identify the model, the importance matrix and the version of the
    kernels.

    `weights`, where they were measured, are the KL divergence in nats that a relative error of 1 would cause
    in a group ("routed-down.5") or in all layers of a kind ("routed-down"); `error_weights` applies them.
    `probes` is how `dsmoe eval --sensitivity` measured them, if it did.
    """

    source: str
    imatrix: str
    kernels: str
    sample: Annotated[int, Meta(ge=0)]
    tensors: Mapping[str, TensorErrors] = field(default_factory=dict)
    weights: Mapping[str, NonNegative] = field(default_factory=dict)
    probes: Probes | None = None

    @property
    def share(self) -> float:
        """The share of the tensors' weights that was measured."""
        n_weights = sum(each.n_weights for each in self.tensors.values())
        return sum(each.n_tried for each in self.tensors.values()) / max(n_weights, 1)


def candidates(tensor: TensorInfo) -> list[GgmlType]:
    """Return the types that a tensor may get: block types that divide its columns, and its own block type.

    A float type is a candidate only if no block type fits.
    """
    fitting = [kind for kind in _QUANTIZED if tensor.shape[-1] % block_size(kind) == 0]
    if not fitting:
        return sorted({GgmlType.F16, tensor.type})
    return fitting if tensor.type in FLOATS or tensor.type in fitting else [*fitting, tensor.type]


def unmeasured(file: GgufFile, known: Sensitivity) -> list[TensorInfo]:
    """Return the tensors of `file` that may change and are not in `known`."""
    return [tensor for tensor in _wanted(file) if tensor.name not in known.tensors]


def _wanted(file: GgufFile) -> list[TensorInfo]:
    return [tensor for tensor in file.tensors.values() if may_change(tensor)]


def measure(
    file: GgufFile,
    known: Sensitivity,
    imatrix: Imatrix | None = None,
    *,
    threads: int = 0,
    keep: Callable[[Sensitivity], None] = lambda sensitivity: None,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> Sensitivity:
    """Measure every tensor of `file` that may change and is not in `known`; return it with all results.

    `keep` is called with the results so far after each tensor. `threads` 0 means all cores; their number does
    not affect the results. Raises WeightError for weights that are NaN or infinite, FileError, and
    InterruptedRunError when `stop` is set.
    """
    stop = stop or threading.Event()
    wanted, missing = _wanted(file), unmeasured(file, known)
    found = dict(known.tensors)
    lock = threading.Lock()
    listen(Started("measuring", len(wanted), len(wanted) - len(missing), "tensors"))

    def snapshot() -> Sensitivity:
        ordered = {tensor.name: found[tensor.name] for tensor in wanted if tensor.name in found}
        return replace(known, tensors=ordered)

    with opened(file) as source, ThreadPoolExecutor(threads or n_cores()) as pool:

        def work(tensor: TensorInfo) -> None:
            trial = _Trial(tensor, source.rows(tensor), imatrix, known.sample)
            errors = trial.run(stop.is_set)
            if errors is not None:
                with lock:
                    found[tensor.name] = errors
                    keep(snapshot())
                    listen(Advanced(1, tensor.name))

        futures = [pool.submit(work, tensor) for tensor in missing]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    # Also if the last tensor was measured meanwhile: what follows does not look at `stop`.
    if stop.is_set():
        raise InterruptedRunError(
            f"interrupted: {len(found)} of {len(wanted)} tensors measured",
            remedy="run the same command again to continue",
        )
    listen(Finished("measuring"))
    return snapshot()


def sampled_rows(n_matrices: int, rows_per_matrix: int, n_columns: int, sample: int) -> list[list[int]]:
    """Return the rows of each matrix to measure, in order.

    They have about `sample` weights in all, are spread evenly, and include at least one row of each matrix.
    All rows if `sample` is 0.
    """
    n_rows = max(1, round(sample / (n_matrices * n_columns)))
    if not sample or n_rows >= rows_per_matrix:
        return [list(range(rows_per_matrix))] * n_matrices
    picked = []
    for matrix in range(n_matrices):
        places = ((matrix + number * n_matrices + 0.5) * _GOLDEN % 1 for number in range(n_rows))
        picked.append(sorted({int(place * rows_per_matrix) for place in places}))
    return picked


class _Trial:
    """Measures one tensor under every candidate type. Used by one thread."""

    def __init__(self, tensor: TensorInfo, rows: GgufRows, imatrix: Imatrix | None, sample: int) -> None:
        self._tensor = tensor
        self._rows = rows
        self._columns = tensor.shape[-1]
        self._per_matrix = tensor.shape[-2]
        self._n_matrices = tensor.n_weights // (self._columns * self._per_matrix)
        self._sample = sample
        self._types = [kind for kind in candidates(tensor) if kind is not tensor.type]
        self._importance = imatrix.importance(tensor.name, tensor.shape) if imatrix else None
        self._frequency = _frequencies(tensor.name, self._n_matrices, imatrix)

    def run(self, stopped: Callable[[], bool]) -> TensorErrors | None:
        """Return the errors; None if `stopped` returned True. Types that cannot hold a weight are omitted."""
        energy, n_tried = 0.0, 0
        errors = dict.fromkeys(self._types, 0.0)
        picked = sampled_rows(self._n_matrices, self._per_matrix, self._columns, self._sample)
        for matrix, rows in enumerate(picked):
            frequency = float(self._frequency[matrix])
            weights = None if self._importance is None else self._importance[matrix]
            for floats in self._pieces(matrix, rows):
                if stopped():
                    return None
                n_tried += floats.size
                energy += frequency * _weighted(np.square(floats), weights)
                for kind in list(errors):
                    difference = self._difference(floats, kind, weights)
                    if difference is None:
                        del errors[kind]
                    else:
                        errors[kind] += frequency * _weighted(difference, weights)
        if self._tensor.type in candidates(self._tensor):
            errors[self._tensor.type] = 0.0
        return TensorErrors(self._tensor.n_weights, n_tried, energy, errors)

    def _pieces(self, matrix: int, rows: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Yield the rows as f32, (rows, columns), a few at a time, in memory that the next piece reuses."""
        kind, columns = self._tensor.type, self._columns
        per_piece = min(len(rows), max(1, PIECE_WEIGHTS // columns))
        n_bytes = row_bytes(kind, columns)
        raw = np.empty(per_piece * n_bytes, np.uint8)
        floats = np.empty((per_piece, columns), np.float32)
        for start in range(0, len(rows), per_piece):
            part = rows[start : start + per_piece]
            piece = raw[: len(part) * n_bytes]
            self._read(matrix * self._per_matrix, part, piece, n_bytes)
            if not usable(piece, kind):
                raise self._bad_weight(matrix, part, piece)
            if kind is GgmlType.F32:
                yield piece.view(np.float32).reshape(len(part), columns)
            else:
                kernels.decoder(kind)(piece.ctypes.data, floats.ctypes.data, len(part) * columns)
                yield floats[: len(part)]

    def _bad_weight(self, matrix: int, rows: Sequence[int], piece: Bytes) -> WeightError:
        lines = list(piece.reshape(len(rows), -1))
        at = next(at for at, line in enumerate(lines) if not usable(line, self._tensor.type))
        job = TensorJob(self._tensor.name, self._tensor.shape, self._tensor.type, self._rows)
        return not_finite(job, matrix * self._per_matrix + rows[at], lines[at])

    def _read(self, first: int, rows: Sequence[int], into: Bytes, n_bytes: int) -> None:
        done = 0
        for run in runs(rows):
            part = into[done * n_bytes : (done + len(run)) * n_bytes]
            part[:] = self._rows.read(first + run[0], len(run), part)
            done += len(run)

    def _difference(
        self, floats: NDArray[np.float32], kind: GgmlType, weights: NDArray[np.float32] | None
    ) -> NDArray[np.float32] | None:
        """Return the squared differences that encoding causes; None if the type cannot hold the weights."""
        n_rows, columns = floats.shape
        encoded = np.empty(n_rows * row_bytes(kind, columns), np.uint8)
        address = None if weights is None or kind in FLOATS else weights.ctypes.data
        kernels.encoder(kind)(floats.ctypes.data, encoded.ctypes.data, n_rows, columns, address)
        if not usable(encoded, kind):
            return None
        again = np.empty_like(floats)
        kernels.decoder(kind)(encoded.ctypes.data, again.ctypes.data, again.size)
        again -= floats
        return np.square(again, out=again)


def _frequencies(name: str, n_matrices: int, imatrix: Imatrix | None) -> NDArray[np.float64]:
    """Return how often each matrix is used, relative to the mean. Counts get 1 added, so that none is 0."""
    entry = imatrix.entries.get(name) if imatrix else None
    if entry is None or len(entry.counts) != n_matrices:
        return np.ones(n_matrices)
    counts = entry.counts + 1.0
    frequencies: NDArray[np.float64] = counts / counts.mean()
    return frequencies


def _weighted(squares: NDArray[np.float32], weights: NDArray[np.float32] | None) -> float:
    """Return the sum weighted by column, in double precision and always in the same order."""
    columns = squares.sum(axis=0, dtype=np.float64)
    return float(columns.sum() if weights is None else (columns * weights).sum())
