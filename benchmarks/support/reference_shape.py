"""The shape of the trained reference, its folder, and the names of the files in it. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dsmoe_local.base.paths import cache_folder
from dsmoe_local.model.hyperparameters import Hyperparameters

STEPS = 1200
HELD_OUT, CALIBRATION, TRAINING = "held-out.txt", "calibration.txt", "training.json"

HP = Hyperparameters(
    architecture="deepseek",
    n_layers=6,
    hidden_size=256,
    n_heads=4,
    n_kv_heads=4,
    head_dim=64,
    value_dim=64,
    rotary_dim=64,
    ffn_size=736,
    n_vocab=4096,
    n_context=512,
    n_dense_layers=1,
    n_routed_experts=16,
    n_shared_experts=2,
    n_experts_per_token=4,
    expert_size=128,
    shared_expert_size=128,
    name="trained reference",
)

LATENT = replace(
    HP,
    architecture="deepseek2",
    head_dim=96,
    value_dim=64,
    rotary_dim=32,
    query_rank=192,
    kv_rank=128,
    name="trained reference with MLA",
)
"""The same with the attention of DeepSeek-V2, with the proportions of V2-Lite."""
SHAPES: Mapping[str, Hyperparameters] = {shape.architecture: shape for shape in (HP, LATENT)}


def reference_folder(n_steps: int = STEPS, seed: int = 0, architecture: str = HP.architecture) -> Path:
    """Return the folder of the checkpoint in the cache."""
    kind = "" if architecture == HP.architecture else f"-{architecture}"
    return cache_folder() / "benchmarks" / f"reference{kind}-{n_steps}-steps-{seed}"
