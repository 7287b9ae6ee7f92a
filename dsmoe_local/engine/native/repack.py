"""Asks ggml which weights its CPU backend can repack, and names the buffer type for them.

Repacked weights are interleaved copies for SIMD kernels (ggml/src/ggml-cpu/repack.cpp). A weight whose type
has no repacked form must not be placed in that buffer type: ggml would crash.
"""

from __future__ import annotations

import ctypes
from functools import cache

from dsmoe_local.engine.native.devices import cpu_device
from dsmoe_local.engine.native.library import arena, backend_function
from dsmoe_local.model.ggml import GgmlType, block_size

_REPACK = b"CPU_REPACK"
_BUFFER_OFFSET = 8  # of ggml_tensor.buffer, see `tensors`
_N_EXPERTS = 2
_SCRATCH = 1 << 16


@cache
def extra_buffer_types() -> dict[bytes, int]:
    """Return the handles of the CPU backend's extra buffer types by name: repacked, AMX, KleidiAI."""
    registry = backend_function("ggml_backend_dev_backend_reg", ctypes.c_void_p, ctypes.c_void_p)
    address = backend_function(
        "ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p
    )
    name = backend_function("ggml_backend_buft_name", ctypes.c_char_p, ctypes.c_void_p)
    device = cpu_device()
    found = address(registry(device), b"ggml_backend_dev_get_extra_bufts")
    if not found:
        return {}
    get = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(found)
    types: dict[bytes, int] = {}
    handles = get(device)
    index = 0
    while handles[index]:
        types[name(handles[index])] = handles[index]
        index += 1
    return types


def repack_buffer() -> int | None:
    """Return the handle of the buffer type of repacked weights.

    None if this build has none, or has others beside it, such as AMX, which llama.cpp prefers.
    """
    types = extra_buffer_types()
    return types[_REPACK] if set(types) == {_REPACK} else None


@cache
def can_repack(kind: GgmlType, n_columns: int, n_rows: int, *, experts: bool) -> bool:
    """Return whether the CPU backend multiplies a repacked weight of this type and shape.

    `experts`: the weight has a matrix for each expert. The backend is asked in the same way as llama.cpp's
    loader asks it (llama-model-loader.cpp, weight_buft_supported).
    """
    buffer_type = repack_buffer()
    if buffer_type is None or n_columns % block_size(kind):
        return False
    pointer = ctypes.c_void_p
    new = backend_function(
        "ggml_new_tensor_3d", pointer, pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64
    )
    allocate = backend_function("ggml_backend_buft_alloc_buffer", pointer, pointer, ctypes.c_size_t)
    free = backend_function("ggml_backend_buffer_free", None, pointer)
    supports = backend_function("ggml_backend_dev_supports_op", ctypes.c_bool, pointer, pointer)
    with arena(_SCRATCH, allocate=False) as context:
        buffer = allocate(buffer_type, 0)
        try:
            weight = new(context, kind, n_columns, n_rows, _N_EXPERTS if experts else 1)
            pointer.from_address(weight + _BUFFER_OFFSET).value = buffer
            sources = [weight, new(context, GgmlType.F32, n_columns, 1, 1)]
            if experts:
                sources.append(new(context, GgmlType.I32, 1, 1, 1))
            name = "ggml_mul_mat_id" if experts else "ggml_mul_mat"
            multiply = backend_function(name, pointer, pointer, *[pointer] * len(sources))
            return bool(supports(cpu_device(), multiply(context, *sources)))
        finally:
            free(buffer)
