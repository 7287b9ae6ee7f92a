"""DeepSeekMoE (arXiv 2401.06066): DeepSeekMoE 16B. llama.cpp: src/models/deepseek.cpp."""

from __future__ import annotations

from dataclasses import replace

from dsmoe_local.model.architectures import common
from dsmoe_local.model.architectures.table import Architecture, ModelClass
from dsmoe_local.model.hyperparameters import Gating

# Its configuration takes one key head for each query head if the key is missing.
_HEADS = tuple(
    replace(each, default=each.gguf_default) if each.field == "n_kv_heads" else each for each in common.HEADS
)

ARCHITECTURE = Architecture(
    name="deepseek",
    classes=(ModelClass("deepseek", "DeepseekForCausalLM"),),
    model=common.MODEL,
    every_layer=(*common.PERMUTED_QUERIES, common.FFN_NORM),
    dense_layer=common.DENSE_FFN,
    moe_layer=(common.ROUTER, *common.ROUTED_EXPERTS, *common.SHARED_EXPERTS),
    parameters=(
        *common.WIDTHS,
        replace(common.FFN_SIZE, gguf_default=0),
        *_HEADS,
        common.EPSILON,
        *common.ROPE,
        common.TIED,
        common.N_DENSE,
        *common.n_experts("n_routed_experts"),
        common.N_SHARED,
        common.EXPERT_SIZE,
        common.SHARED_SIZE,
        common.SCALE,
        common.gating("scoring_func", common.SOFTMAX, Gating.SOFTMAX),
    ),
    constants={},
    config_values={
        **common.CONFIG_VALUES,
        **common.WHOLE_HEADS,
        "norm_topk_prob": (False, None),
        "topk_method": ("greedy", "gready", None),  # DeepSeek's own code has the misspelling
        "moe_layer_freq": (1, None),
        "attention_bias": (False, None),
        "n_group": (1, 0, None),
        "topk_group": (1, 0, None),
        "q_lora_rank": (None,),
        "kv_lora_rank": (None,),
        "sliding_window": (None,),
    },
    gguf_values={
        **common.GGUF_VALUES,
        **common.NO_GROUPS,
        "expert_weights_norm": (False,),
    },
    checks=(
        *common.CHECKS,
        common.head_sizes_fill_the_width,
        common.heads_are_rotated_as_a_whole,
        common.values_are_as_wide_as_keys,
    ),
    ignored=common.ROPE_FREQUENCIES,
    ignored_sources=common.INVERSE_FREQUENCIES,
    rotates_adjacent_values=True,
)
