"""Every mix against llama_model_quantize: tensor types, tensor bytes and metadata."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.mix_models import MIX_MODELS
from support.quantize_oracle import assert_same, llama_quantize
from support.tiny_gguf import DEEP, DENSE, EIGHT_EXPERTS, MOE, NARROW, ODD, write_tiny

from dsmoe_local.model.file_type import FILE_TYPES
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_quantize.policy.choice import Override, Overrides
from dsmoe_quantize.policy.mixes import FLOAT_TYPES, MIXES
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file
from dsmoe_quantize.write import encoder

MODELS = {
    "moe": (replace(MOE, n_routed_experts=2, expert_size=32, shared_expert_size=32), "bf16"),
    "eight experts": (EIGHT_EXPERTS, "f16"),
    "narrow": (replace(NARROW, ffn_size=96, expert_size=32, shared_expert_size=32), "f32"),
    "odd": (ODD, "bf16"),
    "dense": (DENSE, "f16"),
    **{name: (hp, "bf16") for name, hp in MIX_MODELS.items()},
}
CASES = [
    (model, word) for model in MODELS for word in (*MIXES, *(["F16"] if model in MIX_MODELS else FLOAT_TYPES))
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: write_tiny(folder / f"{number}.gguf", hp, dtype)
        for number, (name, (hp, dtype)) in enumerate(MODELS.items())
    }


def quantized(
    source: Path, out: Path, word: str, overrides: Overrides | None = None, *, again: bool = False
) -> Path:
    plan = plan_quantization(source, resolve(word), overrides, allow_requantize=again)
    quantize_file(plan, out, threads=2)
    return out


@pytest.mark.parametrize(("model", "word"), CASES)
def test_mix_equals_llama_cpp(models: dict[str, Path], tmp_path: Path, model: str, word: str) -> None:
    """A rule, fallback, counter or kernel call that differs from llama.cpp's."""
    ours = quantized(models[model], tmp_path / "ours.gguf", word)
    assert_same(ours, llama_quantize(models[model], tmp_path / "theirs.gguf", FILE_TYPES[resolve(word).name]))


@pytest.mark.parametrize("word", ["Q4_K_M", "Q4_K_S"])
def test_mix_equals_llama_cpp_with_28_layers(tmp_path: Path, word: str) -> None:
    """The layers with more bits, in a model as deep as the 16B one and with grouped queries."""
    source = write_tiny(tmp_path / "deep.gguf", DEEP)
    ours = quantized(source, tmp_path / "ours.gguf", word)
    assert_same(ours, llama_quantize(source, tmp_path / "theirs.gguf", FILE_TYPES[resolve(word).name]))


def test_80_dense_layers_equal_llama_cpp(tmp_path: Path) -> None:
    """llama.cpp takes 80 layers with grouped queries for a 70B model, which has a rule of its own."""
    hp = replace(DENSE, n_layers=80, n_dense_layers=80, n_kv_heads=1, ffn_size=32)
    source = write_tiny(tmp_path / "deep.gguf", hp)
    ours = quantized(source, tmp_path / "ours.gguf", "Q4_K_S")
    assert_same(ours, llama_quantize(source, tmp_path / "theirs.gguf", FILE_TYPES[resolve("Q4_K_S").name]))
    assert read_gguf(ours).tensors["blk.40.attn_v.weight"].type is GgmlType.Q5_K


def test_more_bits_layers(tmp_path: Path) -> None:
    """The published list of layers that Q4_K_M protects: a change in llama.cpp would show here."""
    plan = plan_quantization(write_tiny(tmp_path / "deep.gguf", DEEP), resolve("Q4_K_M"))
    protected = [each.name for each in plan.choices if each.reason == "more bits in this layer"]
    layers = [int(name.split(".")[1]) for name in protected if name.endswith("attn_v.weight")]
    assert layers == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]


@pytest.mark.parametrize("model", ["moe", "dense", "deepseek2 query rank", "glm4moe"])
def test_overrides_equal_llama_cpp(models: dict[str, Path], tmp_path: Path, model: str) -> None:
    """Overrides must keep llama.cpp's counting of the tensors that they take out of its hands."""
    overrides = Overrides(
        tensors=(
            Override(re.compile(r"blk\.[13]\.attn_v.*\.weight"), GgmlType.Q8_0),
            Override(re.compile(r"blk\.[02]\.ffn_down.*\.weight"), GgmlType.Q5_1),
            Override(re.compile(r"blk\.0\..*"), GgmlType.IQ4_XS),
        ),
        embedding=GgmlType.Q5_K,
    )
    ours = quantized(models[model], tmp_path / "ours.gguf", "q4_k_m", overrides)
    theirs = llama_quantize(
        models[model],
        tmp_path / "theirs.gguf",
        FILE_TYPES[resolve("q4_k_m").name],
        {f"^{each.pattern.pattern}$": int(each.type) for each in overrides.tensors},
        token_embedding_type=int(GgmlType.Q5_K),
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("word", ["q4_k", "iq4_xs", "q8_0", "q5_0"])
def test_pure_equals_llama_cpp(models: dict[str, Path], tmp_path: Path, word: str) -> None:
    """--pure must switch the mix's rules off, and keep the fallbacks and --output-type."""
    ours = quantized(models["moe"], tmp_path / "ours.gguf", word, Overrides(pure=True, output=GgmlType.Q6_K))
    theirs = llama_quantize(
        models["moe"],
        tmp_path / "theirs.gguf",
        FILE_TYPES[resolve(word).name],
        pure=True,
        output_tensor_type=int(GgmlType.Q6_K),
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("first", ["Q8_0", "Q5_K_M", "Q4_K_S", "Q4_0", "Q4_1", "Q5_1", "IQ4_XS", "IQ4_NL"])
def test_requantizing_equals_llama_cpp(models: dict[str, Path], tmp_path: Path, first: str) -> None:
    """Reading every quantized type, and copying what has the wanted type already."""
    source = quantized(models["eight experts"], tmp_path / "source.gguf", first)
    ours = quantized(source, tmp_path / "ours.gguf", "Q6_K", again=True)
    theirs = llama_quantize(
        source, tmp_path / "theirs.gguf", FILE_TYPES[resolve("Q6_K").name], allow_requantize=True
    )
    assert_same(ours, theirs)


def test_requantizing_to_floats_equals_llama_cpp(models: dict[str, Path], tmp_path: Path) -> None:
    """Back to a float type: norms and routers must not be touched."""
    source = quantized(models["moe"], tmp_path / "source.gguf", "Q4_K_M")
    ours = quantized(source, tmp_path / "ours.gguf", "bf16", again=True)
    assert_same(ours, llama_quantize(source, tmp_path / "theirs.gguf", 32, allow_requantize=True))


@pytest.mark.parametrize("word", ["Q4_K_M", "Q8_0", "F32"])
def test_any_cut_gives_the_same_bytes(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """Slabs and pieces that end in the middle of a tensor: tiny models otherwise have one slab per matrix."""
    monkeypatch.setattr(encoder, "SLAB_BYTES", 12345)
    monkeypatch.setattr(encoder, "PIECE_WEIGHTS", 1000)
    ours = quantized(models["moe"], tmp_path / "ours.gguf", word)
    assert_same(ours, llama_quantize(models["moe"], tmp_path / "theirs.gguf", FILE_TYPES[resolve(word).name]))
