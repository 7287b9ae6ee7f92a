"""The tensors of a model: their names and shapes, what they are for, and what they are made of.

Which tensors there are depends on the architecture (`architectures`). A GGUF name has the same meaning in
all of them (llama.cpp: src/llama-arch.cpp). Shapes are in numpy's order, slowest dimension first; GGUF stores
them reversed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache

from dsmoe_local.model.architectures import ARCHITECTURES
from dsmoe_local.model.architectures.table import Blocks, Order, Rule
from dsmoe_local.model.ggml import GgmlType, Tensor
from dsmoe_local.model.hyperparameters import Hyperparameters, ModelOutline


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
    BIAS = "biases"


class GroupKind(StrEnum):
    """The kinds of groups. The tensors of a group are quantized to one type: they are in one layer, and have
    the same number of columns.

    The values are the words of recipe files, in their order. Norms, routers and biases are in no group: they
    are never quantized.
    """

    EMBEDDING = "embedding"
    OUTPUT = "output"
    ATTENTION_QUERY_KEY_VALUE = "attention-query-key-value"
    """Queries, keys and values in one matrix."""
    ATTENTION_LATENT = "attention-latent"
    """MLA's projections to compressed queries, and to compressed keys and values."""
    ATTENTION_QUERY_KEY = "attention-query-key"
    ATTENTION_KEY_UP = "attention-key-up"
    """MLA's projection from compressed to full keys, transposed. Its columns are few, often 128."""
    ATTENTION_VALUE = "attention-value"
    ATTENTION_OUTPUT = "attention-output"
    DENSE_GATE_UP = "dense-gate-up"
    DENSE_DOWN = "dense-down"
    SHARED_GATE_UP = "shared-gate-up"
    SHARED_DOWN = "shared-down"
    ROUTED_GATE_UP = "routed-gate-up"
    ROUTED_DOWN = "routed-down"


@dataclass(frozen=True, slots=True)
class Kind:
    """What the tensors of one name are for.

    `group` is None for tensors that are never quantized. `input` names the vectors that a matrix multiplies;
    those of a layer with the same name are the same. It is "" for tensors that multiply none.
    """

    role: Role
    group: GroupKind | None = None
    input: str = ""


_NORM = Kind(Role.NORM)
_BIAS = Kind(Role.BIAS)

# fmt: off
_KINDS: Mapping[str, Kind] = {
    "token_embd.weight": Kind(Role.EMBEDDING, GroupKind.EMBEDDING, "output"),
    "output_norm.weight": _NORM,
    "output.weight": Kind(Role.OUTPUT, GroupKind.OUTPUT, "output"),
    "attn_norm.weight": _NORM,
    "attn_q.weight": Kind(Role.ATTENTION, GroupKind.ATTENTION_QUERY_KEY, "attention"),
    "attn_k.weight": Kind(Role.ATTENTION, GroupKind.ATTENTION_QUERY_KEY, "attention"),
    "attn_v.weight": Kind(Role.ATTENTION, GroupKind.ATTENTION_VALUE, "attention"),
    "attn_qkv.weight": Kind(Role.ATTENTION, GroupKind.ATTENTION_QUERY_KEY_VALUE, "attention"),
    "attn_q.bias": _BIAS,
    "attn_k.bias": _BIAS,
    "attn_v.bias": _BIAS,
    "attn_q_norm.weight": _NORM,
    "attn_k_norm.weight": _NORM,
    "attn_q_a.weight": Kind(Role.ATTENTION, GroupKind.ATTENTION_LATENT, "attention"),
    "attn_q_a_norm.weight": _NORM,
    "attn_q_b.weight": Kind(Role.ATTENTION, GroupKind.ATTENTION_QUERY_KEY, "compressed queries"),
    "attn_kv_a_mqa.weight": Kind(Role.ATTENTION, GroupKind.ATTENTION_LATENT, "attention"),
    "attn_kv_a_norm.weight": _NORM,
    "attn_k_b.weight": Kind(Role.ATTENTION, GroupKind.ATTENTION_KEY_UP, "queries by head"),
    "attn_v_b.weight": Kind(Role.ATTENTION, GroupKind.ATTENTION_VALUE, "compressed values by head"),
    "attn_output.weight": Kind(Role.ATTENTION, GroupKind.ATTENTION_OUTPUT, "attention output"),
    "post_attention_norm.weight": _NORM,
    "ffn_norm.weight": _NORM,
    "ffn_gate.weight": Kind(Role.DENSE_FFN, GroupKind.DENSE_GATE_UP, "ffn"),
    "ffn_up.weight": Kind(Role.DENSE_FFN, GroupKind.DENSE_GATE_UP, "ffn"),
    "ffn_down.weight": Kind(Role.DENSE_FFN, GroupKind.DENSE_DOWN, "dense neurons"),
    "ffn_gate_inp.weight": Kind(Role.ROUTER, input="ffn"),
    "exp_probs_b.bias": Kind(Role.ROUTER),
    "ffn_gate_exps.weight": Kind(Role.ROUTED_EXPERT, GroupKind.ROUTED_GATE_UP, "ffn by expert"),
    "ffn_up_exps.weight": Kind(Role.ROUTED_EXPERT, GroupKind.ROUTED_GATE_UP, "ffn by expert"),
    "ffn_down_exps.weight": Kind(Role.ROUTED_EXPERT, GroupKind.ROUTED_DOWN, "neurons by expert"),
    "ffn_gate_inp_shexp.weight": Kind(Role.ROUTER, input="ffn"),
    "ffn_gate_shexp.weight": Kind(Role.SHARED_EXPERT, GroupKind.SHARED_GATE_UP, "ffn"),
    "ffn_up_shexp.weight": Kind(Role.SHARED_EXPERT, GroupKind.SHARED_GATE_UP, "ffn"),
    "ffn_down_shexp.weight": Kind(Role.SHARED_EXPERT, GroupKind.SHARED_DOWN, "shared neurons"),
    # Of layers for multi-token prediction:
    "nextn.eh_proj.weight": Kind(Role.ATTENTION, GroupKind.ATTENTION_OUTPUT, "embedding and output"),
    "nextn.embed_tokens.weight": Kind(Role.EMBEDDING, GroupKind.EMBEDDING),
    "nextn.enorm.weight": _NORM,
    "nextn.hnorm.weight": _NORM,
    "nextn.shared_head_head.weight": Kind(Role.OUTPUT, GroupKind.OUTPUT, "prediction"),
    "nextn.shared_head_norm.weight": _NORM,
    # In no table, but in files of other forms:
    "ffn_gate_up_exps.weight": Kind(Role.ROUTED_EXPERT),
    "per_layer_token_embd.weight": Kind(Role.EMBEDDING),
}
# fmt: on

_SHARED_GATE = "ffn_gate_inp_shexp.weight"

UNQUANTIZED_ROLES = (Role.NORM, Role.ROUTER, Role.BIAS)
"""Roles whose tensors are always F32."""


@dataclass(frozen=True, slots=True)
class RowBlocks:
    """The rows of a tensor are part of its source's, which are `count` blocks of `n_source_rows`.

    Of each block, `n_rows` from `first` are taken, in `order`.
    """

    count: int
    n_source_rows: int
    first: int
    n_rows: int
    order: Order


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a model must have.

    `sources` are the Hugging Face tensors that it is made of: one, or one per routed expert, to be stacked in
    order, each of `source_shape`. `blocks` says which rows of the source they are; None: all, in their order.
    `fused` is the name and the blocks of the one source that a checkpoint may have in their place.
    """

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    source_shape: tuple[int, ...]
    blocks: RowBlocks | None = None
    fused: tuple[str, RowBlocks | None] | None = None

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def is_fused(self) -> bool:
        """True if the source is the fused one."""
        return self.fused is not None and self.sources == (self.fused[0],)

    def from_fused(self) -> TensorSpec:
        """Return the same tensor, made of the fused source. There must be one."""
        assert self.fused is not None
        name, blocks = self.fused
        shape = self.shape if blocks is None else (blocks.count, blocks.n_source_rows, self.shape[-1])
        return replace(self, sources=(name,), source_shape=shape, blocks=blocks)


@lru_cache(maxsize=16)
def tensor_specs(hp: Hyperparameters) -> tuple[TensorSpec, ...]:
    """Return every tensor of a model with these hyper-parameters, in the order in which they are written."""
    architecture = ARCHITECTURES[hp.architecture]
    rules: list[tuple[Rule, int | None]] = [(rule, None) for rule in architecture.model]
    for layer in range(hp.n_layers):
        ffn = architecture.moe_layer if hp.is_moe_layer(layer) else architecture.dense_layer
        rules += [(rule, layer) for rule in (*architecture.every_layer, *ffn)]
    specs = (_spec(rule, hp, layer) for rule, layer in rules if _exists(rule, hp))
    # Models without shared experts, for example, have tensors of size 0 there.
    return tuple(spec for spec in specs if spec.n_weights)


def _exists(rule: Rule, hp: Hyperparameters) -> bool:
    needed = not rule.when or getattr(hp, rule.when)
    return bool(needed) and not (rule.unless and getattr(hp, rule.unless))


def _spec(rule: Rule, hp: Hyperparameters, layer: int | None) -> TensorSpec:
    experts = range(hp.n_routed_experts) if "{e}" in rule.source else range(1)
    gguf_prefix, source_prefix = ("", "") if layer is None else (f"blk.{layer}.", f"model.layers.{layer}.")
    shape = tuple(getattr(hp, size) for size in rule.shape)
    blocks = _row_blocks(rule.blocks, hp)
    fused = rule.fused
    return TensorSpec(
        name=f"{gguf_prefix}{rule.name}",
        role=_KINDS[rule.name].role,
        layer=layer,
        shape=shape,
        sources=tuple(f"{source_prefix}{rule.source.replace('{e}', str(e))}" for e in experts),
        source_shape=_source_shape(rule, shape, blocks),
        blocks=blocks,
        fused=None if fused is None else (f"{source_prefix}{fused.source}", _row_blocks(fused.blocks, hp)),
    )


def _source_shape(rule: Rule, shape: tuple[int, ...], blocks: RowBlocks | None) -> tuple[int, ...]:
    if rule.is_row:
        return (1, *shape)
    if "{e}" in rule.source:
        return shape[1:]
    if blocks is None:
        return shape
    return (blocks.count * blocks.n_source_rows, shape[-2 if blocks.order is Order.TRANSPOSED else -1])


def _row_blocks(blocks: Blocks | None, hp: Hyperparameters) -> RowBlocks | None:
    if blocks is None:
        return None
    parts = [getattr(hp, part) for part in blocks.parts]
    return RowBlocks(
        count=getattr(hp, blocks.count),
        n_source_rows=sum(parts),
        first=sum(parts[: blocks.part]),
        n_rows=parts[blocks.part],
        order=blocks.order,
    )


def has_shared_gate(hp: Hyperparameters) -> bool:
    """True if the output of the shared experts is multiplied by a gate."""
    return any(rule.name == _SHARED_GATE for rule in ARCHITECTURES[hp.architecture].moe_layer)


def unquantized(hp: Hyperparameters, kind: GgmlType) -> list[Tensor]:
    """Return the tensors of an unquantized file: norms and routers in F32, all others in `kind`."""
    return [
        Tensor(spec.name, spec.shape, GgmlType.F32 if spec.role in UNQUANTIZED_ROLES else kind)
        for spec in tensor_specs(hp)
    ]


def _kind_of(name: str) -> Kind | None:
    return _KINDS.get(re.sub(r"^blk\.\d+\.", "", name))


def role_of(name: str) -> Role | None:
    """Return the role of a GGUF tensor by its name; None if no known model has such a tensor."""
    kind = _kind_of(name)
    return kind.role if kind else None


def input_of(name: str) -> str:
    """Return an id of the vectors that a matrix multiplies, the same for all GGUF tensors that multiply them.

    It is "" for tensors that multiply none.
    """
    kind, layer = _kind_of(name), layer_of(name)
    if kind is None or not kind.input:
        return ""
    return kind.input if layer is None else f"blk.{layer} {kind.input}"


def group_kind_of(name: str, hp: Hyperparameters | None = None) -> GroupKind | None:
    """Return the kind of group that a GGUF tensor is quantized in; None if it is never quantized.

    With `hp`, an embedding that is also the output counts as the output.
    """
    kind = _kind_of(name)
    if hp is not None and is_output(name, hp):
        return GroupKind.OUTPUT
    return kind.group if kind else None


def is_output(name: str, hp: ModelOutline) -> bool:
    """True for the output matrix, which may also be the embedding."""
    return name == ("token_embd.weight" if hp.tied_embeddings else "output.weight")


def is_for_more_tokens(name: str, hp: ModelOutline) -> bool:
    """True if a GGUF tensor belongs to a layer for multi-token prediction, which llama.cpp does not load."""
    layer = layer_of(name)
    return layer is not None and hp.n_layers <= layer < hp.n_stored_layers


def layer_of(name: str) -> int | None:
    """Return the layer in a GGUF tensor's name; None for tensors outside the layers."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else None
