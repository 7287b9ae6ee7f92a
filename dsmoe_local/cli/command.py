"""Command: a click command whose options have variables and a config file, and whose help has groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import click

from dsmoe_local.cli.option_sources import ConfigDefaults
from dsmoe_local.cli.options import Group, Option

Example = tuple[str, str]
"""A command line, and what it does."""

_OPTION_COLUMNS = 26
_EXAMPLE_COLUMNS = 44


class Command(click.Command):
    """A command with --debug, the variables and the config file, and examples at the end of its help."""

    def __init__(
        self,
        name: str | None,
        *,
        examples: Sequence[Example] = (),
        **attributes: Any,  # noqa: ANN401 - click's own
    ) -> None:
        settings: dict[str, Any] = {
            "help_option_names": ["-h", "--help"],
            "show_default": True,
            # As in llama.cpp, --max_tokens is --max-tokens.
            "token_normalize_func": lambda flag: flag.replace("_", "-"),
        }
        super().__init__(name, context_settings=settings, **attributes)
        self.examples = examples
        # `main` looks for it before anything is parsed, so that no config file can give it.
        debug = Option(
            ["--debug"],
            is_flag=True,
            expose_value=False,
            configurable=False,
            group=Group.ADVANCED,
            help="Show tracebacks of errors.",
        )
        self.params.append(debug)

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,  # noqa: ANN401 - click's own
    ) -> click.Context:
        """Parse a command line, with the config file behind it."""
        extra.setdefault("default_map", ConfigDefaults(self))
        return super().make_context(info_name, args, parent, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse arguments. An error names the command, so that the message can name its help."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, one section for each group."""

        def group(parameter: click.Parameter) -> int:
            each = parameter.group if isinstance(parameter, Option) else Group.ADVANCED
            return list(Group).index(each)

        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        for index, members in groupby(sorted(options, key=group), group):
            records = [record for each in members if (record := each.get_help_record(ctx))]
            # Padded, so that the descriptions of all groups begin in the same column.
            rows = [(flags.ljust(_OPTION_COLUMNS), text) for flags, text in records]
            with formatter.section(list(Group)[index]):
                formatter.write_dl(rows, col_max=_OPTION_COLUMNS)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        if self.examples:
            with formatter.section("Examples"):
                formatter.write_dl(self.examples, col_max=_EXAMPLE_COLUMNS)


def define_command(
    name: str,
    *examples: Example,
    **attributes: Any,  # noqa: ANN401 - click's own
) -> Callable[[Callable[..., Any]], Command]:
    """Return a decorator that makes a `Command` of a function."""
    return click.command(name, cls=Command, examples=examples, **attributes)
