"""llama.cpp's own quantizer, as an oracle; whether two files are the same model."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp  # noqa: TID251 - the oracle

from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import GgufFile, read_gguf

_SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)


def llama_quantize(
    source: Path, out: Path, file_type: int, overrides: Mapping[str, int] | None = None, **options: Any
) -> Path:
    """Run llama_model_quantize; `options` are fields of its parameters. Returns `out`."""
    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    parameters.nthread = 2
    if overrides:
        entry = llama_cpp.llama_model_tensor_override
        table = (entry * (len(overrides) + 1))()
        for place, (pattern, kind) in zip(table, overrides.items(), strict=False):
            place.pattern, place.type = pattern.encode(), kind
        parameters.tt_overrides = table
    for name, value in options.items():
        setattr(parameters, name, value)
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
    assert status == 0, "llama_model_quantize failed"
    return out


def tensor_data(file: GgufFile) -> dict[str, tuple[GgmlType, tuple[int, ...], bytes]]:
    raw = file.path.read_bytes()
    return {
        info.name: (info.type, info.shape, raw[info.offset : info.offset + info.n_bytes])
        for info in file.tensors.values()
    }


def assert_same(ours: Path, theirs: Path) -> None:
    """Metadata in order, tensors by name: types, shapes and bytes."""
    mine, other = read_gguf(ours), read_gguf(theirs)
    assert list(mine.metadata.items()) == list(other.metadata.items())
    data, expected = tensor_data(mine), tensor_data(other)
    assert {name: each[:2] for name, each in data.items()} == {
        name: each[:2] for name, each in expected.items()
    }
    assert [name for name in expected if data[name] != expected[name]] == []
