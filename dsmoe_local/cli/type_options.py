"""What convert and quantize share: options about tensor types, and the table of a dry run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_size, parse_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.option_sources import from_command_line, settle, source_in_errors
from dsmoe_local.cli.options import FILE, FLAG, Group, all_of, option, text_value, typed
from dsmoe_local.cli.output import console, plain_table
from dsmoe_quantize.policy.named_recipes import RECIPES

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from dsmoe_local.model.ggml import GgmlType
    from dsmoe_local.model.gguf_file import Field
    from dsmoe_quantize.imatrix import Imatrix
    from dsmoe_quantize.policy.choice import Overrides, TensorChoice
    from dsmoe_quantize.policy.recipes import LayeredRecipe
    from dsmoe_quantize.write.output import Summary

Function = TypeVar("Function", bound=Callable[..., Any])

_ABOUT = (
    "\b\nTYPE is one of these recipes:\n"
    + "\n".join(f"  {recipe.name:<10}{recipe.why}" for recipe in RECIPES.values())
    + "\nor one of llama.cpp's types:"
    + "\n  8, 6 bits  Q8_0, Q6_K"
    + "\n  5 bits     Q5_K_M, Q5_K_S, Q5_1, Q5_0"
    + "\n  4 bits     Q4_K_M, Q4_K_S, Q4_1, Q4_0, IQ4_NL, IQ4_XS"
    + "\n  3 bits     Q3_K_L, Q3_K_M, Q3_K_S"
    + "\n  floats     f32, f16, bf16"
)
"""The text for {types} in the help of a command."""


def _complete_type(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the names of types that begin with what is typed."""
    from click.shell_completion import CompletionItem

    from dsmoe_quantize.policy.types import known_words

    wanted = incomplete.casefold()
    return [CompletionItem(word) for word in known_words() if word.casefold().startswith(wanted)]


_type_options = all_of(
    option(
        "--type",
        "word",
        "One of the types above, such as q4 or Q4_K_M.",
        {"metavar": "TYPE", "shell_complete": _complete_type},
    ),
    option("--recipe", "recipe_file", "Use the types of a recipe file, instead of --type.", FILE),
    option("--imatrix", "imatrix_file", "Importance matrix from dsmoe imatrix or llama-imatrix.", FILE),
    option("--dry-run", "dry_run", "Show the type of each tensor, and write nothing.", FLAG),
    option(
        "--threads",
        "threads",
        "Threads for quantizing.",
        typed(click.IntRange(1, 1024), "N"),
        shown="all cores",
    ),
    option(
        "--split-max-size",
        "split_max_size",
        "Split a larger output into files of at most this size, such as 4G, but for larger tensors.",
        text_value("SIZE"),
    ),
    option(
        "--tensor-type",
        "overrides",
        "Type of the tensors whose whole name matches. Repeatable; the first match wins.",
        text_value("REGEX=TYPE"),
        Group.TYPES,
        multiple=True,
    ),
    option("--output-type", "output_type", "Type of the output matrix.", text_value("TYPE"), Group.TYPES),
    option(
        "--embedding-type",
        "embedding_type",
        "Type of the token embedding.",
        text_value("TYPE"),
        Group.TYPES,
    ),
    option("--pure", "pure", "Use the type of --type for every matrix.", FLAG, Group.TYPES),
)


def type_options(function: Function) -> Function:
    """Add the options of `TypeOptions`, and `threads`, `dry_run` and `split_max_size`; fill in {types}."""
    function.__doc__ = inspect.cleandoc(function.__doc__ or "").replace("{types}", _ABOUT)
    return _type_options(function)


@dataclass(frozen=True, slots=True)
class TypeOptions:
    """The values of the options about types."""

    word: str | None
    recipe_file: Path | None
    imatrix_file: Path | None
    overrides: tuple[str, ...]
    output_type: str | None
    embedding_type: str | None
    pure: bool

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Select them from the parameters of a command."""
        return cls(**{each.name: values[each.name] for each in fields(cls)})

    def recipe(self) -> LayeredRecipe | None:
        """Read the recipe file. FileError, FormatError."""
        from dsmoe_quantize.policy.recipe_file import read_recipe

        return read_recipe(self.recipe_file) if self.recipe_file else None

    def imatrix(self) -> Imatrix | None:
        """Read the importance matrix. FileError, FormatError."""
        from dsmoe_quantize.imatrix_file import read_imatrix

        return read_imatrix(self.imatrix_file) if self.imatrix_file else None

    def parsed_overrides(self) -> Overrides:
        """Parse the overrides of single tensors. UsageError for an unknown type."""
        from dsmoe_quantize.policy.choice import Overrides, parse_override

        return Overrides(
            tensors=tuple(map(parse_override, self.overrides)),
            output=_target("output_type", self.output_type),
            embedding=_target("embedding_type", self.embedding_type),
            pure=self.pure,
        )


def _target(name: str, word: str | None) -> GgmlType | None:
    """Parse the type that an option names. UsageError for an unknown or empty name."""
    from dsmoe_quantize.policy.types import parse_target

    with source_in_errors(name):
        return None if word is None else parse_target(word)


def parse_split_size(text: str | None) -> int | None:
    """Parse the value of --split-max-size. UsageError if it is not a size, or zero."""
    if text is None:
        return None
    with source_in_errors("split_max_size"):
        size = parse_size(text)
        if not size:
            raise UsageError("the files of a split model need a size above 0", remedy="as in 4G")
        return size


def settle_types(values: Mapping[str, Any], *targets: str) -> dict[str, Any]:
    """Return the parameters of a command with one way to choose types: --type, --recipe or `targets`.

    UsageError if two ways come from equally strong sources.
    """
    settled = settle(values, ("word",), ("recipe_file",), targets)
    if settled["pure"] and not from_command_line("pure"):
        # From a variable or the config file, --pure does not affect recipes and targets.
        settled["pure"] = settled["word"] is not None and settled["word"].lower() not in RECIPES
    return settled


def show_types(choices: Sequence[TensorChoice], totals: str) -> None:
    """Print the table of a dry run on stdout, with a line of totals."""
    out, left = console(file_columns=160), ("tensor", "shape", "from", "to")
    table = plain_table(*left, "size", "why", left=left, wrap=("why",))
    for choice in choices:
        table.add_row(
            safe_line(choice.name),
            " x ".join(map(str, choice.shape)),
            choice.source_type.name,
            choice.type.name,
            format_size(choice.n_bytes),
            "; ".join(filter(None, (choice.reason, choice.misfit))),
        )
    out.print(table)
    out.print(totals)


def files_note(
    metadata: Mapping[str, Field], choices: Sequence[TensorChoice], split_max_size: int | None
) -> str:
    """Return " in N files" for an output that would be split, else ""."""
    if split_max_size is None:
        return ""
    from dsmoe_local.model.gguf_writer import plan_files

    n_files = len(plan_files(metadata, choices, split_max_size))
    return f" in {n_files} files" if n_files > 1 else ""


def summary_line(summary: Summary) -> str:
    """Return one line about a written file."""
    files = f" in {summary.n_files} files" if summary.n_files > 1 else ""
    return (
        f"{summary.path}: {format_size(summary.n_bytes)}{files},"
        f" {summary.bits_per_weight:.2f} bits per weight,"
        f" {summary.seconds:.1f} s, peak memory {format_size(summary.peak_memory)}"
    )
