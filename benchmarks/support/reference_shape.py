"""The trained reference: its shape, where it is kept, and the files beside its weights. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from dsmoe_local.base.paths import cache_folder
from dsmoe_local.model.hyperparameters import Hyperparameters

MINUTES = 30.0
HELD_OUT, CALIBRATION, TRAINING = "held-out.txt", "calibration.txt", "training.json"

HP = Hyperparameters(
    architecture="deepseek",
    n_layers=6,
    hidden_size=256,
    n_heads=4,
    n_kv_heads=4,
    head_dim=64,
    ffn_size=736,
    n_vocab=4096,
    n_context=512,
    n_dense_layers=1,
    n_routed_experts=16,
    n_shared_experts=2,
    n_experts_per_token=4,
    expert_size=128,
    name="trained reference",
)


def reference_folder(minutes: float = MINUTES, seed: int = 0) -> Path:
    """Where the checkpoint is kept."""
    return cache_folder() / "benchmarks" / f"reference-{minutes:g}min-{seed}"
