"""What convert and quantize share on the command line: options about types, the table of a dry run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.configuration import from_command_line, told_origin
from dsmoe_quantize.policy.named_recipes import RECIPES

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from dsmoe_local.model.ggml import GgmlType
    from dsmoe_quantize.imatrix import Imatrix
    from dsmoe_quantize.policy.choice import Overrides, TensorChoice
    from dsmoe_quantize.policy.recipes import LayeredRecipe
    from dsmoe_quantize.write.output import Summary

Function = TypeVar("Function", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path)

_ABOUT = (
    "\b\nTYPE is a recipe of ours,\n"
    + "\n".join(f"  {recipe.name:<10}{recipe.why}" for recipe in RECIPES.values())
    + "\none of llama.cpp's mixes (Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_K_S, Q4_0, Q4_1,"
    + "\nIQ4_NL, IQ4_XS, ...), or f32, f16, bf16."
)
"""What takes the place of {types} in a command's help."""


class TypeWord(click.ParamType[str]):
    """A type's name. What it is, `dsmoe_quantize.policy.types.resolve` says."""

    name = "TYPE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As it is."""
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """All names, each as it is best written."""
        from click.shell_completion import CompletionItem

        from dsmoe_quantize.policy.types import known_words

        wanted = incomplete.casefold()
        return [CompletionItem(word) for word in known_words() if word.casefold().startswith(wanted)]


def all_of(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """A decorator that adds options to a command, in the order given."""

    def add(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return add


_type_options = all_of(
    click.option(
        "--type", "word", type=TypeWord(), help=f"{', '.join(RECIPES)}, or a type of llama.cpp's, as Q4_K_M."
    ),
    click.option(
        "--recipe",
        "recipe_file",
        type=_FILE,
        metavar="FILE",
        help="The types that a recipe file names, instead of --type.",
    ),
    click.option(
        "--imatrix",
        "imatrix_file",
        type=_FILE,
        metavar="FILE",
        help="What each channel counts: an importance matrix, of dsmoe imatrix or llama-imatrix.",
    ),
    click.option(
        "--tensor-type",
        "overrides",
        multiple=True,
        metavar="REGEX=TYPE",
        help="Type of the tensors whose whole name matches. Repeatable; the first match wins.",
    ),
    click.option("--output-type", metavar="TYPE", help="Type of the output matrix."),
    click.option("--embedding-type", metavar="TYPE", help="Type of the token embedding."),
    click.option("--pure", is_flag=True, help="The same type for every matrix."),
    click.option("--threads", type=click.IntRange(1, 1024), help="Encoding threads.  [default: all cores]"),
    click.option("--dry-run", is_flag=True, help="Show what would be written, tensor by tensor."),
)


def type_options(function: Function) -> Function:
    """Add the options that `TypeOptions` has, and `threads` and `dry_run`; say in the help what types are."""
    function.__doc__ = inspect.cleandoc(function.__doc__ or "").replace("{types}", _ABOUT)
    return _type_options(function)


@dataclass(frozen=True, slots=True)
class TypeOptions:
    """The options as they are given."""

    word: str | None
    recipe_file: Path | None
    imatrix_file: Path | None
    overrides: tuple[str, ...]
    output_type: str | None
    embedding_type: str | None
    pure: bool

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Those among a command's parameters."""
        return cls(**{each.name: values[each.name] for each in fields(cls)})

    @property
    def ways(self) -> dict[str, bool]:
        """What may say what the types are, and whether it does."""
        return {"--type": self.word is not None, "--recipe": self.recipe_file is not None}

    def recipe(self) -> LayeredRecipe | None:
        """The recipe of the file. FileError, FormatError."""
        from dsmoe_quantize.policy.recipe_file import read_recipe

        return read_recipe(self.recipe_file) if self.recipe_file else None

    def imatrix(self) -> Imatrix | None:
        """The importance matrix of the file. FileError, FormatError."""
        from dsmoe_quantize.imatrix_file import read_imatrix

        return read_imatrix(self.imatrix_file) if self.imatrix_file else None

    def parsed_overrides(self) -> Overrides:
        """Parse the options that override types of single tensors. UsageError for an unknown type."""
        from dsmoe_quantize.policy.choice import Overrides, parse_override

        return Overrides(
            tensors=tuple(map(parse_override, self.overrides)),
            output=_target("output_type", self.output_type),
            embedding=_target("embedding_type", self.embedding_type),
            pure=self.pure,
        )


def _target(name: str, word: str | None) -> GgmlType | None:
    """The type that an option gives. UsageError for a word that is none, an empty one, too."""
    from dsmoe_quantize.policy.types import parse_target

    with told_origin(name):
        return None if word is None else parse_target(word)


def refuse_several(ways: Mapping[str, bool]) -> None:
    """UsageError if more than one thing says what the types are."""
    given = [name for name, is_given in ways.items() if is_given]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", remedy="give one of them")


def outweighed(values: Mapping[str, Any], *more: tuple[str, ...]) -> dict[str, Any]:
    """A command's parameters without what is only in the config file or a variable where the command line
    says in another way what the types are, or where it does not go with that. `more`: ways besides --type and
    --recipe, each by parameters that go together.
    """
    ways = (("word",), ("recipe_file",), *more)
    spoken = [
        way for way in ways if any(values[name] is not None and from_command_line(name) for name in way)
    ]
    silenced = {name for way in ways if spoken and way not in spoken for name in way}
    kept = {name: None if name in silenced else value for name, value in values.items()}
    if kept["pure"] and not from_command_line("pure"):
        # Of one type alone: it is not meant for a recipe or a target.
        kept["pure"] = kept["word"] is not None and kept["word"].lower() not in RECIPES
    return kept


def show_types(choices: Sequence[TensorChoice], totals: str) -> None:
    """Print the table of a dry run on stdout, and a line below it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from dsmoe_local.model.ggml import type_name

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("tensor", "shape", "from", "to"):
        table.add_column(heading, no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("why")
    for choice in choices:
        table.add_row(
            safe_line(choice.name),
            " x ".join(map(str, choice.shape)),
            type_name(choice.tensor.type),
            type_name(choice.type),
            format_size(choice.n_bytes),
            "; ".join(filter(None, (choice.reason, choice.misfit))),
        )
    console.print(table)
    console.print(totals)


def show_notes(notes: Sequence[str]) -> None:
    """Say on stderr in a dry run what the run itself would."""
    for text in notes:
        click.echo(f"note: {safe_line(text, 400)}", err=True)


def summary_line(summary: Summary) -> str:
    """One line about a file that was written."""
    return (
        f"{summary.path}: {format_size(summary.n_bytes)}, {summary.bits_per_weight:.2f} bits per weight,"
        f" {summary.seconds:.1f} s, peak memory {format_size(summary.peak_memory)}"
    )
