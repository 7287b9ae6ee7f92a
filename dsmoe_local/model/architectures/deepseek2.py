"""DeepSeek-V2-Lite, V3, R1, Moonlight and GLM-4.7-Flash. llama.cpp: src/models/deepseek2.cpp.

Multi-head latent attention (MLA, arXiv 2405.04434) is stored so that keys and values need not be expanded:
`kv_b_proj` is split into the part for keys, transposed, and the part for values, for each head.
"""

from __future__ import annotations

from collections.abc import Mapping

from dsmoe_local.model.architectures import common
from dsmoe_local.model.architectures.table import (
    REQUIRED,
    Architecture,
    Blocks,
    ModelClass,
    Order,
    Parameter,
    Rule,
    Values,
)
from dsmoe_local.model.hyperparameters import Gating, Hyperparameters

_LITE_LAYERS = (26, 27)  # src/models/deepseek2.cpp, is_lite
_V2: Mapping[str, object] = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
# With greedy choice, V2 ignores groups. It scales weights only if it does not normalise them.
_V2_VALUES: Mapping[str, tuple[object, ...]] = {
    "scoring_func": ("softmax", None),
    "topk_method": ("greedy", "gready", None),
    "norm_topk_prob": (False, None),
    "n_group": (1, 0, None),
    "topk_group": (1, 0, None),
}
_V3: Mapping[str, object] = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
}
# The class in transformers does not read these keys.
_V3_VALUES: Mapping[str, tuple[object, ...]] = {
    "scoring_func": ("sigmoid", None),
    "topk_method": ("noaux_tc", None),
}
_GLM: Mapping[str, object] = {
    **_V3,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 1.8,
}
_GLM_VOCABULARY, _GLM_LAYERS = 154880, (47, 48)
_KEYS_AND_VALUES = ("nope_dim", "value_dim")

# fmt: off
_ATTENTION = (
    common.ATTENTION_NORM,
    Rule("attn_q.weight", "self_attn.q_proj.weight", ("attention_size", "hidden_size"), unless="query_rank"),
    Rule("attn_q_a.weight", "self_attn.q_a_proj.weight", ("query_rank", "hidden_size")),
    Rule("attn_q_a_norm.weight", "self_attn.q_a_layernorm.weight", ("query_rank",)),
    Rule("attn_q_b.weight", "self_attn.q_b_proj.weight", ("attention_size", "query_rank")),
    Rule("attn_kv_a_mqa.weight", "self_attn.kv_a_proj_with_mqa.weight", ("latent_size", "hidden_size")),
    Rule("attn_kv_a_norm.weight", "self_attn.kv_a_layernorm.weight", ("kv_rank",)),
    Rule("attn_k_b.weight", "self_attn.kv_b_proj.weight", ("n_heads", "kv_rank", "nope_dim"),
         Blocks("n_heads", _KEYS_AND_VALUES, 0, Order.TRANSPOSED)),
    Rule("attn_v_b.weight", "self_attn.kv_b_proj.weight", ("n_heads", "value_dim", "kv_rank"),
         Blocks("n_heads", _KEYS_AND_VALUES, 1)),
    Rule("attn_output.weight", "self_attn.o_proj.weight", ("hidden_size", "attention_output_size")),
    common.FFN_NORM,
)
_WIDTHS = (
    common.N_HEADS,
    Parameter("n_kv_heads", "num_key_value_heads", high=1024, gguf_default=lambda values: values["n_heads"]),
    Parameter("query_rank", "q_lora_rank", "attention.q_lora_rank", low=0, high=1 << 16, default=0,
              omitted=0),
    Parameter("kv_rank", "kv_lora_rank", "attention.kv_lora_rank", high=1 << 16),
    Parameter("nope_dim", "qk_nope_head_dim", high=4096),
    Parameter("rotary_dim", "qk_rope_head_dim", "rope.dimension_count", low=2, high=4096),
    Parameter("head_dim", "", "attention.key_length_mla", low=2, high=8192, gguf_default=REQUIRED,
              default=lambda values: values["nope_dim"] + values["rotary_dim"]),
    Parameter("value_dim", "v_head_dim", "attention.value_length_mla", high=4096),
    Parameter("n_cache_heads", "", "attention.head_count_kv"),
    Parameter("cache_key_dim", "", "attention.key_length"),
    Parameter("cache_value_dim", "", "attention.value_length"),
)
# fmt: on


def _a_part_is_not_rotated(hp: Hyperparameters) -> tuple[str, str] | None:
    return None if hp.nope_dim > 0 else ("head_dim", f"more than {hp.rotary_dim}, the rotated part")


def _queries_of_lite_models(hp: Hyperparameters) -> tuple[str, str] | None:
    """llama.cpp decides by the number of layers whether queries are compressed."""
    is_lite = hp.n_layers in _LITE_LAYERS or (hp.n_layers == 48 and hp.n_vocab == 128256)
    if is_lite and hp.query_rank:
        return "query_rank", f"0 in a model of {hp.n_layers} layers"
    if not is_lite and not hp.query_rank:
        layers = " or ".join(map(str, _LITE_LAYERS))
        return "query_rank", f"a number above 0, except in models of {layers} layers"
    return None


def _gating_of_old_files(values: Values) -> Gating:
    """llama.cpp recognizes files of GLM-4.7-Flash that do not name the function."""
    is_glm = values["n_layers"] in _GLM_LAYERS and values["n_vocab"] == _GLM_VOCABULARY
    return Gating.SIGMOID if is_glm else Gating.SOFTMAX


ARCHITECTURE = Architecture(
    name="deepseek2",
    classes=(
        ModelClass("deepseek_v2", "DeepseekV2ForCausalLM", _V2, _V2_VALUES),
        ModelClass("deepseek_v3", "DeepseekV3ForCausalLM", _V3, _V3_VALUES),
        ModelClass("kimi_k2", "DeepseekV3ForCausalLM", _V3, _V3_VALUES),
        ModelClass("glm4_moe_lite", "Glm4MoeLiteForCausalLM", _GLM, _V3_VALUES),
    ),
    model=common.MODEL,
    every_layer=_ATTENTION,
    dense_layer=common.DENSE_FFN,
    moe_layer=(common.ROUTER, common.EXPERT_BIAS, *common.ROUTED_EXPERTS, *common.SHARED_EXPERTS),
    parameters=(
        *common.WIDTHS,
        common.FFN_SIZE,
        *_WIDTHS,
        common.EPSILON,
        common.ROPE_THETA,
        common.TIED,
        common.N_DENSE,
        *common.n_experts("n_routed_experts"),
        common.N_SHARED,
        common.EXPERT_SIZE,
        common.SHARED_SIZE,
        common.SCALE,
        common.NORMALIZED,
        common.gating("scoring_func", common.ANY_GATING, _gating_of_old_files),
        *common.GROUPS,
        common.CHOICE_BIAS,
    ),
    constants={},
    config_values={
        **common.CONFIG_VALUES,
        **common.WHOLE_HEADS,
        "moe_layer_freq": (1, None),
        "attention_bias": (False, None),
        "rope_interleave": (True, None),
    },
    gguf_values={**common.GGUF_VALUES, "attention.temperature_scale": (0.0,)},
    checks=(
        *common.CHECKS,
        common.every_head_has_its_keys,
        _a_part_is_not_rotated,
        _queries_of_lite_models,
    ),
    has_mtp_layers=True,
    yarn_scales_attention=True,
    rotates_adjacent_values=True,
)
