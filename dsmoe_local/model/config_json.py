"""Read config.json of a checkpoint strictly; write one for the checkpoints that we make.

Values that llama.cpp's graph would ignore are refused: converting such a model would give wrong output. Each
error names the file, the key, its value and the accepted values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from dsmoe_local.base.errors import FileError, FormatError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.architectures import ARCHITECTURES
from dsmoe_local.model.architectures.table import REQUIRED, Architecture, ModelClass, Parameter
from dsmoe_local.model.hyperparameters import Hyperparameters, RopeScaling

FILE_NAME = "config.json"
_MAX_BYTES = 16 << 20
_MAX_DEPTH = 64

_MAX_MTP_LAYERS = 16
_ALIASES = {"num_local_experts": "num_experts", "num_mtp_layers": "num_nextn_predict_layers"}
"""Keys that transformers 5 has renamed."""
_FULL_ATTENTION = "full_attention"
_ROPE_OBJECTS = ("rope_parameters", "rope_scaling")
_ROPE_AT_TOP = ("rope_theta", "partial_rotary_factor")
"""Keys that may be in that object or at the top level."""
_ROPE_KEYS = frozenset(
    {
        *_ROPE_AT_TOP,
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


@dataclass(frozen=True, slots=True)
class _Config:
    """Typed, range-checked access to a parsed config.json. Errors name the file and the key."""

    path: Path
    values: Mapping[str, Any]

    def refuse(self, key: str, accepted: str) -> NoReturn:
        raise FormatError(
            f"{key} = {safe_line(json.dumps(self.values.get(key)), 60)} is not supported",
            where=f"{self.path}: {key}",
            remedy=f"accepted: {accepted}",
        )

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            self.refuse(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values[key]
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def word(self, key: str, words: Mapping[object, object]) -> object:
        value = self.values[key]
        if not isinstance(value, str) or value not in words:
            self.refuse(key, " or ".join(json.dumps(word) for word in words))
        return words[value]

    def parameter(self, parameter: Parameter, fields: Mapping[str, Any]) -> object:
        """Return the value of one line of the table. `fields` are those that were read before."""
        key = parameter.config
        if (not key or self.values.get(key) is None) and parameter.default is not REQUIRED:
            default = parameter.default
            return default(fields) if callable(default) else default
        if parameter.words is not None:
            if key not in self.values:
                self.refuse(key, " or ".join(json.dumps(word) for word in parameter.words))
            return self.word(key, parameter.words)
        if parameter.kind is bool:
            return self.flag(key)
        if parameter.kind is float:
            return self.number(key, parameter.low, parameter.high)
        return self.integer(key, int(parameter.low), int(parameter.high))


def read_config(folder: Path) -> Hyperparameters:
    """Return the hyper-parameters in `folder`/config.json.

    Raises FileError if it cannot be read, FormatError if it is not a model that llama.cpp can run.
    """
    return parse_config(load_json(folder / FILE_NAME), folder / FILE_NAME)


def checkpoint_name(folder: Path) -> str:
    """Return the name of a checkpoint: that of its folder, resolved if the user gave `.`, `..` or `/`."""
    return folder.name if folder.name not in ("", "..") else folder.resolve().name or "model"


def load_json(path: Path, max_bytes: int = _MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object strictly from a file of at most `max_bytes`. Raises FileError or FormatError."""
    try:
        if path.stat().st_size > max_bytes:
            raise FormatError(f"the file exceeds {max_bytes >> 20} MiB", where=path)
        raw = path.read_bytes()
    except OSError as error:
        raise FileError(f"cannot read {safe_line(path.name, 60)}: {error.strerror}", where=path) from error
    return strict_json(raw, path)


def strict_json(raw: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object without duplicate keys, NaN or deep nesting.

    Raises FormatError, which names `path`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice!r} occurs twice")
        return result

    def no_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    name = safe_line(path.name, 60)
    try:
        value = json.loads(raw, object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name} is not valid JSON: {safe_line(str(error), 80)}", where=path) from error
    if not isinstance(value, dict):
        raise FormatError(f"{name} must contain a JSON object", where=path)
    if not _is_shallow(value):
        raise FormatError(f"{name} is nested more than {_MAX_DEPTH} levels deep", where=path)
    return value


def _is_shallow(value: object) -> bool:
    """True if the nesting is at most _MAX_DEPTH, so that functions may recurse over the value."""
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        parts = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for part in parts for child in part if isinstance(child, (dict, list))]
        if not level:
            return True
    return False


def parse_config(values: Mapping[str, Any], path: Path) -> Hyperparameters:
    """Return the hyper-parameters in a parsed config.json. Raises FormatError, whose message has `path`."""
    architecture, known = _class_of(_Config(path, values))
    config = _Config(path, _with_defaults(_Config(path, values), known))
    _weight_block(config)
    _require(config, {**architecture.config_values, **known.config_values})
    _refuse_windows(config)
    fields: dict[str, Any] = {"n_vocab": config.integer("vocab_size", 1, 1 << 24), **architecture.constants}
    for parameter in architecture.parameters:
        if parameter.config or (parameter.default is not REQUIRED and parameter.field not in fields):
            fields[parameter.field] = config.parameter(parameter, fields)
    if architecture.has_mtp_layers:
        fields["n_mtp_layers"] = config.integer("num_nextn_predict_layers", 0, _MAX_MTP_LAYERS, 0)
    derived = [parameter.field for parameter in architecture.parameters if parameter.is_derived]
    hp = Hyperparameters(
        architecture=architecture.name,
        rope_scaling=_rope_scaling(config, architecture),
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


def _with_defaults(config: _Config, known: ModelClass) -> dict[str, Any]:
    """Return the values under their usual keys, and the class's defaults of those that are missing."""
    given = {key: value for key, value in config.values.items() if value is not None}
    for new, usual in _ALIASES.items():
        if new in given and given.setdefault(usual, given[new]) != given[new]:
            config.refuse(new, f"the value of {usual}, or leave one of them out")
    rope = {**_rope(_Config(config.path, given))}
    top_level = {key: rope[key] for key in _ROPE_AT_TOP if key in rope}
    dense = _leading_dense(config)
    if dense is not None and given.setdefault("first_k_dense_replace", dense) != dense:
        config.refuse("first_k_dense_replace", f"{dense}, as mlp_layer_types says")
    return {**known.defaults, **given, **top_level}


def _require(config: _Config, required: Mapping[str, tuple[object, ...]]) -> None:
    for key, accepted in required.items():
        value = config.values.get(key)
        # In Python 1 == True; in JSON they differ.
        if not any(value == good and isinstance(value, bool) == isinstance(good, bool) for good in accepted):
            names = [json.dumps(good) for good in accepted if good is not None]
            leave_out = ["leave it out"] if None in accepted else []
            config.refuse(key, " or ".join([*names, *leave_out]))


def _class_of(config: _Config) -> tuple[Architecture, ModelClass]:
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


def _leading_dense(config: _Config) -> int | None:
    """Return the number of dense layers in `mlp_layer_types`, a list that transformers 5 writes."""
    kinds = config.values.get("mlp_layer_types")
    if kinds is None:
        return None
    n_dense = kinds.index("sparse") if isinstance(kinds, list) and "sparse" in kinds else 0
    if not isinstance(kinds, list) or kinds != ["dense"] * n_dense + ["sparse"] * (len(kinds) - n_dense):
        config.refuse("mlp_layer_types", 'a list of "dense", then "sparse"')
    return n_dense


def _refuse_windows(config: _Config) -> None:
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
    return _weight_block(_Config(path, load_json(path)))


def _weight_block(config: _Config) -> tuple[int, int] | None:
    """See `read_weight_block`. In other quantized checkpoints, tensors have other names or meanings."""
    for key in _QUANTIZED:
        found = config.values.get(key)
        if not found:
            continue
        method = found.get("quant_method") if isinstance(found, dict) else None
        if key == "quantization_config" and method == "fp8":
            return _fp8_block(_Config(Path(f"{config.path}: {key}"), found))
        named = f" ({safe_line(method, 30)})" if isinstance(method, str) else ""
        raise FormatError(
            f"the weights are quantized already{named}",
            where=f"{config.path}: {key}",
            remedy="convert the original checkpoint, in BF16, F16 or F32, or an FP8 one with block scales",
        )
    return None


def _fp8_block(quantization: _Config) -> tuple[int, int]:
    _require(quantization, _FP8_VALUES)
    block = quantization.values.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(map(_is_block_length, block)):
        quantization.refuse("weight_block_size", "rows and columns of a block of weights, such as [128, 128]")
    return block[0], block[1]


def _is_block_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_BLOCK


def _rope(config: _Config) -> Mapping[str, Any]:
    """Return the object that describes rotary positions. It takes precedence over the top level.

    transformers 5 renamed it, and moved keys into it. Raises FormatError if there are two that differ.
    """
    found = {}
    for key in _ROPE_OBJECTS:
        value = config.values.get(key, {})
        if not isinstance(value, dict):
            config.refuse(key, "null or an object")
        for inner in value:
            if inner not in _ROPE_KEYS:
                _Config(config.path, value).refuse(inner, f"in {key}: {', '.join(sorted(_ROPE_KEYS))}")
        if value:
            found[key] = value
    if len({json.dumps(value, sort_keys=True) for value in found.values()}) > 1:
        config.refuse(_ROPE_OBJECTS[0], f"the value of {_ROPE_OBJECTS[1]}, or leave one of them out")
    return next(iter(found.values()), {})


def _rope_scaling(config: _Config, architecture: Architecture) -> RopeScaling | None:
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    inner = _Config(config.path, rope)
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
        key = next(key for key in _ROPE_OBJECTS if config.values.get(key))
        config.refuse(key, "null, or rope_type " + " or ".join(f'"{word}"' for word in readers))
    return readers[kind]()


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


def _original_context(config: _Config, rope: _Config) -> int:
    context = config.integer("max_position_embeddings", 1, 1 << 28)
    outer = config.integer("original_max_position_embeddings", 1, 1 << 28, context)
    return rope.integer("original_max_position_embeddings", 1, 1 << 28, outer)


def _yarn(config: _Config, rope: _Config) -> RopeScaling:
    _require(rope, {**_YARN_VALUES, **_MSCALE_VALUES})
    scaling = RopeScaling("yarn", rope.number("factor", 1e-3, 1e6), _original_context(config, rope))
    # If both are given and equal, they cancel, as in transformers.
    cancelled = bool(rope.values.get("mscale") and rope.values.get("mscale_all_dim"))
    default = 1.0 if cancelled else scaling.yarn_magnitude
    magnitude = rope.number("attention_factor", 1e-6, 1e6, default)
    # Rounded to the precision of the GGUF file.
    return replace(scaling, attention_factor=float(f"{magnitude / scaling.yarn_magnitude:.7g}"))


def _mla_yarn(config: _Config, rope: _Config) -> RopeScaling:
    """Read YaRN as DeepSeek-V2 has it: `mscale_all_dim` scales all of queries and keys.

    llama.cpp takes `mscale` to be the same, so that the rotated part is not scaled once more.
    """
    _require(rope, {**_YARN_VALUES, "attention_factor": (None,)})
    all_dim = rope.number("mscale_all_dim", 1e-3, 100)
    if rope.number("mscale", 1e-3, 100) != all_dim:
        rope.refuse("mscale", f"mscale_all_dim = {all_dim:g}")
    return RopeScaling(
        "yarn", rope.number("factor", 1e-3, 1e6), _original_context(config, rope), mscale_all_dim=all_dim
    )


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
        "rope_scaling": _rope_values(hp.rope_scaling),
        "vocab_size": hp.n_vocab,
        **extra,
    }


def _word(parameter: Parameter, hp: Hyperparameters) -> object:
    value = getattr(hp, parameter.field)
    if parameter.words is None:
        return value
    return next(word for word, meaning in parameter.words.items() if meaning == value)


def _rope_values(scaling: RopeScaling | None) -> dict[str, Any] | None:
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
