"""Identify model files by a digest of their content.

The digest covers a sample: blocks spread over the file and, for GGUF files, the header and both ends of every
tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from dsmoe_local.base.errors import FormatError, file_errors
from dsmoe_local.model.gguf_file import MAGIC, GgufFile, identity_of
from dsmoe_local.model.gguf_split import read_parts

_BLOCK = 1 << 16
_N_BLOCKS = 64
_END = 1 << 12


def file_identity(path: Path) -> str:
    """Return a file's size and a digest of a sample of its content; a copy has the same. Raises FileError.

    If it is the first file of a split model, all files count. This takes a fraction of a second. It tells
    models apart, but does not detect deliberate forgery.
    """
    with ExitStack() as stack:
        file = _open(stack, path)
        model = _header(file, path)
        others = [_open(stack, part.path) for part in model.parts[1:]] if model else []
        return _identity([file, *others], model)


def has_identity(path: Path, identity: str) -> bool:
    """Return True if there is a file with this `file_identity`. Raises FileError if it cannot be read."""
    return path.is_file() and file_identity(path) == identity


def exact_identity(model: GgufFile) -> str:
    """Return `file_identity` and each file's device, inode and times of change, which tell it from copies.

    Raises FileError; FormatError if a file has changed since its header was read.
    """
    with ExitStack() as stack:
        files = [_open(stack, part.path) for part in model.parts]
        exact = []
        for part, file in zip(model.parts, files, strict=True):
            status = os.fstat(file.fileno())
            if identity_of(status) != part.identity:
                raise FormatError(
                    "the model file has changed since it was opened",
                    where=part.path,
                    remedy="try again when nothing writes to it",
                )
            exact.append(
                f" device {status.st_dev} inode {status.st_ino}"
                f" written {status.st_mtime_ns} changed {status.st_ctime_ns}"
            )
        return _identity(files, model) + "".join(exact)


def _open(stack: ExitStack, path: Path) -> BinaryIO:
    with _reading(path):
        return stack.enter_context(path.open("rb"))


def _reading(path: Path) -> AbstractContextManager[None]:
    return file_errors("the file cannot be read", path)


def _header(file: BinaryIO, path: Path) -> GgufFile | None:
    """Return the header; None if the file is not a GGUF file, or is malformed."""
    with _reading(path):
        if file.read(len(MAGIC)) != MAGIC:
            return None
    try:
        return read_parts(path)
    except FormatError:
        return None


def _identity(files: Sequence[BinaryIO], model: GgufFile | None) -> str:
    """Return the total size and the digest of the open files of a model, or of one file of another kind."""
    sizes = [os.fstat(file.fileno()).st_size for file in files]
    digest = blake2b(str(sum(sizes)).encode(), digest_size=8)
    for index, file in enumerate(files):
        known = _header_and_tensor_ends(model, index) if model else ()
        with _reading(Path(file.name)):
            for start, length in _sample(sizes[index], known):
                file.seek(start)
                digest.update(file.read(length))
    return f"{sum(sizes)} bytes {digest.hexdigest()}"


def _sample(size: int, known: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """Return the offsets and lengths of the parts to read, in the order of the file. `known` are some."""
    last = max(size - _BLOCK, 0)
    spread = ((last * number // (_N_BLOCKS - 1), _BLOCK) for number in range(_N_BLOCKS))
    return sorted([*spread, *known])


def _header_and_tensor_ends(model: GgufFile, index: int) -> Iterator[tuple[int, int]]:
    yield 0, model.parts[index].data_offset
    for tensor in model.tensors.values():
        if tensor.part == index:
            length = min(_END, tensor.n_bytes)
            yield tensor.offset, length
            yield tensor.offset + tensor.n_bytes - length, length
