"""Typed bindings of the parts of llama.cpp that the engine uses. Only this package imports llama_cpp.

It makes no decisions: callers choose what to load, where to place it, and what to decode or sample.
"""

from dsmoe_local.engine.native.context import (
    ABORTED,
    DECODED,
    FLOAT_CACHE_TYPES,
    MAX_SEQUENCES,
    NO_SLOT,
    Context,
    ContextOptions,
    Row,
    check_modes,
)
from dsmoe_local.engine.native.devices import (
    CPU_BUFFER,
    Device,
    DeviceKind,
    buffer_types,
    list_devices,
    offload_devices,
)
from dsmoe_local.engine.native.library import VERSION, add_log, last_error, log_lines
from dsmoe_local.engine.native.model import Model
from dsmoe_local.engine.native.repack import can_repack, repack_buffer
from dsmoe_local.engine.native.rpc import add_worker, check_rpc, serve_devices
from dsmoe_local.engine.native.samplers import Sampler

__all__ = [
    "ABORTED",
    "CPU_BUFFER",
    "DECODED",
    "FLOAT_CACHE_TYPES",
    "MAX_SEQUENCES",
    "NO_SLOT",
    "VERSION",
    "Context",
    "ContextOptions",
    "Device",
    "DeviceKind",
    "Model",
    "Row",
    "Sampler",
    "add_log",
    "add_worker",
    "buffer_types",
    "can_repack",
    "check_modes",
    "check_rpc",
    "last_error",
    "list_devices",
    "log_lines",
    "offload_devices",
    "repack_buffer",
    "serve_devices",
]
