"""Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder-30B-A3B. llama.cpp: src/models/qwen3moe.cpp."""

from __future__ import annotations

from dsmoe_local.model.architectures import common
from dsmoe_local.model.architectures.table import Architecture, ModelClass

ARCHITECTURE = Architecture(
    name="qwen3moe",
    classes=(ModelClass("qwen3_moe", "Qwen3MoeForCausalLM"),),
    model=common.MODEL,
    every_layer=(*common.GROUPED_QUERIES, *common.QK_NORM, common.FFN_NORM),
    dense_layer=(),
    moe_layer=(common.ROUTER, *common.ROUTED_EXPERTS),
    parameters=(
        *common.WIDTHS,
        common.FFN_SIZE,
        *common.HEADS,
        common.EPSILON,
        *common.ROPE,
        common.TIED,
        *common.n_experts("num_experts"),
        common.EXPERT_SIZE,
    ),
    constants={"n_dense_layers": 0, "has_qk_norm": True, "normalized_weights": True},
    config_values={
        **common.CONFIG_VALUES,
        **common.WHOLE_HEADS,
        "norm_topk_prob": (True,),
        "decoder_sparse_step": (1, None),
        "mlp_only_layers": ([], None),
        "attention_bias": (False, None),
    },
    gguf_values={**common.GGUF_VALUES, **common.NO_GROUPS},
    checks=(
        *common.CHECKS,
        common.heads_are_rotated_as_a_whole,
        common.values_are_as_wide_as_keys,
    ),
)
