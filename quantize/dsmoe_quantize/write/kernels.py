"""The only access to ggml's quantization kernels, and the only ctypes in this package.

The kernels are in the ggml library that llama-cpp-python ships. It is found through the package's location
and opened by path: importing llama_cpp would load the whole engine. The kernels used here have no state, so a
second copy of the library beside the engine's does no harm.

Addresses are plain integers and are not checked here; `encoder` checks them. ctypes releases the GIL during
every call, so threads run in parallel.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from dsmoe_local.base.errors import PIP
from dsmoe_local.model.ggml import FLOATS, GgmlType
from dsmoe_quantize.errors import KernelError

_LIBRARY = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(sys.platform, "libggml-base.so")

_TO_FLOAT = {
    GgmlType.F16: "ggml_fp16_to_fp32_row",
    GgmlType.BF16: "ggml_bf16_to_fp32_row",
    GgmlType.Q4_0: "dequantize_row_q4_0",
    GgmlType.Q4_1: "dequantize_row_q4_1",
    GgmlType.Q5_0: "dequantize_row_q5_0",
    GgmlType.Q5_1: "dequantize_row_q5_1",
    GgmlType.Q8_0: "dequantize_row_q8_0",
    GgmlType.Q2_K: "dequantize_row_q2_K",
    GgmlType.Q3_K: "dequantize_row_q3_K",
    GgmlType.Q4_K: "dequantize_row_q4_K",
    GgmlType.Q5_K: "dequantize_row_q5_K",
    GgmlType.Q6_K: "dequantize_row_q6_K",
    GgmlType.IQ4_NL: "dequantize_row_iq4_nl",
    GgmlType.IQ4_XS: "dequantize_row_iq4_xs",
}

READABLE = frozenset({GgmlType.F32, *_TO_FLOAT})
"""Types that can be decoded."""

WRITABLE = FLOATS | {
    GgmlType.Q4_0,
    GgmlType.Q4_1,
    GgmlType.Q5_0,
    GgmlType.Q5_1,
    GgmlType.Q8_0,
    GgmlType.Q3_K,
    GgmlType.Q4_K,
    GgmlType.Q5_K,
    GgmlType.Q6_K,
    GgmlType.IQ4_NL,
    GgmlType.IQ4_XS,
}
"""Types that can be encoded. The types that require an importance matrix are not among them."""


def library_path() -> Path:
    """Return the path of the ggml library with the kernels.

    Raises KernelError if llama-cpp-python is not installed, or has no such library in its lib folder.
    """
    spec = importlib.util.find_spec("llama_cpp")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / "lib" / _LIBRARY
        if path.is_file():
            return path
    raise KernelError(
        f"{_LIBRARY} of llama-cpp-python is missing",
        where="searched the package's lib folder" if spec else "the package is not installed",
        remedy=f"reinstall it: {PIP} install --force-reinstall llama-cpp-python",
    )


def version() -> str:
    """Return the version of llama-cpp-python: another one may encode the same weights differently."""
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@cache
def _library() -> ctypes.CDLL:
    path = library_path()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError("ggml's library cannot be opened", where=path, remedy=str(error)) from error


@cache
def _function(name: str, result: type | None, *arguments: type) -> Callable[..., int]:
    try:
        function: Callable[..., int] = ctypes.CFUNCTYPE(result, *arguments)((name, _library()))
    except AttributeError as error:
        raise KernelError(
            f"ggml's library lacks {name}",
            where=library_path(),
            remedy="install the version of llama-cpp-python that this package asks for",
        ) from error
    return function


def decoder(source: GgmlType) -> Callable[[int, int, int], object]:
    """Return the function (source address, address of f32, number of weights) that decodes `source`.

    `source` is another type than F32.
    """
    return _function(_TO_FLOAT[source], None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


def encoder(target: GgmlType) -> Callable[[int, int, int, int, int | None], int]:
    """Return the function (address of f32, target address, rows, columns, importance) that encodes `target`.

    Importance is the address of one f32 per column, or None. Columns must be a multiple of the block size:
    ggml aborts the process otherwise.
    """
    chunk = _function(
        "ggml_quantize_chunk",
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    )
    number = int(target)

    def encode(
        source_address: int, target_address: int, n_rows: int, n_columns: int, importance: int | None
    ) -> int:
        return chunk(number, source_address, target_address, 0, n_rows, n_columns, importance)

    return encode


def validator(kind: GgmlType) -> Callable[[int, int], bool]:
    """Return the function (address, bytes) that tells whether all scales in blocks of `kind` are finite."""
    validate = _function(
        "ggml_validate_row_data", ctypes.c_bool, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
    )
    number = int(kind)
    return lambda address, n_bytes: bool(validate(number, address, n_bytes))
