"""Everything that touches llama.cpp: only this package imports llama_cpp and holds native handles.

Thin and typed, no policy: what to load, where, and what to decode or sample is decided above.
"""

from dsmoe_local.engine.native.context import (
    ABORTED,
    DECODED,
    MAX_SEQUENCES,
    NO_SLOT,
    Context,
    ContextOptions,
    Row,
    check_modes,
)
from dsmoe_local.engine.native.devices import gpu_names
from dsmoe_local.engine.native.library import last_error, log_lines
from dsmoe_local.engine.native.model import Model
from dsmoe_local.engine.native.samplers import Sampler

__all__ = [
    "ABORTED",
    "DECODED",
    "MAX_SEQUENCES",
    "NO_SLOT",
    "Context",
    "ContextOptions",
    "Model",
    "Row",
    "Sampler",
    "check_modes",
    "gpu_names",
    "last_error",
    "log_lines",
]
