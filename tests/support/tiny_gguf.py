"""Tiny random GGUF models, written with the `gguf` package: inputs for our quantizer and for llama.cpp's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np

from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import Field, read_gguf
from dsmoe_local.model.gguf_model import metadata_of
from dsmoe_local.model.hyperparameters import Gating, Hyperparameters
from dsmoe_local.model.layout import UNQUANTIZED_ROLES, Role, TensorSpec, tensor_specs
from dsmoe_quantize.policy.recipes import KINDS, SUBSTITUTES

# Wide rows take every block, 96 and 288 columns only blocks of 32; nine layers have "more bits" in some.
MOE = Hyperparameters(
    architecture="deepseek",
    n_layers=9,
    hidden_size=256,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    value_dim=64,
    rotary_dim=64,
    ffn_size=288,
    n_vocab=64,
    n_context=128,
    n_dense_layers=1,
    n_routed_experts=3,
    n_shared_experts=1,
    n_experts_per_token=2,
    expert_size=96,
    shared_expert_size=96,
)
FOUR_LAYERS = replace(MOE, n_layers=4)
"""For tests of the solver, which takes long for many layers."""
MOE_KINDS = tuple(kind for kind in KINDS if kind not in SUBSTITUTES)
"""The kinds of groups that such a model has."""
DEEP = replace(MOE, n_layers=28, n_kv_heads=1, n_routed_experts=2, expert_size=32, shared_expert_size=32)
"""As many layers as the 16B model, and four heads to a key."""
EIGHT_EXPERTS = replace(
    MOE, n_layers=4, n_dense_layers=2, n_routed_experts=8, expert_size=64, shared_expert_size=64
)
"""llama.cpp has rules for models with just eight experts."""
NARROW = replace(MOE, n_layers=2, hidden_size=576, n_heads=9, n_kv_heads=3, tied_embeddings=True)
"""The demo's widths: no row takes a block of 256. The embedding is the output."""
ODD = replace(MOE, n_layers=2, expert_size=72, shared_expert_size=72, ffn_size=120)
"""Down projections that take no block at all."""
DENSE = Hyperparameters(
    architecture="llama",
    n_layers=9,
    hidden_size=256,
    n_heads=8,
    n_kv_heads=2,
    head_dim=32,
    value_dim=32,
    rotary_dim=32,
    ffn_size=256,
    n_vocab=64,
    n_context=128,
    n_dense_layers=9,
    tied_embeddings=True,
)
_GROUPED = replace(MOE, n_layers=3, n_routed_experts=8, n_experts_per_token=3, routed_scaling_factor=2.5,
                   gating=Gating.SIGMOID, normalized_weights=True, has_expert_bias=True)  # fmt: skip
FAMILY: Mapping[str, Hyperparameters] = {
    "deepseek": MOE,
    "deepseek2": replace(
        _GROUPED,
        architecture="deepseek2",
        n_kv_heads=4,
        head_dim=96,
        value_dim=64,
        rotary_dim=32,
        query_rank=96,
        kv_rank=128,
        n_expert_groups=4,
        n_groups_per_token=2,
    ),
    "qwen2moe": replace(
        MOE, architecture="qwen2moe", n_layers=3, n_dense_layers=0, shared_expert_size=288, has_qkv_bias=True
    ),
    "qwen3moe": replace(
        MOE,
        architecture="qwen3moe",
        n_layers=3,
        n_dense_layers=0,
        n_shared_experts=0,
        shared_expert_size=0,
        head_dim=96,
        value_dim=96,
        rotary_dim=96,
        has_qk_norm=True,
        normalized_weights=True,
    ),
    "glm4moe": replace(_GROUPED, architecture="glm4moe", rotary_dim=32, has_qkv_bias=True, has_qk_norm=True),
    "bailingmoe2": replace(
        _GROUPED,
        architecture="bailingmoe2",
        rotary_dim=32,
        has_qk_norm=True,
        n_expert_groups=4,
        n_groups_per_token=2,
    ),
    "olmoe": replace(
        MOE,
        architecture="olmoe",
        n_layers=3,
        n_kv_heads=4,
        n_dense_layers=0,
        n_shared_experts=0,
        shared_expert_size=0,
        ffn_size=0,
        has_qk_norm=True,
    ),
    "dots1": replace(_GROUPED, architecture="dots1", n_kv_heads=4, has_qk_norm=True),
    "llama": replace(DENSE, tied_embeddings=False),
}
"""A small model of each architecture."""
MTP = replace(FAMILY["glm4moe"], n_mtp_layers=1)
"""A model whose file has a layer for multi-token prediction, as GLM-4.5-Air has."""
FILES = {**{name: hp for name, hp in FAMILY.items() if hp.is_moe}, "glm4moe with MTP": MTP}
"""Mixtures of experts as files have them."""


def _mtp_specs(hp: Hyperparameters) -> list[TensorSpec]:
    """Return the tensors that only layers for multi-token prediction have."""
    width, vocabulary = hp.hidden_size, hp.n_vocab
    shapes = {
        "eh_proj": (width, 2 * width),
        "embed_tokens": (vocabulary, width),
        "enorm": (width,),
        "hnorm": (width,),
        "shared_head_head": (vocabulary, width),
        "shared_head_norm": (width,),
    }
    found = []
    for layer in range(hp.n_layers, hp.n_stored_layers):
        for name, shape in shapes.items():
            role = Role.NORM if name.endswith("norm") else Role.OUTPUT
            found.append(TensorSpec(f"blk.{layer}.nextn.{name}.weight", role, layer, shape, (), ()))
    return found


def write_tiny(
    path: Path,
    hp: Hyperparameters,
    dtype: str = "bf16",
    seed: int = 0,
    *,
    as_rows: str = "",
    changes: Mapping[str, Field | None] | None = None,
) -> Path:
    """A model with random weights in `dtype` (f32, f16, bf16), norms and routers in F32; returns `path`.

    `as_rows` names vectors that are written as matrices of one row. `changes` replaces metadata by keys
    without the architecture's prefix; None removes a key. Layers for multi-token prediction have
    the same tensors as others, and those that llama.cpp expects.
    """
    writer = gguf.GGUFWriter(path, hp.architecture)
    writer.add_name("tiny")
    writer.add_file_type({"f32": 0, "f16": 1, "bf16": 32}[dtype])
    stored = replace(hp, n_layers=hp.n_stored_layers)
    if hp.n_mtp_layers:
        writer.add_uint32(f"{hp.architecture}.nextn_predict_layers", hp.n_mtp_layers)
    changed = {f"{hp.architecture}.{key}": field for key, field in (changes or {}).items()}
    for key, field in {**metadata_of(stored), **changed}.items():
        if field is not None:
            writer.add_key_value(key, field.value, field.type, field.item_type)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-llm")
    writer.add_token_list([f"t{number}" for number in range(hp.n_vocab)])
    writer.add_token_types([1] * hp.n_vocab)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    generator = np.random.default_rng(seed)
    for spec in (*tensor_specs(stored), *_mtp_specs(hp)):
        weights = generator.standard_normal(spec.shape, np.float32) * np.float32(0.05)
        if as_rows and as_rows in spec.name:
            weights = weights[np.newaxis]
        if spec.role in UNQUANTIZED_ROLES or dtype == "f32":
            writer.add_tensor(spec.name, weights)
        elif dtype == "f16":
            writer.add_tensor(spec.name, weights.astype(np.float16))
        else:
            bits = (weights.view(np.uint32) >> 16).astype(np.uint16)
            writer.add_tensor(
                spec.name, bits.view(np.uint8), raw_shape=bits.view(np.uint8).shape, raw_dtype=GgmlType.BF16
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def patch_weight(path: Path, tensor: str, index: int, value: float) -> None:
    """Overwrite one weight of an F32, F16 or BF16 tensor in place; `index` counts weights."""
    info = read_gguf(path).tensors[tensor]
    one = np.float32(value)
    to_bytes: dict[GgmlType, Callable[[], bytes]] = {
        GgmlType.F32: one.tobytes,
        GgmlType.F16: lambda: np.float16(one).tobytes(),
        GgmlType.BF16: lambda: one.tobytes()[2:],
    }
    raw = to_bytes[info.type]()
    with path.open("r+b") as file:
        file.seek(info.offset + index * len(raw))
        file.write(raw)
