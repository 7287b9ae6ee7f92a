"""Recipe files: what is written is read back, what people write is understood or refused with the reason."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quantize_oracle import llama_quantize, tensor_data
from support.tiny_gguf import MOE, NARROW, ODD, write_tiny

from dsmoe_local.base.errors import FileError, FormatError, UsageError
from dsmoe_local.model.file_type import FILE_TYPES, RECIPE_KEY
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_local.model.layout import UNQUANTIZED_ROLES, tensor_specs
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.budget.error_weights import WEIGHTS
from dsmoe_quantize.policy.choice import Overrides, parse_override
from dsmoe_quantize.policy.recipe_file import (
    format_layers,
    parse_recipe,
    read_recipe,
    render_recipe,
    write_recipe,
)
from dsmoe_quantize.policy.recipes import KINDS, OTHERS, RECIPE_FALLBACKS, LayeredRecipe, group_of
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file
from dsmoe_quantize.write import kernels

TYPES = st.sampled_from(sorted(kernels.WRITABLE))
HAND_MADE = """
format = 1
name = "mine"

[types]
embedding = "q4_k"        # any case
output = "Q6_K"
attention-query-key = "Q5_K"
attention-value = { Q8_0 = "0, 1", Q6_K = "others" }
attention-output = "Q5_K"
dense-gate-up = "Q4_K"
dense-down = "Q4_K"
shared-gate-up = "Q5_K"
shared-down = "Q5_K"
routed-gate-up = { Q4_K = "1-7", Q5_K = "8" }
routed-down = "Q5_0"
"""


@st.composite
def recipes(draw: st.DrawFn) -> LayeredRecipe:
    """Any recipe that a file can hold."""
    layers = st.dictionaries(st.one_of(st.none(), st.integers(0, 511)), TYPES, min_size=1, max_size=40)
    types = draw(st.dictionaries(st.sampled_from(KINDS), layers, min_size=1))
    closest = draw(st.sampled_from(["Q4_K_M", "Q8_0", "F16", "IQ4_XS"]))
    keys = st.from_regex(r"[a-z_0-9-]{1,20}", fullmatch=True)
    values = st.one_of(st.text(), st.integers(-(2**60), 2**60), st.floats(-1e300, 1e300))
    return LayeredRecipe(
        draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", fullmatch=True)),
        closest,
        types,
        draw(st.dictionaries(TYPES, TYPES)),
        draw(st.dictionaries(keys, values, max_size=4)),
    )


@settings(max_examples=150)
@given(recipes())
def test_round_trip(recipe: LayeredRecipe) -> None:
    """Guards: layers that get lost in ranges, texts that break the TOML, a table that is read another way."""
    text = render_recipe(recipe)
    tomllib.loads(text)
    found = parse_recipe(text, "test")
    assert replace(found, about={}) == replace(recipe, about={})
    assert found.about.keys() == recipe.about.keys()
    for key, value in recipe.about.items():
        if not isinstance(value, str):
            assert found.about[key] == value
    assert render_recipe(found) == text


def test_written_by_hand() -> None:
    """Guards: a comment, a space or a small letter that a person writes and the reader refuses."""
    recipe = parse_recipe(HAND_MADE, "test")
    assert recipe.type_of("token_embd.weight", MOE)[0] is GgmlType.Q4_K
    tied = replace(MOE, tied_embeddings=True)
    assert recipe.type_of("token_embd.weight", tied)[0] is GgmlType.Q6_K, "the output, too"
    for layer, kind in ((0, GgmlType.Q8_0), (1, GgmlType.Q8_0), (2, GgmlType.Q6_K), (99, GgmlType.Q6_K)):
        assert recipe.type_of(f"blk.{layer}.attn_v.weight", MOE)[0] is kind
    assert recipe.type_of("blk.7.ffn_up_exps.weight", MOE)[0] is GgmlType.Q4_K
    with pytest.raises(UsageError, match=r"no type for routed-gate-up\.9"):
        recipe.type_of("blk.9.ffn_up_exps.weight", MOE)
    assert recipe.fallbacks == RECIPE_FALLBACKS
    assert recipe.closest == "Q4_K_M", "its base is the most frequent type"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (("format = 1", "format = 2"), "not a recipe of format 1"),
        (("format = 1", "format = ["), "not TOML"),
        (("format = 1", f"format = {'9' * 5000}"), "not TOML"),
        (('name = "mine"', ""), "needs a name"),
        (('name = "mine"', 'name = "../../mine"'), "needs a name"),
        (('name = "mine"', 'name = "mine"\ntypo = 1'), "unknown key 'typo'"),
        (('name = "mine"', 'name = "mine"\nclosest = "Q9"'), "not a mix"),
        (("routed-down", "routed-dwon"), "unknown group 'routed-dwon'"),
        (('routed-down = "Q5_0"', 'routed-down = "Q9_0"'), "routed-down: 'Q9_0' is not a type"),
        (('routed-down = "Q5_0"', "routed-down = 5"), "a type must be a string"),
        (('routed-down = "Q5_0"', "routed-down = {}"), "has no types"),
        (('"1-7"', '"7-1"'), "not a list of layers"),
        (('"1-7"', '"1-70000"'), "not a list of layers"),
        (('"1-7"', '"one"'), "not a list of layers"),
        (('"1-7"', "7"), "not a list of layers"),
        (('"1-7"', '"1-8"'), "layer 8 has two types"),
        (('"8" }', '"others,others" }'), "others has two types"),
        (("[types]", "[tupes]"), "unknown key 'tupes'"),
        (('routed-down = "Q5_0"', 'routed-down = "Q5_0"\n[fallbacks]\nQ4_K = "x"'), "fallbacks"),
        (('routed-down = "Q5_0"', 'routed-down = "Q5_0"\n[about]\nx = [1]'), "about"),
    ],
)
def test_what_is_wrong_is_said(change: tuple[str, str], what: str) -> None:
    """Guards: a typing error that is ignored, or a traceback for it."""
    assert change[0] in HAND_MADE
    with pytest.raises(FormatError, match=what):
        parse_recipe(HAND_MADE.replace(*change), "test")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Guards: a traceback for a missing file, a folder, bytes that are no text, gigabytes."""
    with pytest.raises(FileError):
        read_recipe(tmp_path / "missing.toml")
    with pytest.raises(FileError):
        read_recipe(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "large.toml").write_bytes(b"#" * (2 << 20))
    for name in ("bytes.toml", "large.toml"):
        with pytest.raises(FormatError):
            read_recipe(tmp_path / name)
    with pytest.raises(FileError):
        write_recipe(parse_recipe(HAND_MADE, "test"), tmp_path / "missing" / "out.toml")


def test_layers() -> None:
    """Guards: a range that begins or ends one layer off."""
    assert format_layers([]) == []
    assert format_layers([7, 1, 2, 3, 9, 10]) == ["1-3", "7", "9-10"]


@pytest.mark.parametrize("name", ["deepseekmoe-16b", "deepseekmoe-2b"])
def test_every_matrix_has_a_group(name: str) -> None:
    """Guards: a tensor of which no recipe can speak, or a kind without a weight."""
    if name not in PRESETS:
        pytest.skip("no such preset")
    for spec in tensor_specs(PRESETS[name].hp):
        group = group_of(spec.name, PRESETS[name].hp)
        assert (group is None) == (spec.role in UNQUANTIZED_ROLES), spec.name
        assert group is None or group.layer == spec.layer
    assert set(KINDS) == set(WEIGHTS)


def test_layers_that_are_not_there_are_told(tmp_path: Path) -> None:
    """Guards: a number that no layer has, and the layer that was meant left as it is without a word."""
    recipe = parse_recipe(HAND_MADE, "test")
    for n_layers, told in ((3, ["3-8"]), (9, [])):
        hp = replace(MOE, n_layers=n_layers)
        plan = plan_quantization(write_tiny(tmp_path / f"{n_layers}.gguf", hp), recipe)
        assert [note.split(": ")[1] for note in plan.notes if "this model does not have" in note] == told


def test_applied_as_llama_cpp_would(tmp_path: Path) -> None:
    """Guards: a type that lands on another tensor; the same types given to llama.cpp make the same bytes."""
    source = write_tiny(tmp_path / "tiny-BF16.gguf", MOE)
    plan = plan_quantization(source, parse_recipe(HAND_MADE, "test"))
    summary = quantize_file(plan, tmp_path / "ours.gguf")
    assert summary.bits_per_weight == plan.bits_per_weight < 8 * summary.n_bytes / summary.n_weights
    patterns = {
        "^" + each.name.replace(".", "\\.") + "$": int(each.type)
        for each in plan.choices
        if each.reason.startswith("mine, ")
    }
    theirs = llama_quantize(
        source,
        tmp_path / "theirs.gguf",
        plan.type.file_type,
        patterns,
        token_embedding_type=int(GgmlType.Q4_K),
        output_tensor_type=int(GgmlType.Q6_K),
    )
    ours = tmp_path / "ours.gguf"
    assert tensor_data(read_gguf(ours)) == tensor_data(read_gguf(theirs))
    metadata = dict(read_gguf(ours).metadata)
    del metadata[RECIPE_KEY]
    assert metadata == read_gguf(theirs).metadata


def test_widths_and_overrides(tmp_path: Path) -> None:
    """Guards: a recipe of a wide model that aborts on a narrow one; an override that a recipe outweighs."""
    recipe = parse_recipe(
        HAND_MADE.replace('"1-7"', '"others"').replace('Q5_K = "8"', 'Q5_K = "8-9"'), "test"
    )
    overrides = Overrides(tensors=(parse_override(r"blk\.1\.attn_q\.weight=F16"),))
    for number, hp in enumerate((NARROW, ODD)):
        plan = plan_quantization(write_tiny(tmp_path / f"{number}.gguf", hp), recipe, overrides)
        found = {each.name: each for each in plan.choices}
        assert found["blk.1.attn_q.weight"].type is GgmlType.F16
        assert found["blk.1.ffn_gate_inp.weight"].type is GgmlType.F32
    assert found["blk.1.ffn_down_exps.weight"].type is GgmlType.F16, "72 columns take no block"
    narrow = plan_quantization(tmp_path / "0.gguf", recipe)
    kinds = {each.name: each.type for each in narrow.choices}
    assert kinds["blk.1.ffn_up_exps.weight"] is GgmlType.IQ4_NL
    assert kinds["token_embd.weight"] is GgmlType.Q8_0, "the fallback of Q6_K"


def test_in_the_metadata(tmp_path: Path) -> None:
    """Guards: a file that does not say how it was made, or goes on saying it when it is made anew."""
    source = write_tiny(tmp_path / "tiny-BF16.gguf", MOE)
    recipe = parse_recipe(HAND_MADE, "test")
    quantize_file(plan_quantization(source, recipe), tmp_path / "first.gguf")
    kept = read_gguf(tmp_path / "first.gguf")
    assert parse_recipe(kept.get(RECIPE_KEY), "metadata") == recipe
    assert kept.get("general.file_type") == FILE_TYPES["Q4_K_M"]
    plan = plan_quantization(tmp_path / "first.gguf", resolve("Q8_0"), allow_requantize=True)
    quantize_file(plan, tmp_path / "again.gguf")
    assert read_gguf(tmp_path / "again.gguf").get(RECIPE_KEY) is None


def test_written_and_read(tmp_path: Path) -> None:
    """Guards: a file that is not durable under its name, or another recipe."""
    recipe = parse_recipe(HAND_MADE, "test")
    write_recipe(recipe, tmp_path / "mine.toml")
    assert read_recipe(tmp_path / "mine.toml") == recipe
    assert set(recipe.types["routed-down"]) == {OTHERS}
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]
