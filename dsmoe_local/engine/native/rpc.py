"""llama.cpp's RPC backend: serves devices of this machine, and adds those of workers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.native.devices import handles_of
from dsmoe_local.engine.native.library import backend_function

_added: set[str] = set()


def check_rpc() -> None:
    """Raise UsageError if this build of llama.cpp has no RPC backend."""
    if not _registry():
        raise UsageError(
            "this build of llama.cpp cannot use workers",
            remedy="build llama-cpp-python with CMAKE_ARGS=-DGGML_RPC=ON, as docs/workers.md shows",
        )


def add_worker(endpoint: str) -> None:
    """Make the devices of a worker known to llama.cpp, until this process ends. Their description is
    `endpoint`. Ends the process if the worker does not answer.
    """
    if endpoint in _added:
        return
    add = _function(b"ggml_backend_rpc_add_server", ctypes.c_void_p, ctypes.c_char_p)
    backend_function("ggml_backend_register", None, ctypes.c_void_p)(add(endpoint.encode()))
    _added.add(endpoint)


def serve_devices(endpoint: str, devices: Sequence[str], n_threads: int) -> None:
    """Serve devices, by name, to one client after another. Returns only if it cannot listen at `endpoint`."""
    handles = (ctypes.c_void_p * len(devices))(*handles_of(devices))
    start = _function(
        b"ggml_backend_rpc_start_server",
        None,
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_void_p,
    )
    # llama.cpp's folder for tensors (the second argument) is not used: it loads a truncated file as it is.
    start(endpoint.encode(), None, n_threads, len(handles), ctypes.addressof(handles))


def _registry() -> int | None:
    find = backend_function("ggml_backend_reg_by_name", ctypes.c_void_p, ctypes.c_char_p)
    found: int | None = find(b"RPC")
    return found


def _function(name: bytes, result: Any, *arguments: Any) -> Any:  # noqa: ANN401 - ctypes types
    look_up = backend_function(
        "ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p
    )
    return ctypes.CFUNCTYPE(result, *arguments)(look_up(_registry(), name))
