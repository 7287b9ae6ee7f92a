"""Parts that several architectures share: tensors, hyper-parameters and checks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from dsmoe_local.model.architectures.table import (
    REQUIRED,
    Blocks,
    Check,
    Fused,
    Order,
    Parameter,
    Rule,
    Values,
)
from dsmoe_local.model.hyperparameters import Gating, Hyperparameters

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 512  # LLAMA_MAX_EXPERTS

# fmt: off
MODEL = (
    Rule("token_embd.weight", "model.embed_tokens.weight", ("n_vocab", "hidden_size")),
    Rule("output_norm.weight", "model.norm.weight", ("hidden_size",)),
    Rule("output.weight", "lm_head.weight", ("n_vocab", "hidden_size"), unless="tied_embeddings"),
)
ATTENTION_NORM = Rule("attn_norm.weight", "input_layernorm.weight", ("hidden_size",))
FFN_NORM = Rule("ffn_norm.weight", "post_attention_layernorm.weight", ("hidden_size",))
GROUPED_QUERIES = (
    ATTENTION_NORM,
    Rule("attn_q.weight", "self_attn.q_proj.weight", ("attention_size", "hidden_size")),
    Rule("attn_k.weight", "self_attn.k_proj.weight", ("key_size", "hidden_size")),
    Rule("attn_v.weight", "self_attn.v_proj.weight", ("value_size", "hidden_size")),
    Rule("attn_output.weight", "self_attn.o_proj.weight", ("hidden_size", "attention_output_size")),
)
QKV_BIAS = (
    Rule("attn_q.bias", "self_attn.q_proj.bias", ("attention_size",), when="has_qkv_bias"),
    Rule("attn_k.bias", "self_attn.k_proj.bias", ("key_size",), when="has_qkv_bias"),
    Rule("attn_v.bias", "self_attn.v_proj.bias", ("value_size",), when="has_qkv_bias"),
)
QK_NORM = (
    Rule("attn_q_norm.weight", "self_attn.q_norm.weight", ("head_dim",), when="has_qk_norm"),
    Rule("attn_k_norm.weight", "self_attn.k_norm.weight", ("head_dim",), when="has_qk_norm"),
)
DENSE_FFN = (
    Rule("ffn_gate.weight", "mlp.gate_proj.weight", ("ffn_size", "hidden_size")),
    Rule("ffn_up.weight", "mlp.up_proj.weight", ("ffn_size", "hidden_size")),
    Rule("ffn_down.weight", "mlp.down_proj.weight", ("hidden_size", "ffn_size")),
)
ROUTER = Rule("ffn_gate_inp.weight", "mlp.gate.weight", ("n_routed_experts", "hidden_size"))
_GATE_AND_UP = ("expert_size", "expert_size")
ROUTED_EXPERTS = (
    Rule("ffn_gate_exps.weight", "mlp.experts.{e}.gate_proj.weight",
         ("n_routed_experts", "expert_size", "hidden_size"),
         fused=Fused("mlp.experts.gate_up_proj", Blocks("n_routed_experts", _GATE_AND_UP, 0))),
    Rule("ffn_up_exps.weight", "mlp.experts.{e}.up_proj.weight",
         ("n_routed_experts", "expert_size", "hidden_size"),
         fused=Fused("mlp.experts.gate_up_proj", Blocks("n_routed_experts", _GATE_AND_UP, 1))),
    Rule("ffn_down_exps.weight", "mlp.experts.{e}.down_proj.weight",
         ("n_routed_experts", "hidden_size", "expert_size"),
         fused=Fused("mlp.experts.down_proj")),
)
EXPERT_BIAS = Rule("exp_probs_b.bias", "mlp.gate.e_score_correction_bias", ("n_routed_experts",),
                   when="has_expert_bias")
SHARED_EXPERTS = (
    Rule("ffn_gate_shexp.weight", "mlp.shared_experts.gate_proj.weight", ("shared_size", "hidden_size")),
    Rule("ffn_up_shexp.weight", "mlp.shared_experts.up_proj.weight", ("shared_size", "hidden_size")),
    Rule("ffn_down_shexp.weight", "mlp.shared_experts.down_proj.weight", ("hidden_size", "shared_size")),
)
# fmt: on

_NORM, _QUERY, _KEY, *_VALUE_AND_OUTPUT = GROUPED_QUERIES
PERMUTED_QUERIES = (
    _NORM,
    replace(_QUERY, blocks=Blocks("n_heads", ("head_dim",), order=Order.PAIRS)),
    replace(_KEY, blocks=Blocks("n_kv_heads", ("head_dim",), order=Order.PAIRS)),
    *_VALUE_AND_OUTPUT,
)
"""The same, for graphs that rotate adjacent pairs of a head's values."""


def _usual_head_dim(values: Values) -> int:
    return max(2, int(values["hidden_size"]) // int(values["n_heads"]))


# fmt: off
WIDTHS = (
    Parameter("n_layers", "num_hidden_layers", "block_count", high=MAX_LAYERS),
    Parameter("n_context", "max_position_embeddings", "context_length", high=1 << 28),
    Parameter("hidden_size", "hidden_size", "embedding_length", high=1 << 20),
)
FFN_SIZE = Parameter("ffn_size", "intermediate_size", "feed_forward_length", high=1 << 22)
N_HEADS = Parameter("n_heads", "num_attention_heads", "attention.head_count", high=1024)
HEADS = (
    N_HEADS,
    Parameter("n_kv_heads", "num_key_value_heads", "attention.head_count_kv", high=1024,
              gguf_default=lambda values: values["n_heads"]),
    Parameter("head_dim", "head_dim", "attention.key_length", low=2, high=4096, default=_usual_head_dim),
    Parameter("value_dim", "", "attention.value_length", low=2, high=4096,
              default=lambda values: values["head_dim"]),
)
"""Of attention with separate heads for keys and values, all of one width."""
EPSILON = Parameter("rms_norm_eps", "rms_norm_eps", "attention.layer_norm_rms_epsilon", float, 1e-12, 0.1,
                    default=1e-6, gguf_default=REQUIRED)
ROPE_THETA = Parameter("rope_theta", "rope_theta", "rope.freq_base", float, 1e-3, 1e12, default=10000.0)
ROPE = (
    Parameter("rotary_dim", "", "rope.dimension_count", low=2, high=4096,
              default=lambda values: values["head_dim"]),
    ROPE_THETA,
)
PARTIAL_ROPE = (
    Parameter("rotary_fraction", "partial_rotary_factor", "", float, 0.01, 1.0, default=0.5),
    Parameter("rotary_dim", "", "rope.dimension_count", low=2, high=4096, gguf_default=REQUIRED,
              default=lambda values: int(values["head_dim"] * values["rotary_fraction"])),
    ROPE_THETA,
)
"""Of models that rotate a part of each head."""
TIED = Parameter("tied_embeddings", "tie_word_embeddings", "", bool, default=False)
N_DENSE = Parameter("n_dense_layers", "first_k_dense_replace", "leading_dense_block_count", low=0,
                    high=MAX_LAYERS, default=0)
N_SHARED = Parameter("n_shared_experts", "n_shared_experts", "expert_shared_count", high=MAX_EXPERTS)
EXPERT_SIZE = Parameter("expert_size", "moe_intermediate_size", "expert_feed_forward_length", high=1 << 20)
SHARED_SIZE = Parameter("shared_expert_size", default=lambda values: values["expert_size"])
"""Of shared experts that are as wide as routed ones."""
# llama.cpp reads 0 like a missing key.
SCALE = Parameter("routed_scaling_factor", "routed_scaling_factor", "expert_weights_scale", float, 1e-6, 1e6,
                  default=1.0, is_absent_if_0=True)
NORMALIZED = Parameter("normalized_weights", "norm_topk_prob", "expert_weights_norm", bool, default=False)
GROUPS = (
    Parameter("n_expert_groups", "n_group", "expert_group_count", low=0, high=MAX_EXPERTS, default=1),
    # llama.cpp aborts if there are groups and this key is missing.
    Parameter("n_groups_per_token", "topk_group", "expert_group_used_count", low=0, high=MAX_EXPERTS,
              default=1, gguf_default=lambda values: int(values["n_expert_groups"] <= 1)),
)
HAS_EXPERT_BIAS = Parameter("has_expert_bias", tensor="exp_probs_b.bias", kind=bool)
# group_limited_greedy scores a group by its best expert. It is refused: llama.cpp takes the best two.
CHOICE_BIAS = replace(HAS_EXPERT_BIAS, config="topk_method",
                      words={"greedy": False, "gready": False, "noaux_tc": True})
SOFTMAX: Mapping[object, object] = {"softmax": Gating.SOFTMAX}
ANY_GATING: Mapping[object, object] = {"softmax": Gating.SOFTMAX, "sigmoid": Gating.SIGMOID}
# fmt: on


def n_experts(key: str) -> tuple[Parameter, ...]:
    """Return the numbers of routed experts, and of those that a token uses. `key` is that in config.json.

    llama.cpp aborts if a model has one expert and the key for groups.
    """
    return (
        Parameter("n_routed_experts", key, "expert_count", low=2, high=MAX_EXPERTS),
        Parameter("n_experts_per_token", "num_experts_per_tok", "expert_used_count", high=MAX_EXPERTS),
    )


def gating(
    key: str, words: Mapping[object, object], gguf_default: Gating | Callable[[Values], Gating] | None = None
) -> Parameter:
    """Return the router's function.

    `key` is that in config.json, and `words` its accepted values, with the default first. `gguf_default` is
    what llama.cpp takes if a GGUF file has no such key or 0; None: it aborts.
    """
    default = next(iter(words.values()))
    missing = REQUIRED if gguf_default is None else gguf_default
    return Parameter(
        "gating",
        key,
        "expert_gating_func",
        Gating,
        words=words,
        default=default,
        gguf_default=missing,
        is_absent_if_0=True,
    )


CONFIG_VALUES: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "ep_size": (1, None),
    "pretraining_tp": (1, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
}
"""Keys of config.json with the only values that llama.cpp's graphs implement."""

WHOLE_HEADS: Mapping[str, tuple[object, ...]] = {"partial_rotary_factor": (1, 1.0, None)}
"""The same, for graphs that rotate whole heads or whose rotated part has a key of its own."""

GGUF_VALUES: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "classifier.output_labels": (None,),
    "embedding_length_out": (None,),
    "pooling_type": (0,),
}
"""Keys of GGUF files that select another graph, with the values that do not; llama.cpp's default first."""

NO_GROUPS: Mapping[str, tuple[object, ...]] = {
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
}
"""The same, of models whose experts are never grouped."""

ROPE_FREQUENCIES = re.compile(r"rope_freqs\.weight|blk\.\d+\.(rope_freqs|attn_rot_embd)\.weight")
"""Tensors of old GGUF files that follow from the hyper-parameters."""

INVERSE_FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Their counterparts in checkpoints."""


def _kv_heads(hp: Hyperparameters) -> tuple[str, str] | None:
    return ("n_kv_heads", f"a divisor of {hp.n_heads}") if hp.n_heads % hp.n_kv_heads else None


def _even_heads(hp: Hyperparameters) -> tuple[str, str] | None:
    odd = hp.rotary_dim % 2 or hp.rotary_dim > hp.head_dim
    return ("rotary_dim", f"an even number up to the head size, {hp.head_dim}") if odd else None


def _moe_layers(hp: Hyperparameters) -> tuple[str, str] | None:
    return None if hp.n_dense_layers < hp.n_layers else ("n_dense_layers", f"less than {hp.n_layers}")


def _chosen_experts(hp: Hyperparameters) -> tuple[str, str] | None:
    most = hp.n_routed_experts
    return ("n_experts_per_token", f"a number from 1 to {most}") if hp.n_experts_per_token > most else None


def _groups(hp: Hyperparameters) -> tuple[str, str] | None:
    n_groups, n_chosen = hp.n_expert_groups, hp.n_groups_per_token
    if n_groups <= 1:
        return None
    # llama.cpp scores a group by its two best experts.
    if hp.n_routed_experts % n_groups or hp.n_routed_experts < 2 * n_groups:
        return (
            "n_expert_groups",
            f"a divisor of {hp.n_routed_experts}, with two or more experts in a group",
        )
    if not 0 < n_chosen < n_groups:
        return "n_groups_per_token", f"a number from 1 to {n_groups - 1}"
    if hp.n_experts_per_token > hp.n_choosable_experts:
        return (
            "n_experts_per_token",
            f"a number from 1 to {hp.n_choosable_experts}, the experts of a token's groups",
        )
    return None


CHECKS: tuple[Check, ...] = (_kv_heads, _even_heads, _moe_layers, _chosen_experts, _groups)
"""Of every mixture of experts."""


def head_sizes_fill_the_width(hp: Hyperparameters) -> tuple[str, str] | None:
    """Refuse models whose heads together are not as wide as the model; some graphs need that."""
    if hp.head_dim * hp.n_heads == hp.hidden_size:
        return None
    return "head_dim", f"hidden size / number of heads = {hp.hidden_size / hp.n_heads:g}"


def heads_are_rotated_as_a_whole(hp: Hyperparameters) -> tuple[str, str] | None:
    """Refuse models that rotate a part of each head; some graphs cannot."""
    return None if hp.rotary_dim == hp.head_dim else ("rotary_dim", f"the head size, {hp.head_dim}")


def every_head_has_its_keys(hp: Hyperparameters) -> tuple[str, str] | None:
    """Refuse models in which several heads share keys and values; some graphs cannot."""
    return None if hp.n_kv_heads == hp.n_heads else ("n_kv_heads", f"the number of heads, {hp.n_heads}")


def output_is_not_the_embedding(hp: Hyperparameters) -> tuple[str, str] | None:
    """Refuse models whose embedding is also the output; some graphs need a tensor of its own."""
    return ("tied_embeddings", "an output matrix of its own") if hp.tied_embeddings else None


def values_are_as_wide_as_keys(hp: Hyperparameters) -> tuple[str, str] | None:
    """Refuse models whose value heads have another width than their key heads."""
    return None if hp.value_dim == hp.head_dim else ("value_dim", f"the head size, {hp.head_dim}")
