"""Importance matrices and recipe files in one pass from the checkpoint: the same files as in two steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from support.checkpoints import TINY, WIDE, write_checkpoint
from support.hub_server import Hub, serving
from support.imatrices import random_imatrix
from support.quantize_oracle import tensor_data

from dsmoe_convert.convert import ConvertOptions, RunOptions, convert_folder
from dsmoe_convert.sources import SourceOptions, convert
from dsmoe_local.base.errors import FileError, FormatError, InterruptedRunError, UsageError
from dsmoe_local.base.progress import Advanced, Event, Note
from dsmoe_local.cli.commands import load_command
from dsmoe_local.model.file_type import RECIPE_KEY
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_quantize.imatrix_file import read_imatrix, write_imatrix
from dsmoe_quantize.policy.choice import Overrides, parse_override
from dsmoe_quantize.policy.named_recipes import RECIPES, NamedRecipe
from dsmoe_quantize.policy.recipe_file import parse_recipe, render_recipe, write_recipe
from dsmoe_quantize.policy.recipes import recipe_for
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization, quantize_file

MINE = NamedRecipe(
    "mine", "a test", "Q4_K_M", {"": "Q4_K", "routed-down": {"Q5_0": "last-eighth", "IQ4_NL": "others"}}
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bf16 checkpoint with K-quant widths, and its unquantized GGUF."""
    folder = tmp_path_factory.mktemp("model")
    source = write_checkpoint(folder / "wide", WIDE, dtype=torch.bfloat16)
    return source, convert_folder(source, folder / "wide-BF16.gguf").path


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    """Some experts are cold, and the output was not seen."""
    write_imatrix(random_imatrix(WIDE, least=0), tmp_path / "m.gguf")
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("word", [*RECIPES, "Q4_K_M", "IQ4_XS", "Q4_0", "f16"])
def test_one_pass_is_as_two(word: str, model: tuple[Path, Path], matrix: Path, tmp_path: Path) -> None:
    """Guards: a matrix that does not reach the encoder, rows that meet another's columns, types that a mix
    changes with a matrix, metadata of one command alone.
    """
    imatrix = read_imatrix(matrix)
    direct = convert_folder(model[0], tmp_path / "direct.gguf", ConvertOptions(word, imatrix=imatrix))
    plan = plan_quantization(model[1], resolve(word), imatrix=imatrix)
    stepwise = quantize_file(plan, tmp_path / "stepwise.gguf")
    assert direct.path.read_bytes() == stepwise.path.read_bytes()
    found = read_gguf(direct.path)
    without = read_gguf(convert_folder(model[0], tmp_path / "without.gguf", ConvertOptions(word)).path)
    # Nothing in these types heeds a matrix.
    is_used = word not in ("q8", "f16")
    assert (tensor_data(found) != tensor_data(without)) == is_used
    assert found.get("quantize.imatrix.file") == ("m.gguf" if is_used else None)
    assert (found.metadata == without.metadata) != is_used


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "no tensor is quantized"),
        (("--type", "f16"), "no tensor is quantized"),
        (("--type", "q8"), "Q8_0 does not use one"),
        (("--type", "q4"), ""),
    ],
)
def test_a_matrix_that_changes_nothing(
    arguments: tuple[str, ...], why: str, model: tuple[Path, Path], matrix: Path, tmp_path: Path
) -> None:
    """Guards: a matrix that is ignored without a word, or told of in a dry run otherwise than in the run."""
    for more in ((), ("--dry-run",)):
        result = invoke(model[0], "-o", tmp_path / "out.gguf", *arguments, "--imatrix", matrix, *more)
        assert result.exit_code == 0, result.exception
        assert ("has no effect" in result.stderr) == bool(why)
        assert why in result.stderr
        assert ("has nothing about" in result.stderr) == (not why)


def test_a_recipe_file_in_one_pass(model: tuple[Path, Path], matrix: Path, tmp_path: Path) -> None:
    """Guards: a recipe whose layers are counted otherwise here, or that is not kept in the file."""
    recipe = recipe_for(MINE, WIDE.n_layers)
    imatrix = read_imatrix(matrix)
    options = ConvertOptions(recipe=recipe, imatrix=imatrix)
    direct = convert_folder(model[0], tmp_path / "direct.gguf", options)
    stepwise = quantize_file(plan_quantization(model[1], recipe, imatrix=imatrix), tmp_path / "two.gguf")
    assert direct.path.read_bytes() == stepwise.path.read_bytes()
    assert parse_recipe(read_gguf(direct.path).get(RECIPE_KEY), "metadata") == recipe


def interrupted(source: Path, out: Path, options: ConvertOptions) -> None:
    """A run that ends after some tensors."""
    run = RunOptions(threads=1)
    n_heard = 0

    def listen(event: Event) -> None:
        nonlocal n_heard
        n_heard += isinstance(event, Advanced)
        if n_heard > 20:
            run.stop.set()

    with pytest.raises(InterruptedRunError):
        convert_folder(source, out, options, replace(run, listen=listen))


def notes_of(source: Path, out: Path, options: ConvertOptions) -> str:
    notes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    convert_folder(source, out, options, RunOptions(listen=listen))
    return "\n".join(notes)


RECIPE = recipe_for(MINE, WIDE.n_layers)
FIRST = random_imatrix(WIDE)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (ConvertOptions("q4", imatrix=FIRST), ConvertOptions("q4", imatrix=FIRST), "continuing"),
        (
            ConvertOptions("q4", imatrix=FIRST),
            ConvertOptions("q4", imatrix=random_imatrix(WIDE, seed=1)),
            "interrupted run: the importance matrix",
        ),
        (ConvertOptions("q4"), ConvertOptions("q4", imatrix=FIRST), "interrupted run: the importance matrix"),
        (ConvertOptions(recipe=RECIPE), ConvertOptions(recipe=RECIPE), "continuing"),
        (
            ConvertOptions(recipe=RECIPE),
            ConvertOptions(
                recipe=parse_recipe(render_recipe(RECIPE).replace('others"', 'others,9"'), "test")
            ),
            "interrupted run: the recipe",
        ),
    ],
)
def test_a_resumed_run(
    before: ConvertOptions, after: ConvertOptions, said: str, model: tuple[Path, Path], tmp_path: Path
) -> None:
    """Guards: a file half by one matrix or recipe and half by another; work that is thrown away."""
    interrupted(model[0], tmp_path / "out.gguf", before)
    assert said in notes_of(model[0], tmp_path / "out.gguf", after)
    fresh = convert_folder(model[0], tmp_path / "fresh.gguf", after).path
    assert (tmp_path / "out.gguf").read_bytes() == fresh.read_bytes()


def test_a_matrix_of_another_model(model: tuple[Path, Path], tmp_path: Path) -> None:
    """Guards: minutes of encoding before the refusal, or none."""
    options = ConvertOptions("q4", imatrix=random_imatrix(TINY))
    with pytest.raises(UsageError, match="of another model"):
        convert_folder(model[0], tmp_path / "out.gguf", options)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with serving(Hub(write_checkpoint(tmp_path / "tiny-moe"))) as running:
        yield running


@pytest.mark.parametrize("low_disk", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        ConvertOptions("q4", imatrix=random_imatrix(WIDE)),
        ConvertOptions(recipe=parse_recipe('format = 1\nname = "x"\n[types]\noutput = "q8_0"', "test")),
        ConvertOptions("q4", Overrides(tensors=(parse_override("no tensor=q8_0"),))),
    ],
    ids=["matrix", "recipe", "pattern"],
)
def test_what_cannot_be_is_found_before_the_weights(
    hub: Hub, options: ConvertOptions, low_disk: bool, tmp_path: Path
) -> None:
    """Guards: 33 GB that are downloaded first and refused then."""
    source = SourceOptions(endpoint=hub.url, low_disk=low_disk)
    with pytest.raises(UsageError):
        convert(hub.repository, tmp_path / "out.gguf", options, source)
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(load_command("convert"), [str(each) for each in arguments])


def test_on_the_command_line(
    model: tuple[Path, Path], matrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: options that do not reach the converter; a note of what the matrix lacks that is not told."""
    monkeypatch.chdir(tmp_path)
    write_recipe(RECIPE, tmp_path / "mine.toml")
    result = invoke(model[0], "--recipe", "mine.toml", "--imatrix", matrix)
    assert result.exit_code == 0, result.exception
    assert "the importance matrix has nothing about " in result.stderr
    assert "output.weight" in result.stderr
    options = ConvertOptions(recipe=RECIPE, imatrix=read_imatrix(matrix))
    expected = convert_folder(model[0], tmp_path / "expected.gguf", options).path
    assert (tmp_path / "wide-mine.gguf").read_bytes() == expected.read_bytes()
    table = invoke(model[0], "--recipe", "mine.toml", "--dry-run")
    assert "mine, routed-down.1" in table.stdout
    both = invoke(model[0], "--recipe", "mine.toml", "--type", "q4")
    assert isinstance(both.exception, UsageError)
    assert "exclude each other" in str(both.exception)
    assert isinstance(invoke(model[0], "--recipe", "missing.toml").exception, FileError)
    assert isinstance(invoke(model[0], "--type", "q4", "--imatrix", "mine.toml").exception, FormatError)
