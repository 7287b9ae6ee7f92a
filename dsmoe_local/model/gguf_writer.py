"""Write GGUF files: the header first, then tensors at offsets that are known beforehand.

Tensors may be written in any order and from several threads. The `gguf` package makes the header's bytes;
`dsmoe_quantize.write.output` handles temp files, syncing and renaming.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gguf import GGUFWriter
from gguf.constants import GGUFValueType
from gguf.gguf_writer import TensorInfo, WriterState

from dsmoe_local.model.ggml import Tensor
from dsmoe_local.model.gguf_file import DEFAULT_ALIGNMENT, Field

ARCHITECTURE_KEY = "general.architecture"


@dataclass(frozen=True, slots=True)
class GgufPlan:
    """A file before its data is written: `header` goes to offset 0, each tensor's data to `offsets[name]`."""

    header: bytes
    offsets: Mapping[str, int]
    size: int


def plan_gguf(metadata: Mapping[str, Field], tensors: Sequence[Tensor]) -> GgufPlan:
    """Lay out a file. The metadata of a model must name its architecture.

    Empty arrays are left out: readers treat a missing array as empty, and the `gguf` package cannot write it.
    """
    # The `gguf` package does not write an empty architecture.
    writer = GGUFWriter(None, metadata[ARCHITECTURE_KEY].value if ARCHITECTURE_KEY in metadata else "")
    for key, field in metadata.items():
        if key == ARCHITECTURE_KEY or (field.type is GGUFValueType.ARRAY and not field.value):
            continue
        writer.add_key_value(key, field.value, field.type, field.item_type)
    alignment = metadata["general.alignment"].value if "general.alignment" in metadata else DEFAULT_ALIGNMENT
    writer.data_alignment = alignment
    for tensor in tensors:
        writer.tensors[0][tensor.name] = TensorInfo(tensor.shape, tensor.type, tensor.n_bytes)
    buffer = io.BytesIO()
    # The methods that write the header accept an open stream in place of a path.
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
        end += -(-tensor.n_bytes // alignment) * alignment
    return GgufPlan(header, offsets, end)


def write_at(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, since `os.pwrite` may write only a part. Raises OSError."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
