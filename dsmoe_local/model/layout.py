"""The table of tensors: Hugging Face name, GGUF name, shape, role and quantization group.

Shapes are in numpy's order, slowest dimension first; GGUF stores them reversed. Names and dimensions are what
llama.cpp's loader expects (src/models/deepseek.cpp, src/llama-arch.cpp).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from dsmoe_local.model.ggml import GgmlType, Tensor
from dsmoe_local.model.hyperparameters import Hyperparameters


class Role(StrEnum):
    """What a tensor is for. Recipes, cost accounting and placement depend on it."""

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


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the table.

    `name` and `source` are the GGUF and the Hugging Face name without the prefix of the layer and without
    `.weight`; `{e}` is the expert's index. `group` is None for tensors that are never quantized. `shape` and
    `rotary_heads` name attributes of Hyperparameters. `rotary_heads` is the number of heads in tensors whose
    rows are permuted: Hugging Face rotates the two halves of a head, llama.cpp adjacent pairs.
    """

    name: str
    source: str
    role: Role
    group: GroupKind | None
    shape: tuple[str, ...]
    rotary_heads: str = ""


# fmt: off
_MODEL = (
    Rule("token_embd", "model.embed_tokens", Role.EMBEDDING, GroupKind.EMBEDDING, ("n_vocab", "hidden_size")),
    Rule("output_norm", "model.norm", Role.NORM, None, ("hidden_size",)),
    Rule("output", "lm_head", Role.OUTPUT, GroupKind.OUTPUT, ("n_vocab", "hidden_size")),
)
_EVERY_LAYER = (
    Rule("attn_norm", "input_layernorm", Role.NORM, None, ("hidden_size",)),
    Rule("attn_q", "self_attn.q_proj", Role.ATTENTION, GroupKind.ATTENTION_QUERY_KEY,
         ("attention_size", "hidden_size"), "n_heads"),
    Rule("attn_k", "self_attn.k_proj", Role.ATTENTION, GroupKind.ATTENTION_QUERY_KEY,
         ("kv_size", "hidden_size"), "n_kv_heads"),
    Rule("attn_v", "self_attn.v_proj", Role.ATTENTION, GroupKind.ATTENTION_VALUE, ("kv_size", "hidden_size")),
    Rule("attn_output", "self_attn.o_proj", Role.ATTENTION, GroupKind.ATTENTION_OUTPUT,
         ("hidden_size", "attention_size")),
    Rule("ffn_norm", "post_attention_layernorm", Role.NORM, None, ("hidden_size",)),
)
_DENSE_LAYER = (
    Rule("ffn_gate", "mlp.gate_proj", Role.DENSE_FFN, GroupKind.DENSE_GATE_UP, ("ffn_size", "hidden_size")),
    Rule("ffn_up", "mlp.up_proj", Role.DENSE_FFN, GroupKind.DENSE_GATE_UP, ("ffn_size", "hidden_size")),
    Rule("ffn_down", "mlp.down_proj", Role.DENSE_FFN, GroupKind.DENSE_DOWN, ("hidden_size", "ffn_size")),
)
_MOE_LAYER = (
    Rule("ffn_gate_inp", "mlp.gate", Role.ROUTER, None, ("n_routed_experts", "hidden_size")),
    Rule("ffn_gate_exps", "mlp.experts.{e}.gate_proj", Role.ROUTED_EXPERT, GroupKind.ROUTED_GATE_UP,
         ("n_routed_experts", "expert_size", "hidden_size")),
    Rule("ffn_up_exps", "mlp.experts.{e}.up_proj", Role.ROUTED_EXPERT, GroupKind.ROUTED_GATE_UP,
         ("n_routed_experts", "expert_size", "hidden_size")),
    Rule("ffn_down_exps", "mlp.experts.{e}.down_proj", Role.ROUTED_EXPERT, GroupKind.ROUTED_DOWN,
         ("n_routed_experts", "hidden_size", "expert_size")),
    Rule("ffn_gate_shexp", "mlp.shared_experts.gate_proj", Role.SHARED_EXPERT, GroupKind.SHARED_GATE_UP,
         ("shared_size", "hidden_size")),
    Rule("ffn_up_shexp", "mlp.shared_experts.up_proj", Role.SHARED_EXPERT, GroupKind.SHARED_GATE_UP,
         ("shared_size", "hidden_size")),
    Rule("ffn_down_shexp", "mlp.shared_experts.down_proj", Role.SHARED_EXPERT, GroupKind.SHARED_DOWN,
         ("hidden_size", "shared_size")),
)
# fmt: on

UNQUANTIZED_ROLES = (Role.NORM, Role.ROUTER)
"""Roles whose tensors are always F32."""

IGNORED_SOURCES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors of old checkpoints that follow from the hyper-parameters."""

IGNORED_TENSORS = re.compile(r"rope_freqs\.weight|blk\.\d+\.(rope_freqs|attn_rot_embd)\.weight")
"""The GGUF counterparts of IGNORED_SOURCES."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a model must have.

    `sources` are the Hugging Face tensors that it is made of: one, or one per routed expert, to be stacked in
    order. `rotary_heads`: see Rule; 0 if the rows keep their order.
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
        return math.prod(self.shape)


@lru_cache(maxsize=16)
def tensor_specs(hp: Hyperparameters) -> tuple[TensorSpec, ...]:
    """Return every tensor of a model with these hyper-parameters, in the order in which they are written."""
    specs = [_spec(rule, hp, None) for rule in _MODEL if rule.name != "output" or not hp.tied_embeddings]
    for layer in range(hp.n_layers):
        ffn = _MOE_LAYER if hp.is_moe_layer(layer) else _DENSE_LAYER
        specs += [_spec(rule, hp, layer) for rule in (*_EVERY_LAYER, *ffn)]
    # Models without shared experts have tensors of size 0 there.
    return tuple(spec for spec in specs if spec.n_weights)


def _spec(rule: Rule, hp: Hyperparameters, layer: int | None) -> TensorSpec:
    experts = range(hp.n_routed_experts) if rule.role is Role.ROUTED_EXPERT else range(1)
    gguf_prefix, source_prefix = ("", "") if layer is None else (f"blk.{layer}.", f"model.layers.{layer}.")
    return TensorSpec(
        name=f"{gguf_prefix}{rule.name}.weight",
        role=rule.role,
        layer=layer,
        shape=tuple(getattr(hp, size) for size in rule.shape),
        sources=tuple(f"{source_prefix}{rule.source.replace('{e}', str(e))}.weight" for e in experts),
        rotary_heads=getattr(hp, rule.rotary_heads) if rule.rotary_heads else 0,
    )


def unquantized(hp: Hyperparameters, kind: GgmlType) -> list[Tensor]:
    """Return the tensors of an unquantized file: norms and routers in F32, all others in `kind`."""
    return [
        Tensor(spec.name, spec.shape, GgmlType.F32 if spec.role in UNQUANTIZED_ROLES else kind)
        for spec in tensor_specs(hp)
    ]


_RULES = {f"{rule.name}.weight": rule for rule in (*_MODEL, *_EVERY_LAYER, *_DENSE_LAYER, *_MOE_LAYER)}


def _rule_of(name: str) -> Rule | None:
    return _RULES.get(re.sub(r"^blk\.\d+\.", "", name))


def role_of(name: str) -> Role | None:
    """Return the role of a GGUF tensor by its name; None if no model has such a tensor."""
    rule = _rule_of(name)
    return rule.role if rule else None


def group_kind_of(name: str, hp: Hyperparameters | None = None) -> GroupKind | None:
    """Return the kind of group that a GGUF tensor is quantized in; None if it is never quantized.

    With `hp`, an embedding that is also the output counts as the output.
    """
    rule = _rule_of(name)
    kind = rule.group if rule else None
    return GroupKind.OUTPUT if kind is GroupKind.EMBEDDING and hp and hp.tied_embeddings else kind


def layer_of(name: str) -> int | None:
    """Return the layer in a GGUF tensor's name; None for tensors outside the layers."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else None
