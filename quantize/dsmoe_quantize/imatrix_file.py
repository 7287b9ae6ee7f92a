"""Importance matrix files: read and write llama.cpp's GGUF format, read its legacy format.

The GGUF has two F32 tensors for each tensor of the model: `<tensor>.in_sum2`, (n_matrices, n_columns), and
`<tensor>.counts`, (n_matrices, 1). The legacy format (`.dat`) has means times the number of chunks, without
counts per expert:

    number of entries, then for each: length and text of the name, chunks, number of values, the values;
    number of chunks in all, length and text of the dataset's name

Its numbers have four bytes, little-endian.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from dsmoe_local.base import durable
from dsmoe_local.base.durable import read_at_most
from dsmoe_local.base.errors import FormatError, file_errors
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.ggml import GgmlType, Tensor
from dsmoe_local.model.gguf_file import MAGIC, Field, GgufFile, TensorInfo, read_gguf
from dsmoe_local.model.gguf_writer import plan_gguf, write_at
from dsmoe_quantize.imatrix import Imatrix, Statistics, is_plausible

_TYPE = "imatrix"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _N_CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_RUN = "dsmoe.imatrix.run"
_INT = struct.Struct("<i")
_MAX_LEGACY_BYTES = 1 << 30
_MAX_NAME = 1 << 12


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix in either format. Raises FileError and FormatError."""
    with file_errors("cannot read the importance matrix", path):
        with path.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
        return _read_gguf(path) if is_gguf else _LegacyReader(path).read()


def write_imatrix(imatrix: Imatrix, path: Path, reached: Callable[[], None] = lambda: None) -> None:
    """Write a GGUF file atomically and durably, replacing an existing one. Raises OSError.

    The caller holds `durable.locked(path)`. `reached` is called before the file gets its final name.
    """
    arrays: dict[str, NDArray[np.float32]] = {}
    for name in sorted(imatrix.entries):
        entry = imatrix.entries[name]
        arrays[name + _SUMS] = np.ascontiguousarray(entry.sums, "<f4")
        arrays[name + _COUNTS] = entry.counts.astype("<f4")[:, None]
    tensors = [Tensor(name, array.shape, GgmlType.F32) for name, array in arrays.items()]
    plan = plan_gguf(_metadata(imatrix), tensors)
    # Under the lock, a temp file can only be what a killed run left behind: it is overwritten.
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.ftruncate(descriptor, plan.size)
        write_at(descriptor, plan.header, 0)
        for name, array in arrays.items():
            write_at(descriptor, array.data, plan.offsets[name])
        durable.sync(descriptor)
        reached()
        durable.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _metadata(imatrix: Imatrix) -> dict[str, Field]:
    found = {
        "general.type": Field(_TYPE, GGUFValueType.STRING),
        # llama.cpp's quantizer requires the list, and GGUF writers cannot write an empty one.
        _DATASETS: Field(list(imatrix.datasets) or ["unknown"], GGUFValueType.ARRAY, GGUFValueType.STRING),
        _N_CHUNKS: Field(imatrix.n_chunks, GGUFValueType.UINT32),
        _CHUNK_SIZE: Field(imatrix.chunk_size, GGUFValueType.UINT32),
    }
    if imatrix.run:
        found[_RUN] = Field(json.dumps(dict(imatrix.run)), GGUFValueType.STRING)
    return found


def _refusal(path: Path, what: str, where: str = "") -> FormatError:
    return FormatError(
        f"not a usable importance matrix: {what}",
        where=f"{path}{': ' if where else ''}{safe_line(where, 80)}",
        remedy="make one: dsmoe imatrix MODEL",
    )


def _read_gguf(path: Path) -> Imatrix:
    file = read_gguf(path)
    if file.get("general.type") != _TYPE and not any(name.endswith(_SUMS) for name in file.tensors):
        raise _refusal(path, "it is another kind of GGUF")
    names = sorted({name.removesuffix(end) for name in file.tensors for end in (_SUMS, _COUNTS)})
    names = [name for name in names if not name.endswith((_SUMS, _COUNTS))]
    with path.open("rb") as stream:

        def values(info: TensorInfo) -> NDArray[np.float32]:
            stream.seek(info.offset)
            found = np.frombuffer(stream.read(info.n_bytes), "<f4")
            if found.nbytes != info.n_bytes:
                raise _refusal(path, "it was truncated while it was read")
            return found.astype(np.float32, copy=False)

        entries = {name: _entry(path, file, name, values) for name in names}
    return Imatrix(entries, *_about(path, file))


def _entry(
    path: Path, file: GgufFile, name: str, values: Callable[[TensorInfo], NDArray[np.float32]]
) -> Statistics:
    sums, counts = file.tensors.get(name + _SUMS), file.tensors.get(name + _COUNTS)
    if sums is None or counts is None:
        raise _refusal(path, "a tensor has sums without counts, or counts without sums", name)
    if sums.type is not GgmlType.F32 or counts.type is not GgmlType.F32:
        raise _refusal(path, "the values are not F32", name)
    numbers, squares = values(counts), values(sums)
    if not is_plausible(numbers) or not is_plausible(squares):
        raise _refusal(path, "a sum or count is negative, infinite or NaN", name)
    if squares.size % numbers.size:
        raise _refusal(path, "the number of sums is not a multiple of that of counts", name)
    if numbers.max() >= 2.0**62:
        raise _refusal(path, "a count is far too large", name)
    return Statistics(squares.reshape(numbers.size, -1), np.rint(numbers).astype(np.int64))


def _about(path: Path, file: GgufFile) -> tuple[tuple[str, ...], int, int, str, Mapping[str, object]]:
    """Return datasets, number and size of chunks, the file's name, and our collector's notes."""
    datasets = file.get(_DATASETS, [])
    n_chunks, chunk_size = file.get(_N_CHUNKS), file.get(_CHUNK_SIZE)
    if not isinstance(datasets, list) or not all(isinstance(name, str) for name in datasets):
        raise _refusal(path, "its list of datasets is invalid", _DATASETS)
    for key, number in ((_N_CHUNKS, n_chunks), (_CHUNK_SIZE, chunk_size)):
        if type(number) is not int or not 0 <= number < 1 << 32:
            raise _refusal(path, "it lacks a valid number of chunks", key)
    assert isinstance(n_chunks, int)
    assert isinstance(chunk_size, int)
    if not chunk_size:
        raise _refusal(path, "its chunks have 0 tokens", _CHUNK_SIZE)
    return tuple(safe_line(name, 200) for name in datasets), n_chunks, chunk_size, path.name, _run(file)


def _run(file: GgufFile) -> Mapping[str, object]:
    try:
        found = json.loads(file.get(_RUN, "{}"))
    except (TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class _LegacyReader:
    """A cursor over a file in the legacy format."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data = read_at_most(path, _MAX_LEGACY_BYTES)
        if len(self._data) > _MAX_LEGACY_BYTES:
            raise _refusal(path, "it is not a GGUF file, and larger than 1 GiB")
        self._at = 0

    def read(self) -> Imatrix:
        n_entries = self._int()
        if not 0 < n_entries <= len(self._data) // 12:
            raise _refusal(self._path, "it is neither a GGUF nor in the legacy format")
        entries = dict(self._entry() for _ in range(n_entries))
        n_chunks = 0
        datasets: tuple[str, ...] = ()
        if self._at < len(self._data):
            n_chunks = max(0, self._int())
            datasets = (self._text(),) if self._at < len(self._data) else ()
        return Imatrix(entries, datasets, n_chunks, 0, self._path.name)

    def _entry(self) -> tuple[str, Statistics]:
        name, n_chunks, size = self._text(), self._int(), self._int()
        if size < 1:
            raise _refusal(self._path, "an entry has no values", name)
        values = np.frombuffer(self._take(4 * size), "<f4").astype(np.float32, copy=False)
        if not is_plausible(values):
            raise _refusal(self._path, "a sum is negative, infinite or NaN", name)
        # If the number of chunks is 0, the values are the means.
        return name, Statistics(values[None], np.array([max(1, n_chunks)], np.int64))

    def _take(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        if size < 0 or len(part) != size:
            raise _refusal(self._path, "it is neither a GGUF nor complete in the legacy format")
        self._at += size
        return part

    def _int(self) -> int:
        number: int = _INT.unpack(self._take(4))[0]
        return number

    def _text(self) -> str:
        size = self._int()
        if not 0 <= size <= _MAX_NAME:
            raise _refusal(self._path, "it is neither a GGUF nor in the legacy format")
        return safe_line(self._take(size).decode(errors="replace"), 200)
