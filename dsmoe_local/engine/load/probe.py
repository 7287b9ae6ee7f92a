"""Measures the compute buffers of a placement: llama.cpp lays them out without allocating or reading weights.

Only for models that are offloaded: the arithmetic of `memory` bounds a processor's buffers, but not what a
backend adds, such as copies of weights that it computes on from main memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dsmoe_local.engine import native
from dsmoe_local.engine.load.placement import Placement

# The name of a buffer type begins with its device's: "CUDA0", "RPC0[127.0.0.1:50052]", "MTL0_Private".
_SIZE = re.compile(r"\b(\w+?)(?:[\[_]\S*)? +compute buffer size = +([\d.]+) MiB")
_ROUNDING = 1 << 14  # the log has two decimals of a MiB


def measure_compute(
    path: Path,
    placement: Placement,
    context: native.ContextOptions,
    *,
    n_experts_per_token: int | None,
    architecture: str,
) -> dict[str, int]:
    """Bytes of compute buffers on each device that the placement uses.

    Raises ModelLoadError with llama.cpp's own reason.
    """
    model = native.Model(
        path,
        n_gpu_layers=placement.n_gpu_layers,
        devices=placement.devices,
        split=placement.split,
        overrides=placement.overrides,
        n_experts_per_token=n_experts_per_token,
        architecture=architecture,
        measure_only=True,
    )
    try:
        native.Context(model, context).close()
        return compute_sizes(native.log_lines(), placement.devices)
    finally:
        model.close()


def compute_sizes(log: Sequence[str], devices: Sequence[str]) -> dict[str, int]:
    """The sizes that llama.cpp's log tells, of the devices asked for."""
    sizes = dict.fromkeys(devices, 0)
    for name, size in _SIZE.findall("\n".join(log)):
        if name in sizes:
            sizes[name] += int(float(size) * 2**20) + _ROUNDING
    return sizes
