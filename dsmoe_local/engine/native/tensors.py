"""Reads tensors of a running graph in ggml's eval callback: names, sources, values.

llama_cpp does not declare `ggml_tensor`, so its fields are read at their offsets on 64-bit machines. Call
`check_layout` first: it compares the offsets with the loaded library.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.errors import NativeError
from dsmoe_local.engine.native.library import arena, backend_function, lib
from dsmoe_local.model.ggml import GgmlType

Array = npt.NDArray[Any]

_TYPE, _BUFFER, _SIZES, _STRIDES, _SOURCES, _VIEW_SOURCE, _DATA, _NAME = 0, 8, 16, 48, 152, 232, 248, 256
_DTYPES: dict[int, np.dtype[Any]] = {
    GgmlType.F32: np.dtype(np.float32),
    GgmlType.F16: np.dtype(np.float16),
    GgmlType.I32: np.dtype(np.int32),
}

# The whole address space as 8-byte words. Indexing it is several times faster than creating a pointer, and
# the callback runs a thousand times in each step.
_words: Any = (ctypes.c_uint64 * (1 << 59)).from_address(0)
_string_at = ctypes.string_at
_is_host = backend_function("ggml_backend_buffer_is_host", ctypes.c_bool, ctypes.c_void_p)
_get = backend_function(
    "ggml_backend_tensor_get", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
)


def eval_callback(function: Callable[[int, bool, object], bool]) -> Any:  # noqa: ANN401 - a ctypes function
    """Return the eval callback that calls `function(tensor, ask, _)`. It must outlive the context.

    ggml first calls it with `ask` true for a node of the graph. If it returns True, ggml computes the node
    and calls it again with `ask` false. `function` must not raise.
    """
    return lib.ggml_backend_sched_eval_callback(function)


def name_of(tensor: int) -> bytes:
    """Return a tensor's name, at most 63 bytes."""
    return _string_at(tensor + _NAME)


def key_of(tensor: int) -> int:
    """Return bytes 8 to 15 of the name as a number, a cheap hash of the name."""
    key: int = _words[(tensor + _NAME + 8) >> 3]
    return key


def key_of_name(name: bytes) -> int | None:
    """Return the result of `key_of` for tensors with that name; None if the name is too short."""
    return int.from_bytes(name[8:16], "little") if len(name) >= 16 else None


def weight_name_of(tensor: int) -> bytes:
    """Return a weight's name. A copy on another device is named DEVICE#name#number; `name` is returned."""
    name = _string_at(tensor + _NAME)
    return name.split(b"#")[1] if b"#" in name else name


def source_of(tensor: int, index: int) -> int:
    """Return the node's source tensor with that index; 0 if there is none."""
    source: int = _words[(tensor + _SOURCES + 8 * index) >> 3]
    return source


def size_of(tensor: int, dimension: int) -> int:
    """Return the number of elements in a dimension, 0 (fastest) to 3."""
    size: int = _words[(tensor + _SIZES + 8 * dimension) >> 3]
    return size


def stride_of(tensor: int, dimension: int) -> int:
    """Return the bytes between elements of a dimension."""
    stride: int = _words[(tensor + _STRIDES + 8 * dimension) >> 3]
    return stride


def is_float(tensor: int) -> bool:
    """Return True if the type is F32."""
    return ctypes.c_int32.from_address(tensor + _TYPE).value == GgmlType.F32


class Reader:
    """Reads the values of tensors on any device. Caches which buffers are in main memory."""

    def __init__(self) -> None:
        self._host: dict[int, bool] = {}

    def forget(self) -> None:
        """Clear the cache. Call it before each graph, since buffers may have been freed."""
        self._host.clear()

    def _on_host(self, tensor: int) -> bool:
        owner = _words[(tensor + _VIEW_SOURCE) >> 3] or tensor
        buffer = _words[(owner + _BUFFER) >> 3]
        known = self._host.get(buffer)
        if known is None:
            # A tensor without a buffer is in ggml's own arena.
            known = self._host[buffer] = not buffer or bool(_is_host(buffer))
        return known

    def copy_bytes(self, tensor: int, size: int) -> bytes:
        """Return the first `size` bytes of a tensor's data."""
        if self._on_host(tensor):
            return _string_at(_words[(tensor + _DATA) >> 3], size)
        buffer = ctypes.create_string_buffer(size)
        _get(tensor, ctypes.addressof(buffer), 0, size)
        return buffer.raw

    def copy_rows(self, tensor: int) -> tuple[int, bytes]:
        """Return the number of rows of a matrix and their bytes. A view of columns is read as whole rows."""
        n_rows, stride = size_of(tensor, 1), stride_of(tensor, 1)
        return n_rows, self.copy_bytes(_words[(tensor + _VIEW_SOURCE) >> 3] or tensor, n_rows * stride)

    def view(self, tensor: int) -> Array:
        """Return the values as a 4-D array, slowest dimension first. Valid until the callback returns."""
        shape = tuple(size_of(tensor, dimension) for dimension in (3, 2, 1, 0))
        strides = tuple(stride_of(tensor, dimension) for dimension in (3, 2, 1, 0))
        dtype = _DTYPES[ctypes.c_int32.from_address(tensor + _TYPE).value]
        if 0 in shape:
            return np.empty(shape, dtype)
        size = dtype.itemsize + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        buffer: Any
        if self._on_host(tensor):
            buffer = (ctypes.c_char * size).from_address(_words[(tensor + _DATA) >> 3])
        else:
            buffer = self.copy_bytes(tensor, size)
        return np.ndarray(shape, dtype, buffer, 0, strides)


def check_layout() -> None:
    """Check the layout of `ggml_tensor` in the loaded library.

    Raises UsageError on a machine that is not 64-bit and little-endian, NativeError if the layout differs.
    """
    if ctypes.sizeof(ctypes.c_void_p) != 8 or np.dtype("=i4") != np.dtype("<i4"):
        raise UsageError("observers need a 64-bit, little-endian machine")
    overhead = backend_function("ggml_tensor_overhead", ctypes.c_size_t)
    with arena(16 * overhead() + 4096, allocate=True) as context:
        if not _as_expected(context):
            raise NativeError(
                "observers cannot read the tensors of this build of llama.cpp",
                remedy="install the version of llama-cpp-python that this package asks for",
            )


def _as_expected(context: int) -> bool:
    """Create a matrix, rows of it and a view of them. Return True if all fields are read correctly."""
    pointer = ctypes.c_void_p
    new = backend_function(
        "ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
    )
    new_row = backend_function("ggml_new_tensor_1d", pointer, pointer, ctypes.c_int, ctypes.c_int64)
    take = backend_function("ggml_get_rows", pointer, pointer, pointer, pointer)
    view = backend_function("ggml_view_1d", pointer, pointer, pointer, ctypes.c_int64, ctypes.c_size_t)
    set_name = backend_function("ggml_set_name", pointer, pointer, ctypes.c_char_p)
    data = backend_function("ggml_get_data", pointer, pointer)
    matrix, ids = new(context, GgmlType.F32, 5, 3), new_row(context, GgmlType.I32, 2)
    rows = take(context, matrix, ids)
    part = view(context, rows, 4, 8)
    set_name(rows, b"the rows of blk.0")
    return (
        [size_of(matrix, dimension) for dimension in range(4)] == [5, 3, 1, 1]
        and [stride_of(matrix, dimension) for dimension in range(4)] == [4, 20, 60, 60]
        and name_of(rows) == b"the rows of blk.0"
        and key_of(rows) == key_of_name(b"the rows of blk.0")
        and [source_of(rows, index) for index in range(3)] == [matrix, ids, 0]
        and is_float(rows)
        and not is_float(ids)
        and _words[(rows + _DATA) >> 3] == data(rows)
        and _words[(part + _VIEW_SOURCE) >> 3] == rows
        and _words[(part + _DATA) >> 3] == data(rows) + 8
    )
