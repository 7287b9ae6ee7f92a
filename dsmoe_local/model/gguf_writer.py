"""GGUF output: the header first, then tensors at offsets that are known beforehand.

Tensors may be written in any order and from several threads. The bytes of the header come from the `gguf`
package; temp files, syncing and renaming are dsmoe_quantize.write.output's task.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gguf import GGUFWriter
from gguf.constants import GGUFValueType
from gguf.gguf_writer import TensorInfo, WriterState

from dsmoe_local.model.ggml import GgmlType, tensor_bytes
from dsmoe_local.model.gguf_file import DEFAULT_ALIGNMENT, Field

ARCHITECTURE_KEY = "general.architecture"


class TensorLike(Protocol):
    """What a header says about a tensor. `shape` in numpy's order."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def type(self) -> GgmlType: ...


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to come. `shape` in numpy's order."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType

    @property
    def n_bytes(self) -> int:
        """Size of the data, without padding."""
        return tensor_bytes(self.type, self.shape)


@dataclass(frozen=True, slots=True)
class GgufPlan:
    """A whole file before its data: `header` goes to offset 0, each tensor's data to `offsets[name]`."""

    header: bytes
    offsets: Mapping[str, int]
    size: int


def plan_gguf(metadata: Mapping[str, Field], tensors: Sequence[TensorLike]) -> GgufPlan:
    """Lay out a file. Of a model `metadata` names the architecture; empty arrays are left out: GGUF readers
    take a missing array for an empty one, and the `gguf` package cannot write them.
    """
    # An empty name is not written.
    writer = GGUFWriter(None, metadata[ARCHITECTURE_KEY].value if ARCHITECTURE_KEY in metadata else "")
    for key, field in metadata.items():
        if key == ARCHITECTURE_KEY or (field.type is GGUFValueType.ARRAY and not field.value):
            continue
        writer.add_key_value(key, field.value, field.type, field.item_type)
    alignment = metadata["general.alignment"].value if "general.alignment" in metadata else DEFAULT_ALIGNMENT
    writer.data_alignment = alignment
    for tensor in tensors:
        n_bytes = tensor_bytes(tensor.type, tensor.shape)
        writer.tensors[0][tensor.name] = TensorInfo(tensor.shape, tensor.type, n_bytes)
    buffer = io.BytesIO()
    # The writer's header methods take an open stream in place of a path.
    writer.fout = [buffer]  # type: ignore[list-item]
    writer.state = WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    header = buffer.getvalue()
    header += bytes(-len(header) % alignment)
    offsets: dict[str, int] = {}
    end = len(header)
    for tensor in tensors:
        offsets[tensor.name] = end
        end += -(-tensor_bytes(tensor.type, tensor.shape) // alignment) * alignment
    return GgufPlan(header, offsets, end)


def write_at(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; pwrite may write less than it is given. OSError as the system says."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
