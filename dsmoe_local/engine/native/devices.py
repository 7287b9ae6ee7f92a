"""Lists the devices that this build of llama.cpp supports, and their buffer types."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.native.library import backend_function

CPU_BUFFER = "CPU"


class DeviceKind(StrEnum):
    """The kinds of devices, in the order of ggml's enum."""

    CPU = "CPU"
    GPU = "GPU"
    INTEGRATED = "integrated GPU"
    ACCELERATOR = "accelerator"
    META = "group"


_KINDS = tuple(DeviceKind)


@dataclass(frozen=True, slots=True)
class Device:
    """A device as its backend describes it.

    `n_free` and `n_bytes` of memory are 0 if unknown. `hardware` identifies a card across backends, if known.
    """

    name: str
    description: str
    backend: str
    kind: DeviceKind
    n_free: int
    n_bytes: int
    hardware: str = ""

    @property
    def is_remote(self) -> bool:
        """True if it belongs to a worker."""
        return self.backend == "RPC"

    @property
    def is_gpu(self) -> bool:
        """True if layers can be offloaded to it."""
        return self.kind in (DeviceKind.GPU, DeviceKind.INTEGRATED)

    @property
    def shares_memory(self) -> bool:
        """True if it uses the machine's main memory."""
        return self.kind is not DeviceKind.GPU or self.backend == "MTL"


class _Properties(ctypes.Structure):
    # ggml_backend_dev_props. `capabilities` is four bools; the other bytes are for later versions.
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("capabilities", ctypes.c_byte * 64),
    ]


def list_devices() -> tuple[Device, ...]:
    """Return all devices, including the CPU, in ggml's order."""
    return tuple(_describe(handle) for handle in _handles())


def offload_devices(devices: Sequence[Device]) -> tuple[Device, ...]:
    """Return the devices that llama.cpp offloads to by default, in its order: remote ones, then GPUs.

    A card that several backends report is used once. Integrated GPUs are used only if there are no others.
    """
    remote = [device for device in devices if device.kind is DeviceKind.GPU and device.is_remote]
    gpus: list[Device] = []
    for device in devices:
        known = any(device.hardware and device.hardware == other.hardware for other in gpus)
        if device.kind is DeviceKind.GPU and not device.is_remote and not known:
            gpus.append(device)
    integrated = [device for device in devices if device.kind is DeviceKind.INTEGRATED]
    if not gpus and integrated:
        gpus = [device for device in integrated if device.backend == integrated[0].backend]
    return (*remote, *gpus)


def buffer_types() -> dict[str, int]:
    """Return the handles of all buffer types, by the names of the types and of their devices."""
    types: dict[str, int] = {}
    buffer_type = backend_function("ggml_backend_dev_buffer_type", ctypes.c_void_p, ctypes.c_void_p)
    name = backend_function("ggml_backend_buft_name", ctypes.c_char_p, ctypes.c_void_p)
    for handle in _handles():
        found = buffer_type(handle)
        if found:
            types.setdefault(_text(name(found)), found)
            types.setdefault(_describe(handle).name, found)
    return types


def cpu_device() -> int:
    """Return the handle of the CPU."""
    return next(handle for handle in _handles() if _describe(handle).kind is DeviceKind.CPU)


def device_list(names: Sequence[str]) -> Any:  # noqa: ANN401 - a ctypes array
    """Return the handles of devices as a NULL-terminated array. The caller must keep it alive.

    Raises UsageError for an unknown name.
    """
    return (ctypes.c_void_p * (len(names) + 1))(*handles_of(names), None)


def handles_of(names: Sequence[str]) -> list[int]:
    """Return the handles of devices. Raises UsageError for an unknown name."""
    handles = {_describe(handle).name: handle for handle in _handles()}
    for name in names:
        if name not in handles:
            raise UsageError(
                f"there is no device {safe_line(name, 60)}", remedy=f"use one of: {', '.join(handles)}"
            )
    return [handles[name] for name in names]


def _handles() -> list[int]:
    count = backend_function("ggml_backend_dev_count", ctypes.c_size_t)
    get = backend_function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    return [get(index) for index in range(count())]


def _describe(handle: int) -> Device:
    read = backend_function("ggml_backend_dev_get_props", None, ctypes.c_void_p, ctypes.POINTER(_Properties))
    registry = backend_function("ggml_backend_dev_backend_reg", ctypes.c_void_p, ctypes.c_void_p)
    registry_name = backend_function("ggml_backend_reg_name", ctypes.c_char_p, ctypes.c_void_p)
    found = _Properties()
    read(handle, ctypes.byref(found))
    return Device(
        name=_text(found.name),
        description=_text(found.description),
        backend=_text(registry_name(registry(handle))),
        kind=_KINDS[found.type] if found.type < len(_KINDS) else DeviceKind.META,
        n_free=found.memory_free,
        n_bytes=found.memory_total,
        hardware=_text(found.device_id),
    )


def _text(value: bytes | None) -> str:
    return safe_line((value or b"").decode("utf-8", "replace"), 120)
