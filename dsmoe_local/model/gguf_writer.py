"""Write GGUF files: the header first, then tensors at offsets that are known beforehand.

A model may be split into several files; see `gguf_split`. Tensors may be written in any order and from
several threads. The `gguf` package makes the header's bytes. `dsmoe_quantize.write.output` handles hidden
files, syncing and renaming.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gguf import GGUFWriter
from gguf.constants import GGUFValueType
from gguf.gguf_writer import TensorInfo, WriterState

from dsmoe_local.model.ggml import Tensor, padded
from dsmoe_local.model.gguf_file import DEFAULT_ALIGNMENT, Field
from dsmoe_local.model.gguf_split import COUNT, KEY_TYPES, N_TENSORS, NUMBER

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
    alignment = _alignment(metadata)
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
        end += padded(tensor.n_bytes, alignment)
    return GgufPlan(header, offsets, end)


def plan_files(
    metadata: Mapping[str, Field], tensors: Sequence[Tensor], max_size: int | None = None
) -> tuple[GgufPlan, ...]:
    """Lay out a model in files of at most `max_size` bytes, in one if that is possible, or if it is None.

    A file is larger if one of its tensors is. The first file has the metadata. It has no tensor if the first
    tensor fits only into a file of its own.
    """
    whole = plan_gguf(metadata, tensors)
    if max_size is None or whole.size <= max_size:
        return (whole,)
    groups = _groups(metadata, tensors, max_size)
    if len(groups) == 1:
        return (whole,)
    return tuple(
        plan_gguf(
            {**(metadata if not number else {}), **_split_keys(number, len(groups), len(tensors))}, group
        )
        for number, group in enumerate(groups)
    )


def _split_keys(number: int, count: int, n_tensors: int) -> dict[str, Field]:
    values = {NUMBER: number, COUNT: count, N_TENSORS: n_tensors}
    return {key: Field(value, KEY_TYPES[key]) for key, value in values.items()}


def _groups(metadata: Mapping[str, Field], tensors: Sequence[Tensor], max_size: int) -> list[list[Tensor]]:
    """Return the tensors of each file."""
    keys = _split_keys(0, 0, 0)
    size, later = plan_gguf({**metadata, **keys}, []).size, plan_gguf(keys, []).size
    alignment = _alignment(metadata)
    groups: list[list[Tensor]] = [[]]
    for tensor in tensors:
        # An entry in the header: the name and its length, the dimensions and their number, type, and offset.
        entry = 8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape) + 4 + 8
        added = entry + padded(tensor.n_bytes, alignment)
        # Only the first file has the metadata, and so another alignment than the default.
        added_later = entry + padded(tensor.n_bytes, DEFAULT_ALIGNMENT)
        # The header is padded after its last entry.
        fits_later = later + added_later + DEFAULT_ALIGNMENT <= max_size
        if size + added + alignment > max_size and (groups[-1] or fits_later):
            groups.append([])
            size, alignment, added = later, DEFAULT_ALIGNMENT, added_later
        groups[-1].append(tensor)
        size += added
    return groups


def _alignment(metadata: Mapping[str, Field]) -> int:
    return metadata["general.alignment"].value if "general.alignment" in metadata else DEFAULT_ALIGNMENT


def write_at(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, since `os.pwrite` may write only a part. Raises OSError."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
