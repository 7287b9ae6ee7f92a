"""llama.cpp's own quantizer, as an oracle."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp  # noqa: TID251 - the oracle

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
