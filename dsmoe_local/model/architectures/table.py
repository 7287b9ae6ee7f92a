"""The form of the table: what one GGUF architecture is made of.

An `Architecture` is data. Everything that depends on it (reading config.json and GGUF files, conversion,
quantization, costs, placement) reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, TypeAlias

from dsmoe_local.model.hyperparameters import Hyperparameters

REQUIRED: Final = object()
"""The default of parameters that must be given."""

Values: TypeAlias = Mapping[str, Any]
"""Fields of Hyperparameters that have been read."""


class Order(StrEnum):
    """How the rows that are taken of a block are ordered."""

    PLAIN = "plain"
    PAIRS = "pairs"
    """Rows i and i + n/2 become rows 2i and 2i + 1: Hugging Face rotates the two halves of a head, and
    llama.cpp adjacent pairs in some architectures (LLAMA_ROPE_TYPE_NORM)."""
    TRANSPOSED = "transposed"


@dataclass(frozen=True, slots=True)
class Blocks:
    """A tensor's source is `count` blocks of rows, and each block consists of `parts`, of which one is taken.

    `count` and `parts` name attributes of Hyperparameters; `part` is the index of the part that is taken.
    """

    count: str
    parts: tuple[str, ...]
    part: int = 0
    order: Order = Order.PLAIN


@dataclass(frozen=True, slots=True)
class Fused:
    """Another source of a tensor, for checkpoints that store all experts of a layer in one 3-D tensor."""

    source: str
    blocks: Blocks | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor, or one for each layer.

    `name` and `source` are the GGUF and the Hugging Face name without the prefix of the layer; `{e}` is the
    expert's index. `shape` names attributes of Hyperparameters, slowest dimension first. A tensor exists if
    no dimension is 0 and the attribute `when`, if given, is true, and `unless` is not. `is_row`: the
    source of this vector is a matrix of one row.
    """

    name: str
    source: str
    shape: tuple[str, ...]
    blocks: Blocks | None = None
    fused: Fused | None = None
    when: str = ""
    unless: str = ""
    is_row: bool = False


@dataclass(frozen=True, slots=True)
class Parameter:
    """One hyper-parameter: where it is stored, and which values it may have.

    `field` is an attribute of Hyperparameters. If it is a property, files have the key and it is checked, not
    read. `config` is the key in config.json, and `gguf` the key in GGUF files without the prefix of the
    architecture; "" if it has none there. `tensor`: in GGUF files the field is true if a layer has the tensor
    of this name. `default` is the value of a missing key, or a function of the fields before it;
    `gguf_default` is that of GGUF files, where it differs. `words` are the accepted values in config.json and
    what they mean. The key is not written to a GGUF file if the value is `omitted`. `is_absent_if_0`: in a
    GGUF file, 0 is the same as no key.
    """

    field: str
    config: str = ""
    gguf: str = ""
    kind: type = int
    low: float = 1
    high: float = 1 << 31
    default: Any = REQUIRED
    gguf_default: Any = None
    words: Mapping[object, object] | None = None
    tensor: str = ""
    omitted: object = None
    is_absent_if_0: bool = False

    @property
    def is_derived(self) -> bool:
        """True if the value follows from other fields."""
        return self.field not in Hyperparameters.__dataclass_fields__


Check: TypeAlias = Callable[[Hyperparameters], tuple[str, str] | None]
"""Returns None if a model's hyper-parameters go together; otherwise a field and its accepted values."""


@dataclass(frozen=True, slots=True)
class ModelClass:
    """A class of transformers whose checkpoints have this architecture.

    `model_type` and `name` are what config.json has in `model_type` and `architectures`. `defaults` are the
    values that its configuration has for keys that config.json lacks, where they are not those of the
    architecture. `config_values` are as in Architecture, for this class alone.
    """

    model_type: str
    name: str
    defaults: Mapping[str, object] = field(default_factory=dict)
    config_values: Mapping[str, tuple[object, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture of GGUF files.

    `name` is its `general.architecture`. Layers have the tensors of
    `every_layer`, and those of `dense_layer` or `moe_layer`. `constants` are fields that llama.cpp's graph
    implies. `config_values` are keys of config.json with the values that llama.cpp's graph implements; it
    would ignore any other. `gguf_values` are the same for GGUF files, the first being llama.cpp's default.
    `ignored` matches tensors of GGUF files that the table does not describe, and `ignored_sources` those of
    checkpoints. `has_mtp_layers`: files may have layers for multi-token prediction after the others.
    `yarn_scales_attention`: with YaRN, the model has DeepSeek-V2's `mscale_all_dim`.
    `rotates_adjacent_values`: each angle of RoPE rotates two adjacent values of a head, as stored in GGUF
    files (LLAMA_ROPE_TYPE_NORM); otherwise it rotates two that are half of the rotated part apart.
    """

    name: str
    classes: tuple[ModelClass, ...]
    model: tuple[Rule, ...]
    every_layer: tuple[Rule, ...]
    dense_layer: tuple[Rule, ...]
    moe_layer: tuple[Rule, ...]
    parameters: tuple[Parameter, ...]
    constants: Values
    config_values: Mapping[str, tuple[object, ...]]
    gguf_values: Mapping[str, tuple[object, ...]]
    checks: tuple[Check, ...]
    ignored: re.Pattern[str] | None = None
    ignored_sources: re.Pattern[str] | None = None
    has_mtp_layers: bool = False
    yarn_scales_attention: bool = False
    rotates_adjacent_values: bool = False
