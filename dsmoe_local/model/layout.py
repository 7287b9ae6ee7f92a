"""The one table of tensors: Hugging Face name, GGUF name, shape and role. Everything else reads it.

Shapes are in numpy's order, slowest dimension first; GGUF's `ne` is the reverse. The names and the order of
dimensions are those that llama.cpp's loader expects (src/models/deepseek.cpp, src/llama-arch.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from dsmoe_local.model.hyperparameters import Hyperparameters


class Role(StrEnum):
    """What a tensor is for. Recipes, cost accounting and placement decide by it."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    ATTENTION = "attention"
    DENSE_FFN = "dense FFN"
    ROUTER = "router"
    SHARED_EXPERT = "shared experts"
    ROUTED_EXPERT = "routed experts"
    NORM = "norms"


class GroupKind(StrEnum):
    """The kinds of groups: tensors of a layer that multiply the same vectors and are quantized to one type.

    The values are the words of recipe files, in their order. Norms and routers are in no group: they are
    never quantized.
    """

    EMBEDDING = "embedding"
    OUTPUT = "output"
    ATTENTION_QUERY_KEY = "attention-query-key"
    ATTENTION_VALUE = "attention-value"
    ATTENTION_OUTPUT = "attention-output"
    DENSE_GATE_UP = "dense-gate-up"
    DENSE_DOWN = "dense-down"
    SHARED_GATE_UP = "shared-gate-up"
    SHARED_DOWN = "shared-down"
    ROUTED_GATE_UP = "routed-gate-up"
    ROUTED_DOWN = "routed-down"


class Where(StrEnum):
    """Which layers have a tensor."""

    MODEL = "model"
    ALL = "all"
    DENSE = "dense"
    MOE = "moe"


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the table. `{n}` stands for the layer, `{e}` for the expert.

    `group` is the kind of quantization group that the tensor is in; None for tensors that stay as they are.
    `rotary_heads` gives the head count of tensors whose rows llama.cpp wants permuted: Hugging Face rotates
    the two halves of a head, llama.cpp adjacent pairs.
    """

    gguf: str
    source: str
    role: Role
    group: GroupKind | None
    where: Where
    shape: Callable[[Hyperparameters], tuple[int, ...]]
    rotary_heads: Callable[[Hyperparameters], int] = lambda hp: 0


RULES: tuple[Rule, ...] = (
    Rule(
        "token_embd.weight",
        "model.embed_tokens.weight",
        Role.EMBEDDING,
        GroupKind.EMBEDDING,
        Where.MODEL,
        lambda hp: (hp.n_vocab, hp.hidden_size),
    ),
    Rule(
        "output_norm.weight", "model.norm.weight", Role.NORM, None, Where.MODEL, lambda hp: (hp.hidden_size,)
    ),
    Rule(
        "output.weight",
        "lm_head.weight",
        Role.OUTPUT,
        GroupKind.OUTPUT,
        Where.MODEL,
        lambda hp: () if hp.tied_embeddings else (hp.n_vocab, hp.hidden_size),
    ),
    Rule(
        "blk.{n}.attn_norm.weight",
        "model.layers.{n}.input_layernorm.weight",
        Role.NORM,
        None,
        Where.ALL,
        lambda hp: (hp.hidden_size,),
    ),
    Rule(
        "blk.{n}.attn_q.weight",
        "model.layers.{n}.self_attn.q_proj.weight",
        Role.ATTENTION,
        GroupKind.ATTENTION_QUERY_KEY,
        Where.ALL,
        lambda hp: (hp.attention_size, hp.hidden_size),
        lambda hp: hp.n_heads,
    ),
    Rule(
        "blk.{n}.attn_k.weight",
        "model.layers.{n}.self_attn.k_proj.weight",
        Role.ATTENTION,
        GroupKind.ATTENTION_QUERY_KEY,
        Where.ALL,
        lambda hp: (hp.kv_size, hp.hidden_size),
        lambda hp: hp.n_kv_heads,
    ),
    Rule(
        "blk.{n}.attn_v.weight",
        "model.layers.{n}.self_attn.v_proj.weight",
        Role.ATTENTION,
        GroupKind.ATTENTION_VALUE,
        Where.ALL,
        lambda hp: (hp.kv_size, hp.hidden_size),
    ),
    Rule(
        "blk.{n}.attn_output.weight",
        "model.layers.{n}.self_attn.o_proj.weight",
        Role.ATTENTION,
        GroupKind.ATTENTION_OUTPUT,
        Where.ALL,
        lambda hp: (hp.hidden_size, hp.attention_size),
    ),
    Rule(
        "blk.{n}.ffn_norm.weight",
        "model.layers.{n}.post_attention_layernorm.weight",
        Role.NORM,
        None,
        Where.ALL,
        lambda hp: (hp.hidden_size,),
    ),
    Rule(
        "blk.{n}.ffn_gate.weight",
        "model.layers.{n}.mlp.gate_proj.weight",
        Role.DENSE_FFN,
        GroupKind.DENSE_GATE_UP,
        Where.DENSE,
        lambda hp: (hp.ffn_size, hp.hidden_size),
    ),
    Rule(
        "blk.{n}.ffn_up.weight",
        "model.layers.{n}.mlp.up_proj.weight",
        Role.DENSE_FFN,
        GroupKind.DENSE_GATE_UP,
        Where.DENSE,
        lambda hp: (hp.ffn_size, hp.hidden_size),
    ),
    Rule(
        "blk.{n}.ffn_down.weight",
        "model.layers.{n}.mlp.down_proj.weight",
        Role.DENSE_FFN,
        GroupKind.DENSE_DOWN,
        Where.DENSE,
        lambda hp: (hp.hidden_size, hp.ffn_size),
    ),
    Rule(
        "blk.{n}.ffn_gate_inp.weight",
        "model.layers.{n}.mlp.gate.weight",
        Role.ROUTER,
        None,
        Where.MOE,
        lambda hp: (hp.n_routed_experts, hp.hidden_size),
    ),
    Rule(
        "blk.{n}.ffn_gate_exps.weight",
        "model.layers.{n}.mlp.experts.{e}.gate_proj.weight",
        Role.ROUTED_EXPERT,
        GroupKind.ROUTED_GATE_UP,
        Where.MOE,
        lambda hp: (hp.n_routed_experts, hp.expert_size, hp.hidden_size),
    ),
    Rule(
        "blk.{n}.ffn_up_exps.weight",
        "model.layers.{n}.mlp.experts.{e}.up_proj.weight",
        Role.ROUTED_EXPERT,
        GroupKind.ROUTED_GATE_UP,
        Where.MOE,
        lambda hp: (hp.n_routed_experts, hp.expert_size, hp.hidden_size),
    ),
    Rule(
        "blk.{n}.ffn_down_exps.weight",
        "model.layers.{n}.mlp.experts.{e}.down_proj.weight",
        Role.ROUTED_EXPERT,
        GroupKind.ROUTED_DOWN,
        Where.MOE,
        lambda hp: (hp.n_routed_experts, hp.hidden_size, hp.expert_size),
    ),
    Rule(
        "blk.{n}.ffn_gate_shexp.weight",
        "model.layers.{n}.mlp.shared_experts.gate_proj.weight",
        Role.SHARED_EXPERT,
        GroupKind.SHARED_GATE_UP,
        Where.MOE,
        lambda hp: (hp.shared_size, hp.hidden_size),
    ),
    Rule(
        "blk.{n}.ffn_up_shexp.weight",
        "model.layers.{n}.mlp.shared_experts.up_proj.weight",
        Role.SHARED_EXPERT,
        GroupKind.SHARED_GATE_UP,
        Where.MOE,
        lambda hp: (hp.shared_size, hp.hidden_size),
    ),
    Rule(
        "blk.{n}.ffn_down_shexp.weight",
        "model.layers.{n}.mlp.shared_experts.down_proj.weight",
        Role.SHARED_EXPERT,
        GroupKind.SHARED_DOWN,
        Where.MOE,
        lambda hp: (hp.hidden_size, hp.shared_size),
    ),
)

IGNORED_SOURCES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors of old checkpoints that follow from the hyper-parameters."""

IGNORED_TENSORS = re.compile(r"rope_freqs\.weight|blk\.\d+\.(rope_freqs|attn_rot_embd)\.weight")
"""Their GGUF counterparts."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of one model.

    `sources` are the Hugging Face tensors it is made of: one, or one per routed expert, to be stacked in
    order. `rotary_heads` above 0 asks for the row permutation of that many heads.
    """

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    rotary_heads: int = 0

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@lru_cache(maxsize=16)
def tensor_specs(hp: Hyperparameters) -> tuple[TensorSpec, ...]:
    """Every tensor of a model with these hyper-parameters, in the order in which they are written."""
    specs = [_spec(rule, hp, None) for rule in RULES if rule.where is Where.MODEL and rule.shape(hp)]
    for layer in range(hp.n_layers):
        kind = Where.MOE if hp.is_moe_layer(layer) else Where.DENSE
        specs += [_spec(rule, hp, layer) for rule in RULES if rule.where in (Where.ALL, kind)]
    return tuple(spec for spec in specs if spec.n_weights)


def _spec(rule: Rule, hp: Hyperparameters, layer: int | None) -> TensorSpec:
    experts = range(hp.n_routed_experts) if rule.role is Role.ROUTED_EXPERT else range(1)
    return TensorSpec(
        name=rule.gguf.replace("{n}", str(layer)),
        role=rule.role,
        layer=layer,
        shape=rule.shape(hp),
        sources=tuple(rule.source.replace("{n}", str(layer)).replace("{e}", str(e)) for e in experts),
        rotary_heads=rule.rotary_heads(hp),
    )


_RULES_BY_NAME = {rule.gguf.replace("blk.{n}.", ""): rule for rule in RULES}


def _rule_of(name: str) -> Rule | None:
    return _RULES_BY_NAME.get(re.sub(r"^blk\.\d+\.", "", name))


def role_of(name: str) -> Role | None:
    """The role of a GGUF tensor by its name; None for a name that no model of ours has."""
    rule = _rule_of(name)
    return rule.role if rule else None


def group_kind_of(name: str) -> GroupKind | None:
    """The kind of group that quantization puts a GGUF tensor in; None for one that it leaves as it is."""
    rule = _rule_of(name)
    return rule.group if rule else None


def layer_of(name: str) -> int | None:
    """The layer in a GGUF tensor's name; None if it belongs to none."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else None
