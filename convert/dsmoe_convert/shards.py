"""Access to the bytes of a checkpoint's shards, by several threads at once. Knows no format."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from dsmoe_convert.errors import CheckpointError
from dsmoe_convert.stored import StoredTensor
from dsmoe_local.base.errors import FileError


class ShardSource(Protocol):
    """Reads spans of tensors. Safe to call from several threads."""

    def arrange(self, wanted: Mapping[str, Sequence[StoredTensor]]) -> Sequence[str]:
        """Learn which tensors will be read, by the name of what is made of them; say in which order to."""
        ...

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from byte `start` on. FileError or CheckpointError."""
        ...

    def release(self, names: Sequence[str]) -> None:
        """Learn that what was made under these names survives a crash: it will not be made again."""
        ...

    def close(self) -> None:
        """Release files; the source is of no use afterwards."""
        ...


class LocalShards:
    """Shards that lie in a folder, each opened once and read with `pread`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}

    def arrange(self, wanted: Mapping[str, Sequence[StoredTensor]]) -> Sequence[str]:
        """See ShardSource. Any order will do."""
        return list(wanted)

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        """See ShardSource."""
        read_span(self._open(tensor.shard), self._folder / tensor.shard, tensor.offset + start, buffer)

    def release(self, names: Sequence[str]) -> None:
        """See ShardSource. The shards stay."""

    def _open(self, shard: str) -> int:
        with self._lock:
            if shard not in self._descriptors:
                path = self._folder / shard
                try:
                    self._descriptors[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise FileError(f"cannot read the shard: {error.strerror}", where=path) from error
            return self._descriptors[shard]

    def close(self) -> None:
        """See ShardSource."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()


def read_span(descriptor: int, path: Path, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from byte `offset` of an open file; `path` is for messages."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise FileError(f"cannot read the shard: {error.strerror}", where=path) from error
        if count == 0:
            raise CheckpointError(
                "the shard became shorter while it was read", where=path, remedy="run the command again"
            )
        done += count
