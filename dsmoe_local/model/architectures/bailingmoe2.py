"""Ling-mini-2.0, Ring-mini-2.0, Ling-flash-2.0. llama.cpp: src/models/bailingmoe2.cpp.

Queries, keys and values are one matrix, in checkpoints and in GGUF files.
"""

from __future__ import annotations

from dataclasses import replace

from dsmoe_local.model.architectures import common
from dsmoe_local.model.architectures.table import Architecture, ModelClass, Parameter, Rule
from dsmoe_local.model.hyperparameters import Gating

# fmt: off
_ATTENTION = (
    common.ATTENTION_NORM,
    Rule("attn_qkv.weight", "attention.query_key_value.weight", ("qkv_size", "hidden_size")),
    Rule("attn_q_norm.weight", "attention.query_layernorm.weight", ("head_dim",)),
    Rule("attn_k_norm.weight", "attention.key_layernorm.weight", ("head_dim",)),
    Rule("attn_output.weight", "attention.dense.weight", ("hidden_size", "attention_output_size")),
)
_SHARED_SIZE = Parameter("shared_expert_size", "moe_shared_expert_intermediate_size",
                         "expert_shared_feed_forward_length", high=1 << 20,
                         default=lambda values: values["expert_size"])
# fmt: on
_EMBEDDING, *_OTHERS = common.MODEL

ARCHITECTURE = Architecture(
    name="bailingmoe2",
    classes=(
        ModelClass("bailing_moe", "BailingMoeV2ForCausalLM", {"use_qk_norm": True, "norm_topk_prob": True}),
    ),
    model=(replace(_EMBEDDING, source="model.word_embeddings.weight"), *_OTHERS),
    every_layer=(*_ATTENTION, common.FFN_NORM),
    dense_layer=common.DENSE_FFN,
    moe_layer=(
        common.ROUTER,
        replace(common.EXPERT_BIAS, source="mlp.gate.expert_bias"),
        *common.ROUTED_EXPERTS,
        *common.SHARED_EXPERTS,
    ),
    parameters=(
        *common.WIDTHS,
        common.FFN_SIZE,
        *common.HEADS,
        common.EPSILON,
        *common.PARTIAL_ROPE,
        common.N_DENSE,
        *common.n_experts("num_experts"),
        replace(common.N_SHARED, config="num_shared_experts"),
        common.EXPERT_SIZE,
        _SHARED_SIZE,
        common.SCALE,
        common.NORMALIZED,
        common.gating("score_function", {"sigmoid": Gating.SIGMOID}),
        *common.GROUPS,
        replace(common.HAS_EXPERT_BIAS, config="moe_router_enable_expert_bias", default=True),
    ),
    constants={"has_qk_norm": True},
    config_values={
        **common.CONFIG_VALUES,
        "use_qk_norm": (True,),
        "norm_topk_prob": (True,),
        "norm_head": (False, None),
        "use_rmsnorm": (True, None),
        "use_bias": (False, None),
        "use_qkv_bias": (False, None),
        "tie_word_embeddings": (False, None),
    },
    gguf_values=common.GGUF_VALUES,
    checks=(
        *common.CHECKS,
        common.head_sizes_fill_the_width,
        common.values_are_as_wide_as_keys,
        common.output_is_not_the_embedding,
    ),
    has_mtp_layers=True,
)
