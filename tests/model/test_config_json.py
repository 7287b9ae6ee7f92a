"""config.json: read what the published checkpoints hold, refuse what the graph cannot honour."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsmoe_local.base.errors import FileError, FormatError
from dsmoe_local.model.config_json import config_values, read_config
from dsmoe_local.model.hyperparameters import RopeScaling
from dsmoe_local.model.presets import PRESETS

HP = PRESETS["deepseekmoe-16b"].hp
MISSING = object()

PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 102400,
}


def write(folder: Path, **changes: Any) -> Path:
    values = {**PUBLISHED, **changes}
    content = {key: value for key, value in values.items() if value is not MISSING}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_the_published_config(tmp_path: Path) -> None:
    """Guards the reading of the real model's own file."""
    assert replace(read_config(write(tmp_path)), name=HP.name) == HP


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"rope_scaling": {"rope_type": "default"}}, None),
        ({"rope_scaling": MISSING, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, None),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, RopeScaling("linear", 4.0)),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 2048}},
            RopeScaling("yarn", 8.0, 2048),
        ),
    ],
)
def test_rotary_scaling(tmp_path: Path, changes: dict[str, Any], scaling: RopeScaling | None) -> None:
    """Guards the forms in which tools of different ages write the same thing."""
    assert read_config(write(tmp_path, **changes)).rope_scaling == scaling


def test_theta_inside_the_rope_object(tmp_path: Path) -> None:
    """Guards against falling back to 10000 for files that newer tools rewrote."""
    folder = write(
        tmp_path,
        rope_theta=MISSING,
        rope_scaling=MISSING,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    assert read_config(folder).rope_theta == 5e5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_topk_prob", True),
        ("scoring_func", "sigmoid"),
        ("moe_layer_freq", 2),
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("model_type", "deepseek_v2"),
        ("model_type", "llama"),
        ("architectures", ["DeepseekV2ForCausalLM"]),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 513),
        ("num_hidden_layers", "28"),
        ("num_hidden_layers", True),
        ("num_hidden_layers", MISSING),
        ("num_experts_per_tok", 0),
        ("num_experts_per_tok", 65),
        ("n_shared_experts", None),
        ("num_key_value_heads", 3),
        ("num_attention_heads", 15),
        ("head_dim", 64),
        ("first_k_dense_replace", 28),
        ("rms_norm_eps", -1),
        ("rope_scaling", {"type": "dynamic", "factor": 2}),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", [1]),
        ("tie_word_embeddings", "yes"),
    ],
)
def test_refusals_name_file_and_key(tmp_path: Path, key: str, value: object) -> None:
    """Guards against converting silently what llama.cpp would compute differently."""
    with pytest.raises(FormatError) as caught:
        read_config(write(tmp_path, **{key: value}))
    message = str(caught.value)
    assert "config.json" in message
    assert "accepted" in message or "needed" in message
    assert len(message.splitlines()) <= 3


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1, "a": 2}', '{"x": NaN}', "[" * 100_000, "\x00"])
def test_broken_json(tmp_path: Path, content: str) -> None:
    """Guards against tracebacks, duplicate keys and deep nesting."""
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(FormatError):
        read_config(tmp_path)


def test_a_config_that_is_a_link_into_a_cache(tmp_path: Path) -> None:
    """The hub's cache links to its blobs: a model would be called by their folder."""
    (tmp_path / "blobs").mkdir()
    blob = (write(tmp_path) / "config.json").rename(tmp_path / "blobs" / "0123")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").symlink_to(blob)
    assert read_config(tmp_path / "tiny").name == "tiny"


def test_absent(tmp_path: Path) -> None:
    """Guards the message for a folder that is no checkpoint."""
    with pytest.raises(FileError, match="cannot read"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "hp",
    [
        HP,
        replace(HP, tied_embeddings=True, routed_scaling_factor=2.5),
        replace(HP, n_kv_heads=4, rope_scaling=RopeScaling("yarn", 4.0, 1024, 0.5)),
        replace(HP, rope_scaling=RopeScaling("linear", 2.0)),
    ],
)
def test_what_we_write_is_read_back(tmp_path: Path, hp: Any) -> None:
    """Guards the checkpoints that we make against our own reader."""
    (tmp_path / "config.json").write_text(json.dumps(config_values(hp)), encoding="utf-8")
    assert replace(read_config(tmp_path), name=hp.name) == hp
