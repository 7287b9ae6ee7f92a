"""`dsmoe batch`: arguments, the summary and the exit code. The work and its errors are `batch`'s."""

from __future__ import annotations

import csv
import json
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.durable import same_file
from dsmoe_local.base.errors import UsageError
from dsmoe_local.cli.model_options import (
    find_model,
    load_engine,
    model_option,
    model_options,
)
from dsmoe_local.cli.reply_options import check_stop, reply_limit, reply_options, sampling_parameters

if TYPE_CHECKING:
    from dsmoe_local.batch.job import BatchOptions, Job
    from dsmoe_local.batch.summary import BatchSummary
    from dsmoe_local.engine.types import ModelOptions

_LEAST_DETERMINISTIC = 2  # one sequence alone takes other kernels than several
# What a reply depends on beside the model's file. With --deterministic the context, threads and devices do,
# too, but as they are once the model is loaded.
_SETTINGS = ("cache_type_k", "cache_type_v", "n_experts_per_token", "chat_template")
_LOOSE_SETTINGS = ("n_context",)
_EXACT_SETTINGS = ("n_batch", "n_ubatch", "n_threads_batch", "flash_attention")


class Parallel(click.ParamType[int]):
    """`--parallel`: a number, or `auto` (0)."""

    name = "N|auto"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """0 for auto."""
        word = str(value).lower()
        if word == "auto":
            return 0
        if not (word.isascii() and word.isdigit()) or not int(word):
            self.fail(f"{value!r} is neither a number from 1 nor auto", param, ctx)
        return int(word)


class FieldNames(click.ParamType[tuple[str, ...]]):
    """`--keep`: names separated by commas; one that holds a comma itself stands in double quotes."""

    name = "FIELDS"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """The names."""
        if isinstance(value, tuple):
            return value
        try:
            names = tuple(name.strip() for name in next(csv.reader([str(value)], strict=True)))
        except (csv.Error, StopIteration):
            names = ()
        if not names or not all(names):
            self.fail(f"{value!r} is not a list of fields", param, ctx)
        return names


@click.command(name="batch", options_metavar="-o OUT.jsonl [OPTIONS]")
@click.argument("source", metavar="IN.jsonl|-", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "out",
    metavar="OUT.jsonl",
    type=click.Path(path_type=Path),
    required=True,
    help="The records. What is there already is continued.",
)
@model_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["openai", "simple"]),
    default="openai",
    help="OpenAI's batch responses, or {id, text, finish_reason, usage, timing, error} [openai].",
)
@click.option("--text", is_flag=True, help="Each input line is a prompt as it is.")
@click.option("--template", metavar="TEXT", help='A prompt with {field}s of JSONL or CSV: "Translate: {en}".')
@click.option("--chat", "as_chat", is_flag=True, help="--text and --template make a user's messages.")
@click.option(
    "--id-field", "id_field", metavar="NAME", help="The field that names a line's record [id or custom_id]."
)
@click.option(
    "--keep",
    "keep",
    type=FieldNames(),
    multiple=True,
    help="Fields of the lines that their records carry along, as `kept`: label,source.",
)
@click.option(
    "-np", "--parallel", "n_parallel", type=Parallel(), default="auto", help="Requests at once [auto]."
)
@click.option(
    "--deterministic", is_flag=True, help="The same text whatever else runs, also after a resume; slower."
)
@click.option("--ordered", is_flag=True, help="Records in the order of the input [as they are finished].")
@click.option(
    "--max-errors",
    "max_errors",
    type=click.IntRange(0),
    metavar="N",
    help="Give up after more than N failed lines.",
)
@click.option("--restart", is_flag=True, help="Replace an output that exists.")
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON, the last line on stderr.")
@model_options
@reply_options
def command(
    source: Path,
    named_model: str | None,
    n_parallel: int,
    deterministic: bool,
    as_json: bool,
    **values: Any,  # noqa: ANN401 - the shared options
) -> int:
    """Answer a file of prompts, one JSON object a line; `-` is standard input.

    A line is OpenAI's batch request, or holds {"prompt": …} or {"messages": […]}, and may hold "id",
    "max_tokens", "stop" and sampling parameters ("temperature", "top_p", "seed", …). No record is lost or
    written twice, whatever kills the run: the same command goes on where it ended. A bad line becomes an
    error record; the exit status is then 1.
    """
    from dsmoe_local.batch.job import prepared
    from dsmoe_local.batch.run import run
    from dsmoe_local.cli.render import run_with_progress
    from dsmoe_local.engine.load.parallel import DETERMINISTIC_PARALLEL

    model = find_model(named_model=named_model)
    _spare(model, values["out"], values["log_file"])
    if deterministic:
        n_parallel = max(n_parallel or DETERMINISTIC_PARALLEL, _LEAST_DETERMINISTIC)
    options = _options(source, model, n_parallel if deterministic else None, values)
    stop = threading.Event()
    with ExitStack() as stack:
        job = run_with_progress(
            lambda listen, stop: stack.enter_context(prepared(options, listen, stop)), stop
        )
        if job.order:
            engine = stack.enter_context(
                load_engine(model, values, lambda options: _complete(options, n_parallel, job), stop)
            )
            run_with_progress(lambda listen, stop: run(engine, job, listen, stop), stop)
        else:
            job.output.open()
            job.finish()
    _show(job.summary, as_json)
    return 1 if job.summary.n_failed else 0


def _spare(model: Path, out: Path, log_file: Path | None) -> None:
    """UsageError if what would be written is the model, or one file for two things."""
    for flag, path in (("-o", out), ("--log-file", log_file)):
        if path is not None and same_file(path, model):
            raise UsageError(f"{flag} names the model", where=str(path), remedy="name another file")
    if log_file is not None and log_file.absolute() == out.absolute():
        raise UsageError("-o and --log-file name one file", where=str(out))


def _complete(options: ModelOptions, n_parallel: int, job: Job) -> ModelOptions:
    """`n_parallel` 0: as many as suit the work that is left."""
    from dsmoe_local.engine.load.parallel import choose_parallel

    options = replace(options, deterministic=job.options.deterministic)
    return choose_parallel(options, job.workload, n_parallel or None)


def _options(source: Path, model: Path, n_deterministic: int | None, values: dict[str, Any]) -> BatchOptions:
    """Takes what is the batch's own out of `values`. UsageError for what cannot be."""
    from dsmoe_local.batch.job import BatchOptions
    from dsmoe_local.batch.requests import BatchDefaults
    from dsmoe_local.batch.sources import InputForm, parse_template

    max_tokens, stop, template = (values.pop(name) for name in ("max_tokens", "stop", "template"))
    check_stop(stop)
    return BatchOptions(
        source=source,
        defaults=BatchDefaults(sampling_parameters(values), reply_limit(max_tokens), stop),
        input=InputForm(
            text=values.pop("text"),
            template=parse_template(template) if template is not None else None,
            chat=values.pop("as_chat"),
            id_field=values.pop("id_field") or None,
            keep=tuple(dict.fromkeys(name for names in values.pop("keep") for name in names)),
        ),
        names=_names(model, values),
        settings=_settings(model, n_deterministic, values),
        deterministic=n_deterministic is not None,
        **{name: values.pop(name) for name in ("out", "form", "ordered", "restart", "max_errors")},
    )


def _settings(model: Path, n_deterministic: int | None, values: dict[str, Any]) -> dict[str, str]:
    """What the records of one output have in common, beside the batch's own options."""
    from dsmoe_local.model.identity import file_identity

    names = _SETTINGS + (_EXACT_SETTINGS if n_deterministic else _LOOSE_SETTINGS)
    settings = {"model": file_identity(model)} | {name: str(values.get(name)) for name in names}
    template = _template_file(values)
    if template is not None:
        settings["chat_template"] = file_identity(template)
    if n_deterministic:
        settings["parallel"] = str(n_deterministic)
    return settings


def _names(model: Path, values: dict[str, Any]) -> dict[str, str]:
    """What people call the settings that are digests of files."""
    template = _template_file(values)
    return {"model": model.name} | ({"chat_template": template.name} if template is not None else {})


def _template_file(values: dict[str, Any]) -> Path | None:
    """The file that --chat-template names; None if it names a built-in template."""
    path = Path(values["chat_template"] or "")
    return path if path.is_file() else None


def _show(summary: BatchSummary, as_json: bool) -> None:
    from dsmoe_local.cli.render import show_result

    if as_json:
        sys.stderr.write(json.dumps(summary.as_json()) + "\n")
    else:
        show_result(summary.in_words())
    sys.stderr.flush()
