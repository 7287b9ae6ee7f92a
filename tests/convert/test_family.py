"""Every architecture, converted and run by llama.cpp, against its class in transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import llama_oracle, torch_bailing
from support.checkpoints import random_weights, write_checkpoint
from support.family import MEMBERS, logits, tiny_model, write_member
from support.tiny_gguf import FAMILY, write_tiny

from dsmoe_convert.convert import convert_folder
from dsmoe_local.model.architectures import ARCHITECTURES
from dsmoe_local.model.gguf_model import metadata_of, read_model

IDS = [0, *range(20, 70), 5, 5, 300]
TOLERANCE = 1e-4


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
