"""The hyper-parameters of a DeepSeekMoE (arXiv 2401.06066), and of the dense models it is compared with.

`config_json` reads them from a config.json, `gguf_model` from a GGUF file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

Architecture: TypeAlias = Literal["deepseek", "llama"]
ARCHITECTURES: tuple[Architecture, ...] = ("deepseek", "llama")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary positions are scaled beyond the trained context.

    `original_context` and `attention_factor` are used by `yarn` only. The latter multiplies YaRN's own
    magnitude, 1 + 0.1 ln(factor). The betas are always 32 and 1: llama.cpp does not read them.
    """

    kind: Literal["linear", "yarn"]
    factor: float
    original_context: int = 0
    attention_factor: float = 1.0

    @property
    def yarn_magnitude(self) -> float:
        """The factor by which YaRN multiplies queries and keys, without `attention_factor`."""
        return 1 + 0.1 * math.log(max(1.0, self.factor))


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Widths and counts of one model. A dense model has no experts and `n_dense_layers == n_layers`.

    Layers 0 … n_dense_layers - 1 have a dense FFN of `ffn_size` neurons. The others have `n_routed_experts`
    experts of `expert_size` neurons, of which a router chooses `n_experts_per_token`, and `n_shared_experts`
    that every token uses (stored fused, as one FFN of `shared_size`). With `tied_embeddings` the embedding is
    also the output matrix, and there is no output tensor.
    """

    architecture: Architecture
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_size: int
    n_vocab: int
    n_context: int
    n_dense_layers: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    n_experts_per_token: int = 0
    expert_size: int = 0
    routed_scaling_factor: float = 1.0
    tied_embeddings: bool = False
    name: str = ""

    @property
    def is_moe(self) -> bool:
        """True if any layer has routed experts."""
        return self.n_routed_experts > 0

    @property
    def n_moe_layers(self) -> int:
        """Number of layers with routed experts."""
        return self.n_layers - self.n_dense_layers

    @property
    def shared_size(self) -> int:
        """Width of the fused shared experts."""
        return self.n_shared_experts * self.expert_size

    @property
    def attention_size(self) -> int:
        """Columns of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of all key (or value) heads together."""
        return self.n_kv_heads * self.head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """True if `layer` has routed experts."""
        return layer >= self.n_dense_layers
