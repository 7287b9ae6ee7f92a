"""The calibration's result as packaged data: the order of the neurons and a router for every MoE layer.

Made by calibrate.py, read by checkpoint.py. Bound to the source model by its checksum.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from dsmoe_convert.demo.source import SHA256
from dsmoe_local.base.errors import FormatError

N_DENSE_LAYERS = 1
N_SHARED_EXPERTS = 2
N_ROUTED_EXPERTS = 14
EXPERT_SIZE = 96
N_ACTIVE = 12
"""Routed experts per token unless asked otherwise."""

DATA = Path(__file__).parent / "data" / "calibration.safetensors"
QUALITY = Path(__file__).parent / "data" / "quality.json"
"""What benchmarks/demo_quality.py --save measured with that calibration."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """`order` (MoE layers, ffn_size) uint16: the neurons of the shared experts, then of each routed expert.

    `router` (MoE layers, n_routed_experts, hidden_size) float16: logits of unit spread, zero mean over the
    experts; only their order matters.
    """

    order: NDArray[np.uint16]
    router: NDArray[np.float16]


def load(path: Path = DATA) -> Calibration:
    """The packaged calibration. FormatError if it belongs to another source model."""
    with safe_open(path, framework="numpy") as file:
        made_for = (file.metadata() or {}).get("source_sha256")
        if made_for != SHA256:
            raise FormatError(
                "the calibration was made for another source model",
                where=path,
                remedy="make it again: python -m dsmoe_convert.demo.calibrate",
            )
        return Calibration(file.get_tensor("order"), file.get_tensor("router"))


def save(calibration: Calibration, path: Path = DATA) -> None:
    """Write the packaged file. The same calibration always gives the same bytes."""
    save_file(
        {"order": calibration.order, "router": calibration.router}, path, metadata={"source_sha256": SHA256}
    )
    path.chmod(0o644)  # safetensors keeps its files private
