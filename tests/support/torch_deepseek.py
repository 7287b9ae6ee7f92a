"""DeepSeekMoE (arXiv 2401.06066) in plain torch, from the paper: an oracle for logits.

Written for clarity and in f32; shares no code with the converter but the names of hyper-parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 - torch's convention

from dsmoe_local.model.hyperparameters import Hyperparameters

Weights = Mapping[str, torch.Tensor]


def logits(weights: Weights, hp: Hyperparameters, ids: list[int]) -> torch.Tensor:
    """f32 logits of every position, shape (len(ids), n_vocab)."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    hidden = w["model.embed_tokens.weight"][torch.tensor(ids)]
    for layer in range(hp.n_layers):
        prefix = f"model.layers.{layer}."
        normed = rms_norm(hidden, w[f"{prefix}input_layernorm.weight"], hp.rms_norm_eps)
        hidden = hidden + attention(normed, w, f"{prefix}self_attn.", hp)
        normed = rms_norm(hidden, w[f"{prefix}post_attention_layernorm.weight"], hp.rms_norm_eps)
        if layer < hp.n_dense_layers:
            hidden = hidden + swiglu(normed, w, f"{prefix}mlp.")
        else:
            hidden = hidden + mixture(normed, w, f"{prefix}mlp.", hp)
    hidden = rms_norm(hidden, w["model.norm.weight"], hp.rms_norm_eps)
    head = "model.embed_tokens.weight" if hp.tied_embeddings else "lm_head.weight"
    return hidden @ w[head].T


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def swiglu(x: torch.Tensor, w: Weights, prefix: str) -> torch.Tensor:
    gate, up, down = (w[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def mixture(x: torch.Tensor, w: Weights, prefix: str, hp: Hyperparameters) -> torch.Tensor:
    """Shared experts, and the routed ones weighted by their softmax over all experts, not renormalized."""
    output = swiglu(x, w, f"{prefix}shared_experts.")
    probabilities = (x @ w[f"{prefix}gate.weight"].T).softmax(-1)
    top, chosen = probabilities.topk(hp.n_experts_per_token, dim=-1)
    for position in range(x.shape[0]):
        for weight, expert in zip(top[position], chosen[position].tolist(), strict=True):
            routed = swiglu(x[position], w, f"{prefix}experts.{expert}.")
            output[position] += hp.routed_scaling_factor * weight * routed
    return output


def attention(x: torch.Tensor, w: Weights, prefix: str, hp: Hyperparameters) -> torch.Tensor:
    length = x.shape[0]
    query, key, value = (
        (x @ w[f"{prefix}{name}_proj.weight"].T).view(length, heads, hp.head_dim).transpose(0, 1)
        for name, heads in (("q", hp.n_heads), ("k", hp.n_kv_heads), ("v", hp.n_kv_heads))
    )
    cosine, sine = rotation(hp, length)
    query, key = (part * cosine + rotate_half(part) * sine for part in (query, key))
    group = hp.n_heads // hp.n_kv_heads
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = query @ key.transpose(1, 2) / math.sqrt(hp.head_dim)
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    mixed = (scores.softmax(-1) @ value).transpose(0, 1).reshape(length, -1)
    return mixed @ w[f"{prefix}o_proj.weight"].T


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotation(hp: Hyperparameters, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of shape (length, head_dim), with linear or YaRN (arXiv 2309.00071) scaling."""
    half = torch.arange(0, hp.head_dim, 2, dtype=torch.float32) / hp.head_dim
    frequencies = hp.rope_theta**-half
    magnitude = 1.0
    scaling = hp.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        low, high = (
            hp.head_dim
            * math.log(scaling.original_context / (beta * 2 * math.pi))
            / (2 * math.log(hp.rope_theta))
            for beta in (32, 1)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), hp.head_dim - 1)
        ramp = ((torch.arange(hp.head_dim // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
        frequencies = frequencies / scaling.factor * ramp + frequencies * (1 - ramp)
        magnitude = scaling.attention_factor * (1 + 0.1 * math.log(scaling.factor))
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), -1)
    return angles.cos() * magnitude, angles.sin() * magnitude
