"""`dsmoe convert`: arguments and tables. What is done is dsmoe_convert's task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.type_options import (
    TypeOptions,
    outweighed,
    refuse_several,
    show_notes,
    show_types,
    summary_line,
    type_options,
)

if TYPE_CHECKING:
    from dsmoe_convert.convert import Conversion


@click.command(name="convert")
@click.argument("source", metavar="SRC", type=click.Path())
@click.option("-o", "--output", "out", metavar="OUT", type=click.Path(path_type=Path), help="File to write.")
@type_options
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option(
    "--pre", metavar="NAME", help="llama.cpp's name for the pre-tokenizer, if it is not recognised."
)
@click.option(
    "--allow-pickle", is_flag=True, help="Read .bin weights, in a restricted child process. Needs torch."
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of the repository.")
@click.option("--token", metavar="TOKEN", help="Access token of the hub.  [default: HF_TOKEN]")
@click.option("--low-disk", is_flag=True, help="Download, encode and delete one shard after another.")
def command(
    source: str,
    out: Path | None,
    threads: int | None,
    dry_run: bool,
    force: bool,
    pre: str | None,
    allow_pickle: bool,
    revision: str | None,
    token: str | None,
    low_disk: bool,
    **values: Any,  # noqa: ANN401 - the options about types
) -> None:
    """Make a GGUF from a Hugging Face checkpoint of a DeepSeekMoE, in one pass.

    SRC is a folder, or a repository such as deepseek-ai/deepseek-moe-16b-chat.

    {types}

    Without one, the weights keep their own. OUT is <name>-<TYPE>.gguf in the current folder unless named. A
    run that was interrupted continues when the same command is given again.

    To choose types for a target, such as a size, all weights must be there first: convert to bf16, then
    dsmoe quantize.
    """
    from dsmoe_convert.convert import ConvertOptions, RunOptions
    from dsmoe_convert.sources import SourceOptions, convert, plan_source
    from dsmoe_local.cli.render import run_with_progress, show_result

    for name, value in (("--revision", revision), ("--token", token)):
        if value == "":
            raise UsageError(f"{name} is empty", remedy="leave it out, or check the variable it came from")
    types = TypeOptions.of(outweighed(values))
    refuse_several(types.ways)
    options = ConvertOptions(
        types.word,
        types.parsed_overrides(),
        pre,
        allow_pickle,
        recipe=types.recipe(),
        imatrix=types.imatrix(),
    )
    source_options = SourceOptions(revision, token, low_disk=low_disk)
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
    """The table of a dry run, on stdout."""
    show_types(
        conversion.choices,
        f"{safe_line(str(out))}: {len(conversion.choices)} tensors, {format_size(conversion.n_bytes)},"
        f" {conversion.bits_per_weight:.2f} bits per weight",
    )
