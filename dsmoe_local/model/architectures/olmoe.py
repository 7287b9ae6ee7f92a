"""OLMoE-1B-7B. llama.cpp: src/models/olmoe.cpp. Queries and keys are normalised over all heads together."""

from __future__ import annotations

from dsmoe_local.model.architectures import common
from dsmoe_local.model.architectures.table import Architecture, ModelClass, Parameter, Rule

_NORMS = (
    Rule("attn_q_norm.weight", "self_attn.q_norm.weight", ("attention_size",)),
    Rule("attn_k_norm.weight", "self_attn.k_norm.weight", ("key_size",)),
)

ARCHITECTURE = Architecture(
    name="olmoe",
    classes=(ModelClass("olmoe", "OlmoeForCausalLM", {"rms_norm_eps": 1e-5}),),
    model=common.MODEL,
    every_layer=(*common.GROUPED_QUERIES, *_NORMS, common.FFN_NORM),
    dense_layer=(),
    moe_layer=(common.ROUTER, *common.ROUTED_EXPERTS),
    parameters=(
        *common.WIDTHS,
        Parameter("expert_size", "intermediate_size", "feed_forward_length", high=1 << 20),
        *common.HEADS,
        common.EPSILON,
        *common.ROPE,
        *common.n_experts("num_experts"),
    ),
    constants={"n_dense_layers": 0, "ffn_size": 0, "has_qk_norm": True},
    config_values={
        **common.CONFIG_VALUES,
        **common.WHOLE_HEADS,
        "norm_topk_prob": (False, None),
        "attention_bias": (False, None),
        "clip_qkv": (None,),
        "tie_word_embeddings": (False, None),
    },
    gguf_values={**common.GGUF_VALUES, **common.NO_GROUPS},
    checks=(
        *common.CHECKS,
        common.every_head_has_its_keys,
        common.head_sizes_fill_the_width,
        common.heads_are_rotated_as_a_whole,
        common.values_are_as_wide_as_keys,
        common.output_is_not_the_embedding,
    ),
)
