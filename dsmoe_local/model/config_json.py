"""Read config.json of a DeepSeekMoE checkpoint strictly; write one for the checkpoints that we make.

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
from dsmoe_local.model.hyperparameters import Hyperparameters, RopeScaling

FILE_NAME = "config.json"
_MAX_BYTES = 16 << 20
_MAX_DEPTH = 64

# llama.cpp's graph implements exactly these values and would ignore any other.
_REQUIRED_VALUES: Mapping[str, tuple[object, ...]] = {
    "norm_topk_prob": (False, None),
    "scoring_func": ("softmax", None),
    "topk_method": ("greedy", "gready", None),  # DeepSeek's own code has the misspelling
    "moe_layer_freq": (1, None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish", None),
    "ep_size": (1, None),
    "pretraining_tp": (1, None),
    "n_group": (1, 0, None),
    "topk_group": (1, 0, None),
    "q_lora_rank": (None,),
    "kv_lora_rank": (None,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, 1.0, None),
}

_QUANTIZED = ("quantization_config", "compression_config")
_FP8_VALUES: Mapping[str, tuple[object, ...]] = {
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),  # a static one has more tensors
}
_MAX_BLOCK = 1 << 16
_MODEL_TYPES = ("deepseek",)
_CLASS = "DeepseekForCausalLM"


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

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value


def read_config(folder: Path) -> Hyperparameters:
    """Return the hyper-parameters in `folder`/config.json.

    Raises FileError if it cannot be read, FormatError if it is not a DeepSeekMoE that llama.cpp can run.
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
    config = _Config(path, values)
    _check_kind(config)
    _weight_block(config)
    _require(config, _REQUIRED_VALUES)
    hidden_size = config.integer("hidden_size", 32, 1 << 20)
    n_heads = config.integer("num_attention_heads", 1, 1024)
    n_layers = config.integer("num_hidden_layers", 1, 512)
    n_kv_heads = config.integer("num_key_value_heads", 1, 1024, n_heads)
    if hidden_size % n_heads:
        config.refuse("num_attention_heads", f"a divisor of hidden_size = {hidden_size}")
    head_dim = config.integer("head_dim", 2, 4096, hidden_size // n_heads)
    if head_dim * n_heads != hidden_size:
        config.refuse("head_dim", f"hidden_size / num_attention_heads = {hidden_size // n_heads}")
    if head_dim % 2:
        config.refuse("num_attention_heads", "a divisor of hidden_size that gives an even head size")
    if n_heads % n_kv_heads:
        config.refuse("num_key_value_heads", f"a divisor of num_attention_heads = {n_heads}")
    n_routed = config.integer("n_routed_experts", 1, 512)
    n_dense = config.integer("first_k_dense_replace", 0, n_layers, 0)
    if n_dense == n_layers:
        config.refuse("first_k_dense_replace", f"less than num_hidden_layers = {n_layers}")
    return Hyperparameters(
        architecture="deepseek",
        n_layers=n_layers,
        hidden_size=hidden_size,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_size=config.integer("intermediate_size", 1, 1 << 22),
        n_vocab=config.integer("vocab_size", 1, 1 << 24),
        n_context=config.integer("max_position_embeddings", 1, 1 << 28),
        n_dense_layers=n_dense,
        rms_norm_eps=config.number("rms_norm_eps", 1e-12, 1e-1, 1e-6),
        rope_theta=config.number("rope_theta", 1.0, 1e12, _nested_rope_theta(config)),
        rope_scaling=_rope_scaling(config),
        n_routed_experts=n_routed,
        n_shared_experts=config.integer("n_shared_experts", 1, 512),
        n_experts_per_token=config.integer("num_experts_per_tok", 1, n_routed),
        expert_size=config.integer("moe_intermediate_size", 1, 1 << 20),
        routed_scaling_factor=config.number("routed_scaling_factor", 1e-6, 1e6, 1.0),
        tied_embeddings=config.flag("tie_word_embeddings", default=False),
        name=checkpoint_name(path.parent),
    )


def _require(config: _Config, required: Mapping[str, tuple[object, ...]]) -> None:
    for key, accepted in required.items():
        value = config.values.get(key)
        # In Python 1 == True; in JSON they differ.
        if not any(value == good and isinstance(value, bool) == isinstance(good, bool) for good in accepted):
            names = [json.dumps(good) for good in accepted if good is not None]
            config.refuse(key, " or ".join([*names, "leave it out"]))


def _check_kind(config: _Config) -> None:
    kind = config.values.get("model_type")
    classes = config.values.get("architectures")
    if kind is not None and kind not in _MODEL_TYPES:
        config.refuse("model_type", '"deepseek" (DeepSeekMoE, arXiv 2401.06066)')
    if classes is not None and classes != [_CLASS]:
        config.refuse("architectures", f'["{_CLASS}"]')
    if kind is None and classes is None:
        config.refuse("model_type", '"deepseek" (DeepSeekMoE, arXiv 2401.06066)')


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


def _rope_parameters(config: _Config) -> tuple[str, Mapping[str, Any]]:
    """Return the key that describes rotary scaling, which transformers 5 renamed, and its object."""
    for key in ("rope_scaling", "rope_parameters"):
        value = config.values.get(key)
        if value is not None:
            if not isinstance(value, dict):
                config.refuse(key, "null or an object")
            return key, value
    return "rope_scaling", {}


def _nested_rope_theta(config: _Config) -> float:
    """Return rope_theta of the rope object, where transformers 5 puts it. A top-level key has precedence."""
    rope = _rope_parameters(config)[1]
    if "rope_theta" not in rope:
        return 10000.0
    return _Config(config.path, {"rope_theta": rope["rope_theta"]}).number("rope_theta", 1.0, 1e12)


def _rope_scaling(config: _Config) -> RopeScaling | None:
    key, rope = _rope_parameters(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    inner = _Config(config.path, rope)
    readers: Mapping[object, Callable[[], RopeScaling | None]] = {
        "default": lambda: None,
        "linear": lambda: RopeScaling("linear", inner.number("factor", 1e-3, 1e6)),
        "yarn": lambda: _yarn(config, inner),
    }
    if not isinstance(kind, str) or kind not in readers:
        config.refuse(key, 'null, or rope_type "default", "linear" or "yarn"')
    return readers[kind]()


# llama.cpp's graph for this architecture does not read these keys and uses these values.
_YARN_VALUES: Mapping[str, tuple[object, ...]] = {
    "beta_fast": (32, None),
    "beta_slow": (1, None),
    "mscale": (1, None),
    "mscale_all_dim": (1, 0, None),
    "truncate": (True, None),
}


def _yarn(config: _Config, rope: _Config) -> RopeScaling:
    _require(rope, _YARN_VALUES)
    scaling = RopeScaling(
        "yarn",
        rope.number("factor", 1e-3, 1e6),
        rope.integer(
            "original_max_position_embeddings",
            1,
            1 << 28,
            config.integer("max_position_embeddings", 1, 1 << 28),
        ),
    )
    # If both are given and equal, they cancel, as in transformers.
    cancelled = bool(rope.values.get("mscale") and rope.values.get("mscale_all_dim"))
    default = 1.0 if cancelled else scaling.yarn_magnitude
    magnitude = rope.number("attention_factor", 1e-6, 1e6, default)
    # Rounded to the precision of the GGUF file.
    return replace(scaling, attention_factor=float(f"{magnitude / scaling.yarn_magnitude:.7g}"))


def config_values(hp: Hyperparameters, **extra: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return the content of a config.json with these hyper-parameters. `extra` adds or replaces keys."""
    scaling = hp.rope_scaling
    rope: dict[str, Any] | None = None
    if scaling is not None:
        rope = {"type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "yarn":
            rope |= {
                "original_max_position_embeddings": scaling.original_context,
            }
            if scaling.attention_factor != 1:
                rope["attention_factor"] = scaling.attention_factor * scaling.yarn_magnitude
    return {
        "architectures": [_CLASS],
        "model_type": "deepseek",
        "attention_bias": False,
        "first_k_dense_replace": hp.n_dense_layers,
        "hidden_act": "silu",
        "hidden_size": hp.hidden_size,
        "intermediate_size": hp.ffn_size,
        "max_position_embeddings": hp.n_context,
        "moe_intermediate_size": hp.expert_size,
        "moe_layer_freq": 1,
        "n_routed_experts": hp.n_routed_experts,
        "n_shared_experts": hp.n_shared_experts,
        "norm_topk_prob": False,
        "num_attention_heads": hp.n_heads,
        "num_experts_per_tok": hp.n_experts_per_token,
        "num_hidden_layers": hp.n_layers,
        "num_key_value_heads": hp.n_kv_heads,
        "rms_norm_eps": hp.rms_norm_eps,
        "rope_scaling": rope,
        "rope_theta": hp.rope_theta,
        "routed_scaling_factor": hp.routed_scaling_factor,
        "scoring_func": "softmax",
        "tie_word_embeddings": hp.tied_embeddings,
        "vocab_size": hp.n_vocab,
        **extra,
    }
