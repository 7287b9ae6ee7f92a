"""The tensors of a checkpoint as spans of bytes in shards, and access to them by several threads at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dsmoe_convert.errors import CheckpointError
from dsmoe_local.base.durable import read_into
from dsmoe_local.base.errors import FileError, file_errors
from dsmoe_local.model.ggml import GgmlType


@dataclass(frozen=True, slots=True)
class Dtype:
    """A number format of a checkpoint's weights, of `n_bytes` each.

    Without quantization they have the type `ggml` in a GGUF file. FP8 weights are multiplied by their scales
    first (`fp8`).
    """

    ggml: GgmlType
    n_bytes: int


FP8 = "F8_E4M3"

DTYPES: Mapping[str, Dtype] = {
    "F32": Dtype(GgmlType.F32, 4),
    "F16": Dtype(GgmlType.F16, 2),
    "BF16": Dtype(GgmlType.BF16, 2),
    FP8: Dtype(GgmlType.BF16, 1),
}
"""The supported formats, by safetensors' names. Tensors in others (F64, I8, …) are refused if needed."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A dense row-major tensor: `n_bytes` at byte `offset` of the file `shard`. `dtype`: see DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    n_bytes: int


class ShardSource(Protocol):
    """Reads the bytes of tensors. Can be used by several threads at once."""

    def arrange(self, wanted: Mapping[str, Sequence[StoredTensor]]) -> Sequence[str]:
        """Return the names of the GGUF tensors in the order in which they should be encoded.

        `wanted` has the checkpoint tensors that each one is made of.
        """
        ...

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with a tensor's bytes from byte `start` on. Raises FileError or CheckpointError."""
        ...

    def release(self, names: Sequence[str]) -> None:
        """Called when the GGUF tensors of these names are durable and will not be encoded again."""
        ...

    def close(self) -> None:
        """Close all files. The source cannot be used afterwards."""
        ...


class LocalShards:
    """The shards in a folder, each opened once and read with `pread`. A ShardSource."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}

    def arrange(self, wanted: Mapping[str, Sequence[StoredTensor]]) -> Sequence[str]:
        """See ShardSource. The order does not matter."""
        return list(wanted)

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        read_span(self._open(tensor.shard), self._folder / tensor.shard, tensor.offset + start, buffer)

    def release(self, names: Sequence[str]) -> None:
        """See ShardSource. Does nothing: the shards are the user's."""

    def _open(self, shard: str) -> int:
        with self._lock:
            if shard not in self._descriptors:
                path = self._folder / shard
                with file_errors("cannot read the shard", path):
                    self._descriptors[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[shard]

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()


def read_span(descriptor: int, path: Path, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from byte `offset` of an open shard; `path` is for messages.

    Raises FileError if it cannot be read, CheckpointError if it was truncated.
    """
    try:
        read_into(buffer, descriptor, offset)
    except OSError as error:
        raise FileError(f"cannot read the shard: {error.strerror}", where=path) from error
    except EOFError as error:
        raise CheckpointError(
            "the shard was truncated while it was read", where=path, remedy="run the command again"
        ) from error
