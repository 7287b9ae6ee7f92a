"""`dsmoe quantize` with targets and recipe files, as a user runs it."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from support.imatrices import random_imatrix
from support.tiny_gguf import FOUR_LAYERS, MOE, MOE_KINDS, write_tiny

from dsmoe_local.base.config_file import config_path
from dsmoe_local.base.errors import FileError, FormatError, UsageError
from dsmoe_local.base.paths import cache_folder
from dsmoe_local.cli.commands import load_command
from dsmoe_local.model.file_type import RECIPE_KEY
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import read_gguf
from dsmoe_quantize.budget.explanation import stated_reasons
from dsmoe_quantize.budget.kernel_speeds import CPUS
from dsmoe_quantize.errors import RequantizeError
from dsmoe_quantize.imatrix_file import write_imatrix
from dsmoe_quantize.policy.choice import Overrides, may_change
from dsmoe_quantize.policy.named_recipes import RECIPES
from dsmoe_quantize.policy.recipe_file import parse_recipe, read_recipe
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_tiny(tmp_path / "tiny-BF16.gguf", FOUR_LAYERS)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(load_command("quantize"), [str(each) for each in arguments])


def test_a_size(source: Path, tmp_path: Path) -> None:
    """Guards: a file that is too large or much too small; a trade-off that is not told, or told on stdout."""
    result = invoke(source, "--target-size", "1.3 MB", "--sample", "4096")
    assert result.exit_code == 0, result.exception
    out = tmp_path / "tiny-1.3MB.gguf"
    assert 0.99 * 1.3e6 < out.stat().st_size <= 1.3e6
    assert result.stdout == ""
    for text in ("this recipe", "Q4_K_M", "5% more", "predicted error", "left of the budget: size 0."):
        assert text in result.stderr
    assert parse_recipe(read_gguf(out).get(RECIPE_KEY), "metadata").name == "1.3MB"


def test_a_recipe_is_used_again(source: Path, tmp_path: Path) -> None:
    """Guards: a recipe file that makes another file than the run that wrote it."""
    first = invoke(
        source,
        "first.gguf",
        "--target-bpw",
        "5.2",
        "--sample",
        "4096",
        "--recipe-out",
        "r.toml",
        "--imatrix",
        made(tmp_path),
    )
    assert first.exit_code == 0, first.exception
    again = invoke(source, "again.gguf", "--recipe", "r.toml", "--imatrix", made(tmp_path))
    assert again.exit_code == 0, again.exception
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
    assert read_gguf(tmp_path / "first.gguf").get("quantize.imatrix.file") == "m.gguf"
    assert read_recipe(tmp_path / "r.toml").about["imatrix"] == "m.gguf"


@pytest.mark.parametrize("word", ["q8", "q4-fast"])
def test_a_named_recipe_as_a_file(source: Path, tmp_path: Path, word: str) -> None:
    """Guards: a start for one's own recipe that is not what the name makes; a dry run that writes a model."""
    assert invoke(source, "--type", word, "--recipe-out", "r.toml", "--dry-run").exit_code == 0
    assert not (tmp_path / f"tiny-{word}.gguf").exists()
    assert invoke(source, "--type", word).exit_code == 0
    assert invoke(source, "again.gguf", "--recipe", "r.toml").exit_code == 0
    assert (tmp_path / f"tiny-{word}.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()


def test_names_of_types_are_completed() -> None:
    """Guards: a recipe that the shell does not offer, or only in one case."""
    option = next(each for each in load_command("quantize").params if each.name == "word")
    with click.Context(load_command("quantize")) as context:
        offered = [item.value for item in option.shell_complete(context, "q4")]
        assert offered[:3] == ["q4", "q4-fast", "q4-small"]
        assert "Q4_K_M" in offered
        assert not option.shell_complete(context, "x")


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_help_names_every_recipe(command: str) -> None:
    """Guards: a recipe that nobody hears of."""
    text = CliRunner().invoke(load_command(command), ["--help"]).stdout
    for recipe in RECIPES.values():
        assert f"{recipe.name:<10}{recipe.why}" in text


def made(folder: Path) -> Path:
    path = folder / "m.gguf"
    if not path.exists():
        write_imatrix(random_imatrix(FOUR_LAYERS), path)
    return path


def test_an_edited_recipe(source: Path, tmp_path: Path) -> None:
    """Guards: an edit that has no effect."""
    assert (
        invoke(
            source, "--target-bpw", "5", "--sample", "512", "--dry-run", "--recipe-out", "r.toml"
        ).exit_code
        == 0
    )
    text = (tmp_path / "r.toml").read_text()
    lines = [
        'routed-down = { Q8_0 = "2", IQ4_NL = "others" }' if line.startswith("routed-down") else line
        for line in text.splitlines()
    ]
    (tmp_path / "mine.toml").write_text("\n".join(lines).replace('name = "5bpw"', 'name = "mine"'))
    assert invoke(source, "--recipe", "mine.toml").exit_code == 0
    tensors = read_gguf(tmp_path / "tiny-mine.gguf").tensors
    assert [tensors[f"blk.{layer}.ffn_down_exps.weight"].type.name for layer in (1, 2, 3)] == [
        "IQ4_NL",
        "Q8_0",
        "IQ4_NL",
    ]


def test_explained_without_writing(source: Path, tmp_path: Path) -> None:
    """Guards: a dry run that writes a model; an explanation that leaves out a kind of tensor."""
    result = invoke(
        source, "--target-bpw", "5", "--sample", "512", "--dry-run", "--explain", "--sensitivity", "s.json"
    )
    assert result.exit_code == 0, result.exception
    for text in (
        "routed-down",
        "attention-value",
        "saves elsewhere",
        "multiple of 256",
        "this recipe",
        "Q4_K_S",
    ):
        assert text in result.stdout
    assert all(name in result.stdout for name in read_gguf(source).tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json", "tiny-BF16.gguf"]


def test_measured_once(source: Path, tmp_path: Path) -> None:
    """Guards: minutes of measuring for each target anew."""
    assert invoke(source, "--target-bpw", "5", "--sample", "512", "--dry-run").exit_code == 0
    kept = list((cache_folder() / "sensitivity").iterdir())
    assert len(kept) == 1
    before = kept[0].stat()
    assert invoke(source, "--target-bpw", "6", "--sample", "512", "--dry-run").exit_code == 0
    assert list((cache_folder() / "sensitivity").iterdir()) == kept
    assert kept[0].stat().st_mtime_ns == before.st_mtime_ns
    assert invoke(source, "--target-bpw", "6", "--sample", "600", "--dry-run").exit_code == 0
    assert len(list((cache_folder() / "sensitivity").iterdir())) == 2


def test_the_sample_of_a_file(source: Path) -> None:
    """Guards: a file with a sample of its own that can never be used again."""
    arguments = (source, "--target-bpw", "5", "--dry-run", "--sensitivity", "s.json")
    assert invoke(*arguments, "--sample", "512").exit_code == 0
    assert invoke(*arguments).exit_code == 0
    assert isinstance(invoke(*arguments, "--sample", "100").exception, UsageError)


@pytest.mark.parametrize("word", ["q8", "q4"])
def test_a_quantized_source(source: Path, tmp_path: Path, word: str) -> None:
    """Guards: a second loss that nobody asked for, or that is refused after minutes of measuring."""
    assert invoke(source, "small.gguf", "--type", word).exit_code == 0
    refused = invoke("small.gguf", "--target-bpw", "5", "--sample", "512")
    assert isinstance(refused.exception, RequantizeError)
    assert not (cache_folder() / "sensitivity").exists()
    assert invoke("small.gguf", "--target-bpw", "5", "--sample", "512", "--allow-requantize").exit_code == 0
    assert (tmp_path / "small-5bpw.gguf").exists()


def test_all_budgets(source: Path) -> None:
    """Guards: an option that does not reach the solver."""
    budgets = (
        "--target-size",
        "1.4MB",
        "--target-bytes-per-token",
        "1.2MB",
        "--max-slow-share",
        "60",
        "--min-prompt-speed",
        "0.5",
    )
    result = invoke(source, *budgets, "--cpu", "x86-avx2", "--sample", "512", "--dry-run")
    assert result.exit_code == 0, result.exception
    assert all(
        f"{name} " in result.stdout for name in ("size", "bytes per token", "slow share", "prompt speed")
    )


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--target-bpw", "5", "--type", "q4"), "exclude each other"),
        (("--recipe", "r.toml", "--type", "q4"), "exclude each other"),
        (("--recipe", "r.toml", "--target-bpw", "5"), "exclude each other"),
        (("--type", "q4", "--cpu", "none"), "--cpu needs a target"),
        (("--type", "q4", "--sample", "0"), "--sample needs a target"),
        (("--type", "q4", "--sensitivity", "s.json"), "--sensitivity needs a target"),
        (("--type", "Q4_K_M", "--recipe-out", "r.toml"), "Q4_K_M is not a recipe"),
        (("--max-slow-share", "50", "--type", "q4"), "--max-slow-share needs a target"),
        (("--target-bpw", "5", "--pure"), "--pure needs --type"),
        (("--recipe", "r.toml", "--pure"), "--pure needs --type"),
        (("--target-size", "much"), "is not a size"),
        (("--target-size", ""), "'' is not a size"),
        (("--target-bpw", "5", "--target-bytes-per-token", ""), "'' is not a size"),
        (("--type", ""), "'' is not a type"),
        (("--type", "q8", "--output-type", ""), "'' is not a type"),
        (("--type", "q8", "--embedding-type", ""), "'' is not a type"),
        (("--target-size", "1KB", "--sample", "32"), "no choice of types fits"),
        ((), "no type is given"),
    ],
)
def test_what_cannot_be(source: Path, arguments: tuple[str, ...], what: str) -> None:
    """Guards: an option that is silently ignored."""
    result = invoke(source, *arguments)
    assert isinstance(result.exception, UsageError), result.exception
    assert what in str(result.exception)


def test_types_asked_for_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a group without a reason, a layer that is told with others of another type."""
    monkeypatch.chdir(tmp_path)
    source = write_tiny(tmp_path / "nine-layers.gguf", MOE)
    result = invoke(source, "--type", "Q4_K_M", "--explain", "--output-type", "f16")
    assert result.exit_code == 0, result.exception
    plan = plan_quantization(source, resolve("Q4_K_M"), Overrides(output=GgmlType.F16))
    reasons = stated_reasons(plan)
    assert sum(each.n_bytes for each in reasons) == sum(
        choice.n_bytes for choice in plan.choices if may_change(choice)
    )
    values = {each.layers: (each.type, each.why) for each in reasons if each.kind == "attention-value"}
    assert values == {
        "0,3,6-8": (GgmlType.Q6_K, "more bits in this layer"),
        "1-2,4-5": (GgmlType.Q4_K, "Q4_K_M"),
    }
    assert [each.why for each in reasons if each.kind == "output"] == ["--output-type"]
    for each in reasons:
        assert each.why in result.stdout
    assert {each.kind for each in stated_reasons(plan_quantization(source, resolve("q4")))} == set(MOE_KINDS)


def test_every_kind_of_processor() -> None:
    """Guards: a kind that the table knows and the option does not, or the reverse."""
    option = next(each for each in load_command("quantize").params if each.name == "cpu")
    assert isinstance(option.type, click.Choice)
    assert tuple(option.type.choices) == tuple(CPUS)


def test_files_that_are_not_what_they_should_be(source: Path, tmp_path: Path) -> None:
    """Guards: tracebacks for foreign files."""
    (tmp_path / "text").write_text("text")
    assert isinstance(invoke(source, "--recipe", "text").exception, FormatError)
    assert isinstance(invoke(source, "--recipe", "missing").exception, FileError)
    assert isinstance(invoke(source, "--target-bpw", "5", "--sensitivity", "text").exception, FormatError)
    assert isinstance(invoke(source, "--target-bpw", "5", "--imatrix", "text").exception, FormatError)


def test_the_config_file_gives_way(source: Path, tmp_path: Path) -> None:
    """Guards: a type in the config file that makes every target, and every recipe, an error."""
    path = config_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('[quantize]\ntype = "q8"\n')
    assert invoke(source).exit_code == 0
    assert (tmp_path / "tiny-q8.gguf").exists()
    assert invoke(source, "--target-bpw", "5", "--sample", "512").exit_code == 0
    assert (tmp_path / "tiny-5bpw.gguf").exists()
    path.write_text("[quantize]\ntarget-bpw = 5.0\n")
    assert invoke(source, "--type", "q4_0").exit_code == 0
    assert (tmp_path / "tiny-Q4_0.gguf").exists()


@pytest.mark.parametrize(
    "line",
    [
        'cpu = "x86-avx2"',
        "sample = 512",
        'sensitivity = "s.json"',
        "max-slow-share = 60",
        "explain = true",
        "pure = true",
        'recipe-out = "kept.toml"',
    ],
)
def test_what_the_config_file_says_for_targets(source: Path, line: str) -> None:
    """Guards: a key for targets, or for single types, that makes every other run an error."""
    assert invoke(source, "--type", "q4", "--recipe-out", "r.toml", "--dry-run").exit_code == 0
    path = config_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[quantize]\n{line}\n")
    # The recipe of one run is another's.
    options = ("--dry-run", "--force") if line.startswith("recipe-out") else ("--dry-run",)
    shown = []
    target = ("--target-bpw", "5.5", "--sample", "512")
    for choice in (("--type", "q4"), ("--type", "Q4_K_M"), ("--recipe", "r.toml"), target):
        result = invoke(source, *choice, *options)
        assert result.exit_code == 0, (choice, result.exception)
        shown.append(result.stdout)
    assert (" Q6_K " in shown[1]) == (line != "pure = true"), "there it has its meaning"


def test_where_an_empty_word_is_from(source: Path) -> None:
    """Guards: an error about an option that nobody has given."""
    path = config_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('[quantize]\ntarget-size = ""\n')
    result = invoke(source)
    assert isinstance(result.exception, UsageError)
    assert "[quantize] target-size" in str(result.exception)
