"""`dsmoe batch`: arguments, summary and exit code. dsmoe_local.batch does the work."""

from __future__ import annotations

import csv
import json
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.durable import same_file
from dsmoe_local.base.errors import UsageError
from dsmoe_local.batch.urls import Url, parse_location
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.model_argument import find_model, model_option
from dsmoe_local.cli.model_options import load_engine, model_options
from dsmoe_local.cli.options import (
    FLAG,
    TEXT,
    Group,
    choice,
    json_option,
    option,
    parsed,
    text_value,
    typed,
)
from dsmoe_local.cli.output import show_result
from dsmoe_local.cli.progress import run_with_progress
from dsmoe_local.cli.ray_options import ray_options, run_on_ray, take_ray_options
from dsmoe_local.cli.reply_options import reply_options, reply_settings

if TYPE_CHECKING:
    from dsmoe_local.batch.job import BatchOptions, Job
    from dsmoe_local.batch.summary import BatchSummary
    from dsmoe_local.engine.types import ModelOptions

_NOT_WRITTEN = frozenset({".csv", ".tsv", ".xls", ".xlsx"})
_LEAST_DETERMINISTIC = 2  # llama.cpp uses other kernels for one sequence than for several
# The options that replies depend on. With --deterministic they also depend on the context, the threads and
# the devices; those are recorded as they are once the model is loaded.
_SETTINGS = ("cache_type_k", "cache_type_v", "n_experts_per_token", "chat_template")
_LOOSE_SETTINGS = ("n_context",)
_EXACT_SETTINGS = ("n_batch", "n_ubatch", "n_threads_batch", "flash_attention", "kernels")


def _parallel(text: str) -> int:
    """Read a number, or `auto` (0)."""
    word = text.lower()
    if word == "auto":
        return 0
    if not (word.isascii() and word.isdigit()) or not int(word):
        raise ValueError(f"{text!r} is neither a number from 1 nor auto")
    return int(word)


def _field_names(text: str) -> tuple[str, ...]:
    """Read names separated by commas; a name with a comma is written in double quotes."""
    try:
        names = tuple(name.strip() for name in next(csv.reader([text], strict=True)))
    except (csv.Error, StopIteration):
        names = ()
    if not names or not all(names):
        raise ValueError(f"{text!r} is not a list of fields")
    return names


class _Location(click.Path):
    """The type of a path or a URL."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """Return a Path or a Url."""
        return parse_location(value) if isinstance(value, str) else value


@define_command(
    "batch",
    ("dsmoe batch in.jsonl -o out.jsonl -m m.gguf", "Answer requests."),
    ("dsmoe batch q.txt --text --chat -o out.jsonl", "One question per line."),
    ("dsmoe batch in.jsonl -o out.jsonl --ray", "Let a Ray cluster answer."),
    ('dsmoe batch w.csv --template "Define {word}." -o out.jsonl', "Fill in a column of a table."),
    ("dsmoe batch 's3://b/*.parquet' -o out.parquet", "Read and write Parquet."),
    options_metavar="-o OUT [OPTIONS]",
)
@click.argument("sources", metavar="IN...", nargs=-1, required=True, type=_Location())
@option(
    "-o, --output",
    "out",
    "File or URL for the records, .jsonl or .parquet. An existing one is continued.",
    typed(_Location(), "OUT"),
    required=True,
)
@model_option
@option("--restart", "restart", "Replace an existing output.", FLAG)
@option(
    "-np, --parallel",
    "n_parallel",
    "Number of requests to decode at once.",
    parsed(_parallel, "N|auto"),
    default="auto",
)
@option("--text", "text", "Each input line is a prompt.", FLAG, Group.INPUT)
@option(
    "--template",
    "template",
    'Prompt with {fields} of JSONL, CSV or Parquet input: "Translate: {en}".',
    TEXT,
    Group.INPUT,
)
@option("--chat", "as_chat", "Send the prompts of --text and --template as chat messages.", FLAG, Group.INPUT)
@option(
    "--id-field",
    "id_field",
    "Field with the id of a line.",
    text_value("NAME"),
    Group.INPUT,
    shown="id or custom_id",
)
@option(
    "--format",
    "form",
    "Form of JSON records: OpenAI's, or {id, text, finish_reason, usage, timing, error}.",
    choice("openai", "simple"),
    Group.OUTPUT,
    shown="openai",
)
@option(
    "--keep",
    "keep",
    "Copy these input fields into the records, as `kept`: label,source.",
    parsed(_field_names, "FIELDS"),
    Group.OUTPUT,
    multiple=True,
)
@option(
    "--ordered", "ordered", "Write records in the order of the input, not as they finish.", FLAG, Group.OUTPUT
)
@option(
    "--deterministic",
    "deterministic",
    "Make each reply independent of other requests and of resuming; slower.",
    FLAG,
    Group.OUTPUT,
)
@option(
    "--max-errors",
    "max_errors",
    "Stop after more than N failed lines.",
    typed(click.IntRange(0), "N"),
    Group.OUTPUT,
)
@json_option("Print the summary as JSON, as the last line on stderr.", group=Group.OUTPUT)
@ray_options
@model_options
@reply_options
def command(
    sources: tuple[Path | Url, ...],
    named_model: str | None,
    n_parallel: int,
    deterministic: bool,
    as_json: bool,
    **values: Any,  # noqa: ANN401 - the shared options
) -> int:
    """Answer files of prompts: JSONL, CSV or Parquet, at paths or URLs; - is stdin.

    A line or row is a request of OpenAI's batch API, or has {"prompt": ...} or {"messages": [...]}. It may
    also have "id", "max_tokens", "stop" and sampling parameters ("temperature", "top_p", "seed", ...). After
    a crash or a kill, the same command continues the run; no record is lost or duplicated. An invalid line
    becomes an error record, and the exit status is then 1.
    """
    from dsmoe_local.batch.job import prepared
    from dsmoe_local.batch.run import run
    from dsmoe_local.engine.load.parallel import DETERMINISTIC_PARALLEL

    _check_format(values["out"])
    ray = take_ray_options(values)
    model = find_model(named_model=named_model)
    if deterministic:
        n_parallel = max(n_parallel or DETERMINISTIC_PARALLEL, _LEAST_DETERMINISTIC)
    options = _options(sources, model, n_parallel if deterministic else None, values)
    _check_outputs(model, options, values["log_file"])
    stop = threading.Event()
    with ExitStack() as stack:
        job = run_with_progress(
            lambda listen, stop: stack.enter_context(prepared(options, listen, stop)), stop
        )
        if job.plan.n_lines and ray is not None:
            run_on_ray(ray, model, values, partial(_complete, job=job), n_parallel, job, stop)
        elif job.plan.n_lines:
            engine = stack.enter_context(
                load_engine(model, values, partial(_with_parallel, n_parallel=n_parallel, job=job), stop)
            )
            run_with_progress(lambda listen, stop: run(engine, job, listen, stop), stop)
        else:
            job.output.open()
            run_with_progress(job.finish, stop)
    _show(job.summary, as_json)
    return 1 if job.summary.n_failed else 0


def _check_format(out: Path | Url) -> None:
    """UsageError if the name of the output asks for a form that records do not have."""
    name = Path(out.name)
    if name.suffix.lower() in _NOT_WRITTEN:
        raise UsageError(
            f"records cannot be written as {name.suffix}",
            where=str(out),
            remedy=f"name {name.stem}.jsonl, or {name.stem}.parquet for a table",
        )


def _check_outputs(model: Path, options: BatchOptions, log_file: Path | None) -> None:
    """Raise UsageError if an output is the model, or if two outputs are the same file."""
    outputs = [options.out, *([options.parquet] if options.parquet else [])]
    for flag, path in (*(("-o", out) for out in outputs), ("--log-file", log_file)):
        if path is not None and same_file(path, model):
            raise UsageError(f"{flag} names the model", where=str(path), remedy="name another file")
    if log_file is not None and log_file.absolute() in [out.absolute() for out in outputs]:
        raise UsageError("-o and --log-file name the same file", where=str(log_file))


def _complete(options: ModelOptions, job: Job) -> ModelOptions:
    """Set what depends on the job."""
    return replace(
        options,
        deterministic=job.options.deterministic,
        prompt_ratio=job.prompt_ratio,
        scores_prompts=job.index.workload.scores_prompts,
    )


def _with_parallel(options: ModelOptions, n_parallel: int, job: Job) -> ModelOptions:
    """Set what depends on the job, and the number of requests at once; 0: what suits the remaining work."""
    from dsmoe_local.engine.load.parallel import choose_parallel

    return choose_parallel(_complete(options, job), job.workload, n_parallel or None)


def _options(
    sources: tuple[Path | Url, ...], model: Path, n_deterministic: int | None, values: dict[str, Any]
) -> BatchOptions:
    """Remove the options of the batch itself from `values`. UsageError for wrong values."""
    from dsmoe_local.batch.input_form import InputForm, parse_template
    from dsmoe_local.batch.job import BatchOptions
    from dsmoe_local.protocol.requests import RequestDefaults

    replies, template = reply_settings(values), values.pop("template")
    return BatchOptions(
        sources=sources,
        defaults=RequestDefaults(
            replies.sampling,
            replies.max_tokens,
            replies.stop,
            replies.reasoning_budget,
            replies.chat_template_kwargs,
        ),
        input=InputForm(
            text=values.pop("text"),
            template=parse_template(template) if template is not None else None,
            chat=values.pop("as_chat"),
            id_field=values.pop("id_field") or None,
            keep=tuple(dict.fromkeys(name for names in values.pop("keep") for name in names)),
        ),
        names=_names(model, values),
        settings=_settings(model, n_deterministic, values),
        model=model,
        deterministic=n_deterministic is not None,
        **_destination(values.pop("out"), values.pop("form")),
        **{name: values.pop(name) for name in ("ordered", "restart", "max_errors")},
    )


def _destination(named: Path | Url, form: str | None) -> dict[str, Any]:
    """Return the options that say where the records are written, and in what form."""
    from dsmoe_local.batch.parquet_input import SUFFIXES

    # What goes to a URL is written here first, in the current folder.
    local = named if isinstance(named, Path) else Path(named.name)
    if not local.name:
        raise UsageError("the output has no name", where=str(named), remedy="name a file")
    address = None if isinstance(named, Path) else named
    if local.suffix.lower() not in SUFFIXES:
        return {"out": local, "address": address, "form": form or "openai"}
    if form == "openai":
        raise UsageError("a Parquet file has columns of its own", remedy="leave out --format openai")
    local = local.resolve() if local.is_symlink() else local
    records = local.with_name(f"{local.name}.jsonl")
    return {"out": records, "parquet": local, "address": address, "form": "simple"}


def _settings(model: Path, n_deterministic: int | None, values: dict[str, Any]) -> dict[str, str]:
    """Return the settings that all records of an output share; a resumed run must have the same."""
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
    """Return readable names of the settings that are digests of files."""
    template = _template_file(values)
    return {"model": model.name} | ({"chat_template": template.name} if template is not None else {})


def _template_file(values: dict[str, Any]) -> Path | None:
    """Return the file that --chat-template names; None for a built-in template."""
    path = Path(values["chat_template"] or "")
    return path if path.is_file() else None


def _show(summary: BatchSummary, as_json: bool) -> None:
    if as_json:
        sys.stderr.write(json.dumps(summary.as_json()) + "\n")
    else:
        show_result(summary.in_words())
    sys.stderr.flush()
