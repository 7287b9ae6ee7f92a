"""Attention: queries in groups that share keys and values, and multi-head latent attention (MLA)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from dsmoe_quantize.calibrated.network.layer import Layer
from dsmoe_quantize.calibrated.network.rope import score_scale


def attention(layer: Layer, x: Tensor) -> Tensor:
    """Return the output of a layer's attention. Shapes are (n_sequences, n_tokens, width)."""
    compute = next(compute for tensor, compute in _KINDS.items() if tensor in layer)
    return layer.multiply("attn_output", compute(layer, x))


def _separate(layer: Layer, x: Tensor) -> Tensor:
    return _grouped(layer, *(layer.multiply(f"attn_{part}", x) for part in "qkv"))


def _fused(layer: Layer, x: Tensor) -> Tensor:
    hp = layer.hp
    sizes = (hp.attention_size, hp.key_size, hp.value_size)
    return _grouped(layer, *layer.multiply("attn_qkv", x).split(sizes, -1))


def _grouped(layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    hp = layer.hp
    if hp.has_qk_norm:
        query, key = layer.norm("attn_q_norm", query), layer.norm("attn_k_norm", key)
    queries, keys = (layer.rotation(_heads(part, hp.head_dim)) for part in (query, key))
    group = hp.n_heads // hp.n_kv_heads
    keys, values = (part.repeat_interleave(group, 1) for part in (keys, _heads(value, hp.value_dim)))
    return _mixed(layer, queries, keys, values).transpose(1, 2).flatten(-2)


def _latent(layer: Layer, x: Tensor) -> Tensor:
    """Attend to compressed keys and values, which all heads share: llama.cpp does not expand them."""
    hp = layer.hp
    if hp.query_rank:
        compressed = layer.norm("attn_q_a_norm", layer.multiply("attn_q_a", x))
        query = layer.multiply("attn_q_b", compressed)
    else:
        query = layer.multiply("attn_q", x)
    plain, rotated = _heads(query, hp.head_dim).split((hp.nope_dim, hp.rotary_dim), -1)
    queries = torch.cat((_by_head(layer, "attn_k_b", plain), layer.rotation(rotated)), -1)
    latent, key = layer.multiply("attn_kv_a_mqa", x).split((hp.kv_rank, hp.rotary_dim), -1)
    values = layer.norm("attn_kv_a_norm", latent)[:, None]
    keys = torch.cat((values, layer.rotation(key[:, None])), -1)
    keys, values = (part.expand(-1, hp.n_heads, -1, -1) for part in (keys, values))
    mixed = _mixed(layer, queries, keys, values)
    return _by_head(layer, "attn_v_b", mixed).transpose(1, 2).flatten(-2)


_KINDS: Mapping[str, Callable[[Layer, Tensor], Tensor]] = {
    "attn_kv_a_mqa": _latent,
    "attn_qkv": _fused,
    "attn_q": _separate,
}
"""The kinds of attention, by a tensor that only layers of the kind have."""


def _heads(x: Tensor, width: int) -> Tensor:
    """Split vectors into heads. Return the shape (n_sequences, n_heads, n_tokens, width)."""
    heads: Tensor = x.unflatten(-1, (-1, width))
    return heads.transpose(1, 2)


def _by_head(layer: Layer, name: str, heads: Tensor) -> Tensor:
    """Return the product of each head with its own matrix."""
    for number, head in enumerate(heads.unbind(1)):
        layer.observe(name, head, number)
    return heads @ layer[name].transpose(1, 2)


def _mixed(layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the values that each token attends to, weighted. Tokens do not attend to later ones."""
    scale = score_scale(layer.hp)
    return functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
