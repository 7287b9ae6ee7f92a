"""Feed-forward networks: dense ones, and mixtures of routed and shared experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from dsmoe_local.model.hyperparameters import Gating, Hyperparameters
from dsmoe_quantize.calibrated.network.layer import Layer

_LEAST_SUM = 6.103515625e-5  # src/llama-graph.cpp, build_moe_ffn: of the weights that are normalized


def feed_forward(layer: Layer, x: Tensor) -> Tensor:
    """Return the output of a layer's feed-forward network for vectors, shape (n_tokens, width)."""
    compute = next(compute for tensor, compute in _KINDS.items() if tensor in layer)
    return compute(layer, x)


def _dense(layer: Layer, x: Tensor) -> Tensor:
    neurons = functional.silu(layer.multiply("ffn_gate", x)) * layer.multiply("ffn_up", x)
    return layer.multiply("ffn_down", neurons)


def _mixture(layer: Layer, x: Tensor) -> Tensor:
    output = _routed(layer, x)
    if "ffn_up_shexp" in layer:
        output += _shared(layer, x)
    return output


_KINDS: Mapping[str, Callable[[Layer, Tensor], Tensor]] = {"ffn_gate_inp": _mixture, "ffn_gate": _dense}
"""The kinds of networks, by a tensor that only layers of the kind have."""


def _routed(layer: Layer, x: Tensor) -> Tensor:
    """Return the weighted sum of the routed experts, computed expert by expert."""
    weights, chosen = _choice(layer, x)
    experts = zip(*(layer.experts(f"ffn_{part}") for part in ("gate", "up", "down")), strict=True)
    output = torch.zeros_like(x)
    for number, matrices in enumerate(experts):
        tokens, place = (chosen == number).nonzero(as_tuple=True)
        if len(tokens):
            one = _expert(layer, "exps", matrices, x[tokens], weights[tokens, place], number)
            output.index_add_(0, tokens, one)
    return output


def _shared(layer: Layer, x: Tensor) -> Tensor:
    """Return the output of the shared experts, which are stored as one."""
    gate = None
    if "ffn_gate_inp_shexp" in layer:
        layer.observe("ffn_gate_inp_shexp", x)
        gate = (x @ layer["ffn_gate_inp_shexp"].flatten()).sigmoid()
    gates, ups, downs = (layer[f"ffn_{part}_shexp"] for part in ("gate", "up", "down"))
    return _expert(layer, "shexp", (gates, ups, downs), x, gate)


def _expert(
    layer: Layer,
    kind: str,
    matrices: tuple[Tensor, ...],
    x: Tensor,
    gate: Tensor | None,
    number: int | None = None,
) -> Tensor:
    """Return the output of one expert, multiplied by `gate`, shape (n_tokens,)."""
    gates, ups, downs = matrices
    layer.observe(f"ffn_gate_{kind}", x, number, gate)
    layer.observe(f"ffn_up_{kind}", x, number, gate)
    neurons = functional.silu(x @ gates.T) * (x @ ups.T)
    layer.observe(f"ffn_down_{kind}", neurons, number, gate)
    output = neurons @ downs.T
    return output if gate is None else output * gate[:, None]


def _choice(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights and the indexes of each token's experts, shape (n_tokens, n_experts_per_token)."""
    hp = layer.hp
    scores = layer.multiply("ffn_gate_inp", x)
    probabilities = scores.sigmoid() if hp.gating is Gating.SIGMOID else scores.softmax(-1)
    ranks = probabilities
    bias = layer.bias("exp_probs_b")
    if bias is not None:
        ranks = ranks + bias
    if hp.n_expert_groups > 1:
        ranks = _within_groups(ranks, hp)
    chosen = ranks.topk(hp.n_experts_per_token, -1).indices
    weights = probabilities.gather(-1, chosen)
    if hp.normalized_weights:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=_LEAST_SUM)
    return weights * hp.routed_scaling_factor, chosen


def _within_groups(ranks: Tensor, hp: Hyperparameters) -> Tensor:
    """Return `ranks` with -inf outside each token's best groups. Groups are judged by two best experts."""
    groups: Tensor = ranks.unflatten(-1, (hp.n_expert_groups, -1))
    best = groups.topk(2, -1).values.sum(-1).topk(hp.n_groups_per_token, -1).indices
    is_best = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
    return groups.masked_fill(~is_best[..., None], -torch.inf).flatten(-2)
