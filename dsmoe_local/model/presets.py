"""The models of the paper (arXiv 2401.06066, tables 1, 3 and 5), by their dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dsmoe_local.model.hyperparameters import Hyperparameters


@dataclass(frozen=True, slots=True)
class Preset:
    """One published model.

    `ffn_factor` is the paper's nominal f (see `cost.flops`). `n_tokens` is the sequence length for which the
    paper gives FLOPs.
    """

    hp: Hyperparameters
    ffn_factor: float
    n_tokens: int = 4096


def _dense(name: str, n_layers: int, width: int, ffn: int, vocabulary: int, n_kv_heads: int = 0) -> Preset:
    n_heads = width // 128
    hp = Hyperparameters(
        architecture="llama",
        n_layers=n_layers,
        hidden_size=width,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads or n_heads,
        head_dim=128,
        ffn_size=ffn,
        n_vocab=vocabulary,
        n_context=4096,
        n_dense_layers=n_layers,
        name=name,
    )
    return Preset(hp, ffn_factor=8)


_16B = Hyperparameters(
    architecture="deepseek",
    n_layers=28,
    hidden_size=2048,
    n_heads=16,
    n_kv_heads=16,
    head_dim=128,
    ffn_size=10944,
    n_vocab=102400,
    n_context=4096,
    n_dense_layers=1,
    n_routed_experts=64,
    n_shared_experts=2,
    n_experts_per_token=6,
    expert_size=1408,
    name="DeepSeekMoE 16B",
)

# The paper does not give the width of the 145B model's dense layer. With the width of all experts that a
# token uses, the parameter counts are those of the paper.
_145B = replace(
    _16B,
    n_layers=62,
    hidden_size=4096,
    n_heads=32,
    n_kv_heads=32,
    ffn_size=16 * 1408,
    n_routed_experts=128,
    n_shared_experts=4,
    n_experts_per_token=12,
    name="DeepSeekMoE 145B",
)

PRESETS: Mapping[str, Preset] = {
    "deepseekmoe-2b": Preset(
        replace(
            _16B,
            n_layers=9,
            hidden_size=1280,
            n_heads=10,
            n_kv_heads=10,
            ffn_size=8 * 1280 // 3,
            n_vocab=8192,
            n_context=2048,
            n_dense_layers=0,
            n_routed_experts=63,
            n_shared_experts=1,
            n_experts_per_token=7,
            expert_size=2 * 1280 // 3,
            shared_expert_size=0,
            name="DeepSeekMoE 2B",
        ),
        ffn_factor=16,
        n_tokens=2048,
    ),
    "deepseekmoe-16b": Preset(_16B, ffn_factor=16),
    "deepseekmoe-145b": Preset(_145B, ffn_factor=16.5),
    "deepseekmoe-142b-half": Preset(
        replace(
            _145B,
            n_shared_experts=2,
            n_experts_per_token=6,
            ffn_size=8 * 1408,
            name="DeepSeekMoE 142B (half activated)",
        ),
        ffn_factor=8.25,
    ),
    # GShard has no shared experts, and uses two of 16 wide ones.
    "gshard-137b": Preset(
        replace(
            _145B,
            n_routed_experts=16,
            n_shared_experts=0,
            n_experts_per_token=2,
            expert_size=8 * 4096 // 3,
            shared_expert_size=0,
            ffn_size=16 * 4096 // 3,
            name="GShard 137B",
        ),
        ffn_factor=16,
    ),
    "deepseek-7b": _dense("DeepSeek 7B", 30, 4096, 11008, 102400),
    "deepseek-67b": _dense("DeepSeek 67B", 95, 8192, 22016, 102400, n_kv_heads=8),
    "llama2-7b": _dense("LLaMA2 7B", 32, 4096, 11008, 32000),
}


def matching_preset(hp: Hyperparameters) -> Preset | None:
    """Return the preset with the same dimensions; name, context and rotary settings may differ."""

    def dimensions(model: Hyperparameters) -> Hyperparameters:
        return replace(
            model,
            name="",
            n_context=0,
            rms_norm_eps=0.0,
            rope_theta=0.0,
            rope_scaling=None,
        )

    wanted = dimensions(hp)
    return next((preset for preset in PRESETS.values() if dimensions(preset.hp) == wanted), None)
