"""The packaged calibration of the demo: the order of the neurons and a router for each MoE layer.

`tools/calibrate_demo` makes it, `checkpoint` uses it. It is valid only for the source model with its
checksum.
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
"""Default number of routed experts per token."""

DATA = Path(__file__).parent / "data" / "calibration.safetensors"
QUALITY = Path(__file__).parent / "data" / "quality.json"
"""The measurements of benchmarks/demo_quality.py --save with this calibration."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """`order`: the neurons of the shared experts, then of each routed expert, uint16 (MoE layers, ffn_size).

    `router`: float16 (MoE layers, n_routed_experts, hidden_size). Its logits have unit standard deviation and
    zero mean over the experts; only their order matters.
    """

    order: NDArray[np.uint16]
    router: NDArray[np.float16]


def load(path: Path = DATA) -> Calibration:
    """Load the calibration. Raises FormatError if it was made for another source model."""
    with safe_open(path, framework="numpy") as file:
        made_for = (file.metadata() or {}).get("source_sha256")
        if made_for != SHA256:
            raise FormatError(
                "the calibration was made for another source model",
                where=path,
                remedy="make it again: python -m tools.calibrate_demo.calibrate",
            )
        return Calibration(file.get_tensor("order"), file.get_tensor("router"))


def save(calibration: Calibration, path: Path = DATA) -> None:
    """Write a calibration. The same calibration always gives the same bytes."""
    save_file(
        {"order": calibration.order, "router": calibration.router}, path, metadata={"source_sha256": SHA256}
    )
    path.chmod(0o644)  # safetensors creates files with mode 0600
