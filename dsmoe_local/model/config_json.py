"""Read config.json of a checkpoint strictly; write one for the checkpoints that we make.

Values that llama.cpp's graph would ignore are refused: converting such a model would give wrong output. Each
error names the file, the key, its value and the accepted values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmoe_local.base.errors import FormatError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.architectures import ARCHITECTURES
from dsmoe_local.model.architectures.table import REQUIRED, Architecture, ModelClass, Parameter
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.json_object import JsonObject, load_json
from dsmoe_local.model.rope_json import AT_TOP, rope_object, rope_scaling, rope_values

FILE_NAME = "config.json"
_MAX_MTP_LAYERS = 16
_ALIASES = {"num_local_experts": "num_experts", "num_mtp_layers": "num_nextn_predict_layers"}
"""Keys that transformers 5 has renamed."""
_FULL_ATTENTION = "full_attention"
_QUANTIZED = ("quantization_config", "compression_config")
_FP8_VALUES: Mapping[str, tuple[object, ...]] = {
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),  # a static one has more tensors
}
_MAX_BLOCK = 1 << 16
_CLASSES: Mapping[str, tuple[Architecture, ModelClass]] = {
    known.model_type: (architecture, known)
    for architecture in ARCHITECTURES.values()
    for known in architecture.classes
}


def read_config(folder: Path) -> Hyperparameters:
    """Return the hyper-parameters in `folder`/config.json.

    Raises FileError if it cannot be read, FormatError if it is not a model that llama.cpp can run.
    """
    return parse_config(load_json(folder / FILE_NAME), folder / FILE_NAME)


def checkpoint_name(folder: Path) -> str:
    """Return the name of a checkpoint: that of its folder, resolved if the user gave `.`, `..` or `/`."""
    return folder.name if folder.name not in ("", "..") else folder.resolve().name or "model"


def parse_config(values: Mapping[str, Any], path: Path) -> Hyperparameters:
    """Return the hyper-parameters in a parsed config.json. Raises FormatError, whose message has `path`."""
    architecture, known = _class_of(JsonObject(path, values))
    config = JsonObject(path, _with_defaults(JsonObject(path, values), known))
    _weight_block(config)
    config.require({**architecture.config_values, **known.config_values})
    _refuse_windows(config)
    fields: dict[str, Any] = {"n_vocab": config.integer("vocab_size", 1, 1 << 24), **architecture.constants}
    for parameter in architecture.parameters:
        if parameter.config or (parameter.default is not REQUIRED and parameter.field not in fields):
            fields[parameter.field] = _parameter(config, parameter, fields)
    if architecture.has_mtp_layers:
        fields["n_mtp_layers"] = config.integer("num_nextn_predict_layers", 0, _MAX_MTP_LAYERS, 0)
    derived = [parameter.field for parameter in architecture.parameters if parameter.is_derived]
    hp = Hyperparameters(
        architecture=architecture.name,
        rope_scaling=rope_scaling(config, architecture),
        name=checkpoint_name(path.parent),
        **{field: value for field, value in fields.items() if field not in derived},
    )
    named = {parameter.field: parameter.config for parameter in architecture.parameters if parameter.config}
    keys = {"rotary_dim": "partial_rotary_factor", **named}
    for check in architecture.checks:
        if found := check(hp):
            field, accepted = found
            config.refuse(keys.get(field, field), accepted)
    return hp


def _parameter(config: JsonObject, parameter: Parameter, fields: Mapping[str, Any]) -> object:
    """Return the value of one line of the table. `fields` are those that were read before."""
    key = parameter.config
    if (not key or config.values.get(key) is None) and parameter.default is not REQUIRED:
        default = parameter.default
        return default(fields) if callable(default) else default
    if parameter.words is not None:
        if key not in config.values:
            config.refuse(key, " or ".join(json.dumps(word) for word in parameter.words))
        return config.word(key, parameter.words)
    if parameter.kind is bool:
        return config.flag(key)
    if parameter.kind is float:
        return config.number(key, parameter.low, parameter.high)
    return config.integer(key, int(parameter.low), int(parameter.high))


def _with_defaults(config: JsonObject, known: ModelClass) -> dict[str, Any]:
    """Return the values under their usual keys, and the class's defaults of those that are missing."""
    given = {key: value for key, value in config.values.items() if value is not None}
    for new, usual in _ALIASES.items():
        if new in given and given.setdefault(usual, given[new]) != given[new]:
            config.refuse(new, f"the value of {usual}, or leave one of them out")
    rope = {**rope_object(JsonObject(config.path, given))}
    top_level = {key: rope[key] for key in AT_TOP if key in rope}
    dense = _leading_dense(config)
    if dense is not None and given.setdefault("first_k_dense_replace", dense) != dense:
        config.refuse("first_k_dense_replace", f"{dense}, as mlp_layer_types says")
    return {**known.defaults, **given, **top_level}


def _class_of(config: JsonObject) -> tuple[Architecture, ModelClass]:
    """Return the class that `model_type` or `architectures` names."""
    kind, names = config.values.get("model_type"), config.values.get("architectures")
    known = ", ".join(sorted(_CLASSES))
    if kind is None and names is not None:
        found = [pair for pair in _CLASSES.values() if names == [pair[1].name]]
        if not found:
            config.refuse("architectures", ", ".join(sorted({pair[1].name for pair in _CLASSES.values()})))
        return found[0]
    if not isinstance(kind, str) or kind not in _CLASSES:
        config.refuse("model_type", known)
    architecture, model_class = _CLASSES[kind]
    if names is not None and names != [model_class.name]:
        config.refuse("architectures", f'["{model_class.name}"]')
    return architecture, model_class


def _leading_dense(config: JsonObject) -> int | None:
    """Return the number of dense layers in `mlp_layer_types`, a list that transformers 5 writes."""
    kinds = config.values.get("mlp_layer_types")
    if kinds is None:
        return None
    n_dense = kinds.index("sparse") if isinstance(kinds, list) and "sparse" in kinds else 0
    if not isinstance(kinds, list) or kinds != ["dense"] * n_dense + ["sparse"] * (len(kinds) - n_dense):
        config.refuse("mlp_layer_types", 'a list of "dense", then "sparse"')
    return n_dense


def _refuse_windows(config: JsonObject) -> None:
    """Refuse layers that attend to a window only, in each form that configurations have for them."""
    kinds = config.values.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or any(kind != _FULL_ATTENTION for kind in kinds):
            config.refuse("layer_types", f'"{_FULL_ATTENTION}" for every layer')
        return
    window, first = config.values.get("sliding_window"), config.values.get("max_window_layers")
    # Where `use_sliding_window` exists, it must be false.
    if window is None or "use_sliding_window" in config.values:
        return
    if first is None or config.integer("max_window_layers", 0, 1 << 16) < config.values["num_hidden_layers"]:
        config.refuse("sliding_window", "leave it out")


def read_weight_block(folder: Path) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale in an FP8 checkpoint; None if the weights are floats.

    Raises FileError, and FormatError if the weights are quantized in another way.
    """
    path = folder / FILE_NAME
    return _weight_block(JsonObject(path, load_json(path)))


def _weight_block(config: JsonObject) -> tuple[int, int] | None:
    """See `read_weight_block`. In other quantized checkpoints, tensors have other names or meanings."""
    for key in _QUANTIZED:
        found = config.values.get(key)
        if not found:
            continue
        method = found.get("quant_method") if isinstance(found, dict) else None
        if key == "quantization_config" and method == "fp8":
            return _fp8_block(JsonObject(Path(f"{config.path}: {key}"), found))
        named = f" ({safe_line(method, 30)})" if isinstance(method, str) else ""
        raise FormatError(
            f"the weights are quantized already{named}",
            where=f"{config.path}: {key}",
            remedy="convert the original checkpoint, in BF16, F16 or F32, or an FP8 one with block scales",
        )
    return None


def _fp8_block(quantization: JsonObject) -> tuple[int, int]:
    quantization.require(_FP8_VALUES)
    block = quantization.values.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(map(_is_block_length, block)):
        quantization.refuse("weight_block_size", "rows and columns of a block of weights, such as [128, 128]")
    return block[0], block[1]


def _is_block_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_BLOCK


def config_values(hp: Hyperparameters, **extra: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return the content of a config.json with these hyper-parameters. `extra` adds or replaces keys."""
    architecture = ARCHITECTURES[hp.architecture]
    words = {each.config: _word(each, hp) for each in architecture.parameters if each.config}
    # The first class whose models may have these values.
    known = next(
        each
        for each in architecture.classes
        if all(words.get(key) in accepted for key, accepted in each.config_values.items())
    )
    implied = {key: values[0] for key, values in architecture.config_values.items() if values[0] is not None}
    return {
        "architectures": [known.name],
        "model_type": known.model_type,
        **implied,
        **words,
        "rope_scaling": rope_values(hp.rope_scaling),
        "vocab_size": hp.n_vocab,
        **extra,
    }


def _word(parameter: Parameter, hp: Hyperparameters) -> object:
    value = getattr(hp, parameter.field)
    if parameter.words is None:
        return value
    return next(word for word, meaning in parameter.words.items() if meaning == value)
