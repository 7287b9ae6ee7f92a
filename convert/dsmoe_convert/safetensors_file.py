"""Find the tensors of a safetensors file. The official parser checks the file; the weights are not read.

The official parser accepts a tensor that is named twice and does not report offsets, so the header is read
here as well. Weights are read with `os.pread` and not mapped: mapped pages count as memory of this process.
"""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from dsmoe_convert.errors import CheckpointError
from dsmoe_convert.shards import DTYPES, StoredTensor
from dsmoe_local.base.errors import FormatError, file_errors
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.json_object import strict_json

MAX_HEADER = 100_000_000  # the format's own limit

_Size = Annotated[int, Meta(ge=0)]


class _Entry(msgspec.Struct):
    """A tensor in the header. `data_offsets` are its begin and end, from the start of the data."""

    dtype: str
    shape: list[_Size]
    data_offsets: tuple[_Size, _Size]


_LFS_POINTER = b"version "
"""The first bytes of the file that Git keeps in place of a large one."""


def read_tensors(path: Path, stop: threading.Event | None = None) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name. `stop` is not used: this takes milliseconds.

    Raises FileError if the file cannot be read, CheckpointError if anything about its header is wrong.
    """
    with file_errors("cannot read the shard", path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        if head == _LFS_POINTER:
            raise CheckpointError(
                "this is a Git LFS pointer, not the weights",
                where=path,
                remedy="run git lfs pull in the folder, or download the file again",
            )
        length = int.from_bytes(head, "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise _damaged(path, f"it has {size} bytes, its header claims {length}")
        raw = file.read(length)
    try:
        header = strict_json(raw, path)
    except FormatError as error:
        raise _damaged(path, error.what) from error
    _check(path)
    header.pop("__metadata__", None)
    return {name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _damaged(path: Path, what: str, name: str = "") -> CheckpointError:
    return CheckpointError(
        f"damaged safetensors file: {safe_line(what, 80)}",
        where=f"{path}: {safe_line(name, 80)}" if name else path,
        remedy="download it again",
    )


def _check(path: Path) -> None:
    """Let the official parser check for overlaps, holes, wrong sizes and trailing bytes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _stored(path: Path, name: str, value: object, data_offset: int, size: int) -> StoredTensor:
    try:
        entry = msgspec.convert(value, _Entry)
    except msgspec.ValidationError as error:
        raise _damaged(path, str(error), name) from error
    begin, end = entry.data_offsets
    if begin > end or data_offset + end > size:
        raise _damaged(path, f"bytes {begin} to {end} are outside the file", name)
    kind = DTYPES.get(entry.dtype)
    if kind is not None and math.prod(entry.shape) * kind.n_bytes != end - begin:
        raise _damaged(path, f"{end - begin} bytes cannot have the shape {entry.shape}", name)
    return StoredTensor(name, entry.dtype, tuple(entry.shape), path.name, data_offset + begin, end - begin)
