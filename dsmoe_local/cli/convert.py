"""`dsmoe convert`: arguments and tables. dsmoe_convert does the work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.hub_options import check_hub_options, hub_options
from dsmoe_local.cli.options import FLAG, Group, option, path_value, text_value
from dsmoe_local.cli.output import show_notes, show_result
from dsmoe_local.cli.progress import run_with_progress
from dsmoe_local.cli.type_options import (
    TypeOptions,
    files_note,
    parse_split_size,
    settle_types,
    show_types,
    summary_line,
    type_options,
)

if TYPE_CHECKING:
    from dsmoe_convert.convert import Conversion


@define_command(
    "convert",
    ("dsmoe convert ./deepseek-moe-16b --type q4", "Convert a folder."),
    ("dsmoe convert deepseek-ai/deepseek-moe-16b-chat --type q4 --low-disk", "Download and convert."),
)
@click.argument("source", metavar="SRC", type=click.Path())
@option(
    "-o, --output",
    "out",
    "File to write.",
    path_value("OUT"),
    shown="<name>-<TYPE>.gguf",
)
@type_options
@option("--low-disk", "low_disk", "Download, convert and delete one shard at a time.", FLAG)
@option("--force", "force", "Replace an existing output.", FLAG)
@hub_options
@option(
    "--pre",
    "pre",
    "llama.cpp's name of the pre-tokenizer, if it is not recognized.",
    text_value("NAME"),
    Group.INPUT,
)
@option(
    "--allow-pickle",
    "allow_pickle",
    "Read .bin weights, in a restricted child process. Needs torch.",
    FLAG,
    Group.INPUT,
)
def command(
    source: str,
    out: Path | None,
    threads: int | None,
    dry_run: bool,
    split_max_size: str | None,
    force: bool,
    pre: str | None,
    allow_pickle: bool,
    revision: str | None,
    token: str | None,
    low_disk: bool,
    **values: Any,  # noqa: ANN401 - the options about types
) -> None:
    """Convert a Hugging Face checkpoint of a mixture of experts to GGUF, and quantize it in the same pass.

    SRC is a folder, or a repository such as deepseek-ai/deepseek-moe-16b-chat, or the address of its page on
    huggingface.co.

    {types}

    Without a type, weights keep theirs. By default, the file is written to the current folder. Run the same
    command again to continue an interrupted run.

    For a target, such as a size, convert to bf16 first and then use dsmoe quantize.
    """
    from dsmoe_convert.convert import ConvertOptions, RunOptions
    from dsmoe_convert.hub import parse_address
    from dsmoe_convert.sources import SourceOptions, convert, plan_source

    check_hub_options(revision, token)
    types = TypeOptions.of(settle_types(values))
    options = ConvertOptions(
        types.word,
        types.parsed_overrides(),
        pre,
        allow_pickle,
        recipe=types.recipe(),
        imatrix=types.imatrix(),
        split_max_size=parse_split_size(split_max_size),
    )
    source, named_revision, _ = parse_address(source)
    source_options = SourceOptions(revision or named_revision, token, low_disk=low_disk)
    if dry_run:
        planned = run_with_progress(
            lambda listen, stop: plan_source(
                source, options, source_options, RunOptions(listen=listen, stop=stop), headers_only=True
            )
        )
        _show(planned.conversion, out or planned.conversion.default_name)
        show_notes(planned.conversion.notes)
        return
    summary = run_with_progress(
        lambda listen, stop: convert(
            source, out, options, source_options, RunOptions(threads or 0, force, listen, stop)
        )
    )
    show_result(summary_line(summary))


def _show(conversion: Conversion, out: Path | str) -> None:
    """Print the table of a dry run on stdout."""
    files = files_note(conversion.metadata, conversion.choices, conversion.split_max_size)
    show_types(
        conversion.choices,
        f"{safe_line(str(out))}: {len(conversion.choices)} tensors, {format_size(conversion.n_bytes)}{files},"
        f" {conversion.bits_per_weight:.2f} bits per weight",
    )
