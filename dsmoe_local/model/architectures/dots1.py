"""dots.llm1. llama.cpp: src/models/dots1.cpp."""

from __future__ import annotations

from dsmoe_local.model.architectures import common
from dsmoe_local.model.architectures.table import Architecture, ModelClass
from dsmoe_local.model.hyperparameters import Gating

ARCHITECTURE = Architecture(
    name="dots1",
    classes=(ModelClass("dots1", "Dots1ForCausalLM", {"topk_method": "noaux_tc"}),),
    model=common.MODEL,
    every_layer=(*common.GROUPED_QUERIES, *common.QK_NORM, common.FFN_NORM),
    dense_layer=common.DENSE_FFN,
    moe_layer=(common.ROUTER, common.EXPERT_BIAS, *common.ROUTED_EXPERTS, *common.SHARED_EXPERTS),
    parameters=(
        *common.WIDTHS,
        common.FFN_SIZE,
        *common.HEADS,
        common.EPSILON,
        *common.ROPE,
        common.N_DENSE,
        *common.n_experts("n_routed_experts"),
        common.N_SHARED,
        common.EXPERT_SIZE,
        common.SHARED_SIZE,
        common.SCALE,
        common.NORMALIZED,
        common.gating("scoring_func", {"noaux_tc": Gating.SIGMOID, "sigmoid": Gating.SIGMOID}),
        *common.GROUPS,
        common.CHOICE_BIAS,
    ),
    constants={"has_qk_norm": True},
    config_values={
        **common.CONFIG_VALUES,
        **common.WHOLE_HEADS,
        "attention_bias": (False, None),
        "tie_word_embeddings": (False, None),
    },
    gguf_values=common.GGUF_VALUES,
    checks=(
        *common.CHECKS,
        common.every_head_has_its_keys,
        common.heads_are_rotated_as_a_whole,
        common.values_are_as_wide_as_keys,
        common.output_is_not_the_embedding,
    ),
)
