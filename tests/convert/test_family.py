"""Every architecture, converted and run by llama.cpp, against its class in transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGUFValueType
from safetensors.torch import load_file, save_file
from support import llama_oracle, torch_bailing
from support.checkpoints import random_weights, write_checkpoint
from support.family import MEMBERS, logits, tiny_model, write_member
from support.tiny_gguf import FAMILY, write_tiny

from dsmoe_convert.convert import ConvertOptions, convert_folder
from dsmoe_convert.errors import CheckpointError
from dsmoe_local.base.errors import FormatError
from dsmoe_local.model.architectures import ARCHITECTURES
from dsmoe_local.model.gguf_file import Field
from dsmoe_local.model.gguf_model import metadata_of, read_model
from dsmoe_local.model.hyperparameters import Gating

IDS = [0, *range(20, 70), 5, 5, 300]
TOLERANCE = 1e-4
UINT32, FLOAT32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32
BLOCK = 20  # no width of these models is a multiple


@pytest.mark.parametrize("name", MEMBERS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """A tensor split or permuted wrongly; a hyper-parameter that is lost or has another meaning."""
    model = tiny_model(MEMBERS[name])
    folder = write_member(tmp_path / "model", MEMBERS[name], model)
    out = convert_folder(folder, tmp_path / "out.gguf").path
    found, expected = llama_oracle.logits(out, IDS), logits(model, IDS)
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()
    assert (found.argmax(1) == expected.argmax(1)).all()


BAILING = replace(FAMILY["bailingmoe2"], n_vocab=640, n_context=256)


def test_logits_of_ling(tmp_path: Path) -> None:
    """The same for the architecture that transformers does not have: against plain torch."""
    out = convert_folder(write_checkpoint(tmp_path / "model", BAILING), tmp_path / "out.gguf").path
    found = llama_oracle.logits(out, IDS)
    expected = torch_bailing.logits(random_weights(BAILING), BAILING, IDS).numpy()
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()


@pytest.mark.parametrize("name", ["deepseek3", "qwen3moe"])
def test_fused_experts(name: str, tmp_path: Path) -> None:
    """Experts that a checkpoint stores in one tensor for each layer, as transformers 5 can write them."""
    folder = write_member(tmp_path / "model", MEMBERS[name], tiny_model(MEMBERS[name]))
    separate = convert_folder(folder, tmp_path / "separate.gguf").path.read_bytes()
    weights = load_file(folder / "model.safetensors")
    fused: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        layer, is_expert, rest = key.partition("mlp.experts.")
        if not is_expert:
            fused[key] = value
        elif rest == "0.down_proj.weight":
            parts = [[weights[f"{layer}mlp.experts.{e}.{part}_proj.weight"] for e in range(8)]
                     for part in ("gate", "up", "down")]  # fmt: skip
            gate, up, down = map(torch.stack, parts)
            fused[f"{layer}mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
            fused[f"{layer}mlp.experts.down_proj"] = down
    save_file(fused, folder / "model.safetensors", {"format": "pt"})
    assert convert_folder(folder, tmp_path / "fused.gguf").path.read_bytes() == separate


def test_layers_for_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    """Tensors of later layers that are refused, or become layers of the model."""
    folder = write_member(tmp_path / "model", MEMBERS["deepseek3"], tiny_model(MEMBERS["deepseek3"]))
    plain = convert_folder(folder, tmp_path / "plain.gguf").path.read_bytes()
    weights = load_file(folder / "model.safetensors")
    weights |= {
        "model.layers.3.eh_proj.weight": torch.ones(64, 128),
        "model.layers.3.enorm.weight": torch.ones(64),
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert convert_folder(folder, tmp_path / "more.gguf").path.read_bytes() == plain


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tables_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    """A tensor that llama.cpp does not know, misses or has in another shape; a key it does not read."""
    hp = FAMILY[name]
    path = write_tiny(tmp_path / "tiny.gguf", hp)
    with llama_oracle.loaded(path):
        pass
    groups = [vars(keys) for keys in vars(gguf.Keys).values() if isinstance(keys, type)]
    known = {value for group in groups for value in group.values() if isinstance(value, str)}
    assert {key.replace(name, "{arch}", 1) for key in metadata_of(hp)} <= known
    assert read_model(path)[1] == replace(hp, name="tiny")


def test_a_vector_that_is_stored_as_a_row(tmp_path: Path) -> None:
    """The gate of Qwen2-MoE's shared expert, which llama.cpp's converter writes as a matrix of one row."""
    path = write_tiny(tmp_path / "tiny.gguf", FAMILY["qwen2moe"], as_rows="ffn_gate_inp_shexp")
    with llama_oracle.loaded(path):
        pass
    assert read_model(path)[0].tensors["blk.0.ffn_gate_inp_shexp.weight"].shape == (1, 256)


def test_fp8_weights_with_mla(tmp_path: Path) -> None:
    """Scales of blocks that do not follow the rows of `kv_b_proj`, which are split and transposed."""
    member = MEMBERS["deepseek3"]
    model = tiny_model(member)
    folder = write_member(tmp_path / "model", member, model)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.ndim < 2 or "mlp.gate." in name or not name.startswith("model.layers"):
            stored[name] = weight
            continue
        stored[name], stored[f"{name}_scale_inv"], rounded = fp8_blocks(weight)
        parameters = dict(model.named_parameters())
        if name in parameters:  # transformers has fused the experts
            parameters[name].data.copy_(rounded)
        else:
            copy_expert(parameters, name, rounded)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
    }
    (folder / "config.json").write_text(json.dumps(config))
    out = convert_folder(folder, tmp_path / "out.gguf", ConvertOptions("f32")).path
    found, expected = llama_oracle.logits(out, IDS), logits(model, IDS)
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()


ABORTING: dict[str, tuple[str, dict[str, Field | None]]] = {
    "dots1 without a function": ("dots1", {"expert_gating_func": None}),
    "dots1 with function 0": ("dots1", {"expert_gating_func": Field(0, UINT32)}),
    "Ling with function 0": ("bailingmoe2", {"expert_gating_func": Field(0, UINT32)}),
    "groups without their number": (
        "glm4moe",
        {"expert_group_count": Field(4, UINT32), "expert_group_used_count": None},
    ),
    "temperature": ("deepseek2", {"attention.temperature_scale": Field(0.1, FLOAT32)}),
    "only layers for more tokens": ("glm4moe", {"nextn_predict_layers": Field(3, UINT32)}),
}


@pytest.mark.parametrize("case", ABORTING)
def test_files_on_which_llama_cpp_would_abort(case: str, tmp_path: Path) -> None:
    """A process that dies instead of a message."""
    name, changes = ABORTING[case]
    path = write_tiny(tmp_path / "tiny.gguf", FAMILY[name], changes=changes)
    with pytest.raises(FormatError):
        read_model(path)


def test_files_of_glm_that_do_not_name_the_function(tmp_path: Path) -> None:
    """Early files of GLM-4.7-Flash, which llama.cpp recognizes by layers and vocabulary."""
    hp = replace(FAMILY["deepseek2"], n_layers=47, n_vocab=154880, hidden_size=32, ffn_size=32)
    path = write_tiny(tmp_path / "tiny.gguf", hp, changes={"expert_gating_func": None})
    assert read_model(path)[1].gating is Gating.SIGMOID


def test_layers_that_config_json_does_not_count(tmp_path: Path) -> None:
    """A model of which the last layer is dropped without a word."""
    folder = write_member(tmp_path / "model", MEMBERS["deepseek3"], tiny_model(MEMBERS["deepseek3"]))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match=r"layers\.2"):
        convert_folder(folder, tmp_path / "out.gguf")


def fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix in E4M3, the scales of its blocks, and what both mean."""
    n_rows, n_columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -n_columns % BLOCK, 0, -n_rows % BLOCK))
    blocks = padded.reshape(len(padded) // BLOCK, BLOCK, -1, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:n_rows, :n_columns]
    packed = (weight / wide).to(torch.float8_e4m3fn)
    return packed, scales, packed.float() * wide


def copy_expert(parameters: dict[str, torch.nn.Parameter], name: str, value: torch.Tensor) -> None:
    """Copy the matrix of one expert into the tensor of all experts of its layer."""
    layer, _, rest = name.partition("experts.")
    expert, kind, _ = rest.split(".")
    fused = parameters[f"{layer}experts.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"]
    size = len(value)
    rows = slice(size, None) if kind == "up_proj" else slice(0, size)
    fused.data[int(expert), rows] = value
