"""What a model costs: parameters, FLOPs, bytes read per token, KV cache.

Parameters and FLOPs are counted as in arXiv 2401.06066, and so for all architectures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from dsmoe_local.model.ggml import GgmlType, Tensor, parse_type, row_bytes
from dsmoe_local.model.hyperparameters import Hyperparameters, ModelOutline
from dsmoe_local.model.layout import Role, TensorSpec, is_for_more_tokens, is_output, role_of, tensor_specs

PAPER_TOKENS = 4096
"""The paper counts FLOPs for sequences of 4K tokens."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Number of weights of a model, and of those that one token uses."""

    total: int
    activated: int


def parameters(hp: Hyperparameters) -> Parameters:
    """Return total and activated parameters, as the paper counts them.

    Of the routed experts, `n_experts_per_token` are activated. All other weights count in full, embeddings
    included.
    """
    total = sum(spec.n_weights for spec in tensor_specs(hp))
    routed = sum(spec.n_weights for spec in tensor_specs(hp) if spec.role is Role.ROUTED_EXPERT)
    if not routed:
        return Parameters(total, total)
    return Parameters(total, total - routed + routed // hp.n_routed_experts * hp.n_experts_per_token)


def flops(hp: Hyperparameters, n_tokens: int, ffn_factor: float | None = None) -> float:
    """Return the FLOPs of one training step (forward and backward) over a sequence of `n_tokens`.

    `ffn_factor` f is the number of FFN weights that a token uses in a layer, in units of hidden_size squared.
    With the paper's nominal f, the result is `T (6 L (4 + f) d² + 12 L d T + 6 V d)`: the paper's figures.
    Without it, real widths count: grouped queries, dense first layers and routers. MLA is counted as it is
    trained, with keys and values expanded for each head. llama.cpp computes with compressed ones instead:
    more FLOPs per token of context, and fewer bytes.
    """
    length, width = hp.n_layers, hp.hidden_size
    if ffn_factor is not None:
        weights = length * (4 + ffn_factor) * width**2
    else:
        weights = float(sum(_used_weights(hp, spec) for spec in tensor_specs(hp)))
    attention = 6 * length * (hp.attention_size + hp.attention_output_size) * n_tokens
    return n_tokens * (6 * weights + attention + 6 * hp.n_vocab * width)


def _used_weights(hp: Hyperparameters, spec: TensorSpec) -> int:
    """Return the number of weights that one token is multiplied with, without embedding and output."""
    if spec.role in (Role.EMBEDDING, Role.OUTPUT, Role.NORM, Role.BIAS):
        return 0
    if spec.role is Role.ROUTED_EXPERT:
        return spec.n_weights // hp.n_routed_experts * hp.n_experts_per_token
    return spec.n_weights


def kv_bytes_per_token(hp: ModelOutline, keys: str = "f16", values: str = "f16") -> int:
    """Return the bytes that one token of context takes in the KV cache, for the types of keys and values.

    MLA has a cache of keys only: values are the first columns of a key. Raises UsageError if a type is
    unknown.
    """
    n_keys, n_values = hp.cache_columns
    return row_bytes(parse_type(keys), n_keys) + row_bytes(parse_type(values), n_values)


@dataclass(frozen=True, slots=True)
class Share:
    """One role's part of a model: weights, stored bytes by type, and bytes read to decode one token.

    `role` is "other" for tensors that no table describes.
    """

    role: Role | Literal["other"]
    n_weights: int
    n_bytes: int
    n_bytes_per_token: float
    types: Mapping[GgmlType, int]


def shares(hp: ModelOutline, tensors: Iterable[Tensor]) -> list[Share]:
    """Return a model's parts by role, in the order of `Role`."""
    members: dict[Role | Literal["other"], list[Tensor]] = {}
    for tensor in tensors:
        members.setdefault(role_of(tensor.name) or "other", []).append(tensor)
    roles: list[Role | Literal["other"]] = [*Role, "other"]
    return [_share(hp, role, members[role]) for role in roles if role in members]


def _share(hp: ModelOutline, role: Role | Literal["other"], tensors: list[Tensor]) -> Share:
    types: Counter[GgmlType] = Counter()
    for tensor in tensors:
        types[tensor.type] += tensor.n_bytes
    return Share(
        role,
        sum(tensor.n_weights for tensor in tensors),
        types.total(),
        bytes_per_token(hp, tensors),
        dict(types.most_common()),
    )


def bytes_per_token(hp: ModelOutline, tensors: Iterable[Tensor]) -> float:
    """Return the bytes of weights that are read to decode one token."""
    return sum(tensor.n_bytes * read_fraction(hp, tensor.name) for tensor in tensors)


def activated_weights(hp: ModelOutline, tensors: Iterable[Tensor]) -> int:
    """Return the number of weights that one token uses. As in `parameters`, embeddings count in full."""
    return sum(
        tensor.n_weights
        if role_of(tensor.name) is Role.EMBEDDING
        else round(tensor.n_weights * read_fraction(hp, tensor.name))
        for tensor in tensors
    )


def read_fraction(hp: ModelOutline, name: str) -> float:
    """Return the fraction of a tensor that is read to decode one token.

    Only the chosen routed experts are read, and one row of the embedding. An embedding that is also the
    output is read once more as a whole. Layers for multi-token prediction are not read.
    """
    if is_for_more_tokens(name, hp):
        return 0.0
    role = role_of(name)
    if role is Role.ROUTED_EXPERT:
        return hp.n_experts_per_token / max(1, hp.n_routed_experts)
    if role is Role.EMBEDDING:
        return 1 / max(1, hp.n_vocab) + is_output(name, hp)
    return 1.0
