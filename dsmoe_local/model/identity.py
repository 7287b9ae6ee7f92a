"""Identify model files by a digest of their content.

The digest covers a sample: blocks spread over the file and, for GGUF files, the header and both ends of every
tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from dsmoe_local.base.errors import FileError, FormatError
from dsmoe_local.model.gguf_file import MAGIC, GgufFile, identity_of, read_gguf

_BLOCK = 1 << 16
_N_BLOCKS = 64
_END = 1 << 12


def file_identity(path: Path) -> str:
    """Return a file's size and a digest of a sample of its content; a copy has the same. Raises FileError.

    It takes a fraction of a second and tells models apart, but does not detect deliberate forgery.
    """
    try:
        with path.open("rb") as file:
            return _identity(file, _header(file, path))
    except OSError as error:
        raise _unreadable(error, path) from error


def exact_identity(model: GgufFile) -> str:
    """Return `file_identity` and the device, inode and times of change, which distinguish a file from copies.

    Raises FileError; FormatError if the file has changed since its header was read.
    """
    try:
        with model.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if identity_of(status) != model.identity:
                raise FormatError(
                    "the model file has changed since it was opened",
                    where=model.path,
                    remedy="try again when nothing writes to it",
                )
            return (
                f"{_identity(file, model)} device {status.st_dev} inode {status.st_ino}"
                f" written {status.st_mtime_ns} changed {status.st_ctime_ns}"
            )
    except OSError as error:
        raise _unreadable(error, model.path) from error


def _unreadable(error: OSError, path: Path) -> FileError:
    return FileError(f"the file cannot be read: {error.strerror}", where=path)


def _header(file: BinaryIO, path: Path) -> GgufFile | None:
    """Return the header; None if the file is not a GGUF file, or is malformed."""
    if file.read(len(MAGIC)) != MAGIC:
        return None
    try:
        return read_gguf(path)
    except FormatError:
        return None


def _identity(file: BinaryIO, model: GgufFile | None) -> str:
    size = os.fstat(file.fileno()).st_size
    digest = blake2b(str(size).encode(), digest_size=8)
    for start, length in _sample(size, model):
        file.seek(start)
        digest.update(file.read(length))
    return f"{size} bytes {digest.hexdigest()}"


def _sample(size: int, model: GgufFile | None) -> Iterable[tuple[int, int]]:
    """Return the offsets and lengths of the parts to read, in the order of the file."""
    last = max(size - _BLOCK, 0)
    spread = ((last * number // (_N_BLOCKS - 1), _BLOCK) for number in range(_N_BLOCKS))
    return spread if model is None else sorted([*spread, *_header_and_tensor_ends(model)])


def _header_and_tensor_ends(model: GgufFile) -> Iterator[tuple[int, int]]:
    yield 0, model.data_offset
    for tensor in model.tensors.values():
        length = min(_END, tensor.n_bytes)
        yield tensor.offset, length
        yield tensor.offset + tensor.n_bytes - length, length
