"""What a model costs: parameters, FLOPs, bytes read per token, KV cache. Formulas after arXiv 2401.06066."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dsmoe_local.model.ggml import GgmlType, tensor_bytes
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import Role, TensorSpec, tensor_specs

PAPER_TOKENS = 4096
"""The paper counts FLOPs for sequences of 4K tokens."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Weights of a model, and those that one token uses."""

    total: int
    activated: int


def parameters(hp: Hyperparameters) -> Parameters:
    """Total and activated parameters, as the paper counts them: of the routed experts a token activates
    `n_experts_per_token`; everything else, embeddings included, counts in full.
    """
    total = sum(spec.n_weights for spec in tensor_specs(hp))
    routed = sum(spec.n_weights for spec in tensor_specs(hp) if spec.role is Role.ROUTED_EXPERT)
    if not routed:
        return Parameters(total, total)
    return Parameters(total, total - routed + routed // hp.n_routed_experts * hp.n_experts_per_token)


def flops(hp: Hyperparameters, n_tokens: int, ffn_factor: float | None = None) -> float:
    """FLOPs of one training step (forward and backward) over a sequence of `n_tokens`.

    `ffn_factor` f is the FFN weights a token uses in one layer, in units of hidden_size squared. With the
    paper's nominal f (presets carry it) this is `T (6 L (4 + f) d² + 12 L d T + 6 V d)` and gives the paper's
    figures; without it, the real widths are counted: grouped queries, the dense first layers and the router.
    """
    length, width = hp.n_layers, hp.hidden_size
    if ffn_factor is not None:
        weights = length * (4 + ffn_factor) * width**2
    else:
        weights = float(sum(map(_used_weights(hp), tensor_specs(hp))))
    attention = 12 * length * hp.attention_size * n_tokens
    return n_tokens * (6 * weights + attention + 6 * hp.n_vocab * width)


def _used_weights(hp: Hyperparameters) -> Callable[[TensorSpec], int]:
    """A function from tensor to the weights one token multiplies with, embeddings and output left out."""

    def used(spec: TensorSpec) -> int:
        if spec.role in (Role.EMBEDDING, Role.OUTPUT, Role.NORM):
            return 0
        if spec.role is Role.ROUTED_EXPERT:
            return spec.n_weights // hp.n_routed_experts * hp.n_experts_per_token
        return spec.n_weights

    return used


def kv_bytes_per_token(hp: Hyperparameters, ggml_type: GgmlType = GgmlType.F16) -> int:
    """Bytes of keys and values one token of context occupies."""
    return 2 * hp.n_layers * tensor_bytes(ggml_type, (hp.kv_size,))


@dataclass(frozen=True, slots=True)
class Share:
    """One role's part of a model: weights, stored bytes by type, and bytes read per decoded token."""

    role: Role
    n_weights: int
    n_bytes: int
    n_bytes_per_token: float
    types: Mapping[GgmlType, int]


def shares(hp: Hyperparameters, tensors: Iterable[tuple[TensorSpec, GgmlType]]) -> list[Share]:
    """A model's parts by role, in the layout's order, for the given type of each tensor.

    Decoding one token reads every weight but: of the routed experts only the chosen ones, of the embedding a
    single row (the whole of it once more where the output is tied to it).
    """
    rows: dict[Role, list[tuple[TensorSpec, GgmlType]]] = {}
    for spec, kind in tensors:
        rows.setdefault(spec.role, []).append((spec, kind))
    return [_share(hp, role, rows[role]) for role in Role if role in rows]


def _share(hp: Hyperparameters, role: Role, tensors: list[tuple[TensorSpec, GgmlType]]) -> Share:
    types: dict[GgmlType, int] = {}
    read = 0.0
    for spec, kind in tensors:
        n_bytes = tensor_bytes(kind, spec.shape)
        types[kind] = types.get(kind, 0) + n_bytes
        read += n_bytes * read_fraction(hp, role)
    return Share(
        role,
        sum(spec.n_weights for spec, _ in tensors),
        sum(types.values()),
        read,
        dict(sorted(types.items(), key=lambda item: -item[1])),
    )


def read_fraction(hp: Hyperparameters, role: Role) -> float:
    """Which part of a role's weights the decoding of one token reads."""
    if role is Role.ROUTED_EXPERT:
        return hp.n_experts_per_token / hp.n_routed_experts
    if role is Role.EMBEDDING:
        return 1 / hp.n_vocab + (1.0 if hp.tied_embeddings else 0.0)
    return 1.0
