"""`dsmoe batch`: arguments, the summary and the exit code. Reading, writing and errors are
dsmoe_local.batch's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.cli.model_options import (
    check_stop,
    find_model,
    load_engine,
    model_options,
    sampling_options,
    sampling_parameters,
)


@click.command(name="batch")
@click.argument("source", metavar="IN.jsonl", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "out",
    metavar="OUT.jsonl",
    type=click.Path(path_type=Path),
    required=True,
    help="The records.",
)
@click.option("-m", "--model", "named_model", metavar="FILE", help="The model; without one, the demo's.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["openai", "simple"]),
    default="openai",
    help="OpenAI's batch responses, or {id, text, finish_reason, usage, error} [openai].",
)
@click.option(
    "-n",
    "--max-tokens",
    "max_tokens",
    type=int,
    metavar="N",
    help="Longest reply [until the context is full].",
)
@click.option("-r", "--stop", "stop", multiple=True, metavar="TEXT", help="End replies before TEXT.")
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@model_options
@sampling_options
def command(
    source: Path,
    out: Path,
    named_model: str | None,
    form: str,
    max_tokens: int | None,
    stop: tuple[str, ...],
    force: bool,
    **values: Any,  # noqa: ANN401 - the shared options
) -> int:
    """Answer a file of prompts, one JSON object a line.

    A line holds {"prompt": …} or {"messages": […]}, and may hold "id", "max_tokens", "stop" and sampling
    parameters ("temperature", "top_p", "seed", …). Each record is on the disk before the next is begun. A bad
    line becomes an error record; the exit status is then 1.
    """
    from dsmoe_local.batch.job import BatchOptions, check_paths, run_batch
    from dsmoe_local.batch.records import BatchDefaults
    from dsmoe_local.cli.render import run_with_progress, show_result

    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"-n {max_tokens} is out of range", remedy="it takes 1 or more")
    check_stop(stop)
    defaults = BatchDefaults(sampling_parameters(values), max_tokens, stop)
    options = BatchOptions(source, out, defaults, form, force)
    check_paths(options)
    with load_engine(find_model(named_model), values) as engine:
        summary = run_with_progress(lambda listen, event: run_batch(engine, options, listen, event))
    show_result(
        f"{summary.n_records} records ({summary.n_failed} failed) in {summary.seconds:.1f} s: "
        f"{summary.n_prompt_tokens} tokens read, {summary.n_completion_tokens} generated"
    )
    sys.stderr.flush()
    return 1 if summary.n_failed else 0
