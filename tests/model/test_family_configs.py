"""config.json of every architecture: what the published checkpoints have, and what llama.cpp would ignore."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.family import MEMBERS, config_of

from dsmoe_local.base.errors import FormatError
from dsmoe_local.model.config_json import read_config
from dsmoe_local.model.cost import kv_bytes_per_token, parameters
from dsmoe_local.model.hyperparameters import Gating, RopeScaling

# fmt: off
V2_LITE: Mapping[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "attention_bias": False,
    "aux_loss_alpha": 0.001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
    "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
}
MOONLIGHT = {
    **V2_LITE, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "ep_size": 1,
    "intermediate_size": 11264, "max_position_embeddings": 8192, "norm_topk_prob": True,
    "num_nextn_predict_layers": 0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "vocab_size": 163840,
}
GLM_FLASH = {
    "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "attention_bias": False,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10240,
    "kv_lora_rank": 512, "max_position_embeddings": 202752, "moe_intermediate_size": 1536, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 20,
    "num_experts_per_tok": 4, "num_hidden_layers": 47, "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "q_lora_rank": 768, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 1.8, "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
    "v_head_dim": 256, "vocab_size": 154880,
}
QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
    "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 151936,
}
QWEN15 = {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "decoder_sparse_step": 1,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192,
    "max_window_layers": 21, "moe_intermediate_size": 1408, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 16, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 151936,
}
GLM_AIR = {
    "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True,
    "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 10944, "max_position_embeddings": 131072, "moe_intermediate_size": 1408,
    "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 96, "num_experts_per_tok": 8, "num_hidden_layers": 46, "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 1000000, "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "topk_group": 1,
    "use_qk_norm": False, "vocab_size": 151552,
}
LING = {
    "architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe", "first_k_dense_replace": 1,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5120,
    "max_position_embeddings": 32768, "moe_intermediate_size": 512, "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 512, "n_group": 8, "norm_topk_prob": True,
    "num_attention_heads": 16, "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 20,
    "num_key_value_heads": 4, "num_nextn_predict_layers": 0, "num_shared_experts": 1,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 600000,
    "routed_scaling_factor": 2.5, "score_function": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
    "use_bias": False, "use_qk_norm": True, "use_qkv_bias": False, "vocab_size": 157184,
}
OLMOE = {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": False, "clip_qkv": None,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
    "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False, "rope_scaling": None,
    "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "vocab_size": 50304,
}
DOTS = {
    "architectures": ["Dots1ForCausalLM"], "model_type": "dots1", "attention_bias": False,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 10944,
    "max_position_embeddings": 32768, "max_window_layers": 62, "moe_intermediate_size": 1408,
    "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 2, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts_per_tok": 6, "num_hidden_layers": 62, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000000, "routed_scaling_factor": 2.5,
    "scoring_func": "noaux_tc", "sliding_window": None, "tie_word_embeddings": False, "topk_group": 1,
    "use_sliding_window": False, "vocab_size": 152064,
}
# Name, config.json, published numbers (billions of weights in all and per token, which some count without
# embeddings), values in the KV cache per token and layer.
PUBLISHED: list[tuple[str, Mapping[str, Any], float, float, int]] = [
    ("DeepSeek-V2-Lite", V2_LITE, 15.7, 2.4, 576),
    ("Moonlight-16B-A3B", MOONLIGHT, 16.0, 3.0, 576),
    ("GLM-4.7-Flash", GLM_FLASH, 30.0, 3.4, 576),
    ("Qwen3-30B-A3B", QWEN3, 30.5, 3.3, 1024),
    ("Qwen1.5-MoE-A2.7B", QWEN15, 14.3, 2.7, 4096),
    ("GLM-4.5-Air", GLM_AIR, 106.0, 12.0, 2048),
    ("Ling-mini-2.0", LING, 16.3, 1.4, 1024),
    ("OLMoE-1B-7B", OLMOE, 6.9, 1.3, 4096),
    ("dots.llm1", DOTS, 142.0, 14.0, 8192),
]
# fmt: on


def write(folder: Path, values: Mapping[str, Any], **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    return folder


@pytest.mark.parametrize(("values", "total", "activated", "n_cached"), [case[1:] for case in PUBLISHED],
                         ids=[case[0] for case in PUBLISHED])  # fmt: skip
def test_published_checkpoints(
    values: Mapping[str, Any], total: float, activated: float, n_cached: int, tmp_path: Path
) -> None:
    """A published config.json that is refused, or gives another number of weights than its authors state."""
    hp = read_config(write(tmp_path, values))
    counted = parameters(hp)
    assert counted.total / 1e9 == pytest.approx(total, rel=0.01)
    assert counted.activated / 1e9 == pytest.approx(activated, rel=0.15)
    assert kv_bytes_per_token(hp) == 2 * hp.n_layers * n_cached


def test_the_values_of_deepseek_v2_lite(tmp_path: Path) -> None:
    """YaRN's factor for all of queries and keys, or the widths of MLA, that are lost."""
    hp = read_config(write(tmp_path, V2_LITE))
    assert (hp.head_dim, hp.value_dim, hp.rotary_dim, hp.query_rank, hp.kv_rank) == (192, 128, 64, 0, 512)
    assert hp.rope_scaling == RopeScaling("yarn", 40.0, 4096, mscale_all_dim=0.707)
    assert (hp.gating, hp.normalized_weights, hp.has_expert_bias) == (Gating.SOFTMAX, False, False)


@pytest.mark.parametrize("missing", ["scoring_func", "topk_method", "norm_topk_prob"])
def test_words_that_transformers_does_not_save(missing: str, tmp_path: Path) -> None:
    """A DeepSeek-V3 that becomes a softmax router because a key is missing."""
    values = {key: value for key, value in MOONLIGHT.items() if key != missing}
    hp = read_config(write(tmp_path, values))
    assert (hp.gating, hp.normalized_weights, hp.has_expert_bias) == (Gating.SIGMOID, True, True)


def test_the_object_for_rotary_positions_has_precedence(tmp_path: Path) -> None:
    """transformers 5 moved keys into it; an empty object says nothing."""
    rope = {"rope_type": "yarn", "rope_theta": 5e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    hp = read_config(write(tmp_path, QWEN3, rope_theta=10000, rope_parameters=rope, rope_scaling={}))
    assert hp.rope_theta == 5e6
    assert hp.rope_scaling == RopeScaling("yarn", 4.0, 32768)


REFUSED: list[tuple[Mapping[str, Any], dict[str, Any], str]] = [
    (V2_LITE, {"model_type": "llama"}, "model_type"),
    (V2_LITE, {"model_type": ["deepseek_v2"]}, "model_type"),
    (V2_LITE, {"architectures": ["DeepseekV3ForCausalLM"]}, "architectures"),
    (V2_LITE, {"topk_method": "group_limited_greedy"}, "topk_method"),
    (V2_LITE, {"scoring_func": "sqrtsoftplus"}, "scoring_func"),
    (V2_LITE, {"q_lora_rank": 512}, "q_lora_rank"),
    (V2_LITE, {"num_hidden_layers": 28}, "q_lora_rank"),
    (V2_LITE, {"num_key_value_heads": 8}, "num_key_value_heads"),
    (V2_LITE, {"qk_nope_head_dim": 0}, "qk_nope_head_dim"),
    (V2_LITE, {"moe_layer_freq": 2}, "moe_layer_freq"),
    (MOONLIGHT, {"n_group": 5}, "n_group"),
    (V2_LITE, {"n_group": 8, "topk_group": 4}, "n_group"),
    (V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob"),
    (MOONLIGHT, {"n_group": 8, "topk_group": 8}, "topk_group"),
    (V2_LITE, {"rope_scaling": {**V2_LITE["rope_scaling"], "mscale": 1.0}}, "mscale"),
    (V2_LITE, {"rope_scaling": {**V2_LITE["rope_scaling"], "beta_fast": 1}}, "beta_fast"),
    (V2_LITE, {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling"),
    (GLM_FLASH, {"rope_interleave": False}, "rope_interleave"),
    (QWEN3, {"norm_topk_prob": False}, "norm_topk_prob"),
    (QWEN3, {"mlp_only_layers": [0]}, "mlp_only_layers"),
    (QWEN3, {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    (QWEN3, {"use_sliding_window": True}, "use_sliding_window"),
    (QWEN15, {"norm_topk_prob": True}, "norm_topk_prob"),
    (QWEN15, {"tie_word_embeddings": True}, "tie_word_embeddings"),
    (QWEN15, {"head_dim": 64}, "head_dim"),
    (GLM_AIR, {"partial_rotary_factor": 2.0}, "partial_rotary_factor"),
    (LING, {"use_qk_norm": False}, "use_qk_norm"),
    (LING, {"score_function": "softmax"}, "score_function"),
    (LING, {"use_qkv_bias": True}, "use_qkv_bias"),
    (LING, {"norm_topk_prob": False}, "norm_topk_prob"),
    (LING, {"norm_head": True}, "norm_head"),
    (OLMOE, {"clip_qkv": 8.0}, "clip_qkv"),
    (DOTS, {"scoring_func": "softmax"}, "scoring_func"),
    (DOTS, {"use_sliding_window": True}, "use_sliding_window"),
    (DOTS, {"use_sliding_window": None, "sliding_window": 4096, "max_window_layers": 1}, "sliding_window"),
    (DOTS, {"layer_types": ["full_attention"] * 61 + ["sliding_attention"]}, "layer_types"),
    (QWEN3, {"num_local_experts": 64}, "num_local_experts"),
    (QWEN3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (QWEN3, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
    (QWEN3, {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"rope_theta": 6.0}}, "rope_parameters"),
    (GLM_FLASH, {"mlp_layer_types": ["sparse"] * 47}, "first_k_dense_replace"),
    (GLM_AIR, {"partial_rotary_factor": 0.01}, "partial_rotary_factor"),
    (OLMOE, {"num_experts": 1}, "num_experts"),
    (OLMOE, {"num_key_value_heads": 4}, "num_key_value_heads"),
]


@pytest.mark.parametrize(("values", "changes", "key"), REFUSED)
def test_values_that_llama_cpp_would_ignore(
    values: Mapping[str, Any], changes: dict[str, Any], key: str, tmp_path: Path
) -> None:
    """A conversion without a word that gives wrong output."""
    with pytest.raises(FormatError) as caught:
        read_config(write(tmp_path, values, **changes))
    assert key in str(caught.value)
    assert str(caught.value).count("\n") <= 2


@pytest.mark.parametrize("name", MEMBERS)
def test_missing_keys_have_the_defaults_of_transformers(name: str, tmp_path: Path) -> None:
    """A value that transformers takes for a missing key, and we take another one for."""
    member = MEMBERS[name]
    config = config_of(member)
    defaults = type(config)().to_dict()
    values = {**config.to_dict(), **member.written}
    for key in values:
        # Null and a missing key are the same to us. If the rank is wrong, the tensors do not match.
        if key == "q_lora_rank":
            continue
        rest = {other: value for other, value in values.items() if other != key}
        try:
            found = read_config(write(tmp_path, rest))
        except FormatError:
            continue
        expected = read_config(write(tmp_path, rest, **{key: defaults.get(key)}))
        assert replace(found, n_mtp_layers=0) == replace(expected, n_mtp_layers=0), key
