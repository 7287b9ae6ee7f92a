"""How config.json describes rotary positions, and how they are scaled beyond the trained context."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dsmoe_local.model.architectures.table import Architecture
from dsmoe_local.model.hyperparameters import RopeScaling
from dsmoe_local.model.json_object import JsonObject

_OBJECTS = ("rope_parameters", "rope_scaling")
AT_TOP = ("rope_theta", "partial_rotary_factor")
"""Keys that may be in that object or at the top level."""
_KEYS = frozenset(
    {
        *AT_TOP,
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "rope_type",
        "truncate",
        "type",
    }
)

# llama.cpp does not read these keys and uses these values.
_YARN_VALUES: Mapping[str, tuple[object, ...]] = {
    "beta_fast": (32, None),
    "beta_slow": (1, None),
    "truncate": (True, None),
}
_MSCALE_VALUES: Mapping[str, tuple[object, ...]] = {
    "mscale": (1, None),
    "mscale_all_dim": (1, 0, None),
}


def rope_object(config: JsonObject) -> Mapping[str, Any]:
    """Return the object that describes rotary positions. It takes precedence over the top level.

    transformers 5 renamed it, and moved keys into it. Raises FormatError if there are two that differ.
    """
    found = {}
    for key in _OBJECTS:
        value = config.values.get(key, {})
        if not isinstance(value, dict):
            config.refuse(key, "null or an object")
        for inner in value:
            if inner not in _KEYS:
                JsonObject(config.path, value).refuse(inner, f"in {key}: {', '.join(sorted(_KEYS))}")
        if value:
            found[key] = value
    if len({json.dumps(value, sort_keys=True) for value in found.values()}) > 1:
        config.refuse(_OBJECTS[0], f"the value of {_OBJECTS[1]}, or leave one of them out")
    return next(iter(found.values()), {})


def rope_scaling(config: JsonObject, architecture: Architecture) -> RopeScaling | None:
    """Return how positions are scaled; None if they are not."""
    rope = rope_object(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    inner = JsonObject(config.path, rope)
    read_yarn = _mla_yarn if architecture.yarn_scales_attention else _yarn
    readers: dict[object, Callable[[], RopeScaling | None]] = {
        "default": lambda: None,
        "linear": lambda: RopeScaling("linear", inner.number("factor", 1e-3, 1e6)),
        "yarn": lambda: read_yarn(config, inner),
    }
    if architecture.yarn_scales_attention:
        # llama.cpp scales attention by YaRN's magnitude with any kind of scaling.
        del readers["linear"]
    if not isinstance(kind, str) or kind not in readers:
        key = next(key for key in _OBJECTS if config.values.get(key))
        config.refuse(key, "null, or rope_type " + " or ".join(f'"{word}"' for word in readers))
    return readers[kind]()


def _original_context(config: JsonObject, rope: JsonObject) -> int:
    context = config.integer("max_position_embeddings", 1, 1 << 28)
    outer = config.integer("original_max_position_embeddings", 1, 1 << 28, context)
    return rope.integer("original_max_position_embeddings", 1, 1 << 28, outer)


def _yarn(config: JsonObject, rope: JsonObject) -> RopeScaling:
    rope.require({**_YARN_VALUES, **_MSCALE_VALUES})
    scaling = RopeScaling("yarn", rope.number("factor", 1e-3, 1e6), _original_context(config, rope))
    # If both are given and equal, they cancel, as in transformers.
    cancelled = bool(rope.values.get("mscale") and rope.values.get("mscale_all_dim"))
    default = 1.0 if cancelled else scaling.yarn_magnitude
    magnitude = rope.number("attention_factor", 1e-6, 1e6, default)
    # Rounded to the precision of the GGUF file.
    return replace(scaling, attention_factor=float(f"{magnitude / scaling.yarn_magnitude:.7g}"))


def _mla_yarn(config: JsonObject, rope: JsonObject) -> RopeScaling:
    """Read YaRN as DeepSeek-V2 has it: `mscale_all_dim` scales all of queries and keys.

    llama.cpp takes `mscale` to be the same, so that the rotated part is not scaled once more.
    """
    rope.require({**_YARN_VALUES, "attention_factor": (None,)})
    all_dim = rope.number("mscale_all_dim", 1e-3, 100)
    if rope.number("mscale", 1e-3, 100) != all_dim:
        rope.refuse("mscale", f"mscale_all_dim = {all_dim:g}")
    return RopeScaling(
        "yarn", rope.number("factor", 1e-3, 1e6), _original_context(config, rope), mscale_all_dim=all_dim
    )


def rope_values(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Return the object of config.json for a scaling."""
    if scaling is None:
        return None
    rope: dict[str, Any] = {"type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "yarn":
        rope["original_max_position_embeddings"] = scaling.original_context
        if scaling.attention_factor != 1:
            rope["attention_factor"] = scaling.attention_factor * scaling.yarn_magnitude
        if scaling.mscale_all_dim:
            rope |= {"mscale": scaling.mscale_all_dim, "mscale_all_dim": scaling.mscale_all_dim}
    return rope
