"""The devices that this build of llama.cpp computes on. Lists them; where tensors go is decided elsewhere."""

from __future__ import annotations

import ctypes

from dsmoe_local.engine.native.library import backend_function

_DEVICE_GPU, _DEVICE_INTEGRATED_GPU = 1, 2


def gpu_names() -> tuple[str, ...]:
    """The GPU devices that this build of llama.cpp sees."""
    count = backend_function("ggml_backend_dev_count", ctypes.c_size_t)
    get = backend_function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    name = backend_function("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
    kind = backend_function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    devices = [get(index) for index in range(count())]
    gpus = [device for device in devices if kind(device) in (_DEVICE_GPU, _DEVICE_INTEGRATED_GPU)]
    return tuple(name(device).decode("utf-8", "replace") for device in gpus)
