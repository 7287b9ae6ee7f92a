"""Read and check the hyper-parameters and tensors of a GGUF model before native code opens the file.

The architectures `deepseek` and `llama` are supported. llama.cpp aborts on several of the values that are
refused here, and computes wrong results with others (src/llama-model.cpp).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
from gguf.constants import ExpertGatingFuncType, GGUFValueType

from dsmoe_local.base.errors import FormatError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import Field, GgufFile
from dsmoe_local.model.gguf_split import read_parts
from dsmoe_local.model.gguf_vocabulary import check_vocabulary
from dsmoe_local.model.hyperparameters import ARCHITECTURES, Architecture, Hyperparameters, RopeScaling
from dsmoe_local.model.layout import IGNORED_TENSORS, Role, tensor_specs

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 512  # LLAMA_MAX_EXPERTS

_NOT_WEIGHTS = frozenset(
    kind for kind in GgmlType if kind.name in {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}
)
# Keys that select another graph, with the values that do not. The first value is llama.cpp's default.
_GRAPH_KEYS: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "classifier.output_labels": (None,),
    "embedding_length_out": (None,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
}
_LLAMA_BIASES = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.bias")


def read_model(path: Path) -> tuple[GgufFile, Hyperparameters]:
    """Return the header and hyper-parameters of a model. `path` is its file, or the first if it is split.

    Raises FileError if it cannot be read. Raises FormatError if its structure, a value, a tensor's shape or
    the vocabulary is not what the architecture needs.
    """
    file = read_parts(path)
    hp = hyperparameters_of(file)
    _check_tensors(file, hp)
    check_vocabulary(file)
    return file, hp


def hyperparameters_of(file: GgufFile) -> Hyperparameters:
    """Return the hyper-parameters in a file's metadata.

    Raises FormatError if one is missing or out of range.
    """
    return _Metadata(file).hyperparameters()


class _Metadata:
    """Typed, range-checked access to the keys of one architecture."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        found = file.get("general.architecture")
        if found is None and file.get("general.type") == "imatrix":
            raise FormatError(
                "this is an importance matrix, not a model",
                where=file.path,
                remedy="use it with dsmoe-quantize --imatrix",
            )
        if found not in ARCHITECTURES:
            raise FormatError(
                f"the architecture {safe_line(str(found), 40)!r} is not supported",
                where=file.path,
                remedy=f"supported: {', '.join(ARCHITECTURES)}",
            )
        self.architecture = cast(Architecture, found)

    def refuse(self, key: str, value: object, accepted: str) -> NoReturn:
        raise FormatError(
            f"{key} = {safe_line(str(value), 60)} is not valid",
            where=self.file.path,
            remedy=f"accepted: {accepted}; convert the model again",
        )

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        key = f"{self.architecture}.{key}"
        field = self.file.metadata.get(key)
        if field is None:
            if default is None:
                self.refuse(key, "(missing)", f"a number from {low} to {high}")
            return default
        if field.type is not GGUFValueType.UINT32 or not low <= field.value <= high:
            self.refuse(key, field.value, f"an unsigned 32-bit number from {low} to {high}")
        return int(field.value)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        key = f"{self.architecture}.{key}"
        field = self.file.metadata.get(key)
        if field is None:
            if default is None:
                self.refuse(key, "(missing)", f"a number from {low:g} to {high:g}")
            return default
        if field.type is not GGUFValueType.FLOAT32 or not math.isfinite(field.value):
            self.refuse(key, field.value, "a finite 32-bit float")
        # For example 1e-06 instead of 9.999999974752427e-07.
        value = shortest_float(field.value)
        if not low <= value <= high:
            self.refuse(key, value, f"a number from {low:g} to {high:g}")
        return value

    def refuse_other_graphs(self) -> None:
        """Refuse keys that select another graph, with which llama.cpp aborts or gives wrong results."""
        for key, accepted in _GRAPH_KEYS.items():
            value = self.file.get(f"{self.architecture}.{key}", accepted[0])
            if value not in accepted:
                self.refuse(f"{self.architecture}.{key}", value, " or ".join(map(str, accepted)))

    def hyperparameters(self) -> Hyperparameters:
        self.refuse_other_graphs()
        n_layers = self.integer("block_count", 1, MAX_LAYERS)
        hidden_size = self.integer("embedding_length", 1, 1 << 20)
        n_heads = self.integer("attention.head_count", 1, 1024)
        n_kv_heads = self.integer("attention.head_count_kv", 1, n_heads, n_heads)
        head_dim = self.integer("attention.key_length", 2, 4096, max(2, hidden_size // n_heads))
        prefix = self.architecture
        if n_heads % n_kv_heads:
            self.refuse(f"{prefix}.attention.head_count_kv", n_kv_heads, f"a divisor of {n_heads}")
        value_dim = self.integer("attention.value_length", 2, 4096, head_dim)
        if value_dim != head_dim:
            self.refuse(f"{prefix}.attention.value_length", value_dim, f"the head size, {head_dim}")
        if self.architecture == "deepseek" and head_dim * n_heads != hidden_size:
            self.refuse(f"{prefix}.attention.head_count", n_heads, f"embedding_length / head size {head_dim}")
        n_rotary = self.integer("rope.dimension_count", 1, 4096, head_dim)
        if n_rotary != head_dim or head_dim % 2:
            self.refuse(
                f"{prefix}.rope.dimension_count", n_rotary, f"the head size, {head_dim}, if it is even"
            )
        return Hyperparameters(
            architecture=self.architecture,
            n_layers=n_layers,
            hidden_size=hidden_size,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            ffn_size=self.integer("feed_forward_length", 0, 1 << 22, 0),
            n_vocab=self.vocabulary_size(),
            n_context=self.integer("context_length", 1, 1 << 28),
            rms_norm_eps=self.number("attention.layer_norm_rms_epsilon", 1e-12, 1.0),
            rope_theta=self.number("rope.freq_base", 1e-3, 1e12, 10000.0),
            rope_scaling=self.rope_scaling(),
            tied_embeddings="output.weight" not in self.file.tensors,
            name=safe_line(str(self.file.get("general.name", "")), 100),
            **self.experts(n_layers),
        )

    def vocabulary_size(self) -> int:
        """Return the number of tokens. `check_vocabulary` checks that they are strings."""
        tokens = self.file.get("tokenizer.ggml.tokens", [])
        if not isinstance(tokens, list):
            self.refuse("tokenizer.ggml.tokens", tokens, "a list")
        return len(tokens)

    def experts(self, n_layers: int) -> dict[str, Any]:
        """Return the arguments of Hyperparameters that describe experts."""
        if self.architecture == "llama":
            if n_experts := self.integer("expert_count", 0, MAX_EXPERTS, 0):
                self.refuse("llama.expert_count", n_experts, "0; experts need the architecture deepseek")
            return {"n_dense_layers": n_layers}
        n_experts = self.integer("expert_count", 1, MAX_EXPERTS)
        gating = self.integer("expert_gating_func", 0, 255, 0)
        if gating not in (0, ExpertGatingFuncType.SOFTMAX):
            self.refuse("deepseek.expert_gating_func", gating, "1 (softmax)")
        if self.file.get("deepseek.expert_weights_norm", False):
            self.refuse("deepseek.expert_weights_norm", True, "false")
        return {
            "n_dense_layers": self.integer("leading_dense_block_count", 0, n_layers - 1, 0),
            "n_routed_experts": n_experts,
            "n_shared_experts": self.integer("expert_shared_count", 1, MAX_EXPERTS),
            "n_experts_per_token": self.integer("expert_used_count", 1, n_experts),
            "expert_size": self.integer("expert_feed_forward_length", 1, 1 << 20),
            "routed_scaling_factor": self.number("expert_weights_scale", 0.0, 1e6, 1.0) or 1.0,
        }

    def rope_scaling(self) -> RopeScaling | None:
        prefix = f"{self.architecture}.rope"
        old_factor = self.number("rope.scale_linear", 0.0, 1e6, 0.0)
        if old_factor not in (0.0, 1.0):
            self.refuse(f"{prefix}.scale_linear", old_factor, "the key rope.scaling.factor in its place")
        # llama.cpp reads all of these keys whatever the type is, and scales linearly if there is no type.
        factor = self.number("rope.scaling.factor", 1e-3, 1e6, 0.0)
        magnitude = self.number("rope.scaling.attn_factor", 1e-6, 1e6, 1.0)
        context = self.integer("rope.scaling.original_context_length", 1, 1 << 28, 0)
        kind = self.file.get(f"{prefix}.scaling.type", "linear" if factor else "none")
        if kind not in ("none", "linear", "yarn"):
            self.refuse(f"{prefix}.scaling.type", kind, "none, linear, yarn")
        if kind != "none" and not factor:
            self.refuse(f"{prefix}.scaling.factor", "(missing)", "a number above 0")
        if kind == "yarn" and not context:
            self.refuse(f"{prefix}.scaling.original_context_length", "(missing)", "a number above 0")
        if kind != "yarn" and magnitude != 1:
            self.refuse(f"{prefix}.scaling.attn_factor", magnitude, "1, except for yarn")
        if kind == "yarn":
            return RopeScaling("yarn", factor, context, magnitude)
        return RopeScaling("linear", factor) if kind == "linear" else None


def _check_tensors(file: GgufFile, hp: Hyperparameters) -> None:
    """Raise FormatError unless the file has exactly the tensors that the graph needs, in their shapes."""
    specs = {spec.name: spec for spec in tensor_specs(hp)}
    remedy = "the tensors do not match the file's metadata; convert the model again"
    for name, spec in specs.items():
        info = file.tensors.get(name)
        if info is None:
            raise FormatError(f"the tensor {name} is missing", where=file.path, remedy=remedy)
        if info.shape != spec.shape:
            raise FormatError(
                f"the tensor {name} has the shape {info.shape}, not {spec.shape}",
                where=file.path,
                remedy=remedy,
            )
        if info.type in _NOT_WEIGHTS or (spec.role is Role.NORM and info.type is not GgmlType.F32):
            raise FormatError(
                f"the tensor {name} must not have the type {info.type.name}",
                where=file.path,
                remedy=remedy,
            )
    for name, info in file.tensors.items():
        optional = IGNORED_TENSORS.fullmatch(name) or (
            hp.architecture == "llama" and _LLAMA_BIASES.fullmatch(name)
        )
        if name not in specs and not (optional and info.type is GgmlType.F32):
            raise FormatError(
                f"the tensor {safe_line(name, 60)} is not part of a {hp.architecture} model",
                where=file.path,
                remedy=remedy,
            )


def shortest_float(value: float) -> float:
    """Return the number with the fewest decimal digits that rounds to the same 32-bit float."""
    return float(str(np.float32(value)))


def metadata_of(hp: Hyperparameters) -> dict[str, Field]:
    """Return the metadata keys of the architecture, in the order in which they are written.

    The converter adds `general.*` and `tokenizer.*`.
    """
    prefix = hp.architecture

    def count(value: int) -> Field:
        return Field(value, GGUFValueType.UINT32)

    def number(value: float) -> Field:
        return Field(value, GGUFValueType.FLOAT32)

    fields = {
        "block_count": count(hp.n_layers),
        "context_length": count(hp.n_context),
        "embedding_length": count(hp.hidden_size),
        "feed_forward_length": count(hp.ffn_size),
        "attention.head_count": count(hp.n_heads),
        "attention.head_count_kv": count(hp.n_kv_heads),
        "attention.layer_norm_rms_epsilon": number(hp.rms_norm_eps),
        "rope.dimension_count": count(hp.head_dim),
        "rope.freq_base": number(hp.rope_theta),
        **_rope_fields(hp.rope_scaling),
        "vocab_size": count(hp.n_vocab),
    }
    if hp.is_moe:
        fields |= {
            "leading_dense_block_count": count(hp.n_dense_layers),
            "expert_count": count(hp.n_routed_experts),
            "expert_used_count": count(hp.n_experts_per_token),
            "expert_shared_count": count(hp.n_shared_experts),
            "expert_feed_forward_length": count(hp.expert_size),
            "expert_weights_scale": number(hp.routed_scaling_factor),
            "expert_gating_func": count(ExpertGatingFuncType.SOFTMAX),
        }
    return {f"{prefix}.{key}": field for key, field in fields.items()}


def _rope_fields(scaling: RopeScaling | None) -> Mapping[str, Field]:
    if scaling is None:
        return {"rope.scaling.type": Field("none", GGUFValueType.STRING)}
    fields = {
        "rope.scaling.type": Field(scaling.kind, GGUFValueType.STRING),
        "rope.scaling.factor": Field(scaling.factor, GGUFValueType.FLOAT32),
    }
    if scaling.kind == "yarn":
        fields |= {
            "rope.scaling.original_context_length": Field(scaling.original_context, GGUFValueType.UINT32),
            "rope.scaling.attn_factor": Field(scaling.attention_factor, GGUFValueType.FLOAT32),
        }
    return fields
