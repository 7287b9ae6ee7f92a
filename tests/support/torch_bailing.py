"""Ling 2.0 in plain torch, from its description: an oracle for logits, since transformers has no such class.

Fused queries, keys and values; a norm of each query and key head; rotation of the first part of each head;
sigmoid routing with a bias for the choice, groups scored by their two best experts, normalised weights.
"""

from __future__ import annotations

import math

import torch

from dsmoe_local.model.hyperparameters import Hyperparameters
from support.torch_deepseek import Weights, rms_norm, swiglu


def logits(weights: Weights, hp: Hyperparameters, ids: list[int]) -> torch.Tensor:
    """f32 logits of every position, shape (len(ids), n_vocab)."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    hidden = w["model.word_embeddings.weight"][torch.tensor(ids)]
    for layer in range(hp.n_layers):
        prefix = f"model.layers.{layer}."
        normed = rms_norm(hidden, w[f"{prefix}input_layernorm.weight"], hp.rms_norm_eps)
        hidden = hidden + attention(normed, w, f"{prefix}attention.", hp)
        normed = rms_norm(hidden, w[f"{prefix}post_attention_layernorm.weight"], hp.rms_norm_eps)
        feed_forward = swiglu if layer < hp.n_dense_layers else mixture
        arguments = () if layer < hp.n_dense_layers else (hp,)
        hidden = hidden + feed_forward(normed, w, f"{prefix}mlp.", *arguments)
    return rms_norm(hidden, w["model.norm.weight"], hp.rms_norm_eps) @ w["lm_head.weight"].T


def attention(x: torch.Tensor, w: Weights, prefix: str, hp: Hyperparameters) -> torch.Tensor:
    length = len(x)
    fused = (x @ w[f"{prefix}query_key_value.weight"].T).view(length, -1, hp.head_dim).transpose(0, 1)
    query, key, value = torch.split(fused, [hp.n_heads, hp.n_kv_heads, hp.n_kv_heads])
    query = rms_norm(query, w[f"{prefix}query_layernorm.weight"], hp.rms_norm_eps)
    key = rms_norm(key, w[f"{prefix}key_layernorm.weight"], hp.rms_norm_eps)
    query, key = rotated(query, hp), rotated(key, hp)
    shared_by = hp.n_heads // hp.n_kv_heads
    key, value = key.repeat_interleave(shared_by, 0), value.repeat_interleave(shared_by, 0)
    scores = query @ key.transpose(1, 2) / math.sqrt(hp.head_dim)
    later = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
    mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
    result: torch.Tensor = mixed.transpose(0, 1).reshape(length, -1) @ w[f"{prefix}dense.weight"].T
    return result


def rotated(heads: torch.Tensor, hp: Hyperparameters) -> torch.Tensor:
    """Rotate the first `rotary_dim` values of each head, half against half."""
    size = hp.rotary_dim
    frequencies = hp.rope_theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.outer(torch.arange(heads.shape[1], dtype=torch.float32), frequencies)
    first, second, rest = torch.split(heads, [size // 2, size // 2, hp.head_dim - size], -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def choice(
    x: torch.Tensor, w: Weights, prefix: str, hp: Hyperparameters
) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's probabilities for all experts, and the chosen ones."""
    probabilities = (x @ w[f"{prefix}gate.weight"].T).sigmoid()
    scores = probabilities + w[f"{prefix}gate.expert_bias"]
    groups = scores.view(len(x), hp.n_expert_groups, -1)
    best = groups.topk(2, -1).values.sum(-1).topk(hp.n_groups_per_token, -1).indices
    allowed = torch.zeros_like(groups, dtype=torch.bool).scatter_(
        1, best.unsqueeze(-1).expand(-1, -1, groups.shape[-1]), True
    )
    masked = scores.masked_fill(~allowed.view_as(scores), -torch.inf)
    return probabilities, masked.topk(hp.n_experts_per_token, -1).indices


def mixture(x: torch.Tensor, w: Weights, prefix: str, hp: Hyperparameters) -> torch.Tensor:
    output = swiglu(x, w, f"{prefix}shared_experts.")
    probabilities, chosen = choice(x, w, prefix, hp)
    for position, experts in enumerate(chosen.tolist()):
        weights = probabilities[position, experts]
        for weight, expert in zip(weights / weights.sum(), experts, strict=True):
            routed = swiglu(x[position], w, f"{prefix}experts.{expert}.")
            output[position] += hp.routed_scaling_factor * weight * routed
    return output
