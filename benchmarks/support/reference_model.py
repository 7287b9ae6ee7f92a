"""A DeepSeekMoE (arXiv 2401.06066) in torch that can be trained.

Attention is that of the released model, or of DeepSeek-V2 (MLA, arXiv 2405.04434). The router's softmax over
all experts weighs the chosen ones and is not normalized again (equations 9 to 11). All weights are f32;
matrix products follow autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsmoe_local.model.hyperparameters import Hyperparameters

_DEVIATION = 0.02
_ROWS = 256


class Attention(nn.Module):
    """Causal attention over (batch, length, width), with rotary positions."""

    def __init__(self, hp: Hyperparameters) -> None:
        super().__init__()
        self._heads = hp.n_heads
        size = hp.attention_size
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(hp.hidden_size, size, bias=False) for _ in range(3)
        )
        self.o_proj = nn.Linear(size, hp.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (self._heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (_rotate(part, rotation) for part in (query, key))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return result


class LatentAttention(nn.Module):
    """Causal attention over (batch, length, width) with compressed queries, keys and values: MLA."""

    def __init__(self, hp: Hyperparameters) -> None:
        super().__init__()
        self._hp = hp
        self.q_a_proj = nn.Linear(hp.hidden_size, hp.query_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(hp.query_rank, hp.rms_norm_eps)
        self.q_b_proj = nn.Linear(hp.query_rank, hp.attention_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hp.hidden_size, hp.latent_size, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(hp.kv_rank, hp.rms_norm_eps)
        self.kv_b_proj = nn.Linear(hp.kv_rank, hp.n_heads * (hp.nope_dim + hp.value_dim), bias=False)
        self.o_proj = nn.Linear(hp.attention_output_size, hp.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        hp = self._hp
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query = query.unflatten(-1, (hp.n_heads, hp.head_dim)).transpose(1, 2)
        latent, key_part = self.kv_a_proj_with_mqa(x).split([hp.kv_rank, hp.rotary_dim], -1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (hp.n_heads, -1)).transpose(1, 2)
        key, value = expanded.split([hp.nope_dim, hp.value_dim], -1)
        query, query_part = query.split([hp.nope_dim, hp.rotary_dim], -1)
        key_part = _rotate(_halves(key_part.unsqueeze(1)), rotation).expand(-1, hp.n_heads, -1, -1)
        query = torch.cat((query, _rotate(_halves(query_part), rotation)), -1)
        key = torch.cat((key, key_part), -1)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return result


def _halves(x: Tensor) -> Tensor:
    """Return the values of adjacent pairs as two halves: DeepSeek-V2 rotates pairs."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return pairs.transpose(-1, -2).flatten(-2)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = rotation
    first, second = x.chunk(2, -1)
    return x * cosine.to(x.dtype) + torch.cat((-second, first), -1) * sine.to(x.dtype)


class FeedForward(nn.Module):
    """A gated FFN: the dense one of the first layers, or the shared experts as one."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, size, bias=False)
        self.up_proj = nn.Linear(width, size, bias=False)
        self.down_proj = nn.Linear(size, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Mixture(nn.Module):
    """Shared and routed experts. `balance` is the balance loss of the last call (equations 12 to 14), without
    its factor.
    """

    def __init__(self, hp: Hyperparameters) -> None:
        super().__init__()
        self._n_active = hp.n_experts_per_token
        self._n_experts = hp.n_routed_experts
        self.gate = nn.Linear(hp.hidden_size, hp.n_routed_experts, bias=False)
        self.experts = nn.ModuleList(
            FeedForward(hp.hidden_size, hp.expert_size) for _ in range(hp.n_routed_experts)
        )
        self.shared_experts = FeedForward(hp.hidden_size, hp.shared_size)
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        with torch.autocast("cpu", enabled=False):
            probabilities = self.gate(flat.float()).softmax(-1)
        weights, chosen = probabilities.topk(self._n_active, dim=-1)
        counts = torch.bincount(chosen.flatten(), minlength=self._n_experts)
        share = counts * (self._n_experts / (self._n_active * len(flat)))
        self.balance = (share * probabilities.mean(0)).sum()
        # One product for each expert, over all tokens that chose it.
        choices = chosen.flatten().argsort().split(counts.tolist())
        outputs = [
            expert(_padded(flat.index_select(0, each // self._n_active)))[: len(each)]
            for expert, each in zip(self.experts, choices, strict=True)
        ]
        order = torch.cat(choices)
        weighted = torch.cat(outputs) * weights.flatten()[order, None].to(outputs[0].dtype)
        routed = torch.zeros_like(flat, dtype=weighted.dtype).index_add_(0, order // self._n_active, weighted)
        result: Tensor = self.shared_experts(x) + routed.view_as(x)
        return result


def _padded(rows: Tensor) -> Tensor:
    """Add rows of zeros up to one of a few numbers: each new shape of a bf16 product compiles a kernel."""
    if not torch.is_autocast_enabled("cpu"):
        return rows
    return functional.pad(rows, (0, 0, 0, -len(rows) % _ROWS))


class Layer(nn.Module):
    """Attention and an FFN with norms before them."""

    def __init__(self, hp: Hyperparameters, layer: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (
            nn.RMSNorm(hp.hidden_size, hp.rms_norm_eps) for _ in range(2)
        )
        self.self_attn = LatentAttention(hp) if hp.is_mla else Attention(hp)
        self.mlp = Mixture(hp) if hp.is_moe_layer(layer) else FeedForward(hp.hidden_size, hp.ffn_size)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Decoder(nn.Module):
    """The layers between token ids and the last norm."""

    def __init__(self, hp: Hyperparameters) -> None:
        super().__init__()
        self._hp = hp
        self.embed_tokens = nn.Embedding(hp.n_vocab, hp.hidden_size)
        self.layers = nn.ModuleList(Layer(hp, layer) for layer in range(hp.n_layers))
        self.norm = nn.RMSNorm(hp.hidden_size, hp.rms_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(ids)
        rotation = _rotation(self._hp, ids.shape[-1])
        for layer in self.layers:
            x = layer(x, rotation)
        result: Tensor = self.norm(x)
        return result


def _rotation(hp: Hyperparameters, length: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, shape (length, rotary_dim)."""
    frequencies = hp.rope_theta ** -(torch.arange(0, hp.rotary_dim, 2) / hp.rotary_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


class ReferenceModel(nn.Module):
    """The whole model. Its state_dict has the names of a Hugging Face checkpoint."""

    def __init__(self, hp: Hyperparameters) -> None:
        super().__init__()
        self.model = Decoder(hp)
        self.lm_head = nn.Linear(hp.hidden_size, hp.n_vocab, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=_DEVIATION)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits, shape (batch, length, n_vocab)."""
        result: Tensor = self.lm_head(self.model(ids))
        return result

    def balance(self) -> Tensor:
        """Return the balance loss of the last call, summed over layers."""
        losses = [module.balance for module in self.modules() if isinstance(module, Mixture)]
        return torch.stack(losses).sum()
