"""Where the tensors of a safetensors file lie. The official parser judges the file; the data is not touched.

The official parser accepts a header that names a tensor twice and does not tell offsets, so the header is
read here as well. Offsets become plain integers for `os.pread`: mapping a checkpoint would count every page
that was read as this process's memory.
"""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from typing import NoReturn, TypeGuard

from dsmoe_convert.errors import CheckpointError
from dsmoe_convert.stored import DTYPES, StoredTensor
from dsmoe_local.base.errors import FileError, FormatError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.config_json import strict_json

MAX_HEADER = 100_000_000  # the format's own limit


def read_tensors(path: Path, stop: threading.Event | None = None) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name; so soon that `stop` makes no difference.

    Raises FileError if the file cannot be read, CheckpointError if anything about its header is wrong.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(
                    f"damaged safetensors file: it has {size} bytes, its header claims {length}",
                    where=path,
                    remedy="download it again",
                )
            raw = file.read(length)
    except OSError as error:
        raise FileError(f"cannot read the shard: {error.strerror}", where=path) from error
    try:
        header = strict_json(raw, path)
    except FormatError as error:
        raise CheckpointError(
            f"damaged safetensors header: {error.what}", where=path, remedy="download it again"
        ) from error
    _judge(path)
    header.pop("__metadata__", None)
    return {name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _judge(path: Path) -> None:
    """Let the official parser check overlaps, holes, sizes and trailing bytes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"damaged safetensors file: {safe_line(str(error), 80)}", where=path, remedy="download it again"
        ) from error


def _stored(path: Path, name: str, entry: object, data_offset: int, size: int) -> StoredTensor:
    def refuse(what: str) -> NoReturn:
        raise CheckpointError(f"damaged safetensors header: {what}", where=f"{path}: {safe_line(name, 80)}")

    if not isinstance(entry, dict):
        refuse("an entry is not an object")
    dtype, shape, span = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(span) and len(span) == 2):
        refuse("an entry lacks dtype, shape or data_offsets")
    begin, end = span
    if begin > end or data_offset + end > size:
        refuse(f"bytes {begin} to {end} are outside the file")
    kind = DTYPES.get(dtype)
    if kind is not None and math.prod(shape) * kind.n_bytes != end - begin:
        refuse(f"{end - begin} bytes do not hold the shape {shape}")
    return StoredTensor(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        shard=path.name,
        offset=data_offset + begin,
        n_bytes=end - begin,
    )


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
