"""`dsmoe quantize --recipe-out`, and the recipe in the file: what it may replace, what it says, its name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.imatrices import random_imatrix
from support.tiny_gguf import FOUR_LAYERS, NARROW, write_tiny

from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.base.paths import cache_folder
from dsmoe_local.cli.commands import load_command
from dsmoe_local.model.file_type import RECIPE_KEY, file_type_name
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.imatrix_file import write_imatrix
from dsmoe_quantize.policy.choice import Overrides, parse_override
from dsmoe_quantize.policy.named_recipes import RECIPES
from dsmoe_quantize.policy.recipe_file import parse_recipe, read_recipe, refuse_place, render_recipe
from dsmoe_quantize.policy.recipes import OTHERS, recipe_for
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization

Q4 = recipe_for(RECIPES["q4"], FOUR_LAYERS.n_layers)
TARGET = ("--target-bpw", "7.5", "--sample", "512")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_tiny(tmp_path / "tiny-BF16.gguf", FOUR_LAYERS)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(load_command("quantize"), [str(each) for each in arguments])


@pytest.mark.parametrize("options", [(), ("--force",), ("--dry-run",)])
@pytest.mark.parametrize(
    "place", ["tiny-BF16.gguf", "link", "out.gguf", "notes.txt", "folder", "damaged.toml", "no/r.toml"]
)
def test_what_a_recipe_may_not_replace(
    source: Path, tmp_path: Path, place: str, options: tuple[str, ...]
) -> None:
    """Guards: a model, or a text, that is gone because of one wrong argument."""
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "notes.txt").write_text("precious")
    (tmp_path / "damaged.toml").write_text('format = 1\nname = "mine"\n[types')
    (tmp_path / "folder").mkdir()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for choice in (("--type", "q4"), TARGET):
        result = invoke(source, "out.gguf", *choice, "--recipe-out", place, *options)
        assert isinstance(result.exception, FileError if place == "no/r.toml" else UsageError)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert not (cache_folder() / "sensitivity").exists(), "refused before anything is measured"


def test_the_default_output_is_not_for_a_recipe(source: Path) -> None:
    """Guards: a recipe in the place where the model comes to be."""
    for choice, name in ((("--type", "q8"), "tiny-q8.gguf"), (TARGET, "tiny-7.5bpw.gguf")):
        result = invoke(source, *choice, "--recipe-out", f"./{name}")
        assert isinstance(result.exception, UsageError)
        assert "would replace the model" in str(result.exception)


def test_another_recipe_is_replaced_on_request_alone(source: Path, tmp_path: Path) -> None:
    """Guards: a recipe with hours of edits written over; a run that cannot be given again after a kill."""
    arguments = (source, "--dry-run", "--recipe-out", "r.toml")
    assert invoke(*arguments, "--type", "q4").exit_code == 0
    assert invoke(*arguments, "--type", "q4").exit_code == 0
    before = (tmp_path / "r.toml").read_bytes()
    refused = invoke(*arguments, "--type", "q8")
    assert isinstance(refused.exception, FileError)
    assert "--force" in str(refused.exception)
    assert (tmp_path / "r.toml").read_bytes() == before
    assert invoke(*arguments, "--type", "q8", "--force").exit_code == 0
    assert read_recipe(tmp_path / "r.toml").name == "q8"


def test_a_place_that_cannot_be_looked_at(tmp_path: Path) -> None:
    """Guards: a pipe that is waited for."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a recipe"):
        refuse_place(tmp_path / "pipe")


def test_outputs_are_looked_at_before_the_recipe_is_written(source: Path, tmp_path: Path) -> None:
    """Guards: minutes of measuring, and a recipe, for an output that is refused."""
    (tmp_path / "out.gguf").write_text("precious")
    for choice in (("--type", "q4"), TARGET):
        refused = invoke(source, "out.gguf", *choice, "--recipe-out", "r.toml")
        assert isinstance(refused.exception, FileError)
        assert "--force" in str(refused.exception)
        same = invoke(source, source, *choice, "--recipe-out", "r.toml", "--force")
        assert isinstance(same.exception, UsageError)
    assert not (tmp_path / "r.toml").exists()
    assert not (cache_folder() / "sensitivity").exists()


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_mistakes_are_found_before_measuring(source: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Guards: minutes of measuring before a pattern without effect, or a foreign matrix, is refused."""
    foreign = random_imatrix(FOUR_LAYERS)
    entries = {f"other.{name}": entry for name, entry in foreign.entries.items()}
    write_imatrix(Imatrix(entries, ("a text.txt",), 12, 512), tmp_path / "m.gguf")
    for arguments, what in (
        (("--tensor-type", "attn_q=q8_0"), "matches no tensor"),
        (("--imatrix", "m.gguf"), "none of this one's tensors"),
    ):
        for choice in (("--type", "q4"), TARGET):
            result = invoke(source, *choice, *arguments, *options)
            assert isinstance(result.exception, UsageError), result.exception
            assert what in str(result.exception)
    assert not (cache_folder() / "sensitivity").exists()


OVERRIDES = {
    "output": ("--output-type", "q8_0"),
    "embedding": ("--embedding-type", "q5_0"),
    "some layers": ("--tensor-type", r"blk\.[23]\.ffn_down_exps\.weight=q8_0"),
    "every layer": ("--tensor-type", r"blk\.\d\.attn_v\.weight=q5_0"),
    "every layer, two types": (
        *("--tensor-type", r"blk\.[0-2]\.attn_output\.weight=f32"),
        *("--tensor-type", r"blk\.\d\.attn_output\.weight=q5_0"),
    ),
    "a type that does not fit": ("--tensor-type", r"blk\..*_exps\.weight=q6_k"),
}


@pytest.mark.parametrize("choice", [("--type", "q4"), TARGET], ids=lambda each: each[1])
@pytest.mark.parametrize("overrides", OVERRIDES)
def test_overrides_are_in_the_recipe(
    source: Path, tmp_path: Path, choice: tuple[str, ...], overrides: str
) -> None:
    """Guards: a recipe, written or in the file, that makes other types than the file has."""
    first = invoke(source, "first.gguf", *choice, *OVERRIDES[overrides], "--recipe-out", "r.toml")
    assert first.exit_code == 0, first.exception
    assert "the recipe cannot record" not in first.stderr
    again = invoke(source, "again.gguf", "--recipe", "r.toml")
    assert again.exit_code == 0, again.exception
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
    assert read_gguf(tmp_path / "first.gguf").get(RECIPE_KEY) == (tmp_path / "r.toml").read_text()


def test_a_tied_embedding_is_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an override for the embedding in a line that such a model does not read."""
    monkeypatch.chdir(tmp_path)
    source = write_tiny(tmp_path / "tied.gguf", NARROW)
    for number, flag in enumerate(("--output-type", "--embedding-type")):
        names = (f"{number}.gguf", f"{number}.toml", f"{number}-again.gguf")
        assert invoke(source, names[0], "--type", "q4", flag, "q4_1", "--recipe-out", names[1]).exit_code == 0
        assert read_gguf(tmp_path / names[0]).tensors["token_embd.weight"].type.name == "Q4_1"
        assert invoke(source, names[2], "--recipe", names[1]).exit_code == 0
        assert (tmp_path / names[0]).read_bytes() == (tmp_path / names[2]).read_bytes()


@pytest.mark.parametrize("choice", [("--type", "q4"), TARGET], ids=lambda each: each[1])
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_overrides_that_no_recipe_can_tell(
    source: Path, tmp_path: Path, choice: tuple[str, ...], options: tuple[str, ...]
) -> None:
    """Guards: query and key of two types, which share a line, and a recipe that hides it or has a hole."""
    overrides = (
        *("--tensor-type", r"blk\.\d\.attn_q\.weight=f16"),
        *("--tensor-type", r"blk\.\d\.attn_k\.weight=q4_1"),
    )
    result = invoke(source, *choice, *overrides, "--recipe-out", "r.toml", *options)
    assert result.exit_code == 0, result.exception
    assert "note: the recipe cannot record the type of blk.0.attn_" in result.stderr
    recipe = read_recipe(tmp_path / "r.toml")
    assert "more" in str(recipe.about["left_out"])
    assert invoke(source, "again.gguf", "--recipe", "r.toml").exit_code == 0
    whole = invoke(source, "whole.gguf", "--recipe", "r.toml", *overrides)
    assert whole.exit_code == 0, whole.exception
    if not options:
        first = read_gguf(next(tmp_path.glob("tiny-[q7]*.gguf")))
        for name, tensor in read_gguf(tmp_path / "whole.gguf").tensors.items():
            assert tensor.type is first.tensors[name].type


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (Overrides(), "q4"),
        (Overrides(output=Q4.types["output"][OTHERS]), "q4"),
        (Overrides(output=GgmlType.F16), "q4-changed"),
        (Overrides(tensors=(parse_override(r"blk\.1\.attn_q\.weight=q8_0"),)), "q4-changed"),
    ],
    ids=["none", "as it is", "another type", "a part of a group"],
)
def test_the_name_of_a_changed_recipe(source: Path, overrides: Overrides, name: str) -> None:
    """Guards: `q4` shown for a file that has other types than q4."""
    plan = plan_quantization(source, resolve("q4"), overrides)
    assert plan.record.type.name == name
    assert parse_recipe(plan.metadata[RECIPE_KEY].value, "metadata").name == name


@pytest.mark.parametrize("name", ["q4", "Q4", "q8", "Q4_K_M", "q4_k", "bf16"])
def test_names_that_have_a_meaning(source: Path, tmp_path: Path, name: str) -> None:
    """Guards: an edited recipe whose files are called and shown as q4, or as llama.cpp's mix."""
    edited = replace(Q4, name=name, types={**Q4.types, "routed-down": {OTHERS: GgmlType.F16}})
    (tmp_path / "r.toml").write_text(render_recipe(edited))
    refused = invoke(source, "--recipe", "r.toml")
    assert isinstance(refused.exception, UsageError)
    assert f"called {name}" in str(refused.exception)
    assert "name = " in str(refused.exception)
    (tmp_path / "r.toml").write_text(render_recipe(replace(Q4, name=name)))
    result = invoke(source, "out.gguf", "--recipe", "r.toml")
    assert (result.exit_code == 0) == (name.lower() == "q4")
    if result.exit_code == 0:
        assert file_type_name(read_gguf(tmp_path / "out.gguf")) == name
