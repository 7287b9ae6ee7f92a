"""Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B. llama.cpp: src/models/qwen2moe.cpp.

One shared expert, whose output is multiplied by the sigmoid of `ffn_gate_inp_shexp` times its input.
"""

from __future__ import annotations

from dsmoe_local.model.architectures import common
from dsmoe_local.model.architectures.table import Architecture, ModelClass, Parameter, Rule

# fmt: off
_SHARED_EXPERT = (
    Rule("ffn_gate_inp_shexp.weight", "mlp.shared_expert_gate.weight", ("hidden_size",), is_row=True),
    Rule("ffn_gate_shexp.weight", "mlp.shared_expert.gate_proj.weight", ("shared_size", "hidden_size")),
    Rule("ffn_up_shexp.weight", "mlp.shared_expert.up_proj.weight", ("shared_size", "hidden_size")),
    Rule("ffn_down_shexp.weight", "mlp.shared_expert.down_proj.weight", ("hidden_size", "shared_size")),
)
_SHARED_SIZE = Parameter("shared_expert_size", "shared_expert_intermediate_size",
                         "expert_shared_feed_forward_length", high=1 << 20)
# fmt: on

ARCHITECTURE = Architecture(
    name="qwen2moe",
    classes=(ModelClass("qwen2_moe", "Qwen2MoeForCausalLM"),),
    model=common.MODEL,
    every_layer=(*common.GROUPED_QUERIES, *common.QKV_BIAS, common.FFN_NORM),
    dense_layer=(),
    moe_layer=(common.ROUTER, *common.ROUTED_EXPERTS, *_SHARED_EXPERT),
    parameters=(
        *common.WIDTHS,
        common.FFN_SIZE,
        *common.HEADS,
        common.EPSILON,
        *common.ROPE,
        *common.n_experts("num_experts"),
        common.EXPERT_SIZE,
        _SHARED_SIZE,
    ),
    constants={"n_dense_layers": 0, "n_shared_experts": 1, "has_qkv_bias": True},
    config_values={
        **common.CONFIG_VALUES,
        **common.WHOLE_HEADS,
        "norm_topk_prob": (False, None),
        "decoder_sparse_step": (1, None),
        "mlp_only_layers": ([], None),
        "qkv_bias": (True, None),
        "tie_word_embeddings": (False, None),
    },
    gguf_values={**common.GGUF_VALUES, **common.NO_GROUPS},
    checks=(
        *common.CHECKS,
        common.head_sizes_fill_the_width,
        common.heads_are_rotated_as_a_whole,
        common.values_are_as_wide_as_keys,
        common.output_is_not_the_embedding,
    ),
)
