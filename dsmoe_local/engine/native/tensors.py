"""Tensors of a running graph, as the scheduler's callback meets them: names, sources, values. No policy.

The bindings do not declare `ggml_tensor`, so its fields are read by their offsets on 64-bit machines.
`check_layout` compares them with what the loaded library does; call it before anything else here.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.errors import NativeError
from dsmoe_local.engine.native.library import backend_function, lib

Array = npt.NDArray[Any]

# type, buffer, ne[4], nb[4] from the start on.
_SHAPE = struct.Struct("<i4xQ4q4Q")
_SOURCES, _VIEW_SOURCE, _DATA, _NAME = 152, 232, 248, 256
_BUFFER = 8
_F32, _F16, _I32 = 0, 1, 26
_DTYPES: dict[int, type[np.generic]] = {_F32: np.float32, _F16: np.float16, _I32: np.int32}

_string_at = ctypes.string_at
_is_host = backend_function("ggml_backend_buffer_is_host", ctypes.c_bool, ctypes.c_void_p)
_get = backend_function(
    "ggml_backend_tensor_get", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
)


def eval_callback(function: Callable[[int, bool, object], bool]) -> Any:  # noqa: ANN401 - a ctypes function
    """ggml's scheduler callback made of `function(tensor, ask, _)`. Keep it as long as the context lives.

    Asked about a node of the graph (`ask`), True makes the scheduler stop after it and call again with its
    values. An exception cannot leave the callback: `function` must not raise.
    """
    return lib.ggml_backend_sched_eval_callback(function)


def name_of(tensor: int) -> bytes:
    """A tensor's name; at most 63 bytes."""
    return _string_at(tensor + _NAME)


def weight_name_of(tensor: int) -> bytes:
    """A weight's name, also of the copy that the scheduler made on another device: DEVICE#name#number."""
    name = _string_at(tensor + _NAME)
    return name.split(b"#")[1] if b"#" in name else name


def source_of(tensor: int, index: int) -> int:
    """The tensor that a node reads as its `index`-th source; 0 if there is none."""
    return ctypes.c_uint64.from_address(tensor + _SOURCES + 8 * index).value


def shape_of(tensor: int) -> tuple[int, ...]:
    """Dimensions in numpy's order, slowest first; always four."""
    fields = _SHAPE.unpack(_string_at(tensor, _SHAPE.size))
    return fields[5:1:-1]


def is_float(tensor: int) -> bool:
    """Whether the values are F32."""
    return ctypes.c_int32.from_address(tensor).value == _F32


def on_host(tensor: int) -> bool:
    """Whether the values lie in this machine's memory."""
    owner = ctypes.c_uint64.from_address(tensor + _VIEW_SOURCE).value or tensor
    buffer = ctypes.c_uint64.from_address(owner + _BUFFER).value
    # Without a buffer they lie in ggml's own arena.
    return not buffer or bool(_is_host(buffer))


def read(tensor: int) -> Array:
    """The values in four dimensions, slowest first; a view that is valid until the callback returns, where
    they lie in this machine's memory, else a copy.
    """
    kind, _, *fields = _SHAPE.unpack(_string_at(tensor, _SHAPE.size))
    shape, strides = tuple(fields[3::-1]), tuple(fields[:3:-1])
    dtype = np.dtype(_DTYPES[kind])
    if not math.prod(shape):
        return np.empty(shape, dtype)
    size = dtype.itemsize + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if on_host(tensor):
        address = ctypes.c_uint64.from_address(tensor + _DATA).value
        buffer: Any = (ctypes.c_char * size).from_address(address)
    else:
        buffer = ctypes.create_string_buffer(size)
        _get(tensor, ctypes.addressof(buffer), 0, size)
    return np.ndarray(shape, dtype, buffer, 0, strides)


def check_layout() -> None:
    """UsageError on machines that are not 64-bit, little-endian; NativeError if the library lays its tensors
    out differently.
    """
    if ctypes.sizeof(ctypes.c_void_p) != 8 or np.dtype("=i4") != np.dtype("<i4"):
        raise UsageError("observers need a 64-bit, little-endian machine")
    overhead = backend_function("ggml_tensor_overhead", ctypes.c_size_t)
    start = backend_function("ggml_init", ctypes.c_void_p, _InitParameters)
    end = backend_function("ggml_free", None, ctypes.c_void_p)
    arena = start(_InitParameters(16 * overhead() + 4096, None, False))
    try:
        if not _as_expected(arena):
            raise NativeError(
                "this build of llama.cpp lays out its tensors differently: observers cannot read them",
                remedy="install the version of llama-cpp-python that this package asks for",
            )
    finally:
        end(arena)


class _InitParameters(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def _as_expected(arena: int) -> bool:
    """Make a matrix, rows taken from it and a view of those, and find their fields again."""
    pointer = ctypes.c_void_p
    new = backend_function(
        "ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
    )
    new_row = backend_function("ggml_new_tensor_1d", pointer, pointer, ctypes.c_int, ctypes.c_int64)
    take = backend_function("ggml_get_rows", pointer, pointer, pointer, pointer)
    view = backend_function("ggml_view_1d", pointer, pointer, pointer, ctypes.c_int64, ctypes.c_size_t)
    set_name = backend_function("ggml_set_name", pointer, pointer, ctypes.c_char_p)
    data = backend_function("ggml_get_data", pointer, pointer)
    matrix, ids = new(arena, _F32, 5, 3), new_row(arena, _I32, 2)
    rows = take(arena, matrix, ids)
    part = view(arena, rows, 4, 8)
    set_name(rows, b"blk.0.rows")
    return (
        shape_of(matrix) == (1, 1, 3, 5)
        and shape_of(rows) == (1, 1, 2, 5)
        and name_of(rows) == b"blk.0.rows"
        and [source_of(rows, index) for index in range(3)] == [matrix, ids, 0]
        and is_float(rows)
        and not is_float(ids)
        and ctypes.c_uint64.from_address(rows + _DATA).value == data(rows)
        and ctypes.c_uint64.from_address(part + _VIEW_SOURCE).value == rows
        and ctypes.c_uint64.from_address(part + _DATA).value == data(rows) + 8
    )
