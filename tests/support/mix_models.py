"""Tiny models of other architectures than deepseek and llama, for comparing mixes with llama.cpp's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dsmoe_local.model.hyperparameters import Gating, Hyperparameters
from support.tiny_gguf import MOE

_GROUPED = replace(MOE, n_heads=8, n_kv_heads=2, head_dim=32, n_dense_layers=0, value_dim=32,
                   rotary_dim=32, n_shared_experts=0)  # fmt: skip
_SIGMOID: dict[str, Any] = {"gating": Gating.SIGMOID, "normalized_weights": True, "has_expert_bias": True}
MIX_MODELS: Mapping[str, Hyperparameters] = {
    "deepseek2 lite": replace(
        MOE, architecture="deepseek2", n_layers=27, n_heads=2, n_kv_heads=2, head_dim=48, value_dim=32,
        rotary_dim=16, kv_rank=256, n_routed_experts=2, expert_size=32, shared_expert_size=32,
    ),
    "deepseek2 query rank": replace(
        MOE, architecture="deepseek2", n_kv_heads=4, head_dim=40, value_dim=40, rotary_dim=16, query_rank=288,
        kv_rank=96, n_routed_experts=8, expert_size=32, shared_expert_size=32, n_expert_groups=4,
        n_groups_per_token=2, tied_embeddings=True, n_mtp_layers=1, **_SIGMOID,
    ),
    "qwen2moe": replace(
        _GROUPED, architecture="qwen2moe", n_shared_experts=1, shared_expert_size=256, has_qkv_bias=True
    ),
    "qwen3moe": replace(
        _GROUPED, architecture="qwen3moe", n_layers=3, head_dim=64, value_dim=64, rotary_dim=64,
        n_routed_experts=8, expert_size=256, shared_expert_size=0, has_qk_norm=True, normalized_weights=True,
    ),
    "glm4moe": replace(
        _GROUPED, architecture="glm4moe", rotary_dim=16, n_dense_layers=2, ffn_size=288, n_shared_experts=1,
        has_qkv_bias=True, has_qk_norm=True, n_mtp_layers=1, **_SIGMOID,
    ),
    "bailingmoe2": replace(
        _GROUPED, architecture="bailingmoe2", rotary_dim=16, n_dense_layers=1, ffn_size=256,
        n_shared_experts=1, shared_expert_size=256, has_qk_norm=True, **_SIGMOID,
    ),
    "bailingmoe2, eight experts": replace(
        _GROUPED, architecture="bailingmoe2", rotary_dim=16, n_layers=4, n_dense_layers=1, ffn_size=96,
        n_shared_experts=1, n_routed_experts=8, expert_size=32, shared_expert_size=32, has_qk_norm=True,
        **_SIGMOID,
    ),
    "olmoe": replace(
        _GROUPED, architecture="olmoe", n_kv_heads=8, ffn_size=0, expert_size=96, has_qk_norm=True
    ),
    "dots1": replace(
        _GROUPED, architecture="dots1", n_kv_heads=8, n_dense_layers=1, ffn_size=96, n_shared_experts=1,
        has_qk_norm=True, **_SIGMOID,
    ),
}  # fmt: skip
"""One or two models of each architecture but deepseek and llama.

Their widths, counts and tensors are those that llama.cpp's rules depend on. Two have a layer for multi-token
prediction.
"""
