"""Read the outline of a GGUF model of any architecture, and refuse models that do not generate text.

llama.cpp checks the tensors of these models itself. Values on which it aborts whatever the architecture
(src/llama-model.cpp: load_hparams) are refused here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from gguf.constants import GGUFValueType

from dsmoe_local.base.errors import FormatError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.architectures.common import MAX_EXPERTS, MAX_LAYERS
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import GgufFile
from dsmoe_local.model.gguf_keys import Keys
from dsmoe_local.model.hyperparameters import ModelOutline

NOT_WEIGHTS = frozenset(
    kind for kind in GgmlType if kind.name in {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}
)
"""Types that llama.cpp cannot multiply with."""

_MAX_WIDTH = 1 << 24
_ROPE_SCALING = ("none", "linear", "yarn", "longrope")
_EMBEDDING = "an embedding model, which computes vectors and no text"
_PART = "a part of another model"
_NOT_GENERATING: Mapping[str, str] = {
    **dict.fromkeys(
        ("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3",
         "eurobert", "gemma-embedding", "llama-embed"),
        _EMBEDDING,
    ),
    **dict.fromkeys(("t5", "t5encoder"), "a model with an encoder"),
    **dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), "a diffusion model"),
    **dict.fromkeys(("wavtokenizer-dec", "qwen3tts", "pockettts"), "a speech model"),
    **dict.fromkeys(("eagle3", "dflash", "gemma4-assistant"), "a draft model for speculative decoding"),
    "clip": "the vision or audio part of another model",
}  # fmt: skip
_NOT_MODELS: Mapping[object, str] = {
    "adapter": "a LoRA adapter",
    "mmproj": _NOT_GENERATING["clip"],
    "vocab": "a vocabulary without weights",
}


def architecture_of(file: GgufFile) -> str:
    """Return the name of a file's architecture. Raises FormatError if the file is not a model."""
    name = file.get("general.architecture")
    kind = file.get("general.type")
    if name is None and kind == "imatrix":
        raise FormatError(
            "this is an importance matrix, not a model",
            where=file.path,
            remedy="use it with dsmoe-quantize --imatrix",
        )
    if isinstance(kind, str) and kind in _NOT_MODELS:
        raise _not_generating(file, _NOT_MODELS[kind])
    if not isinstance(name, str) or not name:
        raise FormatError(
            "the file does not name the model's architecture",
            where=f"{file.path}: general.architecture",
            remedy="convert the model again",
        )
    return name


def outline_of(file: GgufFile) -> ModelOutline:
    """Return the outline of a model. Raises FormatError if llama.cpp cannot generate text with it."""
    name = architecture_of(file)
    if name in _NOT_GENERATING:
        raise _not_generating(file, _NOT_GENERATING[name])
    keys = Keys(file, name)
    if not file.tensors:
        raise FormatError("the file has no weights", where=file.path, remedy="use a complete file")
    _check_graph(file, keys)
    _check_values(file)
    n_stored = keys.integer("block_count", 1, MAX_LAYERS)
    n_experts, n_used = _experts(keys, n_stored)
    n_mtp = keys.integer("nextn_predict_layers", 0, n_stored - 1, 0)
    return ModelOutline(
        architecture=name,
        n_layers=n_stored - n_mtp,
        n_vocab=keys.vocabulary_size(),
        n_context=keys.integer("context_length", 1, 1 << 28),
        n_routed_experts=n_experts,
        n_experts_per_token=n_used,
        tied_embeddings="output.weight" not in file.tensors,
        name=safe_line(str(file.get("general.name", "")), 100),
        cache_columns=_cache_columns(keys, n_stored),
        n_mtp_layers=n_mtp,
    )


def scales_rope(file: GgufFile) -> bool:
    """Return True if a model scales rotary positions for a longer context. llama.cpp scales by a factor
    without a type, too.
    """
    prefix = f"{architecture_of(file)}.rope.scaling"
    usual = "linear" if file.get(f"{prefix}.factor") else "none"
    return bool(file.get(f"{prefix}.type", usual) != "none")


def _not_generating(file: GgufFile, what: str) -> FormatError:
    return FormatError(f"this is {what}", where=file.path, remedy="use a model that generates text")


def _check_graph(file: GgufFile, keys: Keys) -> None:
    """Refuse keys with which llama.cpp computes embeddings or classes instead of text."""
    pooling = keys.integer("pooling_type", 0, 1 << 31, 0)
    width = keys.integer("embedding_length", 1, _MAX_WIDTH)
    is_embedding = (
        not keys.flag("attention.causal", True)
        or pooling
        or keys.integer("embedding_length_out", 0, 1 << 31, width) != width
    )
    if is_embedding or file.get(f"{keys.prefix}.classifier.output_labels") is not None:
        raise _not_generating(file, _EMBEDDING)
    scaling = file.get(f"{keys.prefix}.rope.scaling.type", "none")
    if scaling not in _ROPE_SCALING:
        keys.refuse(f"{keys.prefix}.rope.scaling.type", scaling, ", ".join(_ROPE_SCALING))


def _check_values(file: GgufFile) -> None:
    """Refuse numbers and tensors with which no graph can compute."""
    for key, field in file.metadata.items():
        if field.type is GGUFValueType.FLOAT32 and not math.isfinite(field.value):
            raise FormatError(
                f"{safe_line(key, 60)} = {field.value} is not valid",
                where=file.path,
                remedy="a finite number is needed; convert the model again",
            )
    for name, info in file.tensors.items():
        # A table of numbers may be I32. Vectors are added to or multiplied with F32.
        is_table = info.type is GgmlType.I32 and len(info.shape) > 1
        is_vector = len(info.shape) == 1 and info.type is not GgmlType.F32
        if is_vector or (info.type in NOT_WEIGHTS and not is_table):
            raise FormatError(
                f"the tensor {safe_line(name, 60)} must not have the type {info.type.name}",
                where=file.path,
                remedy="convert the model again",
            )


def _experts(keys: Keys, n_layers: int) -> tuple[int, int]:
    """Return the numbers of routed experts, and of those that a token uses."""
    n_experts = keys.integer("expert_count", 0, MAX_EXPERTS, 0)
    n_used = max(keys.integers("expert_used_count", n_layers, n_experts, [0]))
    n_groups = keys.integer("expert_group_count", 0, max(0, n_experts - 1), 0)
    if n_experts and not n_used:
        keys.refuse(f"{keys.prefix}.expert_used_count", n_used, f"a number from 1 to {n_experts}")
    if n_groups > 1:
        keys.integer("expert_group_used_count", 1, n_groups - 1)
        if n_experts % n_groups:
            keys.refuse(f"{keys.prefix}.expert_group_count", n_groups, f"a divisor of {n_experts}")
    return n_experts, n_used


def _cache_columns(keys: Keys, n_layers: int) -> tuple[int, int]:
    """Return `ModelOutline.cache_columns`, at most: layers may have narrower heads than most, or none."""
    heads = keys.integers("attention.head_count", n_layers, _MAX_WIDTH, [0])
    total = sum(keys.integers("attention.head_count_kv", n_layers, _MAX_WIDTH, heads))
    usual = keys.integer("embedding_length", 1, _MAX_WIDTH) // max(1, *heads)
    sizes = (keys.integer(f"attention.{part}_length", 0, _MAX_WIDTH, usual) for part in ("key", "value"))
    n_keys, n_values = (size * total for size in sizes)
    return n_keys, n_values
