"""SmolLM2's forward pass in plain torch, for calibration: whole windows, no cache, float32.

Every FFN can be replaced by a function, to collect its inputs or to try out experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from dsmoe_convert.demo.source import Source
from dsmoe_local.model.hyperparameters import Hyperparameters


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer, each (rows, columns) as torch's linear wants them."""

    attention_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    ffn_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    def neurons(self, x: Tensor) -> Tensor:
        """Return the activation of every FFN neuron, (…, ffn_size), for FFN inputs (…, hidden_size)."""
        return functional.silu(x @ self.gate.T) * (x @ self.up.T)


Ffn: TypeAlias = Callable[[int, Layer, Tensor], Tensor]
"""(layer number, its weights, input (…, hidden_size)) -> output (…, hidden_size)."""


def dense_ffn(number: int, layer: Layer, x: Tensor) -> Tensor:
    """Return the output of the FFN with all neurons."""
    return layer.neurons(x) @ layer.down.T


@dataclass(frozen=True, slots=True)
class DenseModel:
    """All the weights. The output matrix is the embedding, transposed."""

    hyperparameters: Hyperparameters
    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor

    @classmethod
    def load(cls, source: Source) -> Self:
        """Load the source's weights as float32 tensors."""
        weights = {name: torch.from_numpy(values) for name, values in source.tensors()}
        layers = []
        for number in range(source.hyperparameters.n_layers):
            prefix = f"model.layers.{number}"
            layers.append(
                Layer(
                    attention_norm=weights[f"{prefix}.input_layernorm.weight"],
                    q=weights[f"{prefix}.self_attn.q_proj.weight"],
                    k=weights[f"{prefix}.self_attn.k_proj.weight"],
                    v=weights[f"{prefix}.self_attn.v_proj.weight"],
                    o=weights[f"{prefix}.self_attn.o_proj.weight"],
                    ffn_norm=weights[f"{prefix}.post_attention_layernorm.weight"],
                    gate=weights[f"{prefix}.mlp.gate_proj.weight"],
                    up=weights[f"{prefix}.mlp.up_proj.weight"],
                    down=weights[f"{prefix}.mlp.down_proj.weight"],
                )
            )
        return cls(
            source.hyperparameters,
            weights["model.embed_tokens.weight"],
            tuple(layers),
            weights["model.norm.weight"],
        )

    def hidden(self, tokens: Tensor, ffn: Ffn = dense_ffn) -> Tensor:
        """Return normalized final states (batch, length, hidden_size) of token windows (batch, length)."""
        hp = self.hyperparameters
        cosine, sine = rotary_table(tokens.shape[-1], hp)
        x = self.embedding[tokens]
        for number, layer in enumerate(self.layers):
            x = x + self._attention(layer, rms_norm(x, layer.attention_norm, hp.rms_norm_eps), cosine, sine)
            x = x + ffn(number, layer, rms_norm(x, layer.ffn_norm, hp.rms_norm_eps))
        return rms_norm(x, self.norm, hp.rms_norm_eps)

    def logits(self, tokens: Tensor, ffn: Ffn = dense_ffn) -> Tensor:
        """Return logits (batch, length, n_vocab)."""
        return self.hidden(tokens, ffn) @ self.embedding.T

    def _attention(self, layer: Layer, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        hp = self.hyperparameters

        def heads(weight: Tensor) -> Tensor:
            projected = x @ weight.T
            return projected.view(*x.shape[:-1], -1, hp.head_dim).transpose(1, 2)

        q, k, v = rotate(heads(layer.q), cosine, sine), rotate(heads(layer.k), cosine, sine), heads(layer.v)
        mixed: Tensor = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(2) @ layer.o.T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply root-mean-square normalization over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotary_table(length: int, hp: Hyperparameters) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (length, head_dim / 2)."""
    frequencies = hp.rope_theta ** -(torch.arange(0, hp.head_dim, 2, dtype=torch.float64) / hp.head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply rotary positions to heads (batch, heads, length, head_dim), first half with second half."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
