"""Reads and writes a file with the KV cache of a range of tokens.

The file contains a header, all tokens up to the end of the range, and llama.cpp's state of the range. The
digest in the header covers the tokens and the part of the state that describes its layout, so that llama.cpp
never reads an unknown layout. The caller must verify the rest.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from dsmoe_local.base.durable import sync
from dsmoe_local.engine.native import Context

_MAGIC = b"dsmoe-kp"
_HEAD = struct.Struct("<8s16s16sQQQ")  # magic, identity, digest, tokens, start, bytes of state
_DIGEST = 16
_LAYOUT = 64  # bytes at the start of the state that describe its layout
_LAYOUT_OF_TOKEN = 12  # more such bytes for each cell: position, number of sequences, sequence


class Stored(NamedTuple):
    """The contents of a file: all tokens, and the mapped state of those from `start` on."""

    token_ids: list[int]
    start: int
    state: memoryview


def write_cache(
    path: Path, identity: str, token_ids: Sequence[int], start: int, context: Context, sequence: int
) -> bool:
    """Write the cells of a sequence, which hold `token_ids` from `start` on, to a new file. It is not synced.

    `identity` is `ModelInfo.cache_identity`. Returns False if llama.cpp cannot write the state. Raises
    OSError, for example if the disk is full or the file exists. In both cases the new file is removed.
    """
    tokens = np.asarray(token_ids, "<i4").tobytes()
    place, n_state = _HEAD.size + len(tokens), context.state_size(sequence)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    written = False
    try:
        with (
            os.fdopen(descriptor, "r+b") as file,
            mapped_file(file, place + n_state) as mapped,
            mapped[place:] as state,
        ):
            complete = context.write_state(state, sequence)
            digest = _digest(tokens, state, start)
            head = _HEAD.pack(_MAGIC, _digest_of(identity), digest, len(token_ids), start, n_state)
            mapped[:place] = head + tokens
        written = complete
    finally:
        if not written:
            path.unlink(missing_ok=True)
    return written


def sync_cache(path: Path) -> bool:
    """Sync a written file. If that fails, delete it and return False."""
    try:
        with path.open("r+b") as file:
            sync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        return False
    return True


@contextmanager
def open_cache(path: Path, identity: str) -> Iterator[Stored | None]:
    """Yield the contents of a file; None if it is unreadable, malformed, or has another identity."""
    with ExitStack() as opened:
        try:
            file = opened.enter_context(path.open("rb"))
            size = os.fstat(file.fileno()).st_size
            mapped = opened.enter_context(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
        except (OSError, ValueError):  # mmap raises ValueError for an empty file
            yield None
            return
        view = opened.enter_context(memoryview(mapped))
        if size < _HEAD.size:
            yield None
            return
        magic, of, digest, n_tokens, start, n_state = _HEAD.unpack(view[: _HEAD.size])
        place = _HEAD.size + 4 * n_tokens
        if (magic, of, place + n_state) != (_MAGIC, _digest_of(identity), size) or start >= n_tokens:
            yield None
            return
        tokens = bytes(view[_HEAD.size : place])
        state = opened.enter_context(view[place:])
        if _digest(tokens, state, start) != digest:
            yield None
            return
        yield Stored(np.frombuffer(tokens, "<i4").tolist(), start, state)


@contextmanager
def mapped_file(file: BinaryIO, n_bytes: int) -> Iterator[memoryview]:
    """Allocate the first bytes of a file and yield them as memory. Raises OSError if the disk is full."""
    # Writing to a mapping of a sparse file kills the process if the disk is full.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, n_bytes)
    else:
        _fill(file, n_bytes)
    with mmap.mmap(file.fileno(), n_bytes) as mapped, memoryview(mapped) as view:
        yield view


def _fill(file: BinaryIO, n_bytes: int) -> None:
    block = bytes(1 << 20)
    for start in range(0, n_bytes, len(block)):
        file.write(block[: n_bytes - start])
    file.flush()


def _digest_of(identity: str) -> bytes:
    return blake2b(identity.encode(), digest_size=_DIGEST).digest()


def _digest(tokens: bytes, state: memoryview, start: int) -> bytes:
    n_cells = len(tokens) // 4 - start
    layout = state[: _LAYOUT + _LAYOUT_OF_TOKEN * n_cells]
    return blake2b(struct.pack("<Q", start) + tokens + bytes(layout), digest_size=_DIGEST).digest()
