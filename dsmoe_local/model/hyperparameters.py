"""The hyper-parameters of a mixture of experts, and of the dense models it is compared with.

`config_json` reads them from a config.json, `gguf_model` from a GGUF file, both by the tables in
`architectures`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Gating(StrEnum):
    """How a router turns its scores into probabilities."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary positions are scaled beyond the trained context.

    The last three are used by `yarn` only. `attention_factor` multiplies YaRN's own magnitude,
    1 + 0.1 ln(factor). `mscale_all_dim` is DeepSeek-V2's factor of the logarithm, for queries and keys as a
    whole; 0 if the model has none. The betas are always 32 and 1: llama.cpp does not read them.
    """

    kind: Literal["linear", "yarn"]
    factor: float
    original_context: int = 0
    attention_factor: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def yarn_magnitude(self) -> float:
        """The factor by which YaRN multiplies queries and keys, without `attention_factor`."""
        return 1 + 0.1 * math.log(max(1.0, self.factor))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutline:
    """What an engine needs to know of a model, whatever its architecture.

    `architecture` is the name in GGUF files. `n_mtp_layers` are the layers for multi-token prediction that a
    file has after the `n_layers` others. Nothing here uses them. With `tied_embeddings` the embedding is also
    the output matrix, and there is no output tensor. `cache_columns` are the columns of keys and of values
    that a token has in the KV caches of all layers together.
    """

    architecture: str
    n_layers: int
    n_vocab: int
    n_context: int
    n_routed_experts: int = 0
    n_experts_per_token: int = 0
    tied_embeddings: bool = False
    name: str = ""
    cache_columns: tuple[int, int] = (0, 0)
    n_mtp_layers: int = 0

    @property
    def is_moe(self) -> bool:
        """True if any layer has routed experts."""
        return self.n_routed_experts > 0

    @property
    def n_choosable_experts(self) -> int:
        """The most experts that a token can use."""
        return self.n_routed_experts

    @property
    def n_stored_layers(self) -> int:
        """Number of layers in the file, with those for multi-token prediction."""
        return self.n_layers + self.n_mtp_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters(ModelOutline):
    """Widths and counts of a model whose architecture is one of `architectures`.

    A dense model has no experts and `n_dense_layers == n_layers`.

    Layers 0 … n_dense_layers - 1 have a dense FFN of `ffn_size` neurons. The others have `n_routed_experts`
    experts of `expert_size` neurons, of which a router chooses `n_experts_per_token`, and `n_shared_experts`
    of `shared_expert_size` neurons that every token uses (stored fused, as one FFN of `shared_size`).

    `head_dim` is the width of a query or key head, `value_dim` that of a value head. The last or first
    `rotary_dim` values of a head are rotated. With multi-head latent attention (MLA, arXiv 2405.04434),
    `kv_rank` is the width of the compressed keys and values, and `query_rank` that of the compressed queries,
    0 if queries are not compressed.

    The router's probabilities are `gating` of its scores. `has_expert_bias`: a bias is added to them for the
    choice. With `n_expert_groups` above 1, experts are chosen from the best `n_groups_per_token` groups. The
    chosen probabilities are divided by their sum with `normalized_weights`, then multiplied by
    `routed_scaling_factor`.
    """

    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    value_dim: int
    rotary_dim: int
    ffn_size: int
    n_dense_layers: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    n_shared_experts: int = 0
    expert_size: int = 0
    shared_expert_size: int = 0
    routed_scaling_factor: float = 1.0
    query_rank: int = 0
    kv_rank: int = 0
    gating: Gating = Gating.SOFTMAX
    normalized_weights: bool = False
    has_expert_bias: bool = False
    n_expert_groups: int = 1
    n_groups_per_token: int = 1
    has_qkv_bias: bool = False
    has_qk_norm: bool = False

    def __post_init__(self) -> None:
        """Set `cache_columns`."""
        # With MLA, values are columns of the key.
        columns = (self.n_cache_heads * self.cache_key_dim, 0 if self.is_mla else self.value_size)
        keys, values = (self.n_layers * width for width in columns)
        object.__setattr__(self, "cache_columns", (keys, values))

    @property
    def n_moe_layers(self) -> int:
        """Number of layers with routed experts."""
        return self.n_layers - self.n_dense_layers

    @property
    def n_choosable_experts(self) -> int:
        """Number of routed experts that a token's can be chosen from: those of its groups."""
        if self.n_expert_groups <= 1:
            return self.n_routed_experts
        return self.n_routed_experts // self.n_expert_groups * self.n_groups_per_token

    @property
    def shared_size(self) -> int:
        """Width of the fused shared experts."""
        return self.n_shared_experts * self.shared_expert_size

    @property
    def is_mla(self) -> bool:
        """True for multi-head latent attention."""
        return self.kv_rank > 0

    @property
    def attention_size(self) -> int:
        """Columns of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Columns of all key heads together."""
        return self.n_kv_heads * self.head_dim

    @property
    def value_size(self) -> int:
        """Columns of all value heads together."""
        return self.n_kv_heads * self.value_dim

    @property
    def attention_output_size(self) -> int:
        """Columns of the results of all heads together, which the output projection multiplies."""
        return self.n_heads * self.value_dim

    @property
    def qkv_size(self) -> int:
        """Rows of a projection that computes queries, keys and values at once."""
        return self.attention_size + self.key_size + self.value_size

    @property
    def rotary_fraction(self) -> float:
        """The part of a head that is rotated."""
        return self.rotary_dim / self.head_dim

    @property
    def nope_dim(self) -> int:
        """Width of the part of a head that is not rotated."""
        return self.head_dim - self.rotary_dim

    @property
    def latent_size(self) -> int:
        """Columns of what MLA keeps of a token: the compressed keys and values, and the rotated key."""
        return self.kv_rank + self.rotary_dim

    @property
    def n_cache_heads(self) -> int:
        """Number of heads in the KV cache. MLA has one, which all query heads share."""
        return 1 if self.is_mla else self.n_kv_heads

    @property
    def cache_key_dim(self) -> int:
        """Width of a key head in the KV cache."""
        return self.latent_size if self.is_mla else self.head_dim

    @property
    def cache_value_dim(self) -> int:
        """Width of a value head in attention. With MLA these are the first columns of the key."""
        return self.kv_rank if self.is_mla else self.value_dim

    def is_moe_layer(self, layer: int) -> bool:
        """True if `layer` has routed experts."""
        return layer >= self.n_dense_layers
