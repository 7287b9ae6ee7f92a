"""`dsmoe serve`: arguments and wiring. dsmoe_local.serve does the work."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.errors import MissingExtraError, UsageError
from dsmoe_local.base.progress import Event, Note
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.model_argument import find_model, model_argument, model_option, models_folder
from dsmoe_local.cli.model_options import load_engine, loading_options, model_options
from dsmoe_local.cli.options import COUNT, FLAG, Group, option, text_value, typed
from dsmoe_local.cli.reply_options import reply_options, reply_settings
from dsmoe_local.model.discovery import known_models, note_use, size_of_files
from dsmoe_local.model.split_name import model_stem

if TYPE_CHECKING:
    from dsmoe_local.engine.process.client import EngineClient
    from dsmoe_local.engine.types import ModelOptions
    from dsmoe_local.serve.options import ServeOptions

_MEAN_TOKENS = 2048  # an estimate for a prompt with its reply
_MAX_SECONDS = 10_000_000  # that a timer can wait


_SECONDS = typed(click.FloatRange(0, _MAX_SECONDS), "SECONDS")


@define_command(
    "serve",
    ("dsmoe serve model.gguf", "Serve on http://127.0.0.1:8080/v1."),
    ("dsmoe serve model.gguf --host 0.0.0.0 --api-key KEY", "Serve other computers, too."),
)
@model_argument("argument", "[MODEL]", required=False)
@model_option
@option("--host", "host", "Address to listen at.", text_value("ADDRESS"), default="127.0.0.1")
@option("--port", "port", "Port; 0 takes a free one.", typed(click.IntRange(0, 65535), "N"), default=8080)
@option("-np, --parallel", "n_parallel", "Requests to decode at once; others wait.", COUNT, default=4)
@option(
    "--keep",
    "keep",
    "Models to keep in memory. Requests can name any model that `dsmoe models` lists.",
    COUNT,
    default=1,
    # Other commands have a --keep of another kind.
    section_only=True,
    envvar="DSMOE_SERVE_KEEP",
)
@option("--only", "only", "Serve this model only: requests cannot name another one.", FLAG)
@option(
    "--idle",
    "idle_seconds",
    "Unload a model that is not used for so long; 0 = never.",
    _SECONDS,
    default=0,
)
@option(
    "--api-key",
    "api_key",
    "Key that requests must have. Other users of this computer can see command lines: better set"
    " DSMOE_API_KEY, or api-key in the config file.",
    text_value("KEY"),
    Group.ACCESS,
    secret=True,
)
@option("--insecure", "insecure", "Serve other computers without a key.", FLAG, Group.ACCESS)
@option(
    "--cors-origin",
    "cors_origins",
    "Let web pages of ORIGIN use the server, such as http://localhost:3000; * lets all. Repeatable.",
    text_value("ORIGIN"),
    Group.ACCESS,
    multiple=True,
)
@option(
    "--allowed-host",
    "allowed_hosts",
    "Let clients use NAME for this computer. Addresses and localhost are always allowed. Repeatable.",
    text_value("NAME"),
    Group.ACCESS,
    multiple=True,
)
@option(
    "--max-queue",
    "max_queued",
    "Replies that may wait; more are refused with status 429.",
    typed(click.IntRange(0), "N"),
    Group.LIMITS,
    default=256,
)
@option(
    "--max-body",
    "max_mib",
    "Largest body of a request in MiB.",
    COUNT,
    Group.LIMITS,
    default=16,
)
@option(
    "--timeout",
    "max_seconds",
    "Longest time of a request, including its wait.",
    _SECONDS,
    Group.LIMITS,
    default=1800,
)
@option(
    "--grace",
    "grace",
    "How long replies may go on after SIGTERM or Ctrl-C.",
    _SECONDS,
    Group.LIMITS,
    default=10,
)
@option(
    "--experts",
    "experts",
    "Observe routed experts, for the page's heatmap and /v1/experts/last; about 3% slower.",
    FLAG,
)
@option("--log-requests", "log_text", "Print the bodies of requests, with all their text.", FLAG)
@model_options
@reply_options
def command(
    argument: str | None,
    named_model: str | None,
    n_parallel: int,
    **values: Any,  # noqa: ANN401 - the shared options
) -> None:
    """Serve a model over HTTP with OpenAI's API.

    Point clients at http://127.0.0.1:8080/v1; any API key will do unless --api-key sets one. Sampling options
    are the defaults of requests that do not set their own.
    """
    try:
        from dsmoe_local.serve.models import ModelSource, ServedModel
        from dsmoe_local.serve.server import listen, serve, url_of
    except ModuleNotFoundError as error:
        raise MissingExtraError("serve", error.name or "a package", "dsmoe serve") from error

    options = _options(values)
    keep, idle_seconds, only = values.pop("keep"), values.pop("idle_seconds"), values.pop("only")
    path = find_model(argument, named_model)
    stop = threading.Event()
    loading = dict(values)

    def load(wanted: Path) -> EngineClient:
        engine = _load(wanted, dict(loading), n_parallel, stop, is_first=wanted == path)
        if options.experts:
            _observe(engine)
        return engine

    # Before the model is loaded, which may take minutes.
    listener = listen(options.host, options.port)
    with listener, load_engine(path, values, lambda loading: _complete(loading, n_parallel), stop) as engine:
        if options.experts:
            _observe(engine)
        first = ServedModel.of(model_stem(path), engine)
        info = engine.info
        _log(f"{safe_line(first.name, 60)}: {url_of(listener)}/v1")
        _log(f"chat in a browser: {url_of(listener)}")
        _log(f"up to {info.n_parallel} requests at once, {info.n_context:,} tokens of context each")
        source = ModelSource(dict if only else _known, load, _fits, keep, idle_seconds, stop=stop)
        asyncio.run(serve(first, source, options, listener, _log))


def _known() -> dict[str, Path]:
    """Return the models that `dsmoe models` lists. Of several with one name, the first is the one to use."""
    found: dict[str, Path] = {}
    for model in known_models(models_folder()[0]):
        found.setdefault(model.name, model.path)
    return found


def _fits(path: Path) -> bool:
    """Return whether the weights of a model fit into the free memory. Otherwise they would be paged."""
    from dsmoe_local.engine.load.machine import available_memory

    return size_of_files(path) < available_memory()


def _load(
    path: Path, values: dict[str, Any], n_parallel: int, stop: threading.Event, *, is_first: bool
) -> EngineClient:
    """Load a model that a request names. There is no progress on the screen, only notes.

    As with `/model` in the chat, the chat template and the number of experts are for the first model only.
    """
    from dsmoe_local.engine.process.client import EngineClient

    def listen(event: Event) -> None:
        if isinstance(event, Note):
            _log(f"note: {safe_line(event.text, 400)}")

    log_file: Path | None = values.pop("log_file")
    options = loading_options(path, values)
    if not is_first:
        options = replace(options, chat_template=None, n_experts_per_token=None)
    engine = EngineClient.load(_complete(options, n_parallel), listen, stop, log_file=log_file)
    note_use(path)
    return engine


def _observe(engine: EngineClient) -> None:
    """Observe the routed experts, if the model has any."""
    from dsmoe_local.serve.generation import OBSERVERS

    if not engine.info.n_routed_experts:
        return
    try:
        engine.set_observers(OBSERVERS)
    except UsageError as error:
        _log(f"note: the experts of {safe_line(engine.info.name, 60)} are not observed: {error.what}")


def _complete(options: ModelOptions, n_parallel: int) -> ModelOptions:
    """Set the number of requests at once, and the context that they need."""
    from dsmoe_local.engine.load.parallel import Workload, choose_parallel

    options = replace(options, scores_prompts=True)
    return choose_parallel(options, Workload(n_parallel, None, n_parallel * _MEAN_TOKENS), n_parallel)


def _options(values: dict[str, Any]) -> ServeOptions:
    """Remove the options of the server itself from `values`. UsageError for wrong values."""
    from dsmoe_local.protocol.requests import RequestDefaults
    from dsmoe_local.serve.options import ServeOptions

    replies = reply_settings(values)
    return ServeOptions(
        RequestDefaults(
            replies.sampling,
            replies.max_tokens,
            replies.stop,
            replies.reasoning_budget,
            replies.chat_template_kwargs,
        ),
        max_body=values.pop("max_mib") << 20,
        **{
            name: values.pop(name)
            for name in (
                "host",
                "port",
                "api_key",
                "insecure",
                "cors_origins",
                "allowed_hosts",
                "max_queued",
                "max_seconds",
                "grace",
                "log_text",
                "experts",
            )
        },
    )


def _log(line: str) -> None:
    click.echo(line, err=True)
