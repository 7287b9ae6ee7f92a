"""Split models, written by the `gguf` package: inputs for our reader and for llama.cpp's."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def split_with_gguf(model: Path, prefix: Path, per_file: int, *, small_first: bool = False) -> list[Path]:
    """Split a model into files of `per_file` tensors, `prefix`-00001-of-…; return their paths.

    `small_first`: the first file has only metadata.
    """
    reader = gguf.GGUFReader(model)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    architecture = fields.pop("general.architecture").contents()
    out = prefix.with_name(f"{prefix.name}.gguf")
    writer = gguf.GGUFWriter(out, architecture, split_max_tensors=per_file, small_first_shard=small_first)
    for name, field in fields.items():
        item = field.types[1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], item)
    for tensor in reader.tensors:
        data = np.ascontiguousarray(tensor.data)
        writer.add_tensor(tensor.name, data, raw_shape=data.shape, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(prefix.parent.glob(f"{prefix.name}-*-of-*.gguf"))


def rewrite_key(path: Path, key: str, value: int | None) -> Path:
    """Change a key of two or four bytes in a file; None: rename the key, so that it is missing."""
    content = bytearray(path.read_bytes())
    at = content.index(key.encode())
    if value is None:
        content[at] ^= 1
    else:
        at += len(key)
        kind = int.from_bytes(content[at : at + 4], "little")
        size = {gguf.GGUFValueType.UINT16: 2, gguf.GGUFValueType.INT32: 4}[gguf.GGUFValueType(kind)]
        content[at + 4 : at + 4 + size] = value.to_bytes(size, "little")
    path.write_bytes(content)
    return path
