"""Converted files in llama.cpp against plain torch, and the converter against the quantizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import llama_oracle, torch_deepseek
from support.checkpoints import TINY, WIDE, Form, random_weights, write_checkpoint

from dsmoe_convert.convert import ConvertOptions, RunOptions, convert_folder
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.hyperparameters import Hyperparameters, RopeScaling
from dsmoe_local.model.layout import UNQUANTIZED_ROLES, tensor_specs
from dsmoe_quantize.policy.choice import Overrides, parse_override
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

IDS = [0, *range(20, 70), 5, 5, 300]
TOLERANCE = 1e-3


def relative_error(found: NDArray[np.float32], wanted: torch.Tensor) -> float:
    expected = wanted.numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("form", ["single", "sharded", "bin", "sharded bin"])
def test_logits_of_every_form(form: Form, tmp_path: Path) -> None:
    """A tensor read from the wrong place, or experts stacked in the wrong order."""
    source = write_checkpoint(tmp_path / "model", form=form)
    out = tmp_path / "out.gguf"
    convert_folder(source, out, ConvertOptions(allow_pickle="bin" in form))
    expected = torch_deepseek.logits(random_weights(TINY), TINY, IDS)
    assert relative_error(llama_oracle.logits(out, IDS), expected) < TOLERANCE


VARIANTS = {
    "grouped-query": replace(TINY, n_kv_heads=2),
    "one key head": replace(TINY, n_kv_heads=1),
    "tied": replace(TINY, tied_embeddings=True),
    "no dense layer": replace(TINY, n_dense_layers=0),
    "one shared expert": replace(TINY, n_shared_experts=1),
    "all experts": replace(TINY, n_experts_per_token=8),
    "scaled": replace(TINY, routed_scaling_factor=2.5),
    "epsilon and theta": replace(TINY, rms_norm_eps=1e-3, rope_theta=500.0),
    "linear rope": replace(TINY, rope_scaling=RopeScaling("linear", 4.0)),
    "yarn": replace(TINY, rope_scaling=RopeScaling("yarn", 4.0, 64)),
    "yarn, shorter": replace(TINY, rope_scaling=RopeScaling("yarn", 8.0, 32)),
    "yarn, own magnitude": replace(TINY, rope_scaling=RopeScaling("yarn", 4.0, 64, 1.5)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_every_variant(variant: str, tmp_path: Path) -> None:
    """A hyper-parameter that is lost, or written under a key that llama.cpp does not read."""
    hp = VARIANTS[variant]
    out = tmp_path / "out.gguf"
    convert_folder(write_checkpoint(tmp_path / "model", hp, form="single"), out)
    found = llama_oracle.logits(out, IDS)
    assert relative_error(found, torch_deepseek.logits(random_weights(hp), hp, IDS)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints(dtype: torch.dtype, tmp_path: Path) -> None:
    """A half-precision checkpoint whose norms or routers are not written as f32, or that loses bits."""
    source = write_checkpoint(tmp_path / "model", dtype=dtype)
    summary = convert_folder(source, tmp_path / "out.gguf", ConvertOptions("f32"))
    expected = torch_deepseek.logits(random_weights(TINY, dtype=dtype), TINY, IDS)
    assert relative_error(llama_oracle.logits(summary.path, IDS), expected) < TOLERANCE
    own = {torch.bfloat16: GgmlType.BF16, torch.float16: GgmlType.F16}[dtype]
    file, _ = read_model(convert_folder(source, tmp_path / "own.gguf").path)
    for spec in tensor_specs(TINY):
        wide = spec.role in UNQUANTIZED_ROLES
        assert file.tensors[spec.name].type is (GgmlType.F32 if wide else own), spec.name


def test_weights_arrive_bit_for_bit(tmp_path: Path) -> None:
    """Query and key rows permuted wrongly, or rows of a slab shifted: against torch's own reshape."""
    hp = replace(WIDE, n_kv_heads=2, n_vocab=1200)
    weights = random_weights(hp, dtype=torch.bfloat16)
    out = tmp_path / "out.gguf"
    convert_folder(write_checkpoint(tmp_path / "model", hp, weights=weights), out)
    file, found = read_model(out)
    assert replace(found, name="") == replace(hp, name="")
    raw = out.read_bytes()
    for spec in tensor_specs(hp):
        expected = torch.stack([weights[source] for source in spec.sources]).reshape(spec.shape)
        if spec.blocks:
            halves = expected.reshape(spec.blocks.count, 2, hp.head_dim // 2, hp.hidden_size)
            expected = halves.swapaxes(1, 2).reshape(spec.shape)
        info = file.tensors[spec.name]
        expected = expected.float() if info.type is GgmlType.F32 else expected.view(torch.int16)
        assert raw[info.offset : info.offset + info.n_bytes] == expected.numpy().tobytes(), spec.name


TYPES = ("f32", "f16", "Q8_0", "Q4_K_M", "Q4_K_S", "Q5_K_M", "Q6_K", "Q4_0", "IQ4_NL", "IQ4_XS", "q4", "q8")


@pytest.fixture(scope="module")
def unquantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bf16 checkpoint with K-quant widths and what the converter makes of it without a type."""
    folder = tmp_path_factory.mktemp("wide")
    source = write_checkpoint(folder / "wide", WIDE, dtype=torch.bfloat16)
    return source, convert_folder(source, folder / "own.gguf").path


@pytest.mark.parametrize("word", TYPES)
def test_converter_and_quantizer_agree(word: str, unquantized: tuple[Path, Path], tmp_path: Path) -> None:
    """One pass and two steps that give different files for the same type."""
    source, own = unquantized
    direct = convert_folder(source, tmp_path / "direct.gguf", ConvertOptions(word))
    stepwise = quantize_file(plan_quantization(own, resolve(word)), tmp_path / "stepwise.gguf")
    assert direct.path.read_bytes() == stepwise.path.read_bytes()
    assert np.isfinite(llama_oracle.logits(direct.path, IDS[:8])).all()


def test_overrides_reach_the_file(unquantized: tuple[Path, Path], tmp_path: Path) -> None:
    """--tensor-type, --output-type and --embedding-type that are dropped on the way."""
    overrides = Overrides(
        tensors=(parse_override(r"blk\.1\.attn_[qk]\.weight=q8_0"),),
        output=GgmlType.Q6_K,
        embedding=GgmlType.Q4_0,
    )
    out = tmp_path / "out.gguf"
    convert_folder(unquantized[0], out, ConvertOptions("q4_k", overrides))
    types = {name: info.type for name, info in read_model(out)[0].tensors.items()}
    assert types["blk.1.attn_q.weight"] is types["blk.1.attn_k.weight"] is GgmlType.Q8_0
    assert types["blk.2.attn_q.weight"] is GgmlType.Q4_K
    assert types["output.weight"] is GgmlType.Q6_K
    assert types["token_embd.weight"] is GgmlType.Q4_0


def test_threads_do_not_change_bytes(unquantized: tuple[Path, Path], tmp_path: Path) -> None:
    """Slabs that land at the wrong place when many threads write."""
    files = [
        convert_folder(
            unquantized[0], tmp_path / f"{n}.gguf", ConvertOptions("q4"), RunOptions(threads=n)
        ).path.read_bytes()
        for n in (1, 2, 7)
    ]
    assert files[0] == files[1] == files[2]


def test_metadata_is_complete(tmp_path: Path) -> None:
    """A key that llama.cpp or its users need and nobody writes."""
    source = write_checkpoint(tmp_path / "tiny")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: deepseek\n---\n# Tiny\n")
    out = convert_folder(source, tmp_path / "out.gguf", ConvertOptions("Q8_0")).path
    metadata = read_model(out)[0].metadata
    expected = {
        "general.architecture": "deepseek",
        "general.type": "model",
        "general.name": "tiny",
        "general.license": "deepseek",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "deepseek.rope.scaling.type": "none",
        "deepseek.expert_gating_func": 1,
        "deepseek.expert_weights_scale": 1.0,
        "deepseek.vocab_size": TINY.n_vocab,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-llm",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {key: metadata[key].value for key in expected} == expected
    assert metadata["general.size_label"].value.startswith("8x")


def hp_with_odd_heads() -> Hyperparameters:
    return replace(TINY, hidden_size=96, n_heads=3, n_kv_heads=3, head_dim=32, value_dim=32, rotary_dim=32)


def test_slabs_cut_through_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary rows that are only right when a slab holds whole heads."""
    monkeypatch.setattr("dsmoe_quantize.write.encoder.SLAB_BYTES", 7 * 96 * 4)
    hp = hp_with_odd_heads()
    out = tmp_path / "out.gguf"
    convert_folder(write_checkpoint(tmp_path / "model", hp), out)
    found = llama_oracle.logits(out, IDS)
    assert relative_error(found, torch_deepseek.logits(random_weights(hp), hp, IDS)) < TOLERANCE
