"""Published models by their dimensions: those of arXiv 2401.06066 (tables 1, 3 and 5), and its family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsmoe_local.model.hyperparameters import Gating, Hyperparameters


@dataclass(frozen=True, slots=True)
class Preset:
    """One published model. Its hyper-parameters have no settings of rotary positions.

    `ffn_factor` is the nominal f of arXiv 2401.06066 (see `cost.flops`), and `n_tokens` the sequence length
    for which it gives FLOPs. Models of other papers have no factor.
    """

    hp: Hyperparameters
    ffn_factor: float | None = None
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
        value_dim=128,
        rotary_dim=128,
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
    value_dim=128,
    rotary_dim=128,
    ffn_size=10944,
    n_vocab=102400,
    n_context=4096,
    n_dense_layers=1,
    n_routed_experts=64,
    n_shared_experts=2,
    n_experts_per_token=6,
    expert_size=1408,
    shared_expert_size=1408,
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

_PAPER: Mapping[str, Preset] = {
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
            shared_expert_size=2 * 1280 // 3,
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
            shared_expert_size=8 * 4096 // 3,
            ffn_size=16 * 4096 // 3,
            name="GShard 137B",
        ),
        ffn_factor=16,
    ),
    "deepseek-7b": _dense("DeepSeek 7B", 30, 4096, 11008, 102400),
    "deepseek-67b": _dense("DeepSeek 67B", 95, 8192, 22016, 102400, n_kv_heads=8),
    "llama2-7b": _dense("LLaMA2 7B", 32, 4096, 11008, 32000),
}


# fmt: off
_MLA = {"architecture": "deepseek2", "head_dim": 192, "value_dim": 128, "rotary_dim": 64, "kv_rank": 512}
_SIGMOID = {"gating": Gating.SIGMOID, "has_expert_bias": True, "normalized_weights": True}
_LITE = {**_MLA, "n_layers": 27, "hidden_size": 2048, "n_heads": 16, "n_kv_heads": 16, "n_dense_layers": 1,
         "n_routed_experts": 64, "n_shared_experts": 2, "n_experts_per_token": 6, "expert_size": 1408}
_V3 = {**_MLA, **_SIGMOID, "n_layers": 61, "hidden_size": 7168, "query_rank": 1536, "ffn_size": 18432,
       "n_shared_experts": 1, "n_experts_per_token": 8, "expert_size": 2048}


def _published(name: str, *parts: Mapping[str, Any], **values: Any) -> Preset:  # noqa: ANN401
    merged = {key: value for part in (*parts, values) for key, value in part.items()}
    head_dim = merged["head_dim"]
    shared_size = merged["expert_size"] if "n_shared_experts" in merged else 0
    usual = {"value_dim": head_dim, "rotary_dim": head_dim, "shared_expert_size": shared_size}
    return Preset(Hyperparameters(name=name, **{**usual, **merged}))


_FAMILY = (
    # arXiv 2405.04434, appendix B
    _published("DeepSeek-V2-Lite", _LITE, ffn_size=10944, n_vocab=102400, n_context=163840),
    # arXiv 2502.16982
    _published("Moonlight-16B-A3B", _LITE, _SIGMOID, ffn_size=11264, n_vocab=163840, n_context=8192,
               routed_scaling_factor=2.446),
    # arXiv 2412.19437
    _published("DeepSeek-V3", _V3, n_heads=128, n_kv_heads=128, n_dense_layers=3, n_routed_experts=256,
               n_vocab=129280, n_context=163840, n_expert_groups=8, n_groups_per_token=4,
               routed_scaling_factor=2.5),
    # arXiv 2507.20534
    _published("Kimi-K2", _V3, n_heads=64, n_kv_heads=64, n_dense_layers=1, n_routed_experts=384,
               n_vocab=163840, n_context=131072, routed_scaling_factor=2.827),
    # huggingface.co/zai-org/GLM-4.7-Flash
    _published("GLM-4.7-Flash", _MLA, _SIGMOID, n_layers=47, hidden_size=2048, n_heads=20, n_kv_heads=20,
               head_dim=256, value_dim=256, query_rank=768, ffn_size=10240, n_dense_layers=1,
               n_routed_experts=64, n_shared_experts=1, n_experts_per_token=4, expert_size=1536,
               n_vocab=154880, n_context=202752, routed_scaling_factor=1.8),
    # arXiv 2508.06471
    _published("GLM-4.5-Air", _SIGMOID, architecture="glm4moe", n_layers=46, hidden_size=4096, n_heads=96,
               n_kv_heads=8, head_dim=128, rotary_dim=64, has_qkv_bias=True, ffn_size=10944,
               n_dense_layers=1, n_routed_experts=128, n_shared_experts=1, n_experts_per_token=8,
               expert_size=1408, n_vocab=151552, n_context=131072),
    # qwenlm.github.io/blog/qwen-moe
    _published("Qwen1.5-MoE-A2.7B", architecture="qwen2moe", n_layers=24, hidden_size=2048, n_heads=16,
               n_kv_heads=16, head_dim=128, has_qkv_bias=True, ffn_size=5632, n_dense_layers=0,
               n_routed_experts=60, n_shared_experts=1, n_experts_per_token=4, expert_size=1408,
               shared_expert_size=5632, n_vocab=151936, n_context=8192),
    # arXiv 2505.09388
    _published("Qwen3-30B-A3B", architecture="qwen3moe", n_layers=48, hidden_size=2048, n_heads=32,
               n_kv_heads=4, head_dim=128, has_qk_norm=True, ffn_size=6144, n_dense_layers=0,
               n_routed_experts=128, n_experts_per_token=8, expert_size=768, normalized_weights=True,
               n_vocab=151936, n_context=40960),
    _published("Qwen3-235B-A22B", architecture="qwen3moe", n_layers=94, hidden_size=4096, n_heads=64,
               n_kv_heads=4, head_dim=128, has_qk_norm=True, ffn_size=12288, n_dense_layers=0,
               n_routed_experts=128, n_experts_per_token=8, expert_size=1536, normalized_weights=True,
               n_vocab=151936, n_context=40960),
    # huggingface.co/inclusionAI/Ling-mini-2.0
    _published("Ling-mini-2.0", _SIGMOID, architecture="bailingmoe2", n_layers=20, hidden_size=2048,
               n_heads=16, n_kv_heads=4, head_dim=128, rotary_dim=64, has_qk_norm=True, ffn_size=5120,
               n_dense_layers=1, n_routed_experts=256, n_shared_experts=1, n_experts_per_token=8,
               expert_size=512, n_vocab=157184, n_context=32768, n_expert_groups=8, n_groups_per_token=4,
               routed_scaling_factor=2.5),
    # arXiv 2409.02060
    _published("OLMoE-1B-7B", architecture="olmoe", n_layers=16, hidden_size=2048, n_heads=16, n_kv_heads=16,
               head_dim=128, has_qk_norm=True, ffn_size=0, n_dense_layers=0, n_routed_experts=64,
               n_experts_per_token=8, expert_size=1024, n_vocab=50304, n_context=4096),
)
# fmt: on

PRESETS: Mapping[str, Preset] = {**_PAPER, **{preset.hp.name.lower(): preset for preset in _FAMILY}}


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
            n_mtp_layers=0,
        )

    wanted = dimensions(hp)
    return next((preset for preset in PRESETS.values() if dimensions(preset.hp) == wanted), None)
