"""What a file's type is called, wherever files are shown; of foreign files, too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from gguf.constants import GGUFValueType
from support.imatrices import random_imatrix
from support.quantize_oracle import llama_quantize
from support.tiny_gguf import MOE, write_tiny

from dsmoe_local.model.discovery import KnownModel, describe
from dsmoe_local.model.file_type import FILE_TYPES, RECIPE_KEY, file_type_name, imatrix_name
from dsmoe_local.model.gguf_file import Field, GgufFile, read_gguf
from dsmoe_local.model.report import as_json, report_on
from dsmoe_quantize.policy.mixes import FLOAT_TYPES, MIXES
from dsmoe_quantize.policy.named_recipes import RECIPES
from dsmoe_quantize.policy.recipe_file import parse_recipe, render_recipe
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny-BF16.gguf", MOE)


@pytest.mark.parametrize("word", [*RECIPES, "Q4_K_M", "bf16"])
def test_named_after_what_made_it(word: str, source: Path, tmp_path: Path) -> None:
    """Guards: a recipe of ours that is shown as llama.cpp's mix, whose types it does not have."""
    out = tmp_path / "out.gguf"
    quantize_file(plan_quantization(source, resolve(word)), out)
    name = resolve(word).name
    assert file_type_name(read_gguf(out)) == name
    assert describe(KnownModel("out", out, "")).type == name
    assert as_json(report_on(str(out)))["type"] == name
    assert as_json(report_on(str(out)))["imatrix"] is None


def test_a_file_of_a_recipe_that_is_quantized_again(source: Path, tmp_path: Path) -> None:
    """Guards: a name that outlives the types that it stood for."""
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    quantize_file(plan_quantization(source, resolve("q4-fast")), first)
    quantize_file(plan_quantization(first, resolve("Q8_0"), allow_requantize=True), second)
    assert file_type_name(read_gguf(second)) == "Q8_0"


@pytest.mark.parametrize("word", ["q4-fast", "q8"])
def test_llama_cpp_quantizes_it_again(word: str, source: Path, tmp_path: Path) -> None:
    """Guards: a recipe's name on a file of llama.cpp's, which keeps what our file said of its recipe."""
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    quantize_file(plan_quantization(source, resolve(word)), first)
    llama_quantize(first, second, FILE_TYPES["Q5_K_S"], allow_requantize=True)
    assert read_gguf(second).get(RECIPE_KEY), "llama.cpp keeps it"
    assert file_type_name(read_gguf(second)) == "Q5_K_S"
    assert file_type_name(read_gguf(first)) == word


def test_its_importance_matrix(source: Path, tmp_path: Path) -> None:
    """Guards: a matrix that nobody can tell the file was made with."""
    plan = plan_quantization(source, resolve("q4"), imatrix=random_imatrix(MOE))
    file = read_gguf(quantize_file(plan, tmp_path / "out.gguf").path)
    assert (file_type_name(file), imatrix_name(file)) == ("q4", "some.imatrix.gguf")
    assert report_on(str(file.path)).imatrix == "some.imatrix.gguf"


def with_recipe(file: GgufFile, value: object, kind: GGUFValueType = GGUFValueType.STRING) -> GgufFile:
    return replace(file, metadata={**file.metadata, RECIPE_KEY: Field(value, kind)})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        'name = "\x1b[31mred"',
        'name = "../../etc"',
        f'name = "{"x" * 65}"',
        f'{"#" * 10_000}\nname = "far"',
        '[about]\nname = "another"',
        "name = 'q4'",
    ],
)
def test_recipes_of_foreign_files(text: str, source: Path) -> None:
    """Guards: control characters, or megabytes, in a table; a text of another key taken for the name."""
    assert file_type_name(with_recipe(read_gguf(source), text)) == "BF16"
    assert file_type_name(with_recipe(read_gguf(source), 5, GGUFValueType.UINT32)) == "BF16"


def test_every_name_that_a_recipe_may_have(source: Path) -> None:
    """Guards: a name that the recipe file allows and the table does not show."""
    for name in ("q", "9.2GiB", "my_recipe-2+x", "x" * 64):
        text = f'format = 1\nname = "{name}"\nclosest = "BF16"\n[types]\noutput = "f16"'
        recipe = parse_recipe(text, "test")
        assert file_type_name(with_recipe(read_gguf(source), render_recipe(recipe))) == name


@pytest.mark.parametrize("closest", [*MIXES, *FLOAT_TYPES])
def test_every_type_that_a_recipe_may_be_closest_to(closest: str, source: Path) -> None:
    """Guards: a name that gguf has another word for, so that the recipe is never shown."""
    recipe = parse_recipe(f'format = 1\nname = "x"\nclosest = "{closest}"\n[types]\noutput = "f16"', "test")
    file = with_recipe(read_gguf(source), render_recipe(recipe))
    kind = Field(recipe.file_type, GGUFValueType.UINT32)
    assert file_type_name(replace(file, metadata={**file.metadata, "general.file_type": kind})) == "x"


def test_a_recipe_that_is_close_to_nothing(source: Path) -> None:
    """Guards: a name that is believed because neither it nor the file has a type."""
    file = with_recipe(read_gguf(source), 'format = 1\nname = "x"\n')
    assert file_type_name(file) == "BF16"
    metadata = {key: field for key, field in file.metadata.items() if key != "general.file_type"}
    assert file_type_name(replace(file, metadata=metadata)) == "BF16 + F32"


def test_without_any_name(source: Path) -> None:
    """Guards: a file without general.file_type that cannot be shown."""
    file = read_gguf(source)
    metadata = {key: field for key, field in file.metadata.items() if key != "general.file_type"}
    assert file_type_name(replace(file, metadata=metadata)) == "BF16 + F32"
