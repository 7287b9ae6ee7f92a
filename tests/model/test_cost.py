"""Costs against published figures: those of arXiv 2401.06066, and those of each model of the family."""

from __future__ import annotations

import pytest

from dsmoe_local.model.architectures import ARCHITECTURES
from dsmoe_local.model.cost import flops, kv_bytes_per_token, parameters, shares
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.layout import tensor_specs, unquantized
from dsmoe_local.model.presets import PRESETS, matching_preset

PUBLISHED_TERAFLOPS = {
    "deepseekmoe-16b": 74.4,
    "deepseek-7b": 183.5,
    "llama2-7b": 187.9,
    "deepseekmoe-145b": 585.6,
    "gshard-137b": 572.7,
    "deepseekmoe-142b-half": 374.6,
    "deepseek-67b": 2057.5,
    "deepseekmoe-2b": 4.3,
}
PUBLISHED_PARAMETERS = {
    "deepseekmoe-16b": (16.4, 2.8),
    "deepseekmoe-145b": (144.6, 22.2),
    "deepseekmoe-2b": (2.0, 0.3),
    "deepseek-7b": (6.9, 6.9),
    "deepseek-67b": (67.4, 67.4),
    "llama2-7b": (6.7, 6.7),
}
PUBLISHED_OF_THE_FAMILY = {
    "deepseek-v2-lite": (15.7, 2.4),
    "moonlight-16b-a3b": (16, 3),
    "deepseek-v3": (671, 37),
    "kimi-k2": (1000, 32),
    "glm-4.7-flash": (30, 3),
    "glm-4.5-air": (106, 12),
    "qwen1.5-moe-a2.7b": (14.3, 2.7),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235, 22),
    "ling-mini-2.0": (16.3, 1.4),
    "olmoe-1b-7b": (6.9, 1.3),
}
CACHE_BYTES = {
    "deepseekmoe-16b": 28 * 2 * 2048 * 2,
    "deepseek-v2-lite": 27 * 576 * 2,
    "deepseek-v3": 70272,  # published: arXiv 2505.09343, table 1
    "qwen3-30b-a3b": 48 * 2 * 512 * 2,
    "ling-mini-2.0": 20 * 2 * 512 * 2,
}


@pytest.mark.parametrize("name", PUBLISHED_TERAFLOPS)
def test_flops_are_the_papers(name: str) -> None:
    """Guards the formula: every figure to 0.1% or to the digits that the paper prints."""
    preset = PRESETS[name]
    counted = flops(preset.hp, preset.n_tokens, preset.ffn_factor) / 1e12
    published = PUBLISHED_TERAFLOPS[name]
    assert abs(counted - published) <= max(published * 1e-3, 0.05)


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameters_are_the_papers(name: str) -> None:
    """Guards the layout's shapes: a forgotten or doubled tensor shows here."""
    counted = parameters(PRESETS[name].hp)
    total, activated = PUBLISHED_PARAMETERS[name]
    assert abs(counted.total / 1e9 - total) <= 0.05
    assert abs(counted.activated / 1e9 - activated) <= 0.05


@pytest.mark.parametrize("name", PUBLISHED_OF_THE_FAMILY)
def test_parameters_of_the_family(name: str) -> None:
    """Wrong dimensions of a preset; a tensor that an architecture's table lacks.

    Publications count neither, one or both of embedding and output.
    """
    hp = PRESETS[name].hp
    counted, embeddings = parameters(hp), 2 * hp.n_vocab * hp.hidden_size
    total, activated = PUBLISHED_OF_THE_FAMILY[name]
    assert 0.97 * total <= counted.total / 1e9 <= 1.03 * total
    assert (counted.activated - embeddings) / 1e9 <= 1.09 * activated
    assert 0.97 * activated <= counted.activated / 1e9


def test_presets_of_the_family_are_models_that_llama_cpp_runs() -> None:
    """A preset that the checks of its architecture refuse."""
    for name in PUBLISHED_OF_THE_FAMILY:
        hp = PRESETS[name].hp
        for check in ARCHITECTURES[hp.architecture].checks:
            assert check(hp) is None, name


def test_flops_of_mla() -> None:
    """Guards the expanded heads: 250 GFLOPs per token of DeepSeek-V3 (arXiv 2505.09343, table 2).

    The publication counts attention to earlier tokens only, which is half of it.
    """
    hp = PRESETS["deepseek-v3"].hp
    attention = 6 * hp.n_layers * hp.n_heads * (192 + 128) * 4096
    assert flops(hp, 4096) / 4096 - attention / 2 == pytest.approx(250e9, rel=0.005)


def test_the_ratios_of_the_abstract() -> None:
    """Guards "about 40% of the computation" against a change of one side only."""
    costs = {
        name: flops(PRESETS[name].hp, 4096, PRESETS[name].ffn_factor)
        for name in ("deepseekmoe-16b", "deepseek-7b", "llama2-7b")
    }
    assert costs["deepseekmoe-16b"] / costs["deepseek-7b"] == pytest.approx(0.405, abs=1e-3)
    assert costs["deepseekmoe-16b"] / costs["llama2-7b"] == pytest.approx(0.396, abs=1e-3)


def test_real_widths_stay_near_the_nominal_ones() -> None:
    """Guards the formula over real widths, which nothing published checks."""
    preset = PRESETS["deepseekmoe-16b"]
    assert flops(preset.hp, 4096) == pytest.approx(flops(preset.hp, 4096, preset.ffn_factor), rel=0.03)


def test_16b_has_the_tensors_of_the_published_file() -> None:
    """Guards the table against the known GGUF of the 16B model: 363 tensors and their shapes."""
    specs = {spec.name: spec for spec in tensor_specs(PRESETS["deepseekmoe-16b"].hp)}
    assert len(specs) == 363
    assert specs["blk.27.ffn_down_exps.weight"].shape == (64, 2048, 1408)
    assert specs["blk.1.ffn_gate_shexp.weight"].shape == (2816, 2048)
    assert specs["blk.0.ffn_down.weight"].shape == (2048, 10944)
    assert specs["blk.9.ffn_gate_inp.weight"].shape == (64, 2048)
    assert specs["blk.1.ffn_up_exps.weight"].sources[63] == "model.layers.1.mlp.experts.63.up_proj.weight"


def test_bytes_read_per_token_of_the_16b_in_8_bits() -> None:
    """Guards which weights one token reads: 2.79 GB of 17.41 in Q8_0, as measured from a real file."""
    hp = PRESETS["deepseekmoe-16b"].hp
    parts = shares(hp, unquantized(hp, GgmlType.Q8_0))
    assert sum(part.n_bytes for part in parts) / 1e9 == pytest.approx(17.41, abs=0.01)
    assert sum(part.n_bytes_per_token for part in parts) / 1e9 == pytest.approx(2.79, abs=0.01)


@pytest.mark.parametrize("name", CACHE_BYTES)
def test_kv_cache(name: str) -> None:
    """Guards the bytes per token that bound how many conversations fit."""
    assert kv_bytes_per_token(PRESETS[name].hp) == CACHE_BYTES[name]


def test_a_preset_is_recognised_by_its_dimensions() -> None:
    """Guards against losing the paper's figure when a file has another name or context."""
    for preset in PRESETS.values():
        assert matching_preset(preset.hp) is preset
