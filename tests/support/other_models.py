"""Tiny random GGUF models of architectures that no table here describes. llama.cpp runs them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from dsmoe_local.model.gguf_file import read_gguf
from support.models import tiny_model

WIDTH, HEADS, KV_HEADS, HEAD, FFN, EXPERTS = 64, 4, 2, 16, 96, 4
WINDOW = 16
"""Tokens that layers with sliding window attention see."""

Shapes = Mapping[str, tuple[int, ...]]
_KEYS: Mapping[str, int | float] = {
    "context_length": 256,
    "embedding_length": WIDTH,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
_QKV: Shapes = {
    "attn_q.weight": (HEADS * HEAD, WIDTH),
    "attn_k.weight": (KV_HEADS * HEAD, WIDTH),
    "attn_v.weight": (KV_HEADS * HEAD, WIDTH),
}
_BIASES: Shapes = {name.replace("weight", "bias"): shape[:1] for name, shape in _QKV.items()}
_FFN: Shapes = {
    "ffn_gate.weight": (FFN, WIDTH),
    "ffn_up.weight": (FFN, WIDTH),
    "ffn_down.weight": (WIDTH, FFN),
}
_ATTENTION: Shapes = {
    "attn_norm.weight": (WIDTH,),
    **_QKV,
    "attn_output.weight": (WIDTH, HEADS * HEAD),
    "ffn_norm.weight": (WIDTH,),
}
_QK_NORMS: Shapes = {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
_EXPERTS: Shapes = {
    "ffn_gate_inp.weight": (EXPERTS, WIDTH),
    "ffn_gate_exps.weight": (EXPERTS, 32, WIDTH),
    "ffn_up_exps.weight": (EXPERTS, 32, WIDTH),
    "ffn_down_exps.weight": (EXPERTS, WIDTH, 32),
}
_SCALES: Shapes = {f"ffn_{part}_exps.scale": (EXPERTS,) for part in ("gate", "up", "down")}
_LATENT: Shapes = {
    "attn_norm.weight": (WIDTH,),
    "attn_q_a.weight": (24, WIDTH),
    "attn_q_a_norm.weight": (24,),
    "attn_q_b.weight": (HEADS * 24, 24),
    "attn_kv_a_mqa.weight": (40, WIDTH),
    "attn_kv_a_norm.weight": (32,),
    "attn_k_b.weight": (HEADS, 32, 16),
    "attn_v_b.weight": (HEADS, 12, 32),
    "attn_output.weight": (WIDTH, HEADS * 12),
    "ffn_norm.weight": (WIDTH,),
}
_FUSED_EXPERTS: Shapes = {
    "ffn_gate_inp.weight": (EXPERTS, WIDTH),
    "ffn_gate_up_exps.weight": (EXPERTS, 64, WIDTH),
    "ffn_down_exps.weight": (EXPERTS, WIDTH, 32),
    "ffn_gate_shexp.weight": (32, WIDTH),
    "ffn_up_shexp.weight": (32, WIDTH),
    "ffn_down_shexp.weight": (WIDTH, 32),
}
_SINKS: Shapes = {
    "attn_sinks.weight": (HEADS,),
    "attn_output.bias": (WIDTH,),
    "ffn_gate_inp.bias": (EXPERTS,),
    "ffn_gate_exps.bias": (EXPERTS, 32),
    "ffn_up_exps.bias": (EXPERTS, 32),
    "ffn_down_exps.bias": (EXPERTS, WIDTH),
    "post_attention_norm.weight": (WIDTH,),
}
_MAMBA: Shapes = {
    "attn_norm.weight": (WIDTH,),
    "ssm_in.weight": (4 * WIDTH, WIDTH),
    "ssm_conv1d.weight": (2 * WIDTH, 4),
    "ssm_conv1d.bias": (2 * WIDTH,),
    "ssm_x.weight": (8 + 2 * 16, 2 * WIDTH),
    "ssm_dt.weight": (2 * WIDTH, 8),
    "ssm_dt.bias": (2 * WIDTH,),
    "ssm_a": (2 * WIDTH, 16),
    "ssm_d": (2 * WIDTH,),
    "ssm_out.weight": (WIDTH, 2 * WIDTH),
}
_CONVOLUTION: Shapes = {
    "attn_norm.weight": (WIDTH,),
    "shortconv.conv.weight": (WIDTH, 3),
    "shortconv.in_proj.weight": (3 * WIDTH, WIDTH),
    "shortconv.out_proj.weight": (WIDTH, WIDTH),
    "ffn_norm.weight": (WIDTH,),
    **_FFN,
}
_MOE_KEYS = {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": 32}


@dataclass(frozen=True)
class Other:
    """A kind of model: the tensors of each layer, the keys that differ from the usual ones, tied or not."""

    architecture: str
    layers: tuple[Shapes, ...]
    keys: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = True
    final_norm: str = "output_norm.weight"


OTHERS: Mapping[str, Other] = {
    "llama with biases": Other("llama", ({**_ATTENTION, **_BIASES, **_FFN},) * 3, tied=False),
    "mixtral": Other("llama", ({**_ATTENTION, **_EXPERTS},) * 3, {**_MOE_KEYS, "feed_forward_length": 32}),
    "qwen2": Other("qwen2", ({**_ATTENTION, **_BIASES, **_FFN},) * 3),
    "qwen3": Other("qwen3", ({**_ATTENTION, **_QK_NORMS, **_FFN},) * 3),
    "qwen3moe with scales": Other(
        "qwen3moe", ({**_ATTENTION, **_QK_NORMS, **_EXPERTS, **_SCALES},) * 3, _MOE_KEYS
    ),
    "deepseek2 with fused experts": Other(
        "deepseek2",
        ({**_LATENT, **_FUSED_EXPERTS},) * 3,
        {
            **_MOE_KEYS,
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": 24,
            "attention.kv_lora_rank": 32,
            "attention.key_length": 40,
            "attention.value_length": 32,
            "attention.key_length_mla": 24,
            "attention.value_length_mla": 12,
            "rope.dimension_count": 8,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.0,
        },
    ),
    "phi3": Other(
        "phi3",
        (
            {
                "attn_norm.weight": (WIDTH,),
                "attn_qkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD, WIDTH),
                "attn_output.weight": (WIDTH, WIDTH),
                "ffn_norm.weight": (WIDTH,),
                "ffn_up.weight": (2 * FFN, WIDTH),
                "ffn_down.weight": (WIDTH, FFN),
            },
        )
        * 3,
        {"rope.dimension_count": HEAD},
    ),
    "gemma3": Other(
        "gemma3",
        (
            {
                **_ATTENTION,
                **_QK_NORMS,
                **_FFN,
                "post_attention_norm.weight": (WIDTH,),
                "post_ffw_norm.weight": (WIDTH,),
            },
        )
        * 6,
        {"attention.sliding_window": WINDOW, "attention.key_length": HEAD, "attention.value_length": HEAD},
    ),
    "gpt-oss": Other(
        "gpt-oss",
        (
            {
                **{k: v for k, v in _ATTENTION.items() if k != "ffn_norm.weight"},
                **_BIASES,
                **_EXPERTS,
                **_SINKS,
            },
        )
        * 4,
        {**_MOE_KEYS, "attention.sliding_window": WINDOW, "rope.dimension_count": HEAD},
        tied=False,
    ),
    "mamba": Other(
        "mamba",
        (_MAMBA,) * 3,
        {
            "attention.head_count": 0,
            "attention.head_count_kv": None,
            "feed_forward_length": 0,
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 2 * WIDTH,
            "ssm.state_size": 16,
            "ssm.time_step_rank": 8,
        },
    ),
    "lfm2": Other(
        "lfm2",
        (_CONVOLUTION, {**_ATTENTION, **_QK_NORMS, **_FFN}, _CONVOLUTION),
        {"attention.head_count_kv": [0, KV_HEADS, 0], "shortconv.l_cache": 3},
        final_norm="token_embd_norm.weight",
    ),
    "lfm2 with a window": Other(
        "lfm2",
        (_CONVOLUTION, {**_ATTENTION, **_QK_NORMS, **_FFN}, _CONVOLUTION),
        {
            "attention.head_count_kv": [0, KV_HEADS, 0],
            "shortconv.l_cache": 3,
            "attention.sliding_window": WINDOW,
        },
        final_norm="token_embd_norm.weight",
    ),
}


def write_other(path: Path, name: str, **keys: Any) -> Path:
    """Write a model with the vocabulary of `tiny_model`. `keys` are added, or left out if None."""
    kind = OTHERS[name]
    writer = gguf.GGUFWriter(path, kind.architecture)
    writer.add_name("tiny")
    given = {**_KEYS, "block_count": len(kind.layers), **kind.keys, **keys}
    put: Mapping[type, Callable[[str, Any], None]] = {
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
        bool: writer.add_bool,
    }
    for key, value in given.items():
        if value is not None:
            put[type(value)](f"{kind.architecture}.{key}", value)
    for key, stored in read_gguf(tiny_model()).metadata.items():
        if key.startswith("tokenizer."):
            writer.add_key_value(key, stored.value, stored.type, stored.item_type)
    n_vocab = len(read_gguf(tiny_model()).get("tokenizer.ggml.tokens"))
    shapes = {"token_embd.weight": (n_vocab, WIDTH), kind.final_norm: (WIDTH,)}
    if not kind.tied:
        shapes["output.weight"] = (n_vocab, WIDTH)
    for layer, of_layer in enumerate(kind.layers):
        shapes |= {f"blk.{layer}.{tensor}": shape for tensor, shape in of_layer.items()}
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    for tensor, shape in shapes.items():
        values = generator.standard_normal(shape, np.float32)
        if tensor.endswith("ssm_a"):
            values = -np.exp(0.5 * values)
        elif len(shape) == 1:
            values = (0.1 if tensor.endswith(("bias", "sinks.weight")) else 1.0) + 0.1 * values
        else:
            values *= 0.3 if tensor.startswith("token_embd") else 1.5 * shape[-1] ** -0.5
        writer.add_tensor(tensor, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
