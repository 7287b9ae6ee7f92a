"""Tiny random models of transformers, an oracle for conversion: their checkpoints and what they compute."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from support.checkpoints import write_tokenizer

N_VOCAB = 640
_COMMON: Mapping[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_MLA: Mapping[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_V3 = {**_MLA, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
         "beta_fast": 32, "beta_slow": 1}  # fmt: skip
_QWEN = {"num_experts": 8, "num_key_value_heads": 2}
_GLM = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}


@dataclass(frozen=True, slots=True)
class Member:
    """A class of transformers, without `ForCausalLM`, and the values that differ from the common ones.

    `written` are added to the config.json, as the checkpoints on the hub have them.
    """

    name: str
    values: Mapping[str, Any]
    written: Mapping[str, Any]


def _member(name: str, *values: Mapping[str, Any], written: Mapping[str, Any] | None = None) -> Member:
    return Member(name, {key: value for part in values for key, value in part.items()}, written or {})


_NOAUX = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
_LITE = {"q_lora_rank": None, "num_hidden_layers": 27, "hidden_size": 32, "num_attention_heads": 2,
         "num_key_value_heads": 2}  # fmt: skip
MEMBERS: Mapping[str, Member] = {
    "deepseek2 lite": _member("DeepseekV2", _MLA, _LITE),
    "deepseek2 lite, YaRN": _member(
        "DeepseekV2", _MLA, _LITE, {"rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}
    ),
    "deepseek2 query rank": _member("DeepseekV2", _MLA),
    "deepseek2 tied": _member("DeepseekV2", _MLA, {"tie_word_embeddings": True}),
    "deepseek3": _member("DeepseekV3", _V3, written=_NOAUX),
    "deepseek3, words missing": _member("DeepseekV3", _V3),
    "deepseek3 groups": _member("DeepseekV3", _V3, {"n_group": 4, "topk_group": 2}, written=_NOAUX),
    "deepseek3 three dense": _member("DeepseekV3", _V3, {"first_k_dense_replace": 3, "num_hidden_layers": 5}),
    "deepseek3 epsilon": _member("DeepseekV3", _V3, {"rms_norm_eps": 1e-5}),
    "deepseek3 YaRN": _member(
        "DeepseekV3", _V3, {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}
    ),
    "glm4 lite": _member("Glm4MoeLite", _V3, {"mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "qwen2moe": _member("Qwen2Moe", _QWEN, {"shared_expert_intermediate_size": 80}),
    "qwen3moe": _member("Qwen3Moe", _QWEN, {"head_dim": 24, "norm_topk_prob": True}),
    "qwen3moe tied": _member("Qwen3Moe", _QWEN, {"norm_topk_prob": True, "tie_word_embeddings": True}),
    "glm4moe": _member("Glm4Moe", _GLM, {"attention_bias": True}),
    "glm4moe norms, groups": _member("Glm4Moe", _GLM, {"use_qk_norm": True, "n_group": 2}),
    "dots1": _member("Dots1", _V3, {"head_dim": 24, "norm_topk_prob": True, "n_group": 4, "topk_group": 2}),
    "olmoe": _member("Olmoe", {"num_experts": 8, "intermediate_size": 32}),
}


def config_of(member: Member) -> Any:
    """The configuration in transformers."""
    config_class = getattr(transformers, f"{member.name}Config")
    config = config_class(**{**_COMMON, **member.values}, attn_implementation="eager")
    config.architectures = [f"{member.name}ForCausalLM"]
    return config


def tiny_model(member: Member, seed: int = 0) -> Any:
    """A model in float32 with random weights, whose routers are sharp and whose layers all matter."""
    model_class = getattr(transformers, f"{member.name}ForCausalLM")
    torch.manual_seed(seed)
    model = model_class(config_of(member)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            values = torch.randn(tensor.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(0.1 * values)
            elif tensor.ndim == 1:
                tensor.copy_((0.0 if name.endswith("bias") else 1.0) + 0.1 * values)
            else:
                is_router = name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))
                scale = 1.0 if "embed_tokens" in name else tensor.shape[-1] ** -0.5
                tensor.copy_((4.0 if is_router else 1.0) * scale * values)
    return model


def write_member(folder: Path, member: Member, model: Any) -> Path:
    """Save a model as the hub has it, with a tokenizer; returns the folder."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **member.written}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    write_tokenizer(folder)
    return folder


def logits(model: Any, ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits of every position, shape (len(ids), n_vocab)."""
    with torch.no_grad():
        found = model(torch.tensor([list(ids)])).logits[0]
    result: NDArray[np.float32] = found.float().numpy()
    return result


@dataclass(frozen=True, slots=True)
class Routing:
    """What a layer's router computes for all tokens, and the outputs of its experts.

    `probabilities` have the shape (n_tokens, n_experts), `chosen` (n_tokens, n_used), outputs (n_tokens,
    n_embd). Models without shared experts have no `shared`, and few models a `gate` of them.
    """

    probabilities: torch.Tensor
    chosen: torch.Tensor
    routed: torch.Tensor
    shared: torch.Tensor | None
    gate: torch.Tensor | None


def routing(model: Any, ids: Sequence[int]) -> dict[int, Routing]:
    """The routing of a model's layers by their numbers."""
    seen: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
        for name, module in model.named_modules()
        if ".mlp." in name
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    found = {}
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp"
        if f"{prefix}.gate" not in seen:
            continue
        scores, _, chosen = seen[f"{prefix}.gate"]
        is_sigmoid = hasattr(model.get_submodule(f"{prefix}.gate"), "e_score_correction_bias")
        shared = seen.get(f"{prefix}.shared_experts", seen.get(f"{prefix}.shared_expert"))
        gate = seen.get(f"{prefix}.shared_expert_gate")
        gate = None if gate is None else gate.sigmoid().flatten()
        if shared is not None:
            shared = shared.reshape(len(ids), -1) * (1 if gate is None else gate[:, None])
        routed = seen[f"{prefix}.experts"].reshape(len(ids), -1)
        found[layer] = Routing(
            scores.sigmoid() if is_sigmoid else scores.softmax(-1), chosen, routed, shared, gate
        )
    return found
