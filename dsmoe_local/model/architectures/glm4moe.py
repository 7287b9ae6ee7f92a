"""GLM-4.5 and GLM-4.5-Air. llama.cpp: src/models/glm4-moe.cpp."""

from __future__ import annotations

from dsmoe_local.model.architectures import common
from dsmoe_local.model.architectures.table import Architecture, ModelClass, Parameter, Rule
from dsmoe_local.model.hyperparameters import Gating

# fmt: off
_FFN_NORM = Rule("post_attention_norm.weight", "post_attention_layernorm.weight", ("hidden_size",))
_FLAGS = (
    Parameter("has_qkv_bias", "attention_bias", kind=bool, default=False, tensor="attn_q.bias"),
    Parameter("has_qk_norm", "use_qk_norm", kind=bool, default=False, tensor="attn_q_norm.weight"),
)
# fmt: on

_DEFAULTS = {"norm_topk_prob": True, "rms_norm_eps": 1e-5, "first_k_dense_replace": 1}

ARCHITECTURE = Architecture(
    name="glm4moe",
    classes=(
        ModelClass(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            {"norm_topk_prob": True, "rms_norm_eps": 1e-5, "first_k_dense_replace": 1},
        ),
    ),
    model=common.MODEL,
    every_layer=(*common.GROUPED_QUERIES, *common.QKV_BIAS, *common.QK_NORM, _FFN_NORM),
    dense_layer=common.DENSE_FFN,
    moe_layer=(common.ROUTER, common.EXPERT_BIAS, *common.ROUTED_EXPERTS, *common.SHARED_EXPERTS),
    parameters=(
        *common.WIDTHS,
        common.FFN_SIZE,
        *common.HEADS,
        common.EPSILON,
        *common.PARTIAL_ROPE,
        common.TIED,
        *_FLAGS,
        common.N_DENSE,
        *common.n_experts("n_routed_experts"),
        common.N_SHARED,
        common.EXPERT_SIZE,
        common.SHARED_SIZE,
        common.SCALE,
        common.NORMALIZED,
        common.gating("", {"sigmoid": Gating.SIGMOID}, Gating.SIGMOID),
        *common.GROUPS,
    ),
    constants={"has_expert_bias": True},
    config_values=common.CONFIG_VALUES,
    gguf_values=common.GGUF_VALUES,
    checks=(*common.CHECKS, common.values_are_as_wide_as_keys),
    has_mtp_layers=True,
)
